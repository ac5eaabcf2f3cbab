"""`.deepspeed_env`: written by the doctor, read by DeepSpeed's launcher as it was written, and nothing for a shell to read."""

import os
import stat
import subprocess

import pytest
from deepspeed.launcher import runner
from deepspeed.launcher.multinode_runner import PDSHRunner
from launching import ROOT, alone, environment

from scalekd_ds.cluster import env_file
from scalekd_ds.cluster.env_file import parse_assignments, parse_env, read_env, write_env
from scalekd_ds.errors import UserError

DOCTOR = ROOT / "launch" / "doctor.py"
ALLOWED = "^mlx5_0:1,=mlx5_1 a;b|c&d(e)<f>{g}*?[h]~#@+/.-"


def as_the_shell_reads(name: str, value: str) -> str:
    """The value that a node's shell ends with, by the launcher's own code."""
    runner_like = type("Runner", (), {"exports": {}})()
    PDSHRunner.add_export(runner_like, name, value)
    ((key, var),) = runner_like.exports.items()
    command = f"export {key}={var}; printenv {name}"
    return subprocess.run(["sh", "-c", command], capture_output=True, text=True, check=True).stdout.removesuffix("\n")


@pytest.mark.parametrize("value", ["eth0", "", ALLOWED, "a  b", "=x", "-1"])
def test_what_is_accepted_arrives_as_it_is(value, tmp_path):
    path = tmp_path / "env"
    write_env(path, {"NCCL_X": value})
    assert read_env(path) == {"NCCL_X": value}
    assert as_the_shell_reads("NCCL_X", value) == value


@pytest.mark.parametrize("character", [*"\"'`$\\!%\n\r\t\0\x7f\u00e9"])
def test_what_a_shell_would_read_is_refused(character, tmp_path):
    with pytest.raises(UserError, match="the value of A has the character") as error:
        write_env(tmp_path / "env", {"A": f"x{character}y"})
    assert "\n" not in str(error.value) and not (tmp_path / "env").exists()


@pytest.mark.parametrize("word", ["a=1", "1A=1", "A B=1", "A;reboot=1", "=1", "A-B=1", "\u00c4=1", " A=1"])
def test_a_name_that_is_not_plain_is_refused(word):
    with pytest.raises(UserError, match="is no name"):
        parse_assignments([word], "--write-env")


def test_other_mistakes_are_named():
    with pytest.raises(UserError, match="'NCCL_DEBUG' is no NAME=value"):
        parse_assignments(["NCCL_DEBUG"], "--write-env")
    with pytest.raises(UserError, match="blank"):
        parse_assignments(["A= x"], "--write-env")
    with pytest.raises(UserError, match="longer than 4096"):
        parse_assignments(["A=" + "x" * 5000], "--write-env")


def test_the_file_keeps_its_other_lines_and_is_private(tmp_path):
    path = tmp_path / "env"
    path.write_text("OMP_NUM_THREADS=4\nNCCL_DEBUG=WARN\n")
    path.chmod(0o644)
    write_env(path, {"NCCL_DEBUG": "INFO", "GLOO_SOCKET_IFNAME": "eth0"})
    assert path.read_text() == "OMP_NUM_THREADS=4\nNCCL_DEBUG=INFO\nGLOO_SOCKET_IFNAME=eth0\n"
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert os.listdir(tmp_path) == ["env"]


@pytest.mark.parametrize("content", ["A=1\n\nB=2\n", "A=1\n# a comment\n", "A=1\nB\n", "A=1\nB=$(id)\n", "A=1\nb=1\n"])
def test_lines_that_end_the_launcher_or_reach_a_shell_are_named(content, tmp_path):
    path = tmp_path / "env"
    path.write_text(content)
    with pytest.raises(UserError, match="line 2: "):
        write_env(path, {"C": "3"})
    assert path.read_text() == content


def test_an_unwritable_file_is_one_line(tmp_path):
    with pytest.raises(UserError, match="cannot be written: No such file"):
        write_env(tmp_path / "nowhere" / "env", {"A": "1"})
    (tmp_path / "env").mkdir()
    with pytest.raises(UserError, match="cannot be read"):
        write_env(tmp_path / "env", {"A": "1"})


def test_the_doctor_exports_what_the_launcher_exports(tmp_path, monkeypatch):
    """DeepSpeed's own list, and its order of files: the home folder's first, the starting folder's over it."""
    assert set(runner.EXPORT_ENVS) | {"NCCL"} == set(env_file.EXPORTED_PREFIXES)
    assert runner.DEEPSPEED_ENVIRONMENT_PATHS[-1] == "."
    home, here = tmp_path / "home", tmp_path / "here"
    home.mkdir()
    here.mkdir()
    (home / ".deepspeed_env").write_text("A=home\nB=home\n")
    (here / ".deepspeed_env").write_text("B=here\n")
    monkeypatch.delenv("DS_ENV_FILE", raising=False)
    monkeypatch.setenv("HOME", str(home))
    monkeypatch.setenv("NCCL_DEBUG", "WARN")
    monkeypatch.setenv("OTHER", "x")
    values = env_file.exported(here)
    assert values["A"] == "home" and values["B"] == "here" and values["NCCL_DEBUG"] == "WARN" and "OTHER" not in values
    monkeypatch.setenv("NCCL_DEBUG", "$(id)")
    with pytest.raises(UserError, match="environment variable NCCL_DEBUG"):
        env_file.exported(here)


def test_a_crash_leaves_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "env"
    write_env(path, {"A": "1"})

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(env_file, "sync", full)
    with pytest.raises(UserError, match="No space left"):
        write_env(path, {"A": "2"})
    assert read_env(path) == {"A": "1"} and os.listdir(tmp_path) == ["env"]


def test_the_command_writes_the_file_that_the_launcher_reads(tmp_path):
    path = tmp_path / "env"
    done = alone(DOCTOR, "--write-env", "NCCL_SOCKET_IFNAME=eth0", "A=b c", env=environment(DS_ENV_FILE=str(path)))
    assert done.returncode == 0, done.stderr
    assert parse_env(path.read_bytes(), "env") == {"NCCL_SOCKET_IFNAME": "eth0", "A": "b c"}
