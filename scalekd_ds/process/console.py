"""Consoles of rich whose colours can be read on a light and on a dark background."""

from __future__ import annotations

from typing import Any

from rich.console import Console
from rich.theme import Theme

# rich's yellow, green and cyan cannot be read on white, nor its dark grey be told from the bar: text has the terminal's own
# colour, and the bar two that differ from each other, from white and from black
_TEXT = (
    *("progress.elapsed", "progress.remaining", "progress.download", "progress.percentage", "progress.filesize"),
    *("progress.filesize.total", "progress.data.speed", "progress.spinner"),
)
_BAR = ("bar.complete", "bar.finished", "bar.pulse")
_THEME = Theme({**dict.fromkeys(_TEXT, "none"), **dict.fromkeys(_BAR, "magenta"), "bar.back": "bright_black"})


def readable_console(**options: Any) -> Console:
    """A console without colours for numbers and paths.

    Args:
        **options: Arguments of `rich.console.Console`.
    """
    return Console(**{"theme": _THEME, "highlight": False, **options})
