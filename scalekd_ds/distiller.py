"""ScaleKD: the one trainable module. It holds the student and the projectors; the teacher stands outside."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from scalekd_ds.errors import UserError
from scalekd_ds.losses import dual_view_losses, label_loss, logit_kd
from scalekd_ds.models.build import build_model
from scalekd_ds.models.preprocessing import Preprocessing
from scalekd_ds.pairing import pairing_table
from scalekd_ds.projector.cross_attention import CrossAttentionProjector
from scalekd_ds.projector.linear import LinearPair, LinearProjector
from scalekd_ds.projector.pair import ProjectorPair
from scalekd_ds.student import Student, StudentOutput
from scalekd_ds.teacher import TargetsWithoutTPP, Teacher, TeacherTargets

VIEWS = ("spatial", "frequency")

_NOTHING = nullcontext()


def untimed(name: str) -> AbstractContextManager:
    """Stands where a timer of the step's parts may be put."""
    return _NOTHING


class ScaleKD(nn.Module):
    """Distils a frozen teacher into a student (Fan et al., ScaleKD, NeurIPS 2024).

    Args:
        student: timm name, built model, or `Student`.
        teacher: timm name, consolidated .safetensors, built model, `Teacher`, or None for plain supervised training.
        image_size: (h, w) or side of the training images in pixels; None is the student's own, else the teacher's.
        num_classes: Head of a student built by name; None is the teacher's.
        kd_weight: a in (1-a) CE + a KD; 1 leaves CE out, and labels are then not needed.
        temperature: Of logit KD.
        features: False leaves out the projectors and the four feature terms.
        weights_s3: (spatial, frequency) weights of the stage n-1 terms (TPP).
        weights_s4: (spatial, frequency) weights of the last stage's terms.
        heads_s3: Attention heads of the stage n-1 projectors; None is the teacher's.
        heads_s4: Attention heads of the last stage's projectors; None is the teacher's.
        softmax_scale: gamma of the projectors' attention.
        norm: `batch` or `layer`, of the projectors.
        projector: `cap`, or `linear` to compare with.
        tpp: False matches stage n-1 to the teacher's own stage n-1.
        cut: Side of the block of lowest frequencies that the frequency view drops.
        loss: Student loss on the labels, `ce` or `bce`.
        label_smoothing: For `ce`.
        verbose: Prints the pairing as a table.

    Attributes:
        student: The bare timm model; its state-dict is timm's.
        projectors: `s3` and `s4`, each a `ProjectorPair` of `spatial` and `frequency`; views with weight 0 are left out.
        teacher: `Teacher` or None. It is no submodule: never in the state-dict, the optimizer or ZeRO; `.to()` moves it.

    Raises:
        UserError: A pair that does not fit: the classes with KD on, an image size, heads that do not divide the width,
            a student grid larger than the teacher's.
    """

    def __init__(
        self,
        student: str | nn.Module,
        teacher: str | nn.Module | None,
        *,
        image_size: int | tuple[int, int] | None = None,
        num_classes: int | None = None,
        kd_weight: float = 0.5,
        temperature: float = 1.0,
        features: bool = True,
        weights_s3: tuple[float, float] = (0.08, 0.06),
        weights_s4: tuple[float, float] = (0.08, 0.06),
        heads_s3: int | None = None,
        heads_s4: int | None = None,
        softmax_scale: float = 5.0,
        norm: str = "batch",
        projector: str = "cap",
        tpp: bool = True,
        cut: int = 1,
        loss: str = "ce",
        label_smoothing: float = 0.0,
        verbose: bool = True,
    ) -> None:
        super().__init__()
        side = (image_size, image_size) if isinstance(image_size, int) else image_size
        features = features and teacher is not None
        if teacher is not None and not isinstance(teacher, Teacher):
            teacher = Teacher(teacher, image_size=side, features=features)
        # a tuple, so that the teacher is not registered as a submodule
        self._teacher = (teacher,)
        if isinstance(student, str):
            classes = num_classes or (teacher.num_classes if teacher is not None else None)
            student = build_model(student, classes, image_size=side)
        self._tapped_student = (student if isinstance(student, Student) else Student(student),)
        self.student = self.tapped_student.model

        # a teacher without a classifier, such as DINOv2 or SigLIP, has its features to give
        self.kd_weight = kd_weight if teacher is not None and teacher.num_classes else 0.0
        self.temperature, self.cut, self.tpp = temperature, cut, tpp
        self.loss, self.label_smoothing = loss, label_smoothing
        self.feature_weights = {
            f"{view}_{stage}": weight
            for stage, weights in (("s3", weights_s3), ("s4", weights_s4))
            for view, weight in zip(VIEWS, weights, strict=True)
            if features and weight > 0.0
        }
        own, theirs = self.tapped_student.preprocessing, teacher.preprocessing if teacher is not None else None
        self.image_size = side or own.size or (theirs.size if theirs else None) or (224, 224)
        self._shapes = self.tapped_student.shapes(self.image_size)
        if teacher is not None:
            self._check_classes(teacher)
            self._register_normalisation(own, theirs)
            self._check_teacher_size(teacher)
        # who measures a step sets these: a timer of its parts, and a taker of both models' logits
        self.part: Callable = untimed
        self.on_logits: Callable[[torch.Tensor, torch.Tensor], None] | None = None
        self.projectors = nn.ModuleDict()
        if features:
            self._build_projectors(teacher, heads_s3, heads_s4, softmax_scale, norm, projector)
        if verbose:
            print(self.pairing(), flush=True)

    # -- building ------------------------------------------------------------------------------------------------

    def _check_classes(self, teacher: Teacher) -> None:
        classes = self._shapes.logits.shape[-1]
        if self.kd_weight > 0.0 and teacher.num_classes != classes:
            raise UserError(
                f"the teacher has {teacher.num_classes} classes and the student {classes}: logit KD needs the same; "
                "fine-tune the teacher on these classes, or set --distill.kd_weight 0."
            )

    def _register_normalisation(self, own: Preprocessing, theirs: Preprocessing) -> None:
        """Images come in the student's normalisation; scale and shift take them to the teacher's."""
        same = None in (own.mean, own.std, theirs.mean, theirs.std) or (own.mean, own.std) == (theirs.mean, theirs.std)
        scale = shift = None
        if not same:
            mean, std, t_mean, t_std = (torch.tensor(v) for v in (own.mean, own.std, theirs.mean, theirs.std))
            scale, shift = (std / t_std)[:, None, None], ((mean - t_mean) / t_std)[:, None, None]
        self.register_buffer("teacher_scale", scale, persistent=False)
        self.register_buffer("teacher_shift", shift, persistent=False)

    def _check_teacher_size(self, teacher: Teacher) -> None:
        parameter = next(teacher.parameters())
        images = torch.zeros(1, 3, *self.image_size, device=parameter.device, dtype=parameter.dtype)
        try:
            targets = self.teacher_targets(images)
        except UserError:
            raise
        except (RuntimeError, AssertionError, ValueError) as error:
            size = teacher.preprocessing.size or self.image_size
            raise UserError(
                f"the teacher ({type(teacher.model).__name__}) cannot take {size[0]}x{size[1]} images: {error}"
            ) from None
        if teacher.last_output is not None:
            stage, shape = teacher.last_output, tuple(targets.tokens.shape[1:])
            if shape != (stage.grid[0] * stage.grid[1], stage.dim):
                raise UserError(
                    f"the teacher ({type(teacher.model).__name__}) gives {shape[0]} tokens of {shape[1]} channels for "
                    f"{self.image_size[0]}x{self.image_size[1]} images, not the {stage.grid[0]}x{stage.grid[1]} of "
                    f"{stage.dim} that it was built for: set --teacher_image_size."
                )

    def _build_projectors(
        self,
        teacher: Teacher,
        heads_s3: int | None,
        heads_s4: int | None,
        softmax_scale: float,
        norm: str,
        projector: str,
    ) -> None:
        places = {
            "s3": (self._shapes.before, teacher.last_input, heads_s3),
            "s4": (self._shapes.last, teacher.last_output, heads_s4),
        }
        for stage, (student_map, place, heads) in places.items():
            grid = tuple(student_map.shape[-2:])
            views = [view for view in VIEWS if f"{view}_{stage}" in self.feature_weights]
            if not views:
                continue
            if stage == "s3" and (grid[0] > place.grid[0] * 2 or grid[1] > place.grid[1] * 2):
                raise UserError(
                    f"the student's map before its last stage is {grid[0]}x{grid[1]}, more than twice the "
                    f"teacher's {place.grid[0]}x{place.grid[1]} there: choose a student with more stages, smaller images, "
                    "or a larger --teacher_image_size."
                )
            if projector == "linear":
                linear = {view: LinearProjector(student_map.shape[1], place.dim, place.grid) for view in views}
                self.projectors[stage] = LinearPair(linear)
                continue
            try:
                self.projectors[stage] = ProjectorPair(
                    {
                        view: CrossAttentionProjector(
                            student_map.shape[1],
                            place.dim,
                            grid,
                            place.grid,
                            heads or place.heads,
                            softmax_scale,
                            # TPP gives the last stage its queries, view by view; without it each learns its own
                            learned_query=stage == "s3" or not self.tpp or f"{view}_s3" not in self.feature_weights,
                            norm=norm,
                        )
                        for view in views
                    }
                )
            except ValueError as error:
                raise UserError(f"projectors of {stage}: {error}") from None

    # -- what it is ----------------------------------------------------------------------------------------------

    @property
    def tapped_student(self) -> Student:
        """The student that gives its feature maps beside its logits; around the bare one, outside the module tree."""
        return self._tapped_student[0]

    @property
    def teacher(self) -> Teacher | None:
        """The frozen teacher, outside the module tree."""
        return self._teacher[0]

    def _apply(self, fn: Any, recurse: bool = True) -> ScaleKD:
        if self.teacher is not None:
            self.teacher._apply(fn, recurse)
        return super()._apply(fn, recurse)

    def weights(self) -> dict[str, float]:
        """The factor that each term of `forward` has been multiplied by; terms whose factor is 0 are none."""
        terms = {"ce": 1.0 - self.kd_weight, "kd": self.kd_weight}
        return {name: weight for name, weight in terms.items() if weight > 0.0} | self.feature_weights

    def pairing(self) -> str:
        """Student and teacher side by side, as a table in plain text."""
        return pairing_table(self.student, self.teacher, self._shapes, self.image_size, self.projectors, self.weights())

    # -- one step ------------------------------------------------------------------------------------------------

    def teacher_targets(self, images: torch.Tensor) -> TeacherTargets | TargetsWithoutTPP:
        """What the terms compare with, for images (B, 3, H, W) in the student's normalisation."""
        if self.teacher_scale is not None:
            images = images * self.teacher_scale + self.teacher_shift
        size = self.teacher.preprocessing.size
        if size is not None and size != tuple(images.shape[-2:]):
            images = F.interpolate(images, size, mode="bicubic", antialias=True, align_corners=False)
        # called as a module: a sharded teacher starts its pass there
        targets = self.teacher(images)
        if self.tpp or not any(name.endswith("s3") for name in self.feature_weights):
            return targets
        return TargetsWithoutTPP(*targets, self.teacher.before_last_stage(images))

    def project(self, student: StudentOutput) -> dict[str, dict[str, torch.Tensor]]:
        """Projected tokens (B, P, C) by stage and view; with TPP those of stage n-1 have passed through the teacher's
        last stage."""
        projected: dict[str, dict[str, torch.Tensor]] = {}
        seen: dict[str, torch.Tensor] = {}
        if "s3" in self.projectors:
            pair = self.projectors["s3"]
            tokens = pair(student.before)
            if self.tpp:
                # both views go through the frozen last stage as one batch
                tokens = self.teacher.last_stage(tokens.flatten(0, 1)).unflatten(0, tokens.shape[:2])
            projected["s3"] = dict(zip(pair.names, tokens.unbind(0), strict=True))
            seen = projected["s3"] if self.tpp else {}
        if "s4" in self.projectors:
            pair = self.projectors["s4"]
            if pair.names == tuple(seen):
                out = pair(student.last, tokens)
            elif not seen:
                out = pair(student.last)
            else:
                out = pair.one_by_one(student.last, [seen.get(name) for name in pair.names])
            projected["s4"] = dict(zip(pair.names, out.unbind(0), strict=True))
        return projected

    def forward(
        self,
        images: torch.Tensor,
        targets: torch.Tensor | None = None,
        teacher_targets: TeacherTargets | TargetsWithoutTPP | None = None,
    ) -> dict[str, torch.Tensor]:
        """One step's losses, each already weighted, so that `loss/total` is their sum.

        Args:
            images: (B, 3, H, W) in the student's normalisation.
            targets: (B,) class indices or (B, K) probabilities; None for images without labels, whose step is that of
                labelled ones without its CE: the other terms keep their weights.
            teacher_targets: Of the same images, where the caller has them already.

        Returns:
            `loss/ce`, `loss/kd`, `loss/spatial_s3`, `loss/frequency_s3`, `loss/spatial_s4`, `loss/frequency_s4` (those
            with a weight) and `loss/total`; scalars. `weights()` has the factors.

        Raises:
            UserError: No labels, and no term that does without them.
        """
        if targets is None and not (self.kd_weight > 0.0 or self.projectors):
            raise UserError(
                "targets is None and no term does without labels: give a teacher, and leave features on or kd_weight above 0."
            )
        with self.part("student"):
            student = self.tapped_student(images)
        teacher, projected = None, {}
        if self.teacher is not None and (self.kd_weight > 0.0 or self.projectors):
            teacher = self.teacher_targets(images) if teacher_targets is None else teacher_targets
            if self.projectors:
                with self.part("projectors"):
                    projected = self.project(student)
        with self.part("losses"):
            losses: dict[str, torch.Tensor] = {}
            # a weight of 0 leaves the term out: 0 times an infinite loss would be NaN
            if targets is not None and self.kd_weight < 1.0:
                ce = label_loss(student.logits, targets, self.loss, self.label_smoothing)
                losses["loss/ce"] = (1.0 - self.kd_weight) * ce
            if teacher is not None and self.kd_weight > 0.0:
                losses["loss/kd"] = logit_kd(student.logits, teacher.logits, self.temperature, self.kd_weight)
            if projected:
                losses |= self._feature_losses(projected, teacher)
            losses["loss/total"] = torch.stack(list(losses.values())).sum()
        if self.on_logits is not None and teacher is not None and teacher.logits is not None:
            self.on_logits(student.logits, teacher.logits)
        return losses

    def _feature_losses(
        self, projected: dict[str, dict[str, torch.Tensor]], teacher: TeacherTargets | TargetsWithoutTPP
    ) -> dict[str, torch.Tensor]:
        stages, weights = [], []
        for stage, views in projected.items():
            # a view that is switched off has no projector; the other one's tokens stand in, with weight 0
            stand_in = next(iter(views.values())).detach()
            stages.append(tuple(views.get(view, stand_in) for view in VIEWS))
            weights.append(tuple(self.feature_weights.get(f"{view}_{stage}", 0.0) for view in VIEWS))
        values: list = []
        if not self.tpp and "s3" in projected:
            grid = self.teacher.last_input.grid
            values = [*dual_view_losses([stages.pop(0)], teacher.before, grid, [weights.pop(0)], self.cut)]
        if stages:
            grid = self.teacher.last_output.grid
            values += dual_view_losses(stages, teacher.tokens, grid, weights, self.cut)
        return {
            f"loss/{view}_{stage}": value
            for (stage, views), pair in zip(projected.items(), values, strict=True)
            for view, value in zip(VIEWS, pair, strict=True)
            if view in views
        }
