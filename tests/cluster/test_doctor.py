"""The doctor on simulated nodes: a command that stands in for ssh runs each node's agent here, with faults of its own."""

import asyncio
import json
import os
import shlex
import shutil
import socket
import subprocess
import sys
import threading
from dataclasses import replace
from pathlib import Path

import pytest
from forking import forked_with
from launching import LIMIT, ROOT, alone

from scalekd_ds.cluster.doctor import agent, checks, examine
from scalekd_ds.cluster.doctor.checks import GIB, Limits
from scalekd_ds.cluster.doctor.remote import remote_command

DOCTOR = ROOT / "launch" / "doctor.py"
FAKE = ROOT / "tests" / "helpers" / "fake_ssh.py"
# this machine is shared: it is not the one that is looked at
EASY = Limits(memory=0.05, disk=0.1, bandwidth=0, skew=2)


def fake(tmp_path: Path, faults: dict) -> list[str]:
    (tmp_path / "faults.json").write_text(json.dumps(faults))
    return [sys.executable, str(FAKE), str(tmp_path / "faults.json")]


def look(tmp_path: Path, hosts: dict[str, int], faults: dict, **more) -> examine.Report:
    defaults = {"data": {}, "limits": EASY, "skip": ("all-reduce",)}
    return examine.examine(hosts, fake(tmp_path, faults), {}, **(defaults | more))


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """An ImageFolder-shaped place with an index, and a copy of it without one."""
    from PIL import Image

    from scalekd_ds.data.sources.open import open_source

    root = tmp_path_factory.mktemp("doctor_data")
    for name in ("train/a", "train/b", "val/a", "val/b"):
        (root / name).mkdir(parents=True)
        for i in range(3):
            Image.new("RGB", (8, 8), (i, i, i)).save(root / name / f"{i}.png")
    for name in ("train", "val"):
        open_source(root / name, "data")
    return root


def test_six_ill_nodes_of_32_are_named(tmp_path, data):
    """The command itself; six nodes are ill in six ways, and the others pass."""
    copy = tmp_path / "copy"
    shutil.copytree(
        ROOT, copy, symlinks=True, ignore=shutil.ignore_patterns(".git", ".venv*", "runs", "tests", "__pycache__")
    )
    with (copy / "scalekd_ds" / "losses.py").open("a") as file:
        file.write("# another line\n")
    # importlib.metadata takes the first on the path, which is the job's folder
    (copy / "torch-1.0.0.dist-info").mkdir()
    (copy / "torch-1.0.0.dist-info" / "METADATA").write_text("Metadata-Version: 2.1\nName: torch\nVersion: 1.0.0\n")
    clock = tmp_path / "late_python"
    clock.write_text(
        f"#!{sys.executable}\nimport sys, time\nreal = time.time\ntime.time = lambda: real() - 900\nexec(sys.argv[-1])\n"
    )
    clock.chmod(0o755)
    other = tmp_path / "other_data"
    shutil.copytree(data, other)
    (other / "train" / "a" / "0.png").unlink()
    faults = {
        "node3": {"say": "node3: Permission denied (publickey).", "status": 255},
        # an environment inside the repository stays where it is
        "node7": {"replace": [[str(ROOT), str(copy)], [f"{copy}/.venv", f"{ROOT}/.venv"]]},
        "node12": {"replace": [[sys.executable, str(clock)]]},
        "node20": {"replace": [[sys.executable, "/nowhere/python"]]},
        "node25": {"say": "ssh: Could not resolve hostname node25: Name or service not known", "status": 255},
        "node31": {"replace": [[str(ROOT), "/nowhere/repository"]]},
        **{f"node{i}": {"delay": 1.0} for i in (1, 2, 30)},
    }
    hosts = tmp_path / "hosts"
    hosts.write_text("".join(f"node{i} slots=1\n" for i in range(1, 33)))
    done = alone(
        DOCTOR,
        *("--hostfile", hosts, "--recipe", "fashion-ce", "--data.root", data, "--skip", "all-reduce"),
        *("--ssh", shlex.join(map(str, fake(tmp_path, faults))), "--json", tmp_path / "report.json"),
        *("--min-memory", 0.05, "--min-disk", 0.1, "--min-bandwidth", 0, "--max-skew", 60),
        timeout=LIMIT,
    )
    assert done.returncode == 1, done.stdout + done.stderr
    problems = [line for line in done.stdout.splitlines() if line.startswith("node")]
    expected = {
        "node3": ["its sshd takes no key of yours: ssh-copy-id node3"],
        "node7": ["the code's hash is", "torch is 1.0.0, most others have"],
        "node12": ["its clock is -"],
        "node20": ["it has no Python at"],
        "node25": ["its name does not resolve here"],
        "node31": ["it has no folder"],
    }
    for host, texts in expected.items():
        for text in texts:
            assert any(line.startswith(f"{host}: ") and text in line for line in problems), (host, text)
    assert {line.split(":")[0] for line in problems} == set(expected)
    report = json.loads((tmp_path / "report.json").read_text())
    assert report["passed"] == [f"node{i}" for i in range(1, 33) if f"node{i}" not in expected]
    # everyone who answered sent to the next one who did, and was timed
    answered = [name for name, host in report["hosts"].items() if host["facts"]]
    ring = list(zip(answered, [*answered[1:], answered[0]], strict=True))
    assert [(pair["from"], pair["to"]) for pair in report["bandwidth"]] == ring
    assert all(pair["gbit_per_s"] > 0 for pair in report["bandwidth"])
    assert report["hosts"]["node1"]["facts"]["address"] == "127.0.1.1"
    assert report["hosts"]["node1"]["facts"]["data"]["data.train"]["files"] == 6
    assert done.stdout.splitlines()[-1] == "26 of 32 nodes pass: 7 problems"


