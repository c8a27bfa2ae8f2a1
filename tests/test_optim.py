"""Optimisers against slow formulas and against torch."""

import math
import sys
import types
from itertools import product

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from protomem import distributed
from protomem.encoder import build_encoder
from protomem.errors import UserError
from protomem.optim import LAMB, RowAdamW, RowSGD, build_optimizer, encoder_groups, set_learning_rate
from tests.ranks import run_ranks


def randn(*shape, seed=0, dtype=torch.float64):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


class NeverWait(TorchDispatchMode):
    """Refuses what would make the host wait for a GPU: reading a value, or sizes that depend on values."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        assert func.overloadpacket.__name__ not in ("_local_scalar_dense", "nonzero", "masked_select"), func
        return func(*args, **(kwargs or {}))


# --- groups and choice ----------------------------------------------------------------------------------------------


def test_encoder_groups_cover_every_trained_parameter_once():
    encoder = build_encoder("small", 16, input_size=32)
    trained = {id(p) for p in encoder.parameters() if p.requires_grad}
    for no_decay_norm in (False, True):
        groups = encoder_groups(encoder, 0.1, no_decay_norm)
        ids = [id(p) for group in groups for p in group["params"]]
        assert set(ids) == trained and len(ids) == len(trained)
    assert id(encoder.features.weight) not in trained  # frozen at 1
    undecayed = {id(p) for p in groups[1]["params"]}
    assert groups[0]["weight_decay"] == 0.1 and groups[1]["weight_decay"] == 0
    assert {n for n, p in encoder.named_parameters() if id(p) in undecayed} == {
        n for n, p in encoder.named_parameters() if p.requires_grad and (n.endswith("bias") or ".bn" in n or "bn1" in n
        or "downsample.1" in n)
    }  # fmt: skip


@pytest.mark.parametrize("name", ["sgd", "adamw", "lamb"])
def test_groups_keep_their_own_learning_rate_and_decay(name):
    a, b = torch.nn.Parameter(randn(3)), torch.nn.Parameter(randn(3))
    groups = [{"params": [a], "lr_scale": 3.0, "name": "head"}, {"params": iter([b]), "weight_decay": 0.25}]
    optimizer = build_optimizer(groups, name, lr=0.1, weight_decay=0.5)
    assert [g["lr"] for g in optimizer.param_groups] == pytest.approx([0.3, 0.1])
    assert [g["weight_decay"] for g in optimizer.param_groups] == [0.5, 0.25]
    set_learning_rate(optimizer, 0.01)
    assert [g["lr"] for g in optimizer.param_groups] == pytest.approx([0.03, 0.01])


@pytest.mark.parametrize("name, reference", [("sgd", torch.optim.SGD), ("adamw", torch.optim.AdamW)])
@pytest.mark.parametrize("fused", [None, True, False])
def test_sgd_and_adamw_are_torchs(name, reference, fused):
    ours, theirs = (torch.nn.Parameter(randn(5, 4)) for _ in range(2))
    options = {"momentum": 0.8, "nesterov": True} if name == "sgd" else {"betas": (0.8, 0.95), "eps": 1e-6}
    optimizer = build_optimizer([{"params": [ours]}], name, lr=0.1, weight_decay=0.02, fused=fused, **options)
    other = reference([theirs], lr=0.1, weight_decay=0.02, **options)
    assert optimizer.param_groups[0]["fused"] is (fused is not False)
    for step in range(4):
        ours.grad, theirs.grad = randn(5, 4, seed=step), randn(5, 4, seed=step)
        optimizer.step()
        other.step()
    torch.testing.assert_close(ours, theirs)


def test_refusals_name_the_setting():
    group = [{"params": [torch.nn.Parameter(randn(2))]}]
    with pytest.raises(UserError, match="adam is unknown; there are sgd, adamw, lamb"):
        build_optimizer(group, "adam", lr=0.1)
    with pytest.raises(UserError, match="no parameter"):
        build_optimizer([{"params": []}], "sgd", lr=0.1)
    with pytest.raises(UserError, match="sgd: Nesterov momentum requires"):
        build_optimizer(group, "sgd", lr=0.1, momentum=0, nesterov=True)
    with pytest.raises(UserError, match="betas"):
        build_optimizer(group, "lamb", lr=0.1, betas=(1.0, 0.9))
    with pytest.raises(UserError, match="needs NVIDIA apex"):
        build_optimizer(group, "lamb", lr=0.1, fused=True)
    for build in (RowSGD, RowAdamW):
        with pytest.raises(UserError, match="lr=-1"):
            build(group, lr=-1)


# --- LAMB -----------------------------------------------------------------------------------------------------------


def slow_lamb(weights, grads_per_step, lr, betas, eps, decay):
    """Algorithm 2 of arXiv 1904.00962 with phi the identity, number by number. weights: list of flat lists."""
    weights = [list(w) for w in weights]
    m = [[0.0] * len(w) for w in weights]
    v = [[0.0] * len(w) for w in weights]
    for t, grads in enumerate(grads_per_step, start=1):
        for k, w in enumerate(weights):
            direction = []
            for i, g in enumerate(grads[k]):
                m[k][i] = betas[0] * m[k][i] + (1 - betas[0]) * g
                v[k][i] = betas[1] * v[k][i] + (1 - betas[1]) * g * g
                r = m[k][i] / (1 - betas[0] ** t) / (math.sqrt(v[k][i] / (1 - betas[1] ** t)) + eps)
                direction.append(r + decay[k] * w[i])
            w_norm, d_norm = math.hypot(*w), math.hypot(*direction)
            ratio = w_norm / d_norm if w_norm > 0 and d_norm > 0 else 1.0
            weights[k] = [a - lr * ratio * d for a, d in zip(w, direction)]
    return weights


def test_lamb_equals_the_slow_formula():
    start = [randn(6), torch.zeros(3, dtype=torch.float64), randn(4, seed=2)]
    grads = [[randn(len(w), seed=10 * t + k) for k, w in enumerate(start)] for t in range(5)]
    for step in grads:
        step[2].zero_()  # no gradient and no decay: a direction of norm 0
    params = [torch.nn.Parameter(w.clone()) for w in start]
    groups = [{"params": params[:2], "weight_decay": 0.1}, {"params": params[2:], "weight_decay": 0.0}]
    optimizer = build_optimizer(groups, "lamb", lr=0.05, betas=(0.8, 0.9), eps=1e-7)
    for step in grads:
        for p, g in zip(params, step):
            p.grad = g.clone()
        optimizer.step()
    expected = slow_lamb([w.tolist() for w in start], [[g.tolist() for g in s] for s in grads], 0.05, (0.8, 0.9), 1e-7,
                         [0.1, 0.1, 0.0])  # fmt: skip
    for p, e in zip(params, expected):
        torch.testing.assert_close(p.detach(), torch.tensor(e, dtype=torch.float64), rtol=1e-12, atol=1e-14)


def sharded_lamb_steps(rows):
    first, last = distributed.shard_bounds(rows, distributed.rank(), distributed.world_size())
    dense, shard = torch.nn.Parameter(randn(4)), torch.nn.Parameter(randn(rows, 3, seed=1)[first:last].clone())
    optimizer = LAMB([{"params": [dense]}, {"params": [shard], "sharded": True}], lr=0.1, weight_decay=0.1)
    for step in range(3):
        dense.grad, shard.grad = randn(4, seed=2 + step), randn(rows, 3, seed=9 + step)[first:last].clone()
        optimizer.step()
    return dense.detach().numpy(), shard.detach().numpy()


def test_lamb_on_shards_equals_one_process():
    for rows in (7, 2):  # two rows on three ranks: one shard is empty
        dense, whole = sharded_lamb_steps(rows)
        for world in (2, 3):
            parts = run_ranks(world, sharded_lamb_steps, rows)
            joined = torch.cat([torch.as_tensor(shard) for _, shard in parts])
            torch.testing.assert_close(joined, torch.as_tensor(whole), rtol=1e-12, atol=1e-14)
            assert all((d == dense).all() for d, _ in parts)


class FakeFusedLAMB(LAMB):
    """Behaves like apex's at its edges: steps are counted in the group, zero_grad takes nothing, it clips by itself."""

    def __init__(self, params, lr, betas, eps, weight_decay, max_grad_norm=1.0, use_nvlamb=False):
        super().__init__(params, lr, betas, eps, weight_decay)
        self.max_grad_norm, self.use_nvlamb = max_grad_norm, use_nvlamb

    def zero_grad(self):
        super().zero_grad()

    def step(self, closure=None):
        assert self.max_grad_norm == math.inf and self.use_nvlamb
        for group in self.param_groups:
            for p in group["params"]:
                self.state[p]["step"] = torch.tensor(float(group.get("step", 0)))
                for key in ("exp_avg", "exp_avg_sq"):
                    self.state[p].setdefault(key, torch.zeros_like(p))
            group["step"] = group.get("step", 0) + 1
        loss = super().step(closure)
        for p in self.state:
            del self.state[p]["step"]
        return loss


