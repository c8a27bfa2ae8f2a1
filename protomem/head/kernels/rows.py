"""Kernels that pass over prototype rows [K, D] or over statistics [tiles, B]; all are bound by memory.

Legend as in protomem/head/triton_head.py. Optional tensors are None where they are not wanted; a kernel is compiled for
what it gets.
"""

import triton
import triton.language as tl

HIDDEN = tl.constexpr(-1e30)  # a logit that is not there
TINY = tl.constexpr(1e-12)  # the least norm of a row


@triton.jit
def operand(p, HALF: tl.constexpr, EMULATE: tl.constexpr):
    """p as an operand of the products: fp32, or with HALF rounded to the nearest bf16. Triton's interpreter would cut the
    last bits off instead; EMULATE has them rounded before."""
    if HALF:
        if EMULATE:
            bits = p.to(tl.int32, bitcast=True)
            p = ((bits + 0x7FFF + ((bits >> 16) & 1)) & -0x10000).to(tl.float32, bitcast=True)
        return p.to(tl.bfloat16)
    else:
        return p


@triton.jit
def _length(v):
    return tl.maximum(tl.sqrt(tl.sum(v * v, 1)), TINY)


@triton.jit
def _mixed(w, unit_w, share, features, place, k, d, inside, D):
    """Rows w [R, D] with their features: v = w + c q with c = l |w| / (1 - l) (protomem/head/mixer.py), w where the share l is
    0. unit_w: 1 / |w|."""
    if place is not None:
        at = tl.load(place + k, mask=share > 0, other=0).to(tl.int64)
    else:
        at = k.to(tl.int64)
    q = tl.load(features + at[:, None] * D + d[None, :], mask=inside & (share > 0)[:, None], other=0.0).to(tl.float32)
    return w + q * (share / (1 - share) / unit_w)[:, None]


