"""Bytes of rank 0: what stays, what comes and goes in each phase of a step, and the most of both together.

Counted from the code of each part, and compared with measured allocations in tests/test_plan.py. Legend as elsewhere: B
images of all ranks (one micro-batch), b of this rank, V views, D feature size, C this rank's prototype rows, S of them in a
step, M memory slots.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from protomem.head.operands import has_units
from protomem.head.triton_head import PROCESSORS
from protomem.missed_steps import MOST
from protomem.plan.case import Case
from protomem.plan.hardware import CONTEXT_GB, FRAGMENTS, NCCL_GB

STATES = {"sgd": 1, "adamw": 2, "lamb": 2}  # moments that an optimizer keeps of each weight


@dataclass(frozen=True)
class Bytes:
    """stays: bytes by component. phases: what is there on top in each phase. Assumptions are `allowance` alone."""

    stays: dict[str, float]
    phases: dict[str, dict[str, float]]
    allowance: dict[str, float]

    @property
    def worst(self) -> str:
        """The phase in which most is there."""
        return max(self.phases, key=lambda name: sum(self.phases[name].values()))

    @property
    def counted(self) -> float:
        """The most bytes at any time, without the allowance."""
        return sum(self.stays.values()) + sum(self.phases[self.worst].values())

    @property
    def total(self) -> float:
        return self.counted + sum(self.allowance.values())


def moments(case: Case) -> int:
    """Numbers that the optimizer keeps of each weight."""
    o = case.config.optimizer
    return 0 if o.name == "sgd" and o.momentum == 0 else STATES[o.name]


def rank_bytes(case: Case) -> Bytes:
    stays = {**_encoder(case), **_prototypes(case), **_head_buffers(case)}
    images = 3 * case.config.data.size**2 * sum(row[0] for row in case.parts)
    ahead = 1 + (case.config.data.prefetch if case.device.kind == "cuda" and case.config.data.loader != "torch" else 0)
    stays["input images"] = images * ahead + 16 * case.config.train.batch_size
    phases, allowance = _phases(case), {}
    if case.device.kind == "cuda":
        allowance["CUDA context, cuDNN workspaces (assumed)"] = CONTEXT_GB * 1e9
        if case.world > 1:
            allowance["NCCL buffers (assumed)"] = NCCL_GB * 1e9
        most = max(sum(phase.values()) for phase in phases.values())
        allowance[f"gaps of the allocator ({FRAGMENTS:.0%}, assumed)"] = FRAGMENTS * most
    return Bytes({k: float(v) for k, v in stays.items() if v}, phases, allowance)


# --- what stays ----------------------------------------------------------------------------------------------------


def _encoder(case: Case) -> dict[str, float]:
    e = case.encoder
    return {
        "encoder weights": e.weights + e.buffers,
        "encoder gradients": 0 if _come_and_go(case) else e.trained,
        "encoder optimizer": moments(case) * e.trained,
        "averaged encoder (key_encoder)": (e.weights + e.buffers) if case.key_encoder else 0,
    }


def _come_and_go(case: Case) -> bool:
    """Whether the encoder's gradients do: DDP's buckets live on, and so do those of earlier micro-batches."""
    return case.world == 1 and len(case.parts) == 1


def _prototypes(case: Case) -> dict[str, float]:
    p, rows, row = case.config.prototypes, case.rows, case.row
    out = {}
    if case.source == "memory":
        width = 2 if p.memory.storage == "bf16" else 4
        out["memory rows"] = (rows + 1) * case.size * width
        out["memory bookkeeping (24 bytes a slot)"] = 3 * 8 * (case.slots + 1) + rows * case.world + 1
        out["map identity -> slot (4 bytes each)"] = 4 * (case.identities + 1)
        out["gradient of memory rows"] = rows * row if case.learns else 0
    else:
        out["classifier rows"] = rows * row
        o = case.config.optimizer
        counts = 8 * rows if case.source == "sampled" and (o.name == "adamw" or o.untouched == "exact") else 0
        counts += 32 * (MOST + 1) if o.untouched == "exact" else 0  # the table of missed steps
        out["optimizer of the rows"] = moments(case) * rows * row + counts
        if case.source == "sampled":
            out["active rows and their gradient"] = 2 * case.active * row + 8 * case.active
        else:
            out["gradient of the rows"] = 0 if o.fuse_prototypes else rows * row
    if p.injection.weight > 0:
        out["features to inject (VPL)"] = rows * (row + 8)
    if p.empirical.enabled:
        out["empirical rows (EPL)"] = rows * (4 * case.size + 1)
    return out


def _head_buffers(case: Case) -> dict[str, float]:
    if case.config.head.backend != "blocked":  # the triton head's come and go
        return {}
    one = 4 * case.views * case.batch * case.block
    kept, scratch = case.kept_bytes * case.kept_blocks, 2 * one
    if case.config.prototypes.empirical.enabled:  # a second term with blocks of its own, which may be of another size
        second = case.with_setting("prototypes.sub_centers=1") if case.centers > 1 else case
        one = 4 * case.views * case.batch * second.block
        kept += second.kept_bytes * second.kept_blocks
        scratch += 2 * one if second.block != case.block else 0
    return {
        "kept logits (head.store_mb)": kept,
        "scratch blocks of the head": scratch,
        "gradient of a block": 4 * case.block * case.size if case.config.optimizer.fuse_prototypes else 0,
    }


# --- what comes and goes -------------------------------------------------------------------------------------------


def _phases(case: Case) -> dict[str, dict[str, float]]:
    e, c = case.encoder, case.config
    checkpointing, alone = c.encoder.checkpointing, _come_and_go(case)
    kept = e.kept(case.local, checkpointing)
    features = 4 * case.views * case.batch * case.size  # [V B, D] in fp32
    more = {"key encoder's forward": e.inference_peak(case.local)} if case.key_encoder else {}
    head = {"activations": kept, **_gathered(case, features), "head: working set": _head_work(case, features)}
    backward = e.backward_peak(case.local, checkpointing, with_gradients=alone)
    phases = {
        "forward": {"activations": kept, **more},
        "head": head,
        "encoder backward": {
            "activations, map gradients" + (", weight gradients" if alone else ""): backward,
            "features": 2 * features,
        },
        "optimizer": {**({"encoder gradients": float(e.trained)} if alone else {}), **_optimizer_work(case)},
    }
    if case.source == "sampled":
        drawn = case.active * (case.row + 4 + 8 + 8 + 8) + 2 * 4 * (case.rows + 1)
        if c.optimizer.untouched == "exact":  # rows and momentum before and after
            drawn += 3 * case.active * case.row
        phases["drawing rows"] = {"rows, scores and their order": float(drawn)}
    return phases


def _gathered(case: Case, features: float) -> dict[str, float]:
    """The gathered embeddings and their copies that autograd keeps: raw, in one piece, normalised."""
    copies = (3 if case.world > 1 else 2) + 1
    copies += 6 if case.source == "memory" else 0  # sums, parts, prototypes, what stood there before
    return {"gathered embeddings and copies": copies * features}


def _head_work(case: Case, features: float) -> float:
    """The head's own, beside its buffers: what looks for the nearest own sub-centres, or the rest, which comes later."""
    return max(_block_work(case, features), case.centers * features if case.centers > 1 else 0.0)


