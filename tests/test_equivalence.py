"""Sharded equals single-process equals a slow formula: loss and all gradients, every margin, world size and back end."""

import functools
import math

import pytest
import torch

from protomem import distributed
from protomem.head import HEADS
from protomem.objective.margins import build_margin
from protomem.prototypes.classifier import ClassifierShard
from protomem.step import MicroBatch, forward_backward
from tests.ranks import run_ranks

SCALE = 16.0
MARGINS = {
    "softmax": dict(name="softmax"),
    "cosface": dict(name="cosface"),
    "arcface": dict(name="arcface"),
    "arcface_easy": dict(name="arcface", beyond_pi="easy"),
    "arcface_plain": dict(name="arcface", beyond_pi="plain"),
    "arcface_raw": dict(name="arcface", beyond_pi="raw"),
    "arcface_monotone": dict(name="arcface", beyond_pi="monotone"),
    "arcface_straight_through": dict(name="arcface", gradient="straight_through"),
    "combined": dict(name="combined", m1=1.0, m2=0.3, m3=0.2),
    "sphere": dict(name="combined", m1=1.35, m2=0.1, m3=0.05, beyond_pi="monotone"),
    "filtered": dict(name="cosface", filter_above=0.1),
}


def slow_phi(options: dict, cos: torch.Tensor) -> torch.Tensor:
    """The margin of one sample, from the definition with the angle itself."""
    name, rule = options["name"], options.get("beyond_pi", "threshold")
    m1, m2, m3 = {"softmax": (1, 0, 0), "cosface": (1, 0, 0.4), "arcface": (1, 0.5, 0)}.get(name) or (
        options["m1"],
        options["m2"],
        options["m3"],
    )
    angle = m1 * torch.acos(cos) + m2
    value = torch.cos(angle)
    if rule == "easy" and cos <= 0:
        value = cos
    elif rule == "plain" and angle > math.pi:
        value = cos
    elif rule == "threshold" and angle > math.pi:
        value = cos - m2 * math.sin(m2)
    elif rule == "monotone" and angle > math.pi:
        value = -torch.cos(angle) - 2
    if options.get("gradient") == "straight_through":
        return cos + (value - m3 - cos).item()
    return value - m3


def slow_loss(x: torch.Tensor, weight: torch.Tensor, labels, options: dict) -> torch.Tensor:
    """Mean over samples of -log(e^z_y / sum_j e^z_j), sample by sample and class by class."""
    total = 0
    for i, y in enumerate(labels.tolist()):
        z = []
        for j in range(len(weight)):
            cos = (x[i] @ weight[j]) / (x[i].norm() * weight[j].norm())
            if j == y:
                z.append(SCALE * slow_phi(options, cos))
            elif options.get("filter_above") and cos > options["filter_above"]:
                z.append(0 * cos)
            else:
                z.append(SCALE * cos)
        total = total - (z[y] - torch.stack(z).logsumexp(0))
    return total / len(labels)


def problem(batch: int, classes: int, labels, size: int = 6, features: int = 5, dtype=torch.float64):
    g = torch.Generator().manual_seed(batch * 100 + classes)
    inputs = torch.randn(batch, features, generator=g, dtype=torch.float64)
    encoder = torch.randn(size, features, generator=g, dtype=torch.float64)
    weight = torch.randn(classes, size, generator=g, dtype=torch.float64)
    weight[0] *= 0  # replaced below by minus a sample's embedding: an angle beyond pi - m
    y = torch.tensor(labels) if labels is not None else torch.randint(0, classes, (batch,), generator=g)
    # Not nearer: sin t = sqrt(1 - cos^2) is ill-conditioned at 180 degrees, in float32 whoever computes it.
    weight[0] = -(encoder @ inputs[0]) + 0.4 * torch.randn(size, generator=g, dtype=torch.float64)
    y[0] = 0 if labels is None else y[0]
    return inputs.to(dtype), encoder.to(dtype), weight.to(dtype), y


