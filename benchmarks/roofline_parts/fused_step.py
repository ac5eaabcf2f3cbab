"""What inductor makes of the parts of a step: teacher, student, projectors, the teacher's last stage, and losses."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any
from unittest import mock

import torch
from torch.func import functional_call

from roofline_parts.cost import Kernel
from roofline_parts.fused import Fused
from scalekd_ds.distiller import ScaleKD
from scalekd_ds.student import StudentOutput
from scalekd_ds.teacher import TeacherTargets


def _compiled_module(fused: Fused, part: str, module: torch.nn.Module, method: str | None = None) -> Callable[..., Any]:
    """A compiled call of a module, whose parameters and buffers are inputs of the graph."""
    held = dict(module.named_parameters()) | dict(module.named_buffers())
    if method is None:
        call = fused.compiled(part, lambda tensors, *inputs: functional_call(module, tensors, inputs))
    else:
        wrapped = _Method(module, method)
        held = {f"module.{name}": tensor for name, tensor in held.items()}
        call = fused.compiled(part, lambda tensors, *inputs: functional_call(wrapped, tensors, inputs))
    return lambda *inputs: call(held, *inputs)


class _Method(torch.nn.Module):
    """A module whose forward pass is a method of another one."""

    def __init__(self, module: torch.nn.Module, method: str) -> None:
        super().__init__()
        self.module, self.method = module, method

    def forward(self, *inputs: torch.Tensor) -> Any:
        return getattr(self.module, self.method)(*inputs)


def fuse_step(fused: Fused, distiller: ScaleKD, batch: int, dtype: torch.dtype | None) -> list[Kernel]:
    """The kernels of forward and backward pass with each part compiled as one graph; inside of `fake_cuda.tensors`.

    Args:
        fused: What collects them.
        distiller: With a teacher, and with projectors and TPP at both stages.
        batch: Images.
        dtype: Autocast's, or None.

    Raises:
        ValueError: It has no TPP, or not all projectors.
    """
    if not distiller.tpp or set(distiller.projectors) != {"s3", "s4"}:
        raise ValueError("only a step with TPP and with the projectors of both stages is compiled here.")
    device = next(distiller.parameters()).device
    images = torch.empty(batch, 3, *distiller.image_size, device=device)
    labels = torch.empty(batch, dtype=torch.int64, device=device)
    distiller.train()
    teacher: Any = distiller.teacher
    targets = TeacherTargets(*_compiled_module(fused, "teacher", teacher)(images))
    with torch.autocast(device.type, dtype, enabled=dtype is not None):
        student = StudentOutput(*_compiled_module(fused, "student", distiller.tapped_student)(images))
        first, second = distiller.projectors["s3"], distiller.projectors["s4"]
        tokens = _compiled_module(fused, "projectors", first)(student.before)
        last_stage = _compiled_module(fused, "TPP", teacher, "last_stage")
        tokens = last_stage(tokens.flatten(0, 1)).unflatten(0, tokens.shape[:2])
        out = _compiled_module(fused, "projectors", second)(student.last, tokens)

        def losses(projected: Any, student_logits: torch.Tensor, *rest: torch.Tensor) -> torch.Tensor:
            answer = StudentOutput(student.before, student.last, student_logits)
            views = {
                stage: dict(zip(pair.names, found.unbind(0), strict=True))
                for (stage, pair), found in zip(distiller.projectors.items(), projected, strict=True)
            }
            with (
                mock.patch.object(distiller, "_tapped_student", (lambda images: answer,)),
                mock.patch.object(distiller, "project", lambda student: views),
            ):
                return distiller(images, rest[-1], TeacherTargets(*rest[:-1]))["loss/total"]

        # a teacher without a classifier has no logits
        teacher_answer = [t for t in targets if t is not None]
        if targets.logits is None:
            raise ValueError("only a teacher with a classifier is compiled here.")
        total = fused.compiled("losses", losses)((tokens, out), student.logits, *teacher_answer, labels)
    total.backward()
    return fused.kernels
