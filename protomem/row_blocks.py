"""Rows are stored in blocks of bounded size: a rank that loads reads the blocks that hold its rows, one after the other,
and never a whole shard of another rank, let alone the whole matrix, whatever world size wrote it."""

from __future__ import annotations

import dataclasses

import torch
from torch.distributed.checkpoint import DefaultSavePlanner
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, MetadataIndex, TensorProperties
from torch.distributed.checkpoint.planner import SavePlan, TensorWriteData, WriteItem, WriteItemType

from protomem import distributed

BLOCK_BYTES = 64 << 20  # our default: what a rank holds beside its own rows while it loads


class RowBlocks(DefaultSavePlanner):
    """Saves the named tensors as this rank's part of `total` rows (split as `distributed.shard_bounds` does), all others
    as they are. Plain tensors, no DTensors: staged copies on the CPU are saved alike, whatever device trains."""

    def __init__(self, named: set[str], total: int):
        super().__init__()
        self.named, self.total = named, total
        self.first, self.last = distributed.shard_bounds(total, distributed.rank(), distributed.world_size())

    def create_local_plan(self) -> SavePlan:
        plan = super().create_local_plan()
        items = [item for item in plan.items if item.index.fqn not in self.named]
        for name in sorted(self.named):
            items += self._blocks(name, self.state_dict[name])
        self.plan = dataclasses.replace(plan, items=items)
        return self.plan

    def _blocks(self, name: str, rows: torch.Tensor) -> list[WriteItem]:
        if len(rows) != self.last - self.first:
            raise ValueError(f"{name} has {len(rows)} rows here, not rows {self.first} to {self.last} of {self.total}")
        size, properties = torch.Size([self.total, *rows.shape[1:]]), TensorProperties.create_from_tensor(rows)
        items = []
        for start in range(0, len(rows), _block_rows(rows)):
            shape = rows[start : start + _block_rows(rows)].shape
            offset = torch.Size([self.first + start] + [0] * (rows.ndim - 1))
            data = TensorWriteData(ChunkStorageMetadata(offset, shape), properties, size)
            items.append(WriteItem(MetadataIndex(name, offset), WriteItemType.SHARD, tensor_data=data))
        return items

    def lookup_object(self, index: MetadataIndex) -> torch.Tensor:
        found = self.state_dict[index.fqn]
        if index.fqn not in self.named:
            return found
        start = index.offset[0] - self.first
        return found[start : start + _block_rows(found)]


def _block_rows(rows: torch.Tensor) -> int:
    return max(1, BLOCK_BYTES // max(1, rows[:1].nbytes))
