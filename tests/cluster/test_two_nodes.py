"""One job over two nodes, started as on a real cluster: the launcher, a hosts file, pdsh and ssh."""

import json
import os
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from forking import forked
from image_fixtures import make_dataset
from launching import LIMIT, ROOT, WORKERS, in_background, run, wait_until
from netns_cluster import Cluster, skip_reason
from safetensors.torch import load_file
from tiny_run import without_batchnorm

from scalekd_ds.checkpoint.layout import checkpoints_of
from scalekd_ds.checkpoint.load import choose_checkpoint

DOCTOR = ROOT / "launch" / "doctor.py"
TRAIN = ROOT / "launch" / "train.py"
# another number of threads sums in another order, which this small a network turns into a visible difference
THREADS = "1"

pytestmark = pytest.mark.cluster


@pytest.fixture
def cluster(tmp_path):
    if reason := skip_reason():
        pytest.skip(reason)
    with Cluster(2, tmp_path) as cluster:
        yield cluster


def launch(cluster: Cluster, tmp_path: Path, script: Path, *args: str, timeout: float, more: str = "") -> str:
    """Runs `script` on every node, from the repository's root as users do, and returns all that was printed."""
    if " " in str(ROOT):
        pytest.skip(f"{ROOT} has a blank: DeepSpeed's launcher does not quote the folder in which other nodes start")
    # Only PYTHON* and a few more reach other nodes by themselves: the launcher exports the rest from this file, which
    # is named by its whole path lest a user's own in the home folder be read instead.
    environment = {
        "DS_ACCELERATOR": "cpu",
        "GLOO_SOCKET_IFNAME": "eth0",
        "OMP_NUM_THREADS": THREADS,
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
        # both nodes must find the operators that DeepSpeed builds: each takes a minute to compile
        "TORCH_EXTENSIONS_DIR": os.environ.get("TORCH_EXTENSIONS_DIR", ""),
        "HF_HUB_OFFLINE": "1",
    }
    # where another processor is emulated, the nodes are such ones too: its instructions round otherwise
    environment |= {name: os.environ.get(name, "") for name in ("ONEDNN_MAX_CPU_ISA", "ATEN_CPU_CAPABILITY")}
    exports = tmp_path / "deepspeed_env"
    exports.write_text(more + "".join(f"{name}={value}\n" for name, value in environment.items() if value))
    env = {**cluster.env, "DS_ENV_FILE": str(exports), "DS_ACCELERATOR": "cpu"}
    command = [sys.executable, "-m", "deepspeed.launcher.runner", "--hostfile", cluster.hostfile]
    log = tmp_path / "launch.log"
    # the nodes' own processes end with the cluster
    with in_background([*command, "--launcher", "pdsh", script, *args], log, env) as job:
        status = job.wait(timeout)
    assert status == 0, log.read_text()[-3000:]
    return log.read_text()


def together(
    cluster: Cluster, commands: dict[int, list[str]], timeout: float
) -> list[subprocess.CompletedProcess[str]]:
    """Runs one command on each node at the same time."""
    with ThreadPoolExecutor(len(commands)) as pool:
        jobs = [pool.submit(cluster.run, node, [str(c) for c in cmd], timeout) for node, cmd in commands.items()]
        return [job.result() for job in jobs]


def write_job(folder: Path) -> Path:
    """A file for --config: four steps, the same ones on one node and on two."""
    data = make_dataset(folder / "images", train=16, val=16, classes=2, size=(32, 32))
    path = folder / "job.json"
    path.write_text(json.dumps(without_batchnorm(data)))
    return path


@pytest.mark.slow
def test_ranks_on_two_nodes_reduce_together(cluster, tmp_path):
    output = launch(cluster, tmp_path, WORKERS / "hello_nodes.py", timeout=LIMIT)
    # pdsh puts `node: ` before every line
    met = [json.loads(line.split("hello ", 1)[1]) for line in output.splitlines() if ": hello {" in line]
    assert sorted(m["host"] for m in met) == ["node1", "node2"]
    assert [m["world"] for m in met] == [2, 2]
    assert [m["sum"] for m in met] == [3.0, 3.0]


