"""Checkpoints on other numbers of ranks and other ZeRO stages, in real DeepSpeed runs."""

import pytest
import torch
from forking import forked_ranks
from launching import WORKERS, result_of

from scalekd_ds.checkpoint.shard_files import scalar_state
from scalekd_ds.config import OptimConfig
from scalekd_ds.optim.optimizers import build_optimizer

WORKER = WORKERS / "reshard_worker.py"


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """Three steps of each optimizer and stage on two ranks; the folder, and errors of going on there."""
    folder = tmp_path_factory.mktemp("shards")
    return folder, result_of(forked_ranks(WORKER, folder))


def test_the_same_stage_goes_on_bit_for_bit(saved):
    same = {case: error for case, error in saved[1].items() if len({*case.split(": ")[1].split(" -> ")}) == 1}
    assert len(same) == 3 * 6
    assert set(same.values()) == {0.0}


def test_any_other_stage_goes_on_but_for_rounding(saved):
    assert len(saved[1]) == 3 * 21
    # relative to how far the steps moved the weights; LAMB's norms are summed in another order
    assert max(saved[1].values()) < 2e-5


@pytest.mark.parametrize("ranks", [1, pytest.param(3, marks=pytest.mark.slow)])
def test_any_other_number_of_ranks_goes_on_but_for_rounding(saved, ranks):
    errors = result_of(forked_ranks(WORKER, saved[0], "--load", 2, ranks=ranks))
    assert len(errors) == 3 * 21
    assert max(errors.values()) < 2e-5


@pytest.mark.parametrize("device", ["cpu", "meta", pytest.param("cuda", marks=pytest.mark.gpu)])
@pytest.mark.parametrize("name", ["adamw", "lamb"])
def test_the_number_of_steps_goes_where_the_optimizer_keeps_it(name, device):
    """A fused optimizer's kernels read it on the weights' device; LAMB reads it on the host."""
    layer = torch.nn.Linear(3, 2, device="cpu" if device == "meta" else device)
    optimizer = build_optimizer(layer, OptimConfig(name))
    found = scalar_state(7.0, optimizer, layer.weight.to(device))
    assert found.device.type == ("cpu" if name == "lamb" else device) and found.dtype == torch.float32
    if device == "meta":
        return
    # as the optimizer's own, which it then counts on
    layer(torch.ones(1, 3, device=device)).sum().backward()
    optimizer.step()
    assert optimizer.state[layer.weight]["step"].device == found.device
    optimizer.state[layer.weight]["step"] = found
    optimizer.step()
    assert optimizer.state[layer.weight]["step"].item() == 8.0
