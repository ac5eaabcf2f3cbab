"""The same distillation step in the structure of the published code, written anew from the paper's formulas.

It runs on the weights of a `scalekd_ds.ScaleKD`, so that both give the same losses. It keeps the structure of the published
code: one projector after the other on NCHW maps, the learned query repeated over the batch and projected for every image,
materialised scores, one pass of the last stage for each view, a DCT that is built at every call of a loss, log(softmax). It
departs from it in two points, without which the numbers could not be compared: the teacher is in eval mode (the published
code has it in train mode, where its stochastic depth is active), and a view of weight 0 is left out (the published code
computes the whole branch). Where the published code wastes time that a single line saves, that line is used, and a comment
says so.

Shape letters: B batch, C channels, H x W a grid, P teacher-grid tokens, S student tokens, N heads, D head size.
"""

from __future__ import annotations

import copy
import math

import torch
import torch.nn.functional as F
from torch import nn

from scalekd_ds.distiller import ScaleKD
from scalekd_ds.losses import label_loss
from scalekd_ds.pair_projectors import VIEWS
from scalekd_ds.projector.cross_attention import CrossAttentionProjector
from scalekd_ds.student import StudentOutput
from scalekd_ds.teacher import Teacher, TeacherTargets


def published_distiller(distiller: ScaleKD) -> ScaleKD:
    """A shallow copy of `distiller` on the same weights, to be passed to `losses` and used for nothing else.

    Its student gets NCHW images. Its teacher computes softmax(QK^T)V by separate operations, as the published backbones do,
    where timm would call a fused one.

    Raises:
        ValueError: The teacher holds its weights in 16 bits.
    """
    if distiller.teacher.precision is not None:
        raise ValueError(f"distiller has a teacher in {distiller.teacher.precision}: the published code keeps float32.")
    view = with_teacher(distiller, _plain_attention(distiller.teacher))
    student = copy.copy(distiller.tapped_student)
    student.channels_last = False
    view._tapped_student = (student,)
    return view


def with_teacher(distiller: ScaleKD, teacher: Teacher) -> ScaleKD:
    """A shallow copy of `distiller`, on the same student and projectors, with another teacher."""
    view = copy.copy(distiller)
    view._teacher = (teacher,)
    return view


def _plain_attention(teacher: Teacher) -> Teacher:
    """A copy of the teacher on the same weights, without fused attention."""
    shared = {id(tensor): tensor for tensor in (*teacher.parameters(), *teacher.buffers())}
    plain = copy.deepcopy(teacher, shared)
    for module in plain.modules():
        if hasattr(module, "fused_attn"):
            module.fused_attn = False
    return plain


# -- models --------------------------------------------------------------------------------------------------------


def run_student(distiller: ScaleKD, images: torch.Tensor) -> StudentOutput:
    """The student's two NCHW maps and its logits."""
    return distiller.tapped_student(images)


def run_teacher(distiller: ScaleKD, images: torch.Tensor) -> TeacherTargets:
    """The teacher's tokens, as the map (B, C, H, W) that the published backbones return, and its logits."""
    tokens_BPC, logits = distiller.teacher_targets(images)
    return TeacherTargets(_to_map(tokens_BPC, distiller.teacher.last_output.grid), logits)


def run_last_stage(distiller: ScaleKD, tokens_BPC: torch.Tensor) -> torch.Tensor:
    """The tokens (B, P, C) of one view after the frozen last stage."""
    return distiller.teacher.last_stage(tokens_BPC)


def _to_map(tokens_BPC: torch.Tensor, grid: tuple[int, int]) -> torch.Tensor:
    return tokens_BPC.transpose(1, 2).unflatten(2, grid).contiguous()


# -- projector (section 3.1) ---------------------------------------------------------------------------------------


def run_projector(p: CrossAttentionProjector, x_BCHW: torch.Tensor, query_BPC: torch.Tensor | None) -> torch.Tensor:
    """Runs one projector.

    Args:
        p: The projector.
        x_BCHW: The student's map.
        query_BPC: Queries of a projector that has no learned one.

    Returns:
        (B, P, C) tokens.
    """
    batch = x_BCHW.shape[0]
    f_BCHW = F.conv2d(x_BCHW, p.conv.weight, p.conv.bias, padding=1)
    f_BCHW = F.relu(p.norm(f_BCHW)) + p.pos_embed
    f_BSC = f_BCHW.permute(0, 2, 3, 1).flatten(1, 2)

    h, w = p.query_grid
    if p.query is not None:
        # every image gets its own copy of the same query, and each copy its own MLP and projection
        query_BCHW = p.query.weight.view(1, h, w, -1).permute(0, 3, 1, 2).repeat(batch, 1, 1, 1)
    else:
        query_BCHW = query_BPC.permute(0, 2, 1).reshape(batch, -1, h, w).contiguous()
    query_BCHW = F.relu(F.conv2d(query_BCHW, p.query_mlp.weight[:, :, None, None], p.query_mlp.bias))
    q_BPC = p.q(query_BCHW.permute(0, 2, 3, 1).flatten(1, 2))

    y_BPC = p.out(attention(q_BPC, p.k(f_BSC), p.v(f_BSC), p.num_heads, p.scale))
    n_BPC = p.out_norm(y_BPC)
    return n_BPC + p.fc2(F.relu(p.fc1(n_BPC)))


def attention(q_BPC: torch.Tensor, k_BSC: torch.Tensor, v_BSC: torch.Tensor, heads: int, scale: float) -> torch.Tensor:
    """softmax(scale QK^T)V over heads, with materialised scores: (B, P, C)."""
    q_BNPD, k_BNSD, v_BNSD = (x.unflatten(-1, (heads, -1)).permute(0, 2, 1, 3) for x in (q_BPC, k_BSC, v_BSC))
    scores_BNPS = (q_BNPD @ k_BNSD.transpose(-2, -1)) * scale
    return (scores_BNPS.softmax(-1) @ v_BNSD).transpose(1, 2).flatten(2)


