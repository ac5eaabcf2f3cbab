"""Draws the sheet with matplotlib: a row for each image, and below the rows the spectra and notes on the models."""

from __future__ import annotations

import textwrap
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from scalekd_ds.errors import UserError, problem_of
from scalekd_ds.files.durable import written_aside
from scalekd_ds.names import one_line

_RIGHT, _WRONG, _UNKNOWN = "#bfe3c4", "#f3c3bd", "#d5dceb"
_CURVES = {"student": "#c4442e", "teacher": "#2f5d9b", "baseline": "#7d7d7d"}
# sizes in inches
_PICTURE, _PREDICTION, _NAME, _GAP, _HEAD, _FOOT = 1.3, 2.1, 1.55, 0.1, 0.75, 2.9


@dataclass(frozen=True)
class PictureColumn:
    """A column of pictures.

    Attributes:
        title: Its heading.
        images: (N, 3, h, w) in 0 to 1, one for each row of the sheet.
        mark: A cell to frame, ((row, column), (rows, columns) of the grid), or None.
    """

    title: str
    images: torch.Tensor
    mark: tuple[tuple[int, int], tuple[int, int]] | None = None


@dataclass(frozen=True)
class PredictionColumn:
    """A column of predictions.

    Attributes:
        title: Its heading.
        rows: For each image its most likely classes as (name, probability, whether it is right or None if unknown).
    """

    title: str
    rows: list[list[tuple[str, float, bool | None]]]


@dataclass(frozen=True)
class Sheet:
    """The content of a sheet.

    Attributes:
        title: Its heading.
        names: (true class or None, name of the file) of each image.
        pictures: Columns of pictures, left to right.
        predictions: Columns of predictions, to the right of the pictures.
        curves: Spectra as (role, label, frequencies in cycles across the image, shares of the power).
        notes: Lines beside the spectra.
    """

    title: str
    names: list[tuple[str | None, str]]
    pictures: list[PictureColumn]
    predictions: list[PredictionColumn]
    curves: list[tuple[str, str, list[float], list[float]]]
    notes: list[str] = field(default_factory=list)


def check_matplotlib() -> None:
    """Checks that matplotlib is installed, before any model is built.

    Raises:
        UserError: It is not.
    """
    try:
        import matplotlib  # noqa: F401
    except ImportError:
        raise UserError(
            "inspect draws with matplotlib, which is not installed: pip install matplotlib (extra `inspect`)."
        ) from None


def abbreviate(text: str, length: int) -> str:
    """`text` cut to at most `length` characters, with … in place of its middle."""
    head = (length - 1) // 2
    return text if len(text) <= length else f"{text[:head]}…{text[len(text) - (length - 1 - head) :]}"


def _draw_picture(ax: Any, image: torch.Tensor, column: PictureColumn) -> None:
    from matplotlib.patches import Rectangle

    ax.imshow(image.permute(1, 2, 0).numpy(), interpolation="nearest", aspect="equal", extent=(0, 1, 1, 0))
    ax.set_axis_off()
    if column.mark is not None:
        (row, col), (rows, cols) = column.mark
        box = (col / cols, row / rows), 1 / cols, 1 / rows
        ax.add_patch(Rectangle(*box, fill=False, edgecolor="black", linewidth=2.4))
        ax.add_patch(Rectangle(*box, fill=False, edgecolor="white", linewidth=1.1))


def _draw_predictions(ax: Any, top: Sequence[tuple[str, float, bool | None]]) -> None:
    ax.set(xlim=(0, 1), ylim=(2.55, -0.55))
    ax.set_axis_off()
    for rank, (name, probability, right) in enumerate(top):
        colour = _UNKNOWN if right is None else _RIGHT if right else _WRONG if rank == 0 else "#e9e9e9"
        ax.barh(rank, 1.0, height=0.86, color="#f7f7f7")
        ax.barh(rank, probability, height=0.86, color=colour)
        sign = "" if right is None else "✓ " if right else "✗ " if rank == 0 else ""
        weight = "bold" if rank == 0 else "normal"
        ax.text(0.02, rank, sign + abbreviate(name, 22), va="center", fontsize=7.5, weight=weight)
        ax.text(0.98, rank, f"{100 * probability:.0f}%", va="center", ha="right", fontsize=7.5, weight=weight)


