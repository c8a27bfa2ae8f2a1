"""The optimizer's update of a classifier shard inside the head's backward, a block of rows at a time.

No gradient of the shard's size ever exists. Hyper-parameters (with their schedule) and state are those of the torch optimizer
that a run has anyway, so a checkpoint does not show which way it was made.

`blocked` hands over each block's gradient in a scratch buffer; the block's rows and their optimizer state are updated at once,
while they are in cache, by torch's functions: results do not change by a bit. `triton` lets the kernel that finishes a chunk's
gradient step the rows, so that the gradient is not written at all: the same within fp32 rounding. With optimizer.fused=false
it hands over gradients as `blocked` does.
"""

from __future__ import annotations

import torch
from torch.optim.adamw import adamw
from torch.optim.sgd import sgd


class BlockUpdate:
    """Steps the rows of `parameter` [C, K * D], the only one of `optimizer` (torch's SGD or AdamW), block by block.

    Once in a step: `begin()`, then `update(start, stop, grad)` for blocks that cover all C * K rows of D numbers once, or in
    its place, if `fused`, a kernel that is launched with what `kernel(start, stop, D)` says. The optimizer's own `step` must
    find no gradient on the parameter.
    """

    def __init__(self, optimizer: torch.optim.Optimizer, parameter: torch.nn.Parameter):
        self.optimizer, self.parameter = optimizer, parameter
        self.adam = isinstance(optimizer, torch.optim.AdamW)

    @property
    def fused(self) -> bool:
        """Whether the optimizer may use fused kernels."""
        return bool(self.optimizer.param_groups[0]["fused"])

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
            if self.fused:  # 1 - beta^t of a first step has to be known better than fp32 knows beta
                power = [beta ** state["step"].double() for beta in group["betas"]]
                self.corrections = torch.stack([1 / (1 - power[0]), (1 - power[1]).rsqrt()]).float()

    def _moments(self, start: int, stop: int, size: int) -> list[torch.Tensor | None]:
        """Of rows start:stop of `size` numbers: exp_avg and exp_avg_sq, or momentum_buffer, None without momentum."""
        state, keys = self.optimizer.state[self.parameter], ("exp_avg", "exp_avg_sq") if self.adam else ("momentum_buffer",)
        if not self.adam and not self.optimizer.param_groups[0]["momentum"]:
            return [None]
        return [state[key].view(-1, size)[start:stop] for key in keys]

    def kernel(self, start: int, stop: int, size: int) -> tuple[str, tuple, dict]:
        """(name, arguments, constants) of the kernel in protomem/head/kernels/updates.py that steps rows start:stop of `size`
        numbers."""
        group, moments = self.optimizer.param_groups[0], self._moments(start, stop, size)
        lr, decay = float(group["lr"]), float(group["weight_decay"])
        if self.adam:
            beta1, beta2 = group["betas"]
            return "finish_adamw", (*moments, self.corrections, lr, lr * decay, 1 - beta1, 1 - beta2, float(group["eps"])), {}
        return "finish_sgd", (*moments, lr, float(group["momentum"]), decay), {"NESTEROV": bool(group["nesterov"])}

    def __call__(self, start: int, stop: int, grad: torch.Tensor) -> None:
        """grad [stop - start, D]: d loss / d rows start:stop."""
        group, size = self.optimizer.param_groups[0], grad.shape[1]
        rows = [self.parameter.detach().view(-1, size)[start:stop]]
        common = {key: group[key] for key in ("lr", "weight_decay", "maximize", "foreach", "fused")}
        if self.adam:
            moments = ([moment] for moment in self._moments(start, stop, size))
            beta1, beta2 = group["betas"]
            options = {"beta1": beta1, "beta2": beta2, **{key: group[key] for key in ("eps", "amsgrad", "capturable")}}
            adamw(rows, [grad], *moments, [], [self.before.clone()], **common, **options)  # which counts the step itself
        else:
            options = {key: group[key] for key in ("momentum", "dampening", "nesterov")}
            sgd(rows, [grad], self._moments(start, stop, size), **common, **options)
