"""`gpu.py`: all parts are walked without a GPU, and what fails or lacks something is said and costs no other part."""

import importlib
import json
import signal
import subprocess
import sys
import tarfile
import time

import psutil
import pytest
from forking import forked_with
from launching import ROOT

BENCHMARKS = ROOT / "benchmarks"
sys.path.append(str(BENCHMARKS))
gpu, gpu_parts, gpu_summary = map(importlib.import_module, ("gpu", "gpu_parts", "gpu_summary"))
commands, correct, needs = (importlib.import_module(f"gpu_parts.{name}") for name in ("commands", "correct", "needs"))


def run_gpu(*arguments, **extra):
    return forked_with([extra], BENCHMARKS / "gpu.py", *arguments)


def contents_of(folder):
    """Name -> bytes of the one archive in a folder."""
    (archive,) = folder.iterdir()
    with tarfile.open(archive) as tar:
        return {member.name: tar.extractfile(member).read() for member in tar.getmembers()}


# of the parts, `train` starts eight processes of a minute together
@pytest.mark.parametrize("left_out", [{"train"}, pytest.param(set(), marks=pytest.mark.slow)], ids=["shorter", "whole"])
def test_a_dry_run_walks_every_part(tmp_path, left_out):
    """What is true on a CPU holds: a killed run goes on bit for bit, compiled models give the same."""
    walked = [name for name in gpu_parts.PARTS if name not in left_out]
    done = run_gpu("--dry-run", "--minutes", 25, "--out", tmp_path, "--part", *walked)
    found = contents_of(tmp_path)
    assert done.returncode == 0, done.stdout + "".join(found[n].decode()[-2000:] for n in found if n.endswith(".log"))
    parts = json.loads(found["run.json"])["parts"]
    assert {name: part["status"] for name, part in parts.items()} == dict.fromkeys(walked, "done")
    assert {f"{name}/{name}.{kind}" for name in walked for kind in ("json", "log")} <= found.keys()
    result = {name: json.loads(found[f"{name}/{name}.json"]) for name in walked}
    assert result["correct"]["passed"] == 0 and result["correct"]["skipped_tests"] and "correct/correct.xml" in found
    if "train" in walked:
        exact = next(iter(result["train"]["exactness"].values()))
        assert exact["losses"]["bit_equal"] and exact["weights"]["bit_equal"] and exact["losses"]["steps"] == 8
        assert result["train"]["verbs"]["results"]["step"] == 8
        assert result["train"]["scalars"]["loss/total"] == pytest.approx(exact["losses"]["last"])
        assert "losses of a resumed run" in done.stdout
    tiny = result["step"]["pairs"]["tiny"]["fp32"]
    assert tiny["ratios"].keys() == tiny["ratios_without_optimizer"].keys() == {"ours-fp32/published-fp32"}
    assert result["compile"]["pairs"]["tiny"]["student, compiled"]["difference"] < 1e-4
    assert min(row["images_per_s"] for row in result["loader"]["rows"]) > 0
    rows = result["kernels"]["rows"]
    # one shape of the loss, two of the projectors' attention and one of the windows', forward and with the way back; an update
    operations = sorted(row["operation"] for row in rows)
    assert operations == ["cap_attention"] * 4 + ["dual_view_loss"] * 2 + ["lamb"] + ["window_attention"] * 2
    assert not result["kernels"]["left_out"]
    if result["kernels"]["machine"]["device"] == "cuda":
        assert {v["timed_by"] for row in rows for v in row["variants"].values()} == {"graph"}
        assert all("triton" in row["variants"] for row in rows if row["operation"] != "dual_view_loss")
    assert "wrote " in done.stdout


def test_without_a_gpu_every_part_says_what_it_lacks(tmp_path):
    done = run_gpu("--part", "kernels", "step", "--out", tmp_path, CUDA_VISIBLE_DEVICES="")
    assert done.returncode == 2
    lines = [line for line in done.stdout.splitlines() if line.startswith("-- ")]
    assert lines == [
        f"-- {name}: lacks: no CUDA device here: --dry-run walks the parts without one" for name in ("kernels", "step")
    ]
    assert json.loads(contents_of(tmp_path)["step/step.json"])["status"] == "lacks"


