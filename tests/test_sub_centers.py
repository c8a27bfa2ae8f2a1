"""Sub-centres: several prototypes of an identity, of which the nearest counts; against a slow formula, sharded and not."""

import functools

import pytest
import torch

from protomem import build, config, distributed
from protomem.head import HEADS, Columns, GradSink, Nearest, objective
from protomem.head.centers import pool, spread
from protomem.objective.margins import build_margin
from protomem.prototypes.classifier import ClassifierShard
from protomem.prototypes.sampled import SampledShard
from protomem.step import MicroBatch, forward_backward
from tests.ranks import run_ranks
from tests.test_block_update import HARDER, OPTIMIZERS, configured
from tests.test_equivalence import MARGINS as ALL_MARGINS
from tests.test_equivalence import SCALE, close, problem, slow_phi

MARGINS = {name: ALL_MARGINS[name] for name in ("softmax", "arcface", "arcface_straight_through", "sphere", "filtered")}
CASES = {  # batch, identities, labels, K; at 2, 3 and 4 ranks
    "uneven": (8, 13, None, 3),
    "empty shard": (8, 5, None, 2),
    "classes all elsewhere": (8, 12, [11, 11, 10, 9, 9, 10, 11, 10], 4),
    "one identity": (4, 1, [0, 0, 0, 0], 3),
    "uneven batch": (7, 10, None, 3),
}


def case_of(name: str):
    """(inputs [B, 5], encoder [6, 5], rows [I, K, 6], labels [B]) in float64."""
    batch, classes, labels, k = CASES[name]
    inputs, encoder, weight, y = problem(batch, classes, labels)
    g = torch.Generator().manual_seed(k)
    return inputs, encoder, weight[:, None] + 0.5 * torch.randn(classes, k, weight.shape[1], generator=g, dtype=torch.float64), y


def slow_loss(x, rows, labels, options):
    """Mean over samples of -log(e^z_y / sum_j e^z_j) with the largest cosine of each identity; rows [I, K, D]."""
    total = 0
    for i, y in enumerate(labels.tolist()):
        z = []
        for j, centers in enumerate(rows):
            cosines = [(x[i] @ c) / (x[i].norm() * c.norm()) for c in centers]
            cos = max(cosines, key=lambda c: c.item())
            if j == y:
                z.append(SCALE * slow_phi(options, cos))
            else:
                z.append(0 * cos if options.get("filter_above") and cos > options["filter_above"] else SCALE * cos)
        total = total - (z[y] - torch.stack(z).logsumexp(0))
    return total / len(labels)


@functools.cache
def expected(name: str, margin: str):
    inputs, encoder, rows, y = case_of(name)
    encoder.requires_grad_(), rows.requires_grad_()
    loss = slow_loss(inputs @ encoder.t(), rows, y, MARGINS[margin])
    loss.backward()
    return loss.item(), encoder.grad, rows.grad.flatten(1)


def train_once(backend, name, options, dtype, **given):
    inputs, encoder_weight, rows, y = case_of(name)
    batch, classes, _, k = CASES[name]
    rank, world = distributed.rank(), distributed.world_size()
    encoder = torch.nn.Linear(5, 6, bias=False).to(dtype)
    encoder.weight.data.copy_(encoder_weight)
    model = torch.nn.parallel.DistributedDataParallel(encoder) if world > 1 else encoder
    shard = ClassifierShard(classes, 6, sub_centers=k).to(dtype)
    shard.weight.data.copy_(rows.flatten(1)[shard.first : shard.last])
    bounds = [distributed.batch_bounds(batch, r, world) for r in range(world)]
    lo, hi = bounds[rank]
    part = MicroBatch(inputs[lo:hi].to(dtype), y[lo:hi], [e - s for s, e in bounds])
    head = functools.partial(HEADS[backend], **given)
    stats = forward_backward([part], model, shard, head, build_margin(scale=SCALE, **options), step=0)
    return stats["loss"].item(), encoder.weight.grad.numpy(), shard.weight.grad.numpy().copy()


