"""Reads the golden files: numbers recorded from the official ScaleKD implementation (commit 478a7db)."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path

import torch
from safetensors import safe_open

DATA = Path(__file__).parents[1] / "golden"


class Golden:
    """Tensors of one file by name, and its metadata with JSON values parsed."""

    def __init__(self, name: str) -> None:
        with safe_open(DATA / f"{name}.safetensors", "pt") as file:
            self.tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
            self.meta = {k: self._parsed(v) for k, v in (file.metadata() or {}).items()}

    @staticmethod
    def _parsed(value: str):
        try:
            return json.loads(value.replace("True", "true").replace("False", "false"))
        except ValueError:
            return value

    def __getitem__(self, key: str) -> torch.Tensor:
        return self.tensors[key]

    def below(self, prefix: str) -> dict[str, torch.Tensor]:
        """Tensors whose name starts with `prefix.`, without it."""
        return {k.removeprefix(f"{prefix}."): v for k, v in self.tensors.items() if k.startswith(f"{prefix}.")}


golden = cache(Golden)


def relative_error(ours: torch.Tensor, theirs: torch.Tensor) -> float:
    """Largest difference over the largest magnitude of the reference."""
    return ((ours.double() - theirs.double()).abs().max() / theirs.double().abs().max().clamp_min(1e-30)).item()
