"""The report card of a run, which is shown at its end."""

from __future__ import annotations

from dataclasses import dataclass, field

from scalekd_ds.names import escape


def duration(seconds: float) -> str:
    """Seconds as text, such as `0:07:12` or `3 d 4:00:00`."""
    days, rest = divmod(round(max(0.0, seconds)), 86_400)
    clock = f"{rest // 3600}:{rest // 60 % 60:02d}:{rest % 60:02d}"
    return f"{days} d {clock}" if days else clock


@dataclass
class ReportCard:
    """The results of a run.

    Attributes:
        top1: Accuracy of the weights that the run ships, in percent.
        best_top1: Best accuracy of all evaluations, in percent.
        best_step: Optimizer step of the best accuracy.
        weights: Which weights the run ships: `student` or `ema`.
        baseline_top1: Accuracy of the same student without a teacher, in percent, or None if unknown.
        teacher_top1: Accuracy of the teacher, in percent, or None if it was not measured.
        steps: Optimizer steps of the run.
        seconds: Wall time of training, evaluation and saving, over all starts of the run.
        images: Training images seen, with repetition.
        joules: Energy of all ranks' GPUs or of the nodes' CPUs, or None if it could not be read.
        files: Name -> path of what the run has written.
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

    def lines(self, columns: int | None = None) -> list[str]:
        """The report card as lines of plain text.

        Args:
            columns: Width of the terminal: a command that is longer goes on in a further line, as a shell takes it; None
                breaks none.
        """
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
        rows += [(name, escape(path)) for name, path in self.files.items()]
        rows += [("next" if i == 0 else "", command) for i, command in enumerate(self.next)]
        width = max(len(name) for name, _ in rows)
        if columns is not None:
            rows = [row for name, value in rows for row in _broken(name, value, columns - width - 2)]
        return [f"{name:<{width}}  {value}" for name, value in rows]


def _broken(name: str, value: str, columns: int) -> list[tuple[str, str]]:
    """A row, or for a command that is too long a row for each of its options."""
    if len(value) <= columns or " --" not in value:
        return [(name, value)]
    first, *options = value.split(" --")
    parts = [first, *(f"  --{option}" for option in options)]
    return [("" if i else name, f"{part} \\" if part is not parts[-1] else part) for i, part in enumerate(parts)]
