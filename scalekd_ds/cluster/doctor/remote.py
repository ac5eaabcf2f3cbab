"""The connection to a node's agent, which is started over ssh as the job will be.

If that fails, the error says what to do about it.
"""

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

AGENT_SOURCE = Path(agent.__file__).read_bytes()
# the first line of stdin is the length of the agent's source, which follows; the remaining lines are requests
_BOOTSTRAP = "import sys; f = sys.stdin.buffer; exec(compile(f.read(int(f.readline())), 'doctor', 'exec'))"
# bytes of an answer, which is one line
_LONGEST_ANSWER = 4 << 20
# part of ssh's error message -> what is wrong and what to do
_SSH_ERRORS = (
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
    """A node cannot be examined further; the message says what is wrong and what to do."""


def remote_command(exports: dict[str, str]) -> str:
    """What the node's shell runs: this Python, in this folder, with the variables that the launcher exports."""
    folder = os.getcwd()
    path = os.pathsep.join([folder, *filter(None, [exports.get("PYTHONPATH")])])
    words = [f"{name}={value}" for name, value in {**exports, "PYTHONPATH": path}.items()]
    return f"cd {shlex.quote(folder)} && exec {shlex.join(['env', *words, sys.executable, '-u', '-c', _BOOTSTRAP])}"


def command_for(name: str, ssh: Sequence[str], exports: dict[str, str]) -> list[str]:
    """The local command that starts the agent on a node.

    Args:
        name: The node's name. It replaces `{host}` in the words of `ssh`, or follows them if there is no `{host}`.
        ssh: Words of the command that reaches a node; empty runs the agent on this machine.
        exports: Name -> value of the variables that the launcher exports.
    """
    remote = remote_command(exports)
    if not ssh:
        return ["sh", "-c", remote]
    if any("{host}" in word for word in ssh):
        return [*(word.replace("{host}", name) for word in ssh), remote]
    return [*ssh, name, remote]


class Node:
    """The agent of a node. Call `start` once, `ask` any number of times, and `close` in any case.

    Args:
        name: The node's name in the hosts file.
        command: Words of the local command that starts the agent, from `command_for`.
    """

    def __init__(self, name: str, command: Sequence[str]) -> None:
        self.name = name
        self._command = command
        self._stderr: deque[str] = deque(maxlen=20)
        self._timed_out: str | None = None
        # an asyncio.subprocess.Process with three pipes, once it is started
        self._process: Any = None

    async def start(self) -> None:
        """Starts the agent. Its other failures, such as those of ssh, show at the first `ask`.

        Raises:
            NodeError: The local command cannot be started.
        """
        pipe = asyncio.subprocess.PIPE
        try:
            self._process = await asyncio.create_subprocess_exec(
                *self._command, stdin=pipe, stdout=pipe, stderr=pipe, limit=_LONGEST_ANSWER
            )
        except OSError as error:
            raise NodeError(f"{self._command[0]} cannot be started here: {error.strerror}: install it") from None
        self._stderr_task = asyncio.create_task(self._read_stderr())
        with contextlib.suppress(ConnectionError):
            self._process.stdin.write(b"%d\n%b" % (len(AGENT_SOURCE), AGENT_SOURCE))
            await self._process.stdin.drain()

    async def close(self) -> None:
        """Ends the agent and the connection."""
        if self._process is None:
            return
        with contextlib.suppress(ConnectionError):
            self._process.stdin.close()
        try:
            # the agent ends when its stdin is closed
            await asyncio.wait_for(self._process.wait(), 1)
        except TimeoutError:
            # it may have ended since
            with contextlib.suppress(ProcessLookupError):
                self._process.kill()
            await self._process.wait()
        self._stderr_task.cancel()

    async def _read_stderr(self) -> None:
        with contextlib.suppress(ValueError):
            async for line in self._process.stderr:
                self._stderr.append(line.decode(errors="replace").strip())

    async def ask(self, action: str, timeout: float, /, **request: Any) -> dict[str, Any]:
        """The agent's answer to one request.

        Args:
            action: Name of the request, as in `agent.main`.
            timeout: Seconds to wait for the answer.
            **request: Arguments of the request.

        Raises:
            NodeError: The connection ended, no answer came in time, or the answer is an error.
        """
        if self._timed_out is not None:
            raise NodeError(self._timed_out)
        try:
            answer = await asyncio.wait_for(self._ask(action, request), timeout)
        except TimeoutError:
            # later requests fail too, since the late answer would be taken for theirs
            self._timed_out = f"it gave no answer ({action}) within {timeout:.0f} s: is it overloaded?"
            raise NodeError(self._timed_out) from None
        if "error" in answer:
            raise NodeError(answer["error"])
        return answer

    async def _ask(self, action: str, request: dict[str, Any]) -> dict[str, Any]:
        with contextlib.suppress(ConnectionError):
            self._process.stdin.write(json.dumps({"do": action, **request}).encode() + b"\n")
            await self._process.stdin.drain()
        try:
            async for line in self._process.stdout:
                _, found, answer = line.decode(errors="replace").partition(agent.MARK)
                if found:
                    return json.loads(answer)
        except ValueError as error:
            raise NodeError(f"its answer is damaged: {error}") from None
        status = await self._process.wait()
        # the last lines of stderr may arrive a moment after the process has ended
        await asyncio.wait([self._stderr_task], timeout=1)
        raise NodeError(self._explain(status))

    def _explain(self, status: int) -> str:
        """What a connection's end means, from what it wrote to stderr."""
        lines = [line for line in self._stderr if line]
        text = " ".join(lines)
        # `cd:` is in the message of sh and bash, `env:` in that of env
        if "cd:" in text:
            return f"it has no folder {os.getcwd()}: put the repository at the same path"
        if "env:" in text:
            return f"it has no Python at {sys.executable}: make the same environment at the same path"
        for message, cure in _SSH_ERRORS:
            if message in text:
                return cure.format(name=self.name)
        return f"the connection ended with status {status}: {lines[-1][:200] if lines else 'nothing was said'}"
