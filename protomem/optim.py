"""Optimisers: parameter groups, torch's fused kernels or LAMB, row-sparse SGD and AdamW for sampled prototype shards.

Nothing here waits for the device. Legend: C local classes (rows of a shard), D embedding size, S rows that got a
gradient this step.
"""

from __future__ import annotations

import torch
from torch import nn

from protomem.errors import UserError
from protomem.lamb import LAMB, check_adam, choose_lamb  # noqa: F401  LAMB is part of this module
from protomem.missed_steps import MissedSteps

ROWS = 4096  # that are brought up to date at a time when all are


def encoder_groups(encoder: nn.Module, weight_decay: float, no_decay_norm: bool = False) -> list[dict]:
    """The encoder's trainable parameters as groups for `build_optimizer`.

    no_decay_norm: biases, normalisation and PReLU parameters (all of at most one dimension) get no weight decay.
    Off by default (our default): decay on everything, as insightface trains.
    """
    trained = [p for p in encoder.parameters() if p.requires_grad]
    if not no_decay_norm:
        return [{"params": trained, "weight_decay": weight_decay, "lr_scale": 1.0, "name": "encoder"}]
    matrices, vectors = [p for p in trained if p.ndim > 1], [p for p in trained if p.ndim <= 1]
    return [
        {"params": matrices, "weight_decay": weight_decay, "lr_scale": 1.0, "name": "encoder"},
        {"params": vectors, "weight_decay": 0.0, "lr_scale": 1.0, "name": "encoder_no_decay"},
    ]


def set_learning_rate(optimizer: torch.optim.Optimizer, lr: float) -> None:
    """Every group gets lr times its `lr_scale` (1 where it has none)."""
    for group in optimizer.param_groups:
        group["lr"] = lr * group.get("lr_scale", 1.0)


def build_optimizer(
    groups: list[dict],
    name: str,
    *,
    lr: float,
    momentum: float = 0.9,
    weight_decay: float = 5e-4,
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-8,
    nesterov: bool = False,
    fused: bool | None = None,
) -> torch.optim.Optimizer:
    """SGD, AdamW or LAMB over parameter groups.

    groups: dicts with `params` and, optionally, `lr_scale` (a factor on every learning rate of the group), `name`,
    `weight_decay` (else the common one), and `sharded` (True: each rank holds other rows of these parameters; LAMB
    then takes their norms over all ranks).
    momentum, nesterov: SGD only. betas, eps: AdamW and LAMB only.
    fused: None takes fused kernels where there are any: torch's for SGD and AdamW (CPU and CUDA), NVIDIA apex's
    FusedLAMB if it is installed, all parameters are fp32 or fp16 on CUDA and no group is sharded (it knows nothing
    of other ranks). True insists on them, False does without.

    Raises UserError for an unknown name, for values the optimiser refuses, and where `fused=True` cannot be had.
    """
    groups = [dict(group, params=list(group["params"])) for group in groups]
    params = [p for group in groups for p in group["params"]]
    if name not in ("sgd", "adamw", "lamb"):
        raise UserError(f"optimizer {name} is unknown; there are sgd, adamw, lamb")
    if not params:
        raise UserError(f"optimizer {name} has no parameter to train: all of them are frozen")
    try:
        if name == "lamb":
            build, options = choose_lamb(groups, fused), {"betas": betas, "eps": eps}
        elif name == "adamw":
            build, options = torch.optim.AdamW, {"betas": betas, "eps": eps, "fused": _torch_fused(params, fused)}
        else:
            build = torch.optim.SGD
            options = {"momentum": momentum, "nesterov": nesterov, "fused": _torch_fused(params, fused)}
        optimizer = build(groups, lr=lr, weight_decay=weight_decay, **options)
    except ValueError as error:
        raise UserError(f"optimizer {name}: {error}") from None
    set_learning_rate(optimizer, lr)
    return optimizer


def _torch_fused(params: list[torch.Tensor], fused: bool | None) -> bool:
    able = all(p.device.type in ("cpu", "cuda") and p.is_floating_point() for p in params)
    if fused and not able:
        raise UserError("fused=true needs floating-point parameters on CPU or CUDA; set fused=null")
    return able if fused is None else fused


