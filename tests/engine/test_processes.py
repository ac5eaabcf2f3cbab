"""The process group of a command: it is closed at the end, other people's is left alone, and the next run gets a new one."""

import json
import time

import pytest
import torch
from forking import forked, forked_ranks
from launching import WORKERS
from tiny_run import RESNET, images, supervised_arguments

from scalekd_ds.engine import processes


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return images(tmp_path_factory.mktemp("data"))


def runs(data, tmp_path, *configs):
    slim = ("--micro_batch_size", 4, "--student_kwargs", json.dumps(RESNET), "--run.stop_after", 2)
    every = [
        [str(word) for word in supervised_arguments(data, tmp_path / str(i), *slim, "--run.ds_config", config)]
        for i, config in enumerate(configs)
    ]
    (tmp_path / "runs.json").write_text(json.dumps(every))
    return tmp_path / "runs.json"


def left_of(done, tmp_path, ranks=1):
    """By rank: whether a process group was left after each of the runs."""
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return [json.loads((tmp_path / f"left-{rank}.json").read_text()) for rank in range(ranks)]


def test_commands_of_one_process_each_close_their_connections(data, tmp_path):
    done = forked(WORKERS / "verb_many.py", runs(data, tmp_path, "zero1", "zero3", "zero0"))
    assert left_of(done, tmp_path) == [[False, False, False]]
    assert "destroy_process_group" not in done.stderr and "Traceback" not in done.stderr
    assert [json.loads((tmp_path / str(i) / "results.json").read_text())["step"] for i in range(3)] == [2, 2, 2]


def test_two_ranks_close_their_connections(data, tmp_path):
    done = forked_ranks(WORKERS / "verb_many.py", runs(data, tmp_path, "zero2"))
    assert left_of(done, tmp_path, ranks=2) == [[False], [False]]
    assert "destroy_process_group" not in done.stderr and "Traceback" not in done.stderr


def test_a_process_group_of_the_caller_is_left_alone(data, tmp_path):
    done = forked(WORKERS / "verb_many.py", runs(data, tmp_path, "zero1"), "--own-group")
    assert left_of(done, tmp_path) == [[True]]


def test_an_end_that_never_comes_is_not_waited_for(tmp_path):
    """As where another rank was killed after it had finished: the process ends well, since its own work is done."""
    code = """
import time
import torch
from deepspeed import comm as dist
from scalekd_ds.engine import processes
processes._CLOSE_S = 1.0
processes.start_processes()
dist.destroy_process_group = lambda: time.sleep(1000)
print("the work is done")
processes.end_processes()
"""
    script, began = tmp_path / "never.py", time.monotonic()
    script.write_text(code)
    done = forked(script)
    assert (done.returncode, done.stdout.splitlines()[-1]) == (0, "the work is done"), done.stderr[-2000:]
    assert time.monotonic() - began < 900


def test_nothing_is_closed_where_nothing_was_begun(monkeypatch):
    """A process group of the caller's goes on."""
    before = torch.distributed.is_initialized()
    monkeypatch.setattr(processes, "_own", [])
    processes.end_processes()
    assert torch.distributed.is_initialized() == before
