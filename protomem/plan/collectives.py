"""The collectives of one training step, as the code makes them: name, how many, bytes of each.

tests/test_plan.py counts the real ones. Not listed, because they are not of every step: a number every tenth step (was a
signal sent?), statistics every `log.every` steps, and what evaluation and checkpoints exchange.
"""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import dataclass

from protomem.head.contract import LARGEST_SCALE
from protomem.plan.case import Case
from protomem.plan.hardware import collective_seconds

BUCKET = 25 * 2**20  # bytes of DDP's buckets
FIRST_BUCKET = 2**20
ROWS = "prototype gradients"


@dataclass(frozen=True)
class Collective:
    """kind: all_gather, reduce_scatter or all_reduce. size: bytes of the whole result (gather), input (scatter) or buffer, of
    one of `count` calls. behind: what is computed while it runs, "" for nothing."""

    name: str
    kind: str
    count: int
    size: float
    behind: str = ""

    def seconds(self, case: Case) -> float:
        return self.count * collective_seconds(self.kind, self.size, case.world, case.device, case.fabric)


def collectives(case: Case) -> list[Collective]:
    """Of one step with several ranks; empty for one."""
    if case.world == 1:
        return []
    c, w = case.config, case.world
    whole = max(sum(row[r] for row in case.parts) for r in range(w))
    quality = c.quality.estimator == "external"
    name, size = "labels" + (" and quality" if quality else ""), 8 * w * whole * (2 if quality else 1)
    out = [Collective(name, "all_gather", 1, size, behind="encoder forward")]
    # Micro-batches of one size are one line.
    for (longest, images), n in Counter((max(row), sum(row)) for row in case.parts).items():
        out += _of_micro_batch(case, longest, images, n)
    buckets = buckets_of(case.encoder.trained)
    size = case.encoder.trained / buckets
    out.append(Collective("encoder gradients (DDP)", "all_reduce", buckets, size, behind="encoder backward"))
    if c.encoder.precision == "fp16":
        out.append(Collective("overflow anywhere", "all_reduce", 1, 4))
    if c.optimizer.clip > 0:
        out.append(Collective("gradient norm", "all_reduce", 1, 4))
    if c.optimizer.name == "lamb" and case.source == "classifier":
        out.append(Collective("LAMB: norms of the shards", "all_reduce", 1, 8))
    return out


def _of_micro_batch(case: Case, longest: int, images: int, n: int) -> list[Collective]:
    """Of n micro-batches of so many images over all ranks, at most `longest` of them on one: rows travel padded to that."""
    c, w, d, b = case.config, case.world, case.size, 4 * case.views * images
    terms, apart = 2 if c.prototypes.empirical.enabled else 1, case.learns and c.head.backend == "triton"
    rows = 4 * w * longest * d
    if c.margin.criterion == "unified":
        statistics = [Collective("own cosines, and sums over the negatives", "all_reduce", n * terms, 3 * b)]
    elif c.margin.scale <= LARGEST_SCALE:
        statistics = [Collective("own cosines, and sums over the negatives", "all_reduce", n * terms, 4 * b)]
    else:
        names = "own cosines", "softmax: largest logit", "softmax: sum"
        statistics = [Collective(name, "all_reduce", n * terms, b) for name in names]
    out = [
        Collective("embeddings", "all_gather", n, case.views * rows),
        *statistics,
        Collective("gradients of embeddings", "reduce_scatter", n, case.views * rows, behind=ROWS if apart else ""),
    ]
    if case.key_encoder:
        out.append(Collective("embeddings of the averaged encoder", "all_gather", n, rows))
    if c.quality.estimator == "recognizability" and c.quality.unrecognizable.source != "low_norm":
        out.append(Collective("mean of the unrecognizable", "all_reduce", n, 4 * d))
    if case.source == "memory" and c.data.sampler.name == "mixed" and c.data.sampler.pick == "look_alike":
        out.append(Collective("look-alikes", "all_gather", n, 16 * w * images))
    if c.contrast.weight > 0:
        out.append(Collective("contrast: running margin", "all_reduce", n, 4))
    if c.encoder.sync_bn:
        channels = case.encoder.channels / max(1, case.encoder.norms)
        out.append(Collective("BatchNorm statistics", "all_gather", n * case.encoder.norms, 4 * w * (2 * channels + 1)))
        out.append(Collective("BatchNorm gradients", "all_reduce", n * case.encoder.norms, 4 * 2 * channels))
    return out


def buckets_of(size: float) -> int:
    """About how many buckets DDP makes of so many bytes; a weight larger than a bucket fills one alone."""
    return 1 + math.ceil(max(0.0, size - FIRST_BUCKET) / BUCKET)