def test_two_nodes_train_the_weights_that_one_node_trains(cluster, tmp_path):
    """And exported values arrive as they were written: from the doctor's file through DeepSpeed, pdsh, ssh and shells."""
    job = write_job(tmp_path)
    one, two = tmp_path / "one", tmp_path / "two"
    alone = forked(TRAIN, "--config", job, "--run.dir", one)
    assert alone.returncode == 0, alone.stderr[-3000:]
    value = "^mlx5_0:1,=mlx5_1 a;touch x|b&c(d)<e>{f}*?[g]~#@+/.-"
    written = doctor(cluster, tmp_path, "--write-env", f"ODD={value}", "--skip", "bandwidth", "all-reduce")
    assert written.returncode == 0, written.stdout + written.stderr
    worker = tmp_path / "print_and_train.py"
    worker.write_text(
        "import os, runpy, sys\n"
        "os.write(1, f\"odd {os.environ['ODD']!r}\\n\".encode())\n"
        f"sys.path[0] = {str(TRAIN.parent)!r}\n"
        f"runpy.run_path({str(TRAIN)!r}, run_name='__main__')\n"
    )
    exports = (tmp_path / "doctor_env").read_text()
    job = ("--config", str(job), "--run.dir", str(two))
    output = launch(cluster, tmp_path, worker, *job, timeout=LIMIT, more=exports)
    assert sorted(line for line in output.splitlines() if ": odd " in line) == [
        f"node{i}: odd {value!r}" for i in (1, 2)
    ]

    assert len(list((two / "checkpoints").glob("*/rng_rank*.pt"))) == 2, "both nodes took part"
    expected, trained = (load_file(run / "student.safetensors") for run in (one, two))
    # biases start at zero
    assert any(expected[name].abs().max() > 1e-4 for name in expected if name.endswith("fc.bias")), "nothing was learnt"
    # the samples, their crops and the micro batches are the same on one node and on two
    torch.testing.assert_close(trained, expected, rtol=1e-4, atol=1e-6)


@pytest.mark.slow
def test_a_launcher_on_each_node_needs_no_ssh(cluster):
    """`--no_ssh`: somebody else starts one launcher on each node."""
    environment = {"DS_ACCELERATOR": "cpu", "GLOO_SOCKET_IFNAME": "eth0", "OMP_NUM_THREADS": THREADS}
    words = [f"{name}={value}" for name, value in environment.items()]

    def command(node: int) -> list:
        launcher = [sys.executable, "-m", "deepspeed.launcher.runner", "--hostfile", cluster.hostfile, "--no_ssh"]
        own = ["--node_rank", node - 1, "--master_addr", "10.77.0.1", WORKERS / "hello_nodes.py"]
        return ["env", "-C", ROOT, *words, *launcher, *own]

    done = together(cluster, {node: command(node) for node in (1, 2)}, timeout=LIMIT)
    assert [d.returncode for d in done] == [0, 0], done[0].stderr[-2000:] + done[1].stderr[-2000:]
    met = [json.loads(line.removeprefix("hello ")) for d in done for line in d.stdout.splitlines() if "hello {" in line]
    assert [(m["host"], m["rank"], m["world"], m["sum"]) for m in met] == [("node1", 0, 2, 3.0), ("node2", 1, 2, 3.0)]


def doctor(cluster: Cluster, tmp_path: Path, *arguments) -> subprocess.CompletedProcess[str]:
    # another node's memory is this machine's, and its network has no wire
    limits = ["--min-memory", "0.05", "--min-disk", "0.1", "--min-bandwidth", "0"]
    env = {**cluster.env, "DS_ENV_FILE": str(tmp_path / "doctor_env")}
    command = [sys.executable, DOCTOR, "--hostfile", cluster.hostfile, *limits, *arguments]
    return run(command, 120, env)


def test_the_doctor_sees_two_nodes_and_what_is_wrong_with_them(cluster, tmp_path):
    whole = doctor(
        cluster,
        tmp_path,
        *("--write-env", "GLOO_SOCKET_IFNAME=eth0", "DS_ACCELERATOR=cpu", f"OMP_NUM_THREADS={THREADS}"),
        *("--json", tmp_path / "report.json"),
    )
    print(whole.stdout, whole.stderr)
    assert whole.returncode == 0, whole.stdout + whole.stderr
    report = json.loads((tmp_path / "report.json").read_text())
    assert [host["facts"]["hostname"] for host in report["hosts"].values()] == ["node1", "node2"]
    # by the address that the hosts file's name leads to, both ways, and a sum over both by the job's own interface
    assert [host["facts"]["address"] for host in report["hosts"].values()] == ["10.77.0.1", "10.77.0.2"]
    assert [(p["from"], p["to"]) for p in report["bandwidth"]] == [("node1", "node2"), ("node2", "node1")]
    assert report["all_reduce"]["backend"] == "gloo" and report["all_reduce"]["seconds"] > 0

    refused = doctor(
        cluster, tmp_path, "--ssh", "ssh -o PubkeyAuthentication=no -o BatchMode=yes", "--skip", "all-reduce"
    )
    assert refused.returncode == 1
    assert "node2: its sshd takes no key of yours: ssh-copy-id node2" in refused.stdout

    cluster.cut(2)
    cut = doctor(cluster, tmp_path, "--json", tmp_path / "report.json", "--skip", "bandwidth", "all-reduce")
    assert cut.returncode == 1
    assert "node2: it does not answer" in cut.stdout and "\nnode1: " not in cut.stdout
    assert json.loads((tmp_path / "report.json").read_text())["passed"] == ["node1"]


