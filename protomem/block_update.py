"""The optimizer's update of a classifier shard inside the head's backward, a block of rows at a time.

The head hands over each block's gradient in a scratch buffer; the block's rows and their optimizer state are updated at once,
while they are in cache, and no gradient of the shard's size ever exists. Arithmetic, hyper-parameters (with their schedule)
and state are those of the torch optimizer that a run has anyway, so results do not change by a bit, and a checkpoint does not
show which way it was made.
"""

from __future__ import annotations

import torch
from torch.optim.adamw import adamw
from torch.optim.sgd import sgd


class BlockUpdate:
    """Steps the rows of `parameter` [C, K * D], the only one of `optimizer` (torch's SGD or AdamW), block by block.

    Once in a step: `begin()`, then `update(start, stop, grad)` for blocks that cover all C * K rows of D numbers once. The
    optimizer's own `step` must find no gradient on the parameter.
    """

    def __init__(self, optimizer: torch.optim.Optimizer, parameter: torch.nn.Parameter):
        self.optimizer, self.parameter = optimizer, parameter
        self.adam = isinstance(optimizer, torch.optim.AdamW)

    def begin(self) -> None:
        p, group, state = self.parameter, self.optimizer.param_groups[0], self.optimizer.state[self.parameter]
        # As torch makes it in the first step.
        if self.adam and not state:
            state["step"] = torch.zeros((), dtype=torch.float32, device=p.device if group["fused"] else "cpu")
        for key in ("exp_avg", "exp_avg_sq") if self.adam else ("momentum_buffer",) if group["momentum"] else ():
            if state.get(key) is None:
                state[key] = torch.zeros_like(p, requires_grad=False)
        if self.adam:
            self.before = state["step"].clone()
            state["step"] += 1

    def __call__(self, start: int, stop: int, grad: torch.Tensor) -> None:
        """grad [stop - start, D]: d loss / d rows start:stop."""
        group, state = self.optimizer.param_groups[0], self.optimizer.state[self.parameter]

        def rows_of(whole: torch.Tensor) -> torch.Tensor:
            return whole.view(-1, grad.shape[1])[start:stop]

        rows = [rows_of(self.parameter.detach())]
        common = {key: group[key] for key in ("lr", "weight_decay", "maximize", "foreach", "fused")}
        if self.adam:
            moments = ([rows_of(state[key])] for key in ("exp_avg", "exp_avg_sq"))
            beta1, beta2 = group["betas"]
            options = {"beta1": beta1, "beta2": beta2, **{key: group[key] for key in ("eps", "amsgrad", "capturable")}}
            adamw(rows, [grad], *moments, [], [self.before.clone()], **common, **options)  # which counts the step itself
        else:
            buffers = [rows_of(state["momentum_buffer"]) if group["momentum"] else None]
            sgd(rows, [grad], buffers, **common, **{key: group[key] for key in ("momentum", "dampening", "nesterov")})
