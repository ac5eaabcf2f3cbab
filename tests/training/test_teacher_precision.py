"""A teacher that computes in bf16 or in 8-bit floats: what it changes is measured on images, and refused beyond a bound."""

import copy
import json
import sys

import pytest
import timm
import tiny_run
import torch
from forking import forked, forked_ranks
from torch import nn

from scalekd_ds.config import RunDirConfig
from scalekd_ds.errors import UserError
from scalekd_ds.models.float8 import check_float8, to_float8
from scalekd_ds.teacher import Teacher
from scalekd_ds.training.teacher_precision import check_gate, evenly_spaced, trunk_layers

SWIN = {"patch_size": 4, "window_size": 4, "embed_dim": 32, "depths": (1, 1, 2), "num_heads": (1, 2, 4)}
# one of each family, and of each kind of position embedding
TEACHERS = {
    "swin_tiny_patch4_window7_224": {"img_size": 64, **SWIN},
    "swinv2_tiny_window8_256": {"img_size": 64, **SWIN},
    "deit3_small_patch16_224": {"img_size": 64, "depth": 3, "embed_dim": 64, "num_heads": 2},
    "beit_base_patch16_224": {"img_size": 64, "depth": 3, "embed_dim": 64, "num_heads": 2},
    "eva02_tiny_patch14_336": {"img_size": 56, "depth": 3, "embed_dim": 64, "num_heads": 2},
    "vit_small_patch16_dinov3": {"img_size": 64, "depth": 3, "embed_dim": 64, "num_heads": 2, "num_classes": 5},
    "convnext_tiny": {"dims": (16, 32, 48, 64), "depths": (1, 1, 1, 1)},
    "pvt_v2_b0": {"depths": (1, 1, 1, 1)},
}


def make(name: str) -> Teacher:
    torch.manual_seed(0)
    # randomly initialised weights are so small that a block adds next to nothing to its input
    model = timm.create_model(name, num_classes=5, **{k: v for k, v in TEACHERS[name].items() if k != "num_classes"})
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                nn.init.normal_(parameter, std=parameter[0].numel() ** -0.5)
    return Teacher(model, input_size=64 if name in ("convnext_tiny", "pvt_v2_b0") else None)


def answers(teacher: Teacher, autocast: torch.dtype | None = None) -> tuple[torch.Tensor, ...]:
    """Tokens, logits, the last stage's tokens and the gradient of its input, forward under `autocast`."""
    generator = torch.Generator().manual_seed(1)
    images = torch.randn(2, 3, *teacher.preprocessing.size, generator=generator)
    (h, w), dim = teacher.last_input.grid, teacher.last_input.dim
    tokens = torch.randn(2, h * w, dim, generator=generator, requires_grad=True)
    with torch.autocast("cpu", autocast, enabled=autocast is not None):
        targets, out = teacher.targets(images), teacher.last_stage(tokens)
    (gradient,) = torch.autograd.grad(out.float().sum(1).square().sum(), tokens)
    return targets.tokens, targets.logits, out, gradient


def gap(ours: torch.Tensor, theirs: torch.Tensor) -> float:
    return float((1.0 - torch.cosine_similarity(ours.float(), theirs.float(), dim=-1)).mean())


@pytest.mark.parametrize("name", TEACHERS)
def test_a_teacher_held_in_bf16_computes_in_it_alone(name):
    teacher = make(name)
    expected = answers(teacher)
    ours = copy.deepcopy(teacher).hold_in(torch.bfloat16)
    found = answers(ours, torch.float16)
    assert {x.dtype for x in found[:3]} == {torch.bfloat16}
    # the gradient of tokens is in their own type
    assert found[3].dtype == torch.float32
    for mine, theirs in zip(found, expected, strict=True):
        assert gap(mine, theirs) < 5e-3
    rotary = [m for m in ours.modules() if type(m).__name__.startswith("Rotary")]
    assert {b.dtype for m in rotary for b in m.buffers() if b.is_floating_point()} <= {torch.float32}
    assert {p.dtype for p in ours.parameters()} == {torch.bfloat16}


@pytest.mark.parametrize("name", ["swin_tiny_patch4_window7_224", "deit3_small_patch16_224"])
def test_a_teacher_held_in_float32_ignores_autocast(name):
    teacher = make(name)
    expected = answers(teacher)
    found = answers(teacher.hold_in(torch.float32), torch.bfloat16)
    for ours, theirs in zip(found, expected, strict=True):
        assert ours.dtype == torch.float32
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", TEACHERS)
def test_the_trunk_is_what_runs_before_the_last_stage(name):
    teacher = make(name)
    names = {module: name for name, module in teacher.model.named_modules()}
    trunk = {names[layer] for layer in trunk_layers(teacher)}
    last = {"swin": "layers.2.", "conv": "stages.3.", "pvt_": "stages.3."}.get(name[:4], "blocks.2.")
    blocks = last.split(".")[0]
    linears = {name for name, module in teacher.model.named_modules() if isinstance(module, nn.Linear)}
    linears = {name for name in linears if "cpb_mlp" not in name}
    assert trunk == {name for name in linears if name.startswith(f"{blocks}.") and not name.startswith(last)}
    assert trunk


def test_a_teacher_of_logits_alone_has_its_classifier_outside_the_trunk():
    teacher = Teacher(make("deit3_small_patch16_224").model, features=False)
    names = {module: name for name, module in teacher.model.named_modules()}
    assert {names[layer].split(".")[0] for layer in trunk_layers(teacher)} == {"blocks"}


def test_a_teacher_without_layers_for_8_bit_floats_is_named():
    with pytest.raises(UserError, match=r"the teacher \(ConvNeXt\) has no linear layer before its last stage"):
        trunk_layers(
            Teacher("convnext_atto", weights="none", input_size=64, depths=(1, 1, 1, 1), dims=(16, 32, 48, 64))
        )


