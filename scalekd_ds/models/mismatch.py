"""How the tensors of a file differ from a model's, and what the difference suggests."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace

import torch

State = Mapping[str, torch.Tensor]

SHOWN = 5


@dataclass(frozen=True)
class Mismatch:
    """Names of the model that the file lacks, names that only the file has, and (name, file's shape, model's shape)."""

    missing: tuple[str, ...]
    unexpected: tuple[str, ...]
    shapes: tuple[tuple[str, tuple[int, ...], tuple[int, ...]], ...]

    @classmethod
    def between(cls, state: State, own: State) -> Mismatch:
        """Of a file's state and a model's own."""
        return cls(
            tuple(k for k in own if k not in state),
            tuple(k for k in state if k not in own),
            tuple(
                (k, tuple(state[k].shape), tuple(own[k].shape))
                for k in own
                if k in state and state[k].shape != own[k].shape
            ),
        )

    def without_missing(self, suffix: str) -> Mismatch:
        """Without the missing names that end in `suffix`."""
        return replace(self, missing=tuple(k for k in self.missing if not k.endswith(suffix)))

    def __bool__(self) -> bool:
        return bool(self.missing or self.unexpected or self.shapes)

    def __str__(self) -> str:
        """The first five of each kind, on one line."""
        shapes = [f"{name} {list(theirs)}, not {list(mine)}" for name, theirs, mine in self.shapes]
        kinds = (("missing", self.missing), ("unexpected", self.unexpected), ("of another shape", shapes))
        return "; ".join(
            f"{len(names)} {kind}: {', '.join(names[:SHOWN])}{', ...' if len(names) > SHOWN else ''}"
            for kind, names in kinds
            if names
        )


def reason(mismatch: Mismatch, state: State, own: State) -> str:
    """A sentence: what most likely happened and what to do."""
    shared = len(own) - len(mismatch.missing)
    found = _foreign(mismatch, state, own) if shared * 2 < len(own) else None
    found = found or _patches(mismatch) or _depth(state, own) or _width(mismatch) or _classes(mismatch)
    return found or "Is it another architecture, or a variant with other parts?"


def _foreign(mismatch: Mismatch, state: State, own: State) -> str | None:
    """Other people's names."""
    names = list(state)
    wrappers = {m[0] for m in (re.match(r"^[A-Za-z_]\w*\.", n) for n in names) if m}
    for wrapper in sorted(wrappers):
        # one or two hits are chance: norm.weight is also in patch_embed.norm.weight
        if sum(n.removeprefix(wrapper) in own for n in names if n.startswith(wrapper)) * 2 > len(own):
            return f"Its names start with {wrapper!r}, a wrapper's (an average, or another trainer): save them without."
    if any(n.startswith(("embeddings.", "encoder.layer.", "swin.", "vit.", "beit.", "dinov2.")) for n in names):
        return "The names are Hugging Face transformers': take timm's copy (hf-hub:timm/NAME), which has timm's names."
    if any("last_layer.weight_" in n or n.startswith(("dino_head.", "head.mlp.", "teacher.")) for n in names):
        return "It looks like a DINO training checkpoint: take the released backbone, which timm has as vit_*_dinov2."
    if mmpretrain_like(names):
        return "The names are mmpretrain's: of its models Swin, ViT, BEiT/EVA and ResNet are known; is it this one?"
    return "Hardly a name is the same: is it another architecture?"


def mmpretrain_like(names: Iterable[str]) -> bool:
    """Whether names are in the manner of mmpretrain and mmcv."""
    return any(
        re.search(r"\.ffn\.layers\.|\.w_msa\.|_conv\.bn\.|\.conv\.bn\.|^head\.layers\.|\.ln1\.", n) for n in names
    )


def _depth(state: State, own: State) -> str | None:
    theirs, mine = _blocks(state), _blocks(own)
    for group in mine:
        if group in theirs and theirs[group] != mine[group]:
            return f"Another depth: {group} has {theirs[group]} blocks in the file and {mine[group]} in the model."
    return None


def _blocks(names: Iterable[str]) -> dict[str, int]:
    """Name of a list of blocks -> its length."""
    groups: dict[str, int] = {}
    for name in names:
        for m in re.finditer(r"\.(\d+)(?=\.)", name):
            group = name[: m.start()]
            groups[group] = max(groups.get(group, 0), int(m[1]) + 1)
    return groups


def _patches(mismatch: Mismatch) -> str | None:
    for name, theirs, mine in mismatch.shapes:
        if name == "patch_embed.proj.weight" and theirs[2:] != mine[2:]:
            return f"Another patch size: {theirs[-1]} pixels in the file and {mine[-1]} in the model."
    return None


def _width(mismatch: Mismatch) -> str | None:
    for name, theirs, mine in mismatch.shapes:
        if len(theirs) > 1 and name.endswith("weight") and not name.startswith(("head", "fc.", "classifier")):
            return f"Another width: {name} has {theirs[0]} outputs in the file and {mine[0]} in the model."
    return None


def _classes(mismatch: Mismatch) -> str | None:
    for name, theirs, mine in mismatch.shapes:
        if name.startswith(("head", "fc.", "classifier")) and name.endswith(("weight", "bias")):
            return f"Another number of classes: {theirs[0]} in the file and {mine[0]} in the model (num_classes)."
    return None
