"""A link that is cut and a node that crashes under a job on two nodes: every rank that is left ends soon, and says why."""

import os
import sys
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
from test_two_nodes import REPO, THREADS, TRAIN, cluster, write_job

from scalekd_ds.checkpoint import checkpoints_of, choose

__all__ = ["cluster"]

pytestmark = pytest.mark.cluster
RANK_TIMEOUT = 8


@pytest.mark.parametrize("fault", ["cut", pytest.param("crash", marks=pytest.mark.slow)])
def test_a_node_that_is_gone_ends_the_job_by_name(cluster, tmp_path, fault):
    job, run_dir = write_job(tmp_path), tmp_path / "run"
    more = ["--config", job, "--run.dir", run_dir, "--schedule.epochs", 4000, "--run.save_every", 5]
    more += ["--run.eval_every", 0, "--run.rank_timeout", RANK_TIMEOUT]
    environment = {
        "DS_ACCELERATOR": "cpu",
        "GLOO_SOCKET_IFNAME": "eth0",
        "OMP_NUM_THREADS": THREADS,
        "TORCH_EXTENSIONS_DIR": os.environ.get("TORCH_EXTENSIONS_DIR", ""),
    }

    def start(node: int):
        words = [f"{name}={value}" for name, value in environment.items() if value]
        launcher = [sys.executable, "-m", "deepspeed.launcher.runner", "--hostfile", cluster.hostfile, "--no_ssh"]
        own = ["--node_rank", node - 1, "--master_addr", "10.77.0.1", TRAIN, *more]
        done = cluster.run(node, [str(word) for word in ("env", "-C", REPO, *words, *launcher, *own)], timeout=300)
        return done, time.monotonic()

    with ThreadPoolExecutor(2) as pool:
        jobs = {node: pool.submit(start, node) for node in (1, 2)}
        deadline = time.monotonic() + 200
        while not checkpoints_of(run_dir):
            assert time.monotonic() < deadline and not any(j.done() for j in jobs.values()), "no checkpoint"
            time.sleep(0.1)
        getattr(cluster, fault)(2)
        happened = time.monotonic()
        ends = {node: job.result() for node, job in jobs.items()}

    (first, ended), (second, second_ended) = ends[1], ends[2]
    text = first.stdout + first.stderr
    assert first.returncode != 0 and ended - happened < 60, text[-3000:]
    assert "rank 1" in text and "node2" in text and "--run.resume auto" in text, text[-3000:]
    if fault == "cut":
        # its processes live on behind the cut, and end by themselves
        text = second.stdout + second.stderr
        assert second.returncode != 0 and second_ended - happened < 60, text[-3000:]
        assert "rank 0" in text and "node1" in text, text[-3000:]
    assert choose(run_dir, "auto") == checkpoints_of(run_dir)[-1]
