"""The roofline: bytes and FLOP of small graphs by hand, its model of time, and a whole step against the count of launches."""

import importlib
import json
import sys

import pytest
import torch
import torch.nn.functional as F
from launching import ROOT
from pretending import lines_of, skip_reason
from torch.utils._python_dispatch import TorchDispatchMode

BENCHMARKS = ROOT / "benchmarks"
sys.path.append(str(BENCHMARKS))
cards, cost, model, report, roofline = map(
    importlib.import_module,
    ("roofline_parts.cards", "roofline_parts.cost", "roofline_parts.model", "roofline_parts.report", "roofline"),
)
RESULT = BENCHMARKS / "results" / "roofline-swin_large-resnet50.json"
ASIDE = 1e30


class Kernels(TorchDispatchMode):
    """The kernels of every operator that is no view, on tensors of the meta device."""

    def __init__(self):
        super().__init__()
        self.found = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if (
            not any(r.alias_info and not r.alias_info.is_write for r in func._schema.returns)
            and "empty" not in func._schema.name
        ):
            self.found += cost.kernels_of(func, args, kwargs or {}, out)
        return out


def kernels(call):
    """Operator -> its kernels."""
    with Kernels() as mode:
        call()
    return {k["op"]: [one for one in mode.found if one["op"] == k["op"]] for k in mode.found}


def tensor(*shape, dtype=torch.bfloat16, grad=False):
    return torch.empty(*shape, dtype=dtype, device="meta", requires_grad=grad)


def test_a_linear_layer_reads_its_operands_once_and_writes_its_output():
    x, w, b = tensor(64, 256), tensor(512, 256), tensor(512)
    (found,) = kernels(lambda: F.linear(x, w, b))["addmm"]
    assert found["read"] == 2 * (64 * 256 + 512 * 256 + 512) and found["written"] == 2 * 64 * 512
    assert found["flop"] == 2 * 64 * 256 * 512 and found["unit"] == "half"
    assert found["must"] == found["read"] + found["written"]


def test_a_layer_norm_could_run_in_its_neighbour():
    x, w, b = tensor(32, 48, dtype=torch.float32), *(tensor(48, dtype=torch.float32) for _ in range(2))
    (found,) = kernels(lambda: F.layer_norm(x, (48,), w, b))["native_layer_norm"]
    # beside the output, a mean and a deviation of each row
    assert found["read"] == 4 * (32 * 48 + 2 * 48) and found["written"] == 4 * (32 * 48 + 2 * 32)
    assert found["unit"] == "fp32" and found["must"] is None


def test_a_batch_norm_reads_its_input_for_the_statistics_and_again():
    x, w, b = tensor(8, 16, 4, 4, dtype=torch.float32), *(tensor(16, dtype=torch.float32) for _ in range(2))
    for training, reads in ((True, 2), (False, 1)):
        statistics = [tensor(16, dtype=torch.float32) for _ in range(2)]
        call = torch.ops.aten.native_batch_norm
        ((found,),) = kernels(lambda: call(x, w, b, *statistics, training, 0.1, 1e-5)).values()  # noqa: B023
        assert found["read"] == 4 * (reads * x.numel() + 4 * 16)


def test_the_backward_of_a_convolution_is_a_kernel_for_each_gradient():
    x, w, b = tensor(2, 16, 8, 8, grad=True), tensor(32, 16, 3, 3, grad=True), tensor(32, grad=True)
    found = kernels(lambda: F.conv2d(x, w, b, padding=1).sum().backward())
    sizes = {"x": 2 * x.numel(), "w": 2 * w.numel(), "b": 2 * b.numel(), "y": 2 * 2 * 32 * 64}
    flop = 2 * 9 * 16 * 32 * 2 * 64
    (forward,) = found["convolution"]
    assert (forward["read"], forward["written"]) == (sizes["x"] + sizes["w"] + sizes["b"], sizes["y"])
    assert forward["flop"] == flop
    # the gradient of a sum is one number, broadcast: it is read as what it is
    backward = [found[f"convolution_backward {what}"][0] for what in ("input", "weight", "bias")]
    assert [k["written"] for k in backward] == [sizes["x"], sizes["w"], sizes["b"]]
    assert [k["flop"] for k in backward] == [flop, flop, 2 * 32 * 64]
    assert [k["launches"] for k in backward] == [1, 0, 0] and [k["kernels"] for k in backward] == [1, 1, 1]


