"""How the benchmarks time: in turn, the device's time and not the host's, and a variant that raises costs no other."""

import importlib
import sys

import pytest
import torch
from launching import ROOT

sys.path.append(str(ROOT / "benchmarks"))
harness, timing = map(importlib.import_module, ("harness", "timing"))
events = importlib.import_module("fake_cuda.events")
CPU, CUDA = torch.device("cpu"), torch.device("cuda", 0)
MS = 1e-3


class Clock:
    """A host's clock that only moves when something takes time."""

    def __init__(self):
        self.now = 1.0

    def take(self, seconds):
        self.now += seconds


@pytest.fixture
def host(monkeypatch):
    clock = Clock()
    monkeypatch.setattr(timing.time, "perf_counter", lambda: clock.now)
    return clock


@pytest.fixture
def timeline(host):
    with events.timed_by(events.Timeline(lambda: host.now, host.take)) as timeline:
        yield timeline


@pytest.fixture
def kernel(host, timeline):
    """A call whose Python takes 2 ms, and whose kernel takes 0.1 ms."""

    def call():
        host.take(2 * MS)
        timeline.launch(0.1 * MS)

    return call


def test_alternation_runs_every_variant_in_every_round():
    calls = []
    variants = {name: lambda name=name: calls.append(name) for name in "abc"}
    readings = timing.alternate(variants, CPU, repeats=3, warmup=1)
    assert "".join(calls) == "abc" + "abc" + "bca" + "cab"
    assert all(len(read.seconds) == 3 and min(read.seconds) >= 0 for read in readings.values())
    assert {read.how for read in readings.values()} == {"clock"}
    with pytest.raises(ValueError, match="repeats is 0"):
        timing.alternate(variants, CPU, repeats=0)


def test_ratios_are_taken_within_a_round():
    # the machine halves its speed in the second round: the ratio stays
    assert timing.speedup([2.0, 4.0, 2.0], [1.0, 2.0, 1.0]) == {"median": 2.0, "p20": 2.0, "p80": 2.0}
    assert timing.quantiles([1.0, 2.0, 3.0, 4.0, 5.0, 6.0]) == pytest.approx({"median": 3.5, "p20": 2.0, "p80": 5.0})


def test_a_variant_that_raises_is_noted_and_the_others_are_measured():
    def refuses():
        raise RuntimeError("not this\n  one")

    left = [3]

    def fails_later():
        left[0] -= 1
        if left[0] < 0:
            raise ValueError("out of turns")

    readings = timing.alternate({"a": refuses, "b": lambda: None, "c": fails_later}, CPU, repeats=4, warmup=1)
    assert timing.summary(readings["a"]) == {"error": "RuntimeError: not this one"}
    assert timing.summary(readings["c"]) == {"error": "ValueError: out of turns"}
    assert len(readings["b"].seconds) == 4
    with pytest.raises(RuntimeError, match="a could not be measured: RuntimeError: not this one"):
        timing.seconds_of(readings)


def test_a_kernel_is_replayed_from_a_graph_and_the_hosts_time_stays_out(kernel):
    read = timing.alternate({"kernel": kernel}, CUDA, repeats=3, launched="ahead")["kernel"]
    assert read.how == "graph" and read.no_graph is None
    assert read.seconds == pytest.approx([0.1 * MS] * 3)
    found = timing.summary(read)
    assert found["timed_by"] == "graph" and found["median"] == pytest.approx(0.1)


# a capture comes after four calls: the first meets the check for operators that wait, the second the capture itself
@pytest.mark.parametrize(("why", "calls"), [("an operator that waits", 4), ("a synchronize", 5)])
def test_a_call_that_cannot_be_captured_has_a_head_start(host, timeline, why, calls):
    """It waits in its first calls alone, as code that fills a cache does."""
    left = [calls]

    def call():
        host.take(2 * MS)
        left[0] -= 1
        if left[0] >= 0:
            timeline.fetch() if why == "an operator that waits" else torch.cuda.synchronize()
        timeline.launch(0.1 * MS)

    read = timing.alternate({"kernel": call}, CUDA, repeats=3, launched="ahead")["kernel"]
    assert read.how == "head start" and read.host_ahead
    assert read.seconds == pytest.approx([0.1 * MS] * 3)
    assert read.no_graph.startswith(
        "RuntimeError: c" if why == "an operator that waits" else "RuntimeError: CUDA error"
    )
    assert read.host_seconds == pytest.approx([2 * MS] * 3)


