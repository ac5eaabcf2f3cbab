"""Numeric cases of the window attention kernels against float64 autograd; run by test_window_attention.py."""

from __future__ import annotations

import sys
from pathlib import Path

import torch
import torch.nn.functional as F

sys.path.insert(0, str(Path(__file__).parents[1] / "helpers"))
from interpreted import print_cases

from scalekd_ds.kernels.window_attention import ops, reference


def tokens_of_windows(grid, window, shift):
    """Place in the map of each token of each window, or -1 where there is none; counted out, token by token."""
    (H, W), places = grid, []
    for top in range(0, H, window[0]):
        for left in range(0, W, window[1]):
            inside = [(top + i, left + j) for i in range(window[0]) for j in range(window[1])]
            places.append([(r + shift[0]) % H * W + (c + shift[1]) % W if r < H and c < W else -1 for r, c in inside])
    return torch.tensor(places)


def oracle(qkv, constant, window, shift, scale, head_scale, pad, upstream):
    """Output and gradient of qkv in float64, window by window."""
    B, H, W, _, N, D = qkv.shape
    leaf = qkv.double().requires_grad_()
    # a last row for the tokens that are not there
    rows = torch.cat([leaf.flatten(1, 2), pad.double().expand(B, 1, 3, N, D)], 1)
    out = torch.zeros(B, H * W + 1, N, D, dtype=torch.float64, device=qkv.device)
    for i, places in enumerate(tokens_of_windows((H, W), window, shift).to(qkv.device)):
        q, k, v = rows[:, places].unbind(2)
        if head_scale is not None:
            q, k = F.normalize(q, dim=-1) * head_scale.double()[:, None], F.normalize(k, dim=-1)
        scores = scale * torch.einsum("bqnd,bsnd->bnqs", q, k)
        weights = (scores + constant[i % len(constant), ..., : len(places)].double()).softmax(-1)
        out = out.index_put(
            (torch.arange(B, device=qkv.device)[:, None], places), torch.einsum("bnqs,bsnd->bqnd", weights, v)
        )
    out = out[:, : H * W].unflatten(1, (H, W))
    return out.detach(), torch.autograd.grad((out * upstream).sum(), leaf)[0]


def relative(ours, theirs) -> float:
    return ((ours.double() - theirs).norm() / theirs.norm()).item()


def make(
    B,
    grid,
    N,
    D,
    window,
    shift=(0, 0),
    dtype="float32",
    cosine=False,
    magnitude=1.0,
    zeros=False,
    strided=False,
    device="cpu",
):
    """The arguments of the operator: qkv, constant, head_scale, pad, window, shift and scale."""
    torch.manual_seed(0)
    dtype = getattr(torch, dtype)
    shape = (B, *grid, 3, N, D + 8 * strided)
    qkv = (magnitude * torch.randn(shape)).to(device, dtype)[..., :D]
    if zeros:
        qkv[:, 0, 0] = 0
    T = window[0] * window[1]
    constant = reference.constant_of(2 * torch.randn(N, T, T), reference.mask_of(grid, window, shift)).to(device, dtype)
    head_scale = torch.linspace(1, 20, N).to(device) if cosine else None
    scale = 1.0 if cosine else D**-0.5
    return qkv, constant, head_scale, torch.randn(3, N, D).to(device, dtype), window, shift, scale


