"""Runs with `--run.compile`: on two ranks at ZeRO 0 to 2, cut and resumed, and refused where they cannot be."""

import json
import os

import pytest
import torch
from forking import forked, forked_ranks
from launching import ROOT, WORKERS, result_of
from safetensors.torch import load_file
from tiny_run import arguments, images, scalars

from scalekd_ds.checkpoint.layout import checkpoints_of
from scalekd_ds.config.run_dir import RunDirConfig
from scalekd_ds.engine import compilation
from scalekd_ds.errors import UserError

# three epochs of five steps, two micro batches a rank, an evaluation after each epoch with a short batch at its end
EPOCHS, STEPS, CUT = 3, 15, 7


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return images(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="module")
def runs(data, tmp_path_factory):
    """(folder of the runs by name, what the worker found of each)."""
    folder = tmp_path_factory.mktemp("runs")

    def job(name, stage, compile, *more):
        config = folder / f"zero{stage}.json"
        config.write_text(json.dumps({"zero_optimization": {"stage": stage}, "gradient_clipping": "auto"}))
        # SGD: Adam turns the rounding noise of gradients that are analytically zero into steps of full size
        optim = ("--optim.name", "sgd", "--optim.lr", 0.02, "--schedule.epochs", EPOCHS, "--ema.decay", 0.9)
        how = ("--run.ds_config", config, "--run.compile", compile, "--run.save_every", CUT)
        return [str(a) for a in arguments(data, folder / name, *optim, *how, *more)]

    jobs = {
        "off": job("off", 0, "off"),
        # which adds gradients in another order than stages 0 and 1
        "off2": job("off2", 2, "off"),
        "zero0": job("zero0", 0, "all"),
        "zero1": job("zero1", 1, "all"),
        "zero2": job("zero2", 2, "all"),
        "cut": job("cut", 1, "all", "--run.stop_after", CUT),
        "resumed": job("cut", 1, "all", "--run.resume", "auto"),
    }
    listed = folder / "runs.json"
    listed.write_text(json.dumps(list(jobs.values())))
    return folder, dict(zip(jobs, result_of(forked_ranks(WORKERS / "compiled_train.py", listed)), strict=True))


@pytest.mark.slow
@pytest.mark.parametrize("name", ["zero0", "zero1", "zero2"])
def test_three_epochs_with_evaluations_are_four_graphs_and_the_losses_of_a_run_that_is_not_compiled(runs, name):
    folder, found = runs
    assert found[name] == {"graphs": 4, "breaks": {}}
    assert found["off"] == {"graphs": 0, "breaks": {}}
    ours, expected = scalars(folder / name), scalars(folder / ("off2" if name == "zero2" else "off"))
    assert sorted(ours["loss/total"]) == list(range(1, STEPS + 1))
    for term in (tag for tag in expected if tag.startswith("loss/")):
        assert ours[term] == pytest.approx(expected[term], rel=1e-5), term
    for tag in ("val/top1", "val/ema_top1", "val/teacher_top1"):
        assert ours[tag].keys() == expected[tag].keys()


@pytest.mark.slow
def test_what_a_compiled_run_writes_has_the_names_of_one_that_is_not(runs):
    folder, _ = runs
    for file in ("student.safetensors", "student_ema.safetensors"):
        named = [{n: v.shape for n, v in load_file(path).items()} for path in sorted(folder.glob(f"*/**/{file}"))]
        assert len(named) > 4 and all(names == named[0] for names in named)


@pytest.mark.slow
def test_a_compiled_run_that_was_cut_goes_on_bit_for_bit(runs):
    folder, found = runs
    assert found["resumed"]["graphs"] == 4
    whole, resumed = (load_file(folder / name / "student.safetensors") for name in ("zero1", "cut"))
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)
    assert checkpoints_of(folder / "cut")


def test_all_at_stage_3_is_one_line(data, tmp_path):
    done = forked(
        ROOT / "launch" / "train.py", *arguments(data, tmp_path, "--run.ds_config", "zero3", "--run.compile", "all")
    )
    assert done.returncode == 2
    assert "error: run.compile is all at ZeRO stage 3" in done.stderr and "--run.compile teacher" in done.stderr
    assert "Traceback" not in done.stderr


def test_auto_is_the_teacher_on_gpus_and_nothing_on_cpus():
    assert compilation.what_to_compile("auto", "cuda", 3) == "teacher"
    assert compilation.what_to_compile("auto", "cpu", 0) == "off"
    assert compilation.what_to_compile("all", "cpu", 2) == "all"
    with pytest.raises(UserError, match=r"run\.compile is all at ZeRO stage 3"):
        compilation.what_to_compile("all", "cuda", 3)


def test_the_old_name_of_the_flag_means_what_it_did():
    assert [RunDirConfig(compile_teacher=value).compile for value in (None, True, False)] == ["auto", "teacher", "off"]
    assert RunDirConfig(compile="all", compile_teacher=False).compile == "all"


def test_compiled_code_is_kept_in_the_users_cache(monkeypatch, tmp_path):
    monkeypatch.delenv("TORCHINDUCTOR_CACHE_DIR", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    compilation.options(False)
    assert os.environ["TORCHINDUCTOR_CACHE_DIR"] == str(tmp_path / "scalekd_ds" / "compiled")
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", "mine")
    compilation.options(False)
    assert os.environ["TORCHINDUCTOR_CACHE_DIR"] == "mine"


def test_a_cache_that_cannot_be_written_is_left_to_torch(monkeypatch, tmp_path):
    monkeypatch.delenv("TORCHINDUCTOR_CACHE_DIR", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", "/proc/nowhere")
    compilation.options(False)
    assert "TORCHINDUCTOR_CACHE_DIR" not in os.environ


@pytest.mark.slow
def test_a_second_start_compiles_nothing(monkeypatch, tmp_path):
    """Forward and backward of a small model, in a process each."""
    monkeypatch.delenv("TORCHINDUCTOR_CACHE_DIR", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    first, second = (result_of(forked(WORKERS / "compile_once.py")) for _ in range(2))
    assert first["hit"] == 0 and first["miss"] >= 2
    assert second == {"hit": first["miss"], "miss": 0}


@pytest.mark.parametrize("compiler", ["/nowhere/c++", "/bin/false"])
def test_a_compiler_that_is_missing_or_fails_is_one_line(monkeypatch, tmp_path, compiler):
    import torch._inductor.config
    import torch._inductor.cpp_builder

    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    torch.compiler.reset()
    call = torch.compile(lambda x: (x.sin() + 1).cos(), **compilation.options(False))
    patched = torch._inductor.config.patch({"cpp.cxx": (compiler,)})
    with patched, pytest.raises(UserError) as caught, compilation.naming_the_compiler("all"):
        call(torch.ones(7))
    torch.compiler.reset()
    line = str(caught.value)
    assert line.startswith("run.compile is all, and torch could not compile it (")
    assert "g++" in line and "--run.compile teacher or off" in line and "\n" not in line and len(line) < 700


def test_an_error_of_the_step_itself_stays_what_it_is():
    with pytest.raises(ValueError, match="mine"), compilation.naming_the_compiler("all"):
        raise ValueError("mine")
    with pytest.raises(RuntimeError, match="mine"), compilation.naming_the_compiler("all"):
        raise RuntimeError("mine")
