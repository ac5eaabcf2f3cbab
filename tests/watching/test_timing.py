"""Times of the parts of a step on a GPU: by events, of which few are kept, and without a wait but where they are read."""

import pytest
import torch

from scalekd_ds.watching import timing
from scalekd_ds.watching.timing import StepTimer


class Gpu:
    """A GPU that takes a second for each event that is recorded, and that lags behind."""

    def __init__(self):
        self.made = self.recorded = self.passed = self.waits = 0

    def synchronize(self):
        self.waits += 1
        self.passed = self.recorded

    def event(self, enable_timing):
        assert enable_timing
        self.made += 1
        return Event(self)


class Event:
    def __init__(self, gpu):
        self.gpu, self.at = gpu, None

    def record(self):
        self.gpu.recorded += 1
        self.at = self.gpu.recorded

    def query(self):
        return self.at <= self.gpu.passed

    def elapsed_time(self, end):
        assert self.query() and end.query(), "it would wait, or raise"
        return 1e3 * (end.at - self.at)


@pytest.fixture
def gpu(monkeypatch):
    gpu = Gpu()
    monkeypatch.setattr(torch.cuda, "Event", gpu.event)
    monkeypatch.setattr(torch.cuda, "synchronize", gpu.synchronize)
    monkeypatch.setattr(timing, "_MOST_EVENTS", 20)
    return gpu


def step(timer):
    """Twelve collectives in a backward pass, and an update: 14 pairs of events."""
    with timer.part("data_wait"):
        pass
    with timer.part("backward"):
        for _ in range(12):
            with timer.part("communication"):
                pass
    with timer.part("optimizer"):
        pass


def test_many_steps_without_a_look_neither_wait_nor_pile_up_events(gpu):
    timer = StepTimer(torch.device("cuda", 0))
    for number in range(100):
        step(timer)
        # the GPU is a step behind
        gpu.passed = max(0, gpu.recorded - 28)
        assert len(timer._events) <= 48, number
    assert gpu.waits == 0 and gpu.made <= 100
    wall, shares = timer.read()
    assert gpu.waits == 1
    assert shares["communication"] * wall == pytest.approx(100 * 12.0)
    assert shares["backward"] * wall == pytest.approx(100 * 25.0)
    assert shares["optimizer"] * wall == pytest.approx(100 * 1.0)
    # the next window begins with nothing
    assert set(timer.read()[1]) == set() and gpu.waits == 1


def test_events_under_way_are_forgotten_and_never_recorded_again(gpu):
    timer = StepTimer(torch.device("cuda", 0))
    step(timer)
    timer.reset()
    step(timer)
    wall, shares = timer.read()
    assert shares["communication"] * wall == pytest.approx(12.0) and gpu.made == 2 * 2 * 14


@pytest.mark.gpu
def test_parts_of_a_gpu_are_timed_without_a_wait():
    timer = StepTimer(torch.device("cuda", torch.cuda.current_device()))
    a = torch.randn(4096, 4096, device="cuda")
    for _ in range(3):
        a @ a
    torch.cuda.synchronize()
    timer.reset()
    torch.cuda.set_sync_debug_mode("error")
    try:
        for _ in range(timing._MOST_EVENTS + 50):
            with timer.part("losses"):
                a.add_(0.0)
        with timer.part("backward"):
            torch.cuda._sleep(1_000_000_000)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    wall, shares = timer.read()
    # a billion cycles, of half a nanosecond each
    assert shares["backward"] * wall > 0.2
    assert 0.0 < shares["losses"] < 1.0
