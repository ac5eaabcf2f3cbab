"""Every published setting: at true size without storage, for a real step when shrunk, and against the golden flows."""

import json
import re
import subprocess
import sys
from dataclasses import replace

import pytest
import torch
from golden_files import golden, relative_error
from golden_map import flow_state
from golden_models import TERMS, eva, resnet18_base8, swin
from launching import ROOT, alone
from zoo import SHALLOW, STUDENTS, SWIN

from scalekd_ds.build import build_distiller
from scalekd_ds.config.parser import config_from_dict
from scalekd_ds.data.mix import Mixer
from scalekd_ds.optim.optimizers import build_optimizer, param_groups
from scalekd_ds.recipes import RECIPES
from scalekd_ds.recipes.command_line import parse_run
from scalekd_ds.recipes.count import SIZES, count
from scalekd_ds.recipes.imagenet import PAIRS, published_baseline

# recipe -> millions of parameters: the student's in the paper, and the projectors' as the official code builds them
PUBLISHED = {
    "swin_l-resnet50-traditional": (25.56, 175.96),
    "swin_l-mobilenetv1-traditional": (4.23, 97.0),
    "swin_l-mobilenetv1-advanced": (4.23, 97.0),
    "swin_l-resnet50-advanced": (25.58, 175.96),
    "swin_l-convnext_t-advanced": (28.59, 84.64),
    "swin_l-mixer_s16-advanced": (18.53, 79.8),
    "swin_l-mixer_b16-advanced": (59.88, 94.16),
    "swin_l-vit_s16-advanced": (22.05, 74.39),
    "swin_l-swin_t-advanced": (28.29, 84.64),
    "swin_l-vit_b16-advanced": (86.57, 94.16),
    "eva_l-resnet50-advanced": (25.58, 154.29),
    "eva_l-mixer_b14-advanced": (60.30, 75.03),
    "eva_l-vit_b14-advanced": (86.48, 75.03),
    "eva_l-eva02_s14_336-advanced": (22.13, 56.71),
}
# what makes a recipe's models small, by the first letters of their names
SMALL = {
    "swin_": SWIN | {"window_size": 4},
    "eva02_": SHALLOW | {"patch_size": 14},
    "eva_": SHALLOW,
    "resnet50d": {"layers": (1, 1, 1, 1), "channels": (8, 8, 16, 16), "stem_width": 8},
    "resnet50": {"layers": (1, 1, 1, 1), "channels": (8, 8, 16, 16)},
    "mobilenetv1": {},
    "convnext": STUDENTS["convnext_tiny"],
    "mixer": {"num_blocks": 4, "embed_dim": 48},
    "deit": SHALLOW,
}


def small(name: str) -> dict:
    return next(kwargs for start, kwargs in SMALL.items() if name.startswith(start))


def test_all_published_settings_are_there():
    assert len(PAIRS) == 17
    assert sum(name.endswith("-traditional") for name in PAIRS) == 4
    paper = [name for name in PAIRS if PAIRS[name].table3]
    assert (
        sum(name.startswith("swin_l") for name in paper) == 8 and sum(name.startswith("eva_l") for name in paper) == 3
    )


# every second one: some seconds each. A shrunk one of each takes a step below
@pytest.mark.parametrize("name", [pytest.param(n, marks=pytest.mark.slow) if i % 2 else n for i, n in enumerate(PAIRS)])
def test_parameters_at_true_size_are_the_published_ones(name):
    cfg = replace(RECIPES[name](), teacher_weights="none")
    with torch.device("meta"):
        distiller = build_distiller(cfg, 1000, verbose=False)
    millions = [sum(p.numel() for p in m.parameters()) / 1e6 for m in (distiller.student, distiller.projectors)]
    if name in PUBLISHED:
        assert millions == pytest.approx(PUBLISHED[name], abs=0.02)
    student, teacher = json.loads(SIZES.read_text())[name].values()
    assert student[0] == pytest.approx(millions[0], abs=0.01)
    assert teacher[0] == pytest.approx(
        {"swin_s": 49.61, "swin_b": 87.77, "swin_l": 196.53}.get(name[:6], 304.2), abs=0.4
    )