def test_a_healthy_machine_passes_with_a_real_all_reduce(tmp_path):
    report = look(tmp_path, {"node1": 1, "node2": 1}, {}, skip=())
    assert [problem.text for problem in report.problems] == []
    assert report.backend == "gloo" and report.all_reduce_s > 0
    assert set(report.rates) == {("node1", "node2"), ("node2", "node1")}
    # one machine has one clock: what is seen of a difference lies within the question's way there and back
    assert all(abs(ahead) <= trip for ahead, trip in report.offsets.values())


def test_a_rank_that_does_not_come_is_waited_for_and_the_part_is_named(tmp_path):
    """The time counts from when a rank has loaded torch, and `--timeout` sets it."""
    alone = {"node2": {"env": {"GLOO_SOCKET_IFNAME": "eth77"}}}
    report = look(tmp_path, {"node1": 1, "node2": 1}, alone, skip=("bandwidth",), reduce_timeout=4.0)
    assert any("eth77" in text or "Unable to find address" in text for text in report.problems_of("node2"))
    assert "all-reduce: the meeting of the ranks is not done within 4 s" in report.problems_of("node1")


def test_a_node_whose_name_is_a_loopback_address_is_named(tmp_path, monkeypatch):
    name = {"node2": {"env": {"GLOO_SOCKET_IFNAME": ""}}}
    report = look(tmp_path, {"node1": 1, "node2": 1}, name)
    address = socket.gethostbyname(socket.gethostname())
    expected = (
        []
        if not address.startswith("127.")
        else [
            f"its name {socket.gethostname()} resolves to {address} there, which no other node reaches, and gloo takes: "
            "correct its /etc/hosts, or name the interface with --write-env GLOO_SOCKET_IFNAME=eth0"
        ]
    )
    assert report.problems_of("node2") == expected and report.problems_of("node1") == []
    # a job on this node alone needs no other address
    assert look(tmp_path, {"node2": 1}, name).problems == []
    # what is set for the launcher reaches no node
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "eth5")
    everywhere = {node: {"env": {"GLOO_SOCKET_IFNAME": ""}} for node in ("node1", "node2")}
    (text,) = look(tmp_path, {"node1": 1, "node2": 1}, everywhere).problems_of(examine.HERE)
    assert "GLOO_SOCKET_IFNAME is eth5 here" in text and "--write-env GLOO_SOCKET_IFNAME=eth5" in text


@pytest.mark.parametrize(
    ("address", "is_problem"),
    [("127.0.1.1", True), ("127.0.0.1", True), ("::1", True), ("10.0.0.3", False), ("eth0", False), ("lo", False)],
)
def test_gloo_is_reached_by_other_nodes_unless_it_listens_on_a_loopback_address(address, is_problem):
    facts = {"node1": {"gloo": address, "hostname": "gpu07"}, "node2": {"gloo": "10.0.0.4", "hostname": "gpu08"}}
    found = [problem.host for problem in checks.gloo_problems({"node1": 8, "node2": 8}, facts)]
    assert found == (["node1"] if is_problem else [])


