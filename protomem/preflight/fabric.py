"""Measurements: each rank's matrix products, the collectives of a training step by size, and every link on its own.

All ranks measure at the same time, as in training. Times are medians, without the first calls; those by which a rank or a
link is called slow are the better of several, apart in time, so that a passing disturbance is not taken for a fault.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable

import torch
import torch.distributed as dist

from protomem import distributed
from protomem.preflight.ranks import Watch

# By kind of device (all our defaults).
GEMM = {"cuda": {"bf16": 8192, "fp32": 4096}, "cpu": {"bf16": 512, "fp32": 512}}  # n of [n, n] x [n, n]
SIZES = {"cuda": (1 << 12, 1 << 16, 1 << 20, 1 << 24, 1 << 28), "cpu": (1 << 12, 1 << 16, 1 << 20, 1 << 22)}  # bytes
LINK_BYTES = {"cuda": 1 << 26, "cpu": 1 << 20}
REPEATS = {"cuda": 20, "cpu": 7}
TRIES = 2  # apart in time, of which the best counts (our default)
ALL_PAIRS = 16  # ranks up to which every pair is measured; beyond, the neighbours in a ring

DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}
PASSES = {"all_gather": 1, "reduce_scatter": 1, "all_reduce": 2}


def median_seconds(act: Callable[[], None], device: torch.device) -> float:
    """Of one call, until its result is there."""

    def once() -> float:
        start = time.perf_counter()
        act()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        return time.perf_counter() - start

    for _ in range(2):
        once()
    return statistics.median(once() for _ in range(REPEATS[device.type]))


def gemm_rates(watch: Watch, device: torch.device) -> dict[str, float]:
    """{dtype: TFLOP/s} of this rank: 2 n^3 / seconds."""
    out: dict[str, float] = {}
    for name, n in TRIES * list(GEMM[device.type].items()):
        watch.at(f"matrix products in {name}")
        a, b = (torch.randn(n, n, device=device).to(DTYPES[name]) for _ in range(2))
        rate = 2 * n**3 / median_seconds(lambda: product(a, b), device) / 1e12
        out[name] = max(rate, out.get(name, 0.0))
    return out


def product(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    return a @ b


def collectives(watch: Watch, device: torch.device) -> list[dict]:
    """Each kind by size: seconds of the slowest rank, algorithm and bus bandwidth in bytes/s.

    size S: bytes of the gathered result, of the whole input of a reduce-scatter, of the buffer of an all-reduce.
    Algorithm bandwidth = S / t. Bus bandwidth = what a ring moves over each link: (W - 1) / W of that, an all-reduce twice.
    """
    world, out = watch.world, []
    for size in SIZES[device.type]:
        n = max(1, size // 4 // world)
        whole, part = torch.ones(n * world, device=device), torch.ones(n, device=device)
        acts = {
            "all_gather": lambda: distributed._all_gather_flat(whole, part),
            "reduce_scatter": lambda: distributed._reduce_scatter_flat(part, whole),
            "all_reduce": lambda: distributed.all_reduce(whole, "max"),
        }
        for kind, act in acts.items():
            watch.at(f"{kind} of {size} bytes")
            seconds = max(watch.gather(median_seconds(act, device)))
            rate = 4 * n * world / seconds
            bus = PASSES[kind] * (world - 1) / world * rate
            out.append({"kind": kind, "bytes": 4 * n * world, "seconds": seconds, "algorithm_rate": rate, "bus_rate": bus})
    return out


# --- links ---------------------------------------------------------------------------------------------------------


def rounds(hosts: list[str]) -> list[list[tuple[int, int]]]:
    """Pairs of ranks, in rounds in which a rank is in one pair at most. hosts[rank]: its host.

    Up to ALL_PAIRS ranks: every pair once; beyond, neighbours in a ring of the ranks. A round is either within hosts or
    between them, and one between them pairs all ranks of two hosts, so that links compete for a network card alike.
    """
    own: dict[str, list[int]] = {}
    for rank, name in enumerate(hosts):
        own.setdefault(name, []).append(rank)
    if len(hosts) > ALL_PAIRS:
        return _ring(hosts)
    within = [_tournament(ranks) for ranks in own.values()]
    out = [[pair for turns in within if k < len(turns) for pair in turns[k]] for k in range(max(map(len, within)))]
    most = max(map(len, own.values()))
    for turn in _tournament(list(own)):
        for shift in range(most):
            out.append([pair for a, b in turn for pair in _across(own[a], own[b], shift, most)])
    return [sorted(tuple(sorted(pair)) for pair in pairs) for pairs in out if pairs]


def _tournament(players: list) -> list[list[tuple]]:
    """Everybody meets everybody once: all but the first move on by one place from round to round."""
    seats = players + [None] * (len(players) % 2)
    out = []
    for _ in range(len(seats) - 1):
        pairs = zip(seats[: len(seats) // 2], reversed(seats))
        out.append([pair for pair in pairs if None not in pair])
        seats = [seats[0], seats[-1], *seats[1:-1]]
    return out


def _across(a: list[int], b: list[int], shift: int, n: int) -> list[tuple[int, int]]:
    """Round `shift` of the n >= len(a), len(b) rounds in which every a meets every b."""
    return [(a[i], b[j]) for i in range(len(a)) if (j := (i + shift) % n) < len(b)]


def _ring(hosts: list[str]) -> list[list[tuple[int, int]]]:
    world, out = len(hosts), []
    pairs = [(rank, (rank + 1) % world) for rank in range(world)]
    for colour in range(3):  # even, odd, and the last pair of an odd ring
        chosen = [p for k, p in enumerate(pairs) if (2 if k == world - 1 and world % 2 else k % 2) == colour]
        for same in (True, False):
            out.append([(min(p), max(p)) for p in chosen if (hosts[p[0]] == hosts[p[1]]) == same])
    return [turn for turn in out if turn]


def links(watch: Watch, device: torch.device, hosts: list[str]) -> list[dict]:
    """Of every pair in `rounds`: seconds of an exchange (both send LINK_BYTES at the same time), bytes/s in one direction."""
    size, own = LINK_BYTES[device.type], {}
    send = torch.ones(size // 4, device=device)
    receive = torch.empty_like(send)
    for k, pairs in enumerate(TRIES * rounds(hosts)):
        watch.at(f"links, round {k + 1}")
        distributed.barrier()
        for pair in pairs:
            if watch.rank in pair:
                peer = pair[0] if watch.rank == pair[1] else pair[1]
                seconds = median_seconds(lambda: exchange(peer, send, receive), device)
                own[pair] = min(seconds, own.get(pair, seconds))
    slower: dict[tuple[int, int], float] = {}
    for part in watch.gather(own):
        for pair, seconds in part.items():  # the two ends may differ a little
            slower[pair] = max(seconds, slower.get(pair, 0.0))
    return [{"ranks": list(pair), "seconds": t, "rate": size / t} for pair, t in sorted(slower.items())]


def exchange(peer: int, send: torch.Tensor, receive: torch.Tensor) -> None:
    ops = [dist.P2POp(dist.isend, send, peer), dist.P2POp(dist.irecv, receive, peer)]
    for work in dist.batch_isend_irecv(ops):
        work.wait()
