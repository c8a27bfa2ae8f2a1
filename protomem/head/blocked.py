"""The blocked head: plain torch over blocks of prototype rows, gradients in closed form, bounded memory.

Per block of K rows one GEMM gives B x K logits, which are used up while they are in cache; nothing of size B x C and no
normalised copy of the rows is ever allocated. Logits of the first blocks are kept for the backward while they fit in
`store_mb` (on CPUs that multiply bf16 their exponentials, if asked for bf16); the others are computed again. d loss / d rows
goes straight into the shard's one gradient buffer, or block by block into the rows' update, with the backward of the
normalisation folded in as a rank-one correction per row. With u_j = w_j / |w_j| and g = d loss / d lse:

    p_ij = g_i s exp(z_ij - lse_i) slope_ij            for negatives; the target has its own fp32 path
    d x_i = sum_j p_ij u_j                             d w_j = (sum_i p_ij x_i - (sum_i p_ij cos_ij) u_j) / |w_j|

With a threshold b the sum of softplus(z_ij - b) takes the place of lse, and p_ij = g_i s sigmoid(z_ij - b) slope_ij.

Legend: B global batch, C prototype rows of this rank, K rows of a block, D feature size.
"""

from __future__ import annotations

import torch

from protomem import distributed
from protomem.head.centers import pool, resolved, spread
from protomem.head.contract import Columns, Negatives, combine, early_cos_y, inverse_norm
from protomem.head.mixer import Mixer, restoring
from protomem.head.operands import Operands
from protomem.head.targets import add_to_targets, own_gradients, own_prototypes, target_gradients

HIDDEN = -1e30  # a logit that is not there: finite, so that 0 * HIDDEN is 0