@pytest.mark.parametrize(
    ("nccl", "gloo", "taken"),
    [
        ("eth0", None, "eth0"),
        ("=ib0", None, "ib0"),
        ("eth0", "ib0", "ib0"),
        ("eth0", "", "eth0"),
        # a beginning of names, a list, an exclusion, and what this machine does not have
        ("eth", None, None),
        ("eth0,ib0", None, None),
        ("^docker0", None, None),
        ("eth7", None, None),
        (None, None, None),
    ],
)
def test_gloo_follows_nccl_to_an_interface(nccl, gloo, taken):
    given = {"NCCL_SOCKET_IFNAME": nccl, "GLOO_SOCKET_IFNAME": gloo}
    environment = {name: value for name, value in given.items() if value is not None}
    agent.follow_nccl(environment, ["lo", "eth0", "ib0"])
    assert environment.get("GLOO_SOCKET_IFNAME") == taken


def test_the_result_is_found_among_what_nccl_prints():
    """Lines as NCCL 2.27 prints them."""
    said = [
        "gpu07:12:12 [0] NCCL INFO Bootstrap: Using eth0:10.0.0.3<0>",
        "gpu07:12:12 [0] NCCL INFO NET/IB : Using [0]mlx5_0:1/IB [RO]; OOB eth0:10.0.0.3<0>",
        '{"seconds": 0.25}',
        "gpu07:12:12 [0] NCCL INFO comm 0x5 rank 0 nranks 2 - Destroy COMPLETE",
    ]
    other = ['{"seconds": 0.5}']
    found = agent.reduced(["\n".join(said), "\n".join(other)])
    assert found == {"seconds": 0.5, "nccl": "[0]mlx5_0:1/IB [RO]; OOB eth0:10.0.0.3<0>"}
    assert agent.reduced(["\n".join(other)]) == {"seconds": 0.5, "nccl": None}
    assert agent.reduced(["\n".join(other), "killed"]) == {"error": "a rank ended without its result"}


def test_gpus_get_more_time(tmp_path, monkeypatch):
    asked = []

    async def ask(node, action, timeout, /, **request):
        asked.append((action, timeout, request.get("env", {}).get("DOCTOR_SECONDS")))
        return {"port": 1} if action == "free_port" else {"seconds": 0.1, "nccl": None}

    monkeypatch.setattr(examine.Node, "ask", ask)
    for gpus, seconds in (([], 21.0), ([{"name": "H200"}], 61.0)):
        report = examine.Report({"a": 1, "b": 1})
        report.facts = {name: {"gpus": gpus, "accelerator": None, "master": "10.0.0.1"} for name in ("a", "b")}
        asyncio.run(examine._all_reduce(report, [examine.Node(name, []) for name in ("a", "b")], None))
        assert asked[1:] == [("reduce", seconds + examine.START_TIMEOUT_S + 5, str(seconds))] * 2
        asked.clear()


@pytest.mark.gpu
def test_the_all_reduce_is_over_gloo_and_nccl_on_a_gpu(tmp_path):
    gpu = {"node1": {"env": {"DS_ACCELERATOR": "cuda"}}}
    report = look(tmp_path, {"node1": 1}, gpu, skip=("bandwidth",), limits=replace(EASY, gpu_free=0))
    assert report.problems == [] and report.backend == "nccl" and report.all_reduce_s > 0


def test_a_node_that_never_answers_is_given_up(tmp_path, monkeypatch):
    # long enough for node1 on a busy machine
    monkeypatch.setattr(examine, "FACTS_TIMEOUT_S", 12.0)
    report = look(tmp_path, {"node1": 1, "node2": 1}, {"node2": {"hang": LIMIT}}, skip=("bandwidth", "all-reduce"))
    assert report.problems_of("node1") == [] and "no answer (facts) within 12 s" in report.problems_of("node2")[0]
    assert report.passed == {"node1": 1}


