"""Mixers that the paper distils and timm has no preset for, registered with timm on import.

The name of this module begins with that of timm's own, `mlp_mixer`, because `build.constructor_kwargs` tells families
by the names of the modules that define them.
"""

from __future__ import annotations

from typing import Any

from timm.models import register_model
from timm.models.mlp_mixer import MlpMixer


@register_model
def mixer_b14_224(pretrained: bool = False, **kwargs: Any) -> MlpMixer:
    """Mixer-B with patches of 14 pixels, for which timm has neither a preset nor weights.

    Raises:
        RuntimeError: Pretrained weights are asked for.
    """
    if pretrained:
        raise RuntimeError("there are none")
    # timm's registry passes these to every constructor; they are for presets that have pretrained weights
    for name in ("pretrained_cfg", "pretrained_cfg_overlay", "cache_dir"):
        kwargs.pop(name, None)
    return MlpMixer(**{"img_size": 224, "patch_size": 14, "num_blocks": 12, "embed_dim": 768} | kwargs)
