"""A prototype memory in a checkpoint: what is saved, and how it is taken over at another world size or memory size.

Saved are this rank's rows (as `prototypes.rows`, in the order of the ranks) and the replicated bookkeeping. Slot s stood
in row s div W of rank s mod W then and stands in row t div W' of rank t mod W' now, where t = s unless the size changed.
No rank ever holds more than its share of the rows.

Legend: M slots, R rows of a rank, W world size; primed: now.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from protomem import distributed

SLOTS = ("label", "seq", "written")  # arrays [M + 1] of Slots, saved without their spare place
COUNTS = ("cursor", "clock", "time")
QUALITY = ("ui", "norm_mean", "norm_std")
BANK = ("features", "seen")  # of a FeatureBank, in the order of the rows; they move with their slots


def saved(memory) -> dict[str, torch.Tensor]:
    """Every tensor of a PrototypeMemory's state by its name in a checkpoint."""
    out = {"prototypes.rows": memory.rows, "memory.filled": memory.filled[:-1]}
    if memory.bank is not None:
        out |= {f"prototypes.bank.{k}": getattr(memory.bank, k) for k in BANK}
    out |= {f"memory.{k}": getattr(memory.slots, k)[:-1] for k in SLOTS}
    out |= {f"memory.{k}": getattr(memory.slots, k) for k in COUNTS}
    return out | {f"memory.quality.{k}": getattr(memory.quality, k) for k in QUALITY}


def blank(memory, sizes: dict[str, list[int]]) -> tuple[dict[str, torch.Tensor], int]:
    """(room for the tensors of a checkpoint whose sizes these are, the number of its rows over all ranks)."""
    total = sizes["prototypes.rows"][0]
    first, last = distributed.shard_bounds(total, distributed.rank(), distributed.world_size())
    out = {}
    for name, value in saved(memory).items():
        if name.startswith("prototypes."):
            out[name] = value.new_zeros(last - first, *value.shape[1:])
        else:
            fixed = value.ndim == 0 or name.startswith("memory.quality.")
            out[name] = value.new_zeros(value.shape if fixed else sizes[name])
    return out, total


def restore(memory, state: dict[str, torch.Tensor], old_world: int) -> None:
    """Take over a loaded state that a memory of `old_world` ranks saved. Collective."""
    label, rows, filled = state["memory.label"], state["prototypes.rows"], state["memory.filled"]
    to = memory.slots.adopt(*(state[f"memory.{k}"] for k in SLOTS + COUNTS))
    for key in QUALITY:
        getattr(memory.quality, key).copy_(state[f"memory.quality.{key}"])
    # What stands behind the last slot: the pinned row, if both memories have it, and padding.
    tail = to.new_full((len(filled) - len(label),), -1)
    if memory.pinned and len(tail):
        tail[0] = memory.size
    to = torch.cat([to, tail])
    memory.filled.zero_()
    memory.filled[torch.where(to >= 0, to, len(memory.filled) - 1)] = filled
    memory.filled[-1] = False
    # Row g of the checkpoint is row g mod R of rank g div R.
    per_rank, total = len(filled) // old_world, len(filled)
    first, _ = distributed.shard_bounds(total, memory.rank, memory.world)
    place = torch.arange(first, first + len(rows), device=rows.device)
    slot = to[(place % per_rank) * old_world + place // per_rank]
    owner = torch.where(slot >= 0, slot % memory.world, -1)
    memory.store.zero_()
    arrived = distributed.exchange_rows(rows, owner)
    if memory.store.dtype != torch.bfloat16:  # what was saved in bf16 is up to 0.4 % off the sphere
        arrived = torch.where((arrived.norm(dim=1, keepdim=True) - 1).abs() > 1e-5, F.normalize(arrived, dim=1), arrived)
    place = distributed.exchange_rows(slot // memory.world, owner)
    memory.store[place] = arrived
    if memory.bank is not None:
        memory.bank.features.zero_()
        memory.bank.seen.fill_(-1)
        for key in BANK:
            getattr(memory.bank, key)[place] = distributed.exchange_rows(state[f"prototypes.bank.{key}"], owner)