class _RowOptimizer(torch.optim.Optimizer):
    """Steps rows of [C,D] parameters by `param.row_grad = (index int64 [S], grad [S,D])`; each row at most once.

    All other rows and their state stay as they are, bit for bit: no decay, no fading momentum (but see RowSGD). A parameter
    whose row_grad is missing or None is left alone. State has the parameter's full size and exists from the start, so that
    a checkpoint can be loaded into it before the first step.
    """

    @torch.no_grad()
    def step(self, closure=None):
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            for p in group["params"]:
                if getattr(p, "row_grad", None) is not None:
                    index, grad = p.row_grad
                    self._step_rows(group, p, index, grad.to(p.dtype))
        return loss

    def zero_grad(self, set_to_none: bool = True) -> None:
        super().zero_grad(set_to_none)
        for group in self.param_groups:
            for p in group["params"]:
                p.row_grad = None

    def load_state_dict(self, state_dict: dict) -> None:
        counts = [{k: v for k, v in state.items() if v.dtype == torch.int64} for state in state_dict["state"].values()]
        super().load_state_dict(state_dict)  # casts all state to the parameter's type, counts too: undo that
        for state, exact in zip(self.state.values(), counts):
            state.update({k: v.to(state[k].device, copy=True) for k, v in exact.items()})


class RowSGD(_RowOptimizer):
    """torch.optim.SGD (momentum, Nesterov, coupled weight decay) on the rows that got a gradient; see _RowOptimizer.

    Equal to torch.optim.SGD while every row is active in every step. State: `momentum_buffer` [C,D].
    untouched: `lazy` leaves the other rows as they are. `exact`: they are where torch.optim.SGD with a gradient of zero has
    them, from `catch_up` on, which is called for rows before they are read (protomem/missed_steps.py has the closed form);
    more state: `last_step` int64 [C], the step up to which each row is.
    """

    def __init__(
        self,
        params,
        lr: float,
        momentum: float = 0.9,
        weight_decay: float = 0.0,
        nesterov: bool = False,
        untouched: str = "lazy",
    ):
        if lr < 0 or momentum < 0 or weight_decay < 0 or (nesterov and momentum == 0):
            raise UserError(
                f"lr={lr}, momentum={momentum} and weight_decay={weight_decay} must not be negative, and nesterov "
                "needs momentum"
            )
        super().__init__(params, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay, "nesterov": nesterov})
        for group in self.param_groups:
            for p in group["params"] if group["momentum"] else ():
                self.state[p]["momentum_buffer"] = torch.zeros_like(p)
        self.missed, self.caught = {}, None
        for p in (p for group in self.param_groups for p in group["params"] if untouched == "exact"):
            self.state[p]["last_step"] = torch.zeros(len(p), dtype=torch.int64, device=p.device)
            self.missed[p] = MissedSteps(p.device)

    @torch.no_grad()
    def catch_up(self, index: torch.Tensor | None = None) -> None:
        """Make up for the steps that the rows index [S] missed (None: all rows). Nothing happens with untouched=lazy."""
        for p, missed in self.missed.items():
            state = self.state[p]
            if missed.now is None:  # of a new run, or of a checkpoint, where all rows were up to date
                missed.now = int(state["last_step"].max()) if len(p) else 0
            parts = [index] if index is not None else torch.arange(len(p), device=p.device).split(ROWS)
            for rows in parts:
                factors = missed.factors(state["last_step"][rows]).to(p.dtype)[..., None]  # [S,2,2,1]
                w, buffer = p[rows], state.get("momentum_buffer")
                if buffer is None:
                    p.index_copy_(0, rows, w.mul_(factors[:, 0, 0]))
                else:
                    b = buffer[rows]
                    p.index_copy_(0, rows, torch.addcmul(w * factors[:, 0, 0], b, factors[:, 0, 1]))
                    buffer.index_copy_(0, rows, b.mul_(factors[:, 1, 1]).addcmul_(w, factors[:, 1, 0]))
                state["last_step"].index_fill_(0, rows, missed.now)
            if index is None:
                missed.forget()
        self.caught = index

    def _step_rows(self, group: dict, p: torch.Tensor, index: torch.Tensor, grad: torch.Tensor) -> None:
        if (missed := self.missed.get(p)) is not None:
            if index is not self.caught:
                self.catch_up(index)
            if missed.full:
                self.catch_up()
        self._step_current(group, p, index, grad)
        if missed is not None:
            missed.took(*(group[key] for key in ("lr", "momentum", "weight_decay", "nesterov")))
            self.state[p]["last_step"].index_fill_(0, index, missed.now)

    def _step_current(self, group: dict, p: torch.Tensor, index: torch.Tensor, grad: torch.Tensor) -> None:
        rows, momentum = p.index_select(0, index), group["momentum"]  # [S,D]
        step = torch.add(grad, rows, alpha=group["weight_decay"])
        if momentum:
            whole = self.state[p]["momentum_buffer"]
            buffer = whole.index_select(0, index).mul_(momentum).add_(step)
            whole.index_copy_(0, index, buffer)
            step = step.add_(buffer, alpha=momentum) if group["nesterov"] else buffer
        p.index_copy_(0, index, rows.add_(step, alpha=-group["lr"]))


