"""Mixers that the paper distils and timm has no preset for, registered beside timm's own.

`build.constructor_kwargs` knows families by the names of their modules: this file's begins as timm's does.
"""

from __future__ import annotations

from typing import Any

from timm.models import register_model
from timm.models.mlp_mixer import MlpMixer


@register_model
def mixer_b14_224(pretrained: bool = False, **kwargs: Any) -> MlpMixer:
    """Mixer-B with patches of 14 pixels; no preset of timm's takes that size, and none has weights."""
    if pretrained:
        raise RuntimeError("there are none")
    # timm's registry asks for configurations that a preset has and this has not
    for name in ("pretrained_cfg", "pretrained_cfg_overlay", "cache_dir"):
        kwargs.pop(name, None)
    return MlpMixer(**{"img_size": 224, "patch_size": 14, "num_blocks": 12, "embed_dim": 768} | kwargs)
