"""Who started this process: every launcher's variables, nobody's, halves of them, and what other jobs leave over."""

import itertools
import json
import os
import subprocess
import sys
from types import SimpleNamespace

import pytest
import tiny_run
from forking import forked_with
from launching import LIMIT, ROOT, environment, free_port

from scalekd_ds.cluster.ranks import (
    cores_of_this_rank,
    first_node,
    join_ranks,
    rank_variables,
    ranks_on_this_node,
    shell_of_one_task,
)
from scalekd_ds.commands.dispatch import dispatch
from scalekd_ds.commands.train import launcher_command
from scalekd_ds.errors import UserError
from scalekd_ds.recipes.command_line import parse_run

TRAIN = ROOT / "launch" / "train.py"
TORCH = {"RANK": "5", "LOCAL_RANK": "1", "WORLD_SIZE": "8", "MASTER_ADDR": "node1", "MASTER_PORT": "29400"}
SLURM = {
    "SLURM_JOB_ID": "4711",
    "SLURM_STEP_ID": "0",
    "SLURM_NTASKS": "8",
    "SLURM_STEP_NUM_TASKS": "8",
    "SLURM_PROCID": "5",
    "SLURM_LOCALID": "1",
    "SLURM_STEP_NODELIST": "gpu[07-08]",
}
OPEN_MPI = {
    "OMPI_COMM_WORLD_RANK": "3",
    "OMPI_COMM_WORLD_LOCAL_RANK": "3",
    "OMPI_COMM_WORLD_SIZE": "4",
    "OMPI_COMM_WORLD_LOCAL_SIZE": "4",
    "PMIX_NAMESPACE": "prterun-node-77@1",
}
HYDRA = {"PMI_RANK": "1", "PMI_SIZE": "2", "MPI_LOCALRANKID": "1", "MPI_LOCALNRANKS": "2"}
MVAPICH = {f"MV2_COMM_WORLD_{name}": number for name, number in zip(("RANK", "LOCAL_RANK", "SIZE"), "112", strict=True)}
CRAY = {"PMI_RANK": "1", "PMI_LOCAL_RANK": "1", "PMI_SIZE": "2", "PMI_LOCAL_SIZE": "2"}
PALS = {"PALS_RANKID": "3", "PALS_LOCAL_RANKID": "1", "PMI_SIZE": "4", "PALS_LOCAL_SIZE": "2", "PALS_APID": "7"}
JSRUN = {f"JSM_NAMESPACE_{name}": number for name, number in zip(("RANK", "LOCAL_RANK", "SIZE"), "314", strict=True)}
FLUX = {"FLUX_TASK_RANK": "3", "FLUX_TASK_LOCAL_ID": "1", "FLUX_JOB_SIZE": "4", "FLUX_JOB_ID": "f7"}
ACROSS = {"OMPI_COMM_WORLD_LOCAL_RANK": "1", "OMPI_COMM_WORLD_LOCAL_SIZE": "2"}
ALONE = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1"}