@pytest.mark.parametrize("world", [1, 2, 3, 4])
@pytest.mark.parametrize("backend", ["dense", "blocked"])
def test_sharded_equals_slow_formula(world, backend):
    """Every margin and case in one world: 1e-9 in float64, 1e-4 in float32; kept logits: none, a block, all."""
    given = [{}] if backend == "dense" else [dict(block=b, store_mb=s) for b, s in ((4, 0), (7, 0.0003), (4, 16))]
    runs = [(n, m, t, given[i % len(given)]) for i, (n, m) in enumerate((n, m) for n in CASES for m in MARGINS) for t in (64, 32)]
    dtypes, tolerance = {64: torch.float64, 32: torch.float32}, {64: 1e-9, 32: 1e-4}
    results = run_ranks(world, lambda: [train_once(backend, n, MARGINS[m], dtypes[t], **g) for n, m, t, g in runs])
    for i, (name, margin, t, _) in enumerate(runs):
        loss, encoder_grad, row_grad = expected(name, margin)
        for rank in range(world):
            assert results[rank][i][0] == pytest.approx(loss, rel=tolerance[t], abs=1e-7), (name, margin)
            close(results[rank][i][1], encoder_grad, tolerance[t])
        close(torch.cat([torch.as_tensor(r[i][2]) for r in results]), row_grad, tolerance[t])


def gradients(head, x, rows, target, k, scale=16.0, threshold=None, negatives=None, nearest=None, **given):
    sink = GradSink()
    sink.begin(rows)
    columns = Columns(rows, target, sink, centers=k, nearest=nearest)
    x = x.clone().requires_grad_()
    cos_y, out = HEADS[head](x, columns, scale, negatives, threshold, **given)
    (objective(scale * (cos_y - 0.2), out) if threshold is None else out + cos_y).sum().backward()
    return [cos_y.detach(), out.detach(), x.grad, sink.buffer]


@pytest.mark.parametrize("store_mb", [0, 0.01, 16])
@pytest.mark.parametrize("block", [1, 7, 0])
def test_what_looks_at_single_negatives_sees_identities(block, store_mb):
    """A margin on negatives, UniFace's threshold and the hardest negative: blocked as dense."""
    g = torch.Generator().manual_seed(0)
    x = torch.nn.functional.normalize(torch.randn(9, 8, generator=g, dtype=torch.float64))
    rows, target = torch.randn(20 * 3, 8, generator=g, dtype=torch.float64), torch.randint(-1, 20, (9,), generator=g)
    for options in ({}, {"negatives": HARDER}, {"threshold": torch.tensor([3.0], dtype=torch.float64)}):
        seen = [Nearest(), Nearest()]
        dense = gradients("dense", x, rows, target, 3, nearest=seen[0], **options)
        blocked = gradients("blocked", x, rows, target, 3, nearest=seen[1], block=block, store_mb=store_mb, **options)
        for a, b in zip(blocked, dense):
            torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-13)
        torch.testing.assert_close(seen[1].cos, seen[0].cos)
        assert torch.equal(seen[1].row, seen[0].row) and seen[0].row.max() < 20


def test_bf16_operands_cost_one_percent_of_the_gradient():
    g = torch.Generator().manual_seed(1)
    x = torch.nn.functional.normalize(torch.randn(64, 512, generator=g))
    rows, target = torch.randn(900 * 3, 512, generator=g) * 0.05, torch.randint(0, 900, (64,), generator=g)
    exact = gradients("dense", x.double(), rows.double(), target, 3, scale=64.0)
    found = gradients("blocked", x, rows, target, 3, scale=64.0, precision="bf16")
    for a, b in zip(found[2:], exact[2:]):
        assert 1e-5 < (a - b).norm() / b.norm() <= 0.012


@pytest.mark.parametrize("backend", ["dense", "blocked"])
def test_of_equal_prototypes_each_sample_counts_once(backend):
    x = torch.nn.functional.normalize(torch.randn(5, 4, dtype=torch.float64))
    rows = torch.randn(6, 1, 4, dtype=torch.float64).repeat(1, 3, 1)
    single = gradients(backend, x, rows[:, 0].clone(), torch.tensor([0, 1, 2, 5, -1]), 1)
    several = gradients(backend, x, rows.flatten(0, 1), torch.tensor([0, 1, 2, 5, -1]), 3)
    for a, b in zip(several[:3], single[:3]):
        torch.testing.assert_close(a, b)
    # Of which one is a matter of the last bit, as a product of matrices may round equal columns differently.
    torch.testing.assert_close(several[3].view(6, 3, 4).sum(1), single[3])


def test_pool_and_spread_are_the_maximum_and_its_gradient():
    z = torch.randn(4, 15).requires_grad_()
    best, at = pool(z.detach(), 5)
    found = z.view(4, 3, 5).max(2)
    assert torch.equal(best, found.values) and torch.equal(at.long(), found.indices)
    p = torch.randn(4, 3)
    found.values.backward(p)
    assert torch.equal(spread(p, at, torch.empty(4, 15)), z.grad)


