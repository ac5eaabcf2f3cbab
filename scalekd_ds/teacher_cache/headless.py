"""A teacher without its trunk: what of it a cache of its targets keeps, and the teacher that is built from that.

A run that reads the teacher's tokens and logits from a cache needs of the teacher what TPP's gradients pass through: its last
stage. `teacher_parts` takes it out of a whole teacher, as JSON data and tensors; `headless_teacher` builds it again, without
the memory of the trunk, the file of its weights, or a network.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Callable, Mapping
from dataclasses import asdict
from typing import Any

import timm
import torch
from torch import nn

from scalekd_ds.errors import UserError, cause_of
from scalekd_ds.models.blank_weights import build_without_weights
from scalekd_ds.models.build import architecture_and_kwargs, constructor_kwargs
from scalekd_ds.models.preprocessing import Preprocessing
from scalekd_ds.rng import rng_state, set_rng_state
from scalekd_ds.teacher import Teacher
from scalekd_ds.teacher_families import family_of

# of timm's `pretrained_cfg`: what shapes a model and its images; not where weights lie, nor the names of thousands of classes
_CFG = {
    *("architecture", "tag", "num_classes", "input_size", "test_input_size", "fixed_input_size", "pool_size"),
    *("mean", "std", "interpolation", "crop_pct", "test_crop_pct", "crop_mode", "first_conv", "classifier"),
}
_CACHE_ANEW = "make the cache anew with this release of scalekd_ds and timm"


class LogitsAlone(nn.Module):
    """Stands for the model of a teacher whose logits alone are distilled: it has no weights, and cannot run."""

    def __init__(self, num_classes: int) -> None:
        super().__init__()
        self.num_classes = num_classes
        self.pretrained_cfg: dict[str, Any] = {}


# -- taking it out of a whole teacher --------------------------------------------------------------------------------


def teacher_parts(teacher: Teacher) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    """The description of a teacher, and the tensors of its last stage.

    A teacher is built from them at once, and compared: what is returned is known to give the same numbers, bit for bit.

    Args:
        teacher: The whole teacher in float32 on the CPU, before it is placed, lowered or compiled.

    Returns:
        (description, tensors). The description is JSON data: `architecture` and `arguments` for `timm.create_model`, `config`,
        what timm calls `pretrained_cfg`; `features`, `train_mode`, `num_classes`, `same_classes`; `preprocessing`, the mean,
        std and size of its images; `class`, its Python class; `parameters`, their number in the whole teacher; `before` and
        `after`, the `Stage` around the last stage; and `tensors`, the shape of each tensor by its name. The tensors are the
        parameters and persistent buffers that the last stage reads, under the timm model's own names; they share its memory.

    Raises:
        UserError: The model cannot be described: timm does not build it from a name and arguments that JSON holds.
        ValueError: The teacher is not as above.
    """
    _check_whole(teacher)
    description: dict[str, Any] = {
        "class": type(teacher.model).__name__,
        "parameters": sum(p.numel() for p in teacher.model.parameters()),
        "features": teacher.family is not None,
        "train_mode": teacher.training,
        "num_classes": teacher.num_classes,
        "same_classes": teacher.same_classes,
        "preprocessing": asdict(teacher.preprocessing),
        "tensors": {},
    }
    if teacher.family is None:
        return _as_json(teacher, description), {}
    before, after = teacher.stages
    description |= {"before": asdict(before), "after": asdict(after)}
    description |= _recipe(teacher)
    tensors = last_stage_tensors(teacher)
    description["tensors"] = {name: list(value.shape) for name, value in tensors.items()}
    description = _as_json(teacher, description)
    _compare(teacher, description, tensors)
    return description, tensors


def _check_whole(teacher: Teacher) -> None:
    lowered = teacher.precision is not None or teacher.held_in is not None or teacher.is_compiled
    if teacher.headless or teacher.engine or lowered:
        raise ValueError("teacher_parts takes a whole teacher, before it is placed, lowered or compiled.")
    wrong = next((p for p in teacher.parameters() if p.device.type != "cpu" or p.dtype != torch.float32), None)
    if wrong is not None:
        raise ValueError(
            f"teacher_parts takes a teacher in float32 on the CPU; it has {wrong.dtype} on {wrong.device}."
        )


def _cannot(teacher: Teacher, why: str) -> UserError:
    return UserError(
        f"the teacher ({type(teacher.model).__name__}) cannot be cached, since its last stage could not be built again: {why}; "
        "give its timm name and constructor arguments, or a .safetensors with its card."
    )


def _as_json(teacher: Teacher, description: dict[str, Any]) -> dict[str, Any]:
    try:
        found: dict[str, Any] = json.loads(json.dumps(description, allow_nan=False))
    except (TypeError, ValueError) as error:
        arguments = description.get("arguments", {})
        raise _cannot(teacher, f"of its arguments {sorted(arguments)}, JSON does not hold all ({error})") from None
    return found


def _recipe(teacher: Teacher) -> dict[str, Any]:
    """What timm builds the model from: `architecture`, `arguments` and `config`."""
    model: Any = teacher.model
    config = dict(getattr(model, "pretrained_cfg", None) or {})
    if teacher.built_from is not None:
        name, given, image_size = teacher.built_from
        architecture, own = architecture_and_kwargs(name)
        if name.endswith(".safetensors"):
            # as `build_model` does: the card's arguments are given, and its size among them counts
            given = own | given
        arguments = constructor_kwargs(architecture if name.endswith(".safetensors") else name, given, image_size)
    else:
        architecture = str(config.get("architecture") or "")
        # releases of timm before 1.0.27 do not keep them
        arguments = dict(getattr(model, "_model_args", None) or {})
    if not timm.is_model(architecture):
        raise _cannot(teacher, "it does not say which of timm's architectures it is")
    size = getattr(getattr(model, "patch_embed", None), "img_size", None)
    arguments = constructor_kwargs(architecture.split(".", 1)[0], arguments, tuple(size) if size else None)
    return {
        "architecture": architecture.split(".", 1)[0],
        "arguments": {key: value for key, value in arguments.items() if value is not None}
        | {"num_classes": teacher.num_classes},
        "config": {key: value for key, value in config.items() if key in _CFG},
    }


def _modules_that_run(teacher: Teacher, run: Callable[[], torch.Tensor]) -> tuple[set[str], torch.Tensor]:
    """Names of the modules whose forward `run` calls, and what it returns."""
    ran: set[str] = set()

    def note(name: str) -> Callable[..., None]:
        return lambda *_: ran.add(name)

    # by name: the blocks of some teachers run as copies, which share the hooks
    named = [(name, module) for name, module in teacher.model.named_modules() if name]
    handles = [module.register_forward_hook(note(name)) for name, module in named]
    try:
        return ran, run()
    finally:
        for handle in handles:
            handle.remove()


def _leaves_of(out: torch.Tensor) -> set[int]:
    """Ids of the tensors that a gradient of `out` would reach, without computing it."""
    leaves, seen, left = set(), set(), [out.grad_fn]
    while left:
        node: Any = left.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        if (variable := getattr(node, "variable", None)) is not None:
            leaves.add(id(variable))
        left += [following for following, _ in node.next_functions]
    return leaves


def last_stage_tensors(teacher: Teacher) -> dict[str, torch.Tensor]:
    """The parameters and persistent buffers that a whole teacher's last stage reads, by their names in the timm model.

    They are those of modules that run in it, whose constants may be made from them beforehand, as Swin's position bias is; and
    those that its graph reaches, which some models keep elsewhere: position tables that blocks share, rotary frequencies.
    Buffers of a module without parameters, such as a rotary embedding's, are none of the trunk's, and kept.
    """
    before, _ = teacher.stages
    tokens = torch.zeros(1, before.grid[0] * before.grid[1], before.dim)
    model = teacher.model
    generators = rng_state()
    try:
        with torch.enable_grad():
            model.requires_grad_(True)
            ran, out = _modules_that_run(teacher, lambda: teacher.last_stage(tokens))
            reached = _leaves_of(out)
    finally:
        model.requires_grad_(False)
        # in train mode there is stochastic depth
        set_rng_state(generators)

    def runs(name: str) -> bool:
        words = name.split(".")
        return any(".".join(words[:n]) in ran for n in range(1, len(words)))

    found = {name: p.detach() for name, p in model.named_parameters() if runs(name) or id(p) in reached}
    saved = set(model.state_dict())
    bare = {name for name, module in model.named_modules() if name and not any(True for _ in module.parameters())}
    for name, buffer in model.named_buffers():
        if name in saved and (runs(name) or name.rpartition(".")[0] in bare):
            found[name] = buffer.detach()
    return {name: value.contiguous() for name, value in found.items()}


@torch.no_grad()
def _compare(teacher: Teacher, description: dict[str, Any], tensors: dict[str, torch.Tensor]) -> None:
    """Builds the headless teacher, and raises UserError where its last stage differs from the whole teacher's."""
    another = f"timm's {description['architecture']} is another model with the arguments that are known"
    try:
        twin = headless_teacher(description, tensors)
    except UserError as error:
        raise _cannot(teacher, another) from error
    if type(twin.model) is not type(teacher.model) or twin.stages != teacher.stages:
        raise _cannot(teacher, another)
    before, _ = teacher.stages
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randn(1, before.grid[0] * before.grid[1], before.dim, generator=generator)
    generators = rng_state()
    try:
        expected = teacher.last_stage(tokens)
        set_rng_state(generators)
        try:
            found = twin.last_stage(tokens)
        except (RuntimeError, AttributeError, TypeError, ValueError) as error:
            raise _cannot(teacher, f"it reads what is not a part of it ({cause_of(error)})") from None
    finally:
        set_rng_state(generators)
    if not torch.equal(expected, found):
        raise _cannot(teacher, f"timm's {description['architecture']} gives other numbers with the same weights")