def run(**case):
    """Relative errors, and whether a second run has the same bits."""
    qkv, constant, head_scale, pad, window, shift, scale = make(**case)
    upstream = torch.randn(*qkv.shape[:3], *qkv.shape[4:], dtype=torch.float64).to(qkv.device)
    expected = oracle(qkv, constant, window, shift, scale, head_scale, pad, upstream)

    def ours():
        leaf = qkv.detach().requires_grad_()
        out = ops.window_attention(leaf, constant, head_scale, pad, *window, *shift, scale)[0]
        return out.detach(), torch.autograd.grad((out.double() * upstream).sum(), leaf)[0]

    first, second = ours(), ours()
    errors = {}
    for name, x, y in zip(("out", "dqkv"), first, expected, strict=True):
        # the gradient of a token of zeros is 1e12 times as large in cosine attention, which 16 bits do not hold: apart
        steep = (
            y.abs().amax((-1, -2, -3), keepdim=True) > 1e6
            if case.get("zeros") and name == "dqkv"
            else torch.tensor(False)
        )
        errors[name] = relative(x.masked_fill(steep.to(x.device), 0), y.masked_fill(steep.to(x.device), 0))
    errors["finite"] = float(all(x.isfinite().all() for x in first))
    errors["deterministic"] = float(all(torch.equal(x, y) for x, y in zip(first, second, strict=True)))
    return errors


CASES = {
    "one window": {"B": 2, "grid": (7, 7), "N": 1, "D": 32, "window": (7, 7)},
    "shifted": {"B": 1, "grid": (3, 9), "N": 2, "D": 32, "window": (3, 3), "shift": (1, 1)},
    "shifted, cosine": {"B": 1, "grid": (8, 8), "N": 1, "D": 32, "window": (4, 4), "shift": (2, 2), "cosine": True},
    "padded and shifted": {"B": 1, "grid": (5, 7), "N": 1, "D": 32, "window": (4, 4), "shift": (2, 2)},
    "padded, cosine": {"B": 1, "grid": (5, 9), "N": 1, "D": 24, "window": (4, 6), "shift": (2, 3), "cosine": True},
    "not square": {"B": 2, "grid": (4, 9), "N": 1, "D": 16, "window": (4, 6), "shift": (0, 3)},
    "one token": {"B": 1, "grid": (1, 2), "N": 1, "D": 16, "window": (1, 1)},
    "more than a tile": {"B": 1, "grid": (7, 10), "N": 1, "D": 32, "window": (7, 10)},
    "more than a tile, cosine": {"B": 1, "grid": (9, 8), "N": 1, "D": 32, "window": (9, 8), "cosine": True},
    "d 40, strided": {"B": 1, "grid": (4, 8), "N": 2, "D": 40, "window": (4, 8), "strided": True},
    "d 64": {"B": 1, "grid": (5, 5), "N": 1, "D": 64, "window": (5, 5)},
    "large": {"B": 1, "grid": (5, 5), "N": 2, "D": 32, "window": (5, 5), "magnitude": 10.0},
    "tokens of zeros, cosine": {"B": 1, "grid": (4, 4), "N": 2, "D": 32, "window": (4, 4), "cosine": True, "zeros": True},
    "bfloat16": {"B": 1, "grid": (7, 14), "N": 1, "D": 32, "window": (7, 7), "shift": (0, 3), "dtype": "bfloat16"},
    "bfloat16, padded, cosine": {
        "B": 1, "grid": (4, 7), "N": 1, "D": 32, "window": (4, 4), "shift": (0, 2), "cosine": True, "dtype": "bfloat16",
    },
    "bfloat16, more than a tile": {"B": 1, "grid": (9, 8), "N": 1, "D": 48, "window": (9, 8), "dtype": "bfloat16"},
    "float16": {"B": 1, "grid": (7, 7), "N": 1, "D": 32, "window": (7, 7), "dtype": "float16"},
}  # fmt: skip
# minutes in the interpreter
SLOW_CASES = {
    "window 12, shifted": {"B": 1, "grid": (24, 24), "N": 1, "D": 32, "window": (12, 12), "shift": (6, 6)},
    "window 24, cosine": {"B": 1, "grid": (24, 24), "N": 1, "D": 32, "window": (24, 24), "cosine": True},
    "window 24, bfloat16": {"B": 1, "grid": (24, 24), "N": 1, "D": 64, "window": (24, 24), "dtype": "bfloat16"},
}

if __name__ == "__main__":
    print_cases(SLOW_CASES if "slow" in sys.argv[1:] else CASES, run)
