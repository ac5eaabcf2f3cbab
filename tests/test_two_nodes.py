"""One job over two nodes, started as on a real cluster: the launcher, a hosts file, pdsh and ssh."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from cluster import Cluster, skip_reason
from PIL import Image
from safetensors.torch import load_file

REPO = Path(__file__).parents[1]
WORKERS = Path(__file__).parent / "workers"
TRAIN = REPO / "launch" / "train.py"
# another number of threads sums in another order, which this small a network turns into a visible difference
THREADS = "1"

pytestmark = pytest.mark.cluster


@pytest.fixture
def cluster(tmp_path):
    if reason := skip_reason():
        pytest.skip(reason)
    with Cluster(2, tmp_path) as cluster:
        yield cluster


def launch(cluster: Cluster, tmp_path: Path, script: Path, *args: str, timeout: float) -> str:
    """Runs `script` on every node, from the repository's root as users do, and returns all that was printed."""
    # Only PYTHON* and a few more reach other nodes by themselves: the launcher exports the rest from this file, which
    # is named by its whole path lest a user's own in the home folder be read instead.
    environment = {
        "DS_ACCELERATOR": "cpu",
        "GLOO_SOCKET_IFNAME": "eth0",
        "OMP_NUM_THREADS": THREADS,
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
        # both nodes must find the one communication op that DeepSpeed builds: it takes a minute to compile
        "TORCH_EXTENSIONS_DIR": os.environ.get("TORCH_EXTENSIONS_DIR", ""),
        "HF_HUB_OFFLINE": "1",
    }
    exports = tmp_path / "deepspeed_env"
    exports.write_text("".join(f"{name}={value}\n" for name, value in environment.items() if value))
    env = {**cluster.env, "DS_ENV_FILE": str(exports), "DS_ACCELERATOR": "cpu"}
    command = [sys.executable, "-m", "deepspeed.launcher.runner", "--hostfile", cluster.hostfile]
    command += ["--launcher", "pdsh", script, *args]
    with (tmp_path / "launch.log").open("w+") as log:
        # a file, not a pipe: a rank that outlives a timeout would hold a pipe open
        job = subprocess.Popen(command, cwd=REPO, env=env, stdin=subprocess.DEVNULL, stdout=log, stderr=log)
        try:
            status = job.wait(timeout)
        finally:
            # the nodes' own processes end with the cluster
            job.kill()
            job.wait()
            log.seek(0)
            output = log.read()
            print(output)
    assert status == 0, output[-3000:]
    return output


def write_job(folder: Path) -> Path:
    """A file for --config: four steps of ScaleKD on random images, with no BatchNorm, whose statistics are a rank's own."""
    rng = np.random.default_rng(0)
    for name in ("train/a", "train/b", "val/a", "val/b"):
        images = folder / "images" / name
        images.mkdir(parents=True)
        for i in range(8):
            Image.fromarray(rng.integers(0, 256, (32, 32, 3), dtype=np.uint8)).save(images / f"{i}.jpg")
    job = {
        "student": "convnext_atto",
        "student_kwargs": {"depths": [1, 1, 1, 1], "dims": [8, 16, 24, 32], "output_stride": 8},
        "teacher": "swin_tiny_patch4_window7_224",
        "teacher_kwargs": {
            "img_size": 32,
            "embed_dim": 12,
            "depths": [1, 1],
            "num_heads": [1, 2],
            "window_size": 4,
            "num_classes": 2,
        },
        "teacher_weights": "none",
        "global_batch_size": 8,
        "micro_batch_size": 4,
        "distill": {"norm": "layer"},
        "data": {"root": str(folder / "images"), "image_size": 32, "threads": 1},
        "schedule": {"epochs": 2},
        # linear in the gradient, unlike AdamW, whose first steps turn rounding into whole steps
        "optim": {"name": "sgd", "lr": 0.05},
        "run": {"ds_config": "cpu_fp32"},
    }
    path = folder / "job.json"
    path.write_text(json.dumps(job))
    return path


def test_two_nodes_meet(cluster, tmp_path):
    output = launch(cluster, tmp_path, WORKERS / "hello_nodes.py", timeout=300)
    # pdsh puts `node: ` before every line
    met = [json.loads(line.split("hello ", 1)[1]) for line in output.splitlines() if ": hello {" in line]
    assert sorted(m["host"] for m in met) == ["node1", "node2"]
    assert [m["world"] for m in met] == [2, 2]
    assert [m["sum"] for m in met] == [3.0, 3.0]


def test_two_nodes_train(cluster, tmp_path):
    job = write_job(tmp_path)
    one, two = tmp_path / "one", tmp_path / "two"
    alone = [sys.executable, TRAIN, "--config", job, "--run.dir", one]
    env = {**os.environ, "DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": THREADS}
    subprocess.run(alone, cwd=REPO, env=env, stdin=subprocess.DEVNULL, check=True, timeout=300)
    launch(cluster, tmp_path, TRAIN, "--config", str(job), "--run.dir", str(two), timeout=300)

    assert len(list((two / "checkpoints").glob("*/rng_rank*.pt"))) == 2, "both nodes took part"
    expected, trained = (load_file(run / "student.safetensors") for run in (one, two))
    # biases start at zero
    assert any(expected[name].abs().max() > 1e-4 for name in expected if name.endswith("fc.bias")), "nothing was learnt"
    # the samples, their crops and the micro batches are the same on one node and on two
    torch.testing.assert_close(trained, expected, rtol=1e-4, atol=1e-6)