# -- building it again ------------------------------------------------------------------------------------------------


def headless_teacher(description: Mapping[str, Any], tensors: Mapping[str, torch.Tensor]) -> Teacher:
    """The teacher that `teacher_parts` took apart, as its last stage alone; `Teacher.headless` says so.

    Nothing is read from a network or a file, and all random generators are left as they were. The trunk's parameters are None,
    and were never allocated. It is built on the default device, to which the tensors are moved.

    Args:
        description: From `teacher_parts`, also after a round trip through JSON.
        tensors: From `teacher_parts`; the teacher keeps them without a copy.

    Raises:
        UserError: A tensor is missing, has another shape, or is none of the model's; or timm cannot build the model.
    """
    saved = rng_state()
    try:
        try:
            teacher = _build(description, tensors)
        except (KeyError, TypeError, AttributeError) as error:
            raise UserError(
                f"the description of the cached teacher cannot be used ({cause_of(error)}): {_CACHE_ANEW}."
            ) from None
    finally:
        set_rng_state(saved)
    return teacher


def _with_tuples(values: Mapping[str, Any]) -> dict[str, Any]:
    """With the tuples that JSON has made lists of."""
    return {key: tuple(value) if isinstance(value, list) else value for key, value in values.items()}


def _build(description: Mapping[str, Any], tensors: Mapping[str, torch.Tensor]) -> Teacher:
    title, classes = str(description["class"]), int(description["num_classes"])
    preprocessing = Preprocessing(**_with_tuples(description["preprocessing"]))
    family, model = None, None
    if description["features"]:
        model = _model_of(description)
        # some families run the whole model once to know its grids
        family = family_of(copy.deepcopy(model).to("meta"))
        _give(model, description["tensors"], tensors)
    else:
        model = LogitsAlone(classes)
    size = preprocessing.size
    statistics = {"mean": preprocessing.mean, "std": preprocessing.std, "input_size": (3, *size) if size else None}
    model.pretrained_cfg = dict(model.pretrained_cfg) | {key: v for key, v in statistics.items() if v is not None}
    teacher = Teacher(model, features=False, train_mode=bool(description["train_mode"]))
    teacher.become_headless(title, family, preprocessing, classes, bool(description["same_classes"]))
    if family is not None:
        for key, stage in zip(("before", "after"), teacher.stages, strict=True):
            said = _with_tuples(description[key])
            if asdict(stage) != said:
                raise UserError(
                    f"the cached teacher has {said} {key} its last stage by its description, and {asdict(stage)} as timm "
                    f"{timm.__version__} builds it: {_CACHE_ANEW}."
                )
    return teacher