class RowAdamW(_RowOptimizer):
    """torch.optim.AdamW on the rows that got a gradient; see _RowOptimizer.

    Equal to torch.optim.AdamW while every row is active in every step. State: `exp_avg`, `exp_avg_sq` [C,D] and
    `row_step` int64 [C], how often each row was stepped: its own bias correction.
    """

    def __init__(self, params, lr: float, betas=(0.9, 0.999), eps: float = 1e-8, weight_decay: float = 0.01):
        check_adam(lr, betas, eps, weight_decay)
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay})
        for group in self.param_groups:
            for p in group["params"]:
                zeros = {"exp_avg": torch.zeros_like(p), "exp_avg_sq": torch.zeros_like(p)}
                self.state[p].update(row_step=torch.zeros(len(p), dtype=torch.int64, device=p.device), **zeros)

    def _step_rows(self, group: dict, p: torch.Tensor, index: torch.Tensor, grad: torch.Tensor) -> None:
        state, (beta1, beta2) = self.state[p], group["betas"]
        count = state["row_step"].index_select(0, index) + 1
        first = state["exp_avg"].index_select(0, index).lerp_(grad, 1 - beta1)
        second = state["exp_avg_sq"].index_select(0, index).mul_(beta2).addcmul_(grad, grad, value=1 - beta2)
        for key, value in (("row_step", count), ("exp_avg", first), ("exp_avg_sq", second)):
            state[key].index_copy_(0, index, value)
        power = count.to(torch.float64)[:, None]  # [S,1]; beta**t in double, as torch computes it
        correction1 = (1 - beta1**power).to(p.dtype)
        correction2 = (1 - beta2**power).sqrt().to(p.dtype)
        rows = p.index_select(0, index).mul_(1 - group["lr"] * group["weight_decay"])
        direction = (first / correction1).div_((second.sqrt_() / correction2).add_(group["eps"]))
        p.index_copy_(0, index, rows.add_(direction, alpha=-group["lr"]))


class UnitRowSGD(torch.optim.Optimizer):
    """Plain SGD on the rows of a prototype memory that learn (`gradient=sgd`), then back to unit length.

    No momentum and no decay: a buffer would follow the slot, not the identity. memory: a PrototypeMemory."""

    def __init__(self, memory, lr: float, lr_scale: float = 1.0):
        self.memory = memory
        super().__init__([{"params": [memory.store], "lr_scale": lr_scale}], {"lr": lr})

    @torch.no_grad()
    def step(self, closure=None):
        rows, group = self.memory.rows, self.param_groups[0]
        rows.add_(self.memory.gradient().to(rows.dtype), alpha=-group["lr"])
        rows.div_(torch.linalg.vector_norm(rows, dim=1, keepdim=True).clamp_min_(1e-12))

    def zero_grad(self, set_to_none: bool = True) -> None:
        """The gradient's buffer is the memory's, which starts it anew in each step."""
