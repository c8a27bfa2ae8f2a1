"""Kernels around the three products of a chunk: x v^T with the softmax behind it, p v for d x, p^T x for d v.

Legend as in protomem/head/triton_head.py. Operands are fp32 (exact, no TF32) or bf16, the sums always fp32. Triton's
interpreter multiplies the bit patterns of bf16 numbers; EMULATE has them made fp32 before, which changes no number.

With CENTERS rows for an identity, j, [K], n and T count identities: v [K * CENTERS, D], |v_j| is that of the row c_ij whose
cosine to sample i is the largest (of equal ones the first), which alone has a gradient, and winner [B, P] holds c_ij.
"""

import triton
import triton.language as tl

from protomem.head.kernels.rows import HIDDEN, operand


@triton.jit
def _product(a, b, total, EMULATE: tl.constexpr):
    if EMULATE:
        return tl.dot(a.to(tl.float32), b.to(tl.float32), total, input_precision="ieee")
    else:
        return tl.dot(a, b, total, input_precision="ieee")


@triton.jit
def _log1p(e):
    """log(1 + e) for e in [0, 1], also where 1 + e is 1: 2 atanh(e / (2 + e))."""
    t = e / (2 + e)
    u = t * t
    return 2 * t * (1 + u * (1 / 3 + u * (1 / 5 + u * (1 / 7 + u * (1 / 9 + u * (1 / 11 + u / 13))))))


@triton.jit
def _dots(x, v, m, n, rows, B, K, D, EMULATE: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr):
    """x_m v_row [BM, BN], row = rows[n]; 0 where n >= K."""
    x_at, v_at = m.to(tl.int64)[:, None] * D, rows.to(tl.int64)[None, :] * D
    z = tl.zeros((BM, BN), tl.float32)
    for k in range(0, D, BK):
        d = k + tl.arange(0, BK)
        a = tl.load(x + x_at + d[None, :], mask=(m < B)[:, None] & (d < D)[None, :], other=0.0)
        b = tl.load(v + v_at + d[:, None], mask=(d < D)[:, None] & (n < K)[None, :], other=0.0)
        z = _product(a, b, z, EMULATE)
    return z


