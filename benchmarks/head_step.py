"""CPU time and memory of one head step (forward, backward, SGD) over ranks: `blocked` against the plain eager form.

Variants of `blocked`: bf16 operands; `fused`, the update inside the backward (optimizer.fuse_prototypes); `r=0.1`, a sampled
shard with row-sparse SGD, `exact` with the missed steps of rows that were not drawn made up for (optimizer.untouched); `k=3`,
as many rows, three of each identity (prototypes.sub_centers).

    python benchmarks/head_step.py --out benchmarks/results            # the shapes of the README
    python benchmarks/head_step.py --ranks 2 --identities 100000 --size 512 --batch 64 --repeats 7

Eager is what one writes first: a normalised copy of the prototypes, fp32 logits in memory, autograd, torch.optim.SGD.
Variants run in turn, repeat by repeat, in the same processes; CPU time is summed over ranks (user + system time).
`peak_extra_mb` is rank 0's: the most resident memory in three steps from the first on, above what there was when only the
rows existed. So it holds the momentum, gradients and all that the head keeps. `extra_over_shard`: in multiples of the rows.
"""

from __future__ import annotations

import argparse
import functools
import json
import os
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
import torch.distributed as dist
import torch.nn.functional as F

from benchmarks.common import cpu_seconds, spread, start_ranks, write_csv
from protomem import distributed
from protomem.block_update import BlockUpdate
from protomem.head import HEADS
from protomem.head import blocked as head_blocked
from protomem.objective.margins import build_margin
from protomem.optim import RowSGD
from protomem.prototypes.classifier import ClassifierShard
from protomem.prototypes.sampled import SampledShard
from protomem.step import losses

SCALE, MARGIN = 64.0, 0.4


class _EagerCrossEntropy(torch.autograd.Function):
    """Softmax cross-entropy over sharded, materialised logits [B, C]; the probabilities are kept for the backward."""

    @staticmethod
    def forward(ctx, logits, target):
        top = distributed.all_reduce(logits.amax(1, keepdim=True), "max")
        exps = (logits - top).exp()
        probabilities = exps / distributed.all_reduce(exps.sum(1, keepdim=True), "sum")
        row = (target >= 0).nonzero().squeeze(1)
        own = logits.new_zeros(len(logits), 1)
        own[row] = probabilities[row, target[row], None]
        ctx.save_for_backward(probabilities, row, target)
        return -distributed.all_reduce(own, "sum").clamp_min(1e-30).log().mean()

    @staticmethod
    def backward(ctx, grad):
        probabilities, row, target = ctx.saved_tensors
        probabilities[row, target[row]] -= 1
        return probabilities * (grad / len(probabilities)), None


SGD = {"lr": 0.01, "momentum": 0.9, "weight_decay": 5e-4}


def eager(identities, size):
    shard = ClassifierShard(identities, size)
    optimizer = torch.optim.SGD([shard.weight], **SGD)

    def step(x, labels, sizes, number):
        optimizer.zero_grad()
        X = F.normalize(distributed.gather_with_grad(x, sizes))
        target = torch.where((labels >= shard.first) & (labels < shard.last), labels - shard.first, -1)
        cos = X @ F.normalize(shard.weight).t()
        row = (target >= 0).nonzero().squeeze(1)
        margin = torch.zeros_like(cos)
        margin[row, target[row]] = MARGIN
        _EagerCrossEntropy.apply(SCALE * (cos - margin), target).backward()
        optimizer.step()

    return step


