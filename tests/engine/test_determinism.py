"""`run.deterministic`: what it sets, what an operator without such an algorithm ends with, and two equal steps on a GPU."""

import os

import pytest
import torch
from torch import nn

from scalekd_ds.config import RunConfig, RunDirConfig
from scalekd_ds.engine.determinism import choose_algorithms, naming_the_setting
from scalekd_ds.errors import UserError

WORKSPACE = "CUBLAS_WORKSPACE_CONFIG"


@pytest.fixture(autouse=True)
def _as_before():
    """What torch is set to is that of the process."""
    cudnn, memory = torch.backends.cudnn, torch.utils.deterministic
    before = cudnn.benchmark, cudnn.deterministic, memory.fill_uninitialized_memory
    workspace = os.environ.pop(WORKSPACE, None)
    yield
    cudnn.benchmark, cudnn.deterministic, memory.fill_uninitialized_memory = before
    torch.use_deterministic_algorithms(False)
    os.environ.pop(WORKSPACE, None)
    if workspace is not None:
        os.environ[WORKSPACE] = workspace


def settings() -> dict:
    return {
        "benchmark": torch.backends.cudnn.benchmark,
        "cudnn": torch.backends.cudnn.deterministic,
        "algorithms": torch.are_deterministic_algorithms_enabled(),
        # attention's backward passes go by it
        "warns only": torch.is_deterministic_algorithms_warn_only_enabled(),
        "fills memory": torch.utils.deterministic.fill_uninitialized_memory,
        "workspace": os.environ.get(WORKSPACE),
    }


def test_a_deterministic_run_on_gpus_takes_no_other_algorithm():
    choose_algorithms(True, "cuda")
    assert settings() == {
        "benchmark": False,
        "cudnn": True,
        "algorithms": True,
        "warns only": False,
        "fills memory": False,
        "workspace": ":4096:8",
    }


def test_a_workspace_that_repeats_is_kept_and_another_is_not(monkeypatch):
    monkeypatch.setenv(WORKSPACE, ":16:8")
    choose_algorithms(True, "cuda")
    assert os.environ[WORKSPACE] == ":16:8"
    monkeypatch.setenv(WORKSPACE, ":0:0")
    choose_algorithms(True, "cuda")
    assert os.environ[WORKSPACE] == ":4096:8"


def test_cudnn_tries_its_convolutions_in_other_runs_on_gpus():
    choose_algorithms(False, "cuda")
    found = settings()
    assert (found["benchmark"], found["cudnn"], found["algorithms"], found["workspace"]) == (True, False, False, None)


@pytest.mark.parametrize("deterministic", [False, True])
def test_nothing_is_set_on_cpus(deterministic):
    before = settings()
    choose_algorithms(deterministic, "cpu")
    assert settings() == before


def test_it_is_a_setting_of_the_run_that_is_off():
    assert RunConfig().as_dict()["run"]["deterministic"] is False
    assert RunConfig(run=RunDirConfig(deterministic=True)).as_dict()["run"]["deterministic"] is True


def alert() -> None:
    """torch's own words for an operator without a deterministic algorithm, from one that the CPU has."""
    torch.use_deterministic_algorithms(True)
    torch.empty(10).put_(torch.tensor([0]), torch.tensor([1.0]), accumulate=False)


def test_an_operator_without_such_an_algorithm_is_named_with_the_setting():
    said = r"run\.deterministic is true, and put_ .* --run\.deterministic false"
    with pytest.raises(UserError, match=said), naming_the_setting(True):
        alert()


def test_other_errors_stay_what_they_are():
    with pytest.raises(RuntimeError, match="CUDA error"), naming_the_setting(True):
        raise RuntimeError("CUDA error: an illegal memory access was encountered")
    # of a program that sets it itself
    with pytest.raises(RuntimeError, match="use_deterministic_algorithms"), naming_the_setting(False):
        alert()


def steps_of(device: str) -> torch.Tensor:
    """The weights after three steps with convolutions, a maximum pool, attention and a resized map."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(3, 64, 7, 2, 3), nn.BatchNorm2d(64), nn.ReLU(), nn.MaxPool2d(3, 2, 1)).to(device)
    qkv, head = nn.Linear(64, 192).to(device), nn.Linear(64, 10).to(device)
    parameters = [*net.parameters(), *qkv.parameters(), *head.parameters()]
    optimizer = torch.optim.SGD(parameters, lr=0.1, momentum=0.9)
    images, labels = torch.randn(16, 3, 64, 64).to(device), torch.randint(10, (16,)).to(device)
    for _ in range(3):
        with torch.autocast(device, torch.bfloat16):
            tokens = net(images.contiguous(memory_format=torch.channels_last)).flatten(2).transpose(1, 2)
            q, k, v = qkv(tokens).unflatten(2, (3, 4, 16)).permute(2, 0, 3, 1, 4)
            attended = nn.functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
            loss = nn.functional.cross_entropy(head(attended.mean(1)).float(), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return torch.cat([p.detach().flatten() for p in parameters]).cpu()


@pytest.mark.gpu
def test_two_runs_of_a_gpu_are_equal_bit_for_bit(monkeypatch):
    # cuBLAS reads its workspace once in a process, and tests before this one may have started it
    monkeypatch.setenv(WORKSPACE, ":4096:8")
    choose_algorithms(True, "cuda")
    first = steps_of("cuda")
    assert first.isfinite().all()
    assert torch.equal(first, steps_of("cuda"))
