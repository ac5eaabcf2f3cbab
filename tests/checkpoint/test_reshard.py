"""Checkpoints on other numbers of ranks and other ZeRO stages, in real DeepSpeed runs."""

import pytest
from forking import forked_ranks
from launching import WORKERS, result_of

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
