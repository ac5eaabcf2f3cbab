"""A job of ranks that hang or are lost is ended by the heartbeat, which names them, and not by a limit of torch's."""

import json
import mmap
import multiprocessing
import os
import socket
import subprocess
import sys
import time
from datetime import timedelta
from pathlib import Path

import pytest
import torch
from forking import forked_ranks
from launching import WORKERS, free_port
from tiny_run import RESNET, images, supervised_arguments

from scalekd_ds.cluster import heartbeat
from scalekd_ds.cluster.heartbeat import EXIT_LOST, Heartbeat
from scalekd_ds.engine.time_limits import NO_LIMIT, silence_watchdog

FAULTY = WORKERS / "faulty_train.py"
_FORKS = multiprocessing.get_context("fork")
HANDLING, MONITORING = "TORCH_NCCL_ASYNC_ERROR_HANDLING", "TORCH_NCCL_ENABLE_MONITORING"


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return images(tmp_path_factory.mktemp("data"))


def arguments(data, run_dir, *more):
    slim = ("--micro_batch_size", 4, "--run.log_every", 1, "--student_kwargs", json.dumps(RESNET))
    return supervised_arguments(data, run_dir, *slim, "--schedule.epochs", 1, *more)


def test_ranks_wait_for_a_slow_one_for_longer_than_a_collective_may_take(data, tmp_path):
    done = forked_ranks(FAULTY, "limited-pause:2", *arguments(data, tmp_path / "run"))
    assert done.returncode == 0, done.stderr[-3000:]
    assert json.loads((tmp_path / "run" / "results.json").read_text())["step"] == 5


def test_a_hang_ends_by_its_own_limit_though_that_of_collectives_is_shorter(data, tmp_path):
    done = forked_ranks(FAULTY, "limited-hang:3", *arguments(data, tmp_path / "run", "--run.hang_timeout", 10))
    assert done.returncode == EXIT_LOST, done.stderr[-3000:]
    assert "no rank got on for 10 s (rank 0 at step 3, rank 1 at step 3)" in done.stderr
    assert "Traceback" not in done.stderr, done.stderr[-3000:]
    stacks = [(tmp_path / "run" / "stacks" / f"rank{rank}.txt").read_text() for rank in range(2)]
    # rank 1 may have ended a moment before, at which the collective of rank 0 failed
    assert "in faulty" in stacks[1] and ("in _loop" in stacks[0] or "in raise_if_lost" in stacks[0])


def test_a_rank_that_is_stopped_while_models_are_built_is_named(data, tmp_path):
    done = forked_ranks(FAULTY, "stop:building", *arguments(data, tmp_path / "run", "--run.rank_timeout", 8))
    assert done.returncode == EXIT_LOST, done.stderr[-3000:]
    assert f"rank 1 on {socket.gethostname()} (process " in done.stderr
    assert "is dead or cannot be reached: no word for 8 s" in done.stderr
    assert "Traceback" not in done.stderr


def test_all_groups_are_freed_of_their_limits():
    code = """
import torch
from datetime import timedelta
from torch import distributed
distributed.init_process_group("gloo", store=distributed.HashStore(), rank=0, world_size=1, timeout=timedelta(seconds=7))
groups = [distributed.group.WORLD, distributed.new_group(), distributed.new_group(backend="gloo")]
from scalekd_ds.engine.time_limits import NO_LIMIT, lift_time_limits
backends = [group._get_backend(torch.device("cpu")) for group in groups]
assert backends[0].options._timeout == timedelta(seconds=7)
lift_time_limits()
for backend in backends:
    assert backend.options._timeout == NO_LIMIT, backend.options._timeout
"""
    run_alone(code)


def run_alone(code: str) -> None:
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]


def test_no_limit_fits_into_a_system_call():
    assert NO_LIMIT / timedelta(milliseconds=1) < 2**31


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ({}, {HANDLING: "0", MONITORING: "0"}),
        ({HANDLING: "1"}, {HANDLING: "1", MONITORING: "0"}),
        ({HANDLING: "3", MONITORING: "1"}, {HANDLING: "3", MONITORING: "1"}),
        ({"NCCL_ASYNC_ERROR_HANDLING": "1"}, {"NCCL_ASYNC_ERROR_HANDLING": "1", MONITORING: "0"}),
        # torchrun's own default is no wish of the user's
        ({"TORCHELASTIC_RUN_ID": "1", HANDLING: "1"}, {"TORCHELASTIC_RUN_ID": "1", HANDLING: "0", MONITORING: "0"}),
        ({"TORCHELASTIC_RUN_ID": "1", HANDLING: "3"}, {"TORCHELASTIC_RUN_ID": "1", HANDLING: "3", MONITORING: "0"}),
    ],
)
def test_the_watchdog_of_nccl_ends_no_process_unless_the_user_asks_for_it(monkeypatch, before, after):
    for name in (HANDLING, MONITORING, "NCCL_ASYNC_ERROR_HANDLING", "TORCHELASTIC_RUN_ID"):
        monkeypatch.delenv(name, raising=False)
    for name, value in before.items():
        monkeypatch.setenv(name, value)
    others = {name: value for name, value in os.environ.items() if name not in before}
    try:
        silence_watchdog(os.environ)
        assert {name: value for name, value in os.environ.items() if name not in others} == after
    finally:
        for name in set(os.environ) - set(others) - set(before):
            del os.environ[name]