def test_apex_lamb_is_taken_where_it_can_serve_and_keeps_our_state(monkeypatch):
    apex, multi, optimizers = (types.ModuleType(n) for n in ("apex", "apex.multi_tensor_apply", "apex.optimizers"))
    optimizers.FusedLAMB, multi.multi_tensor_applier = FakeFusedLAMB, types.SimpleNamespace(available=True)
    for module in (apex, multi, optimizers):
        monkeypatch.setitem(sys.modules, module.__name__, module)
    params = [torch.nn.Parameter(randn(5, dtype=torch.float32)) for _ in range(2)]
    assert type(build_optimizer([{"params": [params[0]]}], "lamb", lr=0.1)) is LAMB  # on the CPU: ours
    monkeypatch.setattr(torch.Tensor, "is_cuda", True)
    assert type(build_optimizer([{"params": [params[0]], "sharded": True}], "lamb", lr=0.1)) is LAMB
    assert type(build_optimizer([{"params": [params[0]]}], "lamb", lr=0.1, fused=False)) is LAMB
    pair = [build_optimizer([{"params": [p]}], "lamb", lr=0.1, fused=f) for p, f in zip(params, (True, False))]
    assert type(pair[0]).__name__ == "ApexLAMB"
    for step in range(4):
        if step == 2:  # a new process continues from the state alone
            state = pair[0].state[params[0]]
            pair[0] = build_optimizer([{"params": [params[0]]}], "lamb", lr=0.1, fused=True)
            pair[0].state[params[0]].update(state)
        for optimizer, p in zip(pair, params):
            optimizer.zero_grad(set_to_none=True)
            p.grad = randn(5, seed=step, dtype=torch.float32)
            optimizer.step()
    assert torch.equal(*params) and pair[0].state[params[0]].keys() == pair[1].state[params[1]].keys()
    multi.multi_tensor_applier.available = False
    with pytest.raises(UserError, match="needs NVIDIA apex"):
        build_optimizer([{"params": [params[0]]}], "lamb", lr=0.1, fused=True)


