"""One connection to a node: its agent, started over ssh as the job will be, and what it means when that fails."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import shlex
import sys
from collections import deque
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from scalekd_ds.cluster.doctor import agent

PROGRAM = Path(agent.__file__).read_bytes()
# the agent's first line says how long it is; the rest of stdin are its requests
_BOOT = "import sys; f = sys.stdin.buffer; exec(compile(f.read(int(f.readline())), 'doctor', 'exec'))"
# an answer is one line
_LONGEST_ANSWER = 4 << 20
# what ssh says -> what to do
_SSH_SAYS = (
    ("Permission denied", "its sshd takes no key of yours: ssh-copy-id {name}"),
    ("Host key verification failed", "its host key is unknown or has changed: connect once with `ssh {name}`"),
    ("Could not resolve hostname", "its name does not resolve here: add it to /etc/hosts or ~/.ssh/config"),
    ("Name or service not known", "its name does not resolve here: add it to /etc/hosts or ~/.ssh/config"),
    ("timed out", "it does not answer: is it up, and its name right?"),
    ("No route to host", "it does not answer: is it up, and its name right?"),
    ("Network is unreachable", "it does not answer: is it up, and its name right?"),
    ("Connection refused", "no sshd listens there: start it, or give its port with --ssh-port"),
)


class NodeError(Exception):
    """A node that cannot go on; the message says what is wrong and what to do."""


def remote_command(exports: dict[str, str]) -> str:
    """What the node's shell runs: this Python, in this folder, with what the launcher exports."""
    folder = os.getcwd()
    path = os.pathsep.join([folder, *filter(None, [exports.get("PYTHONPATH")])])
    words = [f"{name}={value}" for name, value in {**exports, "PYTHONPATH": path}.items()]
    return f"cd {shlex.quote(folder)} && exec {shlex.join(['env', *words, sys.executable, '-u', '-c', _BOOT])}"


def command_for(name: str, ssh: Sequence[str], exports: dict[str, str]) -> list[str]:
    """The local command that reaches a node; `{host}` in it is the node's name, which comes last where it is not used."""
    remote = remote_command(exports)
    if not ssh:
        return ["sh", "-c", remote]
    if any("{host}" in word for word in ssh):
        return [*(word.replace("{host}", name) for word in ssh), remote]
    return [*ssh, name, remote]


class Node:
    """A node's agent: `start`, any number of `ask`, and `close` whatever happened.

    Args:
        name: As in the hosts file.
        command: Reaches it.
    """

    def __init__(self, name: str, command: Sequence[str]) -> None:
        self.name = name
        self._command = command
        self._errors: deque[str] = deque(maxlen=20)
        self._late: str | None = None
        self._process: asyncio.subprocess.Process | None = None

    async def start(self) -> None:
        """Connects. Raises NodeError where the command itself cannot run; all else shows at the first answer."""
        pipe = asyncio.subprocess.PIPE
        try:
            self._process = await asyncio.create_subprocess_exec(
                *self._command, stdin=pipe, stdout=pipe, stderr=pipe, limit=_LONGEST_ANSWER
            )
        except OSError as error:
            raise NodeError(f"{self._command[0]} cannot be started here: {error.strerror}: install it") from None
        self._reader = asyncio.create_task(self._read_errors())
        with contextlib.suppress(ConnectionError):
            self._process.stdin.write(b"%d\n%b" % (len(PROGRAM), PROGRAM))
            await self._process.stdin.drain()

    async def close(self) -> None:
        """Ends the agent, and the connection."""
        if self._process is None:
            return
        with contextlib.suppress(ConnectionError):
            self._process.stdin.close()
        try:
            # the agent ends with its stdin
            await asyncio.wait_for(self._process.wait(), 1)
        except TimeoutError:
            # it may end in between
            with contextlib.suppress(ProcessLookupError):
                self._process.kill()
            await self._process.wait()
        self._reader.cancel()

    async def _read_errors(self) -> None:
        with contextlib.suppress(ValueError):
            async for line in self._process.stderr:
                self._errors.append(line.decode(errors="replace").strip())

    async def ask(self, what: str, within: float, /, **request: Any) -> dict[str, Any]:
        """The agent's answer to one request, waited for that many seconds.

        Raises:
            NodeError: The connection ended, no answer came in time, or the answer is an error.
        """
        if self._late is not None:
            raise NodeError(self._late)
        try:
            answer = await asyncio.wait_for(self._ask(what, request), within)
        except TimeoutError:
            # an answer that comes yet would be taken for the next one
            self._late = f"it gave no answer ({what}) within {within:.0f} s: is it overloaded?"
            raise NodeError(self._late) from None
        if "error" in answer:
            raise NodeError(answer["error"])
        return answer

    async def _ask(self, what: str, request: dict[str, Any]) -> dict[str, Any]:
        with contextlib.suppress(ConnectionError):
            self._process.stdin.write(json.dumps({"do": what, **request}).encode() + b"\n")
            await self._process.stdin.drain()
        try:
            async for line in self._process.stdout:
                _, found, answer = line.decode(errors="replace").partition(agent.MARK)
                if found:
                    return json.loads(answer)
        except ValueError as error:
            raise NodeError(f"its answer is damaged: {error}") from None
        status = await self._process.wait()
        # what stderr still holds comes a moment after the end
        await asyncio.wait([self._reader], timeout=1)
        raise NodeError(self._why(status))

    def _why(self, status: int) -> str:
        said = [line for line in self._errors if line]
        text = " ".join(said)
        # sh and bash, then env, in their own words
        if "cd:" in text:
            return f"it has no folder {os.getcwd()}: put the repository at the same path"
        if "env:" in text:
            return f"it has no Python at {sys.executable}: make the same environment at the same path"
        for says, cure in _SSH_SAYS:
            if says in text:
                return cure.format(name=self.name)
        return f"the connection ended with status {status}: {said[-1][:200] if said else 'nothing was said'}"
