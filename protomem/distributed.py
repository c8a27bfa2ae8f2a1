"""Ranks, shards and collectives: how the ranks meet, which rows each owns, and gathers whose gradients are exact.

Ownership is always by *global* rank; the local rank chooses the device and nothing else.
Legend: B global batch, b local batch (rows of this rank), D feature size, W world size.
"""

from __future__ import annotations

import contextlib
import datetime
import itertools
import os
import threading
import time
from dataclasses import dataclass
from typing import Callable

import torch
import torch.distributed as dist

from protomem import flight, slurm
from protomem.errors import UserError
from protomem.launcher import choose_device, detect_launcher, ranks_here


@dataclass(frozen=True)
class Context:
    """This process: global rank, world size, local rank, device, and who launched it (torchrun, slurm, single)."""

    rank: int
    world_size: int
    local_rank: int
    device: torch.device
    launcher: str

    @property
    def is_main(self) -> bool:
        return self.rank == 0


def init(
    device: str = "auto", timeout_s: float = 600.0, meet: Callable[[int, int], dist.Store] | None = None
) -> Context:
    """Join the process group if a launcher started several ranks (nccl on GPUs, gloo on CPUs); call once, first.

    meet(rank, world size): makes the store at which the ranks meet; None: torch does.
    Started by plain `srun`, the ranks find each other by Slurm's variables where MASTER_ADDR and MASTER_PORT are not set.
    Raises UserError for an impossible device, and if the ranks cannot find or reach each other.
    """
    launcher, rank, world, local = detect_launcher()
    chosen = choose_device(device, local, ranks_here(launcher))
    if chosen.type == "cuda":
        torch.cuda.set_device(chosen)
    if world > 1 and not dist.is_initialized():
        if launcher == "slurm":
            os.environ.update(slurm.rendezvous(os.environ))
        missing = [k for k in ("MASTER_ADDR", "MASTER_PORT") if k not in os.environ]
        if missing:
            raise UserError(f"RANK and WORLD_SIZE={world} are set, {' and '.join(missing)} is not; set it, or use torchrun")
        try:
            dist.init_process_group(
                "nccl" if chosen.type == "cuda" else "gloo",
                rank=rank,
                world_size=world,
                store=meet(rank, world) if meet else None,
                timeout=datetime.timedelta(seconds=timeout_s),
                device_id=chosen if chosen.type == "cuda" else None,
            )
        except dist.DistNetworkError as error:
            where = f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}"
            raise UserError(
                f"rank {rank} of {world} cannot meet the others at {where} ({str(error).splitlines()[0]}); if that port is "
                "taken, export another MASTER_PORT"
            ) from None
    return Context(rank, world, local, chosen, launcher)


def shutdown() -> None:
    if dist.is_initialized():
        dist.destroy_process_group()


def new_cpu_group(timeout_s: float):
    """A gloo process group of all ranks for the collectives of another thread; None in a single process. Collective."""
    if world_size() == 1:
        return None
    interface = os.environ.get("NCCL_SOCKET_IFNAME", "").removeprefix("=")
    if interface and not set(interface) & set("^,:"):  # gloo would take the address of the host's name, which may be 127.0.1.1
        os.environ.setdefault("GLOO_SOCKET_IFNAME", interface)
    return dist.new_group(backend="gloo", timeout=datetime.timedelta(seconds=timeout_s))


_thread = threading.local()


@contextlib.contextmanager
def alone():
    """Inside, this thread computes as a single process would: it communicates with nobody. (Not so a backward on a GPU, which
    has a thread of its own; what a head `put_off` there is done when it ends.)"""
    _thread.alone = True
    try:
        yield
    finally:
        _thread.alone = False


def _in_group() -> bool:
    return dist.is_initialized() and not getattr(_thread, "alone", False)


def rank() -> int:
    return dist.get_rank() if _in_group() else 0


def world_size() -> int:
    return dist.get_world_size() if _in_group() else 1


def store() -> dist.Store:
    """The small key-value store at which the ranks met; one of its own for a single process."""
    return dist.distributed_c10d._get_default_store() if world_size() > 1 else dist.HashStore()


def barrier() -> None:
    if world_size() > 1:
        with flight.collective("barrier"):
            dist.barrier()


_turns = itertools.count()