def _draw_curves(ax: Any, sheet: Sheet) -> None:
    from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullFormatter

    for role, label, frequencies, powers in sheet.curves:
        shown = [max(100 * p, 1e-10) for p in powers]
        ax.plot(frequencies, shown, marker="o", markersize=3.5, linewidth=1.6, color=_CURVES[role], label=label)
    ax.set_yscale("log")
    # with powers of ten alone, an axis within one decade would have no number
    ax.yaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0), numticks=8))
    ax.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}%"))
    ax.yaxis.set_minor_formatter(NullFormatter())
    ax.xaxis.set_major_locator(MaxNLocator(8, steps=[1, 2, 5, 10]))
    ax.set_xlabel("cycles across the image (0: the mean)", fontsize=8)
    ax.set_ylabel("share of the power", fontsize=8)
    ax.set_title("frequencies in the last maps", fontsize=9, loc="left", weight="bold")
    ax.tick_params(labelsize=7)
    ax.grid(alpha=0.3, which="major")
    ax.legend(fontsize=7.5, frameon=False)
    ax.spines[["top", "right"]].set_visible(False)


def draw_sheet(sheet: Sheet, out: Path) -> None:
    """Writes the sheet as a PNG, atomically.

    Raises:
        UserError: The file cannot be written.
    """
    import matplotlib

    # a name with two dollar signs is no formula, and one in letters that the font lacks is drawn as boxes
    with matplotlib.rc_context({"text.parse_math": False}), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph .* missing from")
        _draw_sheet(sheet, out)


def _draw_sheet(sheet: Sheet, out: Path) -> None:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    count = len(sheet.names)
    widths = [_NAME, *[_PICTURE] * len(sheet.pictures), *[_PREDICTION] * len(sheet.predictions)]
    # the notes need room beside the curves
    width = max(sum(widths) + _GAP * (len(widths) + 1), 9.0)
    height = _HEAD + count * (_PICTURE + _GAP) + _FOOT
    figure = Figure(figsize=(width, height), dpi=110, facecolor="white")
    FigureCanvasAgg(figure)
    lefts = [_GAP + sum(widths[:i]) + _GAP * i for i in range(len(widths))]

    def axes(column: int, row: int) -> Any:
        bottom = height - _HEAD - (row + 1) * (_PICTURE + _GAP) + _GAP
        return figure.add_axes((lefts[column] / width, bottom / height, widths[column] / width, _PICTURE / height))

    figure.text(_GAP / width, 1 - 0.12 / height, sheet.title, fontsize=11, weight="bold", va="top")
    top = 1 - (_HEAD - 0.05) / height
    columns: list[PictureColumn | PredictionColumn] = [*sheet.pictures, *sheet.predictions]
    for number, column in enumerate(columns, 1):
        middle = (lefts[number] + widths[number] / 2) / width
        figure.text(middle, top, column.title, fontsize=8, ha="center", va="bottom", linespacing=1.1)
    for row, (truth, name) in enumerate(sheet.names):
        ax = axes(0, row)
        ax.set_axis_off()
        # bold sets the class apart from the file's name; capitals would change its spelling
        ax.text(0, 0.58, abbreviate(truth or "class not known", 22), fontsize=8.5, weight="bold" if truth else "normal")
        ax.text(0, 0.40, abbreviate(name, 28), fontsize=6.5, color="#666666")
        for number, column in enumerate(sheet.pictures, 1):
            _draw_picture(axes(number, row), column.images[row], column)
        for number, column in enumerate(sheet.predictions, 1 + len(sheet.pictures)):
            _draw_predictions(axes(number, row), column.rows[row])
    plot_width = min(6.5, 0.5 * width)
    box = (0.95 / width, 0.6 / height, (plot_width - 0.95) / width, (_FOOT - 1.2) / height)
    _draw_curves(figure.add_axes(box), sheet)
    # a character of this font is at most 0.6 of its 8 points wide
    num_characters = int((width - plot_width - 0.55) * 72 / (0.6 * 8))
    notes = [
        part
        for note in map(one_line, sheet.notes)
        for part in textwrap.wrap(note, num_characters, subsequent_indent="    ") or [""]
    ]
    figure.text(
        (plot_width + 0.45) / width, (_FOOT - 0.42) / height, "\n".join(notes), fontsize=8, va="top", linespacing=1.4
    )
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        with written_aside(out) as partial:
            figure.savefig(partial, format="png")
    except OSError as error:
        raise UserError(f"--out is {str(out)!r}, which cannot be written: {problem_of(error)}.") from None
