"""How the published file of each setting differs from the setting itself, read from the official code as it runs."""

from __future__ import annotations

from scalekd_ds.config import RunConfig

_STOPS_ON_POOLED_VECTOR = "stops in its first step (the teacher's pooled vector is taken for its last map)"
# by recipe: the departures that do not follow from the recipe's fields
_FILE_DEPARTURES = {
    "swin_b-resnet50-traditional": ("stops in its first step (softmax_scale is a number where the loss wants a pair)",),
    "swin_s-resnet50-advanced": (
        "is filed as advanced and trains by the traditional strategy",
        "names Swin-L's weights for a Swin-S",
    ),
    "swin_l-swin_t-advanced": ("stops in its first step (the student's maps are taken one stage too early)",),
    "eva_l-resnet50-advanced": (_STOPS_ON_POOLED_VECTOR,),
    "eva_l-mixer_b14-advanced": (_STOPS_ON_POOLED_VECTOR,),
    "eva_l-vit_b14-advanced": ("does not build (it says alpha_jfd where the loss takes alpha)",),
    "eva_l-eva02_s14_336-advanced": (_STOPS_ON_POOLED_VECTOR,),
}


def departures(cfg: RunConfig) -> list[str]:
    """What the published file does otherwise than `cfg`, a recipe as it is: phrases that begin with a verb."""
    found = list(_FILE_DEPARTURES.get(cfg.recipe, ()))
    if drop_path := cfg.teacher_kwargs["drop_path_rate"]:
        found.append(f"keeps the teacher in train mode, with stochastic depth {drop_path:g}")
    if cfg.mixes:
        found.append(f"never mixes, though it sets mixup {cfg.data.mixup:g} and cutmix {cfg.data.cutmix:g}")
    if cfg.learning_rate != cfg.optim.lr:
        found.append(
            f"keeps lr {cfg.optim.lr:g}, made for {cfg.optim.base_batch:,} images, on {cfg.global_batch_size:,} "
            f"(here {cfg.learning_rate:g})"
        )
    if cfg.teacher.startswith("eva_"):
        found.append("gives the teacher images in the student's normalisation")
        if cfg.data.image_size == 224:
            found.append("loads the fine-tuning in22k_ft_in1k of the teacher's 196-pixel weights")
    return found
