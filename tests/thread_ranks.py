"""Ranks as threads of one process, for long comparisons: the collectives meet at a barrier in memory and no rank waits for
another's socket, which on few cores is most of the time of four gloo ranks. What gloo itself does is tested with `run_ranks`.
"""

import threading
import traceback
from unittest import mock

import torch

from protomem import distributed
from protomem.head import blocked


class _World:
    def __init__(self, size: int):
        self.size, self.barrier, self.slots = size, threading.Barrier(size), [None] * size
        self.local = threading.local()
        self.turn = threading.Lock()  # one rank computes at a time: they would only fight for the interpreter

    def rank(self) -> int:
        return self.local.rank

    def exchange(self, value) -> list:
        """Every rank's value, in rank order, on every rank."""
        self.slots[self.rank()] = value.clone() if isinstance(value, torch.Tensor) else value
        self._wait()
        everybody = list(self.slots)
        self._wait()  # nobody writes before all have read
        return everybody

    def _wait(self):
        self.turn.release()
        try:
            self.barrier.wait()
        finally:
            self.turn.acquire()

    def all_reduce(self, tensor, op="sum"):
        parts = torch.stack(self.exchange(tensor))
        return tensor.copy_({"sum": torch.sum, "max": torch.amax, "min": torch.amin}[op](parts, 0))

    def all_gather(self, out, tensor, async_op=False):
        torch.cat(self.exchange(tensor), out=out)
        return _Done() if async_op else None

    def reduce_scatter(self, out, tensor, async_op=False):
        out.copy_(torch.stack(self.exchange(tensor)).sum(0).chunk(self.size)[self.rank()])
        return _Done() if async_op else None


class _Done:
    def wait(self):
        pass


class _PoolOfThread(threading.local):
    """Each rank its own buffers, as each process has."""

    def __init__(self):
        self.own = blocked._Pool()

    def take(self, *args):
        return self.own.take(*args)

    def give(self, *args):
        return self.own.give(*args)


def run_threads(size: int, fn, *args) -> list:
    """fn(*args) on `size` ranks; their results in rank order. Raises AssertionError with the first failed rank's traceback."""
    world, out, errors = _World(size), [None] * size, []

    def work(rank):
        world.local.rank = rank
        try:
            with world.turn:
                out[rank] = fn(*args)
        except threading.BrokenBarrierError:
            pass  # another rank failed
        except BaseException:
            errors.append(f"--- rank {rank} of {size}:\n{traceback.format_exc()}")
            world.barrier.abort()

    patches = dict(
        rank=world.rank,
        world_size=lambda: size,
        all_reduce=world.all_reduce,
        gather_objects=world.exchange,
        _all_gather_flat=world.all_gather,
        _reduce_scatter_flat=world.reduce_scatter,
    )
    with mock.patch.multiple(distributed, **patches), mock.patch.object(blocked, "_pool", _PoolOfThread()):
        threads = [threading.Thread(target=work, args=(r,)) for r in range(size)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    if errors:
        raise AssertionError(errors[0])
    return out
