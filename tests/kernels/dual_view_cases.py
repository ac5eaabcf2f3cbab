"""Numeric cases of the dual-view kernels against float64 autograd through a literal DCT; run by test_dual_view.py."""

from __future__ import annotations

import math
import sys
from pathlib import Path

import torch
import torch.nn.functional as F

sys.path.insert(0, str(Path(__file__).parents[1] / "helpers"))
from interpreted import print_cases

from scalekd_ds.kernels.dual_view import ops

WEIGHTS = [(0.08, 0.06), (0.05, 0.02), (0.3, 0.4)]


def dct(n: int) -> torch.Tensor:
    k, x = torch.meshgrid(torch.arange(n), torch.arange(n), indexing="ij")
    basis = torch.cos(math.pi * k.double() * (2 * x.double() + 1) / (2 * n)) * math.sqrt(2 / n)
    basis[0] /= math.sqrt(2)
    return basis


def literal_high_pass(x, grid, dropped):
    """DCT-II over the grid, zero the dropped frequencies, inverse."""
    rows, columns = dct(grid[0]).to(x.device), dct(grid[1]).to(x.device)
    spectrum = torch.einsum("uh,vw,bhwc->buvc", rows, columns, x.unflatten(1, grid))
    keep = torch.ones(grid, dtype=torch.float64, device=x.device)
    for u, v in dropped:
        keep[u, v] = 0
    return torch.einsum("uh,vw,buvc->bhwc", rows, columns, spectrum * keep[..., None]).flatten(1, 2)


def oracle(s_spatial, s_frequency, t, grid, dropped, upstream):
    """Losses (L, 2) and the gradients of every tensor in float64."""
    leaves = [x.double().requires_grad_() for x in (*s_spatial, *s_frequency)]
    L, t = len(s_spatial), t.double()
    t_unit, v_unit = F.normalize(t, dim=-1), F.normalize(literal_high_pass(t, grid, dropped), dim=-1)
    losses = []
    for (spatial, frequency), s, f in zip(WEIGHTS, leaves[:L], leaves[L:], strict=False):
        u = F.normalize(literal_high_pass(f, grid, dropped), dim=-1)
        losses += [spatial * (F.normalize(s, dim=-1) - t_unit).square().sum(), frequency * (u - v_unit).square().sum()]
    losses = torch.stack(losses).unflatten(0, (L, 2)) / t.shape[0]
    return losses.detach(), torch.autograd.grad((losses * upstream).sum(), leaves)


def basis_of(grid, dropped):
    rows, columns = dct(grid[0]), dct(grid[1])
    return torch.stack([torch.outer(rows[u], columns[v]).flatten() for u, v in dropped], 1).float()


def relative(ours, theirs) -> float:
    return ((ours.double() - theirs).norm() / theirs.norm()).item()


def strided_copies(x, layout):
    """`x` in memory that is not contiguous: `aligned` to 16 elements, or `odd`, with rows that begin anywhere."""
    C = x.shape[2]
    if layout == "aligned":
        return torch.cat([x, x], -1)[..., :C]
    return torch.cat([x[..., :1], x], -1)[..., 1:]


def run(B, grid, C, L=1, dtype="float32", cut=1, dropped=None, magnitude=1.0, zeros=False, strided=None, device="cpu"):
    """Errors relative to the oracle; the largest of the gradients, tokens with a clamped slope apart."""
    torch.manual_seed(0)
    P, dtype = grid[0] * grid[1], getattr(torch, dtype)
    dropped = dropped or [(u, v) for u in range(cut) for v in range(cut)]

    def tokens():
        # features have a large mean over tokens, which the filter must cancel
        x = magnitude * (torch.randn(B, P, C, dtype=torch.float64) + torch.randn(B, 1, C, dtype=torch.float64))
        return x.to(dtype).to(device)

    spatial, frequency, t = [tokens() for _ in range(L)], [tokens() for _ in range(L)], tokens()
    if zeros:
        spatial[0][0, 1], t[0, 2] = 0, 0
    if strided:
        spatial = [strided_copies(x, strided) for x in spatial]
        t = torch.stack([t, t], 1)[:, 1]
    upstream = torch.randn(L, 2, dtype=torch.float64).to(device)
    expected, gradients = oracle(spatial, frequency, t, grid, dropped, upstream)
    leaves = [x.detach().requires_grad_() for x in (*spatial, *frequency)]
    basis = None if dropped == [(0, 0)] else basis_of(grid, dropped).to(device)
    losses = ops.dual_view_stages(leaves[:L], leaves[L:], t, basis, WEIGHTS[:L])
    again = ops.dual_view_stages(leaves[:L], leaves[L:], t, basis, WEIGHTS[:L])
    ours = torch.autograd.grad((losses.double() * upstream).sum(), leaves)
    twice = torch.autograd.grad((again.double() * upstream).sum(), leaves)
    errors = {"loss": relative(losses, expected), "gradient": 0.0, "clamped": 0.0}
    for a, b in zip(ours, gradients, strict=True):
        # a token of zeros has F.normalize's slope of 1e12: compared apart, where the dtype holds it at all
        clamped = b.abs().amax(-1) > 1e6
        errors["gradient"] = max(errors["gradient"], relative(a[~clamped], b[~clamped]))
        if clamped.any() and dtype != torch.float16:
            errors["clamped"] = max(errors["clamped"], relative(a[clamped], b[clamped]))
    errors["finite"] = float(all(torch.isfinite(x).all() for x in ours))
    same = torch.equal(losses, again) and all(torch.equal(a, b) for a, b in zip(ours, twice, strict=True))
    errors["deterministic"] = float(same)
    return errors


