"""A job whose ranks are all stopped for a while (`scontrol suspend`, `docker pause`, Ctrl-Z and fg) goes on."""

import multiprocessing
import os
import signal
import time
from datetime import timedelta

import pytest
from launching import free_port
from torch.distributed import TCPStore

from scalekd_ds.cluster import heartbeat
from scalekd_ds.cluster.heartbeat import EXIT_LOST, Heartbeat

_FORKS = multiprocessing.get_context("fork")
TIMEOUT = 1.0


def rank(number, port, folder, began, hang_timeout):
    """Makes progress until it is ended."""
    heartbeat._INTERVAL_S, heartbeat._STOPPED_S = 0.1, 0.5
    store = TCPStore("127.0.0.1", port, 2, is_master=number == 0, timeout=timedelta(seconds=20))
    with Heartbeat(store, number, 2, folder, TIMEOUT, hang_timeout) as own:
        for step in range(10_000):
            own.progress(step)
            if step == 20:
                began.set()
            time.sleep(0.05)


@pytest.fixture
def job(tmp_path):
    """Two ranks that have heard of each other, and their processes."""
    port = free_port()
    began = [_FORKS.Event() for _ in range(2)]
    ranks = [_FORKS.Process(target=rank, args=(n, port, tmp_path, began[n], 1.0)) for n in range(2)]
    for process in ranks:
        process.start()
    try:
        for event in began:
            assert event.wait(60)
        yield ranks
    finally:
        for process in ranks:
            process.kill()
            process.join()


@pytest.mark.parametrize("order", [(0, 1), (1, 0)])
@pytest.mark.parametrize("seconds", [1.5, pytest.param(4.0, marks=pytest.mark.slow)])
def test_all_ranks_may_be_stopped_for_longer_than_the_timeouts(job, order, seconds):
    for process in job:
        os.kill(process.pid, signal.SIGSTOP)
    time.sleep(seconds)
    for number in order:
        os.kill(job[number].pid, signal.SIGCONT)
    time.sleep(2 * TIMEOUT)
    assert [process.is_alive() for process in job] == [True, True]
    # and a rank that dies then is noticed as ever
    job[1].kill()
    job[0].join(20)
    assert job[0].exitcode == EXIT_LOST


def test_one_rank_that_is_stopped_is_lost(job):
    os.kill(job[1].pid, signal.SIGSTOP)
    job[0].join(20)
    assert job[0].exitcode == EXIT_LOST
