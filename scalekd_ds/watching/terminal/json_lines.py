"""Reports for programs: one JSON object on each line, and nothing else on standard output."""

from __future__ import annotations

import json
import os
import sys
from dataclasses import asdict
from typing import IO, Any

from scalekd_ds.names import text_of
from scalekd_ds.process.output import lossy
from scalekd_ds.watching.terminal.plain import Reporter
from scalekd_ds.watching.terminal.report import ReportCard

# the real standard output, once `claim_stdout` was called
_claimed_stdout: list[IO[str]] = []


def claim_stdout() -> None:
    """Keeps standard output for these lines alone: whatever else this process prints goes to standard error.

    The file descriptor is redirected rather than `sys.stdout`, since loggers keep the latter and C libraries do not know it.
    """
    if _claimed_stdout:
        return
    sys.stdout.flush()
    _claimed_stdout.append(lossy(os.dup(1), "utf-8", shown=1))
    os.dup2(2, 1)


class JsonLines(Reporter):
    """Writes objects whose `kind` is `step`, `evaluation`, `message` or `report`; scalars have their names in TensorBoard."""

    def _write(self, kind: str, **values: Any) -> None:
        # NaN and infinities, as Python writes them, are not valid JSON
        print(json.dumps({"kind": kind, **_finite(values)}, allow_nan=False), file=_claimed_stdout[0], flush=True)

    def scalars(self, step: int, scalars: dict[str, float]) -> None:
        left = (self.total - step) * scalars["system/step_s"]
        self._write("step", step=step, total=self.total, seconds_left=left, scalars=scalars)

    def evaluation(self, step: int, rows: list[dict[str, Any]]) -> None:
        self._write("evaluation", step=step, rows=rows)

    def line(self, text: str) -> None:
        self._write("message", text=text)

    def card(self, card: ReportCard) -> None:
        self._write("report", **asdict(card))


def _finite(value: Any) -> Any:
    """A copy of plain data in which NaN and infinities are text, and names the same in every locale."""
    if isinstance(value, str):
        return text_of(value)
    if isinstance(value, dict):
        return {key: _finite(v) for key, v in value.items()}
    if isinstance(value, list):
        return [_finite(v) for v in value]
    return str(value) if isinstance(value, float) and value - value != 0.0 else value
