"""Reports on a terminal: a progress bar with the time left, and tables."""

from __future__ import annotations

from typing import Any

from rich.console import Group
from rich.live import Live
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text

from scalekd_ds.names import one_line
from scalekd_ds.process.console import readable_console
from scalekd_ds.watching.terminal.plain import Reporter, fitted, losses, status
from scalekd_ds.watching.terminal.report import ReportCard


class Bar(Reporter):
    """A progress bar with lines of scalars below it, which are redrawn in place."""

    def __init__(self, total: int, done: int) -> None:
        super().__init__(total, done)
        columns = [TextColumn("{task.description:<8}"), BarColumn(), MofNCompleteColumn(), TextColumn("steps")]
        self._bar = Progress(*columns, TimeElapsedColumn(), TextColumn("left"), TimeRemainingColumn())
        self._task = self._bar.add_task("train", total=total, completed=done)
        self._text = Text()
        self._live = Live(Group(self._bar, self._text), console=readable_console(), refresh_per_second=4)
        self._live.start()

    def begin(self, lines: list[str]) -> None:
        for line in lines:
            self.line(line)

    def step(self, step: int) -> None:
        self._bar.update(self._task, completed=step)

    def scalars(self, step: int, scalars: dict[str, float]) -> None:
        self._text.plain = "\n".join([status(scalars), *fitted(losses(scalars), self._live.console.width)])

    def evaluating(self) -> None:
        self._bar.update(self._task, description="evaluate")

    def evaluation(self, step: int, rows: list[dict[str, Any]]) -> None:
        self._bar.update(self._task, description="train")
        table = Table("", "top-1", "top-5", title=f"step {step} of {self.total}", title_justify="left")
        for row in rows:
            at = f" (step {row['step']})" if row["step"] != step else ""
            table.add_row(row["name"] + at, *(f"{row[k]:.2f}%" if row[k] is not None else "" for k in ("top1", "top5")))
        self._live.console.print(table)

    def line(self, text: str) -> None:
        self._live.console.print(one_line(text), markup=False)

    def card(self, card: ReportCard) -> None:
        # the results come last, below the bar
        self.close()
        shown = self._live.console
        shown.print("\nfinished", style="bold")
        # no frame, whose sides would be copied with a command
        for line in card.lines(shown.width):
            shown.print(one_line(line), markup=False)

    def close(self) -> None:
        self._live.stop()
