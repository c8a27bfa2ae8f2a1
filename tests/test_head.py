"""What the equivalence tests do not see: precision, memory, extreme logits, several calls in one step."""

import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from protomem.head import HEADS, Columns, GradSink, objective, operands
from protomem.objective.margins import interclass_filter


def inputs(batch=24, classes=300, size=64, dtype=torch.float32, seed=0):
    g = torch.Generator().manual_seed(seed)
    x = F.normalize(torch.randn(batch, size, generator=g, dtype=dtype)).requires_grad_()
    rows = torch.randn(classes, size, generator=g, dtype=dtype) * 0.05
    return x, rows, torch.randint(0, classes, (batch,), generator=g)


def gradients(head, x, rows, target, scale=64.0, calls=1, unit=False, **options):
    sink = GradSink()
    sink.begin(rows)
    loss = 0
    for _ in range(calls):
        cos_y, lse = head(x, Columns(rows, target, sink, unit=unit), scale, **options)
        loss = loss + objective(scale * (cos_y - 0.4), lse).mean()
    x.grad = None
    loss.backward()
    return loss.detach(), x.grad, sink.buffer


def relative(a, b):
    return ((a.double() - b.double()).norm() / b.double().norm()).item()


@pytest.mark.parametrize("units, store_mb, unit", [(False, 16, False), (True, 0, False), (True, 0.3, False), (True, 16, True)])
def test_bf16_operands_cost_one_percent_of_the_gradient(units, store_mb, unit, monkeypatch):
    """Whether or not the processor multiplies bf16: with such units logits come from fp32 operands, and little is lost, also
    where exponentials were kept in bf16. Two terms, so that the second one adds to the gradient."""
    monkeypatch.setattr(operands, "has_units", lambda device: units)
    x, rows, target = inputs(64, 2000, 512)
    rows = F.normalize(rows) if unit else rows
    _, dx, dw = gradients(HEADS["dense"], x.detach().double().requires_grad_(), rows.double(), target, 64.0, 2, unit)
    loss, hx, hw = gradients(HEADS["blocked"], x, rows, target, 64.0, 2, unit, precision="bf16", store_mb=store_mb)
    most = 0.0015 if units else 0.012
    assert relative(hx, dx) <= most and relative(hw, dw) <= most
    assert relative(hx, dx) > 1e-4  # bf16 was really used


@pytest.mark.parametrize("store_mb", [0, 0.002, 16])
@pytest.mark.parametrize("block", [1, 7, 300, 512])
def test_blocks_and_kept_logits_change_nothing(block, store_mb):
    x, rows, target = inputs(dtype=torch.float64)
    expected = gradients(HEADS["dense"], x, rows, target)
    found = gradients(HEADS["blocked"], x, rows, target, block=block, store_mb=store_mb)
    for a, b in zip(found, expected):
        assert relative(a, b) < 1e-12


def test_rows_that_are_unit_already_get_the_gradient_of_a_plain_product():
    x, rows, target = inputs(dtype=torch.float64)
    rows, found = F.normalize(rows), []
    for head in (HEADS["dense"], HEADS["blocked"]):
        sink = GradSink()
        sink.begin(rows)
        cos_y, lse = head(x, Columns(rows, target, sink, unit=True), 16.0)
        x.grad = None
        objective(16 * cos_y, lse).mean().backward()
        found.append((x.grad.clone(), sink.buffer))
    assert relative(found[1][0], found[0][0]) < 1e-12 and relative(found[1][1], found[0][1]) < 1e-12


@pytest.mark.parametrize("head", ["dense", "blocked"])
def test_several_terms_in_one_step_add_up(head):
    x, rows, target = inputs(dtype=torch.float64)
    once, twice = (gradients(HEADS[head], x, rows, target, calls=n)[2].clone() for n in (1, 2))
    assert relative(twice, 2 * once) < 1e-12


