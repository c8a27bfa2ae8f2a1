"""What SGD with momentum and weight decay would have done to a row in steps without a gradient, in closed form.

A step with gradient 0 is linear in the row w and its momentum b, and the same for every number of a row:

    b' = m b + d w        w' = w - lr b'                    (Nesterov: w' = w - lr (d w + m b'))
    (w', b') = A (w, b)   A = [[1 - lr d, -lr m], [d, m]]   (Nesterov: [[1 - lr d (1 + m), -lr m m], [d, m]])

n missed steps are the product of their n matrices, whatever learning rate each had. It depends on n alone, because they are the
last n steps, so one table [n + 1, 2, 2] in double precision serves all rows; a new step multiplies it from the left. AdamW has
no such form: what it does to a row depends on each of its numbers in another way.
"""

from __future__ import annotations

import torch

MOST = 4096  # steps that the table reaches back before all rows are brought up to date (our default)


class MissedSteps:
    """The last steps of one parameter. now: how many there were, on the host; None: not known yet."""

    def __init__(self, device: torch.device):
        self.table = torch.zeros(MOST + 1, 2, 2, dtype=torch.float64, device=device)
        self.table[0].fill_diagonal_(1)
        self.now: int | None = None
        self.forget()

    def forget(self) -> None:
        """All rows are up to date."""
        self.reach = 0

    @property
    def full(self) -> bool:
        """Whether all rows have to be brought up to date before the next step."""
        return self.reach == len(self.table) - 1

    def took(self, lr: float, momentum: float, weight_decay: float, nesterov: bool) -> None:
        """A step with these numbers is over."""
        row, buffer = weight_decay, momentum  # what of them is in the new buffer
        along = (weight_decay + momentum * row, momentum * buffer) if nesterov else (row, buffer)
        old = self.table[: self.reach + 1]
        w, b = old[:, 0] * (1 - lr * along[0]) - old[:, 1] * (lr * along[1]), old[:, 0] * row + old[:, 1] * buffer
        self.table[1 : self.reach + 2] = torch.stack([w, b], 1)
        self.reach, self.now = self.reach + 1, self.now + 1

    def factors(self, last_step: torch.Tensor) -> torch.Tensor:
        """[S, 2, 2] for rows whose last step was last_step [S]."""
        return self.table[self.now - last_step]