# --- row-sparse optimisers ------------------------------------------------------------------------------------------

SGD_OPTIONS = [
    {"momentum": m, "weight_decay": w, "nesterov": n}
    for m, w, n in product((0, 0.9), (0, 0.1), (False, True))
    if m or not n
]
ADAM_OPTIONS = [{"betas": (0.8, 0.95), "eps": 1e-6, "weight_decay": w} for w in (0.0, 0.1)]
CASES = [(RowSGD, torch.optim.SGD, o) for o in SGD_OPTIONS] + [(RowAdamW, torch.optim.AdamW, o) for o in ADAM_OPTIONS]


@pytest.mark.parametrize("row, dense, options", CASES)
def test_row_optimizers_equal_torchs_when_every_row_is_active(row, dense, options):
    ours, theirs = torch.nn.Parameter(randn(9, 4)), torch.nn.Parameter(randn(9, 4))
    optimizer, other = row([ours], lr=0.1, **options), dense([theirs], lr=0.1, **options)
    for step in range(8):
        set_learning_rate(optimizer, 0.1 / (step + 1))
        set_learning_rate(other, 0.1 / (step + 1))
        order = torch.randperm(9, generator=torch.Generator().manual_seed(step))
        theirs.grad = randn(9, 4, seed=step)
        ours.row_grad = (order, theirs.grad[order])
        optimizer.step()
        other.step()
    torch.testing.assert_close(ours, theirs, rtol=1e-13, atol=1e-14)
    for key in {"momentum_buffer", "exp_avg", "exp_avg_sq"} & set(other.state[theirs]):
        torch.testing.assert_close(optimizer.state[ours][key], other.state[theirs][key], rtol=1e-13, atol=1e-14)


