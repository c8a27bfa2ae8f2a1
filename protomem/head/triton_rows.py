"""The triton head's gradients of prototype rows: of the shard's, chunk by chunk, and of those that carry a graph.

Legend as in protomem/head/triton_head.py.
"""

from __future__ import annotations

import torch

from protomem.head.targets import add_to_targets

HIDDEN = -1e30  # a logit that is not there


def fill_sink(ctx, inverse, level, threshold, weight, to_targets) -> None:
    """All gradients of the rows into the shard's buffer, chunk by chunk, or each chunk's at once into the rows' update."""
    columns, chunks, softmax = ctx.columns, ctx.chunks, threshold is None
    update = columns.sink.update
    own = None if update is None else torch.empty_like(columns.rows[: chunks.k])  # a chunk's gradient
    kept_count, x = len(ctx.kept), chunks.x
    room = x.new_empty(chunks.k, chunks.d, dtype=torch.float32) if not columns.unit or columns.injection is not None else None
    again = kept_count < len(chunks.starts)
    if again:
        scratch, tile_top = chunks.exps(1)[0], chunks.per_tile() if softmax else None
        tile_sum, tile_share = chunks.per_tile(), None if softmax else chunks.per_tile()
        chunks.operand = x.new_empty(chunks.k, chunks.d) if chunks.copied else None
    for k, start in enumerate(chunks.starts):
        if k < kept_count:
            exps, tops = ctx.kept[k], ctx.kept_top[k] if softmax else None
        else:
            exps, tops = scratch, tile_top
            chunks.logits(start, chunks.operands(start, inverse), inverse, threshold, exps, tops, tile_sum, tile_share)
        start, stop, _ = chunks.span(start)
        grad = columns.sink.buffer[start:stop] if update is None else own[: stop - start]
        chunks.row_grads(start, exps, inverse, tops, level, weight, room, grad)
        if update is not None:
            add_to_targets(to_targets, columns, grad, start)
            update(start, stop, grad)
    if update is None:
        add_to_targets(to_targets, columns, columns.sink.buffer)
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
