"""Reports on a terminal: a progress bar with the time left, and tables."""

from __future__ import annotations

from typing import Any

from rich.console import Group
from rich.live import Live
from rich.panel import Panel
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text

from scalekd_ds.names import one_line
from scalekd_ds.watching.terminal.plain import Reporter, losses, status
from scalekd_ds.watching.terminal.report import ReportCard


class Bar(Reporter):
    """A progress bar with two lines of scalars below it, which is redrawn in place."""

    def __init__(self, total: int, done: int) -> None:
        super().__init__(total, done)
        columns = [TextColumn("train"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TextColumn("left")]
        self._bar = Progress(*columns, TimeRemainingColumn())
        self._task = self._bar.add_task("train", total=total, completed=done)
        self._text = Text()
        self._live = Live(Group(self._bar, self._text), refresh_per_second=4)
        self._live.start()

    def step(self, step: int) -> None:
        self._bar.update(self._task, completed=step)

    def scalars(self, step: int, scalars: dict[str, float]) -> None:
        self._text.plain = f"{status(scalars)}\n{losses(scalars)}"

    def evaluation(self, step: int, rows: list[dict[str, Any]]) -> None:
        table = Table("", "top-1", "top-5", title=f"step {step} of {self.total}", title_justify="left")
        for row in rows:
            at = f" (step {row['step']})" if row["step"] != step else ""
            table.add_row(row["name"] + at, *(f"{row[k]:.2f}%" if row[k] is not None else "" for k in ("top1", "top5")))
        self._live.console.print(table)

    def line(self, text: str) -> None:
        self._live.console.print(one_line(text), highlight=False, markup=False)

    def card(self, card: ReportCard) -> None:
        lines = Text("\n".join(map(one_line, card.lines())), no_wrap=False)
        self._live.console.print(Panel(lines, title="finished", expand=False))

    def close(self) -> None:
        self._live.stop()