@pytest.mark.slow
def test_a_slurm_job_looks_first_and_saves_when_its_time_is_up(cluster, tmp_path):
    """launch/slurm.sh itself; srun and scontrol are stand-ins that reach the nodes by ssh."""
    job, run_dir = write_job(tmp_path), tmp_path / "run"
    env = {
        **cluster.env,
        "PATH": f"{ROOT / 'tests' / 'helpers' / 'fake_slurm'}:{Path(sys.executable).parent}:{cluster.env['PATH']}",
        "FAKE_SLURM": str(tmp_path),
        "DS_ACCELERATOR": "cpu",
        "GLOO_SOCKET_IFNAME": "eth0",
        "OMP_NUM_THREADS": THREADS,
        "SLURM_JOB_ID": "4711",
        "SLURM_JOB_NODELIST": "node1,node2",
        "DOCTOR": "--min-memory 0.05 --min-disk 0.1 --skip bandwidth all-reduce",
    }
    arguments = ["--config", job, "--run.dir", run_dir, "--schedule.epochs", "5000", "--run.save_every", "20"]
    log = tmp_path / "slurm.log"
    with in_background(["bash", ROOT / "launch" / "slurm.sh", *arguments], log, env) as script:
        wait_until(lambda: list(run_dir.glob("checkpoints/step*/manifest.json")), script, log)
        for node in (1, 2):
            group = (tmp_path / f"step-node{node}.pgid").read_text().strip()
            assert cluster.run(node, ["kill", "-USR1", "--", f"-{group}"]).returncode == 0
        status = script.wait(LIMIT)
    output = log.read_text()
    assert status == 0, output[-3000:]
    assert "2 of 2 nodes pass" in output
    # saved by both ranks where they were told, which is no multiple of save_every but by chance
    newest = max(run_dir.glob("checkpoints/step*"), key=lambda path: int(path.name.removeprefix("step")))
    assert len(list(newest.glob("rng_rank*.pt"))) == 2 and (newest / "manifest.json").is_file()
    assert f"stopped at step {int(newest.name.removeprefix('step'))} of 10000 (SIGUSR1)" in output
    assert not list(ROOT.glob(".hosts-*"))


@pytest.mark.slow
@pytest.mark.parametrize("fault", ["cut", "crash"])
def test_a_node_that_is_gone_ends_the_job_and_is_named(cluster, tmp_path, fault):
    job, run_dir = write_job(tmp_path), tmp_path / "run"
    more = ["--config", job, "--run.dir", run_dir, "--schedule.epochs", 4000, "--run.save_every", 5]
    more += ["--run.eval_every", 0, "--run.rank_timeout", 15]
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
        done = cluster.run(node, [str(word) for word in ("env", "-C", ROOT, *words, *launcher, *own)], timeout=LIMIT)
        return done, time.monotonic()

    with ThreadPoolExecutor(2) as pool:
        jobs = {node: pool.submit(start, node) for node in (1, 2)}
        deadline = time.monotonic() + LIMIT
        while not checkpoints_of(run_dir):
            assert time.monotonic() < deadline and not any(j.done() for j in jobs.values()), "no checkpoint"
            time.sleep(0.1)
        getattr(cluster, fault)(2)
        happened = time.monotonic()
        ends = {node: job.result() for node, job in jobs.items()}

    # long before the ten minutes that the transport would wait
    (first, ended), (second, second_ended) = ends[1], ends[2]
    text = first.stdout + first.stderr
    assert first.returncode != 0 and ended - happened < 580, text[-3000:]
    assert "rank 1" in text and "node2" in text and "--run.resume auto" in text, text[-3000:]
    if fault == "cut":
        # its processes live on behind the cut, and end by themselves
        text = second.stdout + second.stderr
        assert second.returncode != 0 and second_ended - happened < 580, text[-3000:]
        assert "rank 0" in text and "node1" in text, text[-3000:]
    assert choose_checkpoint(run_dir, "auto") == checkpoints_of(run_dir)[-1]