def test_attention_writes_no_scores():
    q, k, v = (tensor(4, 8, 196, 64) for _ in range(3))
    ((found,),) = kernels(lambda: torch.ops.aten._scaled_dot_product_flash_attention(q, k, v)).values()
    one = 2 * 4 * 8 * 196 * 64
    assert found["read"] == 3 * one
    # and the logarithm of each row's sum, and the state of the generator
    assert one + 4 * 4 * 8 * 196 <= found["written"] <= one + 4 * 4 * 8 * 196 + 64
    assert found["flop"] == 2 * 2 * 4 * 8 * 196 * 196 * 64


def test_in_place_copies_casts_and_broadcasts():
    x, y = tensor(100), tensor(100, dtype=torch.float32)
    assert [(k["read"], k["written"]) for k in kernels(lambda: x.mul_(2))["mul_"]] == [(200, 200)]
    assert [(k["read"], k["written"]) for k in kernels(lambda: x.copy_(y))["copy_"]] == [(400, 200)]
    assert [(k["read"], k["written"]) for k in kernels(lambda: y.bfloat16())["_to_copy"]] == [(400, 200)]
    assert [(k["read"], k["written"]) for k in kernels(lambda: x.add(x))["add"]] == [(200, 200)]
    assert [(k["read"], k["written"]) for k in kernels(lambda: x.expand(50, 100).clone())["clone"]] == [(200, 10000)]


def whole_parts(kernels):
    """Part -> launches, with the whole backward pass as one."""
    sums = {}
    for kernel in kernels:
        part = "backward" if kernel["part"].startswith("backward") else kernel["part"]
        sums[part] = sums.get(part, 0) + kernel["launches"]
    return sums


def card(**more):
    return cards.Card("a card", source="none", **(dict.fromkeys(("half", "tf32", "fp32", "gb_s"), ASIDE) | more))


def one(**more):
    return (
        cost.kernel("op", (), ())
        | {"read": 600, "written": 400, "flop": 1000, "unit": "half", "part": "student"}
        | more
    )


def test_a_kernel_takes_the_slower_of_its_bytes_and_its_flop():
    assert card(half=1.0).seconds(one()) == pytest.approx(1000 / (1e12 * cards.MATMUL_SHARE))
    assert card(gb_s=1.0).seconds(one()) == pytest.approx(1000 / (1e9 * cards.COPY_SHARE))
    both = card(half=1.0, gb_s=1.0)
    assert both.seconds(one()) == max(card(half=1.0).seconds(one()), card(gb_s=1.0).seconds(one()))
    assert card(fp32=1.0).seconds(one()) < 1e-20 < card(fp32=1.0).seconds(one(unit="fp32"))


def test_a_step_is_bound_by_launches_where_the_device_is_fast_and_by_the_device_where_it_is_slow():
    step = [one() for _ in range(10)]
    assert model.step_seconds(step, card())[0] == pytest.approx(10 * cards.EAGER_HOST_US * 1e-6)
    compiled = [kernel | {"compiled": True} for kernel in step]
    assert model.step_seconds(compiled, card())[0] == pytest.approx(10 * cards.COMPILED_HOST_US * 1e-6)
    slow = card(gb_s=1e-3)
    assert model.step_seconds(step, slow)[0] == pytest.approx(sum(model.device_seconds(k, slow) for k in step))
    # the host, which waits for each kernel, launches none ahead
    waits = [kernel | {"waits": True} for kernel in step]
    expected = sum(model.device_seconds(k, slow) for k in step) + 10 * cards.EAGER_HOST_US * 1e-6
    assert model.step_seconds(waits, slow)[0] == pytest.approx(expected)