def main_first(act: Callable[[], None]) -> None:
    """Do something on rank 0 while the others wait. If it fails, all ranks end; rank 0 says why."""
    problem = None
    if rank() == 0:
        try:
            act()
        except UserError as error:
            problem = str(error)
    if world_size() > 1:  # it may take hours (the index of a large set), and a collective may not
        key = f"main_first/{next(_turns)}"
        with flight.collective("waiting for rank 0"):
            if rank() == 0:
                store().set(key, "")
            pause = 0.02
            while not store().check([key]):
                time.sleep(pause)
                pause = min(1.0, 1.2 * pause)  # a thousand ranks ask the same store
    if broadcast_object(problem) is not None:
        raise UserError(problem) if rank() == 0 else SystemExit(2)


# --- who owns what -------------------------------------------------------------------------------------------------


def shard_bounds(n: int, rank: int, world: int) -> tuple[int, int]:
    """Rows [start, stop) of `rank` when n learned rows are split as torch.chunk splits them: ceil(n/W) each, the last
    ranks short or empty. DTensor checkpoints reshard rightly only with this split."""
    size = -(-n // world)
    return min(rank * size, n), min((rank + 1) * size, n)


def batch_bounds(n: int, rank: int, world: int, together: int = 1) -> tuple[int, int]:
    """Rows [start, stop) of `rank` of a global batch of n: as even as can be, the first ranks get one more.

    together: so many neighbouring rows stay on one rank; n must be a multiple (ValueError), and the units are shared out.
    """
    units, odd = divmod(n, together)
    if odd:
        raise ValueError(f"{n} rows are not a multiple of {together}")
    size, rest = divmod(units, world)
    start = rank * size + min(rank, rest)
    return start * together, (start + size + (rank < rest)) * together


# --- collectives ---------------------------------------------------------------------------------------------------
# torch 2.13 renamed the flat collectives; before it has only the old names.
_all_gather_flat = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
_reduce_scatter_flat = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor


def all_reduce(tensor: torch.Tensor, op: str = "sum") -> torch.Tensor:
    """In-place all-reduce without gradient (sum, max or min); returns the tensor. A no-op in a single process."""
    if world_size() > 1:
        with flight.collective("all_reduce", tensor):
            dist.all_reduce(tensor, {"sum": dist.ReduceOp.SUM, "max": dist.ReduceOp.MAX, "min": dist.ReduceOp.MIN}[op])
    return tensor


def _pad_rows(x: torch.Tensor, rows: int) -> torch.Tensor:
    if x.shape[0] == rows:
        return x.contiguous()
    return torch.cat([x, x.new_zeros(rows - x.shape[0], *x.shape[1:])])


def start_gather(x: torch.Tensor, sizes: list[int], overlap: bool = True) -> Callable[[], torch.Tensor]:
    """`gather_rows` in two halves: sends, and returns a function that waits for the rows and gives them. What is computed in
    between overlaps with their way, unless overlap is False."""
    if world_size() == 1:
        return lambda: x
    longest = max(sizes)
    out, own = x.new_empty(longest * len(sizes), *x.shape[1:]), _pad_rows(x, longest)
    noted = flight.collective("all_gather", out)
    work = _all_gather_flat(out, own, async_op=overlap)

    def finish() -> torch.Tensor:
        with noted:
            if work is not None:
                work.wait()  # on a GPU its stream waits, not the host
        if min(sizes) == longest:
            return out
        return torch.cat([part[:size] for part, size in zip(out.split(longest), sizes)])

    return finish


def gather_rows(x: torch.Tensor, sizes: list[int]) -> torch.Tensor:
    """[b, ...] on each rank -> [B, ...] on all, in rank order, without gradient. `sizes[r]` = rows of rank r.

    Ranks may hold different numbers of rows (also none): rows travel padded to the longest.
    """
    return start_gather(x, sizes, overlap=False)()


_put_off: list[Callable[[], None]] = []


def put_off(act: Callable[[], None]) -> None:
    """From inside a backward pass: do `act`, which must not communicate, while the gradients of the gathered rows travel, and
    at the latest when the pass ends. In a single process nothing travels, and it is done at once."""
    if world_size() == 1:
        return act()
    _put_off.append(act)
    torch.autograd.Variable._execution_engine.queue_callback(_catch_up)  # for a pass that comes to no gather


def _catch_up() -> None:
    acts, _put_off[:] = _put_off[:], []  # what fails is not tried again in another pass
    for act in acts:
        act()


class _GatherWithGrad(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, sizes):
        ctx.sizes = sizes
        return gather_rows(x, sizes)

    @staticmethod
    def backward(ctx, grad):
        sizes, longest = ctx.sizes, max(ctx.sizes)
        padded = grad if min(sizes) == longest else torch.cat([_pad_rows(p, longest) for p in grad.split(sizes)])
        out = grad.new_empty(longest, *grad.shape[1:])
        with flight.collective("reduce_scatter", padded):
            work = _reduce_scatter_flat(out, padded.contiguous(), async_op=True)
            _catch_up()
            work.wait()
        # The one factor W of the whole project: the loss is the mean over the global batch and DDP averages encoder
        # gradients over ranks, so the sum that arrives here is multiplied by W to survive that mean.
        return out[: sizes[rank()]] * len(sizes), None


def gather_with_grad(x: torch.Tensor, sizes: list[int]) -> torch.Tensor:
    """Differentiable `gather_rows`. Backward: reduce-scatter SUM, times W (see DESIGN: gradient scale), and meanwhile what was
    `put_off`."""
    if world_size() == 1:
        return x
    return _GatherWithGrad.apply(x, sizes)


class _Replicated(torch.autograd.Function):
    @staticmethod
    def forward(ctx, local, gathered, sizes):
        ctx.sizes = sizes
        return gathered.clone()

    @staticmethod
    def backward(ctx, grad):
        return grad.split(ctx.sizes)[rank()] * len(ctx.sizes), None, None


def replicated(local: torch.Tensor, gathered: torch.Tensor, sizes: list[int]) -> torch.Tensor:
    """`gathered` [B, ...] (equal on all ranks, without graph) with the graph of this rank's own rows `local` [b, ...].

    For what every rank computes from it alike, such as a margin from a norm: each rank then has the whole gradient, so its
    own rows' part is taken, and nothing is summed. Times W, as everywhere (see `_GatherWithGrad`).
    """
    if world_size() == 1:
        return local
    return _Replicated.apply(local, gathered, sizes)


class _LocalRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x.view_as(x)

    @staticmethod
    def backward(ctx, grad):
        return grad * world_size()


def local_rows(x: torch.Tensor) -> torch.Tensor:
    """`x` for a term that each rank computes from its own rows: sum over own rows / B. Its gradient is multiplied by W, so
    that DDP's mean leaves the gradient of the sum over all ranks (see `_GatherWithGrad`)."""
    return x if world_size() == 1 else _LocalRows.apply(x)


def exchange_rows(rows: torch.Tensor, owner: torch.Tensor) -> torch.Tensor:
    """Send each of this rank's rows [n, ...] to the rank `owner` [n] names (-1: nobody); returns what arrives, in the
    order of the senders. Collective; for loading and saving, not for steps."""
    order = owner.argsort(stable=True)
    order = order[owner[order] >= 0]
    if world_size() == 1:
        return rows[order]
    counts = torch.bincount(owner[order], minlength=world_size())
    arriving = torch.empty_like(counts)
    with flight.collective("all_to_all", counts):
        dist.all_to_all_single(arriving, counts)
    out = rows.new_empty(int(arriving.sum()), *rows.shape[1:])
    with flight.collective("all_to_all"):  # of another size on each rank
        dist.all_to_all_single(out, rows[order].contiguous(), arriving.tolist(), counts.tolist())
    return out


def gather_objects(value, group=None) -> list:
    """One small picklable value per rank -> the list of all, on every rank (for messages and statistics, not steps).
    group: a process group of all ranks, None: the default one."""
    if world_size() == 1:
        return [value]
    out = [None] * world_size()
    with flight.collective("all_gather of objects") if group is None else contextlib.nullcontext():  # group: a thread's own
        dist.all_gather_object(out, value, group)
    return out


def broadcast_object(value):
    """Rank 0's small picklable value, on every rank."""
    if world_size() == 1:
        return value
    box = [value]
    with flight.collective("broadcast of an object"):
        dist.broadcast_object_list(box, src=0)
    return box[0]
