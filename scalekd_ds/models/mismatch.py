"""How the tensors of a file differ from those of a model, and what the difference suggests."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace

import torch

State = Mapping[str, torch.Tensor]

# how the names of classifiers begin in timm's models
_CLASSIFIERS = ("head", "fc.", "classifier")

# what a model has for each position of an image's grid, or for each distance in it, and the layers that mix patches
_POSITIONS = re.compile(
    r"pos_embed|rel_pos|relative_position|attention_biases|(height|width)_rel$|_tokens\.|\.gate\.proj\.|_pos$"
)

# names of each kind of difference that a message lists
MAX_NAMES = 5


@dataclass(frozen=True)
class Mismatch:
    """The differences between a file and a model; false where there are none.

    Attributes:
        missing: Names that only the model has.
        unexpected: Names that only the file has.
        shapes: (name, shape in the file, shape in the model) of tensors whose shapes differ.
    """

    missing: tuple[str, ...]
    unexpected: tuple[str, ...]
    shapes: tuple[tuple[str, tuple[int, ...], tuple[int, ...]], ...]

    @classmethod
    def between(cls, state: State, model_state: State) -> Mismatch:
        """Compares a file's tensors with a model's state-dict."""
        shared = [k for k in model_state if k in state]
        return cls(
            tuple(k for k in model_state if k not in state),
            tuple(k for k in state if k not in model_state),
            tuple(
                (k, tuple(state[k].shape), tuple(model_state[k].shape))
                for k in shared
                if state[k].shape != model_state[k].shape
            ),
        )

    def without_missing(self, suffix: str) -> Mismatch:
        """The same differences without the missing names that end in `suffix`."""
        return replace(self, missing=tuple(k for k in self.missing if not k.endswith(suffix)))

    def __bool__(self) -> bool:
        return bool(self.missing or self.unexpected or self.shapes)

    def __str__(self) -> str:
        """The first `MAX_NAMES` of each kind, on one line."""
        shapes = [f"{name} {list(loaded)}, not {list(ours)}" for name, loaded, ours in self.shapes]
        kinds = (("missing", self.missing), ("unexpected", self.unexpected), ("of another shape", shapes))
        return "; ".join(
            f"{len(names)} {kind}: {', '.join(names[:MAX_NAMES])}{', ...' if len(names) > MAX_NAMES else ''}"
            for kind, names in kinds
            if names
        )


def likely_cause(mismatch: Mismatch, state: State, model_state: State) -> str:
    """One sentence for the user: what most likely happened, and what to do.

    Args:
        mismatch: What does not fit.
        state: The file's tensors by the model's names.
        model_state: The model's own state dict.
    """
    shared = len(model_state) - len(mismatch.missing)
    cause = _not_whole(mismatch, state, model_state)
    cause = cause or (_other_layout(state, model_state) if shared * 2 < len(model_state) else None)
    cause = (
        cause
        or _grid(mismatch)
        or _patch_size(mismatch)
        or _depth(state, model_state)
        or _width(mismatch)
        or _classes(mismatch)
    )
    return cause or _other_parts(mismatch) or "Is it another architecture, or a variant with other parts?"


def _not_whole(mismatch: Mismatch, state: State, model_state: State) -> str | None:
    """What was done to the weights before they were saved, of whatever model they are."""
    if any(".lora_" in name for name in state):
        return "It has LoRA adapters: merge them into the model (peft's merge_and_unload) and save its state_dict()."
    if any(".parametrizations." in name or name.endswith((".weight_g", ".weight_orig")) for name in state):
        return (
            "Some weights are parametrized or pruned: take that away (remove_parametrizations, prune.remove) and save."
        )
    loaded = [shape for _, shape, _ in mismatch.shapes]
    if loaded and 2 * sum(math.prod(shape) == 0 for shape in loaded) > len(model_state):
        return "Its tensors are empty, as ZeRO-3 leaves them in the file of a rank: run the zero_to_fp32.py beside it."
    linear = [(theirs, ours) for name, theirs, ours in mismatch.shapes if not name.startswith(_CLASSIFIERS)]
    if len(linear) > 1 and all(theirs == ours[::-1] for theirs, ours in linear):
        return "Its linear layers are transposed, as JAX and TensorFlow have them: transpose them, or take timm's own copy."
    return None


def _other_parts(mismatch: Mismatch) -> str | None:
    """What a few other names at the end of a model say."""
    missing, unexpected = set(mismatch.missing), set(mismatch.unexpected)
    for ours, theirs, value in (("fc_norm.weight", "norm.weight", "token"), ("norm.weight", "fc_norm.weight", "avg")):
        if ours in missing and theirs in unexpected:
            return (
                f'It pools in another way: add {{"global_pool": "{value}"}} to the model\'s kwargs (--teacher_kwargs).'
            )
    if {"classifier.0.weight", "classifier.3.weight"} & unexpected and any("fc1" in name for name in missing):
        return "The names of its classifier are torchvision's: take timm's weights of this model."
    heads = [name for name in unexpected if re.match(r"(head|fc|classifier)\.(\d+|\w+\.\d+|mlp|last_layer)\b", name)]
    if heads and not missing and len(heads) == len(unexpected):
        return (
            f"Its classifier has other parts than the model's ({min(heads)}): save it with a single linear layer under the "
            "model's name, or the encoder alone."
        )
    return None


def _other_layout(state: State, model_state: State) -> str:
    """Whose layout of names the file has, where fewer than half of the model's names are in it."""
    names = list(state)
    wrappers = {m[0] for m in (re.match(r"^[A-Za-z_]\w*\.", n) for n in names) if m}
    for wrapper in sorted(wrappers):
        # more than half of the names, because a few agree by chance: patch_embed.norm.weight ends in norm.weight
        if sum(n.removeprefix(wrapper) in model_state for n in names if n.startswith(wrapper)) * 2 > len(model_state):
            return f"Its names start with {wrapper!r}, a wrapper's (an average, or another trainer): save them without."
    if any(
        re.match(r"([a-z]\w*\.)?(embeddings|embedder|encoder\.layers?|vision_model)\.(?!encoder_layer_)", n)
        for n in names
    ):
        return "The names are Hugging Face transformers': take timm's copy (hf-hub:timm/NAME), which has timm's names."
    if any("last_layer.weight_" in n or n.startswith(("dino_head.", "head.mlp.", "teacher.")) for n in names):
        return "It looks like a DINO training checkpoint: take the released backbone, which timm has as vit_*_dinov2."
    if any(
        re.match(
            r"features\.\d+\.|encoder\.layers\.encoder_layer_\d+\.|conv_proj\.|class_token$|trunk_output\.|layers\.8\.0\.layers\.",
            n,
        )
        for n in names
    ):
        return "The names are torchvision's, which of its models the ResNets share with timm: take timm's weights of this one."
    if mmpretrain_like(names):
        return "The names are mmpretrain's: of its models Swin, ViT, BEiT/EVA and ResNet are known; is it this one?"
    return "Hardly a name is the same: is it another architecture?"


