"""What a signal does to a command: it ends with one line and no traceback, or a run is asked to stop.

Python runs the handlers of signals between two instructions of the main thread, which may be inside a collective or a build
for minutes. A thread therefore reads the signals as well, and ends the process where the main thread does not.
"""

from __future__ import annotations

import os
import select
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from types import FrameType
from typing import NoReturn

# Ctrl-C, what `kill` sends, a terminal that is lost, and the warnings of schedulers before the time is up: SIGUSR1 of SLURM,
# SIGUSR2 of Grid Engine and LSF, SIGALRM of Flux, SIGXCPU where the processor's time is limited
SIGNALS = (
    *(signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2),
    *(signal.SIGALRM, signal.SIGXCPU),
)
# seconds for the main thread to notice a signal, and to clean up after it
_NOTICE_S, _CLEAN_UP_S = 3.0, 15.0

# takes the signal's number and its name, or why the process should end
Callback = Callable[[int, str], None]


class Interrupted(KeyboardInterrupt):
    """A signal asked the command to end; what it was doing is cleaned up on the way."""

    def __init__(self, number: int) -> None:
        super().__init__(name_of(number))
        self.number = number


class _State:
    """Of this process; one object, since signals belong to the process."""

    caught: tuple[int, ...] = ()
    # the pipe that the thread reads, once there is one
    writing: int | None = None
    callback: Callback | None = None
    # whether a second Ctrl-C is the callback's matter, too
    forwards = False
    interrupted: int | None = None
    # signals that this process has sent to itself again
    repeated = 0
    is_abandoned: Callable[[], str | None] | None = None
    # what the line at the end says of the work
    outcome = ""


_state = _State()


def name_of(number: int) -> str:
    """`Ctrl-C`, `SIGTERM`, ..."""
    return "Ctrl-C" if number == signal.SIGINT else signal.Signals(number).name


def status_of(number: int) -> int:
    """The exit status that shells give to a command that a signal has ended."""
    return 128 + number


def install() -> None:
    """Catches the signals in this process from now on, those apart that it was started to ignore (`nohup`, `&` in a script)."""
    if _state.caught or threading.current_thread() is not threading.main_thread():
        return
    # launch/slurm.sh has the launcher ignore SIGUSR1, which is meant for the ranks that it starts
    unless = {signal.SIGUSR1: (signal.SIG_DFL, signal.SIG_IGN)}
    _state.caught = tuple(
        n for n in SIGNALS if signal.getsignal(n) in unless.get(n, (signal.SIG_DFL, signal.default_int_handler))
    )
    if _state.writing is None:
        reading, _state.writing = os.pipe()
        os.set_blocking(_state.writing, False)
        # a child that is forked, and not started anew, would answer to its signals through this process's pipe
        os.register_at_fork(after_in_child=_release)
        threading.Thread(target=_watch, args=(reading,), name="signals", daemon=True).start()
        _repeat_interruptions_of_destructors()
    for number in _state.caught:
        signal.signal(number, _handle)
    signal.set_wakeup_fd(_state.writing, warn_on_full_buffer=False)


def _release() -> None:
    """Signals do again what they do in any process."""
    with suppress(ValueError):
        if _state.caught:
            signal.set_wakeup_fd(-1)
        for number in _state.caught:
            signal.signal(number, signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL)
    _state.caught = ()


def _repeat_interruptions_of_destructors() -> None:
    """An interruption that meets a destructor goes no further, and Python shows it with a traceback: it is sent again."""
    shown = sys.unraisablehook

    def hook(raised: sys.UnraisableHookArgs) -> None:
        if not isinstance(raised.exc_value, Interrupted):
            shown(raised)
        else:
            _state.interrupted, _state.repeated = None, _state.repeated + 1
            threading.Timer(0.1, os.kill, (os.getpid(), raised.exc_value.number)).start()

    sys.unraisablehook = hook


