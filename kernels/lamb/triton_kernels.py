"""A step of LAMB in Triton: two passes over gradients, moments and weights, and the sums of norms between them.

A block is a run of at most BLOCK elements of one layer. `blocks` (n, 4) int64 has for each of them the tensor that it lies in,
its first element there, its number of elements, and its layer; `addresses` (tensors, 4) int64 has where each tensor's gradient,
first moment, second moment and weight begin. So one launch serves flat shards that cut through layers, with padding that
belongs to no block, and lists of a layer's tensors alike. All of these tensors are float32.

The update u of a weight w with gradient g (You et al., 2020, algorithm 2) in step t is

    m <- m + (1 - beta1) (g - m)        v <- beta2 v + (1 - beta2) g^2
    u = m / (root_scale sqrt(v) + eps_term) + weight_decay w        w <- w - lr |w| / |u| u

with the norms of whole layers, and with Adam's corrections in two numbers: root_scale = (1 - beta1^t) / sqrt(1 - beta2^t) and
eps_term = (1 - beta1^t) eps. The first pass advances the moments and writes |w|^2 and |u|^2 of each block; the second one makes
u again from the moments and the weight, so that nobody keeps it. Both make the same bits, since launches switch the fusion of
multiplications and additions off. Sums have one order and no atomics.

No number that changes from step to step is specialised: nothing is compiled anew in the middle of a training.
"""

from __future__ import annotations

import triton
import triton.language as tl

# the numbers of a step
_NUMBERS = ["lerp", "beta2", "rest2", "root_scale", "eps_term", "weight_decay", "lr"]


@triton.jit
def _block(blocks_ptr, addresses_ptr):
    """A program's block: elements, layer, addresses of its gradient, moments and weight, and whether all are aligned."""
    block = blocks_ptr + 4 * tl.program_id(0).to(tl.int64)
    start, count, layer = tl.load(block + 1), tl.load(block + 2), tl.load(block + 3)
    addresses = addresses_ptr + 4 * tl.load(block)
    # of four bytes an element
    grad, first = tl.load(addresses) + 4 * start, tl.load(addresses + 1) + 4 * start
    second, weight = tl.load(addresses + 2) + 4 * start, tl.load(addresses + 3) + 4 * start
    aligned = ((grad | first | second | weight | (4 * count)) & 15) == 0
    return count, layer, grad, first, second, weight, aligned


@triton.jit
def _at(address, ALIGNED: tl.constexpr):
    """A pointer to float32, which is a multiple of 16 bytes where it is `ALIGNED`: then four elements are read at once."""
    pointer = address.to(tl.pointer_type(tl.float32))
    if ALIGNED:
        pointer = tl.multiple_of(pointer, 16)
    return pointer


@triton.jit
def _valid(count, BLOCK: tl.constexpr, ALIGNED: tl.constexpr):
    """Which elements of a block there are: of four that are read at once, all or none."""
    if ALIGNED:
        count = count // 4 * 4
    return tl.arange(0, BLOCK) < count


@triton.jit
def _direction(first, second, weight, root_scale, eps_term, weight_decay):
    """Adam's update with weight decay."""
    root = tl.sqrt_rn(second) * root_scale + eps_term
    return tl.div_rn(first, root) + weight * weight_decay


@triton.jit
def _advance(
    count,
    grad,
    first,
    second,
    weight,
    lerp,
    beta2,
    rest2,
    root_scale,
    eps_term,
    weight_decay,
    lr,
    BLOCK: tl.constexpr,
    DECAYS: tl.constexpr,
    ALIGNED: tl.constexpr,
):
    """The first pass over a block: returns |w|^2 and |u|^2, or writes the weights where nothing decays."""
    steps, valid = tl.arange(0, BLOCK), _valid(count, BLOCK, ALIGNED)
    first_ptr, second_ptr, weight_ptr = (
        _at(first, ALIGNED) + steps,
        _at(second, ALIGNED) + steps,
        _at(weight, ALIGNED) + steps,
    )
    g = tl.load(_at(grad, ALIGNED) + steps, mask=valid, other=0.0)
    m, v = tl.load(first_ptr, mask=valid, other=0.0), tl.load(second_ptr, mask=valid, other=0.0)
    w = tl.load(weight_ptr, mask=valid, other=0.0)
    m += (g - m) * lerp
    v = v * beta2 + g * rest2 * g
    tl.store(first_ptr, m, mask=valid)
    tl.store(second_ptr, v, mask=valid)
    # beyond the block it is 0 / 0 where there is no eps
    u = tl.where(valid, _direction(m, v, w, root_scale, eps_term, weight_decay), 0.0)
    if not DECAYS:
        tl.store(weight_ptr, w - u * lr, mask=valid)
    return tl.sum(w * w, 0), tl.sum(u * u, 0)