def constant(which, device="cpu"):
    """Maps constant over tokens: loss of the frequency view per token, and the largest gradient."""
    torch.manual_seed(0)
    shape = (2, 49, 96)
    f, t = (
        torch.randn(2, 1, 96).expand(shape).contiguous() if which in (name, "both") else torch.randn(shape)
        for name in ("student", "teacher")
    )
    f = f.to(device).requires_grad_()
    losses = ops.dual_view_stages([f.detach()], [f], t.to(device), None, [(1.0, 1.0)])
    (gradient,) = torch.autograd.grad(losses[0, 1], f)
    return {"per_token": losses[0, 1].item() / 49, "gradient": gradient.abs().max().item()}


CASES = {
    "7x7": {"B": 2, "grid": (7, 7), "C": 192},
    "odd": {"B": 3, "grid": (5, 3), "C": 70},
    "one token": {"B": 2, "grid": (1, 2), "C": 33},
    "two stages": {"B": 2, "grid": (7, 7), "C": 200, "L": 2},
    "three stages": {"B": 1, "grid": (4, 4), "C": 24, "L": 3},
    "zero tokens": {"B": 2, "grid": (7, 7), "C": 64, "zeros": True},
    "zero tokens, float16": {"B": 2, "grid": (7, 7), "C": 64, "zeros": True, "dtype": "float16"},
    "large": {"B": 2, "grid": (7, 7), "C": 64, "magnitude": 1e3},
    "strided": {"B": 2, "grid": (6, 5), "C": 48, "L": 2, "strided": "aligned"},
    "strided, odd": {"B": 2, "grid": (6, 5), "C": 48, "L": 2, "strided": "odd"},
    "odd, bfloat16": {"B": 2, "grid": (5, 3), "C": 70, "L": 2, "dtype": "bfloat16", "strided": "odd"},
    "bfloat16": {"B": 2, "grid": (7, 7), "C": 192, "L": 2, "dtype": "bfloat16"},
    "float16": {"B": 2, "grid": (7, 7), "C": 192, "dtype": "float16"},
    "14x14": {"B": 1, "grid": (14, 14), "C": 40},
    "14x14, bfloat16": {"B": 1, "grid": (14, 14), "C": 72, "L": 2, "dtype": "bfloat16"},
    "16x16": {"B": 1, "grid": (16, 16), "C": 32, "L": 2},
    "24x24": {"B": 1, "grid": (24, 24), "C": 24, "L": 2},
    "32x32": {"B": 1, "grid": (32, 32), "C": 12},
    "cut 2": {"B": 2, "grid": (7, 7), "C": 100, "cut": 2, "L": 2},
    "cut 3, bfloat16": {"B": 2, "grid": (7, 7), "C": 100, "cut": 3, "dtype": "bfloat16"},
    "cut 6 of 7, dense": {"B": 2, "grid": (7, 7), "C": 100, "cut": 6, "L": 2},
    "a band without the mean": {"B": 2, "grid": (7, 7), "C": 40, "dropped": [(0, 3), (2, 1)]},
    "cut 8 of 11, dense": {"B": 1, "grid": (11, 11), "C": 40, "cut": 9, "L": 2},
    "cut 2 of 14, swept": {"B": 1, "grid": (14, 14), "C": 40, "cut": 2, "L": 2},
    "cut 3 of 20, swept": {"B": 1, "grid": (20, 20), "C": 20, "cut": 3},
}

if __name__ == "__main__":
    print_cases(
        {**CASES, **{f"constant {w}": {"which": w} for w in ("student", "teacher", "both")}},
        lambda **case: constant(**case) if "which" in case else run(**case),
    )
