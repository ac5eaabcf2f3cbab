"""Every optimizer on two real ranks, at every ZeRO stage, against the unsharded one."""

import pytest
from forking import forked_ranks
from launching import WORKERS, result_of

WORKER = WORKERS / "optim_worker.py"
STAGES = ["zero0", "zero1 round robin", "zero2", "zero3"]
STAGES += [pytest.param(stage, marks=pytest.mark.slow) for stage in ("zero1", "zero3 persistent")]


@pytest.fixture(scope="module")
def two_ranks(asked):
    """case -> relative error, as the worker measured it."""
    return result_of(forked_ranks(WORKER, *sorted(asked("stage"))))


@pytest.mark.parametrize("clip", ["0", "0.05"])
@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("name", ["sgd", "adamw", "lamb"])
def test_two_ranks_make_the_unsharded_update(two_ranks, name, stage, clip):
    # relative to the distance moved in 4 steps; a LAMB that takes the norms of shards is 18 to 33% off
    assert two_ranks[f"{name} clip {clip} {stage}"] < 2e-5


@pytest.mark.parametrize("clip", ["0", "0.05"])
@pytest.mark.parametrize("stage", STAGES)
def test_the_norm_that_clips_is_the_global_one(two_ranks, stage, clip):
    """Against all gradients of the whole batch in float64; it is logged with and without clipping."""
    assert max(two_ranks[f"{name} norm clip {clip} {stage}"] for name in ("sgd", "adamw", "lamb")) < 1e-6


@pytest.mark.parametrize("plain", ["zero0", "zero1", "zero2", "zero3"])
def test_lamb_survives_a_checkpoint(two_ranks, plain):
    assert two_ranks[f"lamb checkpoint {plain}"] == 0.0
