"""What a watched run is made of: agreement, cosines, FLOP, energy, monitors, reporters and errors, each by its numbers."""

import subprocess
import sys
import time
import types
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from launching import ROOT, environment
from terminals import on_a_terminal
from tiny_run import RESNET, SWIN
from torch.utils.flop_counter import FlopCounterMode

from scalekd_ds.config import RunConfig, RunDirConfig
from scalekd_ds.distiller import untimed
from scalekd_ds.engine import ds_config
from scalekd_ds.errors import UserError
from scalekd_ds.rng import rng_state
from scalekd_ds.watching.agreement import cosines, logit_agreement
from scalekd_ds.watching.mfu import device_tflops, flop_per_image, peak_tflops
from scalekd_ds.watching.provenance import command_line, git_commit, hyperparameters
from scalekd_ds.watching.resources import Energy, memory
from scalekd_ds.watching.terminal.plain import evaluation_lines
from scalekd_ds.watching.terminal.report import ReportCard, duration
from scalekd_ds.watching.timing import StepTimer


def small_config(**more):
    return RunConfig(
        student="resnet18",
        student_kwargs=RESNET,
        student_taps=(1, 4),
        teacher="swin_tiny_patch4_window7_224",
        teacher_weights="none",
        teacher_kwargs=SWIN | {"num_classes": 5},
        data=replace(RunConfig().data, image_size=32),
        **more,
    )


def small_distiller(**more):
    from scalekd_ds.build import build_distiller

    cfg = small_config()
    return build_distiller(replace(cfg, distill=replace(cfg.distill, **more)), 5, verbose=False)


def test_agreement_of_known_logits_has_its_known_values():
    student = torch.tensor([[2.0, 0.0], [0.0, 1.0], [3.0, 0.0], [0.0, 0.5]])
    teacher = torch.tensor([[1.0, 0.0], [1.0, 0.0], [0.1, 0.0], [0.0, 9.0]])
    found = logit_agreement(student, teacher)
    assert found["teacher/agreement_top1"].item() == 75.0
    expected = F.kl_div(student.log_softmax(-1), teacher.softmax(-1), reduction="batchmean")
    assert found["teacher/kl"].item() == pytest.approx(expected.item(), rel=1e-5)
    assert logit_agreement(teacher, teacher)["teacher/kl"].item() == pytest.approx(0.0, abs=1e-7)


@pytest.mark.parametrize("more", [{}, {"tpp": False}, {"weights_s3": (0.0, 0.5), "weights_s4": (0.25, 0.0)}])
def test_cosines_are_those_of_the_tokens(more):
    """From the losses alone, against cosines of the projected tokens themselves, frequencies filtered by hand."""
    distiller = small_distiller(**more).eval()
    images, labels = torch.randn(3, 3, 32, 32), torch.tensor([0, 1, 4])
    with torch.no_grad():
        losses = {name: value.item() for name, value in distiller(images, labels).items()}
        projected = distiller.project(distiller.tapped_student(images))
        targets = distiller.teacher_targets(images)
    found = cosines(losses, distiller)
    assert set(found) == {f"teacher/cosine_{name}" for name in distiller.feature_weights}
    for name in distiller.feature_weights:
        view, stage = name.split("_")
        ours = projected[stage][view]
        theirs = targets.before if stage == "s3" and not distiller.tpp else targets.tokens
        if view == "frequency":
            # the frequency view drops the DC term, which is the mean over the tokens
            ours, theirs = (x - x.mean(1, keepdim=True) for x in (ours, theirs))
        expected = F.cosine_similarity(ours, theirs, dim=-1).mean().item()
        assert found[f"teacher/cosine_{name}"] == pytest.approx(expected, abs=1e-5)


