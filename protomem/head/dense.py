"""The reference head: plain torch, autograd, the whole [B, C] matrix. Simple enough to be believed; for tests and small C."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from protomem import distributed
from protomem.head.contract import Columns, Negatives, combine, early_cos_y


class _SumOverRanks(torch.autograd.Function):
    """SUM all-reduce whose result is used identically on every rank: each rank's part gets the full gradient once."""

    @staticmethod
    def forward(ctx, x):
        return distributed.all_reduce(x.clone(), "sum")

    @staticmethod
    def backward(ctx, grad):
        return grad


class _Combine(torch.autograd.Function):
    """`combine` of the own cosines and this rank's log-sum-exp; gradients as above."""

    @staticmethod
    def forward(ctx, own, local, scale):
        cos_y, lse = combine(own, local, torch.ones_like(local).masked_fill(local.isinf(), 0), scale)
        ctx.save_for_backward(local, lse)
        return cos_y, lse

    @staticmethod
    def backward(ctx, g_cos, grad):
        local, lse = ctx.saved_tensors
        share = torch.where(local.isinf(), torch.zeros_like(local), (local - lse).exp())
        return g_cos, grad * share, None


def _over_threshold(own: torch.Tensor, logits: torch.Tensor, threshold: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """(cos_y, sum over all ranks' negatives of softplus(z - b)) [B], from this rank's own cosines [B] and logits [B, C] (-inf:
    no negative)."""
    b = threshold.to(logits.dtype)
    over = logits - b.detach()
    parts = torch.stack([own, -F.logsigmoid(-over).sum(1), over.detach().sigmoid().sum(1)])
    cos_y, total, share = _SumOverRanks.apply(parts).unbind()
    # The value does not change; b gets the gradient of all ranks' negatives, -sigmoid(z - b), on each of them.
    return cos_y, total - share.detach() * (b - b.detach())


def dense_head(
    x: torch.Tensor,
    columns: Columns,
    scale: float,
    negatives: Negatives | None = None,
    threshold: torch.Tensor | None = None,
    **_unused,
):
    """(cos_y [B], lse_neg or sum_neg [B]) of unit embeddings x [B, D]; see protomem/head/contract.py."""
    rows = columns.rows.detach()
    if columns.sink is not None and torch.is_grad_enabled():
        rows.requires_grad_()

        def deliver(leaf):
            columns.sink.add(leaf.grad)
            leaf.grad = None

        rows.register_post_accumulate_grad_hook(deliver)
    rows = rows.to(x.dtype)
    if columns.live is not None:
        mine = columns.live.place >= 0
        rows = rows.index_put((columns.live.place[mine],), columns.live.rows[mine])
    unit = rows if columns.unit else rows / rows.norm(dim=1, keepdim=True).clamp_min(1e-12)
    if columns.injection is not None:
        i = columns.injection
        weight, q = i.weight.to(x.dtype)[:, None], (i.features if i.row is None else i.features[i.row]).to(x.dtype)
        mixed = (1 - weight) * unit + weight * q
        unit = torch.where(weight > 0, mixed / mixed.norm(dim=1, keepdim=True).clamp_min(1e-12), unit)
    cos = x @ unit.t()
    if columns.centers > 1:
        cos = cos.view(len(x), -1, columns.centers).max(2).values
    owned = columns.target >= 0
    is_target = torch.zeros(cos.shape, dtype=torch.bool, device=cos.device)
    is_target[owned.nonzero().squeeze(1), columns.target[owned]] = True
    own = cos.masked_fill(~is_target, 0).sum(1)
    if columns.own is not None:
        own = torch.where(columns.uses_own, (x * columns.own).sum(1) * owned, own)
    hidden = is_target if columns.valid is None else is_target | ~columns.valid
    if columns.nearest is not None:
        seen = cos.detach().masked_fill(hidden, float("-inf"))
        seen = torch.cat([seen, seen.new_full((len(x), 1), float("-inf"))], 1)  # a shard may be empty
        columns.nearest.cos, columns.nearest.row = seen.max(1)
    if negatives is not None:
        seen = early_cos_y(own.detach(), negatives)[:, None]
        value, slope = negatives.value(cos.detach(), seen), negatives.slope(cos.detach(), seen)
        cos = value + slope * (cos - cos.detach())
    logits = (scale * cos).masked_fill(hidden, float("-inf"))
    if threshold is not None:
        return _over_threshold(own, logits, threshold)
    # logsumexp has no gradient over a row that is all -inf, and none is wanted: route such rows around it.
    some = ~hidden.all(1) if hidden.shape[1] else torch.zeros_like(owned)
    local = logits.new_full((len(x),), float("-inf"))
    if hidden.shape[1]:
        safe = torch.where(some[:, None], logits, torch.zeros_like(logits)).logsumexp(1)
        local = torch.where(some, safe, local)
    return _Combine.apply(own, local, scale)
