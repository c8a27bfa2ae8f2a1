"""MagFace against its formula, sample by sample: loss and all gradients, and the part of them along the embedding."""

import functools
import math

import pytest
import torch

from protomem import config, distributed
from protomem.composition import least_weight
from protomem.errors import UserError
from protomem.head import HEADS
from protomem.objective.margins import build_margin
from protomem.prototypes.classifier import ClassifierShard
from protomem.step import MicroBatch, forward_backward
from tests.ranks import run_ranks
from tests.test_equivalence import CASES, SCALE, close, problem

RANGE = dict(lower=3.5, upper=7.0, lower_margin=0.45, upper_margin=0.8, weight=5.0)
KINDS = {
    "arcface_easy": dict(beyond_pi="easy", magnitude=RANGE),
    "arcface_threshold": dict(magnitude=RANGE),
    "arcface_monotone": dict(beyond_pi="monotone", magnitude=RANGE),
    "cosface": dict(magnitude={**RANGE, "kind": "cosface", "lower_margin": 0.2}),
}


def slow_loss(x, weight, labels, options):
    """Mean of -log softmax with z_y = s cos(t + m(a)) or s (cos t - m(a)), plus the mean of weight g(a)."""
    o, rule = options["magnitude"], options.get("beyond_pi", "threshold")
    total = 0
    for i, y in enumerate(labels.tolist()):
        a = x[i].norm()
        if a < o["lower"]:
            a = torch.tensor(o["lower"], dtype=x.dtype)
        elif a > o["upper"]:
            a = torch.tensor(o["upper"], dtype=x.dtype)
        m = o["lower_margin"] + (o["upper_margin"] - o["lower_margin"]) * (a - o["lower"]) / (o["upper"] - o["lower"])
        z = [SCALE * (x[i] @ w) / (x[i].norm() * w.norm()) for w in weight]
        cos = z[y] / SCALE
        angle = torch.acos(cos) + m
        if o.get("kind") == "cosface":
            value = cos - m
        elif rule == "easy":
            value = torch.cos(angle) if cos > 0 else cos
        elif angle <= math.pi:
            value = torch.cos(angle)
        else:
            value = cos - m * torch.sin(m) if rule == "threshold" else -torch.cos(angle) - 2
        z[y] = SCALE * value
        total = total - (z[y] - torch.stack(z).logsumexp(0)) + o["weight"] * (a / o["upper"] ** 2 + 1 / a)
    return total / len(labels)


@functools.cache
def expected(case, kind):
    batch, classes, labels, _ = CASES[case]
    inputs, encoder, weight, y = problem(batch, classes, labels)
    encoder.requires_grad_(), weight.requires_grad_()
    x = inputs @ encoder.t()
    x.retain_grad()
    loss = slow_loss(x, weight, y, KINDS[kind])
    loss.backward()
    norm = x.detach().norm(dim=1)
    assert (norm < RANGE["lower"]).any() or (norm > RANGE["upper"]).any() or case != "uneven"  # some are clamped
    return loss.item(), encoder.grad, weight.grad, x.grad, x.detach()


class Keeps(torch.nn.Module):
    """A linear encoder that keeps its output, to look at its gradient."""

    def __init__(self, weight):
        super().__init__()
        self.fc = torch.nn.Linear(weight.shape[1], weight.shape[0], bias=False).to(weight.dtype)
        self.fc.weight.data.copy_(weight)
        self.outputs = []

    def forward(self, x):
        out = self.fc(x)
        out.retain_grad()
        self.outputs.append(out)
        return out


