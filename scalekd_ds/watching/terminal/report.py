"""The report card at the end of a run."""

from __future__ import annotations

from dataclasses import dataclass, field


def duration(seconds: float) -> str:
    """`0:07:12`, or `3 d 4:00:00`."""
    days, rest = divmod(round(max(0.0, seconds)), 86_400)
    clock = f"{rest // 3600}:{rest // 60 % 60:02d}:{rest % 60:02d}"
    return f"{days} d {clock}" if days else clock


@dataclass
class ReportCard:
    """What a run came to.

    Attributes:
        top1: Of the weights that it ships, in percent.
        best_top1: The best of its evaluations, in percent, and the step of that.
        weights: `student` or `ema`.
        baseline_top1: What the same student reaches without a teacher, in percent, where it is known.
        teacher_top1: In percent, where it was measured.
        seconds: Wall time of training, evaluation and saving, over all starts of the run.
        images: Training images seen, with repetition.
        joules: All ranks' GPUs, or the nodes' CPUs; None where it could not be read.
        files: What is where: name -> path.
        next: Commands to type next.
    """

    top1: float
    best_top1: float
    best_step: int
    weights: str
    baseline_top1: float | None
    teacher_top1: float | None
    steps: int
    seconds: float
    images: int
    joules: float | None
    files: dict[str, str] = field(default_factory=dict)
    next: list[str] = field(default_factory=list)

    def lines(self) -> list[str]:
        """As plain text."""
        which = "average of the weights" if self.weights == "ema" else "student"
        rows = [("top-1", f"{self.top1:.2f}%  ({which}, after {self.steps} steps)")]
        rows.append(("best", f"{self.best_top1:.2f}%  (step {self.best_step})"))
        if self.baseline_top1 is not None:
            gain = self.top1 - self.baseline_top1
            rows.append(("gain", f"{gain:+.2f} over the baseline's {self.baseline_top1:.2f}%"))
        if self.teacher_top1 is not None:
            rows.append(("teacher", f"{self.teacher_top1:.2f}%"))
        rows.append(("time", f"{duration(self.seconds)}  ({self.seconds / 3600:.2f} h)"))
        rows.append(("images", f"{self.images:,}"))
        if self.joules is not None:
            rows.append(("energy", f"{self.joules / 3.6e6:.3g} kWh"))
        rows += self.files.items()
        rows += [("next" if i == 0 else "", command) for i, command in enumerate(self.next)]
        width = max(len(name) for name, _ in rows)
        return [f"{name:<{width}}  {value}" for name, value in rows]
