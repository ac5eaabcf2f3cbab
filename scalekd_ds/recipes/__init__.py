"""The recipes: functions that return a `RunConfig`, by name, and the command line that starts from one.

May use `models`, `config` and `errors`.
"""

from __future__ import annotations

from collections.abc import Callable

from scalekd_ds.config import RunConfig
from scalekd_ds.recipes import fashion, imagenet

# name on the command line -> the function that returns the run
RECIPES: dict[str, Callable[[], RunConfig]] = {
    "fashion-teacher": fashion.fashion_teacher,
    "fashion-ce": fashion.fashion_ce,
    "fashion-kd": fashion.fashion_kd,
    "fashion-scalekd": fashion.fashion_scalekd,
    **imagenet.RECIPES,
}
