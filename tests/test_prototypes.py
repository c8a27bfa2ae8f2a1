"""Classifier shards and sampled shards."""

import pytest
import torch

from protomem import distributed
from protomem.head import HEADS, objective
from protomem.optim import RowSGD
from protomem.prototypes.classifier import INIT_ROWS, ClassifierShard, initial_rows
from protomem.prototypes.sampled import SampledShard
from tests.ranks import run_ranks

IDENTITIES = 41


def test_initial_rows_are_the_same_matrix_at_every_world_size_and_differ_between_rows():
    whole = run_ranks(1, lambda: ClassifierShard(IDENTITIES, 4, seed=5).weight.detach().numpy())[0]
    for world in (2, 3, 4):
        parts = run_ranks(world, lambda: ClassifierShard(IDENTITIES, 4, seed=5).weight.detach().numpy())
        assert torch.equal(torch.cat([torch.as_tensor(p) for p in parts]), torch.as_tensor(whole))
    assert len(torch.as_tensor(whole).unique(dim=0)) == IDENTITIES
    across = initial_rows(INIT_ROWS - 2, INIT_ROWS + 3, 4, 0.01, seed=5)
    assert len(across.unique(dim=0)) == 5 and abs(initial_rows(0, 5000, 8, 0.01, 1).std() - 0.01) < 2e-4


def sampled_step(shard, labels, step, optimizer=None):
    x = torch.nn.functional.normalize(torch.randn(len(labels), 8, generator=torch.Generator().manual_seed(step)))
    x.requires_grad_()
    shard.begin_step(labels, step)
    cos_y, lse = HEADS["blocked"](x, shard.columns(labels), 16.0)
    objective(16 * (cos_y - 0.2), lse).mean().backward()
    if optimizer:
        optimizer.step()
    return cos_y.detach(), lse.detach(), x.grad


@pytest.mark.parametrize("world", [1, 2, 3, 4])
def test_unsampled_rows_and_their_momentum_do_not_change(world):
    def work():
        shard = SampledShard(IDENTITIES, 8, rate=0.3, seed=1)
        optimizer = RowSGD([shard.weight], lr=0.5, momentum=0.9, weight_decay=0.1)
        touched = torch.zeros(len(shard.weight), dtype=torch.long)
        for step in range(6):
            labels = torch.tensor([3, 3, 40, 17, (step * 7) % IDENTITIES])
            before = shard.weight.detach().clone()
            state = optimizer.state[shard.weight]["momentum_buffer"].clone()
            sampled_step(shard, labels, step, optimizer)
            still = torch.ones(len(before), dtype=torch.bool)
            still[shard.index] = False
            assert torch.equal(shard.weight[still], before[still])
            assert torch.equal(optimizer.state[shard.weight]["momentum_buffer"][still], state[still])
            assert still.any() or len(before) < 6
            assert not len(shard.index) or (shard.weight[shard.index] != before[shard.index]).any(1).all()
            mine = labels[(labels >= shard.first) & (labels < shard.last)] - shard.first
            assert set(mine.tolist()) <= set(shard.index.tolist())
            touched[shard.index] += 1
        return len(shard.index), touched.tolist()

    for count, touched in run_ranks(world, work):
        assert len(set(touched)) > 1 or not touched  # other rows at other steps


def unit_rows():
    return torch.nn.functional.normalize(torch.randn(6, 8, generator=torch.Generator().manual_seed(9), dtype=torch.float64))


@pytest.mark.parametrize("world", [1, 2, 3, 4])
def test_sampled_equals_the_dense_formula_on_the_rows_that_were_drawn(world):
    labels = torch.tensor([0, 5, 5, 40, 22, 13])

    def work():
        shard = SampledShard(IDENTITIES, 8, rate=0.4, seed=2).double()
        x = unit_rows().requires_grad_()
        shard.begin_step(labels, 3)
        cos_y, lse = HEADS["blocked"](x, shard.columns(labels), 16.0)
        objective(16 * (cos_y - 0.2), lse).mean().backward()
        return [t.numpy() for t in (cos_y.detach(), lse.detach(), x.grad, shard.index + shard.first, shard.sink.buffer)]

    results = [[torch.as_tensor(t) for t in r] for r in run_ranks(world, work)]
    drawn = torch.cat([r[3] for r in results])
    whole = initial_rows(0, IDENTITIES, 8, 0.01, seed=2).double()[drawn].requires_grad_()
    x = unit_rows().requires_grad_()
    logits = 16 * torch.nn.functional.normalize(x) @ torch.nn.functional.normalize(whole).t()
    target = torch.searchsorted(drawn, labels)
    logits = logits - 16 * 0.2 * torch.nn.functional.one_hot(target, len(drawn)).double()
    torch.nn.functional.cross_entropy(logits, target).backward()
    assert torch.allclose(torch.cat([r[4] for r in results]), whole.grad, rtol=1e-9, atol=1e-12)
    # x is on the sphere here: compare the part of its gradient that is tangential to it.
    dx = sum(r[2] for r in results)
    tangential = dx - (dx * x.detach()).sum(1, keepdim=True) * x.detach()
    assert torch.allclose(tangential, x.grad, rtol=1e-9, atol=1e-12)


def test_all_batch_identities_take_part_even_if_they_are_more_than_the_rate():
    shard = SampledShard(IDENTITIES, 8, rate=0.05, seed=1)
    shard.begin_step(torch.arange(30), 0)
    assert len(shard.index) == 30 and shard.index.tolist() == list(range(30))
    assert distributed.world_size() == 1
