"""Reports as plain lines, for logs; and the base class of reporters, which reports nothing."""

from __future__ import annotations

from typing import Any

from scalekd_ds.names import one_line
from scalekd_ds.watching.terminal.report import ReportCard, duration


class Reporter:
    """Reports the events of a run; this base class shows nothing.

    Args:
        total: Optimizer steps of the run.
        done: Steps that were done before this start of the run.
    """

    def __init__(self, total: int, done: int) -> None:
        self.total, self.done = total, done

    def begin(self, lines: list[str]) -> None:
        """Reports, in lines of text, what will be trained."""

    def step(self, step: int) -> None:
        """Reports that an optimizer step is done."""

    def scalars(self, step: int, scalars: dict[str, float]) -> None:
        """Reports the scalars of a logged step, by their names in TensorBoard."""

    def evaluating(self) -> None:
        """Reports that an evaluation begins."""

    def evaluation(self, step: int, rows: list[dict[str, Any]]) -> None:
        """Reports an evaluation.

        Args:
            step: The optimizer step.
            rows: `name`, `top1`, `top5` (percent, or None) and `step` of student, moving average, teacher, and the best.
        """

    def line(self, text: str) -> None:
        """Reports a line of text."""

    def card(self, card: ReportCard) -> None:
        """Reports the end of the run."""

    def close(self) -> None:
        """Ends the reports, and leaves the terminal as it was."""


def status(scalars: dict[str, float]) -> str:
    """One line with the loss, images/s now and since the start, the share of waiting for data, and memory.

    Numbers keep their width from step to step, so that the line does not jitter where it is redrawn.
    """
    memory = f"{scalars['system/host_rss_gib']:.1f} GiB"
    if "system/gpu_peak_gib" in scalars:
        memory = f"GPU {scalars['system/gpu_peak_gib']:.1f} GiB"
    return (
        f"loss {scalars['loss/total']:.4f}  {scalars['system/images_per_s']:5.0f} img/s "
        f"(mean {scalars['system/images_per_s_mean']:5.0f})  "
        f"data wait {100 * scalars['system/share_data_wait']:2.0f}%  {memory}"
    )


def losses(scalars: dict[str, float]) -> list[str]:
    """Each term of the loss with its name."""
    terms = {name.removeprefix("loss/"): value for name, value in scalars.items() if name.startswith("loss/")}
    return [f"{name} {value:.4f}" for name, value in terms.items() if name != "total"]


def fitted(parts: list[str], width: int) -> list[str]:
    """The parts in lines of at most `width` columns, none of them broken in two unless it is longer itself."""
    lines: list[str] = []
    for part in parts:
        if lines and len(lines[-1]) + 2 + len(part) <= width:
            lines[-1] += f"  {part}"
        else:
            lines.append(part)
    return lines


def evaluation_lines(step: int, rows: list[dict[str, Any]]) -> list[str]:
    """The lines of an evaluation's table in plain text."""
    title = f"step {step}: validation"
    width = max(len(title) - 4, *(len(row["name"]) for row in rows))
    lines = [f"{title:<{width + 4}}    top-1    top-5"]
    for row in rows:
        top5 = f"{row['top5']:7.2f}%" if row["top5"] is not None else " " * 8
        at = f"  (step {row['step']})" if row["step"] != step else ""
        lines.append(f"    {row['name']:<{width}}  {row['top1']:6.2f}% {top5}{at}".rstrip())
    return lines


class Plain(Reporter):
    """Prints lines on standard output."""

    def begin(self, lines: list[str]) -> None:
        for line in lines:
            self.line(line)

    def scalars(self, step: int, scalars: dict[str, float]) -> None:
        left = duration((self.total - step) * scalars["system/step_s"])
        parts = [status(scalars), f"lr {scalars['optim/lr']:.2e}", f"{left} left", *losses(scalars)]
        self.line(f"step {step}/{self.total}  {'  '.join(parts)}")

    def evaluation(self, step: int, rows: list[dict[str, Any]]) -> None:
        for line in evaluation_lines(step, rows):
            self.line(line)

    def line(self, text: str) -> None:
        print(one_line(text), flush=True)

    def card(self, card: ReportCard) -> None:
        for line in card.lines():
            self.line(line)