@contextmanager
def passed_to(callback: Callback, forwards: bool = False, completes: bool = False) -> Iterator[None]:
    """Hands signals to `callback` meanwhile, in place of ending the command; it is called between two instructions.

    The thread calls it, too, where who started this process is gone.

    Args:
        callback: Takes the signal's number and its name.
        forwards: Whether a second Ctrl-C is for `callback` as well, and does not end this process at once.
        completes: Whether the command's work is done afterwards, so that a signal must not make a failure of it.
    """
    library = not _state.caught
    install()
    before = _state.callback, _state.forwards
    _state.callback, _state.forwards = callback, forwards
    try:
        yield
    except BaseException:
        _state.callback, _state.forwards = before
        raise
    else:
        _state.callback, _state.forwards = (_ignore, False) if completes and not library else before
    finally:
        if library:
            _release()


def outcome(text: str) -> None:
    """What the line of a command that a signal ends says of its work, such as `no step was done`."""
    _state.outcome = text


def watch(is_abandoned: Callable[[], str | None]) -> None:
    """Asks every second whether the process has lost who started it: a text is why it should end, as by SIGTERM."""
    _state.is_abandoned = is_abandoned


def interrupted() -> int | None:
    """The signal that asked the command to end, or None."""
    return _state.interrupted


def end_quietly(status: int) -> None:
    """From now on a signal ends the process at once, without a word: its last line is being written."""
    _state.callback, _state.forwards = (lambda *_: os._exit(status)), True


def finished() -> None:
    """From now on a signal does nothing, but for a second Ctrl-C: the work is done, and only the interpreter has to end."""
    _state.callback, _state.forwards = _ignore, False
    for number in _state.caught:
        if number != signal.SIGINT:
            # Python's end puts the handlers back before all is freed, and SIGXCPU, for one, comes every second
            signal.signal(number, signal.SIG_IGN)


def end(number: int, more: str = "") -> NoReturn:
    """Ends this process and the ones that it has started, with a line and the status of the signal."""
    end_quietly(status_of(number))
    kill_children()
    # one line of a job of several ranks
    if os.environ.get("RANK", "0") == "0":
        outcome = "; ".join(filter(None, [_state.outcome, more]))
        with suppress(OSError, ValueError, AttributeError):
            print(f"stopped by {name_of(number)}{outcome and ': '}{outcome}", file=sys.stderr, flush=True)
    with suppress(OSError, ValueError, AttributeError):
        sys.stdout.flush()
    os._exit(status_of(number))


def kill_children() -> None:
    """Ends the processes that this one has started, such as compilers."""
    import psutil

    with suppress(psutil.Error):
        for child in psutil.Process().children(recursive=True):
            with suppress(psutil.Error):
                child.kill()


def _ignore(*_: object) -> None:
    pass


def _handle(number: int, _: FrameType | None) -> None:
    if _state.callback is not None:
        _state.callback(number, name_of(number))
    elif _state.interrupted is None:
        _state.interrupted = number
        raise Interrupted(number)


def _watch(reading: int) -> None:
    """Body of the thread."""
    presses, asked, asked_at = 0, None, 0.0
    while True:
        numbers = os.read(reading, 64) if select.select([reading], [], [], 1.0)[0] else b""
        for number in numbers:
            if number not in _state.caught:
                continue
            presses += number == signal.SIGINT
            if presses - _state.repeated > 1 and not _state.forwards:
                end(signal.SIGINT, "at once, at the second Ctrl-C")
            if _state.callback is None and asked is None:
                asked, asked_at = number, time.monotonic()
        if asked is not None and time.monotonic() - asked_at > (_CLEAN_UP_S if _state.interrupted else _NOTICE_S):
            # the main thread does not come out of what it is in, unless it began to train meanwhile
            if _state.callback is None:
                end(asked)
            asked = None
        if _state.is_abandoned is not None and (reason := _state.is_abandoned()):
            _state.is_abandoned = None
            if _state.callback is not None:
                _state.callback(signal.SIGTERM, reason)
            else:
                os.kill(os.getpid(), signal.SIGTERM)
