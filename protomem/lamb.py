"""LAMB for very large batches: our own, and NVIDIA apex's fused kernels where they can be used."""

from __future__ import annotations

import math

import torch

from protomem import distributed
from protomem.errors import UserError


class LAMB(torch.optim.Optimizer):
    """LAMB: Adam's direction scaled per parameter by ||w|| / ||direction|| (You et al. 2019, arXiv 1904.00962, alg. 2).

    direction = m_hat / (sqrt(v_hat) + eps) + weight_decay * w; w -= lr * ratio * direction. The paper's phi is the
    identity here, and the ratio is 1 where either norm is 0 (our default, and what the common implementations do).
    A group with `sharded: True` holds this rank's rows of larger parameters: its norms are summed over all ranks, so
    every rank must step with the same such groups and a gradient in each (also for an empty shard).
    """

    def __init__(self, params, lr: float, betas=(0.9, 0.999), eps: float = 1e-8, weight_decay: float = 0.0):
        check_adam(lr, betas, eps, weight_decay)
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay, "sharded": False})

    @torch.no_grad()
    def step(self, closure=None):
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            params = [p for p in group["params"] if p.grad is not None]
            if params:
                self._step_group(group, params)
        return loss

    def _step_group(self, group: dict, params: list[torch.Tensor]) -> None:
        for p in params:
            if not self.state[p]:
                zeros = {"exp_avg": torch.zeros_like(p), "exp_avg_sq": torch.zeros_like(p)}
                self.state[p].update(step=torch.zeros(()), **zeros)  # on the CPU, where reading it waits for nothing
            self.state[p]["step"] += 1
        grads = [p.grad for p in params]
        first = [self.state[p]["exp_avg"] for p in params]
        second = [self.state[p]["exp_avg_sq"] for p in params]
        steps = [self.state[p]["step"].item() for p in params]
        beta1, beta2 = group["betas"]
        torch._foreach_lerp_(first, grads, 1 - beta1)
        torch._foreach_mul_(second, beta2)
        torch._foreach_addcmul_(second, grads, grads, 1 - beta2)
        root = torch._foreach_sqrt(second)
        torch._foreach_div_(root, [math.sqrt(1 - beta2**step) for step in steps])
        torch._foreach_add_(root, group["eps"])
        update = torch._foreach_div(first, [1 - beta1**step for step in steps])
        torch._foreach_div_(update, root)
        if group["weight_decay"]:
            torch._foreach_add_(update, params, alpha=group["weight_decay"])
        norms = torch.stack(torch._foreach_norm(params) + torch._foreach_norm(update)).view(2, -1)
        if group["sharded"]:
            norms = distributed.all_reduce(norms.square()).sqrt()
        ratio = torch.where((norms > 0).all(0), norms[0] / norms[1], 1.0)
        torch._foreach_mul_(update, list(ratio.unbind()))
        torch._foreach_add_(params, update, alpha=-group["lr"])


def choose_lamb(groups: list[dict], fused: bool | None):
    """The LAMB to build for these groups: apex's if it can serve them and `fused` is not False, else ours.

    apex can serve fp32 and fp16 parameters on CUDA, all of whose norms are this rank's alone.
    Raises UserError if `fused` is True and apex cannot be had.
    """
    able = all(p.is_cuda and p.dtype in (torch.float32, torch.float16) for group in groups for p in group["params"])
    able = able and not any(group.get("sharded") for group in groups)
    apex = _apex_lamb() if able and fused is not False else None
    if fused and apex is None:
        raise UserError("fused=true with lamb needs NVIDIA apex (built from its source) and unsharded CUDA parameters")
    return apex or LAMB


def _apex_lamb():
    """apex's FusedLAMB with the arithmetic, interface and state of our LAMB; None without apex or its CUDA part."""
    try:
        from apex.multi_tensor_apply import multi_tensor_applier
        from apex.optimizers import FusedLAMB
    except ImportError:  # absent, or PyPI's unrelated `apex`
        return None
    if not multi_tensor_applier.available:
        return None

    class ApexLAMB(FusedLAMB):
        def __init__(self, params, **options):
            # No clipping of its own, and the trust ratio for every parameter, not only for decayed ones.
            super().__init__(params, max_grad_norm=math.inf, use_nvlamb=True, **options)

        def zero_grad(self, set_to_none: bool = True) -> None:
            super().zero_grad()

        def step(self, closure=None):
            # apex counts steps per group, where a checkpoint of the state does not look: keep them per parameter too.
            for group in self.param_groups:
                counts = [self.state[p]["step"].item() for p in group["params"] if "step" in self.state[p]]
                group["step"] = int(max(counts, default=0))
            loss = super().step(closure)
            for group in self.param_groups:
                for p in group["params"]:
                    if p.grad is not None:
                        self.state[p]["step"] = torch.tensor(float(group["step"]))
            return loss

    return ApexLAMB


def check_adam(lr: float, betas: tuple[float, float], eps: float, weight_decay: float) -> None:
    """Raises UserError for hyper-parameters that no Adam-like optimiser can use."""
    if lr < 0 or eps < 0 or weight_decay < 0 or not all(0 <= beta < 1 for beta in betas):
        raise UserError(
            f"lr={lr}, eps={eps} and weight_decay={weight_decay} must not be negative, betas={betas} must be in [0, 1)"
        )