# name -> (environment, variables that follow)
TAKEN = {
    "nobody": ({}, ALONE),
    "left-over address": ({"MASTER_ADDR": "node9", "MASTER_PORT": "1"}, ALONE),
    "left-over job of one": ({"WORLD_SIZE": "1", "LOCAL_RANK": "0"}, ALONE),
    "empty": ({"RANK": "", "WORLD_SIZE": ""}, ALONE),
    "rank 0 of 1": ({"RANK": "0", "WORLD_SIZE": "1"}, ALONE),
    "torchrun or DeepSpeed": (TORCH, TORCH),
    "torchrun under srun": (TORCH | SLURM | {"SLURM_STEP_NUM_TASKS": "2", "SLURM_PROCID": "1"}, TORCH),
    "sbatch's own script": (SLURM | {"SLURM_STEP_NUM_TASKS": "1", "SLURM_PROCID": "0"}, ALONE),
    "salloc's shell": ({"SLURM_JOB_ID": "1", "SLURM_NTASKS": "4", "SLURM_NPROCS": "4"}, ALONE),
    "srun": (SLURM, {"RANK": "5", "LOCAL_RANK": "1", "WORLD_SIZE": "8", "MASTER_ADDR": "gpu07"}),
    "srun, its size exported": (SLURM | {"WORLD_SIZE": "8"}, {"RANK": "5", "WORLD_SIZE": "8", "MASTER_ADDR": "gpu07"}),
    "srun, address exported": (SLURM | {"MASTER_ADDR": "ib7"}, {"RANK": "5", "MASTER_ADDR": "ib7"}),
    "srun, ranks exported": (SLURM | {"RANK": "5", "WORLD_SIZE": "8"}, {"LOCAL_RANK": "1", "MASTER_ADDR": "gpu07"}),
    "Open MPI": (OPEN_MPI, {"RANK": "3", "LOCAL_RANK": "3", "WORLD_SIZE": "4", "MASTER_ADDR": "127.0.0.1"}),
    "Open MPI, two nodes": (
        OPEN_MPI | ACROSS | {"MASTER_ADDR": "a"},
        {"RANK": "3", "LOCAL_RANK": "1", "MASTER_ADDR": "a"},
    ),
    # mpirun starts its ranks on other nodes below one task of srun's each
    "Open MPI below srun": (
        SLURM | OPEN_MPI | ACROSS | {"SLURM_STEP_NUM_TASKS": "2", "SLURM_PROCID": "1", "MASTER_ADDR": "a"},
        {"RANK": "3", "LOCAL_RANK": "1", "WORLD_SIZE": "4", "MASTER_ADDR": "a"},
    ),
    "srun with Cray's PMI": (
        SLURM | CRAY | {"SLURM_STEP_NUM_TASKS": "2", "SLURM_PROCID": "1"},
        {"RANK": "1", "WORLD_SIZE": "2", "MASTER_ADDR": "gpu07"},
    ),
    "srun with half of PMI": (SLURM | {"PMI_RANK": "5", "PMI_SIZE": "8"}, {"RANK": "5", "MASTER_ADDR": "gpu07"}),
    "torchrun beside half of PMI": (TORCH | {"PMI_RANK": "0", "PMI_SIZE": "2"}, TORCH),
    "torchrun beside SLURM in words": (TORCH | SLURM | {"SLURM_STEP_NUM_TASKS": "8(x2)"}, TORCH),
    "MPICH": (HYDRA, {"RANK": "1", "LOCAL_RANK": "1", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1"}),
    "MVAPICH": (MVAPICH | {"MV2_COMM_WORLD_LOCAL_SIZE": "2"}, {"RANK": "1", "LOCAL_RANK": "1", "WORLD_SIZE": "2"}),
    "Cray": (CRAY, {"RANK": "1", "LOCAL_RANK": "1", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1"}),
    "PALS": (PALS | {"MASTER_ADDR": "x1"}, {"RANK": "3", "LOCAL_RANK": "1", "WORLD_SIZE": "4", "MASTER_ADDR": "x1"}),
    "jsrun": (JSRUN | {"MASTER_ADDR": "x1"}, {"RANK": "3", "LOCAL_RANK": "1", "WORLD_SIZE": "4"}),
    "flux": (FLUX | {"MASTER_ADDR": "x1"}, {"RANK": "3", "LOCAL_RANK": "1", "WORLD_SIZE": "4"}),
    "flux of one": ({"FLUX_TASK_RANK": "0", "FLUX_TASK_LOCAL_ID": "0", "FLUX_JOB_SIZE": "1"}, ALONE),
    "PMI of a shell": ({"PMI_SIZE": "2"}, ALONE),
    "mpirun of one": ({"OMPI_COMM_WORLD_SIZE": "1", "OMPI_COMM_WORLD_RANK": "0"}, ALONE),
}
# name -> (environment, words of the line)
REFUSED = {
    "left-over size": ({"WORLD_SIZE": "4"}, "WORLD_SIZE is 4 and RANK is not set"),
    "left-over local rank": ({"LOCAL_RANK": "2"}, "LOCAL_RANK is 2 and RANK is not set"),
    "left-over size under srun": (SLURM | {"WORLD_SIZE": "4"}, "while srun has started 8 tasks: unset WORLD_SIZE"),
    "no size": ({"RANK": "1"}, "RANK is 1 and WORLD_SIZE is not set: unset RANK"),
    "too large a rank": (TORCH | {"RANK": "8"}, "RANK is 8 and WORLD_SIZE 8: ranks are numbered from 0 to 7"),
    "too large a local rank": (TORCH | {"LOCAL_RANK": "8"}, "LOCAL_RANK is 8 and WORLD_SIZE 8"),
    "no local rank": ({k: v for k, v in TORCH.items() if k != "LOCAL_RANK"}, "LOCAL_RANK is not set"),
    "no address": ({k: v for k, v in TORCH.items() if k != "MASTER_ADDR"}, "MASTER_ADDR is not set"),
    "no port": ({k: v for k, v in TORCH.items() if k != "MASTER_PORT"}, "MASTER_PORT is not set"),
    "half of PMI": ({"PMI_RANK": "0", "PMI_SIZE": "2"}, "PMI_SIZE is 2 and MPI_LOCALRANKID is not set: unset PMI_SIZE"),
    "half of Open MPI": (
        {"OMPI_COMM_WORLD_SIZE": "2", "OMPI_COMM_WORLD_RANK": "0"},
        "OMPI_COMM_WORLD_LOCAL_RANK is not set: unset OMPI_COMM_WORLD_SIZE, which another job has left over, or start",
    ),
    "PALS over nodes": (PALS, "MASTER_ADDR is not set"),
    "mpirun over nodes": (OPEN_MPI | ACROSS, "mpirun -x MASTER_ADDR=NODE"),
    "words": (TORCH | {"WORLD_SIZE": "four"}, "WORLD_SIZE is 'four': it must be a whole number"),
    "negative": (TORCH | {"RANK": "-1"}, "RANK is '-1'"),
    "port in words": (TORCH | {"MASTER_PORT": "http"}, "MASTER_PORT is 'http'"),
    "SLURM in words": (SLURM | {"SLURM_PROCID": ""}, "SLURM_PROCID is ''"),
}


@pytest.mark.parametrize("name", TAKEN)
def test_ranks_are_taken_from_whoever_started_them(name):
    given, expected = TAKEN[name]
    found = rank_variables(given)
    assert set(found) == {"RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"}
    assert {key: found[key] for key in expected} == expected
    # what was found is found again
    assert rank_variables(given | found) == found


@pytest.mark.parametrize("name", REFUSED)
def test_a_contradiction_is_one_line(name):
    given, words = REFUSED[name]
    with pytest.raises(UserError) as error:
        rank_variables(given)
    assert words in str(error.value) and "\n" not in str(error.value)


def test_every_part_of_a_launchers_variables_is_a_job_or_a_line():
    """Each subset of the five, alone and with SLURM's or MPI's: never another error, never a rank outside its job."""
    for others in ({}, SLURM, OPEN_MPI, OPEN_MPI | ACROSS, HYDRA, MVAPICH, CRAY, PALS, JSRUN, FLUX):
        for size in range(6):
            for names in itertools.combinations(TORCH, size):
                try:
                    found = rank_variables(others | {name: TORCH[name] for name in names})
                except UserError:
                    continue
                assert max(int(found["LOCAL_RANK"]), int(found["RANK"])) < int(found["WORLD_SIZE"])
                assert found["MASTER_ADDR"] and 0 < int(found["MASTER_PORT"]) < 65_536


def test_tasks_of_one_step_meet_at_one_port_and_those_of_another_elsewhere():
    ports = {rank_variables(SLURM | {"SLURM_PROCID": str(n), "SLURM_LOCALID": "0"})["MASTER_PORT"] for n in range(8)}
    assert len(ports) == 1 and ports != {rank_variables(SLURM | {"SLURM_STEP_ID": "1"})["MASTER_PORT"]}


@pytest.mark.parametrize(
    ("nodes", "first"),
    [
        ("node7", "node7"),
        ("gpu[07-12,20],login1", "gpu07"),
        ("a,b", "a"),
        ("rack2-n[100,7]", "rack2-n100"),
        ("n[1-2]-ib", "n1-ib"),
        ("rack[3-4]n[07-12],x", "rack3n07"),
        ("", None),
    ],
)
def test_first_of_slurms_nodes(nodes, first):
    assert first_node(nodes) == first


def test_a_launcher_in_each_of_several_tasks_is_refused(monkeypatch, tmp_path):
    for name, value in SLURM.items():
        monkeypatch.setenv(name, value)
    monkeypatch.delenv("RANK", raising=False)
    with pytest.raises(UserError, match="given to each of 8 tasks, which srun has started"):
        launcher_command(SimpleNamespace(gpus=2, hostfile=None, deepspeed_args=""), [])
    hosts = tmp_path / "hosts"
    hosts.write_text("gpu07 slots=4\ngpu08 slots=4\n")
    one_a_node = SimpleNamespace(gpus=None, hostfile=str(hosts), deepspeed_args="--no_ssh --node_rank 1")
    assert "--no_ssh" in launcher_command(one_a_node, [])


def test_a_shell_of_one_task_is_told_what_to_unset():
    assert shell_of_one_task(SLURM) == shell_of_one_task({"SLURM_PTY_PORT": "4"}) == ""
    assert "unset SLURM_STEP_NUM_TASKS" in shell_of_one_task(SLURM | {"SLURM_PTY_PORT": "4"})


@pytest.mark.parametrize("argument", ["--local_rank=1", "--local-rank=1"])
def test_a_launchers_own_argument_is_taken_before_and_behind_the_verb(argument):
    for words in ([argument, "train"], ["train", argument]):
        with pytest.raises(UserError, match="unknown recipe 'nowhere'"):
            dispatch([*words, "--recipe", "nowhere"])
    assert parse_run([argument, "--recipe", "fashion-ce"])[0].recipe == "fashion-ce"


def test_two_tasks_of_srun_are_one_job(tmp_path):
    """Nothing but SLURM's variables."""
    run_dir = tmp_path / "run"
    tasks = [
        SLURM
        | {"SLURM_JOB_ID": str(free_port()), "SLURM_STEP_NUM_TASKS": "2", "SLURM_STEP_NODELIST": "localhost"}
        | {"SLURM_PROCID": str(n), "SLURM_LOCALID": str(n)}
        for n in range(2)
    ]
    tasks[1]["SLURM_JOB_ID"] = tasks[0]["SLURM_JOB_ID"]
    more = ("--run.stop_after", 2, "--student_kwargs", json.dumps(tiny_run.RESNET), "--run.ds_config", "cpu_fp32")
    job = tiny_run.supervised_arguments(tiny_run.images(tmp_path / "data"), run_dir, *more)
    done = forked_with(tasks, TRAIN, *job)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    results = json.loads((run_dir / "results.json").read_text())
    assert results["world_size"] == 2 and results["step"] == 2


def test_a_size_left_over_in_the_shell_is_named_at_once(tmp_path):
    command = [sys.executable, TRAIN, "--recipe", "fashion-ce", "--data.root", tmp_path]
    done = subprocess.run(
        [*map(str, command)], cwd=ROOT, env=environment(WORLD_SIZE="4"), capture_output=True, text=True, timeout=LIMIT
    )
    assert done.returncode == 2
    assert done.stderr.startswith("error: WORLD_SIZE is 4 and RANK is not set") and done.stderr.count("\n") == 1


@pytest.mark.parametrize(
    ("text", "ranks"), [(None, 4), ("2", 2), ("4", 4), ("8", 4), ("0", 4), ("-1", 4), ("abc", 4), ("", 4)]
)
def test_threads_are_shared_by_the_ranks_that_are_here(text, ranks):
    assert ranks_on_this_node({"WORLD_SIZE": "4"} | ({} if text is None else {"LOCAL_WORLD_SIZE": text})) == ranks


@pytest.mark.parametrize(
    "given", [{}, {"RANK": "0", "WORLD_SIZE": "1"}, {"MASTER_ADDR": "a", "MASTER_PORT": "7"}, HYDRA, TORCH]
)
def test_a_port_of_our_own_is_opened_in_a_shell_under_torchrun(monkeypatch, given):
    """torchrun's ranks wait for its agent to open the port, and so would a run in a shell that has its variables."""
    for name in (*TORCH, "TORCHELASTIC_USE_AGENT_STORE"):
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)
    for name, value in (given | {"TORCHELASTIC_USE_AGENT_STORE": "True"}).items():
        monkeypatch.setenv(name, value)
    for _ in range(2):
        join_ranks()
        assert os.environ["TORCHELASTIC_USE_AGENT_STORE"] == str(given is TORCH)


@pytest.mark.parametrize(
    ("said", "ranks"),
    [
        ({"SLURM_NODEID": "0", "SLURM_STEP_TASKS_PER_NODE": "4(x2),3"}, 4),
        ({"SLURM_NODEID": "2", "SLURM_STEP_TASKS_PER_NODE": "4(x2),3"}, 3),
        ({"SLURM_NODEID": "3", "SLURM_STEP_TASKS_PER_NODE": "4(x2),3"}, 11),
        ({"SLURM_NODEID": "0", "SLURM_STEP_TASKS_PER_NODE": "?"}, 11),
        ({"OMPI_COMM_WORLD_LOCAL_SIZE": "5"}, 5),
        ({"LOCAL_WORLD_SIZE": "2", "OMPI_COMM_WORLD_LOCAL_SIZE": "5"}, 2),
        ({"LOCAL_WORLD_SIZE": "64", "MPI_LOCALNRANKS": "5"}, 5),
    ],
)
def test_other_launchers_say_how_many_ranks_a_node_has(said, ranks):
    assert ranks_on_this_node({"WORLD_SIZE": "11"} | said) == ranks


def test_a_task_of_srun_has_the_cores_that_it_was_given(monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(8)))
    task = {"WORLD_SIZE": "4", "SLURM_NODEID": "0", "SLURM_STEP_TASKS_PER_NODE": "4"}
    assert cores_of_this_rank(task) == 2
    assert cores_of_this_rank(task | {"SLURM_CPUS_PER_TASK": "8"}) == 8
    # all tasks may use all of the node's cores
    assert cores_of_this_rank(task | {"SLURM_CPUS_PER_TASK": "2"}) == 2