@triton.jit
def operands(
    rows, features, place, shares, out, inverse, K, D,
    UNIT: tl.constexpr, HALF: tl.constexpr, EMULATE: tl.constexpr, R: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """inverse [K] = 1 / |v| (1 for unit rows), and if `out` is given v [K, D] as the operand of the products."""
    k, d = tl.program_id(0) * R + tl.arange(0, R), tl.arange(0, WIDTH)
    inside = (k < K)[:, None] & (d < D)[None, :]
    at = k.to(tl.int64)[:, None] * D + d[None, :]
    v = tl.load(rows + at, mask=inside, other=0.0).to(tl.float32)
    if UNIT:
        scale = tl.full((R,), 1.0, tl.float32)
    else:
        scale = 1 / _length(v)
    if shares is not None:
        share = tl.load(shares + k, mask=k < K, other=0.0).to(tl.float32)
        v = _mixed(v, scale, share, features, place, k, d, inside, D)
        scale = tl.where(share > 0, 1 / _length(v), scale)
    tl.store(inverse + k, scale, mask=k < K)
    if out is not None:
        tl.store(out + at, operand(v, HALF, EMULATE), mask=inside)


@triton.jit
def gradient(grads, rows, features, place, shares, inverse, x, pull, order, first, k, d, K, D, UNIT: tl.constexpr):
    """(w, d loss / d w), both [R, D] fp32, of rows k, from grads [K, D] = sum_i p_ij x_i / |v_j|, what the negatives ask for.

    The batch's own rows: the samples of row j are order[first[j] : first[j + 1]], and each adds pull_i x_i / |v_j|, pull =
    d loss / d cos_y. Then the normalisation takes the part along v out, of both at once (a rank-one correction of each row:
    sum_i p_ij cos_ij is the product of sum_i p_ij x_i with v / |v|), and mixing, where there is any, the part along w
    (protomem/head/mixer.py).
    """
    inside = (k < K)[:, None] & (d < D)[None, :]
    at = k.to(tl.int64)[:, None] * D + d[None, :]
    w = tl.load(rows + at, mask=inside, other=0.0).to(tl.float32)
    g = tl.load(grads + at, mask=inside, other=0.0)
    scale = tl.load(inverse + k, mask=k < K, other=0.0)
    begin = tl.load(first + k, mask=k < K, other=0)
    count = tl.load(first + k + 1, mask=k < K, other=0) - begin
    for n in range(tl.max(count, 0)):
        i = tl.load(order + begin + n, mask=n < count, other=0).to(tl.int64)
        factor = tl.load(pull + i, mask=n < count, other=0.0) * scale
        own = tl.load(x + i[:, None] * D + d[None, :], mask=inside & (n < count)[:, None], other=0.0)
        g += factor[:, None] * own
    if shares is None:
        if not UNIT:
            g -= (tl.sum(g * w, 1) * scale * scale)[:, None] * w
    else:
        share = tl.load(shares + k, mask=k < K, other=0.0).to(tl.float32)
        if UNIT:
            unit_w = tl.full(k.shape, 1.0, tl.float32)
        else:
            unit_w = 1 / _length(w)
        v = _mixed(w, unit_w, share, features, place, k, d, inside, D)
        bent = g - (tl.sum(g * v, 1) * scale * scale)[:, None] * v
        if UNIT:
            g = tl.where((share > 0)[:, None], bent, g)
        else:
            flat = bent - (tl.sum(bent * w, 1) * unit_w * unit_w)[:, None] * w
            g = tl.where((share > 0)[:, None], flat, bent)
    return w, g


@triton.jit
def finish(
    grads, rows, features, place, shares, inverse, x, pull, order, first, out, K, D,
    UNIT: tl.constexpr, ADD: tl.constexpr, R: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """d loss / d w, see `gradient`, is written to or added to out [K, D]."""
    k, d = tl.program_id(0) * R + tl.arange(0, R), tl.arange(0, WIDTH)
    w, g = gradient(grads, rows, features, place, shares, inverse, x, pull, order, first, k, d, K, D, UNIT)
    inside = (k < K)[:, None] & (d < D)[None, :]
    at = k.to(tl.int64)[:, None] * D + d[None, :]
    if ADD:
        g += tl.load(out + at, mask=inside, other=0.0).to(tl.float32)
    tl.store(out + at, g.to(out.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["start"])
def merge(
    tile_top, tile_sum, tile_share, tile_best, tile_at, top, total, share, rescale, best, best_at, start, B, T,
    R: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """A chunk's statistics [T, B] into those of the rows [B].

    With a softmax (tile_top given): the running maximum `top`, total = sum exp(z - top), and rescale = exp(old - new top), by
    which sums that were taken before are brought to the new maximum. With a threshold: sums `total` and `share`.
    """
    m, t = tl.program_id(0) * R + tl.arange(0, R), tl.arange(0, WIDTH)
    inside, at = (t < T)[:, None] & (m < B)[None, :], t[:, None] * B + m[None, :]
    sums = tl.load(tile_sum + at, mask=inside, other=0.0)
    before = tl.load(total + m, mask=m < B, other=0.0)
    if tile_top is not None:
        tops = tl.load(tile_top + at, mask=inside, other=HIDDEN)
        old = tl.load(top + m, mask=m < B, other=HIDDEN)
        new = tl.maximum(old, tl.max(tops, 0))
        shrink = tl.exp(old - new)
        tl.store(top + m, new, mask=m < B)
        tl.store(rescale + m, shrink, mask=m < B)
        tl.store(total + m, before * shrink + tl.sum(sums * tl.exp(tops - new[None, :]), 0), mask=m < B)
    else:
        tl.store(total + m, before + tl.sum(sums, 0), mask=m < B)
        shares = tl.load(tile_share + at, mask=inside, other=0.0)
        tl.store(share + m, tl.load(share + m, mask=m < B, other=0.0) + tl.sum(shares, 0), mask=m < B)
    if tile_best is not None:
        found, tile = tl.max(tl.load(tile_best + at, mask=inside, other=HIDDEN), 0, return_indices=True)
        closer = (found > HIDDEN / 2) & (found > tl.load(best + m, mask=m < B, other=0.0)) & (m < B)
        tl.store(best + m, found, mask=closer)
        tl.store(best_at + m, start + tl.load(tile_at + tile * B + m, mask=closer, other=0).to(tl.int64), mask=closer)
