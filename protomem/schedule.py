"""The learning rate as a plain function of the step."""

from __future__ import annotations

import math
from collections.abc import Sequence

from protomem.errors import UserError

DECAYS = ("polynomial", "cosine", "step", "constant")


def learning_rate(
    step: int,
    total_steps: int,
    base_lr: float,
    warmup_steps: int = 0,
    decay: str = "polynomial",
    power: float = 2.0,
    milestones: Sequence[float] = (),
    gamma: float = 0.1,
    final_lr: float = 0.0,
) -> float:
    """The learning rate of optimiser step `step` (0, 1, ..., total_steps - 1; later steps keep the last value).

    Warm-up is linear: step k of the first `warmup_steps` gets base_lr (k + 1) / warmup_steps, so that no step is made
    with rate 0 and the last warm-up step has base_lr (our default; insightface starts from 0). Then, with
    t = (step - warmup_steps) / (total_steps - warmup_steps):
    * polynomial: final_lr + (base_lr - final_lr) (1 - t)^power; power 2 is insightface's.
    * cosine: final_lr + (base_lr - final_lr) (1 + cos(pi t)) / 2.
    * step: base_lr gamma^(number of milestones reached), not below final_lr. A milestone below 1 is a fraction of
      total_steps (rounded), else a step.
    * constant: base_lr; final_lr must be 0.

    Raises UserError for an unknown decay and for values that make no sense.
    """
    if decay not in DECAYS:
        raise UserError(f"decay={decay} is not one of {', '.join(DECAYS)}")
    if total_steps < 1 or not 0 <= warmup_steps <= total_steps:
        raise UserError(f"warmup_steps={warmup_steps} must lie between 0 and total_steps={total_steps} (at least 1)")
    if step < 0 or base_lr < 0 or final_lr < 0:
        raise UserError(f"step={step}, base_lr={base_lr} and final_lr={final_lr} must not be negative")
    if decay == "step" and (not milestones or min(milestones) <= 0):
        raise UserError(f"decay=step needs positive milestones (fractions below 1, or steps), not {list(milestones)}")
    if decay != "step" and milestones:
        raise UserError(f"milestones={list(milestones)} do nothing with decay={decay}; remove them or set decay=step")
    if decay == "constant" and final_lr:
        raise UserError(f"final_lr={final_lr} has no effect with decay=constant; remove it or choose another decay")
    if step < warmup_steps:
        return base_lr * (step + 1) / warmup_steps
    t = (min(step, total_steps) - warmup_steps) / max(total_steps - warmup_steps, 1)
    if decay == "polynomial":
        return final_lr + (base_lr - final_lr) * (1 - t) ** power
    if decay == "cosine":
        return final_lr + (base_lr - final_lr) * (1 + math.cos(math.pi * t)) / 2
    if decay == "step":
        reached = sum(step >= (round(m * total_steps) if m < 1 else m) for m in milestones)
        return max(base_lr * gamma**reached, final_lr)
    return base_lr