def _block_work(case: Case, features: float) -> float:
    """Target rows and dX [V B, D], norms [C], and what a block needs."""
    rows, block, b = case.centers * case.active, case.block, case.views * case.batch
    work = 3 * features
    if case.config.head.backend == "dense":  # logits, masks and their gradients, the rows' unit form and its gradient
        logits, whole = 4 * b * rows, 4 * rows * case.size  # measured: autograd frees the ones before the others
        return work + max(5 * whole + logits / 2, 4.5 * logits + 2 * whole)
    work += 4 * rows  # inverse norms
    if case.tiles is not None:
        return work + _triton_work(case, b, rows)
    if case.centers > 1:  # logits of identities, which prototype each is; the gradient's way back
        work += 5 * b * block / case.centers + 5 * b * block
    if case.source == "memory" and case.config.prototypes.memory.storage == "bf16":
        work += 2 * 4 * block * case.size  # a block in fp32, twice for a moment
    if case.config.head.precision == "bf16":
        # Operands; where the device multiplies bf16, results that are copied into place; else rounded copies in fp32.
        operands = b * case.size + block * case.size + b * block
        if case.device.kind == "cuda":
            work += 2 * operands + 4 * b * block
        else:
            work += 2 * (operands + block * case.size) if has_units(torch.device("cpu")) else 6 * operands
    if case.config.margin.filter_above > 0:
        work += 4 * 4 * b * block
    if case.config.prototypes.injection.weight > 0:
        work += 3 * 4 * block * case.size  # rows, rows with their features, gradient of a block
    if case.config.prototypes.empirical.enabled and case.source == "sampled":
        work += case.active * (4 * case.size + 1)
    return work