def test_parts_and_logits_reach_whoever_asks_and_cost_nothing_otherwise():
    distiller = small_distiller()
    images, labels = torch.randn(2, 3, 32, 32), torch.tensor([0, 1])
    assert distiller.time_part is untimed and distiller.on_logits is None
    torch.manual_seed(1)
    plain = distiller(images, labels)
    timer, seen = StepTimer(torch.device("cpu")), []
    distiller.time_part, distiller.on_logits = timer.part, lambda *logits: seen.append(logits)
    begin = time.perf_counter()
    watched = distiller(images, labels)
    spent = time.perf_counter() - begin
    wall, shares = timer.read()
    assert plain["loss/ce"].item() == pytest.approx(watched["loss/ce"].item(), rel=1e-5)
    assert set(shares) == {"student", "projectors", "losses"}
    assert 0 < sum(shares.values()) * wall <= spent and min(shares.values()) > 0
    ((student, teacher),) = seen
    assert student.shape == teacher.shape == (2, 5)


def test_flop_of_a_step_are_those_of_a_real_one():
    cfg, micro = small_config(), 4
    distiller = small_distiller()
    images, labels = torch.randn(micro, 3, 32, 32), torch.randint(5, (micro,))
    with FlopCounterMode(display=False) as counter:
        distiller(images, labels)["loss/total"].backward()
    before = rng_state()
    counted = flop_per_image(cfg, 5, micro, None)
    # a run that is watched draws what one draws that is not
    after = rng_state()
    assert torch.equal(before["torch"], after["torch"]) and before["python"] == after["python"]
    assert torch.equal(before["numpy"][1], after["numpy"][1])
    # the CPU's path in both: attention as it is there
    assert counted == pytest.approx(counter.get_total_flops() / micro, rel=0.01)
    missing = replace(cfg, teacher="no-such-model")
    assert flop_per_image(missing, 5, micro, None) is None


def test_peaks_by_the_names_that_drivers_give():
    assert peak_tflops("NVIDIA H100 80GB HBM3") == 989.0
    assert peak_tflops("NVIDIA H100 PCIe") == 756.0
    assert peak_tflops("NVIDIA A100-SXM4-80GB") == 312.0
    assert [peak_tflops(f"NVIDIA {name}") for name in ("L40", "L40S", "L4")] == [181.0, 362.0, 121.0]
    assert peak_tflops("Tesla V100-SXM2-32GB") == 125.0
    assert peak_tflops("Some other card") is None
    cpu = torch.device("cpu")
    assert device_tflops(small_config(), cpu) is None
    assert device_tflops(small_config(run=RunDirConfig(peak_tflops=2.5)), cpu) == 2.5
    with pytest.raises(UserError, match=r"run.peak_tflops is 0: it must be positive"):
        RunDirConfig(peak_tflops=0)


def test_energy_of_two_sockets_whose_counter_turns_over(tmp_path, monkeypatch):
    monkeypatch.setenv("LOCAL_RANK", "0")
    cpu = torch.device("cpu")

    def write(name, microjoules):
        (tmp_path / name).mkdir(exist_ok=True)
        (tmp_path / name / "max_energy_range_uj").write_text("1000000000\n")
        (tmp_path / name / "energy_uj").write_text(f"{microjoules}\n")

    write("intel-rapl:0", 999_000_000)
    write("intel-rapl:1", 5_000_000)
    # a part of socket 0, counted there
    write("intel-rapl:0:0", 7)
    energy = Energy(cpu, tmp_path)
    write("intel-rapl:0", 3_000_000)
    write("intel-rapl:1", 25_000_000)
    write("intel-rapl:0:0", 900_000_000)
    assert energy.update() == pytest.approx(4.0 + 20.0)
    assert energy.update() == pytest.approx(24.0)
    assert Energy(cpu, tmp_path / "none").update() is None
    monkeypatch.setenv("LOCAL_RANK", "1")
    assert Energy(cpu, tmp_path).update() is None
    assert 0.05 < memory(cpu)["system/host_rss_gib"] < 100


class Nvml:
    """NVIDIA's library as far as the energy meter uses it, for a GPU that is lost after some readings."""

    class NVMLError(Exception):
        pass

    def __init__(self, readings):
        self.readings = iter(readings)

    def nvmlInit(self):
        pass

    def nvmlDeviceGetHandleByUUID(self, uuid):
        assert uuid == "GPU-1234"
        return "handle"

    def nvmlDeviceGetTotalEnergyConsumption(self, handle):
        reading = next(self.readings, None)
        if reading is None:
            raise self.NVMLError("GPU is lost")
        return reading


