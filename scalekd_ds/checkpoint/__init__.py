"""Checkpoints: written aside, synced, renamed; read back on any number of ranks, or as plain weights."""

from __future__ import annotations

from typing import Any


def __getattr__(name: str) -> Any:
    if name == "consolidate":
        from scalekd_ds.checkpoint.checkpoint import consolidate

        return consolidate
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
