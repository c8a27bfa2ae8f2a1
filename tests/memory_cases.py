"""Configurations of a prototype memory, batches for them, and runs of both the memory and its reference; for tests only."""

from __future__ import annotations

import functools
import itertools
import math
import random

import torch

from protomem import distributed
from protomem.head import HEADS
from protomem.objective.margins import build_margin
from protomem.optim import UnitRowSGD
from protomem.prototypes.memory import PrototypeMemory
from protomem.quality import Quality
from protomem.step import Extras, MicroBatch, forward_backward
from tests.memory_reference import MemoryReference, QualityReference

B, D, C, COPIES, RATE, SCALE = 12, 6, 40, 3, 0.7, 16.0

ESTIMATORS = {
    "equal": dict(estimator="equal"),
    "norm": dict(estimator="norm"),
    "external": dict(estimator="external"),
    "magface": dict(estimator="magface"),
    "zscore": dict(estimator="zscore"),
    "given": dict(estimator="recognizability", decay=0.8),
    "low_norm": dict(estimator="recognizability", unrecognizable="low_norm", decay=0.5),
}
USAGES = {
    "soft": dict(usage="soft", minimum=1e-3),
    "power": dict(usage="soft", power=2.0, minimum=0.0),
    "topk": dict(usage="topk", keep=2),
    **{f"threshold_{e}": dict(usage="hard", threshold=0.5, on_empty=e) for e in ("equal", "best", "skip")},
    **{f"quantile_{e}": dict(usage="hard", quantile=0.4, on_empty=e) for e in ("equal", "best", "skip")},
}
MARGINS = {
    "cosface": dict(name="cosface", m=0.4),
    "arcface": dict(name="arcface", m=0.5),
    "filtered": dict(name="cosface", m=0.4, filter_above=0.3),
}
OPTIONS = {
    "estimator": tuple(ESTIMATORS),
    "usage": tuple(USAGES),
    "gradient": ("none", "batch", "sgd"),
    "self_exclusion": ("none", "loo", "split"),
    "policy": ("ring", "lru"),
    "momentum": (0.0, 0.5),
    "average": ("unit", "raw"),
    "storage": ("fp32", "bf16"),
    "fill": ("empty", "random"),
    "size": (12, 11, 17),  # 12: as many slots as a batch may have identities
    "pinned": (False, True),
    "loss_weight": (0.0, 1.5),
    "warmup": (0, 4),
    "margin": tuple(MARGINS),
    "backend": ("blocked", "dense"),
    "injection": (0.0, 0.3),
}


USUAL = dict(
    estimator="equal",
    usage="soft",
    gradient="none",
    self_exclusion="none",
    policy="ring",
    momentum=0.0,
    average="unit",
    storage="fp32",
    fill="empty",
    size=12,
    pinned=False,
    loss_weight=0.0,
    warmup=0,
    margin="cosface",
    backend="blocked",
    injection=0.0,
)


def slow_phi(options: dict, cos: torch.Tensor) -> torch.Tensor:
    """The margin of one target cosine."""
    m = options["m"]
    if options["name"] == "cosface":
        return cos - m
    if cos > 0 and 1 - cos * cos < 1e-12:  # an image that is its own prototype: the sine counts as the constant 1e-6 there
        return cos * math.cos(m) - 1e-6 * math.sin(m)
    angle = torch.acos(cos) + m
    return torch.cos(angle) if angle < math.pi else cos - m * math.sin(m)


def allowed(case: dict) -> bool:
    """Whether a (partial) configuration makes sense; the others are refused by protomem/config.py."""
    if case.get("storage") == "bf16" and case.get("gradient", "none") != "none":
        return False
    if case.get("injection") and case.get("gradient", "none") == "batch":
        return False
    if case.get("pinned") and case.get("estimator", "given") not in ("given", "low_norm"):
        return False
    return True