@triton.jit(do_not_specialize=["start"])
def logits(
    x, v, inverse, target, valid, threshold, exps, winner, tile_top, tile_sum, tile_share, tile_best, tile_at,
    scale, filter_above, start, B, K, D, P,
    CENTERS: tl.constexpr, HALF: tl.constexpr, EMULATE: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """A tile [BM, BN] of z_ij = s x_i v_j / |v_j|, used up in registers: what leaves is tile_top = max_j z, tile_sum =
    sum_j exp(z - tile_top), [T, B] each, and if wanted exps [B, P] = exp(z - tile_top) (0 where z has no gradient).

    With a threshold b: tile_sum = sum_j softplus(z - b), tile_share = sum_j sigmoid(z - b), exps = sigmoid(z - b).
    """
    m, n = tl.program_id(0) * BM + tl.arange(0, BM), tl.program_id(1) * BN + tl.arange(0, BN)
    if CENTERS == 1:
        z = _dots(x, v, m, n, n, B, K, D, EMULATE, BM, BN, BK)
    else:
        z, at = tl.full((BM, BN), float("-inf"), tl.float32), tl.zeros((BM, BN), tl.int8)
        for c in range(CENTERS):
            rows = n * CENTERS + c
            cos = _dots(x, v, m, n, rows, B, K, D, EMULATE, BM, BN, BK)
            cos *= tl.load(inverse + rows, mask=n < K, other=0.0)[None, :]
            at = tl.where(cos > z, c, at).to(tl.int8)
            z = tl.maximum(z, cos, propagate_nan=tl.PropagateNan.ALL)
    own = tl.load(target + m, mask=m < B, other=-1)
    hidden = (n >= K)[None, :] | (own[:, None] == (start + n)[None, :])
    if valid is not None:
        hidden = hidden | (tl.load(valid + n, mask=n < K, other=0) == 0)[None, :]
    if CENTERS == 1:
        z *= tl.load(inverse + n, mask=n < K, other=0.0)[None, :]
    flat = hidden
    if filter_above is not None:
        flat = flat | (z > filter_above)
    z = tl.where(hidden, HIDDEN, z * scale)
    out = tl.program_id(1) * B + m
    if tile_best is not None:
        best, column = tl.max(z, 1, return_indices=True)
        tl.store(tile_best + out, best, mask=m < B)
        tl.store(tile_at + out, tl.program_id(1) * BN + column, mask=m < B)
    if filter_above is not None:
        z = tl.where(flat & (hidden == 0), 0.0, z)
    if threshold is not None:
        z -= tl.load(threshold)
        e = tl.exp(-tl.abs(z))
        share = tl.where(hidden, 0.0, tl.where(z > 0, 1.0, e) / (1 + e))
        tl.store(tile_sum + out, tl.sum(tl.where(hidden, 0.0, tl.maximum(z, 0.0) + _log1p(e)), 1), mask=m < B)
        tl.store(tile_share + out, tl.sum(share, 1), mask=m < B)
        z = share
    else:
        top = tl.max(z, 1)
        z = tl.where(hidden, 0.0, tl.exp(z - top[:, None]))
        tl.store(tile_top + out, top, mask=m < B)
        tl.store(tile_sum + out, tl.sum(z, 1), mask=m < B)
    if exps is not None:
        kept = operand(tl.where(flat, 0.0, z), HALF, EMULATE)
        place = m.to(tl.int64)[:, None] * P + n[None, :]
        tl.store(exps + place, kept, mask=(m < B)[:, None])
        if CENTERS > 1:
            tl.store(winner + place, at, mask=(m < B)[:, None])


@triton.jit
def add_dx(
    exps, winner, v, inverse, tile_top, top, rescale, out, B, K, D, P, T, SPLITS,
    CENTERS: tl.constexpr, HALF: tl.constexpr, EMULATE: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, BD: tl.constexpr,
):  # fmt: skip
    """out [SPLITS, B, D] = rescale out + sum_j exp(z_ij - top_i) v_j / |v_j|; split s takes tiles s, s + SPLITS, ...

    Without tile_top (a threshold) what stands in exps is summed as it is.
    """
    m, d = tl.program_id(0) * BM + tl.arange(0, BM), tl.program_id(1) * BD + tl.arange(0, BD)
    s, steps = tl.program_id(2), BN // BK
    inside = (m < B)[:, None] & (d < D)[None, :]
    place = out + (s.to(tl.int64) * B + m)[:, None] * D + d[None, :]
    total = tl.load(place, mask=inside, other=0.0)
    if tile_top is not None:
        total *= tl.load(rescale + m, mask=m < B, other=0.0)[:, None]
        level = tl.load(top + m, mask=m < B, other=0.0)
    exps_at = m.to(tl.int64)[:, None] * P
    for turn in range(0, tl.cdiv(T - s, SPLITS) * steps * CENTERS):
        i, c = turn // CENTERS, turn % CENTERS
        t = s + (i // steps) * SPLITS
        n = t * BN + (i % steps) * BK + tl.arange(0, BK)
        rows = n * CENTERS + c
        p = tl.load(exps + exps_at + n[None, :], mask=(m < B)[:, None], other=0.0).to(tl.float32)
        if CENTERS > 1:
            p = tl.where(tl.load(winner + exps_at + n[None, :], mask=(m < B)[:, None], other=0) == c, p, 0.0)
        p *= tl.load(inverse + rows, mask=n < K, other=0.0)[None, :]
        if tile_top is not None:
            p *= tl.exp(tl.load(tile_top + t * B + m, mask=m < B, other=HIDDEN) - level)[:, None]
        b = tl.load(v + rows.to(tl.int64)[:, None] * D + d[None, :], mask=(n < K)[:, None] & (d < D)[None, :], other=0.0)
        total = _product(operand(p, HALF, EMULATE), b, total, EMULATE)
    tl.store(place, total, mask=inside)


@triton.jit
def row_grads(
    exps, winner, x, inverse, tile_top, level, weight, out, B, K, D, P,
    CENTERS: tl.constexpr, HALF: tl.constexpr, EMULATE: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BD: tl.constexpr,
):  # fmt: skip
    """out [K, D] = sum_i p_ij x_i / |v_j| with p_ij = weight_i exp(z_ij - level_i), from exps and tile_top (or, without
    tile_top, p_ij = weight_i exps_ij). With CENTERS, out [K * CENTERS, D]: a program takes one row of each identity."""
    t = tl.program_id(0)
    n, d = t * BN + tl.arange(0, BN), tl.program_id(1) * BD + tl.arange(0, BD)
    rows = n if CENTERS == 1 else n * CENTERS + tl.program_id(2)
    total = tl.zeros((BN, BD), tl.float32)
    for start in range(0, B, BM):
        m = start + tl.arange(0, BM)
        share = tl.load(weight + m, mask=m < B, other=0.0)
        if tile_top is not None:
            top = tl.load(tile_top + t * B + m, mask=m < B, other=HIDDEN)
            share *= tl.exp(top - tl.load(level + m, mask=m < B, other=0.0))
        place = m.to(tl.int64)[:, None] * P + n[None, :]
        p = tl.load(exps + place, mask=(m < B)[:, None], other=0.0).to(tl.float32)
        if CENTERS > 1:
            p = tl.where(tl.load(winner + place, mask=(m < B)[:, None], other=0) == tl.program_id(2), p, 0.0)
        p = operand(p * share[:, None], HALF, EMULATE)
        b = tl.load(x + m.to(tl.int64)[:, None] * D + d[None, :], mask=(m < B)[:, None] & (d < D)[None, :], other=0.0)
        total = _product(tl.trans(p), b, total, EMULATE)
    total *= tl.load(inverse + rows, mask=n < K, other=0.0)[:, None]
    inside = (n < K)[:, None] & (d < D)[None, :]
    tl.store(out + rows.to(tl.int64)[:, None] * D + d[None, :], total, mask=inside)
