"""A teacher without its trunk: its last stage as part of a cache, which gives the whole teacher's numbers bit for bit."""

import copy
import ctypes
import json
import pickle
import platform
from dataclasses import asdict
from pathlib import Path

import pytest
import timm
import torch
from safetensors.torch import load, save
from timm.models.vision_transformer import VisionTransformer
from tiny_pair import batch, student
from zoo import CLASSES, TEACHERS, make_teacher

from scalekd_ds import ScaleKD, Teacher
from scalekd_ds.config import RunConfig, RunDirConfig
from scalekd_ds.engine.compilation import try_teacher
from scalekd_ds.engine.teacher_placement import place_teacher
from scalekd_ds.errors import UserError
from scalekd_ds.inspection.inspected_models import ModelSource, wrap_model
from scalekd_ds.models.window_attention import FrozenSwinBlock
from scalekd_ds.teacher_cache.headless import headless_teacher, teacher_parts
from scalekd_ds.training.planned_placement import planned_placement
from scalekd_ds.training.teacher_precision import lower_teacher
from scalekd_ds.watching.run_pictures import draw_run_pictures

SHALLOW = {"img_size": 64, "embed_dim": 48, "depth": 4, "num_heads": 3}
# kinds of position embeddings beside those of the zoo
MORE = {
    "rotary, learned": ("vit_small_patch16_rope_mixed_224", SHALLOW),
    "rotary, fixed": ("vit_small_patch16_rope_224", SHALLOW),
    "tables of each block": ("beit_base_patch16_224", SHALLOW),
    "a table of all blocks": (
        "beit_base_patch16_224",
        SHALLOW | {"use_rel_pos_bias": False, "use_shared_rel_pos_bias": True},
    ),
}
# whose blocks are those of another one
TWICE = {
    *("vit_base_patch16_224.augreg_in21k", "vit_base_patch16_clip_224", "vit_small_patch14_dinov2", "rotary, fixed"),
}
SWIN, VIT = "swin_tiny_patch4_window7_224", "deit3_small_patch16_224"


