"""Rows are stored in blocks: whatever world size wrote a checkpoint, a rank that loads reads its own rows and little else."""

import pytest
import torch

from protomem import distributed, row_blocks, state
from protomem.prototypes.classifier import ClassifierShard
from tests.ranks import run_ranks

IDENTITIES, SIZE, BLOCK = 1001, 16, 4096  # 64 rows a block
ROWS = torch.arange(IDENTITIES * SIZE, dtype=torch.float32).view(IDENTITIES, SIZE)


def parts():
    shard = ClassifierShard(IDENTITIES, SIZE)
    optimizers = {"prototypes": torch.optim.SGD(shard.parameters(), lr=0.1, momentum=0.9)}
    return {"encoder": torch.nn.Linear(3, 3), "prototypes": shard}, optimizers


def write(folder):
    row_blocks.BLOCK_BYTES = BLOCK
    modules, optimizers = parts()
    shard = modules["prototypes"]
    shard.weight.data.copy_(ROWS[shard.first : shard.last])
    optimizers["prototypes"].state[shard.weight]["momentum_buffer"] = -ROWS[shard.first : shard.last]
    state.save(folder, 1, state.named_state(modules, optimizers), IDENTITIES, {}, keep=1)


def read(folder):
    """(bytes of own rows, bytes of all tensors read, bytes of the largest one), and the rows are right."""
    modules, optimizers = parts()
    shard, inner, sizes = modules["prototypes"], torch.load, []

    def load(*given, **more):
        out = inner(*given, **more)
        sizes.append(out.untyped_storage().nbytes())
        return out

    torch.load = load
    try:
        state.load(state.newest(folder), modules, optimizers)
    finally:
        torch.load = inner
    momentum = optimizers["prototypes"].state[shard.weight]["momentum_buffer"]
    assert torch.equal(shard.weight, ROWS[shard.first : shard.last])
    assert torch.equal(momentum, -ROWS[shard.first : shard.last])
    return 2 * shard.weight.nbytes, sum(sizes), max(sizes, default=0)


@pytest.mark.parametrize("wrote", [1, 2, 5])
@pytest.mark.parametrize("world", [1, 3])
def test_no_rank_reads_more_than_its_rows_and_two_blocks_of_each_tensor(wrote, world, tmp_path):
    run_ranks(wrote, write, tmp_path)
    for own, total, largest in run_ranks(world, read, tmp_path):
        assert largest <= BLOCK
        assert own <= total <= own + 2 * 2 * BLOCK + 1000  # and the encoder's few


def test_ranks_without_rows(tmp_path):
    """3 rows on 4 ranks, read by 2."""
    rows = torch.arange(6.0).view(3, 2)

    def tensors():
        first, last = distributed.shard_bounds(3, distributed.rank(), distributed.world_size())
        return {"encoder.x": torch.ones(2), "prototypes.w": rows[first:last].clone()}

    def load():
        found, (info, metadata) = {k: v * 0 for k, v in tensors().items()}, state._read(state.newest(tmp_path), False)
        state._load(state._wrap(found, 3), state.newest(tmp_path), info, metadata, False)
        return all(torch.equal(found[k], v) for k, v in tensors().items())

    run_ranks(4, lambda: state.save(tmp_path, 1, tensors(), 3, {}, keep=1))
    assert run_ranks(2, load) == [True, True]
