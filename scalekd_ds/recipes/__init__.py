"""Recipes: functions that return a RunConfig, by name."""

from __future__ import annotations

from collections.abc import Callable

from scalekd_ds.config import RunConfig
from scalekd_ds.recipes import fashion, imagenet

RECIPES: dict[str, Callable[[], RunConfig]] = {
    "fashion-teacher": fashion.fashion_teacher,
    "fashion-ce": fashion.fashion_ce,
    "fashion-kd": fashion.fashion_kd,
    "fashion-scalekd": fashion.fashion_scalekd,
    **imagenet.RECIPES,
}