def test_a_missing_package_is_named_with_what_to_lay_where(monkeypatch):
    monkeypatch.setattr(needs.importlib.util, "find_spec", lambda name: None)
    (line,) = needs.missing(["nvidia.dali"], dry=True)
    assert line.startswith(
        "nvidia.dali is not installed: lay the pieces of `pack_wheels.py pack dali` beside the repository"
    )
    assert "set PYTHONPATH=DIR" in line
    monkeypatch.undo()
    assert needs.missing(("gpu", "pytest", "nvidia.dali"), dry=True) == []
    assert len(needs.missing(["no_such_parent.package"], dry=True)) == 1


def test_no_part_starts_without_time(tmp_path):
    done = run_gpu("--part", "step", "--dry-run", "--minutes", 0.1, "--out", tmp_path)
    assert done.returncode == 1 and "-- step: not started: 0 s left" in done.stdout


def test_a_part_that_fails_or_hangs_leaves_its_log_and_what_it_had(tmp_path, monkeypatch):
    """With a part made here, in the real process that runs a part."""
    extra = tmp_path / "extra"
    extra.mkdir()
    (extra / "sitecustomize.py").write_text(
        "import sys, types, time\n"
        "import gpu_parts\n"
        "def run(folder, seconds, dry, save):\n"
        "    save({'rows': 1})\n"
        "    print('before the end', flush=True)\n"
        "    if dry:\n"
        "        raise ValueError('as it must')\n"
        "    time.sleep(600)\n"
        "module = types.ModuleType('gpu_parts.step')\n"
        "module.run = run\n"
        "sys.modules['gpu_parts.step'] = module\n"
    )
    monkeypatch.setenv("PYTHONPATH", str(extra))
    monkeypatch.setattr(gpu, "_SPARE_S", 1.0)
    for dry, failed in ((True, "ValueError: as it must"), (False, "ended with past its time")):
        work = tmp_path / f"work-{dry}"
        work.mkdir()
        found = gpu.run_part("step", work, 300.0 if dry else 20.0, dry)
        assert (found["status"], found["failed"], found["rows"]) == ("failed", failed, 1)
        assert "before the end" in (work / "step" / "step.log").read_text()


def test_an_earlier_runs_figures_are_not_this_runs(tmp_path):
    """Whatever lies in the folder of results, the summary is made of this run's own parts."""
    (tmp_path / "step-swin_large-resnet50-cuda.json").write_text('{"ratios": {"x": {"median": 9.9}}}')
    done = run_gpu("--part", "step", "--out", tmp_path, CUDA_VISIBLE_DEVICES="")
    assert "9.9" not in done.stdout and "step: lacks, without 'pairs'" in done.stdout


def test_a_part_that_ended_early_is_summarised_by_its_state(capsys):
    gpu_summary.print_summary({"kernels": {"status": "failed"}, "correct": {"passed": 3, "failed_tests": {}}})
    said = capsys.readouterr().out
    assert "kernels: failed, without 'rows'" in said and "tests passed" in said


def test_a_killed_pytests_verdicts_are_read_from_its_log(tmp_path):
    log = tmp_path / "log"
    log.write_text(
        "[gw1] [ 10%] PASSED tests/kernels/test_a.py::test_one[fp16] \n"
        "[gw0] [ 20%] FAILED tests/kernels/test_a.py::test_two \n"
        "tests/kernels/test_b.py::test_three[x y] PASSED   [ 30%]\n"
    )
    found = correct.read_log(log)
    assert found["passed"] == 2 and list(found["failed_tests"]) == ["tests/kernels/test_a.py::test_two"]


def test_a_command_past_its_time_ends_with_all_that_it_started():
    """A child in a session of its own too, as launchers make them."""
    child = (
        "import subprocess, sys, time; p = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(600)'], "
    )
    child += "start_new_session=True); print(p.pid, flush=True); time.sleep(600)"
    process = commands.start([sys.executable, "-c", child], stdout=subprocess.PIPE, text=True)
    grandchild = psutil.Process(int(process.stdout.readline()))
    assert commands.status_of(process, 0.1, last=signal.SIGCONT) == "past its time"
    deadline = time.monotonic() + 30
    while grandchild.is_running() and grandchild.status() != psutil.STATUS_ZOMBIE and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not grandchild.is_running() or grandchild.status() == psutil.STATUS_ZOMBIE
    with pytest.raises(RuntimeError, match=r"-c exit\(3\)` ended with 3"):
        commands.run([sys.executable, "-c", "exit(3)"], 60.0)