def trained(optimizer: str, fuse: bool, backend: str, dtype=torch.float64, **given):
    """This rank's rows [C, 3 * 6] after three steps."""
    world = distributed.world_size()
    c = configured(*OPTIMIZERS[optimizer], f"optimizer.fuse_prototypes={str(fuse).lower()}")
    shard, x = ClassifierShard(7, 6, std=0.5, sub_centers=3).to(dtype), torch.nn.Linear(5, 6, bias=False).to(dtype)
    x.weight.data.copy_(torch.arange(30.0).view(6, 5).sin())
    built = build.optimizers_from(c, torch.nn.Sequential(x), shard, torch.nn.Module())
    model = torch.nn.parallel.DistributedDataParallel(x) if world > 1 else x
    for step in range(3):
        g = torch.Generator().manual_seed(step)
        images, y = torch.randn(6, 5, generator=g).to(dtype), torch.randint(0, 7, (6,), generator=g)
        mine = slice(6 // world * distributed.rank(), 6 // world * (distributed.rank() + 1))
        part = MicroBatch(images[mine], y[mine], [6 // world] * world)
        for o in built.values():
            o.zero_grad()
        head = functools.partial(HEADS[backend], **given)
        forward_backward([part], model, shard, head, build_margin("arcface", scale=SCALE), step)
        for o in built.values():
            o.step()
    return shard.weight.detach().numpy()


@pytest.mark.parametrize("world", [1, 3])
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_the_fused_update_is_the_same_bit_for_bit(world, optimizer):
    def work():
        return [trained(optimizer, fuse, "blocked", block=4, store_mb=0.0003) for fuse in (False, True)]

    for plain, fused in run_ranks(world, work):
        assert plain.any() and (plain == fused).all()


@pytest.mark.parametrize("world", [1, 2, 3])
def test_a_sampled_shard_takes_all_of_an_identity(world):
    """Whole identities are drawn, only their rows have a gradient, and loss and gradient are those of the drawn ones."""

    def work():
        shard = SampledShard(11, 4, rate=0.4, seed=2, std=1.0, sub_centers=3).double()
        labels = torch.tensor([0, 7, 7, 3])
        shard.begin_step(labels, 0)
        index, grad = shard.weight.row_grad
        assert grad.shape == (len(index), 12)
        columns = shard.columns(labels)
        x = torch.nn.functional.normalize(torch.arange(16.0, dtype=torch.float64).view(4, 4).sin()).requires_grad_()
        cos_y, lse = HEADS["blocked"](x, columns, 4.0, block=2)
        objective(4 * cos_y, lse).sum().backward()
        return index.numpy() + shard.first, shard.weight.detach().numpy()[index], grad.numpy(), x.grad.numpy()

    found = run_ranks(world, work)
    drawn = torch.cat([torch.as_tensor(f[0]) for f in found])
    rows = torch.cat([torch.as_tensor(f[1]) for f in found]).requires_grad_()
    assert {0, 3, 7} <= set(drawn.tolist())
    x = torch.nn.functional.normalize(torch.arange(16.0, dtype=torch.float64).view(4, 4).sin()).requires_grad_()
    centers = torch.nn.functional.normalize(rows.view(-1, 3, 4), dim=2)
    z = 4 * torch.einsum("bd,skd->bsk", x, centers).amax(2)
    y = torch.tensor([drawn.tolist().index(v) for v in (0, 7, 7, 3)])
    torch.nn.functional.cross_entropy(z, y, reduction="sum").backward()
    close(torch.cat([torch.as_tensor(f[2]) for f in found]), rows.grad, 1e-9)
    close(sum(torch.as_tensor(f[3]) for f in found), x.grad, 1e-9)


def test_what_does_not_go_with_sub_centers_is_refused():
    with pytest.raises(ValueError, match="learned rows"):
        Columns(torch.zeros(6, 2), torch.zeros(1), centers=3, valid=torch.ones(6, dtype=torch.bool))
    for settings, why in (
        (["prototypes.sub_centers=3", "prototypes.source=memory"], "prototypes.sub_centers"),
        (["prototypes.sub_centers=3", "prototypes.injection.weight=0.15"], "nobody has said"),
        (["prototypes.sub_centers=0"], "prototypes.sub_centers"),
    ):
        with pytest.raises(config.UserError, match=why):
            config.load([], ["data.train=x", "output=y", *settings])