@triton.jit(do_not_specialize=_NUMBERS)
def advance_kernel(
    blocks_ptr,
    addresses_ptr,
    partials_ptr,
    lerp,
    beta2,
    rest2,
    root_scale,
    eps_term,
    weight_decay,
    lr,
    BLOCK: tl.constexpr,
    DECAYS: tl.constexpr,
):
    """Advances the moments and writes partials (n, 2), |w|^2 and |u|^2 of each block; grid (n,).

    Without `DECAYS` there is no trust ratio: it writes the weights in place of partials.
    """
    count, _, grad, first, second, weight, aligned = _block(blocks_ptr, addresses_ptr)
    if aligned:
        ww, uu = _advance(
            count, grad, first, second, weight, lerp, beta2, rest2, root_scale, eps_term, weight_decay, lr,
            BLOCK, DECAYS, True,
        )  # fmt: skip
    else:
        ww, uu = _advance(
            count, grad, first, second, weight, lerp, beta2, rest2, root_scale, eps_term, weight_decay, lr,
            BLOCK, DECAYS, False,
        )  # fmt: skip
    if DECAYS:
        partials = partials_ptr + 2 * tl.program_id(0).to(tl.int64)
        tl.store(partials, ww)
        tl.store(partials + 1, uu)


@triton.jit(do_not_specialize=["layers", "first_layer", "turns"])
def sums_kernel(partials_ptr, runs_ptr, squares_ptr, layers, first_layer, turns, BLOCK: tl.constexpr):
    """Adds the partials of each layer up in float64, into squares (2, layers); grid (segments,).

    `runs` (segments, 3) int64 has a layer, counted from `first_layer`, its first block, and the block after its last; none has
    more than turns * BLOCK of them.
    """
    run = runs_ptr + 3 * tl.program_id(0).to(tl.int64)
    layer, begin, end = tl.load(run) + first_layer, tl.load(run + 1), tl.load(run + 2)
    ww, uu = tl.zeros([BLOCK], tl.float64), tl.zeros([BLOCK], tl.float64)
    for turn in range(turns):
        block = begin + turn * BLOCK + tl.arange(0, BLOCK)
        ww += tl.load(partials_ptr + 2 * block, mask=block < end, other=0.0).to(tl.float64)
        uu += tl.load(partials_ptr + 2 * block + 1, mask=block < end, other=0.0).to(tl.float64)
    tl.store(squares_ptr + layer, tl.sum(ww, 0))
    tl.store(squares_ptr + layers + layer, tl.sum(uu, 0))


@triton.jit
def _apply(
    count,
    first,
    second,
    weight,
    factor,
    root_scale,
    eps_term,
    weight_decay,
    BLOCK: tl.constexpr,
    ALIGNED: tl.constexpr,
):
    """The second pass over a block."""
    steps, valid = tl.arange(0, BLOCK), _valid(count, BLOCK, ALIGNED)
    weight_ptr = _at(weight, ALIGNED) + steps
    m = tl.load(_at(first, ALIGNED) + steps, mask=valid, other=0.0)
    v = tl.load(_at(second, ALIGNED) + steps, mask=valid, other=0.0)
    w = tl.load(weight_ptr, mask=valid, other=0.0)
    u = _direction(m, v, w, root_scale, eps_term, weight_decay)
    tl.store(weight_ptr, w - u * factor, mask=valid)


@triton.jit(do_not_specialize=["first_layer", *_NUMBERS])
def apply_kernel(
    blocks_ptr,
    addresses_ptr,
    ratios_ptr,
    first_layer,
    root_scale,
    eps_term,
    weight_decay,
    lr,
    BLOCK: tl.constexpr,
):
    """Moves the weights against u by lr times the ratio of their layer, of ratios (layers,) float64; grid (n,)."""
    count, layer, _, first, second, weight, aligned = _block(blocks_ptr, addresses_ptr)
    factor = tl.load(ratios_ptr + first_layer + layer).to(tl.float32) * lr
    if aligned:
        _apply(count, first, second, weight, factor, root_scale, eps_term, weight_decay, BLOCK, True)
    else:
        _apply(count, first, second, weight, factor, root_scale, eps_term, weight_decay, BLOCK, False)