@pytest.mark.parametrize("row, dense, options", CASES)
def test_row_optimizers_step_each_row_as_if_it_were_alone_and_touch_no_other(row, dense, options):
    whole = torch.nn.Parameter(randn(7, 4))
    alone = [torch.nn.Parameter(r.clone()) for r in randn(7, 4)]
    optimizer, others = row([whole], lr=0.1, **options), [dense([p], lr=0.1, **options) for p in alone]
    for step, active in enumerate([[0, 3, 5], [5], [], [6, 0], [5, 3], [0, 1, 2, 3, 4, 5]]):
        index, grad = torch.tensor(active, dtype=torch.int64), randn(len(active), 4, seed=step)
        before = [whole.detach().clone()] + [v.clone() for v in optimizer.state[whole].values()]
        whole.row_grad = (index, grad)
        with NeverWait():
            optimizer.step()
        rest = torch.ones(7, dtype=torch.bool).index_fill_(0, index, False)
        for old, new in zip(before, [whole.detach(), *optimizer.state[whole].values()]):
            assert torch.equal(old[rest], new[rest])
        for r, g in zip(active, grad):
            alone[r].grad = g
            others[r].step()
    torch.testing.assert_close(whole.detach(), torch.stack(list(alone)).detach(), rtol=1e-13, atol=1e-14)


def test_row_gradients_are_cleared_and_may_be_absent():
    p = torch.nn.Parameter(randn(3, 2))
    optimizer, before = RowSGD([p], lr=0.1), p.detach().clone()
    optimizer.step()
    assert torch.equal(p.detach(), before)
    p.row_grad = (torch.tensor([1]), torch.ones(1, 2, dtype=torch.bfloat16))  # a bf16 gradient is taken too
    optimizer.zero_grad()
    optimizer.step()
    assert p.row_grad is None and torch.equal(p.detach(), before)
    p.row_grad = (torch.tensor([1]), torch.ones(1, 2, dtype=torch.bfloat16))
    optimizer.step()
    torch.testing.assert_close(p.detach()[1], before[1] - 0.1)


@pytest.mark.parametrize("row, options", [(RowSGD, {}), (RowSGD, {"momentum": 0}), (RowAdamW, {})])
def test_row_state_is_there_from_the_start_and_survives_saving(row, options):
    first, second = (torch.nn.Parameter(randn(5, 2, dtype=torch.float32)) for _ in range(2))
    optimizer = row([first], lr=0.1, **options)
    names = {RowSGD: {"momentum_buffer"} if options == {} else set(), RowAdamW: {"exp_avg", "exp_avg_sq", "row_step"}}
    assert set(optimizer.state[first]) == names[row]
    first.row_grad = (torch.tensor([4, 1]), randn(2, 2, dtype=torch.float32))
    optimizer.step()
    if row is RowAdamW:
        optimizer.state[first]["row_step"][4] = 2**24 + 1  # exact: float32 would lose the one
    other = row([second], lr=0.3, **options)
    other.load_state_dict(optimizer.state_dict())
    assert other.param_groups[0]["lr"] == 0.1
    for key, value in optimizer.state[first].items():
        loaded = other.state[second][key]
        assert torch.equal(loaded, value) and loaded.dtype == value.dtype
