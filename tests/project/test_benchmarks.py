"""The benchmarks: the published structure gives our losses, and every script runs at a small size and writes its results."""

import copy
import importlib
import importlib.util
import json
import sys

import numpy as np
import pytest
import timm
import torch
from forking import forked_with
from launching import ROOT
from PIL import Image
from tiny_pair import batch, student, teacher

from scalekd_ds import ScaleKD
from scalekd_ds.engine.cpu_precision import cpu_computes_in

BENCHMARKS = ROOT / "benchmarks"
# scripts, not a package: they import each other by their plain names
sys.path.append(str(BENCHMARKS))
harness, pairs, published, shapes = map(importlib.import_module, ("harness", "pairs", "published", "shapes"))

VIT = {"img_size": 64, "patch_size": 16, "embed_dim": 48, "depth": 4, "num_heads": 4, "num_classes": 10}
OPTIONS = {
    "all terms": {},
    "a wider cut": {"cut": 2, "weights_s3": (0.3, 0.4)},
    "no KD, one view of the last stage": {"kd_weight": 0.0, "weights_s4": (0.08, 0.0)},
    "last stage alone, with queries of its own": {"weights_s3": (0.0, 0.0)},
    "LayerNorm, BCE, temperature": {"norm": "layer", "loss": "bce", "temperature": 2.0},
}


def losses_and_gradients(distiller, step):
    distiller.zero_grad()
    losses = step()
    losses["loss/total"].backward()
    gradients = {n: p.grad.clone() for n, p in distiller.named_parameters() if p.grad is not None}
    return {k: v.item() for k, v in losses.items()}, gradients


def assert_same_step(distiller):
    # float64, where a wrong order of operations cannot hide behind rounding
    distiller.double()
    images, labels = batch()
    images = images.double()
    start = copy.deepcopy(distiller.state_dict())
    ours, our_gradients = losses_and_gradients(distiller, lambda: distiller(images, labels))
    distiller.load_state_dict(start)
    view = published.published_distiller(distiller)
    theirs, their_gradients = losses_and_gradients(distiller, lambda: published.losses(view, images, labels))
    assert theirs.keys() == ours.keys()
    for term, value in ours.items():
        assert theirs[term] == pytest.approx(value, rel=1e-8), term
    assert their_gradients.keys() == our_gradients.keys()
    # some are analytically zero, and hold rounding noise in both
    noise = 1e-12 * max(g.norm() for g in our_gradients.values())
    for name, gradient in our_gradients.items():
        assert (their_gradients[name] - gradient).norm() < 1e-8 * gradient.norm() + noise, name


@pytest.mark.parametrize("name", OPTIONS)
def test_published_structure_gives_our_losses_and_gradients(name):
    assert_same_step(ScaleKD(student(), teacher(), image_size=64, verbose=False, **OPTIONS[name]))


def test_published_structure_with_a_plain_vit_as_teacher():
    torch.manual_seed(1)
    vit = timm.create_model("vit_tiny_patch16_224", **VIT)
    assert_same_step(ScaleKD(student(), vit, image_size=64, verbose=False))


def test_published_structure_in_float32():
    distiller = ScaleKD(student(), teacher(), image_size=64, verbose=False)
    images, labels = batch()
    ours, our_gradients = losses_and_gradients(distiller, lambda: distiller(images, labels))
    view = published.published_distiller(distiller)
    theirs, their_gradients = losses_and_gradients(distiller, lambda: published.losses(view, images, labels))
    for term, value in ours.items():
        assert theirs[term] == pytest.approx(value, rel=1e-4), term
    for name in ("projectors.s3.spatial.query.weight", "projectors.s4.frequency.fc1.weight", "student.fc.weight"):
        error = (their_gradients[name] - our_gradients[name]).norm() / our_gradients[name].norm()
        assert error < 1e-3, name


def test_published_teacher_is_a_plain_one_on_the_same_weights():
    distiller = ScaleKD(student(), teacher(), image_size=64, verbose=False)
    plain = published.published_distiller(distiller).teacher
    fused = [m.fused_attn for m in plain.modules() if hasattr(m, "fused_attn")]
    assert fused and not any(fused)
    own = dict(distiller.teacher.named_parameters())
    assert all(p is own[n] for n, p in plain.named_parameters())
    lowered = published.with_teacher(distiller, copy.deepcopy(distiller.teacher).lower_precision(torch.bfloat16))
    with pytest.raises(ValueError, match=r"torch\.bfloat16"):
        published.published_distiller(lowered)


def test_work_of_the_kernels():
    # 8 tensor passes of 128 x 49 x 1536 in 16 bits at 3.0 TB/s are the 51 us that were predicted
    loss = shapes.DualView("x", (7, 7), 1536).work(128, 2, "forward+backward")
    assert loss["bytes"] / 3.0e12 == pytest.approx(51e-6, rel=0.01)
    # two stages read the shared target once
    both = shapes.DualView("x", (7, 7), 1536, stages=2).work(128, 2, "forward+backward")
    assert both["bytes"] * 8 == loss["bytes"] * 14
    attention = shapes.Attention("x", 4, 6, 2, 8, shared=True).work(3, 4, "forward")
    q, kv, y = 2 * 4 * 16 * 4, 2 * 6 * 6 * 16 * 4, 6 * 4 * 16 * 4
    assert attention == {"bytes": q + kv + y, "flop": 2 * (2 * 6 * 2 * 4 * 6 * 8)}