def block_rows(batch: int) -> int:
    """Rows per block: about 1 MiB of fp32 logits, which stay in a core's cache (our default)."""
    return max(256, min(8192, (1 << 18) // max(1, batch) // 64 * 64))


def _exp(t: torch.Tensor) -> torch.Tensor:
    """exp in place. On CPUs numbers below -87 (hidden columns above all) take a path that is 60 to 400 times slower, so they
    count as e^-87 = 1.6e-38, which adds nothing to a sum that holds e^0."""
    return (t.clamp_min_(-87.0) if t.device.type == "cpu" and t.dtype == torch.float32 else t).exp_()


def _softplus_and_share(over: torch.Tensor, spare: torch.Tensor) -> torch.Tensor:
    """[2, B]: sums over the columns of softplus(over) and of its derivative. over [B, K] is used up; spare: another one."""
    share = torch.sigmoid(over, out=spare).sum(1)
    tail = _exp(torch.abs(over, out=spare).neg_()).log1p_()
    return torch.stack([over.clamp_min_(0).add_(tail).sum(1), share])


class _Pool:
    """Buffers that live on between steps: on CPUs the page faults of fresh ones cost more than the arithmetic."""

    def __init__(self):
        self.free: list[torch.Tensor] = []

    def take(self, rows: int, columns: int, like: torch.Tensor) -> torch.Tensor:
        for k, buffer in enumerate(self.free):
            if buffer.numel() == rows * columns and buffer.dtype == like.dtype and buffer.device == like.device:
                return self.free.pop(k).view(rows, columns)
        return like.new_empty(rows, columns)

    def give(self, buffer: torch.Tensor) -> None:
        self.free = [buffer, *self.free][:4]  # two loss terms need two kept-logit buffers and two scratch ones


_pool = _Pool()


def _hide(z, columns: Columns, start: int, stop: int) -> None:
    """Take targets and empty rows out of the logits z [B, K] of rows start:stop, or of their identities. No host sync."""
    target, k = columns.target, columns.centers
    if k > 1:
        target, start, stop = target // k, start // k, stop // k
    inside = (target >= start) & (target < stop)
    place = (target - start).clamp(0, stop - start - 1)[:, None]
    z.scatter_(1, place, torch.where(inside[:, None], torch.full_like(place, HIDDEN, dtype=z.dtype), z.gather(1, place)))
    if columns.valid is not None:
        z.masked_fill_(~columns.valid[start:stop], HIDDEN)


class _Head(torch.autograd.Function):
    @staticmethod
    @restoring
    def forward(ctx, x, own, live, columns: Columns, scale, negatives, operands, block, store, keep, threshold):
        rows, (b, c) = columns.rows, (len(x), len(columns.rows))
        mixer = ctx.mixer = Mixer(columns, x, block) if columns.injection is not None and c else None
        plain, mine = own_prototypes(x, own, columns)
        own_cos = (x * mine).sum(1)
        seen_cos = early_cos_y(own_cos, negatives)[:, None]
        inverse = torch.ones(c, dtype=x.dtype, device=x.device)
        many = columns.centers > 1
        light = operands.units and negatives is threshold is columns.injection is columns.live is None and not many
        like = x.bfloat16() if light else x
        kept_blocks = min(-(-c // block), store // max(1, b * block * like.element_size())) if keep else 0
        kept = _pool.take(kept_blocks, b * block, like) if kept_blocks else None
        tops = x.new_empty(kept_blocks, b) if light else None
        threshold = None if threshold is None else threshold.to(x.dtype)
        scratch = _pool.take(2, b * block, x) if c else None
        xl = operands.prepare_logits(x)
        above = x.new_zeros(2, b)  # with a threshold: sums of softplus(z - b) and of its derivative
        top, total = x.new_full((b,), HIDDEN), x.new_zeros(b)
        nearest = columns.nearest
        if nearest is not None:
            nearest.cos, nearest.row = x.new_full((b,), float("-inf")), torch.zeros_like(columns.target)
        for k, start in enumerate(range(0, c, block)):
            stop = min(start + block, c)
            w = rows[start:stop]
            if not columns.unit:
                inverse[start:stop] = inverse_norm(w.to(x.dtype))
            z = _view(kept[k] if k < kept_blocks and not light else scratch[0], b, stop - start)
            w = w if mixer is None else mixer.put(start, stop, inverse)
            operands.matmul(xl, operands.prepare_logits(w).t(), out=z)
            if mixer is not None:
                mixer.restore()
            z.mul_(inverse[start:stop] * scale)
            z = pool(z, columns.centers)[0] if many else z
            _hide(z, columns, start, stop)
            if nearest is not None:
                best, at = z.max(1)
                closer = (best > HIDDEN / 2) & (best / scale > nearest.cos)
                nearest.cos = torch.where(closer, best / scale, nearest.cos)
                nearest.row = torch.where(closer, at + start // columns.centers, nearest.row)
            seen = _view(scratch[1], b, z.shape[1])
            if negatives is None:
                values = z
            else:
                values = torch.where(z == HIDDEN, z, scale * negatives.value(z / scale, seen_cos))
            if threshold is not None:  # scratch[0]: logits that are kept are not in it, others are not wanted any more
                above += _softplus_and_share(torch.sub(values, threshold, out=seen), _view(scratch[0], b, z.shape[1]))
                continue
            higher = torch.maximum(top, values.amax(1))
            total.mul_((top - higher).exp_())
            total += _exp(torch.sub(values, higher[:, None], out=seen)).sum(1)
            top = higher
            if light and k < kept_blocks:
                _view(kept[k], b, stop - start).copy_(seen)
                tops[k] = top
        if threshold is None:
            none = top <= HIDDEN / 2
            cos_y, out = combine(own_cos, top.masked_fill(none, float("-inf")), total.masked_fill(none, 0), scale)
            level = out
        else:
            sums = distributed.all_reduce(torch.cat([own_cos[None], above]))
            cos_y, out, ctx.share = (t.clone() for t in sums.unbind())
            level = threshold
        if scratch is not None:
            _pool.give(scratch)
        ctx.columns, ctx.scale, ctx.negatives, ctx.operands, ctx.block = columns, scale, negatives, operands, block
        ctx.kept, ctx.kept_blocks, ctx.tops, ctx.has_own = kept, kept_blocks, tops, own is not None
        ctx.live = columns.live.place if live is not None else None
        ctx.inverse_w = mixer.inverse_w if mixer is not None else None
        ctx.unified = threshold is not None
        ctx.save_for_backward(x, mine, cos_y, level, inverse, plain)
        return cos_y, out

    @staticmethod
    @restoring
    def backward(ctx, g_cos, g_out):
        x, mine, cos_y, level, inverse, plain = ctx.saved_tensors
        columns, scale, operands, block = ctx.columns, ctx.scale, ctx.operands, ctx.block
        rows, sink, (b, c) = columns.rows, columns.sink, (len(x), len(columns.rows))
        scratch = _pool.take(2, b * block, x) if c else None
        xl, xg = operands.prepare_logits(x), operands.prepare(x)
        dx = mine * g_cos[:, None]
        place, many = ctx.live, columns.centers > 1
        mixer = ctx.mixer = Mixer(columns, x, block, ctx.inverse_w) if ctx.inverse_w is not None else None
        seen_live = x.new_zeros(b, len(place)) if place is not None else None  # [B, L] d loss / d z of the live rows
        factor = (g_out * scale)[:, None]
        shift = torch.where(level.isinf(), torch.zeros_like(level), level)[:, None]
        steep = torch.sigmoid_ if ctx.unified else _exp  # d out / d z_j from z_j - shift
        d_own, g_row = own_gradients(x, g_cos, columns, ctx.has_own)
        update = None if sink is None else sink.update
        if sink is not None:
            sink.once()
            to_targets = target_gradients(x, g_row, cos_y, mine, plain, inverse, columns) if c else None
            room = _pool.take(block, x.shape[1], x) if c and update is not None else None  # a block's gradient
        for k, start in enumerate(range(0, c, block)):
            stop = min(start + block, c)
            w, grad = rows[start:stop], None
            if sink is not None:
                grad = sink.buffer[start:stop] if update is None else room[: stop - start]
            if ctx.tops is not None and k < ctx.kept_blocks:
                share = factor * (ctx.tops[k][:, None] - shift).exp()
                exps = _view(ctx.kept[k], b, stop - start)
                _from_exponentials(exps, share, x, w, inverse[start:stop], columns, dx, grad)
                if update is not None:
                    add_to_targets(to_targets, columns, grad, start)
                    update(start, stop, grad)
                continue
            v = w if mixer is None else mixer.put(start, stop)
            wg = operands.prepare(v)
            z = rows_z = _view(ctx.kept[k] if k < ctx.kept_blocks else scratch[0], b, stop - start)
            if k >= ctx.kept_blocks:
                operands.matmul(xl, (operands.prepare_logits(v) if operands.units else wg).t(), out=z)
                z.mul_(inverse[start:stop] * scale)
            if many:
                z, at = pool(z, columns.centers)
            if many or k >= ctx.kept_blocks:
                _hide(z, columns, start, stop)
            p = _view(scratch[1], b, z.shape[1])
            if ctx.negatives is None:
                steep(torch.sub(z, shift, out=p))
            else:
                cos, hidden = z / scale, z == HIDDEN
                value = ctx.negatives.value(cos, cos_y[:, None])
                p.copy_(steep(scale * value - shift) * ctx.negatives.slope(cos, cos_y[:, None])).masked_fill_(hidden, 0)
            p.mul_(factor)
            if many:
                z, p = rows_z, spread(p, at, x.new_empty(b, stop - start))
            if not columns.unit or mixer is not None:
                p.mul_(inverse[start:stop])
            pg = operands.prepare(p)
            operands.addmm(dx, pg, wg)
            if mixer is not None:
                mixer.restore()
            if place is not None:
                inside = (place >= start) & (place < stop)
                seen_live += p[:, (place - start).clamp(0, stop - start - 1)] * inside
            if sink is not None:
                before = None if mixer is None or sink.fresh else mixer.take_out(grad)
                if sink.fresh:
                    operands.matmul(pg.t(), xg, out=grad)
                else:
                    operands.addmm(grad, pg.t(), xg)
                if not columns.unit or mixer is not None:
                    along = z.mul_(p).sum(0).mul_(inverse[start:stop]).div_(-scale)
                if not columns.unit:
                    grad.addcmul_(w, along[:, None])
                if mixer is not None:
                    mixer.carry(grad, along, before)
                if update is not None:
                    add_to_targets(to_targets, columns, grad, start)
                    update(start, stop, grad)
        d_live = None
        if place is not None:
            seen_live += ((columns.target[:, None] == place) & (place >= 0)) * g_row[:, None]
            d_live = seen_live.t() @ x
        if sink is not None:
            if c and update is None:
                add_to_targets(to_targets, columns, sink.buffer)
            sink.fresh = False
        for buffer in (scratch, ctx.kept, room if sink is not None else None):
            if buffer is not None:
                _pool.give(buffer)
        ctx.kept = None
        d_threshold = -(g_out * ctx.share).sum()[None] if ctx.unified else None
        return dx, d_own, d_live, None, None, None, None, None, None, None, d_threshold


def _from_exponentials(exps, share, x, w, inverse, columns: Columns, dx, grad) -> None:
    """A block's part of dx [B, D], and its gradient grad [K, D] if wanted, from kept exponentials [B, K] in bf16. What p_ij
    is besides is a factor of the sample, share [B, 1], and one of the row, inverse [K]."""
    p, half = (exps * inverse).bfloat16(), w.bfloat16()
    dx.addcmul_(torch.mm(p, half), share)
    if grad is None:
        return
    raw = torch.mm(p.t(), (x * share).bfloat16())
    if columns.sink.fresh:
        grad.copy_(raw)
    else:
        grad.add_(raw)
    if not columns.unit:
        along = (raw * half).sum(1, dtype=grad.dtype) * inverse.square()
        grad.addcmul_(w, along[:, None], value=-1)


def _view(buffer: torch.Tensor, b: int, width: int) -> torch.Tensor:
    """The first b * width numbers of a flat scratch row, as a contiguous [b, width] matrix."""
    return buffer[: b * width].view(b, width)


def blocked_head(
    x: torch.Tensor,
    columns: Columns,
    scale: float,
    negatives: Negatives | None = None,
    threshold: torch.Tensor | None = None,
    *,
    precision: str = "fp32",
    block: int = 0,
    store_mb: float = 16.0,
):
    """(cos_y [B], lse_neg or sum_neg [B]) of unit embeddings x [B, D]; see protomem/head/contract.py.

    precision: `fp32`, or `bf16` for bf16 GEMM operands with fp32 sums, target path and softmax statistics.
    block: rows per block (0: `block_rows(B)`). store_mb: MiB of logits kept for the backward (our default: 16).
    """
    columns, many = resolved(x, columns), columns.centers
    block = min(-(-(block or block_rows(len(x))) // many) * many, max(1, len(columns.rows)))  # whole identities
    live = columns.live.rows if columns.live is not None else None
    graphs = any(t is not None and t.requires_grad for t in (x, columns.own, live, threshold))
    keep = torch.is_grad_enabled() and (graphs or columns.sink is not None)
    operands = Operands(precision, x.dtype, x.device)
    store = int(store_mb * 2**20)
    return _Head.apply(x, columns.own, live, columns, scale, negatives, operands, block, store, keep, threshold)