def filled(teacher: Teacher) -> Teacher:
    """With weights that initialisation leaves at zero, or so small that a block adds next to nothing."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in teacher.parameters():
            scale = parameter[0].numel() ** -0.5 if parameter.dim() > 1 else 0.3
            parameter.add_(scale * torch.randn(parameter.shape, generator=generator))
    # the constants of window attention follow a load
    teacher.model.load_state_dict(teacher.model.state_dict())
    return teacher


def round_trip(teacher: Teacher) -> Teacher:
    description, tensors = teacher_parts(teacher)
    return headless_teacher(json.loads(json.dumps(description)), load(save(tensors)))


def run_last_stage(teacher: Teacher, autocast: torch.dtype | None = None) -> tuple[torch.Tensor, torch.Tensor]:
    """Its output, and the gradient of its input."""
    before, _ = teacher.stages
    generator = torch.Generator().manual_seed(2)
    tokens = torch.randn(2, before.grid[0] * before.grid[1], before.dim, generator=generator, requires_grad=True)
    with torch.autocast("cpu", autocast, enabled=autocast is not None):
        out = teacher.last_stage(tokens)
    upstream = torch.randn(out.shape, generator=generator).to(out.dtype)
    return out.detach(), torch.autograd.grad(out, tokens, upstream)[0]


def same(ours, theirs):
    assert all(a.dtype == b.dtype and torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))


@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=pytest.mark.slow) if n in TWICE else n for n in (*TEACHERS, *MORE)]
)
def test_a_last_stage_alone_gives_the_whole_teachers_numbers(name):
    """Output and input gradient: in float32, with layers in bf16 under autocast, and wholly in bf16."""
    whole = filled(make_teacher(name) if name in TEACHERS else Teacher(MORE[name][0], weights="none", **MORE[name][1]))
    generators = torch.get_rng_state()
    ours = round_trip(whole)
    assert torch.equal(torch.get_rng_state(), generators)
    assert ours.headless and not whole.headless and not ours.training
    assert ours.stages == whole.stages and ours.preprocessing == whole.preprocessing
    assert ours.num_classes == whole.num_classes and type(ours.model) is type(whole.model)
    out, gradient = run_last_stage(whole)
    assert out.std() > 0.1 and gradient.std() > 0.01
    same(run_last_stage(ours), (out, gradient))
    # the trunk has no memory, and nothing is left on the meta device
    kept = dict(ours.model.named_parameters())
    assert 0 < len(kept) < len(dict(whole.model.named_parameters()))
    assert not any(t.is_meta for t in (*kept.values(), *ours.buffers()))
    assert ours.model.patch_embed.proj.weight is None if hasattr(ours.model, "patch_embed") else True
    for one in (copy.deepcopy(ours), pickle.loads(pickle.dumps(ours))):
        same(run_last_stage(one), (out, gradient))
    low = [copy.deepcopy(t).lower_precision(torch.bfloat16) for t in (ours, whole)]
    same(*(run_last_stage(t, torch.bfloat16) for t in low))
    held = [copy.deepcopy(t).hold_in(torch.bfloat16) for t in (ours, whole)]
    same(*(run_last_stage(t) for t in held))
    same(
        run_last_stage(ours.to("cpu", torch.float64).to(torch.float32)), run_last_stage(whole.to(torch.float64).float())
    )


def test_only_what_the_last_stage_reads_is_taken():
    description, tensors = teacher_parts(make_teacher(SWIN))
    assert all(name.startswith(("layers.3.", "norm.")) for name in tensors)
    assert description["tensors"] == {name: list(value.shape) for name, value in tensors.items()}
    ours = headless_teacher(description, tensors)
    # without a copy, as `headless_teacher` says
    assert all(p.data_ptr() == tensors[name].data_ptr() for name, p in ours.model.named_parameters())
    assert set(ours.state_dict()) == {f"model.{name}" for name in tensors}
    # the trunk's blocks keep timm's attention, whose constants would take memory
    assert [isinstance(m, FrozenSwinBlock) for n, m in ours.model.named_modules() if n.endswith("blocks.0")] == [
        False,
        False,
        False,
        True,
    ]


def pair(teacher: Teacher, **kwargs) -> ScaleKD:
    torch.manual_seed(3)
    return ScaleKD(student(), teacher, image_size=64, verbose=False, **kwargs)


@pytest.mark.parametrize("name", [SWIN, "convnext_tiny", "vit_small_patch16_dinov3"])
def test_a_step_with_the_targets_given_is_that_of_the_whole_teacher(name):
    images, labels = batch()
    teacher = filled(make_teacher(name))
    whole, ours = pair(teacher), pair(round_trip(teacher))
    targets = whole.teacher_targets(images)
    losses = [one(images, labels, targets) for one in (whole, ours)]
    assert len(losses[0]) == 7 and losses[0] == losses[1]
    for loss, one in zip(losses, (whole, ours), strict=True):
        loss["loss/total"].backward()
        assert all(p.grad is not None for p in one.parameters())
    assert all(torch.equal(a.grad, b.grad) for a, b in zip(whole.parameters(), ours.parameters(), strict=True))
    assert ours.teacher_scale is None
    assert {type(k) for k in ours.state_dict()} == {str} and set(ours.state_dict()) == set(whole.state_dict())


def test_what_needs_the_trunk_says_what_to_give():
    ours = round_trip(make_teacher(SWIN))
    distiller = pair(ours)
    images, labels = batch()
    for call in (ours, ours.targets, ours.before_last_stage, distiller.teacher_targets):
        with pytest.raises(ValueError, match=r"its last stage alone and takes no images: .* as teacher_targets"):
            call(images)
    with pytest.raises(ValueError, match="as teacher_targets"):
        distiller(images, labels)
    with pytest.raises(UserError, match=r"--distill.tpp false .* a teacher cache does not hold"):
        pair(ours, tpp=False)
    # without terms of stage n-1, nothing is compared there
    assert pair(ours, tpp=False, weights_s3=(0.0, 0.0)).projectors.keys() == {"s4"}
    with pytest.raises(UserError, match="the student 11"):
        ScaleKD(timm.create_model("resnet18", num_classes=11), ours, image_size=64, verbose=False)
    with pytest.raises(UserError, match="sees no images"):
        wrap_model(ours, "teacher", "mine", ModelSource(None, None, None), {})
    with pytest.raises(ValueError, match="takes a whole teacher"):
        teacher_parts(ours)
    assert (
        "SwinTransformer, its last stage alone" in distiller.pairing() and "from a teacher cache" in distiller.pairing()
    )


def test_logits_alone_need_no_weights():
    whole = Teacher("resnet18", weights="none", num_classes=CLASSES, features=False, input_size=64)
    description, tensors = teacher_parts(whole)
    assert tensors == {}
    ours = headless_teacher(json.loads(json.dumps(description)), {})
    assert not list(ours.parameters()) and ours.num_classes == CLASSES and ours.preprocessing == whole.preprocessing
    images, labels = batch()
    distillers = [pair(t, features=False) for t in (whole, ours)]
    targets = distillers[0].teacher_targets(images)
    losses = [one(images, labels, targets) for one in distillers]
    assert losses[0].keys() == {"loss/ce", "loss/kd", "loss/total"} and losses[0] == losses[1]
    assert "ResNet, its logits alone" in distillers[1].pairing()
    with pytest.raises(ValueError, match="features=False"):
        ours.last_stage(torch.zeros(1, 4, 8))
    for placement in ("replica", "sharded"):
        place_teacher(ours, placement, torch.device("cpu"))
    ours.lower_precision(torch.bfloat16).compile()
    assert try_teacher(distillers[1], 2) is None and copy.deepcopy(ours).hold_in(torch.bfloat16).headless


def test_the_last_stage_alone_is_compiled():
    ours = round_trip(filled(make_teacher(VIT)))
    expected = run_last_stage(ours)
    compiled = []
    ours.compile(backend=lambda module, _: compiled.append(module) or module.forward)
    distiller = pair(ours)
    assert try_teacher(distiller, 2) is None and compiled
    same(run_last_stage(ours), expected)


def test_its_classes_were_matched_when_it_was_cached():
    whole = make_teacher(SWIN)
    names = [f"class {i}" for i in range(CLASSES)]
    assert round_trip(whole).match(names) is None
    whole.same_classes = False
    with pytest.raises(UserError, match="not those of the training images"):
        round_trip(whole).match(names)


def test_models_from_everywhere(tmp_path):
    """A card and a folder of a hub; their arguments and sizes come along."""
    model = timm.create_model(SWIN, num_classes=5, **TEACHERS[SWIN])
    timm.models.save_for_hf(
        model, tmp_path / "hub", model_args=TEACHERS[SWIN] | {"num_classes": 5}, safe_serialization=True
    )
    (tmp_path / "own.safetensors").write_bytes((tmp_path / "hub" / "model.safetensors").read_bytes())
    card = {"architecture": SWIN, "model_kwargs": TEACHERS[SWIN], "num_classes": 5, "image_size": 64}
    card |= {"mean": [0.1, 0.2, 0.3], "std": [0.4, 0.5, 0.6], "interpolation": "bicubic"}
    (tmp_path / "own.json").write_text(json.dumps(card))
    card_teacher = Teacher(str(tmp_path / "own.safetensors"), image_size=96)
    for whole in (card_teacher, Teacher(f"local-dir:{tmp_path / 'hub'}", image_size=64)):
        ours = round_trip(whole)
        assert ours.preprocessing == whole.preprocessing and ours.num_classes == 5
        assert ours.preprocessing.size == (64, 64)
        same(run_last_stage(ours), run_last_stage(Teacher(model)))
    assert round_trip(card_teacher).preprocessing.mean == (0.1, 0.2, 0.3)


def test_a_module_that_timm_has_built():
    """It knows its architecture; releases of timm before 1.0.27 do not let it know its arguments, but for its size."""
    model = timm.create_model("vit_tiny_patch16_224", num_classes=5, img_size=(64, 96))
    model._model_args = {}
    same(run_last_stage(round_trip(Teacher(model))), run_last_stage(Teacher(model)))
    other = timm.create_model(SWIN, **TEACHERS[SWIN])
    if getattr(other, "_model_args", None):
        same(run_last_stage(round_trip(Teacher(other))), run_last_stage(Teacher(other)))
    other._model_args = {}
    with pytest.raises(UserError, match=r"cannot be cached.* is another model with the arguments that are known"):
        teacher_parts(Teacher(other))


class Doubled(torch.nn.Identity):
    def forward(self, x):
        return 2 * x


def test_a_model_that_cannot_be_described_says_why():
    with pytest.raises(UserError, match=r"cannot be cached.*which of timm's architectures"):
        teacher_parts(Teacher(VisionTransformer(**SHALLOW)))
    with pytest.raises(UserError, match=r"cannot be cached.*JSON does not hold all"):
        teacher_parts(Teacher("vit_small_patch16_224", weights="none", **SHALLOW, norm_layer=torch.nn.LayerNorm))
    changed = make_teacher(VIT)
    changed.model.blocks[-1].drop_path2 = Doubled()
    with pytest.raises(UserError, match="gives other numbers"):
        teacher_parts(changed)
    reads_the_trunk = make_teacher(VIT)
    reads_the_trunk.model.blocks[-1].attn = reads_the_trunk.model.blocks[0].attn
    with pytest.raises(UserError, match="cannot be cached"):
        teacher_parts(reads_the_trunk)
    with pytest.raises(ValueError, match="before it is placed, lowered or compiled"):
        teacher_parts(make_teacher(VIT).lower_precision(torch.bfloat16))


def test_damaged_parts_are_named():
    description, tensors = teacher_parts(make_teacher(VIT))
    name = "blocks.3.mlp.fc1.weight"
    with pytest.raises(UserError, match=f"lack {name}"):
        headless_teacher(description, {k: v for k, v in tensors.items() if k != name})
    with pytest.raises(UserError, match=rf"{name} has shape \(3, 3\)"):
        headless_teacher(description, tensors | {name: torch.zeros(3, 3)})
    with pytest.raises(UserError, match=r"the model that timm .* has none of that name"):
        headless_teacher(description | {"tensors": {"other": [1]}}, {"other": torch.zeros(1)})
    with pytest.raises(UserError, match=r"timm .* cannot build the cached teacher, no_such_model"):
        headless_teacher(description | {"architecture": "no_such_model"}, tensors)
    with pytest.raises(UserError, match=r"'num_classes'.*make the cache anew"):
        headless_teacher({k: v for k, v in description.items() if k != "num_classes"}, tensors)
    with pytest.raises(UserError, match=r"heads.*make the cache anew"):
        headless_teacher(description | {"after": description["after"] | {"heads": 5}}, tensors)


def most_bytes_until(call):
    """The most memory that the process holds while `call` runs, beyond what it holds before."""

    def held(key):
        return next(int(v.split()[1]) for v in Path("/proc/self/status").read_text().splitlines() if v.startswith(key))

    # what earlier tests freed is still the process's own where a run has told malloc to keep it (engine.host_memory)
    if platform.libc_ver()[0] == "glibc":
        ctypes.CDLL(None).malloc_trim(0)
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError as error:
        pytest.skip(f"the kernel does not forget the most memory that was held: {error}")
    before = held("VmRSS")
    result = call()
    return result, (held("VmHWM") - before) * 1024


def test_a_trunk_is_never_allocated():
    """The last 3 of 40 blocks of a ViT of a billion parameters, whose trunk would be 3.7 GB."""
    arguments = {"patch_size": 14, "num_classes": 0}
    description, tensors = teacher_parts(
        Teacher("vit_giant_patch14_224", weights="none", embed_dim=48, num_heads=3, **arguments)
    )
    with torch.device("meta"):
        whole = Teacher("vit_giant_patch14_224", weights="none", **arguments)
    total = sum(p.nbytes for p in whole.parameters())
    shapes = {name: list(p.shape) for name, p in whole.model.named_parameters() if name in tensors}
    before, after = map(asdict, whole.stages)
    description |= {"arguments": arguments, "tensors": shapes, "before": before, "after": after}
    # without memory of their own, so that all that is measured is the trunk's
    blank = {name: torch.zeros(1).expand(shape) for name, shape in shapes.items()}
    _, seen = most_bytes_until(lambda: torch.ones(2**25))
    assert seen > 2**26
    ours, peak = most_bytes_until(lambda: headless_teacher(json.loads(json.dumps(description)), blank))
    kept = sum(p.nbytes for p in ours.parameters())
    assert ours.stages == whole.stages and kept < total / 10
    assert total > 3.9e9 and peak < 0.02 * total


def test_what_a_run_does_with_a_whole_teacher_leaves_it_out():
    """The gate in front of a lower precision, the plan of its placement, and its maps among the pictures."""
    teacher = filled(make_teacher(SWIN))
    whole, ours = pair(teacher), pair(round_trip(teacher))
    images, _ = batch()
    drawn = [draw_run_pictures(one, one.student, images) for one in (whole, ours)]
    assert drawn[0].keys() == drawn[1].keys() == {"pictures/maps", "pictures/spectrum", "pictures/attention"}
    # the image and two maps, of which the teacher's is missing
    assert drawn[1]["pictures/maps"].shape[2] / drawn[0]["pictures/maps"].shape[2] == pytest.approx(2 / 3, abs=0.02)
    assert torch.equal(drawn[0]["pictures/attention"], drawn[1]["pictures/attention"])
    assert planned_placement(ours.teacher, RunConfig(), {}, CLASSES, torch.device("cuda")) == "replica"
    for precision in ("bf16", "fp8"):
        cfg = RunConfig(run=RunDirConfig(teacher_precision=precision))
        lowered = pair(round_trip(teacher))
        # no validation images are there to be read
        assert lower_teacher(lowered, cfg, val=None) == {}
        same(run_last_stage(lowered.teacher), run_last_stage(copy.deepcopy(teacher).hold_in(torch.bfloat16)))