def test_gpus_are_compared_with_the_slots_and_with_other_nodes(tmp_path, monkeypatch):
    def machine(name: str, lines: list[str], status: int = 0) -> dict:
        folder = tmp_path / name
        folder.mkdir()
        smi = folder / "nvidia-smi"
        smi.write_text("#!/bin/sh\ncat <<'END'\n" + "\n".join(lines) + f"\nEND\nexit {status}\n")
        smi.chmod(0o755)
        return {"env": {"PATH": f"{folder}:{os.environ['PATH']}"}}

    good = "NVIDIA H100 80GB HBM3, 580.65, 81559, 81000"
    faults = {
        "node1": machine("one", [good, good]),
        "node2": machine("two", [good]),
        "node3": machine("three", [good, good.replace("81000", "20000")]),
        "node4": machine("four", [good.replace("580.65", "535.1")] * 2),
        "node5": machine("five", ["Failed to initialize NVML: Driver/library version mismatch"], 18),
        "node6": machine("six", [good.replace("H100", "A100")] * 2),
    }
    # every node would say that its job is meant for CPUs
    monkeypatch.delenv("DS_ACCELERATOR", raising=False)
    report = look(tmp_path, dict.fromkeys(faults, 2), faults, skip=("bandwidth", "all-reduce"))
    assert report.problems_of("node1") == []
    assert report.problems_of("node2")[0].startswith("it has 1 GPUs for slots=2")
    assert report.problems_of("node3")[0].startswith("GPU 1 has 20 of 80 GiB free")
    assert report.problems_of("node4") == [
        "the driver is 535.1, most others have 580.65: install the same driver there"
    ]
    assert report.problems_of("node5")[0].startswith("nvidia-smi fails")
    assert "the GPU is NVIDIA A100" in report.problems_of("node6")[0] and len(report.problems_of("node6")) == 1


@pytest.fixture(scope="module")
def facts(data):
    """What the agent says of this machine."""
    places = {"data.train": str(data / "train"), "data.val": str(data / "val")}
    return agent.facts({"run_dir": "runs/none", "data": places, "data_seconds": LIMIT})


def test_the_agents_facts_are_those_of_this_machine(facts, data):
    import psutil
    import torch

    assert facts["versions"]["python"] == sys.version.split()[0]
    assert facts["versions"]["torch"] == torch.__version__.split("+")[0]
    assert facts["versions"]["cuda"] == torch.version.cuda
    assert facts["memory"] == pytest.approx(psutil.virtual_memory().available, rel=0.2)
    assert facts["disk"] == pytest.approx(shutil.disk_usage(ROOT).free, rel=0.05)
    assert facts["data"]["data.val"]["files"] == 6
    commit = subprocess.run(["git", "rev-parse", "HEAD"], cwd=ROOT, capture_output=True, text=True).stdout.strip()
    assert (facts["code"]["commit"] or "") == commit


def test_the_index_is_told_apart_by_content_and_not_by_time(data, tmp_path):
    from scalekd_ds.data.sources.open import open_source

    def index(root: Path) -> str | None:
        return agent.data({"t": str(root)}, LIMIT)["t"]["index"]

    copy = tmp_path / "copy"
    shutil.copytree(data / "train", copy)
    os.utime(copy / "a", (1, 1))
    open_source(copy, "data")
    assert index(copy) == index(data / "train") is not None
    (copy / "a" / "0.png").unlink()
    open_source(copy, "data")
    assert index(copy) not in (None, index(data / "train"))
    shutil.copytree(data / "val", tmp_path / "new", ignore=shutil.ignore_patterns(".scalekd*"))
    assert index(tmp_path / "new") is None


def test_data_is_looked_for_and_compared(facts, tmp_path):
    for name in ("x-000.tar", "x-001.tar", "y-000.tar"):
        (tmp_path / name).write_bytes(b"")
    said = agent.data({"shards": f"{tmp_path}/x-{{000..001}}.tar", "gone": f"{tmp_path}/z", "far": "/nowhere/z"}, LIMIT)
    assert said["shards"]["files"] == 2
    assert "no such file" in said["gone"]["error"] and "No such file" in said["far"]["error"]

    def with_data(**train) -> dict:
        return {**facts, "data": {"data.train": train}}

    nodes = {
        "a": with_data(files=6, index="x" * 64),
        "b": with_data(files=6, index=None),
        "c": with_data(files=5, index="y" * 64),
        "d": with_data(files=None, index="x" * 64),
        "e": with_data(error="'/data/train': No such file or directory"),
    }
    found = [(problem.host, problem.text) for problem in checks.data_problems(nodes)]
    assert found == [
        ("e", "data.train: '/data/train': No such file or directory: mount or copy the data there"),
        ("c", "data.train: the number of files is 5, most others have 6: copy the data there again"),
        ("c", "data.train: the index's hash is yyyyyyyyyyyy, most others have xxxxxxxxxxxx: copy the data there again"),
    ]