@pytest.mark.parametrize("name", PAIRS)
def test_a_shrunk_recipe_takes_a_real_step(name):
    cfg = RECIPES[name]()
    side = 70 if "eva_l" in name else 64
    kwargs = cfg.student_kwargs | small(cfg.student)
    if cfg.student.startswith(("mixer", "deit")) and "14" not in name:
        kwargs["patch_size"] = 16
    cfg = replace(
        cfg,
        # timm's own presets of Mixer fix their widths
        student="mixer_b14_224" if cfg.student.startswith("mixer") else cfg.student,
        student_kwargs=kwargs,
        teacher_kwargs=cfg.teacher_kwargs | small(cfg.teacher),
        teacher_weights="none",
        teacher_image_size=side,
        global_batch_size=4,
        micro_batch_size=4,
        data=replace(cfg.data, image_size=side),
        distill=replace(cfg.distill, heads_s3=3, heads_s4=3),
    )
    # a classifier of 10 for both
    cfg = replace(cfg, teacher_kwargs=cfg.teacher_kwargs | {"num_classes": 10})
    distiller = build_distiller(cfg, 10, verbose=False).train()
    optimizer = build_optimizer(distiller, replace(cfg.optim, lr=cfg.learning_rate))
    images = torch.randn(4, 3, side, side, generator=torch.Generator().manual_seed(0))
    labels = torch.tensor([0, 3, 3, 7])
    if cfg.mixes:
        images, labels = Mixer(cfg.data, 10, 4, 0, 0)(images, labels, 0, 0)
        assert labels.shape == (4, 10)
    before = [p.detach().clone() for p in distiller.parameters()]
    losses = distiller(images, labels)
    losses["loss/total"].backward()
    assert all(torch.isfinite(v) for v in losses.values())
    assert all(p.grad is not None and torch.isfinite(p.grad).all() for p in distiller.projectors.parameters())
    assert not any(p.requires_grad or p.grad is not None for p in distiller.teacher.parameters())
    optimizer.step()
    assert sum(not torch.equal(a, b) for a, b in zip(before, distiller.parameters(), strict=True)) > len(before) // 2


@pytest.mark.parametrize("name", RECIPES)
def test_a_dumped_recipe_is_the_same_run(name):
    cfg = RECIPES[name]()
    assert config_from_dict(json.loads(json.dumps(cfg.as_dict())), "test") == cfg
    assert parse_run(["--recipe", name])[0] == cfg


def test_the_rate_scales_with_the_batch_unless_published_switches_say_otherwise():
    cfg = RECIPES["swin_l-vit_b16-advanced"]()
    assert (cfg.global_batch_size, cfg.learning_rate) == (512, 5e-4)
    assert replace(cfg, global_batch_size=2048).learning_rate == 2e-3
    published, _ = parse_run(["--recipe", "swin_l-vit_b16-advanced", "--as_published.unscaled_lr", "true"])
    assert published.learning_rate == 1e-3
    mixed = RECIPES["eva_l-vit_b14-advanced"]()
    assert mixed.mixes and not replace(mixed, as_published=replace(mixed.as_published, no_mixing=True)).mixes


def test_the_teachers_stochastic_depth_runs_only_where_it_is_asked_for():
    cfg = RECIPES["swin_s-resnet50-traditional"]()
    cfg = replace(
        cfg,
        student_kwargs=small("resnet50"),
        teacher_kwargs={"drop_path_rate": 0.9, "num_classes": 10, **small("swin_")},
        teacher_weights="none",
        teacher_image_size=64,
        data=replace(cfg.data, image_size=64),
    )
    images = torch.randn(8, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    for train_mode in (False, True):
        switched = replace(cfg, as_published=replace(cfg.as_published, teacher_in_train_mode=train_mode))
        distiller = build_distiller(switched, 10, verbose=False).train()
        first, second = (distiller.teacher_targets(images).tokens for _ in range(2))
        assert torch.allclose(first, second, rtol=1e-4, atol=1e-5) != train_mode


def test_weight_decay_groups_are_the_published_ones():
    cfg = replace(RECIPES["swin_l-mixer_s16-advanced"](), teacher_weights="none")
    with torch.device("meta"):
        mixer = build_distiller(cfg, 1000, verbose=False)
    names = {id(p): n for n, p in mixer.named_parameters()}
    free = [names[id(p)] for g in param_groups(mixer, cfg.optim) if g["weight_decay"] == 0.0 for p in g["params"]]
    assert free and all(n.endswith("pos_embed") for n in free)
    cnn = RECIPES["swin_l-resnet50-advanced"]().optim
    assert all(g["weight_decay"] == 0.02 for g in param_groups(mixer, cnn))


@pytest.mark.parametrize("name", ["swin_l-resnet50-traditional", "swin_l-vit_s16-advanced", "eva_l-mixer_b14-advanced"])
def test_listed_sizes_are_counted(name):
    assert json.loads(SIZES.read_text())[name] == count(RECIPES[name]())


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("swin_b-resnet50-traditional", ["stops in its first step", "stochastic depth 0.5"]),
        ("swin_s-resnet50-advanced", ["Swin-L's weights", "stochastic depth 0.3", "(here 0.4)"]),
        ("swin_l-swin_t-advanced", ["stops in its first step", "on 512 (here 0.0005)"]),
        ("eva_l-resnet50-advanced", ["stops in its first step", "in22k_ft_in1k", "normalisation"]),
        ("eva_l-mixer_b14-advanced", ["stops in its first step", "never mixes", "on 768 (here 0.00035)"]),
        ("eva_l-vit_b14-advanced", ["alpha_jfd", "mixup 0.8 and cutmix 1"]),
        ("eva_l-eva02_s14_336-advanced", ["stops in its first step", "on 512 (here 0.0005)"]),
    ],
)
def test_docstrings_name_what_the_published_file_does_otherwise(name, said):
    assert not [words for words in said if words not in RECIPES[name].__doc__]


