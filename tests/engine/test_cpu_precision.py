"""Types that a CPU emulates are named before a run is slow: by the kernel's flags, and by what oneDNN is held to."""

import pytest
import torch
from forking import forked_with
from image_fixtures import make_dataset
from launching import ROOT
from tiny_run import arguments

from scalekd_ds.engine import ds_config
from scalekd_ds.engine.cpu_precision import cpu_computes_in, missing_gpu_notice, slow_precision_notice

NOTICE = (
    "zero1 computes in bfloat16, which this CPU emulates, many times slower than float32: --run.ds_config cpu_fp32 is "
    "the fast one here"
)


@pytest.mark.parametrize(
    ("flags", "bf16", "fp16"),
    [
        ("flags\t\t: fpu avx2 fma", False, False),
        ("flags\t\t: fpu avx2 avx512f avx512_vnni", False, False),
        ("flags\t\t: fpu avx512f avx512_bf16", True, False),
        ("flags\t\t: fpu avx512f avx512_bf16 amx_bf16 avx512_fp16", True, True),
        ("Features\t: fp asimd asimdhp", False, True),
        ("Features\t: fp asimd asimdhp bf16", True, True),
        # nothing is said, and so nothing is warned of
        ("model name\t: unknown", True, True),
    ],
)
def test_the_kernels_flags(tmp_path, monkeypatch, flags, bf16, fp16):
    monkeypatch.delenv("ONEDNN_MAX_CPU_ISA", raising=False)
    file = tmp_path / "cpuinfo"
    file.write_text(f"processor\t: 0\n{flags}\n\nprocessor\t: 1\n{flags}\n")
    assert (cpu_computes_in(torch.bfloat16, file), cpu_computes_in(torch.float16, file)) == (bf16, fp16)
    assert cpu_computes_in(torch.float32, file)
    assert cpu_computes_in(torch.bfloat16, tmp_path / "none")


@pytest.mark.parametrize(
    ("isa", "bf16"),
    [
        ("AVX2", False),
        ("avx2", False),
        ("AVX512_CORE_VNNI", False),
        ("AVX512_CORE_BF16", True),
        ("AVX512_CORE_AMX", True),
    ],
)
def test_what_onednn_is_held_to(tmp_path, monkeypatch, isa, bf16):
    file = tmp_path / "cpuinfo"
    file.write_text("flags\t: avx2 avx512_bf16 amx_bf16\n")
    monkeypatch.setenv("ONEDNN_MAX_CPU_ISA", isa)
    assert cpu_computes_in(torch.bfloat16, file) == bf16


def test_every_way_to_ask_for_16_bits(monkeypatch):
    monkeypatch.setenv("ONEDNN_MAX_CPU_ISA", "AVX2")
    names = ("cpu_fp32", "zero0", "zero1", "zero2", "zero3")
    asked = {name: ds_config.autocast_dtype(ds_config.read(name)) for name in names}
    assert asked.pop("cpu_fp32") is None and set(asked.values()) == {torch.bfloat16}
    assert slow_precision_notice(None, "cpu_fp32") is None
    assert slow_precision_notice(torch.bfloat16, "zero1") == NOTICE
    assert "float16, which this CPU emulates" in slow_precision_notice(torch.float16, "mine.json")


def test_a_run_says_so_once_and_goes_on(tmp_path):
    data = make_dataset(tmp_path / "data", train=8, val=3, classes=3, size=(32, 32))
    command = arguments(data, tmp_path / "run", "--run.ds_config", "zero1", "--schedule.epochs", 1)
    done = forked_with([{"ONEDNN_MAX_CPU_ISA": "AVX2"}], ROOT / "launch" / "train.py", *command)
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.splitlines().count(NOTICE) == 1


@pytest.mark.parametrize(
    ("dtype", "cuda", "accelerator", "is_told"),
    [
        (torch.bfloat16, "13.0", None, True),
        # float32 is meant for CPUs, as is a build of PyTorch without CUDA, and who says so
        (None, "13.0", None, False),
        (torch.bfloat16, None, None, False),
        (torch.bfloat16, "13.0", "cpu", False),
    ],
)
def test_a_run_that_finds_no_gpu_is_told_so(monkeypatch, dtype, cuda, accelerator, is_told):
    monkeypatch.setattr(torch.version, "cuda", cuda)
    monkeypatch.delenv("DS_ACCELERATOR", raising=False)
    if accelerator:
        monkeypatch.setenv("DS_ACCELERATOR", accelerator)
    notice = missing_gpu_notice(dtype)
    assert (notice is not None) == is_told
    assert notice is None or ("no GPU was found" in notice and "--gpus all" in notice and "\n" not in notice)
