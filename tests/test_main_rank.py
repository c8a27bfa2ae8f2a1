"""What rank 0 reads or makes for all ranks, however long it takes."""

import datetime
import time

import torch
import torch.distributed as dist

from protomem import distributed, state, trainer
from protomem.errors import UserError
from tests.ranks import run_ranks
from tests.test_kill_points import runs  # noqa: F401  the fixture


def context():
    rank = distributed.rank()
    return distributed.Context(rank, distributed.world_size(), rank, torch.device("cpu"), "torchrun")


def test_the_best_so_far_is_what_rank_0_reads(runs):  # noqa: F811
    """A shared file system may show another rank an older file: it would save, or not, alone."""
    settings = runs.settings("shared-best")
    folder = runs.folder / "shared-best" / "checkpoints"
    folder.mkdir(parents=True)
    best = {"step": 2, "set": "lfw", "accuracy": 0.75}
    state.mark_best(folder, folder / "step-00000002", best)

    def work():
        if distributed.rank() > 0:
            state.best_so_far = lambda folder: None
        return trainer.Run(settings, context()).best

    assert run_ranks(2, work) == [best, best]
    (folder / "best.json").write_text("{")

    def refused():
        try:
            work()
        except BaseException as error:
            return type(error), str(error)

    first, second = run_ranks(2, refused)
    assert first[0] is UserError and "best.json cannot be read; delete it" in first[1]
    assert second == (SystemExit, "2")  # the line is said once


def test_an_index_may_take_longer_than_a_collective(runs, tmp_path):  # noqa: F811
    """Rank 0 opens a new set first, for longer than the time-out; the others open what is there by then."""
    settings, indexed = runs.settings("slow-index"), tmp_path / "indexed"
    inner = trainer.open_records

    def slowly(*given, **more):
        if not indexed.exists():
            assert distributed.rank() == 0
            time.sleep(1.5)
            indexed.touch()
        return inner(*given, **more)

    def work():
        trainer.open_records = slowly
        distributed.barrier()
        dist.distributed_c10d._set_pg_timeout(datetime.timedelta(seconds=1), dist.group.WORLD)
        return len(trainer.Run(settings, context()).records)

    assert run_ranks(2, work) == [32, 32]