def test_the_floor_has_products_and_the_update_alone():
    step = [one(must=500), one(part="teacher")]
    parts = model.floor(step, 10**6, card(gb_s=1.0))
    rate = 1e9 * cards.COPY_SHARE
    assert parts == {"student": pytest.approx(500 / rate), "optimizer": pytest.approx(10**6 / rate)}
    first, second = model.gains(step, card(gb_s=1.0))
    assert (first["part"], second["part"]) == ("teacher", "student")
    gap = 1e-6 * cards.GAP_US
    assert first["gain_ms"] == pytest.approx(1e3 * (1000 / rate + gap))
    assert second["gain_ms"] == pytest.approx(1e3 * (500 / rate + gap))


def test_the_committed_result_is_the_table_of_the_documents():
    content = roofline.read(str(RESULT))
    assert content["cards"].keys() == cards.CARDS.keys() and content["batch"] == 128
    table = report.markdown(content)
    assert table in (ROOT / "docs" / "performance.md").read_text()
    for found in content["cards"].values():
        for step in ("eager", "compiled", "floor"):
            assert sum(found[step]["parts"].values()) == pytest.approx(found[step]["ms"])
        assert found["floor"]["ms"] < found["compiled"]["ms"] < found["eager"]["ms"]
    assert content["assumptions"] == json.loads(json.dumps(report.assumptions()))


def test_the_committed_result_is_of_the_step_whose_launches_the_documents_count():
    lines = (ROOT / "docs" / "performance.md").read_text().splitlines()
    (row,) = [line for line in lines if line.startswith("| Swin-L → ResNet-50 | ")]
    counted = int(row.strip("| ").split("|")[-1].replace(",", ""))
    launches = roofline.read(str(RESULT))["launches"]["eager"]
    assert launches == pytest.approx(counted, rel=0.05), (
        "run benchmarks/roofline.py again, and put its table into the documents"
    )


def test_wrong_arguments_are_one_line(tmp_path, capsys):
    other = tmp_path / "other.json"
    other.write_text("{}")
    assert roofline.main(["--json", str(other)]) == 1
    assert roofline.main(["--pair", "a-b"]) == 1
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 2 and "is no result of benchmarks/roofline.py" in lines[0] and "pair is 'a-b'" in lines[1]


def test_the_difference_of_two_results(capsys):
    assert roofline.main(["--json", str(RESULT), "--against", str(RESULT), "--card", "H100"]) == 0
    lines = capsys.readouterr().out.split("the other trace and this one")[1:]
    assert len(lines) == 2
    for part in lines:
        (whole,) = [line.split() for line in part.splitlines() if line.startswith("all")]
        assert whole[1] == whole[2] and float(whole[-1]) == 0.0


@pytest.mark.skipif(skip_reason() is not None, reason=str(skip_reason()))
def test_a_step_and_a_fused_graph_of_a_process_that_pretends(tmp_path):
    lines, _ = lines_of("roofline_worker.py", tmp_path)
    found = json.loads(lines[-1])
    # part by part, what `fake_cuda.Watch` counts
    assert whole_parts(found["eager"]) == found["launches"]
    parts = report.by_part(found["eager"])
    assert {"backward student", "backward projectors", "backward TPP", "backward losses"} < parts.keys()
    # a trained layer's backward has twice its FLOP; the first layer's images and the frozen stage's weights get no gradient
    assert 1.5 < parts["backward student"]["flop"] / parts["student"]["flop"] < 2
    assert 0.9 < parts["backward TPP"]["flop"] / parts["TPP"]["flop"] < 1.1
    # two products of scores that are not fused, in each of the teacher's blocks
    scores = [k for k in found["eager"] if k["op"] == "bmm" and k["part"] == "teacher"]
    assert scores and all(k["must"] < k["read"] + k["written"] for k in scores)
    assert sum(k["waits"] for k in found["eager"]) == 1
    # LayerNorm, GELU and casts around two products are three kernels; backward they are more
    fused = report.by_part(found["fused"])
    products = [k for k in found["fused"] if k["must"] is not None]
    assert [k["part"] for k in products] == ["mlp", "mlp"] + ["backward mlp"] * 4
    assert fused["mlp"]["kernels"] < found["eager_kernels"] and fused["mlp"]["bytes"] < found["eager_bytes"]
    assert sum(k["flop"] for k in products) == found["product_flop"]
