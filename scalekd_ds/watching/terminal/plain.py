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

    def step(self, step: int) -> None:
        """Reports that an optimizer step is done."""

    def scalars(self, step: int, scalars: dict[str, float]) -> None:
        """Reports the scalars of a logged step, by their names in TensorBoard."""

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
    """One line with the loss, images/s now and since the start, the share of waiting for data, and memory."""
    memory = f"{scalars['system/host_rss_gib']:.1f} GiB"
    if "system/gpu_peak_gib" in scalars:
        memory = f"GPU {scalars['system/gpu_peak_gib']:.1f} GiB"
    return (
        f"loss {scalars['loss/total']:.4f}  {scalars['system/images_per_s']:.0f} img/s "
        f"(mean {scalars['system/images_per_s_mean']:.0f})  data wait {100 * scalars['system/share_data_wait']:.0f}%  {memory}"
    )


def losses(scalars: dict[str, float]) -> str:
    """One line with each term of the loss."""
    terms = {name.removeprefix("loss/"): value for name, value in scalars.items() if name.startswith("loss/")}
    return "  ".join(f"{name} {value:.4f}" for name, value in terms.items() if name != "total")


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

    def scalars(self, step: int, scalars: dict[str, float]) -> None:
        left = duration((self.total - step) * scalars["system/step_s"])
        self.line(
            f"step {step}/{self.total}  {status(scalars)}  lr {scalars['optim/lr']:.3g}  {left} left  {losses(scalars)}"
        )

    def evaluation(self, step: int, rows: list[dict[str, Any]]) -> None:
        for line in evaluation_lines(step, rows):
            self.line(line)

    def line(self, text: str) -> None:
        print(one_line(text), flush=True)

    def card(self, card: ReportCard) -> None:
        for line in card.lines():
            self.line(line)