def one_step(backend, options, batch, classes, labels, accumulate):
    inputs, encoder_weight, weight, y = problem(batch, classes, labels)
    rank, world = distributed.rank(), distributed.world_size()
    encoder = Keeps(encoder_weight)
    model = torch.nn.parallel.DistributedDataParallel(encoder) if world > 1 else encoder
    shard = ClassifierShard(classes, weight.shape[1]).double()
    shard.weight.data.copy_(weight[shard.first : shard.last])
    parts = []
    for a in range(accumulate):
        start, stop = distributed.batch_bounds(batch, a, accumulate)
        bounds = [distributed.batch_bounds(stop - start, r, world) for r in range(world)]
        lo, hi = (start + v for v in bounds[rank])
        parts.append(MicroBatch(inputs[lo:hi], y[lo:hi], [e - s for s, e in bounds]))
    margin = build_margin("magface", scale=SCALE, **options)
    stats = forward_backward(parts, model, shard, functools.partial(HEADS[backend]), margin, step=0, observe=True)
    seen = [(p.images.numpy(), out.grad.numpy() / world) for p, out in zip(parts, encoder.outputs)]
    return stats["loss"].item(), encoder.fc.weight.grad.numpy(), shard.weight.grad.numpy().copy(), seen


@pytest.mark.parametrize("world", [1, 2, 3, 4])
@pytest.mark.parametrize("backend", ["dense", "blocked"])
def test_equals_the_formula(world, backend):
    """Also where all classes live on other ranks. The gradient along each embedding must be right by itself: for a sample
    whose class lives elsewhere it is what a norm gathered without a graph would lose."""
    todo = [(case, kind) for case in CASES for kind in KINDS]

    def work():
        return [one_step(backend, KINDS[kind], *CASES[case]) for case, kind in todo]

    results = run_ranks(world, work)
    for k, (case, kind) in enumerate(todo):
        loss, encoder_grad, weight_grad, x_grad, x = expected(case, kind)
        for rank in range(world):
            assert results[rank][k][0] == pytest.approx(loss, rel=1e-9), (case, kind)
            close(results[rank][k][1], encoder_grad, 1e-9)
        close(torch.cat([torch.as_tensor(r[k][2]) for r in results]), weight_grad, 1e-9)
        inputs = problem(*CASES[case][:3])[0]
        radial = (x_grad * x).sum(1) / x.norm(dim=1)
        found = {}
        for rank in range(world):
            for images, grad in results[rank][k][3]:
                for image, g in zip(torch.as_tensor(images), torch.as_tensor(grad)):
                    i = int((inputs - image).abs().sum(1).argmin())
                    found[i] = (g * x[i]).sum() / x[i].norm()
        assert sorted(found) == list(range(len(inputs)))
        close(torch.stack([found[i] for i in range(len(inputs))]), radial, 1e-9)
        inside = (x.norm(dim=1) > RANGE["lower"]) & (x.norm(dim=1) < RANGE["upper"])
        assert (radial[~inside].abs() < 1e-12).all()  # clamped norms get none
        if kind == "arcface_threshold":
            assert (radial[inside].abs() > 1e-6).all()


def settings(*more):
    base = ["output=o", "data.train=d", "margin.name=magface", "encoder.last_bn=learnable", *more]
    return config.load([], base)


def test_the_bound_on_the_weight_is_the_published_one():
    """22.587 for the published angular settings, 29.04 for the cosine ones, 0.704 for those of the fine-tuning tip."""
    assert least_weight(64, 10, 110, 0.45, 0.8) == pytest.approx(22.587, abs=1e-3)
    assert least_weight(64, 10, 110, 0.35, 0.8) == pytest.approx(29.04, abs=1e-2)
    assert least_weight(64, 1, 51, 0.45, 1.0) == pytest.approx(0.704, abs=1e-3)
    settings("margin.magnitude.weight=22.6")
    with pytest.raises(UserError, match=r"weight=20.0 is below the bound 22\.59.*use 22\.59 or more"):
        settings("margin.magnitude.weight=20")


@pytest.mark.parametrize(
    "change, message",
    [
        ("encoder.last_bn=frozen", "pins the embedding norm"),
        ("margin.gradient=straight_through", "nothing would pull the norms down"),
        ("margin.magnitude.lower=200", "must be less than upper"),
        ("margin.magnitude.lower_margin=0.9", "is more than upper_margin"),
        ("margin.magnitude.upper_margin=4", "below pi"),
        ("margin.name=cosface", "no effect with margin.name=cosface"),
    ],
)
def test_refused(change, message):
    more = ("margin.magnitude.weight=40",) if change == "margin.name=cosface" else ()
    with pytest.raises(UserError, match=message):
        settings(*more, change)