def test_clocks_links_memory_and_disk_beyond_a_limit_are_named(facts):
    limits = Limits()
    offsets = {"a": (0.1, 0.01), "b": (3.0, 0.01), "c": (-0.2, 0.01), "d": (3.0, 2.5)}
    assert [p.host for p in checks.clock_problems(offsets, limits)] == ["b"]
    rates = {("a", "b"): 20.0, ("b", "c"): 0.5, ("c", "d"): 2.0, ("d", "a"): 22.0}
    assert [p.host for p in checks.bandwidth_problems(rates, limits)] == ["b", "c"]
    assert not list(checks.bandwidth_problems(rates, Limits(bandwidth=0)))
    nodes = {"a": {**facts, "memory": 17 * GIB, "disk": 11 * GIB}, "b": {**facts, "memory": 15 * GIB, "disk": 9 * GIB}}
    found = [(p.host, p.text.split(":")[0]) for p in checks.capacity_problems({"a": 8, "b": 8}, nodes, limits)]
    assert found == [
        ("b", "15.0 GiB of memory are free, 16.0 are asked for"),
        ("b", "9.0 GiB are free where the run's folder goes, 10.0 are asked for"),
    ]


def test_the_listener_takes_nothing_but_the_token_and_only_on_its_address():
    token = os.urandom(32)
    listener = agent.Listener("127.0.1.9", token.hex(), LIMIT)
    with pytest.raises(OSError):
        socket.create_connection(("127.0.0.1", listener.port), timeout=LIMIT)
    for wrong in (b"", os.urandom(32), token[:31]):
        with socket.create_connection(("127.0.1.9", listener.port), timeout=LIMIT) as stranger:
            stranger.sendall(wrong)
            stranger.shutdown(socket.SHUT_WR)
            assert stranger.recv(1) == b""
    # one who says nothing does not keep the peer out
    with socket.create_connection(("127.0.1.9", listener.port), timeout=LIMIT):
        sender = threading.Thread(target=agent.send, args=("127.0.1.9", listener.port, token.hex(), 0.3))
        sender.start()
        sender.join()
        listener.thread.join(LIMIT)
    assert listener.result["bytes"] > 0 and listener.result["bytes"] % agent.BLOCK == 0
    with pytest.raises(OSError):
        socket.create_connection(("127.0.1.9", listener.port), timeout=LIMIT)


def test_nothing_that_is_exported_is_read_by_the_shell(tmp_path):
    value = "a b;touch x$(id)`id`'\"\\"
    command = remote_command({"NCCL_X": value}).replace(" -u -c ", " -c 'import os; print(os.environ[\"NCCL_X\"])' ", 1)
    done = subprocess.run(["sh", "-c", command], capture_output=True, text=True, timeout=LIMIT)
    assert done.stdout == value + "\n"


def test_mistakes_are_one_line_before_any_ssh(tmp_path):
    bad = tmp_path / "hosts"
    bad.write_text("node1 slots=1\nnode2;reboot slots=1\n")
    called = tmp_path / "called"
    ssh = shlex.join(["touch", str(called)])
    cases = [
        (["--hostfile", bad, "--ssh", ssh], "line 2: 'node2;reboot' is no host name"),
        (["--hostfile", tmp_path / "nowhere", "--ssh", ssh], "does not exist"),
        (["--ssh", ssh], "no --hostfile is given"),
        (["--hostfile", "launch/hosts", "--ssh", "'"], "No closing quotation"),
        (["--hostfile", "launch/hosts", "--ssh", ssh, "--min-disk", "-1"], "must not be negative"),
        (["--hostfile", "launch/hosts", "--ssh", ssh, "--recipe", "nothing"], "unknown recipe 'nothing'"),
        (["--hostfile", "launch/hosts", "--ssh", ssh, "--write-env", "A=$(id)"], "has the character '$'"),
    ]
    for arguments, says in cases:
        done = forked_with([{"DS_ENV_FILE": str(tmp_path / "env")}], DOCTOR, *arguments)
        assert done.returncode == 2 and done.stderr.count("\n") == 1, done.stderr
        assert done.stderr.startswith("error: ") and says in done.stderr
    assert not called.exists() and not (tmp_path / "env").exists()


def test_of_two_nodes_the_first_is_held_to_be_right(facts):
    other = {**facts, "versions": {**facts["versions"], "python": "3.9.1"}}
    found = list(checks.version_problems({"a": facts, "b": other}))
    assert [(p.host, p.text.split(",")[0]) for p in found] == [("b", "python is 3.9.1")]
    assert f"a has {facts['versions']['python']}" in found[0].text