def test_six_published_files_do_not_run_and_swins_stay_in_train_mode():
    docs = {name: RECIPES[name].__doc__ for name in PAIRS}
    assert sum("stops in its first step" in d or "does not build" in d for d in docs.values()) == 6
    assert all(("in train mode" in d) == name.startswith("swin_") for name, d in docs.items())


def test_the_listing_needs_no_torch():
    done = alone(ROOT / "launch" / "train.py", "--list-recipes")
    assert done.returncode == 0
    rows = {line.split()[0]: line for line in done.stdout.splitlines() if line.strip()}
    assert set(RECIPES) <= set(rows)
    assert re.search(
        r"196\.53 +34\.\d+ +resnet50d +25\.58 +4\.\d+ +224 +300 +2,048 +lamb 0\.005", rows["swin_l-resnet50-advanced"]
    )
    probe = "import sys; from scalekd_ds.recipes.command_line import parse_run; parse_run(['--list-recipes'])\n"
    probe += "sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", probe], capture_output=True, cwd=ROOT).returncode == 0


def test_a_recipes_own_terms_give_the_official_losses_and_gradients(monkeypatch):
    """The official step's losses and gradients, from a recipe's own terms, weights and scale."""
    monkeypatch.setattr("scalekd_ds.student.build_model", lambda *_, **__: resnet18_base8())
    inputs = golden("e1_flow_swin_resnet18_v2")
    for recipe, file, teacher, changed in (
        ("swin_l-resnet50-traditional", "e1_flow_swin_resnet18_v2", swin, {}),
        ("eva_l-mixer_b14-advanced", "f1_flow_beit_resnet18_nokd", eva, {"kd_weight": 0.0}),
    ):
        cfg = RECIPES[recipe]()
        distill = replace(cfg.distill, heads_s3=4, heads_s4=4, **changed)
        monkeypatch.setattr("scalekd_ds.teacher.build_model", lambda *_, build=teacher: build())
        cfg = replace(cfg, teacher_weights="none", distill=distill, student_kwargs={}, label_smoothing=0.0)
        distiller = build_distiller(cfg, 10, verbose=False)
        recorded = golden(file)
        official = inputs.below("state") | recorded.below("state")
        official = {k: v for k, v in official.items() if not k.startswith(("teacher.", "distill_losses."))} | {
            k: v for k, v in recorded.below("state").items() if k.startswith(("teacher.", "distill_losses."))
        }
        state = flow_state(official)
        mine = {k.removeprefix("teacher."): v for k, v in state.items() if k.startswith("teacher.")}
        distiller.teacher.model.load_state_dict(mine, strict=False)
        distiller.load_state_dict({k: v for k, v in state.items() if not k.startswith("teacher.")})
        # the official student and teacher saw the same pixels
        distiller.teacher_scale = distiller.teacher_shift = None
        images = inputs["input.images_f16"].float().requires_grad_()
        losses = distiller.train()(images, inputs["input.labels"])
        for ours, theirs in TERMS.items():
            if f"loss.{theirs}" in recorded.tensors:
                assert losses[ours].item() == pytest.approx(recorded[f"loss.{theirs}"].item(), rel=1e-5), (recipe, ours)
        losses["loss/total"].backward()
        assert images.grad.norm().item() == pytest.approx(recorded["out.grad_input_norm"].item(), rel=5e-4)
        assert relative_error(distiller.teacher_targets(images).tokens, recorded["out.fea_t_m1"].flatten(2).mT) < 2e-5


def test_the_papers_baseline_is_known_for_its_pairs_on_1000_classes():
    assert published_baseline("swin_l-resnet50-advanced", 1000) == 78.64
    assert published_baseline("swin_l-resnet50-advanced", 10) is None
    assert published_baseline("swin_l-resnet50-traditional", 1000) is None
    assert published_baseline("", 1000) is None
    assert "78.64 -> 82.03" in RECIPES["swin_l-resnet50-advanced"].__doc__.splitlines()[0]