@pytest.mark.parametrize("head", ["dense", "blocked"])
def test_large_scale_and_opposite_negatives_stay_exact(head):
    """All negatives at cos -1: exp(z - s) underflows in fp32, a running maximum does not."""
    x = F.normalize(torch.ones(3, 8)).requires_grad_()
    rows = torch.cat([torch.ones(1, 8), -torch.ones(4, 8)])
    cos_y, lse = HEADS[head](x, Columns(rows, torch.zeros(3, dtype=torch.long)), 200.0)
    assert torch.allclose(cos_y, torch.ones(3))
    assert torch.allclose(lse, torch.full((3,), -200 + torch.log(torch.tensor(4.0)).item()))


@pytest.mark.parametrize("head", ["dense", "blocked"])
def test_rows_that_hold_nothing_are_no_negatives(head):
    x, rows, target = inputs(6, 20, dtype=torch.float64)
    valid = torch.arange(20) % 3 != 0
    target = torch.where(valid[target], target, 1)
    kept = valid.nonzero().squeeze(1)
    a = HEADS[head](x, Columns(rows, target, valid=valid), 10.0)
    b = HEADS[head](x, Columns(rows[kept], torch.searchsorted(kept, target)), 10.0)
    assert torch.allclose(a[0], b[0]) and torch.allclose(a[1], b[1])
    nothing = HEADS[head](x, Columns(rows, torch.full_like(target, -1), valid=torch.zeros(20, dtype=torch.bool)), 10.0)
    assert nothing[1].eq(float("-inf")).all()


def test_filtered_negatives_are_logit_zero_not_absent():
    x = F.normalize(torch.ones(1, 4, dtype=torch.float64))
    rows = torch.cat([torch.ones(1, 4), torch.ones(1, 4)]).double()  # the negative has cos 1
    for head in (HEADS["dense"], HEADS["blocked"]):
        _, lse = head(x, Columns(rows, torch.tensor([0])), 30.0, interclass_filter(0.4))
        assert lse.item() == pytest.approx(0.0)


class Largest(TorchDispatchMode):
    """Records the largest tensor that any operation makes (not views of what exists)."""

    def __init__(self):
        super().__init__()
        self.numel = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        known = {a.untyped_storage().data_ptr() for a in (*args, *(kwargs or {}).values()) if isinstance(a, torch.Tensor)}
        out = func(*args, **(kwargs or {}))
        for t in out if isinstance(out, (tuple, list)) else (out,):
            if isinstance(t, torch.Tensor) and t.untyped_storage().data_ptr() not in known:
                self.numel = max(self.numel, t.numel())
        return out


def test_blocked_never_makes_a_tensor_of_the_size_of_the_logits_or_the_shard():
    x, rows, target = inputs(64, 20_000, 64)
    sink = GradSink()
    sink.begin(rows)
    with Largest() as seen:
        cos_y, lse = HEADS["blocked"](x, Columns(rows, target, sink), 64.0, block=512, store_mb=0)
        objective(64 * cos_y, lse).mean().backward()
    assert 0 < seen.numel <= 2 * 64 * 512 < 0.06 * rows.numel()
    with Largest() as seen:
        cos_y, lse = HEADS["dense"](x, Columns(rows, target, sink), 64.0)
        objective(64 * cos_y, lse).mean().backward()
    assert seen.numel >= 64 * 20_000  # the measure itself works


@pytest.mark.parametrize("head", ["dense", "blocked"])
def test_no_gradient_mode_and_constant_rows(head):
    x, rows, target = inputs(dtype=torch.float64)
    with torch.no_grad():
        a = HEADS[head](x, Columns(rows, target), 16.0)
    cos_y, lse = HEADS[head](x, Columns(rows, target), 16.0)
    objective(16 * cos_y, lse).mean().backward()
    assert torch.equal(a[0], cos_y.detach()) and x.grad.abs().sum() > 0 and not rows.requires_grad
