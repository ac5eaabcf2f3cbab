"""Shows several runs, each in a process of its own, by the logs that they write."""

from __future__ import annotations

import os
import re
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeElapsedColumn

from scalekd_ds.names import one_line
from scalekd_ds.process.console import readable_console

# as `Plain` writes it
_STEP = re.compile(r"^step (\d+)/(\d+) ", re.MULTILINE)
_SECONDS = 0.5
# of a log, which holds its newest step
_TAIL = 4096


def stamp(log: Path) -> tuple[int, int] | None:
    """What tells that a log was written since: when it last was, in nanoseconds, and its bytes; None where there is none."""
    try:
        about = log.stat()
    except OSError:
        return None
    return about.st_mtime_ns, about.st_size


def share_done(log: Path, before: tuple[int, int] | None = None) -> float:
    """The share of its steps that a run has done, by its log; 0 where that says nothing yet.

    Args:
        log: The file that `Plain` lines go to.
        before: The log's `stamp` when the run began: what an earlier start of it wrote is not its progress. The
            time of day would not do: a file's is that of the last tick, or of another machine.
    """
    try:
        with log.open("rb") as file:
            about = os.fstat(file.fileno())
            if (about.st_mtime_ns, about.st_size) == before:
                return 0.0
            file.seek(max(0, about.st_size - _TAIL))
            steps = _STEP.findall(file.read().decode("utf-8", "replace"))
    except OSError:
        return 0.0
    return int(steps[-1][0]) / int(steps[-1][1]) if steps else 0.0


@contextmanager
def runs_shown() -> Iterator[tuple[Callable[[str, Path], None], Callable[[str, str], None]]]:
    """Shows a line for each run: on a terminal as soon as it begins, with a bar; elsewhere when it has ended.

    Yields:
        A function of a name and a log, to be called when a run begins, and one of a name and a text, when it has ended.
        Both may be called from any thread.
    """
    console = readable_console()
    if not console.is_terminal:
        yield (lambda name, log: None), (lambda name, text: print(one_line(f"{name:<16} {text}"), flush=True))
        return
    columns = [TextColumn("{task.description}"), BarColumn(20), TimeElapsedColumn(), TextColumn("{task.fields[text]}")]
    bars = Progress(*columns, console=console)
    logs: dict[str, tuple[TaskID, Path, tuple[int, int] | None]] = {}
    ended = threading.Event()

    def begin(name: str, log: Path) -> None:
        logs[name] = bars.add_task(one_line(name), total=1.0, text=""), log, stamp(log)

    def end(name: str, text: str) -> None:
        task = logs.pop(name)[0]
        bars.update(task, completed=1.0, text=one_line(text))

    def follow() -> None:
        while not ended.wait(_SECONDS):
            for name, (task, log, before) in list(logs.items()):
                if share := share_done(log, before):
                    bars.update(task, completed=share)
                if name not in logs:
                    # it ended meanwhile
                    bars.update(task, completed=1.0)

    follower = threading.Thread(target=follow, daemon=True)
    with bars:
        follower.start()
        try:
            yield begin, end
        finally:
            ended.set()
            follower.join()