def train_once(backend, options, batch, classes, labels, accumulate, dtype, block, store_mb=0.001):
    """One forward and backward on this rank through the real step; returns loss, encoder gradient, shard gradient."""
    inputs, encoder_weight, weight, y = problem(batch, classes, labels, dtype=dtype)
    rank, world = distributed.rank(), distributed.world_size()
    encoder = torch.nn.Linear(inputs.shape[1], encoder_weight.shape[0], bias=False).to(dtype)
    encoder.weight.data.copy_(encoder_weight)
    model = torch.nn.parallel.DistributedDataParallel(encoder) if world > 1 else encoder
    shard = ClassifierShard(classes, weight.shape[1]).to(dtype)
    shard.weight.data.copy_(weight[shard.first : shard.last])
    parts = []
    for a in range(accumulate):
        start, stop = distributed.batch_bounds(batch, a, accumulate)
        bounds = [distributed.batch_bounds(stop - start, r, world) for r in range(world)]
        lo, hi = (start + v for v in bounds[rank])
        parts.append(MicroBatch(inputs[lo:hi], y[lo:hi], [e - s for s, e in bounds]))

    def head(x, columns, scale, negatives):
        return HEADS[backend](x, columns, scale, negatives, block=block, store_mb=store_mb)

    stats = forward_backward(parts, model, shard, head, build_margin(scale=SCALE, **options), step=0)
    return stats["loss"].item(), encoder.weight.grad.numpy(), shard.weight.grad.numpy().copy()


@functools.cache
def expected(case: str, margin: str):
    batch, classes, labels, _ = CASES[case]
    inputs, encoder, weight, y = problem(batch, classes, labels)
    encoder.requires_grad_(), weight.requires_grad_()
    loss = slow_loss(inputs @ encoder.t(), weight, y, MARGINS[margin])
    loss.backward()
    return loss.item(), encoder.grad, weight.grad


def close(a, b, tolerance):
    a, b = torch.as_tensor(a), torch.as_tensor(b)
    assert a.shape == b.shape
    error = (a - b).abs().max() / b.abs().max().clamp_min(1e-9)  # all-zero gradients (a single class) compare absolutely
    assert error <= tolerance, f"relative error {error:.3g}"


# name: (batch, classes, labels, accumulate); the label lists are chosen for what they do at 2, 3 and 4 ranks
CASES = {
    "uneven": (8, 13, None, 1),
    "empty_shard": (8, 5, None, 1),  # 4 ranks hold 2, 2, 1 and 0 rows
    "fewer_classes_than_ranks": (8, 3, None, 1),
    "classes_all_elsewhere": (8, 12, [11, 11, 10, 9, 9, 10, 11, 10], 1),  # only the last rank owns any
    "one_per_rank": (4, 9, None, 1),
    "uneven_batch": (7, 10, None, 1),
    "accumulated": (9, 10, None, 2),
    "one_class": (4, 1, [0, 0, 0, 0], 1),
}


@pytest.mark.parametrize("world", [1, 2, 3, 4])
@pytest.mark.parametrize("backend", ["dense", "blocked"])
@pytest.mark.parametrize("case", list(CASES))
def test_sharded_equals_slow_formula(world, backend, case):
    """Every margin in one world, float64: relative error <= 1e-9 on loss, encoder gradient and prototype gradient."""
    batch, classes, labels, accumulate = CASES[case]

    def work():
        # Kept logits: none, one block, all of them, in turn.
        stores = (0, 0.0003, 16) if backend == "blocked" else (0,)
        return [
            train_once(backend, o, batch, classes, labels, accumulate, torch.float64, 4, stores[k % len(stores)])
            for k, o in enumerate(MARGINS.values())
        ]

    results = run_ranks(world, work)
    for k, (name, options) in enumerate(MARGINS.items()):
        loss, encoder_grad, weight_grad = expected(case, name)
        for rank in range(world):
            assert results[rank][k][0] == pytest.approx(loss, rel=1e-9, abs=1e-12), name
            close(results[rank][k][1], encoder_grad, 1e-9)
        close(torch.cat([torch.as_tensor(r[k][2]) for r in results]), weight_grad, 1e-9)


@pytest.mark.parametrize("world", [1, 2, 3, 4])
@pytest.mark.parametrize("backend", ["dense", "blocked"])
@pytest.mark.parametrize("case", list(CASES))
def test_float32_within_1e4(world, backend, case):
    batch, classes, labels, accumulate = CASES[case]

    def work():
        return [train_once(backend, o, batch, classes, labels, accumulate, torch.float32, 4) for o in MARGINS.values()]

    results = run_ranks(world, work)
    for k, name in enumerate(MARGINS):
        loss, encoder_grad, weight_grad = expected(case, name)
        assert results[0][k][0] == pytest.approx(loss, rel=1e-4, abs=1e-7)
        close(results[0][k][1], encoder_grad, 1e-4)
        close(torch.cat([torch.as_tensor(r[k][2]) for r in results]), weight_grad, 1e-4)