def test_torch_still_knows_the_variables_of_its_watchdog():
    """Where torch has NCCL. A name that it no longer reads would let it end jobs again, and nothing would say so."""
    library = Path(torch.__file__).parent / "lib" / "libtorch_cuda.so"
    if not library.is_file():
        pytest.skip("this torch has no NCCL")
    with library.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
        assert content.find(HANDLING.encode()) >= 0 and content.find(MONITORING.encode()) >= 0


# without a heartbeat, after which a rank is lost; a machine under load may keep one waiting for a second
QUIET_S = 3.0


def ends_of(rank, folder):
    """The exit statuses of two processes that are ranks, each by `rank(folder, port, number)`."""
    port = free_port()
    ranks = [_FORKS.Process(target=rank, args=(folder, port, number)) for number in range(2)]
    for process in ranks:
        process.start()
    for process in ranks:
        process.join(60)
    return [process.exitcode for process in ranks]


def broken(folder, port, number):
    heartbeat._INTERVAL_S, heartbeat._NETWORK_S = 0.1, 0.5
    store = torch.distributed.TCPStore("127.0.0.1", port, 2, is_master=number == 0, timeout=timedelta(seconds=20))
    seen = iter([None] * 5)
    with Heartbeat(store, number, 2, folder, QUIET_S, 0.0, lambda: next(seen, "NCCL reports COMM_ERROR")) as own:
        for step in range(600):
            own.progress(step)
            time.sleep(0.05)


def test_broken_connections_of_ranks_that_all_live_end_the_job(tmp_path, capfd):
    assert EXIT_LOST in ends_of(broken, tmp_path)
    assert "NCCL reports COMM_ERROR, and no rank is lost: look at the network" in capfd.readouterr().err


def failing(folder, port, number):
    heartbeat._INTERVAL_S = 0.1
    store = torch.distributed.TCPStore("127.0.0.1", port, 2, is_master=number == 0, timeout=timedelta(seconds=20))
    with Heartbeat(store, number, 2, folder, QUIET_S, 0.0) as own:
        for step in range(10 if number else 600):
            own.progress(step)
            time.sleep(0.05)
        raise KeyError("weights")


def test_a_rank_that_failed_is_named_by_those_that_still_wait_for_it(tmp_path, capfd):
    """As under NCCL, whose collectives raise no error."""
    assert ends_of(failing, tmp_path) == [EXIT_LOST, 1]
    assert "failed: KeyError: 'weights': no word for 3 s." in capfd.readouterr().err


def unheard(folder, port, number):
    heartbeat._INTERVAL_S, heartbeat._FIRST_BEAT_S = 0.1, 1.0
    store = torch.distributed.TCPStore("127.0.0.1", port, 2, is_master=number == 0, timeout=timedelta(seconds=20))
    if number == 1:
        # it has met the others, and ends before its first heartbeat
        return
    with Heartbeat(store, number, 2, folder, QUIET_S, 0.0):
        time.sleep(60)


def test_a_rank_that_is_never_heard_of_is_named(tmp_path, capfd):
    assert ends_of(unheard, tmp_path)[0] == EXIT_LOST
    assert "rank 1 has met the others, and has not been heard of since: no word for 3 s" in capfd.readouterr().err


def test_the_first_step_may_take_longer_than_a_hang(tmp_path, monkeypatch):
    monkeypatch.setattr(heartbeat, "_INTERVAL_S", 0.05)
    ended = []
    monkeypatch.setattr(Heartbeat, "_exit", lambda self, reason: ended.append(reason))
    with Heartbeat(None, 0, 1, tmp_path, 5.0, 0.2) as own:
        time.sleep(1.0)
        assert not ended
        own.progress(1)
        time.sleep(1.0)
        assert ended and "no rank got on for 0 s (rank 0 at step 1)" in ended[0]


@pytest.mark.gpu
def test_nccl_takes_the_limits_and_reports_no_error():
    pytest.importorskip("deepspeed")
    run_alone(
        f"""
import os
import torch
from datetime import timedelta
os.environ.pop("DS_ACCELERATOR", None)
from deepspeed import comm as dist
from scalekd_ds.engine.processes import end_processes, start_processes
from scalekd_ds.engine.time_limits import NO_LIMIT, lift_time_limits, nccl_error
device = start_processes()
assert device.type == "cuda" and torch.distributed.get_backend() == "nccl"
assert os.environ["{HANDLING}"] == "0" and os.environ["{MONITORING}"] == "0"
second = torch.distributed.new_group()
ones = torch.ones(1 << 20, device=device)
dist.all_reduce(ones)
torch.distributed.all_reduce(ones, group=second)
lift_time_limits()
for group in (torch.distributed.group.WORLD, second):
    assert group._get_backend(device).options._timeout == NO_LIMIT
dist.all_reduce(ones)
torch.cuda.synchronize()
assert ones.min().item() == 1.0 and nccl_error() is None
end_processes()
assert not torch.distributed.is_initialized()
"""
    )
