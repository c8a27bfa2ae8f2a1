"""The reference head: plain torch, autograd, the whole [B, C] matrix. Simple enough to be believed; for tests and small C."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from protomem import distributed
from protomem.head.contract import Columns, Negatives, combine_lse


class _SumOverRanks(torch.autograd.Function):
    """SUM all-reduce whose result is used identically on every rank: each rank's part gets the full gradient once."""

    @staticmethod
    def forward(ctx, x):
        return distributed.all_reduce(x.clone(), "sum")

    @staticmethod
    def backward(ctx, grad):
        return grad


class _LseOverRanks(torch.autograd.Function):
    @staticmethod
    def forward(ctx, local):
        lse = combine_lse(local, torch.ones_like(local).masked_fill(local.isinf(), 0))
        ctx.save_for_backward(local, lse)
        return lse

    @staticmethod
    def backward(ctx, grad):
        local, lse = ctx.saved_tensors
        share = torch.where(local.isinf(), torch.zeros_like(local), (local - lse).exp())
        return grad * share


def _sum_over_threshold(logits: torch.Tensor, threshold: torch.Tensor) -> torch.Tensor:
    """[B] sum over all ranks' negatives of softplus(z - b), from this rank's logits [B, C] (-inf: no negative)."""
    b = threshold.to(logits.dtype)
    over = logits - b.detach()
    both = torch.stack([-F.logsigmoid(-over).sum(1), over.detach().sigmoid().sum(1)])
    total, share = _SumOverRanks.apply(both).unbind()
    # The value does not change; b gets the gradient of all ranks' negatives, -sigmoid(z - b), on each of them.
    return total - share.detach() * (b - b.detach())


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
    owned = columns.target >= 0
    is_target = torch.zeros(cos.shape, dtype=torch.bool, device=cos.device)
    is_target[owned.nonzero().squeeze(1), columns.target[owned]] = True
    own = cos.masked_fill(~is_target, 0).sum(1)
    if columns.own is not None:
        own = torch.where(columns.uses_own, (x * columns.own).sum(1) * owned, own)
    cos_y = _SumOverRanks.apply(own)
    hidden = is_target if columns.valid is None else is_target | ~columns.valid
    if columns.nearest is not None:
        seen = cos.detach().masked_fill(hidden, float("-inf"))
        seen = torch.cat([seen, seen.new_full((len(x), 1), float("-inf"))], 1)  # a shard may be empty
        columns.nearest.cos, columns.nearest.row = seen.max(1)
    if negatives is not None:
        value = negatives.value(cos.detach(), cos_y.detach()[:, None])
        slope = negatives.slope(cos.detach(), cos_y.detach()[:, None])
        cos = value + slope * (cos - cos.detach())
    logits = (scale * cos).masked_fill(hidden, float("-inf"))
    if threshold is not None:
        return cos_y, _sum_over_threshold(logits, threshold)
    # logsumexp has no gradient over a row that is all -inf, and none is wanted: route such rows around it.
    some = ~hidden.all(1) if hidden.shape[1] else torch.zeros_like(owned)
    local = logits.new_full((len(x),), float("-inf"))
    if hidden.shape[1]:
        safe = torch.where(some[:, None], logits, torch.zeros_like(logits)).logsumexp(1)
        local = torch.where(some, safe, local)
    return cos_y, _LseOverRanks.apply(local)