def mmpretrain_like(names: Iterable[str]) -> bool:
    """Whether some names have the form of mmpretrain's or mmcv's."""
    return any(
        re.search(r"\.ffn\.layers\.|\.w_msa\.|_conv\.bn\.|\.conv\.bn\.|^head\.layers\.|\.ln1\.", n) for n in names
    )


def _depth(state: State, model_state: State) -> str | None:
    loaded, ours = _block_counts(state), _block_counts(model_state)
    for group in ours:
        if group in loaded and loaded[group] != ours[group]:
            return f"Another depth: {group} has {loaded[group]} blocks in the file and {ours[group]} in the model."
    return None


def _block_counts(names: Iterable[str]) -> dict[str, int]:
    """The length of each list of modules, by its name: 12 for `blocks` where `blocks.11.norm1.weight` is the last."""
    groups: dict[str, int] = {}
    for name in names:
        for m in re.finditer(r"\.(\d+)(?=\.)", name):
            group = name[: m.start()]
            groups[group] = max(groups.get(group, 0), int(m[1]) + 1)
    return groups


def _patch_size(mismatch: Mismatch) -> str | None:
    for name, loaded, ours in mismatch.shapes:
        if name == "patch_embed.proj.weight" and loaded[2:] != ours[2:]:
            return f"Another patch size: {loaded[-1]} pixels in the file and {ours[-1]} in the model."
    return None


def _grid(mismatch: Mismatch) -> str | None:
    """What is as large as the grid of patches, and nothing else, differs."""
    names = [name for name, _, _ in mismatch.shapes]
    if names and not mismatch.missing and not mismatch.unexpected and all(map(_POSITIONS.search, names)):
        return (
            f"Another image size: timm does not resize {names[0]} of this model for another grid of patches: take the size "
            "that it was trained with (--data.image_size, or --teacher_image_size for a teacher)."
        )
    return None


def _width(mismatch: Mismatch) -> str | None:
    for name, loaded, ours in mismatch.shapes:
        if len(loaded) > 1 and name.endswith("weight") and not name.startswith(_CLASSIFIERS):
            side, axis = ("outputs", 0) if loaded[0] != ours[0] else ("inputs", 1)
            return f"Another width: {name} has {loaded[axis]} {side} in the file and {ours[axis]} in the model."
    return None


def _classes(mismatch: Mismatch) -> str | None:
    for name, loaded, ours in mismatch.shapes:
        if name.startswith(_CLASSIFIERS) and name.endswith(("weight", "bias")):
            return f"Another number of classes: {loaded[0]} in the file and {ours[0]} in the model (num_classes)."
    return None
