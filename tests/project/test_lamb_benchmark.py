"""How LAMB's update is measured, and what the roofline does with it."""

import importlib
import sys

import pytest
import torch
from launching import ROOT

sys.path.append(str(ROOT / "benchmarks"))
model, shapes, updates = map(importlib.import_module, ("roofline_parts.model", "shapes", "update_variants"))
SMALL = ((5, 3, 2), (7,), (4, 4))


def test_work_is_seven_passes_over_the_weights():
    update = shapes.Update("x", False, SMALL)
    assert update.parameters() == 30 + 7 + 16
    assert update.work(128, 2, "update") == {"bytes": 7 * 4 * 53, "flop": 0}


def test_layers_and_a_shard_of_them_are_updated_alike():
    """A shard that were one layer would have one trust ratio."""
    after = {}
    for flat in (False, True):
        torch.manual_seed(0)
        joined = torch.randn(2, 53)
        shape = shapes.Update("x", flat, SMALL)
        calls = updates.update_calls(shape, 2, torch.bfloat16, torch.device("cpu"), False)
        # nothing but PyTorch's operations on a CPU
        assert calls.keys() == {"library", "torch"}
        weights = weights_of(calls["torch"][0])
        sizes = [53] if flat else [30, 7, 16]
        for i, part in enumerate(zip(*(row.split(sizes) for row in joined), strict=True)):
            weights[i].data.copy_(part[0].view(weights[i].shape))
            weights[i].grad.copy_(part[1].view(weights[i].shape))
        optimizer_of(calls["torch"][0]).param_groups[0]["lr"] = 0.1
        calls["torch"][0]()
        after[flat] = torch.cat([w.detach().flatten() for w in weights])
        assert not torch.equal(after[flat], joined[0])
    torch.testing.assert_close(after[True], after[False])


def optimizer_of(step):
    return next(
        cell.cell_contents for cell in step.__closure__ if isinstance(cell.cell_contents, torch.optim.Optimizer)
    )


def weights_of(step):
    return optimizer_of(step).param_groups[0]["params"]


def test_the_table_sums_the_shapes_of_a_key():
    def row(flat, **ms):
        sizes = shapes.Update("x", flat, SMALL).sizes(128)
        return {
            "operation": "lamb",
            "sizes": sizes,
            "variants": {name: {"median": value} for name, value in ms.items()},
        }

    rows = [row(False, triton=1.0, torch=3.0), row(False, triton=2.0, torch=1.0), row(True, triton=2.0, torch=1.0)]
    rows += [{"operation": "dual_view_loss", "variants": {}}, row(True, torch=9.0)]
    assert updates.update_table(rows, {"sm": "9.0"}) == {"sm_90/layers": "triton", "sm_90/flat": "torch"}


def test_the_compiled_step_has_the_update_in_the_place_of_the_eager_one():
    def kernels(*parts):
        return [{"part": part, "op": str(number)} for number, part in enumerate(parts)]

    eager = kernels("teacher", "else", "optimizer", "optimizer", "else")
    fused, update = kernels("teacher", "backward teacher"), [{"part": "optimizer", "op": "ours"}]

    def found(*more):
        return [(k["part"], k["op"]) for k in model.compiled_step(eager, fused, *more)]

    begin = [("teacher", "0"), ("backward teacher", "1"), ("else", "1")]
    assert found(update) == [*begin, ("optimizer", "ours"), ("else", "4")]
    assert found(None) == found() == [*begin, ("optimizer", "2"), ("optimizer", "3"), ("else", "4")]


@pytest.mark.parametrize("name", ["lamb", "lamb.flat", "lamb.small"])
def test_shapes_are_among_those_that_are_measured(name):
    assert [shape.directions for shape in shapes.ALL if shape.name == name] == [("update",)]
