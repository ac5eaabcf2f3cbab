"""How batches reach a GPU: no host sync, no blocking copy, and as many kernels for a large batch as for a small one."""

import json
import subprocess
import sys

import pytest
from image_fixtures import make_folder
from launching import LIMIT, ROOT

sys.path.append(str(ROOT / "benchmarks"))
import fake_cuda

WORKER = ROOT / "tests" / "workers" / "loader_on_fake_cuda.py"
SMALL, LARGE = 12, 24


@pytest.fixture(scope="module")
def counted(tmp_path_factory):
    """Batch size -> what is done -> its launches, host syncs and copies."""
    if reason := fake_cuda.available():
        pytest.skip(reason)
    folder = tmp_path_factory.mktemp("handoff")
    make_folder(folder / "images", {"a": 6, "b": 6})
    environment = fake_cuda.environment(folder / "libraries")
    command = [sys.executable, str(WORKER), str(folder / "images"), str(SMALL), str(LARGE)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=LIMIT)
    assert done.returncode == 0, done.stderr
    return {int(size): found for size, found in json.loads(done.stdout.splitlines()[-1]).items()}


# the most kernels that each may take
MOST = {
    "crop": 2,
    "noise": 20,
    "zero": 20,
    "policy on the host": 6,
    "policy on the host and noise": 24,
    # operations of each kind are Triton's: one launch, four with histograms, and one to put images back
    **dict.fromkeys(("AutoContrast", "Equalize", "Contrast"), 10),
    **dict.fromkeys(("Invert", "Color", "Sharpness", "ShearX", "TranslateYRel", "Rotate"), 8),
    "GaussianBlur": 46,
    "every kind": 54,
    "mixed by view": 30,
    "policy on the host and mixed": 34,
    "cached, for other models": 6,
    "evaluation": 2,
    "mix {'mixup': 0.8}": 12,
    "mix {'cutmix': 1.0}": 12,
    "count_correct": 16,
    "agreement": 16,
}


@pytest.mark.parametrize("what", MOST)
def test_the_host_waits_for_nothing_and_a_batch_takes_a_fixed_number_of_kernels(counted, what):
    small, large = (counted[size][what] for size in (SMALL, LARGE))
    for each in (small, large):
        assert each["syncs"] == {} and each["copies"] == {}
    assert 0 < small["launches"] == large["launches"] <= MOST[what]


@pytest.mark.parametrize("what", ["policy", "policy and noise", "policy, noise and mixed"])
def test_a_policy_on_the_gpu_takes_a_fixed_number_of_kernels_at_most(counted, what):
    # the kinds that are drawn differ from batch to batch
    for each in (counted[size][what] for size in (SMALL, LARGE)):
        assert each["syncs"] == {} and each["copies"] == {}
        assert 4 < each["launches"] <= {"policy": 24, "policy and noise": 42}.get(what, 70)


def test_an_evaluation_waits_at_its_end_alone(counted):
    one, five = (counted[SMALL][f"evaluate {batches}"] for batches in (1, 5))
    assert one["copies"] == five["copies"] == {}
    assert one["syncs"] == five["syncs"] and len(one["syncs"]) == 1


def test_memory_that_is_not_pinned_would_be_seen(counted):
    assert [why.rsplit(" ", 1)[1] for why in counted[SMALL]["pageable"]["copies"]] == ["pageable"]
