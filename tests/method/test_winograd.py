"""The projector's convolution on CPUs: Winograd's filtering and patches against the convolution, and which is taken where."""

import pytest
import torch
import torch.nn.functional as F
from golden_files import relative_error

from scalekd_ds.projector import convolution
from scalekd_ds.projector.convolution import PatchConv
from scalekd_ds.projector.winograd import tiles_of, winograd_conv


def results_of(call, x, weight, bias, upstream):
    """Output and gradients of a convolution."""
    leaves = [tensor.detach().clone().requires_grad_() for tensor in (x, weight, bias)]
    out = call(*leaves)
    return out, *torch.autograd.grad((out * upstream).sum(), leaves)


@pytest.mark.parametrize("grid", [(1, 1), (2, 2), (7, 7), (4, 7), (5, 6)])
def test_winograd_is_the_convolution(grid):
    torch.manual_seed(0)
    x, weight, bias = torch.randn(3, 24, *grid), torch.randn(40, 24, 3, 3) / 15, torch.randn(40)
    upstream = torch.randn(3, 40, *grid)
    exact = results_of(
        lambda x, w, b: F.conv2d(x, w, b, padding=1), x.double(), weight.double(), bias.double(), upstream.double()
    )
    for ours, expected in zip(results_of(winograd_conv, x, weight, bias, upstream), exact, strict=True):
        assert relative_error(ours.double(), expected) < 2e-6


def test_its_output_becomes_tokens_without_a_copy():
    y = winograd_conv(torch.randn(2, 8, 7, 7), torch.randn(8, 8, 3, 3), torch.zeros(8))
    assert y.is_contiguous(memory_format=torch.channels_last)


def test_tiles_cover_odd_sides():
    assert tiles_of(torch.empty(8, 3, 14, 14)) == 8 * 49 and tiles_of(torch.empty(8, 3, 7, 5)) == 8 * 12


@pytest.mark.parametrize(
    ("shape", "way"),
    [
        ((8, 1024, 14, 14), "winograd"),
        ((32, 512, 7, 7), "winograd"),
        ((8, 2048, 7, 7), "patches"),
        ((8, 512, 7, 7), "convolution"),
        ((2, 1024, 14, 14), "convolution"),
    ],
)
def test_the_fastest_way_is_taken_where_it_was_measured(monkeypatch, shape, way):
    monkeypatch.setattr(convolution, "_IS_AVX2", True)
    monkeypatch.setattr(convolution, "winograd_conv", lambda *args: taken.append("winograd"))
    monkeypatch.setattr(torch.nn.Conv2d, "forward", lambda self, x: taken.append("convolution"))
    monkeypatch.setattr(convolution, "patches_of", lambda x: taken.append("patches"))
    taken: list[str] = []
    # its channels say which way is taken; its own weights, which would take 150 MB, are not needed for that
    conv = PatchConv(1)
    x = torch.empty(shape)
    conv.patches(x) or taken or conv(x)
    assert taken == [way]


def test_what_was_not_measured_keeps_the_convolution(monkeypatch):
    wide, small = torch.empty(8, 1024, 14, 14), torch.empty(8, 2048, 7, 7)
    monkeypatch.setattr(convolution, "winograd_conv", None)
    monkeypatch.setattr(torch.nn.Conv2d, "forward", lambda self, x: "convolution")
    monkeypatch.setattr(convolution, "_IS_AVX2", False)
    assert PatchConv(1)(wide) == "convolution" and PatchConv(1).patches(small) is None
    monkeypatch.setattr(convolution, "_IS_AVX2", True)
    assert PatchConv(1)(wide.double()) == "convolution" and PatchConv(1).patches(small.double()) is None
    assert PatchConv(1)(wide.to("meta")) == "convolution" and PatchConv(1).patches(small.to("meta")) is None
    # where a plan is made, whose numbers must not depend on the machine
    with torch.device("meta"):
        planned = PatchConv(1)
    assert planned(wide) == "convolution" and planned.patches(small) is None