# -- losses (section 3.2) ------------------------------------------------------------------------------------------


def _dct_layer(size: int, like: torch.Tensor) -> nn.Linear:
    """The DCT-II of one axis as a linear layer without bias."""
    k = torch.arange(size, device=like.device, dtype=like.dtype)
    basis = torch.cos(math.pi * k[:, None] * (2 * k[None, :] + 1) / (2 * size)) * math.sqrt(2.0 / size)
    basis[0] /= math.sqrt(2.0)
    # the published layers are initialised first and then overwritten; `skip_init` saves that
    layer = nn.utils.skip_init(nn.Linear, size, size, bias=False, device=like.device, dtype=like.dtype)
    layer.weight.data.copy_(basis)
    return layer.requires_grad_(False)


def _along_both(x_BCHW: torch.Tensor, rows: torch.Tensor, columns: torch.Tensor) -> torch.Tensor:
    x_BCHW = F.linear(x_BCHW, columns)
    return F.linear(x_BCHW.transpose(-1, -2), rows).transpose(-1, -2)


def _without_lowest(x_BCHW: torch.Tensor, cut: int, rows: nn.Linear, columns: nn.Linear) -> torch.Tensor:
    spectrum_BCHW = _along_both(x_BCHW, rows.weight, columns.weight)
    keep_HW = torch.ones_like(spectrum_BCHW[0, 0])
    keep_HW[:cut, :cut] = 0.0
    return _along_both(spectrum_BCHW * keep_HW, rows.weight.T, columns.weight.T)


def _tokens(x_BCHW: torch.Tensor) -> torch.Tensor:
    return x_BCHW.permute(0, 2, 3, 1).flatten(1, 2)


def spatial_loss(s_BPC: torch.Tensor, t_BCHW: torch.Tensor, weight: float) -> torch.Tensor:
    """weight / B * sum |s/|s| - t/|t||^2."""
    s_BPC, t_BPC = F.normalize(s_BPC, dim=-1), F.normalize(_tokens(t_BCHW), dim=-1)
    return weight * F.mse_loss(s_BPC, t_BPC, reduction="sum") / s_BPC.shape[0]


def frequency_loss(s_BPC: torch.Tensor, t_BCHW: torch.Tensor, weight: float, cut: int) -> torch.Tensor:
    """`spatial_loss` of both maps without their lowest frequencies, which are removed by DCT, mask and inverse DCT."""
    h, w = t_BCHW.shape[-2:]
    wide = torch.promote_types(t_BCHW.dtype, torch.float32)
    like = torch.empty(0, device=t_BCHW.device, dtype=wide)
    # the published code also builds them for the spatial view, which does not use them
    rows, columns = _dct_layer(h, like), _dct_layer(w, like)
    s_BCHW = _to_map(s_BPC, (h, w)).to(wide)
    s_BCHW, t_BCHW = (_without_lowest(x, cut, rows, columns) for x in (s_BCHW, t_BCHW.to(wide)))
    return spatial_loss(_tokens(s_BCHW), t_BCHW, weight)


def kd_loss(
    student_logits: torch.Tensor, teacher_logits: torch.Tensor, temperature: float, weight: float
) -> torch.Tensor:
    """-weight tau^2 mean sum softmax(t/tau) log(softmax(s/tau)), with log and softmax as separate functions."""
    wide = torch.promote_types(student_logits.dtype, torch.float32)
    s, t = (F.softmax(logits.to(wide) / temperature, dim=-1) for logits in (student_logits, teacher_logits))
    return -weight * temperature**2 * (t * s.log()).sum(-1).mean()


# -- one step ------------------------------------------------------------------------------------------------------


def losses(distiller: ScaleKD, images: torch.Tensor, targets: torch.Tensor) -> dict[str, torch.Tensor]:
    """The losses of `ScaleKD.forward` in the published structure, by the same names.

    Args:
        distiller: From `published_distiller`.
        images: (B, 3, H, W) in the student's normalisation.
        targets: (B,) class indices or (B, K) probabilities.
    """
    teacher = run_teacher(distiller, images)
    student = run_student(distiller, images)
    out = {
        "loss/ce": (1.0 - distiller.kd_weight)
        * label_loss(student.logits, targets, distiller.loss, distiller.label_smoothing)
    }
    if distiller.kd_weight > 0.0:
        out["loss/kd"] = kd_loss(student.logits, teacher.logits, distiller.temperature, distiller.kd_weight)

    queries: dict[str, torch.Tensor] = {}
    for stage, x_BCHW in (("s3", student.before), ("s4", student.last)):
        for view in VIEWS:
            weight = distiller.feature_weights.get(f"{view}_{stage}")
            if weight is None:
                continue
            projector = getattr(distiller.projectors[stage], view)
            s_BPC = run_projector(projector, x_BCHW, queries.get(view))
            if stage == "s3":
                s_BPC = queries[view] = run_last_stage(distiller, s_BPC)
            out[f"loss/{view}_{stage}"] = view_loss(view, s_BPC, teacher.tokens, weight, distiller.cut)
    out["loss/total"] = torch.stack(list(out.values())).sum()
    return out


def view_loss(view: str, s_BPC: torch.Tensor, t_BCHW: torch.Tensor, weight: float, cut: int) -> torch.Tensor:
    """The loss of one view."""
    if view == "spatial":
        return spatial_loss(s_BPC, t_BCHW, weight)
    return frequency_loss(s_BPC, t_BCHW, weight, cut)