def _triton_work(case: Case, b: int, rows: int) -> float:
    """What the triton head keeps, and the larger of its forward and backward, beside what all heads have."""
    c, d, block, again = case.config, case.size, case.block, case.kept_blocks < case.blocks
    half, tiles = c.head.precision == "bf16", case.tiles
    copied = half or c.prototypes.injection.weight > 0 or c.prototypes.memory.storage == "bf16"
    operand = (2 if half else 4) * block * d if copied else 0
    chunk = case.kept_bytes if again else 0
    programs = -(-b // tiles.m) * -(-d // tiles.d)
    splits = max(1, min(PROCESSORS // programs, case.tiles_of_a_block))
    statistics = 2 * 4 * case.tiles_of_a_block * b
    forward = chunk + operand + statistics + 4 * splits * b * d
    backward = 0
    if case.learns:
        backward = chunk + (operand + statistics if again else 0) + 4 * block * d + 12 * b + 8 * rows
        if c.optimizer.fuse_prototypes and c.optimizer.fused is False:
            backward += 4 * block * d
    return case.kept_bytes * case.kept_blocks + (2 * b * d if half else 0) + max(forward, backward)


def _optimizer_work(case: Case) -> dict[str, float]:
    o, row = case.config.optimizer, case.row
    out = {}
    if o.name == "lamb":
        out["LAMB's directions"] = max(2 * case.encoder.trained, 2 * case.rows * row if case.source != "memory" else 0)
    if case.source == "sampled":
        out["rows that are stepped"] = (5 if o.name == "adamw" else 3) * case.active * row
    return {k: float(v) for k, v in out.items()}


# --- a checkpoint --------------------------------------------------------------------------------------------------


def checkpoint_bytes(case: Case) -> dict[str, float]:
    """Of one checkpoint on disk, by component, over all ranks. What training.json and DCP's own headers take is not in it."""
    return _state_bytes(case, case.slots + case.config.quality.unrecognizable.pinned if case.source == "memory" else case.identities)


def _state_bytes(case: Case, one: int) -> dict[str, float]:
    """Of all that is state, with `one` slots or identities."""
    e, p, row = case.encoder, case.config.prototypes, case.row
    out = {
        "encoder": (e.weights + e.buffers) * (1 + case.key_encoder),
        "encoder optimizer": moments(case) * e.trained,
    }
    if case.source == "memory":
        out["memory rows"] = one * case.size * (2 if p.memory.storage == "bf16" else 4)
        out["memory bookkeeping (24 bytes a slot)"] = 24 * case.slots
    else:
        out["classifier rows"] = one * row
        o = case.config.optimizer
        counts = 8 * one if case.source == "sampled" and (o.name == "adamw" or o.untouched == "exact") else 0
        out["optimizer of the rows"] = moments(case) * one * row + counts
    if p.injection.weight > 0:
        out["features to inject (VPL)"] = one * (row + 8)
    if p.empirical.enabled:
        out["empirical rows (EPL)"] = one * (4 * case.size + 1)
    if case.config.data.sampler.name == "mixed":
        looks = 4 * case.identities if case.config.data.sampler.pick == "look_alike" else 0
        out["sampler"] = 24 * case.slots + looks
    return {name: float(size) for name, size in out.items() if size}


# --- the host ------------------------------------------------------------------------------------------------------


def host_bytes(case: Case) -> dict[str, float]:
    """Of each rank's process, by the sampler and by checkpoints; a library's own memory is not in it."""
    s = case.config.data.sampler
    out = {}
    if case.config.checkpoint.asynchronous:
        out["copy of the state for checkpoints (checkpoint.asynchronous)"] = sum(_state_bytes(case, case.rows).values())
    if case.images:
        out["labels of the records (8 bytes each)"] = 8.0 * case.images
    if s.name != "shuffled":
        out["where identities' images stand (24 bytes each)"] = 24.0 * case.identities
    if s.name == "mixed":
        out["map identity -> slot and bookkeeping"] = 4.0 * case.identities + 24.0 * case.slots
        if s.pick == "look_alike":
            out["look-alikes (4 bytes each)"] = 4.0 * case.identities
    return out
