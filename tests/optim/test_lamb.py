"""LAMB against plain loops over layers, and the number of kernels that a step of it starts on a GPU."""

import subprocess
import sys

import pytest
from forking import forked_ranks
from launching import LIMIT, ROOT, WORKERS, result_of

WORKER = WORKERS / "lamb_worker.py"
CASES = [f"{zero} no_decay {names}" for names in ("none", "1d") for zero in ("zero0", "zero1", "zero2", "zero3")]
OFFLOAD = [f"zero1 offload no_decay {names}" for names in ("none", "1d")]

sys.path.insert(0, str(ROOT / "benchmarks"))
import fake_cuda  # noqa: E402


@pytest.fixture(scope="module", params=[pytest.param(1, marks=pytest.mark.slow), 2])
def lamb(request):
    """case -> launches and errors, as the worker measured them on so many ranks."""
    return result_of(forked_ranks(WORKER, ranks=request.param))


@pytest.mark.parametrize("case", CASES + OFFLOAD)
def test_a_step_is_that_of_plain_loops(lamb, case):
    assert lamb[case]["error"] < 1e-6


@pytest.mark.parametrize("case", CASES + OFFLOAD)
def test_a_state_in_other_memory_is_taken(lamb, case):
    """The moments lie in one piece of memory, which loading a checkpoint gives up."""
    assert lamb[case]["error after a load"] < 2e-6


@pytest.mark.parametrize("case", CASES)
def test_a_resnet50s_layers_take_few_launches(lamb, case):
    """Of 161 layers, a dozen launches for each were 2,000."""
    assert 0 < sum(lamb[case]["launches"]) < 60


@pytest.fixture(scope="module")
def on_fake_cuda(tmp_path_factory):
    """Way -> launches, syncs and copies of a step over a ResNet-50's layers, on CUDA tensors without a GPU."""
    if reason := fake_cuda.available():
        pytest.skip(f"needs the stand-ins for CUDA: {reason}")
    env = fake_cuda.environment(tmp_path_factory.mktemp("stand-ins"))
    command = [sys.executable, str(WORKERS / "fake_lamb.py")]
    return result_of(subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=LIMIT))


@pytest.mark.parametrize(
    ("way", "most"),
    # the kernels: 2 passes, sums, the pass without decay, zeros, and 5 for the ratios; and new addresses in two groups
    [("torch", 60), ("triton", 10), ("triton, gradients elsewhere", 12)],
)
def test_on_a_gpu_nothing_is_waited_for_and_nothing_copied(on_fake_cuda, way, most):
    """The tensors also have to be of one device, the second one, and kernels are launched on it."""
    found = on_fake_cuda[way]
    assert (found["syncs"], found["copies"]) == ({}, {})
    assert 0 < found["launches"]["lamb"] <= most
    kernels = {} if way == "torch" else {"advance_kernel": 2, "sums_kernel": 1, "apply_kernel": 1}
    assert found["kernels"] == kernels


def test_the_roofline_counts_each_tensor_once_in_each_pass(on_fake_cuda):
    found = on_fake_cuda["modelled"]
    decay, free = found["elements"]
    # gradient, moments and weight; without a trust ratio the first pass is the only one. 40 bytes, of which 28 must move
    expected = [("advance_kernel", 4 * decay, 2 * decay, 6 * decay), ("advance_kernel", 4 * free, 3 * free, 7 * free)]
    expected += [("apply_kernel", 3 * decay, decay, decay)]
    for kernel, (name, read, written, must) in zip(found["kernels"], expected, strict=True):
        assert kernel[0] == name and kernel[2:] == [4 * written, 4 * must]
        # beside them a table, and of layers that are smaller than a block a few bytes for each
        assert 4 * read <= kernel[1] < 1.01 * 4 * read + 64 * 161
    assert found["launches"] == on_fake_cuda["triton"]["launches"]["lamb"]
