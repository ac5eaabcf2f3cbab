"""How often the host waits for the device in one plain optimizer step of the real engines."""

import pytest
from forking import forked_ranks
from launching import WORKERS, result_of

WORKER = WORKERS / "sync_worker.py"
STAGES = ("zero0", "zero1", "zero2", "zero3")
# each engine asks once whether the gradients are finite: DeepSpeed's own question, and ours where it has none
ALLOWED = {
    "zero0": ["_local_scalar_dense in scalekd_ds/nonfinite.py guarded"],
    "zero1": ["_local_scalar_dense in deepspeed/utils.py is_invalid_grad_norm"],
    "zero2": ["_local_scalar_dense in deepspeed/utils.py is_invalid_grad_norm"],
    "zero3": ["_local_scalar_dense in deepspeed/utils.py is_invalid_grad_norm"],
}


@pytest.fixture(scope="module", params=[1, 2])
def ranks(request):
    """How many ranks there are."""
    return request.param


@pytest.fixture(scope="module")
def steps(ranks):
    """case -> what a step waited for, on so many ranks."""
    return result_of(forked_ranks(WORKER, ranks=ranks))


def test_a_single_rank_copies_no_gradients_to_reduce_them(steps, ranks):
    """Without ZeRO, where DeepSpeed gathers them in buckets: one bucket in each of four steps."""
    found = {case: step["buckets"] for case, step in steps.items() if case.startswith("zero0")}
    assert found == dict.fromkeys(found, 0 if ranks == 1 else 4) and len(found) == 6


@pytest.mark.parametrize("stage", STAGES)
def test_the_host_waits_once_in_a_step(steps, stage):
    """With every optimizer, with and without clipping, an average of the weights and the guard against NaN."""
    found = {case: step["waits"] for case, step in steps.items() if case.startswith(stage)}
    assert len(found) == 6
    assert found == dict.fromkeys(found, ALLOWED[stage])


@pytest.mark.parametrize("stage", STAGES)
def test_clipping_on_the_device_gives_deepspeeds_numbers(steps, stage):
    """The weights after four steps and the norm, with DeepSpeed's own functions and with ours."""
    plain = [step for case, step in steps.items() if case.startswith(f"{stage} sgd")]
    assert [step["difference"] for step in plain] == [0.0, 0.0]
    # what is replaced would have waited: the test sees it
    assert max(step["of DeepSpeed"] for step in plain) > 1