def _model_of(description: Mapping[str, Any]) -> Any:
    """timm's model, in eval mode, with the weights of its linear layers and convolutions on the meta device."""
    architecture, arguments = str(description["architecture"]), dict(description["arguments"])
    config = _with_tuples(description["config"])
    try:
        model: Any = build_without_weights(
            lambda: timm.create_model(architecture, pretrained=False, pretrained_cfg=config, **arguments)
        )
    # whatever timm raises of a name and of arguments that another release of it took
    except Exception as error:
        raise UserError(
            f"timm {timm.__version__} cannot build the cached teacher, {architecture} with {arguments}: {cause_of(error)}: "
            f"{_CACHE_ANEW}."
        ) from None
    model.eval().requires_grad_(False)
    model.pretrained_cfg = config
    return model


def _give(model: nn.Module, shapes: Mapping[str, Any], tensors: Mapping[str, torch.Tensor]) -> None:
    """Gives a model the tensors of its last stage, and takes all other parameters away."""
    for name, shape in shapes.items():
        if name not in tensors:
            raise UserError(f"the cached teacher's weights lack {name}: its file is damaged, or of another cache.")
        if list(tensors[name].shape) != list(shape):
            raise UserError(
                f"the cached teacher's {name} has shape {tuple(tensors[name].shape)} and should have {tuple(shape)}: its file "
                "is damaged, or of another cache."
            )
    device = torch.get_default_device()
    parameters = dict(model.named_parameters())
    own = parameters | dict(model.named_buffers())
    for name, shape in shapes.items():
        if name not in own or list(own[name].shape) != list(shape):
            found = f"has it as {tuple(own[name].shape)}" if name in own else "has none of that name"
            raise UserError(
                f"the cached teacher's {name} has shape {tuple(shape)}, and the model that timm {timm.__version__} builds "
                f"{found}: {_CACHE_ANEW}."
            )
    for name in own:
        path, _, leaf = name.rpartition(".")
        module = model.get_submodule(path)
        if name in shapes and name in parameters:
            module._parameters[leaf] = nn.Parameter(tensors[name].to(device), requires_grad=False)
        elif name in shapes:
            module._buffers[leaf] = tensors[name].to(device)
        elif name in parameters:
            # a None is a parameter that a module can do without, which copies, casts and state-dicts pass over
            module._parameters[leaf] = None
