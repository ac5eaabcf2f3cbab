"""Linear layers in 8-bit floats (e4m3), by torchao: a scale for each row of the weights, and for each token as it comes."""

from __future__ import annotations

import warnings
from collections.abc import Iterable

import torch
from torch import nn

from scalekd_ds.errors import UserError

# the matrix products of 8-bit floats take sides that are multiples of it
_MULTIPLE = 16
# the first generation of GPUs whose tensor cores take 8-bit floats: Ada
_CAPABILITY = (8, 9)


def check_float8(device: torch.device) -> None:
    """Refuses a GPU without 8-bit floats and an environment without torchao. CPUs emulate them, slowly, with the same numbers.

    Raises:
        UserError: One of the two is missing.
    """
    if device.type == "cuda" and torch.cuda.get_device_capability(device) < _CAPABILITY:
        raise UserError(
            f"run.teacher_precision is fp8 and {torch.cuda.get_device_name(device)} has no 8-bit floats, which came with "
            "compute capability 8.9 (L4, H100): take --run.teacher_precision bf16."
        )
    try:
        import torchao  # noqa: F401
    except ImportError:
        raise UserError(
            "run.teacher_precision is fp8, which torchao computes: pip install 'scalekd_ds[fp8]', or take bf16."
        ) from None


@torch.no_grad()
def to_float8(layers: Iterable[nn.Linear]) -> int:
    """Holds the weights of linear layers in 8-bit floats, in place; their inputs are rounded when they come.

    A weight W (out, in) becomes W / s with s = max|W| / 448 of each row, and x (tokens, in) likewise of each token, so that
    outliers of one token or channel leave the others as they are. Sums are those of the tensor cores, the output is in bf16.

    Args:
        layers: Layers in bf16, which are used forward alone.

    Returns:
        How many were converted: those whose sides are multiples of 16.
    """
    with warnings.catch_warnings():
        # of what torchao registers with other versions of PyTorch
        warnings.simplefilter("ignore")
        from torchao.float8.inference import Float8MMConfig
        from torchao.quantization import PerRow
        from torchao.quantization.quantize_.common.kernel_preference import KernelPreference
        from torchao.quantization.quantize_.workflows import Float8Tensor, QuantizeTensorToFloat8Kwargs
    rows, kernel = PerRow(), KernelPreference.TORCH
    converted = 0
    for layer in layers:
        if layer.in_features % _MULTIPLE or layer.out_features % _MULTIPLE:
            continue
        # as `torchao.quantize_` does with Float8DynamicActivationFloat8WeightConfig, which refuses CPUs
        weight = Float8Tensor.from_hp(
            layer.weight.detach(),
            granularity=rows,
            mm_config=Float8MMConfig(use_fast_accum=True),
            kernel_preference=kernel,
            act_quant_kwargs=QuantizeTensorToFloat8Kwargs(torch.float8_e4m3fn, rows, kernel_preference=kernel),
        )
        layer.weight = nn.Parameter(weight, requires_grad=False)
        converted += 1
    return converted
