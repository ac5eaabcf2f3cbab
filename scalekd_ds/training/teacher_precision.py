"""A faster frozen teacher, and the gate in front of it: how far its answers on real images are from those it gave before.

The answers are the target of the whole run, so a run refuses a precision that changes them by more than its bounds.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from deepspeed import comm as dist
from torch import nn

from scalekd_ds.config import RunConfig, RunDirConfig
from scalekd_ds.data import EvalLoader
from scalekd_ds.data.sources.source import Source
from scalekd_ds.distiller import ScaleKD
from scalekd_ds.errors import UserError
from scalekd_ds.losses import dual_view_loss
from scalekd_ds.models.float8 import check_float8, to_float8
from scalekd_ds.models.preprocessing import normalisation_of
from scalekd_ds.teacher import Teacher

# validation images that the two teachers are compared on
GATE_IMAGES = 256
# parts of timm's models that are no trunk: classifiers, what comes before the blocks, and Swin-v2's tables of position biases
_OUTSIDE = {"head", "head_dist", "patch_embed", "attn_pool", "cpb_mlp"}


class Answers(NamedTuple):
    """The teacher's targets of a batch, on the host.

    Attributes:
        tokens: (B, P, C) float32; empty without features.
        logits: (B, K) float32, or None.
    """

    tokens: torch.Tensor
    logits: torch.Tensor | None


def lower_teacher(distiller: ScaleKD, cfg: RunConfig, val: Source) -> dict[str, float]:
    """Takes the teacher to `run.teacher_precision`, and says what that changed; collective.

    Of a headless teacher there is the last stage alone, which both precisions hold in bf16. Its answers are those of a cache,
    which passed the gate when it was made: no image is read.

    Args:
        distiller: Student and teacher on this rank's device; the teacher is whole, and in the run's own precision.
        cfg: The run.
        val: The validation images, of which 256 are taken, evenly spaced.

    Returns:
        What was measured, for the monitors; empty where the precision is the run's own, or the teacher is headless.
        `teacher/gate_spatial` and `teacher/gate_frequency` are the mean of 1 - cosine of the tokens in each view,
        `teacher/gate_kl` that of KL(before || after) of the logits in nats: those that the teacher gives.
        `teacher/gate_images` is their number.

    Raises:
        UserError: A measure is above its bound, the device lacks the precision, or no image can be used.
    """
    teacher, precision = distiller.teacher, cfg.run.teacher_precision
    if teacher is None or precision in ("autocast", "fp32"):
        return {}
    if teacher.headless:
        teacher.hold_in(torch.bfloat16)
        return {}
    device = next(teacher.parameters()).device
    if precision == "fp8":
        check_float8(device)
    images = val.select(evenly_spaced(len(val), GATE_IMAGES))
    mean, std = normalisation_of(distiller.student)
    batch = min(cfg.data.eval_batch_size, cfg.micro_batch_size)
    loader = EvalLoader(images, cfg.data, batch, dist.get_rank(), dist.get_world_size(), device, mean, std)
    batches = [pixels[labels >= 0].cpu() for pixels, labels in loader]
    loader.close()
    before = [_answers(distiller, pixels, device) for pixels in batches]
    teacher.hold_in(torch.bfloat16)
    if precision == "fp8":
        to_float8(trunk_layers(teacher))
    found = torch.zeros(4, dtype=torch.float64)
    for pixels, old in zip(batches, before, strict=True):
        new = _answers(distiller, pixels, device)
        found += torch.tensor([*distances(distiller, old, new), float(len(pixels))], dtype=torch.float64)
    if dist.get_world_size() > 1:
        found = found.to(device)
        dist.all_reduce(found)
    spatial, frequency, kl, count = found.tolist()
    if not count:
        raise UserError(
            f"run.teacher_precision is {precision}, and none of {len(images)} validation images can be used to see what it "
            "changes: `scalekd prepare-data verify` names what is wrong with them."
        )
    scalars = {"teacher/gate_images": count}
    if teacher.last_output is not None:
        scalars |= {"teacher/gate_spatial": spatial / count, "teacher/gate_frequency": frequency / count}
    if teacher.num_classes:
        scalars["teacher/gate_kl"] = kl / count
    check_gate(scalars, cfg.run)
    return scalars


def evenly_spaced(total: int, count: int) -> np.ndarray:
    """(min(count, total),) int64 places from 0 to `total` - 1, spread over all: images lie class by class."""
    count = min(count, total)
    return np.arange(count) * total // count


def _compared(scalars: dict[str, float], cfg: RunDirConfig) -> tuple[str, list[str]]:
    """What was measured, beside its bounds, as text; and the names of what is above its bound, or not finite."""
    names = {"spatial": "1 - cosine (spatial)", "frequency": "1 - cosine (frequency)", "kl": "KL of the logits"}
    said, above = [], []
    for name, title in names.items():
        value, bound = scalars.get(f"teacher/gate_{name}"), getattr(cfg, f"teacher_gate_{name}")
        if value is None:
            continue
        said.append(f"{title} {value:.2g} (at most {bound:g})")
        # NaN is above no bound
        if not value <= bound:
            above.append(name)
    return ", ".join(said), above


def gate_notice(scalars: dict[str, float], cfg: RunDirConfig) -> str | None:
    """What a run says at its start of what `lower_teacher` measured, in one line; None where it measured nothing."""
    if not scalars:
        return None
    images = scalars["teacher/gate_images"]
    return f"teacher: {cfg.teacher_precision}; on {images:.0f} validation images, {_compared(scalars, cfg)[0]}"


def check_gate(scalars: dict[str, float], cfg: RunDirConfig) -> None:
    """Refuses a teacher whose answers are further from those before than the run allows.

    Args:
        scalars: What `lower_teacher` measures.
        cfg: Has the bounds.

    Raises:
        UserError: A measure is above its bound, or is not finite.
    """
    said, above = _compared(scalars, cfg)
    if above:
        more = " ".join(f"--run.teacher_gate_{name}" for name in above)
        other = "autocast" if cfg.teacher_precision == "bf16" else "bf16 or autocast"
        raise UserError(
            f"run.teacher_precision is {cfg.teacher_precision}, which changes the teacher's answers on "
            f"{scalars['teacher/gate_images']:.0f} validation images by too much: {said}; take --run.teacher_precision "
            f"{other}, or allow more with {more}."
        )


@torch.no_grad()
def trunk_layers(teacher: Teacher) -> list[nn.Linear]:
    """The linear layers before the teacher's last stage: not its patch embedding, its classifier, nor what TPP goes through.

    Raises:
        UserError: It has none.
    """
    model, ran = teacher.model, set()

    def note(name: str) -> Callable[..., None]:
        return lambda *_: ran.add(name)

    # by name: the blocks of some teachers run as copies, which share the hooks
    handles = [module.register_forward_hook(note(name)) for name, module in model.named_modules() if name]
    try:
        if teacher.last_input is not None:
            (h, w), dim = teacher.last_input.grid, teacher.last_input.dim
            teacher.last_stage(torch.zeros(1, h * w, dim, device=next(teacher.parameters()).device))
    finally:
        for handle in handles:
            handle.remove()
    found = []
    for name, module in model.named_modules():
        words = name.split(".")
        # some layers are no call of their own, but their block's
        parents = {".".join(words[: n + 1]) for n in range(len(words))}
        if isinstance(module, nn.Linear) and not parents & ran and not _OUTSIDE & set(words):
            found.append(module)
    if not found:
        raise UserError(
            f"run.teacher_precision is fp8 and the teacher ({type(model).__name__}) has no linear layer before its last "
            "stage: take --run.teacher_precision bf16."
        )
    return found


def _answers(distiller: ScaleKD, pixels: torch.Tensor, device: torch.device) -> Answers:
    if not len(pixels):
        return Answers(torch.empty(0), None)
    targets = distiller.teacher_targets(pixels.to(device))
    logits = targets.logits
    return Answers(targets.tokens.float().cpu(), None if logits is None else logits.float().cpu())


def distances(distiller: ScaleKD, old: Answers, new: Answers) -> tuple[float, float, float]:
    """Sums over the images of a batch: 1 - cosine, the mean over tokens, in both views; and KL(old || new) of the logits."""
    spatial = frequency = kl = 0.0
    teacher = distiller.teacher
    if old.tokens.numel() and teacher is not None and teacher.last_output is not None:
        # the loss is 2/B times the sum of (1 - cosine)
        scale = len(old.tokens) / (2.0 * old.tokens.shape[1])
        losses = dual_view_loss(
            new.tokens, new.tokens, old.tokens, teacher.last_output.grid, (scale, scale), distiller.cut
        )
        spatial, frequency = (float(loss) for loss in losses)
    if old.logits is not None and new.logits is not None:
        kl = float(F.kl_div(new.logits.log_softmax(-1), old.logits.log_softmax(-1), reduction="sum", log_target=True))
    return spatial, frequency, kl
