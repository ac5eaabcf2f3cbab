"""`ScaleKD`, the one trainable module: it holds student and projectors; the teacher stays outside the module tree."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import nn

from scalekd_ds.errors import UserError
from scalekd_ds.losses import dual_view_losses, label_loss, logit_kd
from scalekd_ds.models.build import build_model
from scalekd_ds.models.preprocessing import Preprocessing
from scalekd_ds.pair_projectors import VIEWS, build_projectors
from scalekd_ds.pairing import pairing_table
from scalekd_ds.student import Student, StudentOutput
from scalekd_ds.teacher import TargetsWithoutTPP, Teacher, TeacherTargets

_NO_TIMER = nullcontext()


def untimed(name: str) -> AbstractContextManager:
    """The default of `ScaleKD.time_part`: a context manager that measures nothing."""
    return _NO_TIMER


class ScaleKD(nn.Module):
    """Distils a frozen teacher into a student (Fan et al., ScaleKD, NeurIPS 2024).

    It is built on the student's device, to which a teacher from elsewhere is moved; `.to()` moves them all.

    Args:
        student: timm name, built model, or `Student`.
        teacher: timm name, consolidated .safetensors, built model, `Teacher`, or None for plain supervised training.
        image_size: (h, w) or side of the training images in pixels; None is the student's own, else the teacher's.
        num_classes: Head of a student built by name; None is the teacher's.
        kd_weight: a in (1-a) CE + a KD; 1 leaves CE out, and labels are then not needed.
        temperature: Temperature of logit KD.
        features: False leaves out the projectors and the four feature terms.
        weights_s3: (spatial, frequency) weights of the stage n-1 terms (TPP).
        weights_s4: (spatial, frequency) weights of the last stage's terms.
        heads_s3: Attention heads of the stage n-1 projectors; None is the teacher's.
        heads_s4: Attention heads of the last stage's projectors; None is the teacher's.
        softmax_scale: gamma of the projectors' attention.
        norm: Norm after the projectors' convolution, `batch` or `layer`.
        projector: `cap` (cross attention), or `linear`, the common 1x1 convolution, for comparison.
        tpp: False compares stage n-1 with the teacher's own stage n-1, not through the teacher's last stage.
        cut: Side of the block of lowest frequencies that the frequency view drops.
        loss: Student loss on the labels, `ce` or `bce`.
        label_smoothing: Label smoothing of `ce`.
        verbose: Prints how student and teacher are paired, as a table.

    Attributes:
        student: The bare timm model; its state-dict is timm's.
        projectors: `s3` and `s4`, each a `ProjectorPair` of the views whose weight is not 0.
        teacher: `Teacher` or None; no submodule: never in the state-dict, the optimizer or ZeRO, but moved by `.to()`.
        time_part: Returns the context manager that a part of the step, given by name, runs in: where a timer is set.
        on_logits: Called with the student's and the teacher's logits of each step; None, or set by what watches them.

    Raises:
        UserError: A student and a teacher that do not fit: other numbers of classes with KD on, an image size that one
            of them cannot take, heads that do not divide the width, a student grid far larger than the teacher's.
    """

    teacher_scale: torch.Tensor | None
    teacher_shift: torch.Tensor | None

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
        size = (image_size, image_size) if isinstance(image_size, int) else image_size
        features = features and teacher is not None
        if teacher is not None and not isinstance(teacher, Teacher):
            teacher = Teacher(teacher, image_size=size, features=features)
        # in tuples, so that neither is registered as a submodule; `self.student` is the one that counts
        self._teacher = (teacher,)
        if isinstance(student, str):
            classes = num_classes or (teacher.num_classes if teacher is not None else None)
            student = build_model(student, classes, image_size=size)
        self._tapped_student = (student if isinstance(student, Student) else Student(student),)
        self.student = self.tapped_student.model

        # a teacher without a classifier, such as DINOv2 or SigLIP, has no logits to distil
        self.kd_weight = kd_weight if teacher is not None and teacher.num_classes else 0.0
        self.temperature, self.cut, self.tpp = temperature, cut, tpp
        self.loss, self.label_smoothing = loss, label_smoothing
        self.feature_weights = {
            f"{view}_{stage}": weight
            for stage, weights in (("s3", weights_s3), ("s4", weights_s4))
            for view, weight in zip(VIEWS, weights, strict=True)
            if features and weight > 0.0
        }
        own_size, teacher_size = (m and m.preprocessing.size for m in (self.tapped_student, teacher))
        self.image_size = size or own_size or teacher_size or (224, 224)
        self._shapes = self.tapped_student.shapes(self.image_size)
        if teacher is not None:
            self._check_classes(teacher)
            self._register_normalisation(self.tapped_student.preprocessing, teacher)
            if teacher.headless:
                self._check_targets()
            else:
                self._check_teacher_size(teacher)
        # name of a method -> what runs in its place, where it is compiled
        self._compiled: dict[str, Callable[..., Any]] = {}
        self.time_part: Callable[[str], AbstractContextManager] = untimed
        self.on_logits: Callable[[torch.Tensor, torch.Tensor], None] | None = None
        self.projectors = nn.ModuleDict()
        if features and teacher is not None:
            heads = {"s3": heads_s3, "s4": heads_s4}
            terms, shapes = set(self.feature_weights), (self._shapes.before, self._shapes.last)
            self.projectors.update(build_projectors(shapes, teacher, terms, tpp, heads, softmax_scale, norm, projector))
        # a student that is on a GPU already has all else beside it
        self.to(next(self.student.parameters()).device)
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

    def _check_targets(self) -> None:
        """Refuses the targets that a cache does not hold."""
        if not self.tpp and any(name.endswith("s3") for name in self.feature_weights):
            raise UserError(
                "--distill.tpp false compares stage n-1 with the teacher's own tokens there, which a teacher cache does not "
                "hold: leave it out, or train without --teacher_cache."
            )

    def _register_normalisation(self, student: Preprocessing, teacher: Teacher) -> None:
        """Registers the scale and shift that take images from the student's normalisation to the teacher's.

        Both are None where the two are the same, where one of them is not known, and where the teacher is headless.
        """
        statistics = (student.mean, student.std, teacher.preprocessing.mean, teacher.preprocessing.std)
        scale = shift = None
        # a headless teacher takes no images
        if not teacher.headless and None not in statistics and statistics[:2] != statistics[2:]:
            s_mean, s_std, t_mean, t_std = (torch.tensor(v) for v in statistics)
            device = next(teacher.parameters()).device
            scale, shift = (v[:, None, None].to(device) for v in (s_std / t_std, (s_mean - t_mean) / t_std))
        self.register_buffer("teacher_scale", scale, persistent=False)
        self.register_buffer("teacher_shift", shift, persistent=False)

    def _check_teacher_size(self, teacher: Teacher) -> None:
        """Runs one image through the teacher and compares its tokens with the grid that it says it has."""
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

    # -- compiling -----------------------------------------------------------------------------------------------

    def compile(self, **kwargs: Any) -> ScaleKD:  # type: ignore[override] # it takes torch.compile's by name alone
        """Compiles what is trained, with torch.compile: student, projectors and losses, a graph each.

        The teacher has `Teacher.compile`. Parameters, buffers and their names stay as they are, and so do copies and
        pickles. `student` by itself, as an evaluation calls it, is not compiled.

        Args:
            **kwargs: Arguments of torch.compile.

        Returns:
            The distiller itself.
        """
        self.tapped_student.compile(**kwargs)
        parts: dict[str, Callable[..., Any]] = {"project": self.project, "losses": self._losses}
        self._compiled = {name: torch.compile(call, **kwargs) for name, call in parts.items()}
        return self

    def __getstate__(self) -> dict[str, Any]:
        """For copies and pickles, which are not compiled, as those of a module that torch has compiled."""
        return super().__getstate__() | {"_compiled": {}}

    # -- parts and weights -----------------------------------------------------------------------------------------

    @property
    def tapped_student(self) -> Student:
        """Wraps `student` to return its feature maps beside its logits; kept outside the module tree."""
        return self._tapped_student[0]

    @property
    def teacher(self) -> Teacher | None:
        """The frozen teacher, kept outside the module tree; None for supervised training."""
        return self._teacher[0]

    def __setattr__(self, name: str, value: Any) -> None:
        # nn.Module does not ask properties: a module would become a submodule of this name, which nobody reads
        if name in ("teacher", "tapped_student"):
            raise AttributeError(
                f"a ScaleKD's {name} cannot be replaced, as its projectors fit it: build another ScaleKD."
            )
        super().__setattr__(name, value)

    def _required_teacher(self) -> Teacher:
        if self.teacher is None:
            raise ValueError("there is no teacher: ScaleKD was built with teacher=None.")
        return self.teacher

    def _apply(self, fn: Any, recurse: bool = True) -> ScaleKD:
        if self.teacher is not None:
            self.teacher._apply(fn, recurse)
        return super()._apply(fn, recurse)

    def weights(self) -> dict[str, float]:
        """The factor of each term of `forward`, by its name without `loss/`; terms with a factor of 0 are left out."""
        terms = {"ce": 1.0 - self.kd_weight, "kd": self.kd_weight}
        return {name: weight for name, weight in terms.items() if weight > 0.0} | self.feature_weights

    def pairing(self) -> str:
        """Student and teacher side by side, as a table in plain text."""
        return pairing_table(self.student, self.teacher, self._shapes, self.image_size, self.projectors, self.weights())

    # -- one step ------------------------------------------------------------------------------------------------

    def teacher_targets(self, images: torch.Tensor) -> TeacherTargets | TargetsWithoutTPP:
        """The teacher's targets for images (B, 3, H, W) in the student's normalisation and size.

        Raises:
            ValueError: There is no teacher, or it is headless.
            UserError: Without TPP, a teacher that does not give its tokens before the last stage.
        """
        teacher = self._required_teacher()
        if self.teacher_scale is not None and self.teacher_shift is not None:
            images = images * self.teacher_scale + self.teacher_shift
        size = teacher.preprocessing.size
        if size is not None and size != tuple(images.shape[-2:]):
            images = F.interpolate(images, size, mode="bicubic", antialias=True, align_corners=False)
        # called as a module, because a sharded teacher gathers its weights in the hooks of that call
        targets: TeacherTargets = teacher(images)
        if self.tpp or not any(name.endswith("s3") for name in self.feature_weights):
            return targets
        return TargetsWithoutTPP(*targets, before=teacher.before_last_stage(images))

    def project(self, student: StudentOutput) -> dict[str, dict[str, torch.Tensor]]:
        """Projects the student's maps onto the teacher's grid (CAP and TPP of the paper).

        Returns:
            Tokens (B, P, C) by stage, then by view. With TPP those of stage n-1 have passed through the teacher's last
            stage, and are the queries of the last stage's projectors.
        """
        projected: dict[str, dict[str, torch.Tensor]] = {}
        queries: dict[str, torch.Tensor] = {}
        if "s3" in self.projectors:
            pair: Any = self.projectors["s3"]
            tokens = pair(student.before)
            if self.tpp:
                # both views go through the frozen last stage as one batch
                tokens = self._required_teacher().last_stage(tokens.flatten(0, 1)).unflatten(0, tokens.shape[:2])
            projected["s3"] = dict(zip(pair.names, tokens.unbind(0), strict=True))
            queries = projected["s3"] if self.tpp else {}
        if "s4" in self.projectors:
            pair = self.projectors["s4"]
            if pair.names == tuple(queries):
                out = pair(student.last, tokens)
            elif not queries:
                out = pair(student.last)
            else:
                out = pair.one_by_one(student.last, [queries.get(name) for name in pair.names])
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
            targets: (B,) class indices or (B, K) probabilities; None for images without labels, which leaves out CE and
                keeps the weights of the other terms.
            teacher_targets: What `teacher_targets(images)` returns, where the caller has it already; a headless teacher
                cannot do without.

        Returns:
            `loss/ce`, `loss/kd`, `loss/spatial_s3`, `loss/frequency_s3`, `loss/spatial_s4`, `loss/frequency_s4` (those
            with a weight) and `loss/total`; scalars. `weights()` has the factors.

        Raises:
            UserError: There are no labels, and every term needs them.
            ValueError: The teacher is headless, and there are no teacher_targets.
        """
        if targets is None and not (self.kd_weight > 0.0 or self.projectors):
            raise UserError(
                "targets is None and no term does without labels: give a teacher, and leave features on or kd_weight "
                "above 0."
            )
        with self.time_part("student"):
            student = self.tapped_student(images)
        teacher: TeacherTargets | TargetsWithoutTPP | None = None
        projected: dict[str, dict[str, torch.Tensor]] = {}
        if self.teacher is not None and (self.kd_weight > 0.0 or self.projectors):
            teacher = self.teacher_targets(images) if teacher_targets is None else teacher_targets
            if self.projectors:
                with self.time_part("projectors"):
                    projected = self._compiled.get("project", self.project)(student)
        with self.time_part("losses"):
            losses = self._compiled.get("losses", self._losses)(student.logits, targets, teacher, projected)
        if self.on_logits is not None and teacher is not None and teacher.logits is not None:
            self.on_logits(student.logits, teacher.logits)
        return losses

    if TYPE_CHECKING:
        # nn.Module's own would return Any
        __call__ = forward

    def _losses(
        self,
        logits: torch.Tensor,
        targets: torch.Tensor | None,
        teacher: TeacherTargets | TargetsWithoutTPP | None,
        projected: dict[str, dict[str, torch.Tensor]],
    ) -> dict[str, torch.Tensor]:
        """What `forward` returns, of the student's logits (B, K) and of what `project` returned."""
        losses: dict[str, torch.Tensor] = {}
        # a weight of 0 leaves the term out: 0 times an infinite loss would be NaN
        if targets is not None and self.kd_weight < 1.0:
            ce = label_loss(logits, targets, self.loss, self.label_smoothing)
            losses["loss/ce"] = (1.0 - self.kd_weight) * ce
        if teacher is not None and self.kd_weight > 0.0:
            if teacher.logits is None:
                raise ValueError("teacher_targets has no logits, which logit KD needs: give them, or set kd_weight 0.")
            losses["loss/kd"] = logit_kd(logits, teacher.logits, self.temperature, self.kd_weight)
        if projected and teacher is not None:
            losses |= self._feature_losses(projected, teacher)
        losses["loss/total"] = torch.stack(list(losses.values())).sum()
        return losses

    def _feature_losses(
        self, projected: dict[str, dict[str, torch.Tensor]], teacher: TeacherTargets | TargetsWithoutTPP
    ) -> dict[str, torch.Tensor]:
        """The weighted losses of every projected view (ScaleKD section 3.2), by name."""
        stages: list[tuple[torch.Tensor, torch.Tensor]] = []
        weights: list[tuple[float, float]] = []
        for stage, views in projected.items():
            # a view that is switched off has no tokens: the other view's take its place, with weight 0
            placeholder = next(iter(views.values())).detach()
            spatial, frequency = (views.get(view, placeholder) for view in VIEWS)
            stages.append((spatial, frequency))
            w_spatial, w_frequency = (self.feature_weights.get(f"{view}_{stage}", 0.0) for view in VIEWS)
            weights.append((w_spatial, w_frequency))
        values: list[tuple[torch.Tensor, torch.Tensor]] = []
        before, after = self._required_teacher().stages
        if not self.tpp and "s3" in projected:
            if not isinstance(teacher, TargetsWithoutTPP):
                raise ValueError("teacher_targets has no tokens before the last stage, which tpp=False compares.")
            values = dual_view_losses([stages.pop(0)], teacher.before, before.grid, [weights.pop(0)], self.cut)
        if stages:
            values += dual_view_losses(stages, teacher.tokens, after.grid, weights, self.cut)
        return {
            f"loss/{view}_{stage}": value
            for (stage, views), pair in zip(projected.items(), values, strict=True)
            for view, value in zip(VIEWS, pair, strict=True)
            if view in views
        }