def load_script(name):
    # by its path: `kernels` by name is the library's own folder
    spec = importlib.util.spec_from_file_location(f"benchmark_{name}", BENCHMARKS / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_attention_table_is_in_the_librarys_keys():
    def row(direction, **ms):
        sizes = shapes.Attention("x", 49, 196, 8, 192, False).sizes(128)
        variants = {name: {"median": value} for name, value in ms.items()}
        return {"direction": direction, "dtype": "bf16", "sizes": sizes, "variants": variants}

    picks_of = load_script("kernels").attention_table
    rows = [row("forward", triton=9.0, sdpa=1.0), row("forward+backward", triton=1.0, sdpa=1.3)]
    machine = {"sm": "9.0"}
    assert picks_of(rows, machine) == {"sm_90/d192/q49/k196/per_sample/bfloat16": "triton"}
    assert picks_of([row("forward+backward", triton=1.3, sdpa=1.0)], machine).popitem()[1] == "sdpa"
    # nothing to choose from on a CPU
    assert picks_of([row("forward+backward", sdpa=1.0)], {}) == {}


def test_the_table_of_window_attention_sums_the_shapes_of_a_key():
    def row(name, grid, direction, **ms):
        sizes = shapes.Windows(name, grid, 7, 24, shifted=True).sizes(128)
        variants = {name: {"median": value} for name, value in ms.items()}
        return {
            "operation": "window_attention",
            "direction": direction,
            "dtype": "bf16",
            "sizes": sizes,
            "variants": variants,
        }

    script = load_script("kernels")
    rows = [
        row("a", (14, 14), "forward", triton=1.0, sdpa=2.0),
        row("b", (28, 28), "forward", triton=4.0, sdpa=2.0),
        row("a", (14, 14), "forward+backward", triton=1.0, sdpa=2.0),
        row("c", (14, 14), "forward", sdpa=9.0),
    ]
    assert script.windows_table(rows, {"sm": "9.0"}) == {
        "sm_90/d32/t49/shifted/forward/bfloat16": "sdpa",
        "sm_90/d32/t49/shifted/backward/bfloat16": "triton",
    }
    assert script.attention_table(rows, {"sm": "9.0"}) == {}


def test_work_of_window_attention():
    work = shapes.Windows("x", (14, 14), 7, 24).work(128, 2, "forward")
    # q, k, v and y; two products with the 49 tokens of a window
    assert work == {"bytes": 4 * 128 * 196 * 768 * 2, "flop": 2 * 2 * 128 * 196 * 49 * 768}


def run_script(name, *arguments, out):
    return forked_with([{"OUT": str(out)}], BENCHMARKS / name, *arguments)


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    out = tmp_path_factory.mktemp("results")
    short = ("--device", "cpu", "--repeats", "2", "--ceiling-repeats", "1")
    step = run_script("step.py", "--pair", "tiny", "--batch", "2", *short, out=out)
    assert step.returncode == 0, step.stderr
    chosen = ("--batch", "1", "--shapes", "swin_s", "swin_s.s4")
    kernels = run_script("kernels.py", *chosen, *short, out=out)
    assert kernels.returncode == 0, kernels.stderr
    return out


def test_step_measures_every_variant_by_part(results):
    result = json.loads((results / "step-tiny-cpu.json").read_text())
    assert result["machine"].keys() >= {"cpu", "threads", "torch", "timm", "commit", "date"}
    assert min(result["ceilings"].values()) > 1e8
    # a CPU that emulates bf16 is not made to wait for it
    native = cpu_computes_in(torch.bfloat16)
    expected = [f"{whose}-{dtype}" for dtype in ("bf16", "fp32")[not native :] for whose in ("ours", "published")]
    assert list(result["variants"]) == expected
    assert result["ceilings"].keys() - {"copy_bytes_per_s"} == {
        f"matmul_flop_per_s/{n.split('-')[1]}" for n in expected
    }
    for variant in result["variants"].values():
        assert 0 < variant["p20"] <= variant["median"] <= variant["p80"]
        assert variant["images_per_s"] == pytest.approx(2e3 / variant["median"])
        parts = variant["parts"]
        assert parts.keys() == {"teacher", "student", "CAP", "TPP", "loss", "backward", "optimizer", "other"}
        assert sum(part["share"] for part in parts.values()) == pytest.approx(1.0, abs=0.02)
        assert variant["peak_memory_bytes"] is None
    assert result["ratios"].keys() >= {f"{expected[0]}/{other}" for other in expected[1:]}
    totals = [losses["loss/total"] for losses in result["losses"].values()]
    assert len(totals) == len(expected) and max(totals) < 1.02 * min(totals)
    both = [result["losses"][f"{whose}-fp32"] for whose in ("ours", "published")]
    assert both[0] == pytest.approx(both[1], rel=1e-4)
    assert result["losses_differ_by"] < 0.1
    assert result["flop_per_image"] > 1e6


def test_bf16_is_left_out_where_the_cpu_emulates_it(monkeypatch, capsys):
    step = importlib.import_module("step")
    monkeypatch.setenv("ONEDNN_MAX_CPU_ISA", "AVX2")
    assert step.parse(["--pair", "tiny", "--device", "cpu"]).variants == ["ours-fp32", "published-fp32"]
    assert "bf16 is left out: this CPU emulates it" in capsys.readouterr().out
    assert step.parse(["--pair", "tiny", "--device", "cpu", "--variants", "ours-bf16"]).variants == ["ours-bf16"]
    # a GPU's types are not the CPU's
    assert len(step.parse(["--pair", "tiny", "--device", "cuda"]).variants) == 4


def test_ceilings_are_measured_of_the_types_asked_for():
    found = harness.ceilings(torch.device("cpu"), 1, ["fp32"])
    assert found.keys() == {"copy_bytes_per_s", "matmul_flop_per_s/fp32"} and min(found.values()) > 0


def test_kernels_measures_against_the_floor(results):
    rows = json.loads((results / "kernels-cpu.json").read_text())["rows"]
    assert [(r["shape"], r["direction"]) for r in rows] == [
        (shape, direction) for shape in ("swin_s", "swin_s.s4") for direction in ("forward", "forward+backward")
    ]
    for row in rows:
        assert row["floor_ms"] > 0
        for variant in row["variants"].values():
            assert variant["share_of_floor"] == pytest.approx(row["floor_ms"] / variant["median"])
    assert rows[0]["variants"].keys() == {"library", "published", "eager"}
    assert rows[2]["variants"].keys() == {"library", "published", "eager", "sdpa"}


def test_plot_draws_every_result(results):
    pytest.importorskip("matplotlib", reason="the extra 'bench' is not installed: no matplotlib")
    done = run_script("plot.py", out=results)
    assert done.returncode == 0, done.stderr
    charts = sorted(results.glob("*.png"))
    (results / "step-other.json").write_text("{}")
    refused = run_script("plot.py", str(results / "step-other.json"), out=results)
    assert refused.returncode == 1 and "must be a result of step.py or kernels.py" in refused.stderr
    assert len(charts) == 5
    assert all(chart.read_bytes().startswith(b"\x89PNG") for chart in charts)


def test_loaders_are_measured_in_turn(tmp_path):
    small = ("--images", "20", "--size", "32", "--batch", "4", "--batches", "1", "--repeats", "1", "--workers", "1")
    done = run_script("loader.py", *small, "--device", "cpu", out=tmp_path)
    assert done.returncode == 0, done.stderr
    rows = json.loads((tmp_path / "loader-cpu.json").read_text())["rows"]
    assert [row["recipe"] for row in rows] == ["crop and flip", "RandAugment"]
    for row in rows:
        assert row["loaders"].keys() - {"FFCV"} == {"ours", "timm", "torchvision"}
        assert row["loaders"]["timm"]["times_timm"]["median"] == 1.0
        assert min(loader["images_per_s"] for loader in row["loaders"].values()) > 0


def test_augmentations_are_drawn_beside_timms(tmp_path):
    done = run_script("augment_gallery.py", out=tmp_path)
    assert done.returncode == 0, done.stderr
    page = np.asarray(Image.open(tmp_path / "augmentations.png"))
    height = 112 + 14 + 6
    # each row of ours stands above timm's, pixel for pixel, labels apart
    for row in (0, 2, 4):
        ours, theirs = (page[6 + r * height + 14 : 6 + r * height + 14 + 112] for r in (row, row + 1))
        assert np.array_equal(ours, theirs)


@pytest.mark.parametrize(
    ("pair", "recipe", "message"),
    [
        (None, None, "pair and recipe"),
        ("tiny", "swin_l-resnet50-traditional", "pair and recipe"),
        ("nothing", None, "pair is 'nothing': it must be one of swin_small-resnet50"),
        (None, "nothing", "recipe is 'nothing'"),
        (None, "fashion-ce", "recipe is 'fashion-ce': it must have a teacher"),
    ],
)
def test_pairs_that_cannot_be_measured(pair, recipe, message):
    with pytest.raises(ValueError, match=message):
        pairs.config_of(pair, recipe)


def test_a_recipe_is_measured_with_random_weights():
    cfg = pairs.config_of(None, "swin_l-resnet50-traditional")
    assert (cfg.teacher_weights, cfg.student_weights, cfg.distill.heads_s4) == ("none", "none", 24)


def test_errors_are_one_line(tmp_path):
    done = run_script("kernels.py", "--shapes", "round", out=tmp_path)
    assert done.returncode == 1
    assert done.stderr.startswith("error: shapes has 'round': it must be one of swin_s, ")
    assert done.stderr.count("\n") == 1
    assert not list(tmp_path.iterdir())
