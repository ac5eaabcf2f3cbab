"""One JSON object a line, for programs: nothing else reaches standard output."""

from __future__ import annotations

import json
import os
import sys
from dataclasses import asdict
from typing import IO, Any

from scalekd_ds.watching.terminal.plain import Quiet
from scalekd_ds.watching.terminal.report import ReportCard

_stdout: list[IO[str]] = []


def claim_stdout() -> None:
    """From now on standard output is for these lines alone, and what anyone else prints goes to standard error.

    By the file's number, not its name in Python: loggers hold on to it, and C libraries know no other.
    """
    if _stdout:
        return
    sys.stdout.flush()
    _stdout.append(os.fdopen(os.dup(1), "w"))
    os.dup2(2, 1)


class JsonLines(Quiet):
    """Objects with `kind`: `step`, `evaluation`, `message` or `report`; names are those of TensorBoard."""

    def _write(self, kind: str, **values: Any) -> None:
        # json's NaN is no JSON
        print(json.dumps({"kind": kind, **_finite(values)}, allow_nan=False), file=_stdout[0], flush=True)

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
    """NaN and infinities as text."""
    if isinstance(value, dict):
        return {key: _finite(v) for key, v in value.items()}
    if isinstance(value, list):
        return [_finite(v) for v in value]
    return str(value) if isinstance(value, float) and value - value != 0.0 else value