def test_float8_rounds_each_row_and_each_token():
    pytest.importorskip("torchao", reason="torchao is not installed (the extra fp8)")
    torch.manual_seed(0)
    layer, odd = nn.Linear(64, 32, dtype=torch.bfloat16), nn.Linear(24, 32, dtype=torch.bfloat16)
    with torch.no_grad():
        # outliers, which a single scale would round all else to zero for
        layer.weight[3] *= 1e7
        tokens = torch.randn(5, 64, dtype=torch.bfloat16)
        tokens[2] *= 1e7
        exact = tokens.double() @ layer.weight.double().T + layer.bias.double()
        size = tokens.double().norm(dim=-1)[:, None] * layer.weight.double().norm(dim=-1)
        assert to_float8([layer, odd]) == 1
        error = (layer(tokens).double() - exact).abs() / size
    assert odd.weight.dtype == torch.bfloat16 and type(odd.weight.data) is torch.Tensor
    # half a step of three bits of mantissa is a sixteenth at most, of each factor, in random directions
    assert (error < 0.04).all() and (error.amax(0) > 1e-3).all() and (error.amax(1) > 1e-3).all()


# -- the gate ----------------------------------------------------------------------------------------------------------

MEASURED = {
    "teacher/gate_images": 256.0,
    "teacher/gate_spatial": 9e-4,
    "teacher/gate_frequency": 3e-3,
    "teacher/gate_kl": 9e-3,
}


@pytest.mark.parametrize(
    ("changed", "flags"),
    [
        ({}, None),
        ({"spatial": 2e-3}, "--run.teacher_gate_spatial"),
        ({"frequency": 5e-3, "kl": float("nan")}, "--run.teacher_gate_frequency --run.teacher_gate_kl"),
    ],
)
def test_the_gate_refuses_what_is_above_a_bound(changed, flags):
    scalars = MEASURED | {f"teacher/gate_{name}": value for name, value in changed.items()}
    cfg = RunDirConfig(teacher_precision="fp8")
    if flags is None:
        check_gate(scalars, cfg)
        return
    with pytest.raises(UserError) as error:
        check_gate(scalars, cfg)
    assert "on 256 validation images by too much: 1 - cosine (spatial) 0.00" in str(error.value)
    assert str(error.value).endswith(f"take --run.teacher_precision bf16 or autocast, or allow more with {flags}.")


@pytest.mark.parametrize("total", [1, 11, 256, 257, 300, 511, 513, 50_000])
def test_the_gates_images_are_of_all_classes(total):
    places = evenly_spaced(total, 256).tolist()
    assert len(places) == len(set(places)) == min(total, 256)
    gaps = [after - before for before, after in zip(places, [*places[1:], total], strict=True)]
    assert places[0] == 0 and max(gaps) - min(gaps) <= 1


def test_a_gpu_without_8_bit_floats_and_a_missing_torchao_are_named(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 0))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA A100")
    with pytest.raises(UserError, match=r"NVIDIA A100 has no 8-bit floats.*take --run.teacher_precision bf16"):
        check_float8(torch.device("cuda"))
    monkeypatch.setitem(sys.modules, "torchao", None)
    with pytest.raises(UserError, match=r"pip install 'scalekd_ds\[fp8\]'"):
        check_float8(torch.device("cpu"))


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return tiny_run.images(tmp_path_factory.mktemp("images"))


# sides that 8-bit products take
TEACHER = json.dumps(tiny_run.TEACHER | {"embed_dim": 32})


def test_a_run_says_and_logs_what_its_precision_changes(data, tmp_path):
    pytest.importorskip("torchao", reason="torchao is not installed (the extra fp8)")
    more = ("--teacher_kwargs", TEACHER, "--schedule.epochs", 1, "--run.ds_config", "cpu_fp32")
    bounds = ("--run.teacher_gate_spatial", 1, "--run.teacher_gate_frequency", 1, "--run.teacher_gate_kl", 1)
    run = tiny_run.arguments(data, tmp_path / "fp8", *more, "--run.teacher_precision", "fp8", *bounds)
    done = forked_ranks("launch/train.py", *run)
    assert done.returncode == 0, done.stdout + done.stderr
    (line,) = [line for line in done.stdout.splitlines() if line.startswith("teacher: fp8; on 11 validation images")]
    logged = tiny_run.scalars(tmp_path / "fp8")
    found = {name: logged[f"teacher/gate_{name}"][0] for name in ("images", "spatial", "frequency", "kl")}
    assert found["images"] == 11.0 and 1e-6 < found["spatial"] < found["frequency"] < 1e-2 and 0.0 < found["kl"] < 1e-2
    assert f"{found['spatial']:.2g}" in line
    # one rank finds the same
    run = tiny_run.arguments(data, tmp_path / "tight", *more, "--run.teacher_precision", "fp8")
    done = forked("launch/train.py", *run, "--run.teacher_gate_spatial", found["spatial"] / 2)
    assert done.returncode == 2
    (error,) = [line for line in (done.stdout + done.stderr).splitlines() if line.startswith("error: ")]
    assert f"1 - cosine (spatial) {found['spatial']:.2g} (at most" in error and error.endswith(
        "--run.teacher_gate_spatial."
    )


def test_a_sharded_teacher_keeps_the_precision_of_the_run(data, tmp_path):
    more = ("--run.teacher_placement", "sharded", "--run.teacher_precision", "bf16", "--run.ds_config", "cpu_fp32")
    done = forked("launch/train.py", *tiny_run.arguments(data, tmp_path / "run", *more))
    assert done.returncode == 2
    assert "run.teacher_precision is bf16 and the teacher is sharded" in done.stdout + done.stderr
