"""Where the ranks of a job meet: whether its address and port can be used, and what is wrong where they cannot."""

from __future__ import annotations

import os
import socket
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import timedelta

from torch.distributed import TCPStore

from scalekd_ds.cluster.ranks import shell_of_one_task
from scalekd_ds.errors import UserError, first_line, rank_and_host

# seconds in which a name may become known: that of a pod is not before the pod runs
_RESOLVE_S = 30.0
# seconds after which a rank says what it waits for, and looks whether it can be reached at all
_PATIENCE_S = 20.0
# seconds for which an address may lead nowhere: at once on rank 0, whose port is open, and later where its node may be late
_ANSWER_S = 5.0
_UNREACHABLE_S = {True: 10.0, False: 300.0}


def check_meeting_place() -> None:
    """Refuses a port that this rank has to open and cannot, and an address that nobody knows.

    Raises:
        UserError: MASTER_PORT is in use or privileged, or MASTER_ADDR cannot be resolved.
    """
    address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    _resolve(address, port)
    if not _opens_the_port():
        return
    # torch takes IPv4 where it may not open the port for both, and says a screenful before it gives up
    error = _error_of_opening(socket.AF_INET6, port) and _error_of_opening(socket.AF_INET, port)
    if isinstance(error, PermissionError):
        raise UserError(f"MASTER_PORT is {port}, which only root may open here: {_another_port()}")
    if error is not None:
        raise UserError(_taken(port, error.strerror or str(error)))


def _opens_the_port() -> bool:
    # torchrun's agent has opened it already, and its ranks only connect to it
    return os.environ["RANK"] == "0" and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True"


def _error_of_opening(family: socket.AddressFamily, port: int) -> OSError | None:
    try:
        with socket.socket(family) as probe:
            # as torch opens it: what the last run on the port has left in TIME_WAIT does not count
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            if family == socket.AF_INET6:
                probe.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 0)
            # without listening, or another rank would take it for the store
            probe.bind(("", port))
    except OSError as error:
        return error
    return None


def _taken(port: int, why: str) -> str:
    where = f"port {port} of {socket.gethostname()}, where the ranks meet,"
    return f"{where} is in use by another process ({why}): {_another_port()}"


def _another_port() -> str:
    return "give the launcher another with --master_port PORT, such as 29511 (MASTER_PORT where no launcher sets it)."


def _resolve(address: str, port: int) -> None:
    deadline = time.monotonic() + _RESOLVE_S
    while True:
        try:
            socket.getaddrinfo(address, port, type=socket.SOCK_STREAM)
            return
        except (OSError, UnicodeError) as error:
            if time.monotonic() > deadline:
                raise UserError(
                    f"MASTER_ADDR is {address!r}, a name that nobody knows here ({error}): set it to the name or IP address of "
                    "rank 0's node (--master_addr of the launcher)."
                ) from None
        time.sleep(1.0)


@contextmanager
def meeting() -> Iterator[None]:
    """Around the start of the process group: says what a rank waits for, and why it could not meet the others.

    Raises:
        UserError: The ranks did not meet.
    """
    over = threading.Event()
    threading.Thread(target=_wait_with_a_word, args=(over,), name="meeting", daemon=True).start()
    try:
        yield
    # torch's errors of the store and of its network are RuntimeErrors
    except RuntimeError as error:
        text = first_line(error)
        if "EADDRINUSE" in text:
            raise UserError(_taken(int(os.environ["MASTER_PORT"]), "EADDRINUSE")) from error
        if "EMFILE" in text or "oo many open files" in text:
            raise UserError(
                f"too many files are open to meet the other ranks ({text[:200]}): raise `ulimit -n`."
            ) from error
        if "Unable to find address for" in text:
            raise UserError(
                f"GLOO_SOCKET_IFNAME is {os.environ.get('GLOO_SOCKET_IFNAME')!r}, an interface that this machine does not have "
                "or that has no address: unset it, or take one that `ip address` lists."
            ) from error
        raise UserError(_not_met(text[:200])) from error
    finally:
        over.set()


def _where() -> str:
    return f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}"


def _not_met(why: str) -> str:
    return (
        f"the {os.environ['WORLD_SIZE']} ranks did not meet at {_where()} ({why}): MASTER_ADDR must be rank 0's node as the "
        "others reach it, MASTER_PORT a port that no firewall closes, and every rank must be started."
    )


def _wait_with_a_word(over: threading.Event) -> None:
    """Body of a thread: torch waits for minutes without a word, even for an address that leads nowhere."""
    # DeepSpeed does other things first, in which rank 0 has not opened the port yet
    while _opens_the_port() and not _is_open_here():
        if over.wait(1.0):
            return
    if over.wait(_PATIENCE_S):
        return
    ranks = os.environ["WORLD_SIZE"]
    text = f"waiting for all {ranks} ranks at {_where()} (MASTER_ADDR:MASTER_PORT){rank_and_host()}"
    print(text + shell_of_one_task(os.environ), file=sys.stderr, flush=True)
    unreachable_since = None
    while not over.wait(2.0):
        why = _why_unreachable()
        if why is None:
            unreachable_since = None
            continue
        unreachable_since = unreachable_since or time.monotonic()
        if time.monotonic() - unreachable_since > _UNREACHABLE_S[_opens_the_port()] and not over.is_set():
            print(f"error{rank_and_host()}: {_not_met(why)}", file=sys.stderr, flush=True)
            # the main thread is inside torch, where no exception can reach it
            os._exit(UserError.status)


def _is_open_here() -> bool:
    try:
        socket.create_connection(("127.0.0.1", int(os.environ["MASTER_PORT"])), timeout=_ANSWER_S).close()
    except OSError:
        return False
    return True


def _why_unreachable() -> str | None:
    """Why the address leads nowhere; None where it does, or where it leads to a node that has not opened the port yet."""
    address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    try:
        socket.create_connection((address, port), timeout=_ANSWER_S).close()
    except ConnectionRefusedError as error:
        # rank 0 has opened it, so that it is another node which refuses
        return error.strerror if _opens_the_port() else None
    except OSError as error:
        return error.strerror or "no answer"
    # what answers may be a server of another kind, or a port that is open and never answers
    met = threading.Event()
    threading.Thread(target=_meet, args=(address, port, met), daemon=True).start()
    return None if met.wait(2 * _ANSWER_S) else "what answers there is not the store of a job"


def _meet(address: str, port: int, met: threading.Event) -> None:
    """Body of a thread, since torch waits without limit for the answer of a port that is open."""
    with suppress(RuntimeError):
        TCPStore(address, port, is_master=False, timeout=timedelta(seconds=_ANSWER_S), wait_for_workers=False)
        met.set()
