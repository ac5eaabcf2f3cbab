"""From the official implementation's parameter names to ours, for the golden files in tests/golden."""

from __future__ import annotations

import re
from collections.abc import Mapping

import torch

_PROJECTOR = {
    "proj_student.0": "conv",
    "proj_student.1": "norm",
    "proj_pos.0": "query_mlp",
    "pos_attention.q": "q",
    "pos_attention.k": "k",
    "pos_attention.v": "v",
    "pos_attention.proj": "out",
    "norm": "out_norm",
    "ffn.layers.0.0": "fc1",
    "ffn.layers.1": "fc2",
    "query": "query",
}

VIEWS = {"projector_0": "spatial", "projector_1": "frequency"}


def projector_name(official: str) -> str:
    """One parameter or buffer name of the official AttentionProjector, as CrossAttentionProjector has it."""
    module, _, leaf = official.rpartition(".")
    return f"{_PROJECTOR[module]}.{leaf}" if module else leaf


def projector_state(official: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """State of one official AttentionProjector -> CrossAttentionProjector's; the 1x1 convolution becomes linear."""
    return {
        projector_name(name): value[:, :, 0, 0] if name == "proj_pos.0.weight" else value
        for name, value in official.items()
    }


def _patch_merging_order(channels: int) -> torch.Tensor:
    """nn.Unfold's channel order (mmcv's PatchMerging) -> timm's, for an input of `channels` channels."""
    order = [0, 2, 1, 3]
    return torch.tensor([c * 4 + order[p] for p in range(4) for c in range(channels)])


def swin_state(official: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """mmpretrain's Swin classifier -> timm's SwinTransformer."""
    state = {}
    for name, value in official.items():
        name = name.removeprefix("backbone.")
        if name.endswith("relative_position_index"):
            continue
        if ".downsample." in name:
            order = _patch_merging_order(value.shape[-1] // 4)
            value = value[..., order] if ".norm." in name or "reduction" in name else value
            name = re.sub(r"stages\.(\d+)\.", lambda m: f"layers.{int(m[1]) + 1}.", name)
        name = re.sub(r"^stages\.", "layers.", name).replace(".attn.w_msa.", ".attn.")
        name = name.replace("ffn.layers.0.0", "mlp.fc1").replace("ffn.layers.1", "mlp.fc2")
        state[re.sub(r"^norm3\.", "norm.", name).replace("projection", "proj")] = value
    return state


def beit_state(official: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """mmpretrain's BEiT classifier without relative position bias (EVA's form) -> timm's Eva.

    timm keeps biases of q and v alone: one of k shifts every score of a query alike, which softmax does not see.
    """
    state = {}
    for name, value in official.items():
        name = re.sub(r"^backbone\.|^head\.fc", lambda m: "" if m[0] == "backbone." else "head", name)
        name = re.sub(r"^layers\.", "blocks.", name).replace(".ln1.", ".norm1.").replace(".ln2.", ".norm2.")
        name = name.replace("ffn.layers.0.0", "mlp.fc1").replace("ffn.layers.1", "mlp.fc2")
        name = name.replace("projection", "proj")
        if name.endswith("attn.qkv.bias"):
            q, _, v = value.chunk(3)
            state[name.replace("qkv.bias", "q_bias")] = q
            state[name.replace("qkv.bias", "v_bias")] = v
        else:
            state[name] = value
    return state


def flow_name(official: str) -> str | None:
    """One trainable parameter's name in the official distiller -> in ScaleKD; None for the teacher's."""
    if official.startswith("student."):
        return official.replace("student.backbone.", "student.").replace("student.head.fc", "student.fc")
    if official.startswith("distill_losses."):
        _, stage, view, rest = official.split(".", 3)
        return f"projectors.{stage.removeprefix('loss_fmd_')}.{VIEWS[view]}.{projector_name(rest)}"
    return None


def flow_state(official: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The official ClassificationDistiller's state (`student.`, `teacher.`, `distill_losses.`) -> ScaleKD's.

    The teacher's entries come out under `teacher.` with timm's names; ScaleKD itself has none of them.
    """
    teacher = {k.removeprefix("teacher."): v for k, v in official.items() if k.startswith("teacher.")}
    convert = swin_state if any(".stages." in k for k in teacher) else beit_state
    state = {f"teacher.{k}": v for k, v in convert(teacher).items()}
    for name, value in official.items():
        ours = flow_name(name)
        if ours is not None:
            state[ours] = value[:, :, 0, 0] if name.endswith("proj_pos.0.weight") else value
    return state