@functools.cache
def covering_array(seed: int = 0) -> list[dict]:
    """Configurations among which every allowed pair of option values occurs, by greedy choice (about 70)."""
    draw = random.Random(seed)
    names = list(OPTIONS)
    missing = {
        ((a, x), (b, y))
        for a, b in itertools.combinations(names, 2)
        for x, y in itertools.product(OPTIONS[a], OPTIONS[b])
        if allowed({a: x, b: y})
    }
    out = []
    while missing:
        best, gain = None, -1
        for _ in range(40):
            (a, x), (b, y) = draw.choice(sorted(missing, key=repr))
            case = {a: x, b: y}
            for name in sorted(names, key=lambda _: draw.random()):
                if name in case:
                    continue
                options = [{**case, name: v} for v in OPTIONS[name]]
                values = [o[name] for o in options if allowed(o)]
                draw.shuffle(values)
                case[name] = max(values, key=lambda v: sum(_pair(name, v, k, w) in missing for k, w in case.items()))
            covered = len(_pairs(case) & missing)
            if covered > gain:
                best, gain = case, covered
        missing -= _pairs(best)
        out.append({name: best[name] for name in names})
    return out


def _pair(a, x, b, y):
    order = list(OPTIONS)
    return ((a, x), (b, y)) if order.index(a) < order.index(b) else ((b, y), (a, x))


def _pairs(case: dict) -> set:
    return {_pair(a, x, b, y) for (a, x), (b, y) in itertools.combinations(case.items(), 2)}


def product_cases() -> list[dict]:
    """The full product policy x momentum x estimator x usage x gradient x self-exclusion; the rest at random."""
    main = ("policy", "momentum", "estimator", "usage", "gradient", "self_exclusion")
    out = []
    for k, values in enumerate(itertools.product(*(OPTIONS[name] for name in main))):
        case, draw = dict(zip(main, values)), random.Random(k)
        for name in (n for n in OPTIONS if n not in main):
            case[name] = draw.choice([v for v in OPTIONS[name] if allowed({**case, name: v})])
        out.append(case)
    return out