def test_a_call_that_always_waits_is_said_to_be_late(host, timeline):
    def call():
        host.take(2 * MS)
        timeline.fetch()
        timeline.launch(0.1 * MS)

    read = timing.alternate({"kernel": call}, CUDA, repeats=2, launched="ahead")["kernel"]
    assert read.how == "head start" and read.host_ahead is False
    assert timing.summary(read)["host_ahead"] is False


def test_a_step_is_timed_as_it_runs_with_the_hosts_time_beside(kernel, host, timeline):
    """Bound by launches, the device's time is the host's; else the host is done early."""

    def large():
        host.take(1 * MS)
        timeline.launch(30 * MS)

    readings = timing.alternate({"small": kernel, "large": large}, CUDA, repeats=2)
    assert {read.how for read in readings.values()} == {"events"}
    small, big = (timing.summary(readings[name]) for name in ("small", "large"))
    assert small["median"] == pytest.approx(2.1) and small["host_ms"] == pytest.approx(2.0)
    assert big["median"] == pytest.approx(31.0) and big["host_ms"] == pytest.approx(1.0)
    assert "host_ahead" not in big


def test_the_device_asked_for_becomes_the_current_one(monkeypatch):
    chosen = []
    monkeypatch.setattr(torch.cuda, "set_device", chosen.append)
    assert timing.device_of("cuda:1") == torch.device("cuda", 1)
    assert timing.device_of("cpu") == CPU
    assert chosen == [1]
    monkeypatch.undo()
    with pytest.raises(ValueError, match="device is 'gpu': it must be a device of this machine"):
        timing.device_of("gpu")


def test_float32_is_float32_within():
    switches = (torch.backends.cuda.matmul, torch.backends.cudnn)
    before = [switch.allow_tf32 for switch in switches]
    with harness.without_tf32():
        assert not any(switch.allow_tf32 for switch in switches)
    assert [switch.allow_tf32 for switch in switches] == before
    assert before[1], "cuDNN takes TF32 by default, which is why it is switched off"


def test_ceilings_of_float32_are_measured_without_tf32(monkeypatch):
    """The 16-bit ones leave the switches alone."""
    seen = []
    alternate = timing.alternate

    def spy(calls, *arguments, **keywords):
        seen.append(torch.backends.cudnn.allow_tf32)
        return alternate({"copy": lambda: None} if "copy" in calls else dict.fromkeys(calls, lambda: None), CPU, 1)

    monkeypatch.setattr(timing, "alternate", spy)
    harness.ceilings(CPU, 1, ["fp32"])
    assert seen == [True, False]


@pytest.mark.gpu
def test_a_gpu_is_timed_by_a_graph_where_one_can_be_captured():
    """A product of some ms is the same time by a graph, by a head start and between plain events."""
    device = timing.device_of("cuda")
    a = torch.randn(8192, 8192, device=device, dtype=torch.bfloat16)

    def waits():
        torch.cuda.synchronize()
        return a @ a

    calls = {"captured": lambda: a @ a, "waits": waits}
    readings = timing.alternate(calls, device, 5, warmup=3, launched="ahead")
    assert readings["captured"].how == "graph", readings["captured"].no_graph
    assert readings["captured"].host_ahead is not None
    assert readings["waits"].how == "head start" and readings["waits"].no_graph
    assert readings["waits"].host_ahead is False
    plain = timing.alternate({"plain": lambda: a @ a}, device, 5, warmup=3)["plain"]
    found = [min(read.seconds) for read in (readings["captured"], plain)]
    assert max(found) < 1.5 * min(found)
    # 1.1 TFLOP takes longer than 0.5 ms on any GPU of today
    assert min(found) > 2e-4


@pytest.mark.gpu
def test_a_backward_pass_is_captured_on_a_gpu():
    device = timing.device_of("cuda")
    w = torch.randn(64, 64, device=device, requires_grad=True)
    x = torch.randn(4096, 64, device=device)

    def both():
        return torch.autograd.grad((x @ w).relu().sum(), [w])

    read = timing.alternate({"both": both}, device, 5, warmup=3, launched="ahead")["both"]
    assert read.how == "graph", read.no_graph
    # a plain call between events would be Python's time, some 0.1 ms
    assert read.host_ahead is None or min(read.host_seconds) < 1e-3