@pytest.mark.parametrize("readings", [[], [1_000], [1_000, 3_500]])
def test_a_gpu_whose_counter_fails_ends_nothing(monkeypatch, capsys, readings):
    monkeypatch.setitem(sys.modules, "pynvml", Nvml(readings))
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: types.SimpleNamespace(uuid="1234"))
    energy = Energy(torch.device("cuda", 0))
    assert energy.joules == (0.0 if readings else None)
    for reading in readings[1:]:
        assert energy.update() == pytest.approx((reading - readings[0]) / 1e3)
    # and a counter that answers again, from another beginning, is not believed
    for _ in range(3):
        assert energy.update() is None
    assert energy.is_lost == bool(readings)
    said = capsys.readouterr().err.count("warning: the energy counter cannot be read any more")
    assert said == (1 if readings else 0)


@pytest.mark.gpu
def test_energy_of_a_gpu_at_work_grows():
    pytest.importorskip("pynvml")
    device = torch.device("cuda", 0)
    energy = Energy(device)
    if energy.joules is None:
        pytest.skip("this GPU has no energy counter")
    a = torch.randn(4096, 4096, device=device)
    for _ in range(200):
        a = torch.nn.functional.normalize(a @ a)
    torch.cuda.synchronize()
    # the driver updates the counter every tenth of a second or so
    time.sleep(0.5)
    assert 0.1 < energy.update() < 10_000


def test_one_switch_chooses_the_monitors(tmp_path, monkeypatch):
    default = ds_config.monitors({}, tmp_path)
    assert default == {"tensorboard": {"enabled": True, "output_path": str(tmp_path), "job_name": "tensorboard"}}
    both = ds_config.monitors({}, tmp_path, "csv, tensorboard")
    assert set(both) == {"tensorboard", "csv_monitor"} and both["csv_monitor"]["enabled"]
    assert set(ds_config.monitors({}, tmp_path, "csv")) == {"csv_monitor"}
    with pytest.raises(UserError, match=r"names 'cvs'. Did you mean 'csv'"):
        ds_config.monitors({}, tmp_path, "tensorboard,cvs")
    with pytest.raises(UserError, match=r"csv is set in run.monitors and as 'csv_monitor'"):
        ds_config.monitors({"csv_monitor": {"enabled": True}}, tmp_path, "csv")
    monkeypatch.setattr(ds_config, "find_spec", lambda name: None)
    with pytest.raises(UserError, match="not installed: pip install wandb"):
        ds_config.monitors({}, tmp_path, "wandb")
    with pytest.raises(UserError, match="not installed: pip install wandb"):
        ds_config.monitors({"wandb": {"enabled": True}}, tmp_path)
    assert ds_config.monitors({"wandb": {"enabled": False}}, tmp_path)["wandb"] == {"enabled": False}


def test_command_line_commit_and_hyperparameters_are_told(monkeypatch, tmp_path):
    monkeypatch.setattr(sys, "argv", ["launch/train.py", "--recipe", "x", "--data.root", "two words"])
    assert command_line().split(" \\\n    ")[1:] == ["--recipe x", "--data.root 'two words'"]
    assert git_commit(tmp_path) is None
    values = hyperparameters(small_config())
    assert values["distill.kd_weight"] == 0.5 and values["teacher"] == "swin_tiny_patch4_window7_224"
    assert values["student_taps"] == "(1, 4)" and not any(name.startswith("run.") for name in values)


def card(**more):
    common = {"top1": 81.5, "best_top1": 82.0, "best_step": 40, "weights": "student", "teacher_top1": 90.0, "steps": 50}
    common |= {"seconds": 3725.0, "images": 12_800, "baseline_top1": None, "joules": None}
    return ReportCard(**{**common, **more})