def tuple_cases() -> list[dict]:
    """Every policy x momentum x estimator x usage x gradient once, in random order; self-exclusion and the rest vary (`loo`
    not where prototypes learn, which is refused)."""
    full, out = product_cases(), []
    for group in range(len(full) // 3):
        three = full[3 * group : 3 * group + 3]
        pick = group % 3
        if three[pick]["gradient"] == "sgd" and three[pick]["self_exclusion"] == "loo":
            pick = (pick + 1) % 3
        out.append(three[pick])
    random.Random(1).shuffle(out)
    return out


def batches(case: dict, steps: int, seed: int = 0) -> list[dict]:
    """Batches of B images with unequal numbers of images per identity, from a pool that is now large, now small.

    Norms from 3 to 150, so that every form of the norm as a quality is used at both of its ends; in some batches an
    identity's two images are opposite to each other, in some all images are of one identity.
    """
    g = torch.Generator().manual_seed(seed)
    draw = random.Random(seed)
    centres = torch.randn(C, D, generator=g, dtype=torch.float64)
    out = []
    for step in range(steps):
        most = min(B, case["size"])
        count = draw.choice([1, 3, 5, 6, 8, most]) if step else 6
        pool = range(C) if step % 4 else range(most + 3)
        identities = draw.sample(pool, min(count, len(pool)))
        labels = identities + [draw.choice(identities) for _ in range(B - len(identities))]
        draw.shuffle(labels)
        opposite = step % 5 == 3 and len(identities) > 1
        if opposite:  # two images of one identity, on different ranks
            labels = [identities[0] if y == identities[1] else y for y in labels]
            labels[4] = labels[9] = identities[1]
        x = centres[labels] + 0.8 * torch.randn(B, D, generator=g, dtype=torch.float64)
        x = x / x.norm(dim=1, keepdim=True) * torch.exp(torch.rand(B, 1, generator=g, dtype=torch.float64) * 3.9 + 1.1)
        if opposite:
            x[9] = -x[4]
        external = (torch.rand(B, generator=g) * (torch.rand(B, generator=g) > 0.3)).float()
        copies = torch.randn(COPIES, D, generator=g, dtype=torch.float64)
        out.append(dict(x=x, labels=labels, external=external, copies=copies))
    return out


def rows_per_rank(world: int, step: int) -> list[int]:
    """Uneven shares of a batch, also none."""
    draw = random.Random(1000 * world + step)
    if step % 3 == 0:
        return [stop - start for start, stop in (distributed.batch_bounds(B, r, world) for r in range(world))]
    cuts = sorted(draw.randint(0, B) for _ in range(world - 1))
    return [b - a for a, b in zip([0, *cuts], [*cuts, B])]


def quality_options(case: dict) -> dict:
    options = {**ESTIMATORS[case["estimator"]], **USAGES[case["usage"]]}
    if options.get("threshold") and options["estimator"] == "recognizability":
        options["threshold"] = 0.95
    return {**options, "warmup": case["warmup"], "loss_weight": case["loss_weight"]}


def memory_options(case: dict) -> dict:
    return {k: case[k] for k in ("policy", "momentum", "gradient", "self_exclusion", "average", "storage", "pinned")}


def injection_options(case: dict) -> dict | None:
    return dict(weight=case["injection"], steps=3, start=2) if case["injection"] else None


def build(case: dict) -> PrototypeMemory:
    more = memory_options(case) | dict(quality=Quality(D, **quality_options(case)), injection=injection_options(case))
    return PrototypeMemory(C, D, size=case["size"], fill=case["fill"], seed=5, **more)


def run_memory(case: dict, steps: int) -> list[dict]:
    """This rank's part of a run of the implementation, in float64; one record per step."""
    torch.set_default_dtype(torch.float64)
    rank, world = distributed.rank(), distributed.world_size()
    memory = build(case)
    learner = UnitRowSGD(memory, lr=RATE) if case["gradient"] == "sgd" else None
    margin = build_margin(scale=SCALE, **MARGINS[case["margin"]])
    records = [dict(rows=memory.rows.float().numpy().copy() if case["storage"] == "bf16" else memory.rows.numpy().copy())]
    for step, batch in enumerate(batches(case, steps)):
        sizes = rows_per_rank(world, step)
        mine = slice(sum(sizes[:rank]), sum(sizes[: rank + 1]))
        x = batch["x"][mine].clone().requires_grad_()
        external = batch["external"][mine] if case["estimator"] == "external" else None
        part = MicroBatch(x, torch.tensor(batch["labels"], dtype=torch.int64)[mine], sizes, external)
        extras = Extras()
        if case["estimator"] == "given":
            start, stop = distributed.batch_bounds(COPIES, rank, world)
            copies = batch["copies"][start:stop]
            extras = Extras(copies=lambda images: copies, total=COPIES, encoder=torch.nn.Identity())

        def head(x, columns, scale, negatives):
            return HEADS[case["backend"]](x, columns, scale, negatives, block=4, store_mb=(0, 0.0006, 16)[step % 3])

        stats = forward_backward([part], torch.nn.Identity(), memory, head, margin, step, extras=extras)
        if learner is not None:
            learner.step()
        if step % 8 == 0:
            memory.check_replicas()
        slots = memory.slots
        records.append(
            dict(
                loss=stats["loss"].item(),
                grad=x.grad.numpy() / world,
                label=slots.label[:-1].tolist(),
                seq=slots.seq[:-1].tolist(),
                written=slots.written[:-1].tolist(),
                filled=memory.filled[: case["size"]].tolist(),
                rows=memory.rows.double().numpy().copy(),
            )
        )
    return records


def run_reference(case: dict, steps: int, fillers: list[torch.Tensor]) -> list[dict]:
    quality = QualityReference(**quality_options(case))
    more = memory_options(case) | dict(injection=injection_options(case))
    memory = MemoryReference(case["size"], quality, fillers=fillers, **more)
    options = MARGINS[case["margin"]]
    records, squares = [], []

    def phi(cos):
        squares.append(1 - cos.item() ** 2)
        return slow_phi(options, cos)

    for step, batch in enumerate(batches(case, steps)):
        x = batch["x"].clone().requires_grad_()
        squares.clear()
        if case["estimator"] == "given":
            quality.see(list(batch["copies"]))
        loss = memory.loss(
            x,
            batch["labels"],
            step,
            SCALE,
            phi,
            options.get("filter_above", 0.0),
            batch["external"].tolist(),
        )
        loss.backward()
        if case["gradient"] == "sgd":
            memory.learn(RATE)
        book = memory.book
        records.append(
            dict(
                loss=loss.item(),
                grad=x.grad.numpy(),
                slots=list(book.slots),
                fillers=set(memory.fillers),
                order=book.oldest_first(),
                written=list(book.written),
                rows={s: row.numpy().copy() for s, row in memory.rows.items()},
                left_over=memory.left_over,
                square=min((v for v in squares if v > 1e-12), default=1.0) if options["name"] == "arcface" else 1.0,
            )
        )
    return records
