"""FLOPs, floors and estimates of the phases of a step.

A floor is what the arithmetic and the bytes that must move take at the device's rates, with nothing lost. An estimate, not
measured, is the floor divided by an assumed efficiency, and what the host needs to launch the head's many small kernels.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

from protomem.plan.case import Case
from protomem.plan.collectives import ROWS, collectives
from protomem.plan.hardware import ENCODER_EFFICIENCY, GEMM_EFFICIENCY, LAUNCH_US, OVERLAP
from protomem.plan.memory import moments

# Kernels of the blocked head for one block of rows, forward and backward, and its reads and writes of that block's logits
# (protomem/head/blocked.py; tests/test_plan.py counts the operations).
BLOCK_KERNELS = {"fp32": 38, "bf16": 44}
CENTER_KERNELS = 19, 6  # more with sub-centres, and for each after the first
BLOCK_PASSES = 24
TRITON_PASSES = 4  # over exponentials: written, and read by two products, one of them a part of D at a time (an assumption)


@dataclass(frozen=True)
class Phase:
    """FLOPs, bytes moved, and seconds of one rank in one step."""

    name: str
    flops: float
    moved: float
    floor: float
    estimate: float


def phases(case: Case) -> list[Phase]:
    return [*_encoder(case), _head(case), _optimizers(case)]


def _encoder(case: Case) -> list[Phase]:
    d, c, images = case.device, case.config, sum(row[0] for row in case.parts)
    half = {True: d.half, False: d.tf32}

    def seconds(op, factor: float) -> float:
        rate = half[op.half] if op.half or op.name == "conv2d" else d.full  # torch runs fp32 convolutions as TF32, GEMMs not
        return max(factor * op.flops / (rate * 1e12), factor * op.moved / (d.bandwidth * 1e12))

    def phase(name: str, factor: float, ops) -> Phase:
        floor = images * sum(seconds(op, factor) for op in ops)
        flops, moved = (images * factor * sum(getattr(op, key) for op in ops) for key in ("flops", "moved"))
        return Phase(name, flops, moved, floor, floor / ENCODER_EFFICIENCY)

    ops = case.encoder.ops
    out = [phase("encoder forward", 1, ops), phase("encoder backward", 2, ops)]
    if c.encoder.checkpointing:
        out.append(phase("encoder forward again (checkpointing)", 1, [op for op in ops if op.block is not None]))
    if case.key_encoder:
        out.append(phase("averaged encoder's forward", 1, ops))
    return out


def _head(case: Case) -> Phase:
    """GEMMs: logits, dX, and dW where rows learn; logits that were not kept once more. The rows are read once for each."""
    d, c = case.device, case.config
    k, b, rows, size, n = case.centers, case.views * case.batch, case.centers * case.active, case.size, len(case.parts)
    rate = d.half if c.head.precision == "bf16" else d.full
    one = 2.0 * b * rows * size * n
    blocks = case.blocks
    done = c.head.backend == "dense" or (case.tiles is not None and not case.learns)  # triton's dX is complete in the forward
    again = 0.0 if done else 1 - case.kept_blocks / max(1, blocks)
    gemms, terms = 2 + case.learns, 1
    if c.prototypes.empirical.enabled:  # a second term, whose rows are constants, one for each identity
        terms += 1 / k
        gemms, again, blocks = gemms + 2 / k, terms * again, terms * blocks
    moved = 4.0 * rows * size * gemms * n
    floor = max(one * gemms / (rate * 1e12), moved / (d.bandwidth * 1e12))
    passes = BLOCK_PASSES * 4.0 * b * rows * n * terms
    if case.tiles is not None:
        passes = TRITON_PASSES * float(case.kept_bytes) * blocks * n
    work = one * (gemms + again) / (rate * 1e12 * GEMM_EFFICIENCY) + passes / (d.bandwidth * 1e12)
    each = BLOCK_KERNELS[c.head.precision] + (CENTER_KERNELS[0] + CENTER_KERNELS[1] * (k - 1) if k > 1 else 0)
    kernels = blocks * each * n if c.head.backend == "blocked" else 0
    launches = kernels * LAUNCH_US * 1e-6 if d.kind == "cuda" else 0.0
    return Phase(f"head ({gemms:.3g} GEMMs)", one * gemms, moved, floor, max(work, launches))


def _optimizers(case: Case) -> Phase:
    """Reads of weight, gradient and moments, writes of weight and moments."""
    d, passes = case.device, 3 + 2 * moments(case)
    moved = passes * case.encoder.trained
    if case.key_encoder:
        moved += 3 * case.encoder.weights
    if case.source != "memory":
        o, spared = case.config.optimizer, 0
        if o.fuse_prototypes:  # the gradient comes from the head's cache; where one kernel does both, the weight is there, too
            spared = 2 if case.config.head.backend == "triton" and o.fused is not False else 1
        moved += (passes - spared) * float(case.active * case.row)
    elif case.learns:
        moved += 5 * 4.0 * case.active * case.size  # step, norm, division
    floor = moved / (d.bandwidth * 1e12)
    return Phase("optimizers", 0.0, moved, floor, floor / GEMM_EFFICIENCY)


@dataclass(frozen=True)
class Step:
    """Seconds of a step: floor (nothing lost, all communication hidden), estimate, and of that what collectives add."""

    floor: float
    estimate: float
    exposed: float
    images_per_s: float


def step(case: Case) -> Step:
    found, head, spent = phases(case), _head(case), Counter()
    for c in collectives(case):
        spent[c.behind] += c.seconds(case)
    # The prototypes' gradient is one of the head's GEMMs.
    room = {p.name: p.estimate for p in found} | {ROWS: head.estimate / 3}
    exposed = sum(max(0.0, seconds - OVERLAP * room.get(behind, 0.0)) for behind, seconds in spent.items())
    total = sum(p.estimate for p in found) + exposed
    return Step(sum(p.floor for p in found), total, exposed, case.config.train.batch_size / total)
