"""One line for each thing that happens, for logs; and nothing at all."""

from __future__ import annotations

from typing import Any

from scalekd_ds.watching.terminal.report import ReportCard, duration


class Quiet:
    """Shows nothing.

    Args:
        total: Optimizer steps of the run.
        done: Steps done before.
    """

    def __init__(self, total: int, done: int) -> None:
        self.total, self.done = total, done

    def step(self, step: int) -> None:
        """A step was done."""

    def scalars(self, step: int, scalars: dict[str, float]) -> None:
        """Scalars of a logged step, by the names that TensorBoard has."""

    def evaluation(self, step: int, rows: list[dict[str, Any]]) -> None:
        """An evaluation: `name`, `top1`, `top5` of student, average, teacher, and the best so far with its `step`."""

    def line(self, text: str) -> None:
        """One line of text."""

    def card(self, card: ReportCard) -> None:
        """The run is over."""

    def close(self) -> None:
        """Leaves the terminal as it was."""


def status(scalars: dict[str, float]) -> str:
    """Loss, images/s now and since the start, data wait and memory, in few words."""
    memory = f"{scalars['system/host_rss_gib']:.1f} GiB"
    if "system/gpu_peak_gib" in scalars:
        memory = f"GPU {scalars['system/gpu_peak_gib']:.1f} GiB"
    return (
        f"loss {scalars['loss/total']:.4f}  {scalars['system/images_per_s']:.0f} img/s "
        f"(mean {scalars['system/images_per_s_mean']:.0f})  data wait {100 * scalars['system/share_data_wait']:.0f}%  {memory}"
    )


def losses(scalars: dict[str, float]) -> str:
    """Each term of the loss."""
    terms = {name.removeprefix("loss/"): value for name, value in scalars.items() if name.startswith("loss/")}
    return "  ".join(f"{name} {value:.4f}" for name, value in terms.items() if name != "total")


def evaluation_lines(step: int, rows: list[dict[str, Any]]) -> list[str]:
    """A table in plain text."""
    title = f"step {step}: validation"
    width = max(len(title) - 4, *(len(row["name"]) for row in rows))
    lines = [f"{title:<{width + 4}}    top-1    top-5"]
    for row in rows:
        top5 = f"{row['top5']:7.2f}%" if row["top5"] is not None else " " * 8
        at = f"  (step {row['step']})" if row["step"] != step else ""
        lines.append(f"    {row['name']:<{width}}  {row['top1']:6.2f}% {top5}{at}".rstrip())
    return lines


class Plain(Quiet):
    """Lines on standard output."""

    def scalars(self, step: int, scalars: dict[str, float]) -> None:
        left = duration((self.total - step) * scalars["system/step_s"])
        self.line(
            f"step {step}/{self.total}  {status(scalars)}  lr {scalars['optim/lr']:.3g}  {left} left  {losses(scalars)}"
        )

    def evaluation(self, step: int, rows: list[dict[str, Any]]) -> None:
        for line in evaluation_lines(step, rows):
            self.line(line)

    def line(self, text: str) -> None:
        print(text, flush=True)

    def card(self, card: ReportCard) -> None:
        for line in card.lines():
            self.line(line)
