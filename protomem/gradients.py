"""Gradients between the backward pass and the optimisers' step: a loss scale that all ranks share, and clipping over the
encoder and the shards.

Nothing here waits for the device.
"""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch

from protomem import distributed


def clip_gradients(
    encoder_params: Iterable[torch.Tensor], shard_grads: list[torch.Tensor], max_norm: float
) -> torch.Tensor:
    """Scale all gradients in place by min(1, max_norm / total); return the total norm, a 0-d tensor equal on all ranks.

    Encoder gradients are the same on every rank (after DDP) and count once; shard gradients are different rows on
    every rank and are summed: total^2 = |encoder|^2 + sum over ranks of |shards|^2. One all-reduce of one number.
    max_norm=inf only measures. A non-finite total makes all gradients non-finite: check it, or the loss, before.
    """
    grads = [p.grad for p in encoder_params if p.grad is not None]
    everything = grads + shard_grads
    device = everything[0].device if everything else torch.device("cpu")
    dtype = torch.float64 if any(g.dtype == torch.float64 for g in everything) else torch.float32

    def squared(tensors: list[torch.Tensor]) -> torch.Tensor:
        if not tensors:
            return torch.zeros((), device=device, dtype=dtype)
        return torch.stack([n.to(dtype) for n in torch._foreach_norm(tensors)]).square().sum()

    total = (squared(grads) + distributed.all_reduce(squared(shard_grads))).sqrt()
    if everything:
        torch._foreach_mul_(everything, torch.clamp(max_norm / total, max=1.0))
    return total


class LossScaler:
    """Dynamic loss scaling for fp16 whose skip decision all ranks share; numbers as in torch.amp.GradScaler.

    Each step: `scale(loss).backward()`; `found = unscale_(all gradients of this rank)`; step the optimisers only if
    `found` is 0 (reading it is the one wait of an fp16 step); `update()`. An overflow on one rank, even in its own
    shard only, skips the step on all, and the scale halves on all.
    """

    def __init__(
        self,
        device: torch.device | str = "cpu",
        initial: float = 2.0**16,
        growth: float = 2.0,
        backoff: float = 0.5,
        interval: int = 2000,
    ):
        self.growth, self.backoff, self.interval = growth, backoff, interval
        self.factor = torch.tensor(initial, dtype=torch.float32, device=device)
        self.good_steps = torch.zeros((), dtype=torch.int64, device=device)
        self.found_inf = torch.zeros((), dtype=torch.float32, device=device)

    def scale(self, loss: torch.Tensor) -> torch.Tensor:
        return loss * self.factor.to(loss.dtype)

    @torch.no_grad()
    def unscale_(self, grads: list[torch.Tensor]) -> torch.Tensor:
        """Divide by the scale in place; return 1.0 if any gradient of any rank is inf or NaN, else 0.0 (0-d tensor)."""
        self.found_inf.zero_()
        if grads:
            norms = [n.float() for n in torch._foreach_norm([g for g in grads if g.numel()], math.inf)]
            if norms:
                self.found_inf.copy_(~torch.stack(norms).isfinite().all())
            torch._foreach_mul_(grads, 1 / self.factor)
        return distributed.all_reduce(self.found_inf, "max")

    @torch.no_grad()
    def update(self) -> None:
        """Halve the scale after an overflow; double it after `interval` steps without one."""
        bad = self.found_inf > 0
        self.good_steps.copy_(torch.where(bad, 0, self.good_steps + 1))
        full = self.good_steps >= self.interval
        grown = self.factor * self.growth
        grown = torch.where(full & grown.isfinite(), grown, self.factor)
        self.factor.copy_(torch.where(bad, (self.factor * self.backoff).clamp_min(2.0**-24), grown))
        self.good_steps.masked_fill_(full, 0)

    def state_dict(self) -> dict:
        return {"factor": self.factor.item(), "good_steps": self.good_steps.item()}

    def load_state_dict(self, state: dict) -> None:
        self.factor.fill_(state["factor"])
        self.good_steps.fill_(state["good_steps"])
