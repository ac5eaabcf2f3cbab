"""Numeric cases of the attention kernels against float64 autograd; run by test_cross_attention.py."""

from __future__ import annotations

import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parents[1] / "helpers"))
from interpreted import print_cases

from scalekd_ds.kernels.cross_attention import ops


def oracle(q, kv, scale, upstream):
    """Output and gradients of q and kv in float64, written out head by head."""
    q, kv = q.double().requires_grad_(), kv.double().requires_grad_()
    k, v = kv.unbind(2)
    queries = q.repeat_interleave(k.shape[0] // q.shape[0], 0)
    weights = (scale * torch.einsum("bqnd,bsnd->bnqs", queries, k)).softmax(-1)
    out = torch.einsum("bnqs,bsnd->bqnd", weights, v)
    return out.detach(), *torch.autograd.grad((out * upstream).sum(), (q, kv))


def relative(ours, theirs) -> float:
    return ((ours.double() - theirs).norm() / theirs.norm()).item()


def run(B, G, N, D, Q, S, dtype="float32", magnitude=1.0, layout="fused", device="cpu"):
    """Relative errors, whether a second run has the same bits, and in float16 which overflows come and which show."""
    torch.manual_seed(0)
    dtype = getattr(torch, dtype)
    q = (magnitude * torch.randn(G, Q, N, D)).to(device, dtype)
    kv = (magnitude * torch.randn(B, S, 2, N, D)).to(device, dtype)
    upstream = torch.randn(B, Q, N, D, dtype=torch.float64).to(device)
    scale = 5 * D**-0.5
    expected = oracle(q, kv, scale, upstream)

    def ours():
        a, b = q.clone().requires_grad_(), kv.clone().requires_grad_()
        # `stacked`: the keys and values of all samples side by side on the token axis, as two views' are
        k, v = b.unbind(2) if layout == "fused" else b.transpose(0, 1).contiguous().transpose(0, 1).unbind(2)
        out = ops.cap_attention(a, k, v, scale)[0]
        return out.detach(), *torch.autograd.grad((out.double() * upstream).sum(), (a, b))

    first, second = ours(), ours()
    errors = {name: relative(x, y) for name, x, y in zip(("out", "dq", "dkv"), first, expected, strict=True)}
    errors["deterministic"] = float(all(torch.equal(x, y) for x, y in zip(first, second, strict=True)))
    if dtype == torch.float16:
        # gradients that float16 cannot hold, as under a loss scale that is too large; those just above may round down
        upstream[..., 0] = 6e4
        exact = oracle(q, kv, scale, upstream)[1:]
        overflows = [x.abs().max() > 1.01 * torch.finfo(dtype).max for x in exact]
        shown = [not x.isfinite().all() for x, overflow in zip(ours()[1:], overflows, strict=True) if overflow]
        errors["overflows"], errors["overflows_shown"] = float(sum(overflows)), float(sum(shown))
    return errors


CASES = {
    "one query for all": {"B": 5, "G": 1, "N": 2, "D": 48, "Q": 49, "S": 49},
    "a query each": {"B": 3, "G": 3, "N": 2, "D": 64, "Q": 49, "S": 49},
    "two views": {"B": 12, "G": 2, "N": 2, "D": 32, "Q": 49, "S": 49},
    "two views, stacked": {"B": 6, "G": 2, "N": 2, "D": 32, "Q": 49, "S": 49, "layout": "stacked"},
    "one query and key": {"B": 2, "G": 1, "N": 2, "D": 32, "Q": 1, "S": 1},
    "d 40, odd": {"B": 5, "G": 1, "N": 3, "D": 40, "Q": 33, "S": 70},
    "d 8": {"B": 2, "G": 1, "N": 2, "D": 8, "Q": 7, "S": 9},
    "d 96": {"B": 2, "G": 2, "N": 1, "D": 96, "Q": 49, "S": 49},
    "d 128, long": {"B": 2, "G": 1, "N": 1, "D": 128, "Q": 70, "S": 130},
    "d 192": {"B": 3, "G": 1, "N": 1, "D": 192, "Q": 49, "S": 49},
    "d 192, long": {"B": 2, "G": 2, "N": 1, "D": 192, "Q": 40, "S": 70},
    "14x14 to 14x14": {"B": 3, "G": 1, "N": 1, "D": 32, "Q": 196, "S": 196},
    "1024 keys": {"B": 1, "G": 1, "N": 1, "D": 32, "Q": 33, "S": 1024},
    "1024 queries": {"B": 1, "G": 1, "N": 1, "D": 32, "Q": 1024, "S": 33},
    "large": {"B": 2, "G": 1, "N": 2, "D": 32, "Q": 49, "S": 49, "magnitude": 30.0},
    "bfloat16": {"B": 4, "G": 1, "N": 2, "D": 32, "Q": 49, "S": 49, "dtype": "bfloat16"},
    "bfloat16, long": {"B": 2, "G": 2, "N": 1, "D": 64, "Q": 49, "S": 100, "dtype": "bfloat16"},
    "bfloat16, d 192": {"B": 2, "G": 2, "N": 1, "D": 192, "Q": 20, "S": 40, "dtype": "bfloat16"},
    "float16": {"B": 4, "G": 2, "N": 2, "D": 48, "Q": 49, "S": 49, "dtype": "float16"},
    "float16, long": {"B": 2, "G": 2, "N": 1, "D": 32, "Q": 49, "S": 100, "dtype": "float16"},
}

if __name__ == "__main__":
    print_cases(CASES, run)
