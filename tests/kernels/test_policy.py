"""The policies' Triton kernels: Pillow's pixels in the interpreter, and what they compile to."""

from pathlib import Path

import pytest
import torch
from aot import ARCHITECTURES, aot, assert_sound
from interpreted import run_cases
from launches import record
from policy_pixels import MOST

from scalekd_ds.kernels.policy import launch, triton_kernels

POINTERS = {
    torch.uint8: "*u8",
    torch.int32: "*i32",
    torch.int64: "*i64",
    torch.float32: "*fp32",
    torch.float64: "*fp64",
}


@pytest.fixture(scope="module")
def differences():
    return run_cases(str(Path(__file__).with_name("policy_cases.py")))


@pytest.mark.parametrize("case", ["levels", "blends", "warps"])
def test_the_kernels_give_pillows_pixels(differences, case):
    assert differences[case]["largest"] <= MOST


def launched(monkeypatch):
    """The launches of all kernels, at a size that is trained on."""
    launches = record(monkeypatch, triton_kernels)
    images, places = torch.zeros(4, 224, 224, 3, dtype=torch.uint8), torch.arange(4)
    launch.map_levels(images, places, 1, 1, torch.zeros(1), torch.zeros(1, 256, dtype=torch.uint8))
    launch.blend(images, places, 2, torch.zeros(4))
    matrices = torch.zeros(4, 6, dtype=torch.float64)
    launch.warp(images, places, matrices, torch.zeros(4, dtype=torch.int32), torch.zeros(3, dtype=torch.uint8))
    return launches


@pytest.mark.parametrize("arch", [90, *(pytest.param(a, marks=pytest.mark.slow) for a in ARCHITECTURES if a != 90)])
def test_compiles_without_spills_and_without_fused_sums(monkeypatch, arch):
    seen = set()
    for each in launched(monkeypatch):
        types, constants = {}, {}
        for parameter in each.kernel.params:
            value = each.arguments[parameter.name]
            if parameter.is_constexpr:
                constants[parameter.name] = value
            else:
                types[parameter.name] = POINTERS[value.dtype] if isinstance(value, torch.Tensor) else "i32"
        assert each.options == {"enable_fp_fusion": False}
        pointers = [name for name, kind in types.items() if kind[0] == "*"]
        resources = aot(each.kernel, types, constants, 4, arch, aligned=pointers, fp_fusion=False)
        assert_sound(resources, arch, matrix=False)
        assert resources.fused == 0, each.kernel
        seen.add(each.kernel.__name__)
    assert seen == {f"{name}_kernel" for name in ("counts", "tables", "levels", "blend", "warp")}


def test_a_fused_sum_would_be_seen():
    types = {"images_ptr": "*u8", "out_ptr": "*u8", "places_ptr": "*i64", "factors_ptr": "*fp32"}
    types |= dict.fromkeys(("colours", "S"), "i32")
    assert aot(triton_kernels.blend_kernel, types, {"BLOCK": 256}, 4, 90, aligned=list(types)[:4]).fused > 0


def test_numbers_of_images_compile_nothing_anew():
    for kernel in ("tables", "levels", "blend"):
        parameters = getattr(triton_kernels, f"{kernel}_kernel").params
        counts = [p for p in parameters if p.name in ("autocontrast", "equalize", "measured", "colours")]
        assert counts and all(p.do_not_specialize for p in counts)
