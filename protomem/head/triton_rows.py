"""The triton head's gradients of prototype rows: of the shard's, chunk by chunk, and of those that carry a graph.

Legend as in protomem/head/triton_head.py.
"""

from __future__ import annotations

import torch

HIDDEN = -1e30  # a logit that is not there


def _by_row(target: torch.Tensor, c: int) -> tuple[torch.Tensor, torch.Tensor]:
    """(order [B], first [C + 1]): the samples whose target is row j are order[first[j] : first[j + 1]], ascending. Those of
    other ranks, -1, stand before first[0]."""
    targets, order = torch.sort(target.int(), stable=True)
    rows = torch.arange(c + 1, device=target.device, dtype=torch.int32)
    return order, torch.searchsorted(targets, rows, out_int32=True)


def fill_sink(ctx, x, pull, inverse, level, threshold, weight) -> None:
    """All gradients of the rows, chunk by chunk, into the shard's buffer or into the rows' update. x [B, D]: the embeddings in
    fp32; pull [B]: d loss / d cos_y, of the samples whose positive is their target row."""
    columns, chunks, softmax = ctx.columns, ctx.chunks, threshold is None
    update = columns.sink.update
    own = torch.empty_like(columns.rows[: chunks.k]) if update is not None and not update.fused else None  # a gradient
    kept_count, room = len(ctx.kept), x.new_empty(chunks.k, chunks.d)
    samples = (x.contiguous(), pull.contiguous(), *_by_row(columns.target, chunks.c))
    again = kept_count < len(chunks.starts)
    if again:
        scratch, tile_top = chunks.exps(1)[0], chunks.per_tile() if softmax else None
        tile_sum, tile_share = chunks.per_tile(), None if softmax else chunks.per_tile()
        chunks.operand = chunks.x.new_empty(chunks.k, chunks.d) if chunks.copied else None
    for k, start in enumerate(chunks.starts):
        if k < kept_count:
            exps, tops = ctx.kept[k], ctx.kept_top[k] if softmax else None
        else:
            exps, tops = scratch, tile_top
            chunks.logits(start, chunks.operands(start, inverse), inverse, threshold, exps, tops, tile_sum, tile_share)
        start, stop, _ = chunks.span(start)
        chunks.row_grads(start, exps, inverse, tops, level, weight, room)
        if update is not None and update.fused:
            chunks.finish(start, room, inverse, *samples, update=update)
            continue
        grad = columns.sink.buffer[start:stop] if update is None else own[: stop - start]
        chunks.finish(start, room, inverse, *samples, out=grad)
        if update is not None:
            update(start, stop, grad)
    chunks.operand = None


def live_gradient(ctx, x, cos_y, level, threshold, weight, g_row) -> torch.Tensor:
    """d loss / d live rows [L, D]: B x L logits, in plain torch (L is at most the batch)."""
    columns, operands, scale = ctx.columns, ctx.operands, ctx.chunks.scale
    place, target = columns.live.place, columns.target[:, None]
    row = place.clamp_min(0)
    p = x.new_zeros(len(x), len(place))
    if ctx.chunks.c:
        pair = operands.prepare_logits(x), operands.prepare_logits(columns.rows[row]).t()
        cos = operands.matmul(*pair, out=x.new_empty(len(x), len(place)))
        hidden = (target == place) | (place < 0)
        if columns.valid is not None:
            hidden |= ~columns.valid[row]
        value, slope = cos, 1
        if ctx.negatives is not None:
            value, slope = ctx.negatives.value(cos, cos_y[:, None]), ctx.negatives.slope(cos, cos_y[:, None])
        z = (scale * value).masked_fill(hidden, HIDDEN)
        p = (z - level[:, None]).exp() if threshold is None else (z - threshold).sigmoid()
        p = p * slope * weight[:, None]
    p = p + ((target == place) & (place >= 0)) * g_row[:, None]
    return p.t() @ x
