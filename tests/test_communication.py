"""What travels while something else is computed, and how ranks put their parts together."""

import pytest
import torch

from protomem import distributed
from protomem.head import HEADS, Columns, Negatives
from protomem.head.contract import LARGEST_SCALE, combine
from protomem.objective.margins import build_margin
from protomem.prototypes.memory import PrototypeMemory
from protomem.step import MicroBatch, forward_backward
from tests.ranks import run_ranks


class Told:
    """A collective's work that tells when it is waited for."""

    def __init__(self, work, events, name):
        self.work, self.events, self.name = work, events, name

    def wait(self):
        self.events.append(f"{self.name} waited for")
        return self.work.wait()


def listen(events: list[str]) -> None:
    """Every flat collective of this process is written down from now on; an asynchronous one also when it is waited for."""

    def wrap(name, real):
        def call(*args, async_op=False, **kwargs):
            events.append(f"{name} sent")
            work = real(*args, async_op=async_op, **kwargs)
            return Told(work, events, name) if async_op else work

        return call

    distributed._all_gather_flat = wrap("gather", distributed._all_gather_flat)
    distributed._reduce_scatter_flat = wrap("scatter", distributed._reduce_scatter_flat)


def test_labels_travel_and_a_memory_plans_before_the_embeddings_are_sent():
    def work():
        events = []
        listen(events)
        memory = PrototypeMemory(9, 4, size=6)
        plan = memory.slots.plan
        memory.slots.plan = lambda labels: events.append("plan") or plan(labels)
        encoder = torch.nn.Linear(3, 4)
        encoder.register_forward_hook(lambda *_: events.append("encoder"))
        part = MicroBatch(torch.randn(4, 3), torch.tensor([1, 1, 5, 5]) + distributed.rank(), [4, 4])
        forward_backward([part], encoder, memory, HEADS["blocked"], build_margin("cosface"), 0)
        return events

    order = ["gather sent", "encoder", "gather waited for", "plan", "gather sent", "scatter sent", "scatter waited for"]
    assert run_ranks(2, work) == [order, order]


def test_what_is_put_off_is_done_while_the_gradient_travels_and_never_lost():
    """Two terms put work off; in a second pass nothing is gathered; and a third is a second micro-batch."""

    class Puts(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x, events, name):
            ctx.events, ctx.name = events, name
            return x.clone()

        @staticmethod
        def backward(ctx, grad):
            distributed.put_off(lambda: ctx.events.append(f"{ctx.name}, gradients {torch.is_grad_enabled()}"))
            return grad * 2, None, None

    def work():
        events, x = [], torch.ones(2, 3).requires_grad_()
        listen(events)
        for gathers in (True, False, True):
            x.grad = None
            seen = distributed.gather_with_grad(x, [2] * distributed.world_size()) if gathers else x
            (Puts.apply(seen, events, "one").sum() + Puts.apply(seen * 2, events, "two").sum()).backward()
            events.append(x.grad[0, 0].item())
        return events

    pass_with = ["gather sent", "scatter sent", "two, gradients False", "one, gradients False", "scatter waited for"]
    for events in run_ranks(2, work):  # 2 + 4, of two ranks, times W
        assert events == [*pass_with, 24.0, "two, gradients False", "one, gradients False", 6.0, *pass_with, 24.0]
    (alone,) = run_ranks(1, work)
    assert alone == ["two, gradients False", "one, gradients False", 6.0] * 3


def test_parts_of_all_ranks_are_put_together():
    """Logits over the whole range of a scale on three ranks, where some rows of some ranks have none, one row has none at
    all, and all are at one end or the other; in float32. One collective, or three where exp(z) might not fit."""
    g, scales = torch.Generator().manual_seed(0), (1.0, 64.0, LARGEST_SCALE, LARGEST_SCALE + 1, 5000.0)
    cos = torch.cat([torch.rand(9, 12, generator=g, dtype=torch.float64) * 2 - 1, -torch.ones(2, 12), torch.ones(2, 12)])
    cos[0], cos[1, :4], cos[2, 4:] = float("-inf"), float("-inf"), float("-inf")
    own = torch.zeros(3, 13).scatter_(0, torch.randint(3, (1, 13), generator=g), torch.rand(1, 13, generator=g))

    def work():
        found, real, calls = [], torch.distributed.all_reduce, []
        torch.distributed.all_reduce = lambda *args, **kwargs: calls.append(1) or real(*args, **kwargs)
        for scale in scales:
            mine = (scale * cos[:, distributed.rank() :: 3]).float()
            top = mine.amax(1)
            total = (mine - top.masked_fill(top.isinf(), 0)[:, None]).exp().sum(1)
            calls.clear()
            found.append([*(t.numpy() for t in combine(own[distributed.rank()], top, total, scale)), len(calls)])
        return found

    for result in run_ranks(3, work):
        for scale, (cos_y, lse, collectives) in zip(scales, result):
            assert torch.equal(torch.as_tensor(cos_y), own.sum(0)) and collectives == (1 if scale <= LARGEST_SCALE else 3)
            assert torch.allclose(torch.as_tensor(lse).double(), (scale * cos).logsumexp(1), rtol=3e-7, atol=2e-6), scale


@pytest.mark.parametrize("backend", ["dense", "blocked"])
def test_negatives_that_look_at_the_own_cosine_see_it_whole(backend):
    """A margin as MV-softmax's, on three ranks, of which one has the prototype: cos_y, lse and gradients as of one process."""
    g = torch.Generator().manual_seed(1)
    x = torch.nn.functional.normalize(torch.randn(5, 8, generator=g, dtype=torch.float64))
    rows = torch.nn.functional.normalize(torch.randn(30, 8, generator=g, dtype=torch.float64))
    labels = torch.randint(30, (5,), generator=g)
    hard = Negatives(
        lambda cos, cos_y: torch.where(cos > cos_y - 0.5, 1.2 * cos + 0.2, cos),
        lambda cos, cos_y: torch.where(cos > cos_y - 0.5, 1.2, torch.ones_like(cos)),
    )

    def work():
        first, last = distributed.shard_bounds(30, distributed.rank(), distributed.world_size())
        target = torch.where((labels >= first) & (labels < last), labels - first, -1)
        own = x.clone().requires_grad_()
        cos_y, lse = HEADS[backend](own, Columns(rows[first:last], target, unit=True), 32.0, hard)
        (lse - cos_y).sum().backward()
        return [t.detach().numpy() for t in (cos_y, lse, own.grad)]

    cos = x @ rows.t()
    cos_y = cos.gather(1, labels[:, None])
    changed = torch.where(cos > cos_y - 0.5, 1.2 * cos + 0.2, cos)
    assert ((changed != cos).sum(1) > 1).all() and (changed == cos).any()
    lse = (32 * changed).scatter(1, labels[:, None], float("-inf")).logsumexp(1)
    results = run_ranks(3, work)
    (one,) = run_ranks(1, work)
    for result in (*results, one):
        for found, expected in zip(result, (cos_y[:, 0], lse)):
            assert torch.allclose(torch.as_tensor(found), expected, rtol=1e-12)
    assert abs(sum(r[2] for r in results) - one[2]).max() < 1e-10
