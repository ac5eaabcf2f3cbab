#!/usr/bin/env python3
"""The two kernels without the rest of the package: values and gradients beside those of their plain PyTorch reference.

python examples/kernels_only.py
python examples/kernels_only.py --batch 2 --tokens 49 --channels 96             seconds on a CPU
"""

import argparse

import torch

from scalekd_ds.kernels import cap_attention, dual_view_loss
from scalekd_ds.kernels.cross_attention import api as attention_api
from scalekd_ds.kernels.cross_attention import reference as attention_reference
from scalekd_ds.kernels.cross_attention import table
from scalekd_ds.kernels.dual_view import api as loss_api
from scalekd_ds.kernels.dual_view import reference as loss_reference


def differences(ours, reference, inputs):
    """Largest difference in the value, and in the gradients of the inputs, as a share of the reference's largest."""
    shares, upstream = [], torch.randn_like(reference)
    gradients = [torch.autograd.grad(out, inputs, upstream) for out in (ours, reference)]
    for a, b in [(ours, reference), *zip(*gradients, strict=True)]:
        shares.append(((a - b).abs().max() / b.abs().max()).item())
    return f"value {shares[0]:.1e}, gradients {max(shares[1:]):.1e}"


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--tokens", type=int, default=196, help="tokens of the teacher's grid")
    parser.add_argument("--channels", type=int, default=1024, help="channels of the teacher, in heads of 32")
    args = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.manual_seed(0)

    # both views of one stage against the same target; `filter` would drop more than the mean: losses.frequency_filter
    shape = (args.batch, args.tokens, args.channels)
    spatial, frequency = (torch.randn(shape, device=device, requires_grad=True) for _ in range(2))
    target = torch.randn(shape, device=device)
    weights = (0.08, 0.06)
    ours = dual_view_loss(spatial, frequency, target, weights=weights)
    reference = loss_reference.dual_view_loss([spatial], [frequency], target, None, [weights])[0]
    chosen = loss_api.implementation(device, {target.dtype}, args.tokens, None)
    print(f"dual_view_loss: {chosen} on {device}: spatial {ours[0].item():.4f}, frequency {ours[1].item():.4f}")
    print(f"  against the reference: {differences(ours, reference, (spatial, frequency))}")

    # (batch, tokens, heads, head size); q has a batch of 1, as one learned query serves the whole batch
    heads, head_size = args.channels // 32, 32
    q = torch.randn(1, args.tokens, heads, head_size, device=device, requires_grad=True)
    k, v = (torch.randn(args.batch, args.tokens, heads, head_size, device=device, requires_grad=True) for _ in range(2))
    scale = 5.0 * head_size**-0.5
    ours = cap_attention(q, k, v, scale)
    reference = attention_reference.cap_attention(q, k, v, scale)
    architecture = table.architecture_of(k.device) if device == "cuda" else 0
    sizes = (head_size, args.tokens, args.tokens)
    chosen = attention_api.implementation(device, architecture, sizes, True, k.dtype, table.measured())
    print(f"cap_attention: {chosen} on {device}: {tuple(ours.shape)}")
    print(f"  against the reference: {differences(ours, reference, (q, k, v))}")


if __name__ == "__main__":
    main()
