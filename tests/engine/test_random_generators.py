"""States of random generators: of the GPU that a process computes on, and of checkpoints from other places."""

import io
import random

import numpy as np
import pytest
import torch

from scalekd_ds.rng import rng_state, seed_everything, set_rng_state


class FakeGpus:
    """torch.cuda's functions for generators, with a number for each GPU's state."""

    def __init__(self, monkeypatch, count: int, current: int) -> None:
        self.states = [torch.tensor([10 + n], dtype=torch.uint8) for n in range(count)]
        self.current, self.asked = current, set()
        for name, function in {
            "is_initialized": lambda: True,
            "device_count": lambda: count,
            "current_device": lambda: current,
            "get_rng_state": self.get,
            "set_rng_state": self.set,
        }.items():
            monkeypatch.setattr(torch.cuda, name, function)

    def get(self, device="cuda"):
        number = self.current if device == "cuda" else torch.device(device).index
        self.asked.add(number)
        return self.states[number]

    def set(self, state, device="cuda"):
        number = self.current if device == "cuda" else torch.device(device).index
        self.asked.add(number)
        self.states[number] = state

    def numbers(self) -> list[int]:
        return [int(state) for state in self.states]


def reloaded(state):
    """As a checkpoint's file gives it back."""
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


def draws() -> tuple:
    return random.random(), float(np.random.rand()), float(torch.rand(()))


def test_a_restored_state_draws_the_same_numbers():
    seed_everything(3)
    state = reloaded(rng_state())
    first = draws()
    draws()
    set_rng_state(state)
    assert draws() == first


def test_a_rank_saves_and_restores_its_own_gpu_and_starts_no_other(monkeypatch):
    gpus = FakeGpus(monkeypatch, count=8, current=5)
    state = reloaded(rng_state())
    gpus.states[5] = torch.tensor([99], dtype=torch.uint8)
    set_rng_state(state)
    assert gpus.numbers() == [10, 11, 12, 13, 14, 15, 16, 17]
    assert gpus.asked == {5}


@pytest.mark.parametrize(("count", "current"), [(8, 5), (1, 0), (2, 1)])
def test_a_state_goes_to_the_current_gpu_of_any_number(monkeypatch, count, current):
    """One rank may see all GPUs of its node, and on another start only its own."""
    state = rng_state() | {"cuda": [torch.tensor([77], dtype=torch.uint8)]}
    gpus = FakeGpus(monkeypatch, count, current)
    set_rng_state(reloaded(state))
    assert gpus.numbers()[current] == 77
    assert gpus.asked == {current}


def test_the_states_of_all_gpus_are_those_of_an_earlier_release(monkeypatch):
    state = rng_state() | {"cuda": [torch.tensor([70 + n], dtype=torch.uint8) for n in range(4)]}
    gpus = FakeGpus(monkeypatch, count=4, current=2)
    set_rng_state(reloaded(state))
    assert gpus.numbers() == [10, 11, 72, 13]
    # of four GPUs then, none was the seventh
    gpus = FakeGpus(monkeypatch, count=8, current=6)
    set_rng_state(reloaded(state))
    assert gpus.numbers() == [10 + n for n in range(8)]


def test_a_run_may_go_on_from_gpus_on_cpus_and_back(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: False)
    on_cpus = rng_state()
    assert on_cpus["cuda"] == []
    # the CPU's own generators are restored, and nobody asks for a GPU
    set_rng_state(on_cpus | {"cuda": [torch.tensor([70], dtype=torch.uint8)]})
    gpus = FakeGpus(monkeypatch, count=2, current=1)
    set_rng_state(reloaded(on_cpus))
    assert gpus.numbers() == [10, 11]


@pytest.mark.gpu
def test_a_gpus_generator_is_seeded_saved_and_restored():
    seed_everything(5)
    first = torch.rand(8, device="cuda").cpu()
    seed_everything(5)
    assert torch.equal(torch.rand(8, device="cuda").cpu(), first)
    state = reloaded(rng_state())
    drawn = torch.rand(8, device="cuda").cpu()
    assert not torch.equal(drawn, first)
    set_rng_state(state)
    assert torch.equal(torch.rand(8, device="cuda").cpu(), drawn)