def blocked(precision="fp32", fuse=False, rate=None, untouched="lazy", centers=1):
    def make(rows, size):
        given = {"num_identities": rows // centers, "embedding_size": size, "sub_centers": centers}
        shard = SampledShard(rate=rate, **given) if rate else ClassifierShard(**given)
        head, margin = functools.partial(HEADS["blocked"], precision=precision), build_margin("cosface", scale=SCALE, m=MARGIN)

        @functools.cache
        def optimizer():  # made in the first step: momentum that is there from the start counts as memory of the step, too
            if rate:
                rows = RowSGD([shard.weight], untouched=untouched, **SGD)
                shard.before_use = rows.catch_up if untouched == "exact" else None
                return rows
            dense = torch.optim.SGD([shard.weight], fused=True, **SGD)
            shard.sink.update = BlockUpdate(dense, shard.weight) if fuse else None
            return dense

        def step(x, labels, sizes, number):
            labels = labels % shard.num_identities
            optimizer()
            shard.begin_step(labels, number)
            losses((x,), labels, sizes, shard, head, margin).per_sample.mean().backward()
            optimizer().step()

        return step

    return make


VARIANTS = {
    "eager fp32": eager,
    "blocked fp32": blocked(),
    "blocked bf16": blocked("bf16"),
    "blocked fp32 fused": blocked(fuse=True),
    "blocked bf16 fused": blocked("bf16", fuse=True),
    "blocked fp32 r=0.1": blocked(rate=0.1),
    "blocked bf16 r=0.1": blocked("bf16", rate=0.1),
    "blocked fp32 r=0.1 exact": blocked(rate=0.1, untouched="exact"),
    "blocked fp32 k=3": blocked(centers=3),
    "blocked bf16 k=3": blocked("bf16", centers=3),
}


def peak_bytes(act) -> int:
    """How far `act` raises this process's resident memory above what it was before, at its highest (Linux)."""
    Path("/proc/self/clear_refs").write_text("5")  # reset the high-water mark
    read = lambda key: int(next(x for x in open("/proc/self/status") if x.startswith(key)).split()[1]) * 1024  # noqa: E731
    before = read("VmRSS")
    act()
    return read("VmHWM") - before


def worker(options) -> None:
    distributed.init("cpu")
    torch.set_num_threads(1)
    rank, world = distributed.rank(), distributed.world_size()
    sizes = [options.batch] * world
    g = torch.Generator().manual_seed(rank)
    x = torch.randn(options.batch, options.size, generator=g).requires_grad_()
    labels = distributed.gather_rows(torch.randint(0, options.identities, (options.batch,), generator=g), sizes)
    if options.memory:
        make = VARIANTS[options.variants]
        warm = make(1000, options.size)  # libraries take their own memory in the first step
        warm(x, labels % 1000, sizes, 0)
        del warm
        head_blocked._pool.free.clear()
        step = make(options.identities, options.size)
        peak = peak_bytes(lambda: [step(x, labels, sizes, k) for k in range(3)])
        if rank == 0:
            Path(options.worker_out).write_text(json.dumps(peak))
        return distributed.shutdown()
    # Each with its own rows and momentum, which live through the repeats, as they do in training.
    steps = {name: VARIANTS[name](options.identities, options.size) for name in options.variants.split(",")}
    times = {name: [] for name in steps}
    for repeat in range(options.repeats + 1):
        for name, step in steps.items():
            distributed.barrier()
            start = cpu_seconds()
            step(x, labels, sizes, repeat)
            spent = torch.tensor(cpu_seconds() - start, dtype=torch.float64)
            if world > 1:
                dist.all_reduce(spent)
            if repeat:  # the first is the warm-up
                times[name].append(spent.item())
    if rank == 0:
        Path(options.worker_out).write_text(json.dumps(times))
    distributed.shutdown()


def measure(ranks: int, identities: int, size: int, batch: int, repeats: int, variants: str = ",".join(VARIANTS)) -> list[dict]:
    with tempfile.TemporaryDirectory() as folder:
        out = os.path.join(folder, "out.json")
        shape = ["--identities", identities, "--size", size, "--batch", batch, "--repeats", repeats, "--variants", variants]
        start_ranks(__file__, ranks, [*map(str, shape), "--worker-out", out])
        times, memory = json.loads(Path(out).read_text()), {}
        # Memory in a process of its own each, whose allocator gives freed buffers back at once.
        give_back = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "0"}
        for name in variants.split(","):
            shape[-1] = name
            start_ranks(__file__, ranks, [*map(str, shape), "--worker-out", out, "--memory"], give_back)
            memory[name] = json.loads(Path(out).read_text())
    rows, shard = [], 4 * -(-identities // ranks) * size
    for name in variants.split(","):
        row = {"variant": name, "ranks": ranks, "identities": identities, "size": size, "batch_per_rank": batch}
        row |= {f"cpu_s_{k}" if k != "repeats" else k: v for k, v in spread(times[name]).items()}
        ratios = [a / b for a, b in zip(times[name], times.get("eager fp32") or [])]
        row |= {f"ratio_to_eager_{k}": spread(ratios)[k] if ratios else "" for k in ("median", "min", "max")}
        row |= {"peak_extra_mb": memory[name] / 1e6, "shard_mb": shard / 1e6, "extra_over_shard": memory[name] / shard}
        rows.append(row)
        print({k: round(v, 4) if isinstance(v, float) else v for k, v in row.items()}, flush=True)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="folder for head_step.csv")
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--identities", type=int)
    parser.add_argument("--size", type=int, default=512)
    parser.add_argument("--batch", type=int, default=64, help="per rank")
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--variants", default=",".join(VARIANTS))
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--memory", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--worker-out", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker:
        return worker(options)
    if options.identities:
        rows = measure(options.ranks, options.identities, options.size, options.batch, options.repeats, options.variants)
    else:
        rows = measure(2, 100_000, 512, 64, options.repeats)
        rows += measure(1, 200_000, 512, 256, 1, "blocked fp32")  # memory; eager would need 1.2 GB more
    if options.out:
        write_csv(options.out / "head_step.csv", rows)


if __name__ == "__main__":
    main()