def test_the_report_card_tells_what_is_known():
    text = "\n".join(card().lines())
    assert "gain" not in text and "energy" not in text and "82.00%  (step 40)" in text and "12,800" in text
    full = card(baseline_top1=80.25, joules=7.2e6, weights="ema", files={"weights": "a b"}, next=["one", "two"])
    lines = full.lines()
    assert "gain     +1.25 over the baseline's 80.25%" in lines and "energy   2 kWh" in lines
    assert lines[0].endswith("81.50%  (average of the weights, after 50 steps)")
    assert lines[-2:] == ["next     one", "         two"] and "time     1:02:05  (1.03 h)" in lines
    assert duration(2 * 86_400 + 61) == "2 d 0:01:01"
    rows = [{"name": "student", "top1": 81.5, "top5": 99.0, "step": 50}]
    rows.append({"name": "best so far", "top1": 82.0, "top5": None, "step": 40})
    head, student, best = evaluation_lines(50, rows)
    assert head.startswith("step 50: validation") and student.split() == ["student", "81.50%", "99.00%"]
    assert best.split() == ["best", "so", "far", "82.00%", "(step", "40)"]
    assert head.index("top-1") + 4 == student.index("%") == best.index("%")


BAR = """
import sys, time
from scalekd_ds.watching.terminal import reporter_for
from scalekd_ds.watching.terminal.report import ReportCard
assert "torch" not in sys.modules
reporter = reporter_for("auto", int(sys.argv[1]), 10, 2)
for step in range(3, 8):
    reporter.step(step)
    time.sleep(0.05)
reporter.scalars(7, {"loss/total": 3.25, "loss/ce": 1.5, "system/images_per_s": 100, "system/images_per_s_mean": 90,
                     "system/share_data_wait": 0.25, "system/host_rss_gib": 1.5, "system/step_s": 1.0, "optim/lr": 0.1})
reporter.evaluation(7, [{"name": "student", "top1": 55.5, "top5": 88.0, "step": 7},
                        {"name": "best so far", "top1": 60.0, "top5": None, "step": 4}])
reporter.line("a [bold]line[/bold]")
reporter.card(ReportCard(61, 62, 9, "student", 60.5, None, 10, 5.0, 100, None, {"weights": "w"}, ["do this"]))
reporter.close()
"""


def bar_on_a_terminal(*arguments: str) -> str:
    """What BAR draws on a terminal of 120 columns."""
    env = environment(COLUMNS="120", TERM="xterm", DS_ACCELERATOR="cpu")
    status, shown = on_a_terminal([sys.executable, "-c", BAR, *arguments], 120, ROOT, env)
    assert status == 0, shown
    return shown


def test_rank_0_draws_a_bar_on_a_terminal_and_others_nothing():
    shown = bar_on_a_terminal("0")
    for words in ("7/10", "left", "loss 3.2500", "  100 img/s (mean    90)", "data wait 25%", "1.5 GiB", "ce 1.5000"):
        assert words in shown, words
    for words in ("step 7 of 10", "55.50%", "best so far (step 4)", "60.00%", "a [bold]line[/bold]"):
        assert words in shown, words
    for words in ("finished", "+0.50 over the baseline's 60.50%", "do this"):
        assert words in shown, words
    assert bar_on_a_terminal("1") == ""


FAULT = "from scalekd_ds.errors import UserError, run_cli\ndef main(): raise {}\nrun_cli(main)"


@pytest.mark.parametrize(("error", "status"), [("UserError('too big')", 2), ("KeyError('lost')", 1)])
def test_errors_of_other_ranks_name_rank_and_host(error, status):
    import socket

    run = [sys.executable, "-c", FAULT.format(error)]
    far = subprocess.run(run, cwd=ROOT, env=environment(WORLD_SIZE="4", RANK="3"), capture_output=True, text=True)
    assert far.returncode == status
    last = far.stderr.splitlines()[-1]
    assert last.startswith(f"error (rank 3 on {socket.gethostname()}): ")
    assert last.endswith("too big" if status == 2 else "KeyError: 'lost'")
    assert ("Traceback" in far.stderr) == (status == 1)
    alone = subprocess.run(run, cwd=ROOT, env=environment(), capture_output=True, text=True)
    assert alone.returncode == status and "rank" not in alone.stderr
