"""Clipping and loss scaling over ranks against one process and against torch."""

import math

import pytest
import torch

from protomem import distributed
from protomem.gradients import LossScaler, clip_gradients
from tests.ranks import run_ranks
from tests.test_optim import NeverWait, randn

# --- clipping -------------------------------------------------------------------------------------------------------


def clipped(max_norm, rows, dtype):
    """Three encoder gradients, equal on all ranks, and this rank's rows of two shards; returned after clipping."""
    first, last = distributed.shard_bounds(rows, distributed.rank(), distributed.world_size())
    params = [torch.nn.Parameter(torch.zeros(3, 2, dtype=dtype)) for _ in range(4)]
    for k, p in enumerate(params[:3]):
        p.grad = randn(3, 2, seed=k).to(dtype)
    shards = [randn(rows, 2, seed=7)[first:last].to(dtype), randn(rows, 5, seed=8)[first:last].to(dtype)]
    with NeverWait():
        total = clip_gradients((p for p in params), shards, max_norm)
    return total.double().numpy(), [p.grad.double().numpy() for p in params[:3]], [s.double().numpy() for s in shards]


@pytest.mark.parametrize("world, rows", [(1, 5), (2, 5), (3, 5), (3, 2)])
def test_clipping_equals_one_long_vector(world, rows):
    grads = [randn(3, 2, seed=k) for k in range(3)] + [randn(rows, 2, seed=7), randn(rows, 5, seed=8)]
    norm = math.sqrt(sum(float((g * g).sum()) for g in grads))
    for max_norm in (norm / 3, norm * 3, math.inf):
        expected = [g * min(1.0, max_norm / norm) for g in grads]
        parts = (
            run_ranks(world, clipped, max_norm, rows, torch.float64)
            if world > 1
            else [clipped(max_norm, rows, torch.float64)]
        )
        for total, encoder, _ in parts:
            assert total == pytest.approx(norm, rel=1e-13)
            for g, e in zip(encoder, expected):
                torch.testing.assert_close(torch.as_tensor(g), e)
        for k in (0, 1):
            torch.testing.assert_close(torch.cat([torch.as_tensor(part[2][k]) for part in parts]), expected[3 + k])


def test_clipping_edge_cases():
    total, encoder, _ = clipped(0.5, 4, torch.bfloat16)
    assert total > 1 and math.sqrt(sum((g * g).sum() for g in encoder)) < 0.51
    p = torch.nn.Parameter(torch.zeros(2))
    p.grad = torch.zeros(2)
    assert clip_gradients([p], [], 1.0) == 0 and torch.equal(p.grad, torch.zeros(2))
    assert clip_gradients([], [], 1.0) == 0


# --- loss scale -----------------------------------------------------------------------------------------------------


def test_the_loss_scale_follows_torchs_grad_scaler():
    ours = LossScaler(interval=3, initial=8.0)
    theirs = torch.amp.GradScaler("cpu", init_scale=8.0, growth_interval=3)
    p = torch.nn.Parameter(torch.zeros(2))
    optimizer = torch.optim.SGD([p], lr=0.0)
    for value in (1, 1, math.inf, 1, 1, 1, 1, math.nan, -math.inf, 1, 1, 1, 1, 1, 1):
        assert ours.factor.item() == theirs.get_scale()
        torch.testing.assert_close(ours.scale(torch.tensor(2.0)), theirs.scale(torch.tensor(2.0)))
        p.grad, grad = torch.tensor([2.0, value]), torch.tensor([2.0, value])
        theirs.unscale_(optimizer)
        with NeverWait():
            found = ours.unscale_([grad, torch.zeros(0)])
            ours.update()
        assert bool(found) == (not math.isfinite(value))
        torch.testing.assert_close(grad, p.grad, equal_nan=True)
        theirs.step(optimizer)
        theirs.update()
    largest = LossScaler(interval=1, initial=2.0**127)
    largest.unscale_([torch.ones(1)])
    largest.update()
    assert largest.factor == 2.0**127  # doubling would give inf, forever


def scaled_steps(values):
    """Each step this rank's shard gradient is values[step][rank]; returns what was found and the scale after it."""
    scaler, seen = LossScaler(), []
    for value in values:
        found = scaler.unscale_([torch.ones(3), torch.tensor([value[distributed.rank()]])])
        scaler.update()
        seen.append((found.item(), scaler.factor.item()))
    return seen


def test_an_overflow_on_one_rank_skips_the_step_on_all():
    values = [[1.0, 1.0, 1.0], [1.0, math.inf, 1.0], [1.0, 1.0, 1.0], [math.nan, 1.0, 1.0]]
    seen = run_ranks(3, scaled_steps, values)
    assert seen[0] == seen[1] == seen[2] == [(0, 2.0**16), (1, 2.0**15), (0, 2.0**15), (1, 2.0**14)]


def test_the_loss_scale_survives_saving():
    scaler, other = LossScaler(interval=3), LossScaler(interval=3)
    for value in (math.inf, 1.0, 1.0):
        scaler.unscale_([torch.tensor([value])])
        scaler.update()
    other.load_state_dict(scaler.state_dict())
    other.unscale_([torch.ones(1)])
    other.update()
    assert other.factor == 2.0**16 and other.good_steps == 0
