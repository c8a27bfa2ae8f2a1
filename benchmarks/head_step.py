"""CPU time and memory of one head step (forward, backward, SGD) over ranks: `blocked` against the plain eager form.

    python benchmarks/head_step.py --out benchmarks/results            # the shapes of the README
    python benchmarks/head_step.py --ranks 2 --identities 100000 --size 512 --batch 64 --repeats 7

Eager is what one writes first: a normalised copy of the prototypes, fp32 logits in memory, autograd, torch.optim.SGD.
Variants run in turn, repeat by repeat, in the same processes; figures are summed over ranks (user + system time).
"""

from __future__ import annotations

import argparse
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
from protomem.head import HEADS, blocked
from protomem.objective.margins import build_margin
from protomem.prototypes.classifier import ClassifierShard
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


def eager_step(x, labels, sizes, shard, optimizer):
    optimizer.zero_grad()
    X = F.normalize(distributed.gather_with_grad(x, sizes))
    target = torch.where((labels >= shard.first) & (labels < shard.last), labels - shard.first, -1)
    cos = X @ F.normalize(shard.weight).t()
    row = (target >= 0).nonzero().squeeze(1)
    margin = torch.zeros_like(cos)
    margin[row, target[row]] = MARGIN
    _EagerCrossEntropy.apply(SCALE * (cos - margin), target).backward()
    optimizer.step()


def blocked_step(x, labels, sizes, shard, optimizer, **options):
    shard.begin_step(labels, 0)
    head = lambda *args: HEADS["blocked"](*args, **options)  # noqa: E731
    losses((x,), labels, sizes, shard, head, build_margin("cosface", scale=SCALE, m=MARGIN)).per_sample.mean().backward()
    optimizer.step()


VARIANTS = {
    "eager fp32": eager_step,
    "blocked fp32": blocked_step,
    "blocked bf16": lambda *args: blocked_step(*args, precision="bf16"),
}


def peak_bytes(act) -> int:
    """How far `act` raises this process's resident memory above what it was before (Linux)."""
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
    shard = ClassifierShard(options.identities, options.size)
    times = {name: [] for name in VARIANTS}
    if options.memory:
        name = options.variants
        optimizer = torch.optim.SGD([shard.weight], lr=0.01, momentum=0.9, weight_decay=5e-4, fused=name != "eager fp32" or None)
        shard.weight.grad, shard.sink.buffer = None, None
        VARIANTS[name](x, labels, sizes, shard, optimizer)  # makes the momentum, which is not counted
        shard.weight.grad, shard.sink.buffer = None, None
        blocked._pool.free.clear()  # what the head keeps between steps counts as well
        peak = peak_bytes(lambda: VARIANTS[name](x, labels, sizes, shard, optimizer))
        if rank == 0:
            Path(options.worker_out).write_text(json.dumps(peak))
        return distributed.shutdown()
    # One set of optimizers that live through the timed repeats, as they do in training.
    optimizers = {
        name: torch.optim.SGD([shard.weight], lr=0.01, momentum=0.9, weight_decay=5e-4, fused=name != "eager fp32" or None)
        for name in options.variants.split(",")
    }
    for repeat in range(options.repeats + 1):
        for name, optimizer in optimizers.items():
            distributed.barrier()
            start = cpu_seconds()
            VARIANTS[name](x, labels, sizes, shard, optimizer)
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
    rows, local = [], -(-identities // ranks)
    logits, gradient = 4 * batch * ranks * local, 4 * local * size
    for name in variants.split(","):
        row = {"variant": name, "ranks": ranks, "identities": identities, "size": size, "batch_per_rank": batch}
        row |= {f"cpu_s_{k}" if k != "repeats" else k: v for k, v in spread(times[name]).items()}
        ratios = [a / b for a, b in zip(times[name], times.get("eager fp32") or [])]
        row["ratio_to_eager_median"] = spread(ratios)["median"] if ratios else ""
        row |= {"peak_extra_mb": memory[name] / 1e6, "logits_mb": logits / 1e6, "gradient_mb": gradient / 1e6}
        row["bound_mb"] = (0.15 * logits + gradient) / 1e6
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
