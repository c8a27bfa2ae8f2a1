"""What a checkpoint of a large classifier costs: written while training waits, written while it goes on, and loaded at
another number of ranks.

    python benchmarks/checkpoint.py --out benchmarks/results                            # 15 GB of memory, 10 GB of disk
    python benchmarks/checkpoint.py --out DIR --identities 20000 --steps 3              # a quick look

2 ranks of one thread: a million identities of 512 numbers with SGD's momentum (4.1 GB of state), and steps of the whole
head (64 images, CosFace, `blocked`, fp32) in place of training. Of each rank: the time of a step; of a synchronous save;
what an asynchronous save makes the step wait (the copy; the first one also allocates it), how long it takes in all, and
the time of the steps beside it; how far each raises the process's resident memory. CPU seconds are those of the training
thread for the wait, of the whole process for steps. `lost_steps` is all that an asynchronous save costs where no core is
idle, in CPU time of steps (the wait, and what is written beside steps: GPUs leave cores idle, this benchmark does not);
`every_for_5_percent` is the number of steps between checkpoints from which on that is less than 5 % of them. Then 3 ranks load it: seconds, bytes of their own rows (weight and momentum), and
how far loading raises their resident memory above their own rows.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch

from benchmarks.common import cpu_seconds, start_ranks, write_csv
from benchmarks.head_step import peak_bytes
from protomem import distributed, row_blocks, state
from protomem.background import Saver
from protomem.head import HEADS
from protomem.objective.margins import build_margin
from protomem.prototypes.classifier import ClassifierShard
from protomem.step import losses

SIZE, BATCH = 512, 64


def build(identities: int):
    shard = ClassifierShard(identities, SIZE)
    modules = {"encoder": torch.nn.Linear(8, 8), "prototypes": shard}
    return modules, {"prototypes": torch.optim.SGD(shard.parameters(), lr=0.01, momentum=0.9, fused=True)}


def saving(options) -> list[dict]:
    modules, optimizers = build(options.identities)
    shard, optimizer = modules["prototypes"], optimizers["prototypes"]
    rank, world, generator = distributed.rank(), distributed.world_size(), torch.Generator().manual_seed(0)
    sizes, margin = [BATCH // world] * world, build_margin("cosface", scale=64.0, m=0.4)
    folder, done, number, waited_cpu = Path(options.folder), {}, 0, []

    def step() -> dict:
        nonlocal number
        wall, cpu = time.perf_counter(), cpu_seconds()
        labels = torch.randint(0, options.identities, (BATCH,), generator=generator)
        x = torch.randn(BATCH, SIZE, generator=generator).chunk(world)[rank].requires_grad_()
        shard.begin_step(labels, number)
        losses((x,), labels, sizes, shard, HEADS["blocked"], margin).per_sample.mean().backward()
        optimizer.step()
        number += 1
        return {"wall": time.perf_counter() - wall, "cpu": cpu_seconds() - cpu}

    def report(at, path, waited, seconds):
        done[at] = waited, seconds

    def save(saver, at) -> list[dict]:
        """The steps beside it, until it is complete on all ranks."""
        begun = time.thread_time()
        saver.start(at, state.named_state(modules, optimizers), options.identities, {})
        waited_cpu.append(time.thread_time() - begun)
        beside = []
        while saver.busy:
            beside.append(step())
            saver.poll(torch.device("cpu"))
        return beside

    step()
    alone = [step() for _ in range(options.steps)]
    median = statistics.median(s["wall"] for s in alone)
    common = {"rank": rank, "ranks": world, "identities": options.identities, "size": SIZE, "block_mb": options.block_mb}
    common |= {"own_state_bytes": sum(t.nbytes for t in state.named_state(modules, optimizers).values())}
    common |= {"step_s": median, "step_cpu_s": statistics.median(s["cpu"] for s in alone), "steps": len(alone)}
    rows = []
    for kind in ("synchronous", "asynchronous, first", "asynchronous"):
        if kind != "asynchronous":  # else the thread and the copies of the first are used again
            saver = Saver(folder, keep=1, asynchronous=kind != "synchronous", timeout_s=600, written=0, report=report)
        at, beside = len(rows) + 1, []
        peak = peak_bytes(lambda: beside.extend(save(saver, at)))
        row = {"what": kind, **common, "wait_s": done[at][0], "wait_cpu_s": waited_cpu[-1], "seconds": done[at][1]}
        row |= {"peak_extra_bytes": peak}
        if beside:
            slower = statistics.median(s["wall"] for s in beside)
            lost = (row["wait_cpu_s"] + sum(s["cpu"] - common["step_cpu_s"] for s in beside)) / common["step_cpu_s"]
            row |= {"steps_beside": len(beside), "step_beside_s": slower}
            row |= {"step_beside_cpu_s": statistics.median(s["cpu"] for s in beside), "wait_in_steps": row["wait_s"] / median}
            row |= {"wait_in_steps_cpu": row["wait_cpu_s"] / common["step_cpu_s"]}
            row |= {"lost_steps": lost, "every_for_5_percent": math.ceil(lost / 0.05)}
        rows.append(row)
    saver.__exit__(None, None, None)
    return rows


def loading(options) -> list[dict]:
    modules, optimizers = build(options.identities)
    own, begun = 2 * modules["prototypes"].weight.nbytes, time.perf_counter()
    peak = peak_bytes(lambda: state.load(state.newest(Path(options.folder)), modules, optimizers))
    # The momentum is created by loading; all above it is what is read but not kept.
    return [
        {
            "what": "load",
            "rank": distributed.rank(),
            "ranks": distributed.world_size(),
            "identities": options.identities,
            "size": SIZE,
            "block_mb": options.block_mb,
            "own_state_bytes": own,
            "seconds": time.perf_counter() - begun,
            "peak_extra_bytes": peak - own // 2,
        }
    ]


def worker(options) -> None:
    distributed.init("cpu")
    torch.set_num_threads(1)
    row_blocks.BLOCK_BYTES = options.block_mb << 20
    rows = {"saving": saving, "loading": loading}[options.what](options)
    Path(options.worker_out, f"{options.what}-{distributed.rank()}.json").write_text(json.dumps(rows))
    distributed.barrier()
    distributed.shutdown()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="folder for checkpoint.csv")
    parser.add_argument("--identities", type=int, default=1_000_000)
    parser.add_argument("--steps", type=int, default=5, help="timed steps without a checkpoint")
    parser.add_argument("--block-mb", type=int, default=row_blocks.BLOCK_BYTES >> 20, help="of the blocks of rows, in MiB")
    parser.add_argument("--scratch", type=Path, help="where the checkpoints are written; default: the temporary folder")
    parser.add_argument("--what", help=argparse.SUPPRESS)
    parser.add_argument("--folder", help=argparse.SUPPRESS)
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--worker-out", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker:
        return worker(options)
    rows = []
    with tempfile.TemporaryDirectory(dir=options.scratch) as scratch:
        for what, ranks in (("saving", 2), ("loading", 3)):
            arguments = ["--identities", str(options.identities), "--steps", str(options.steps), "--what", what]
            arguments += ["--block-mb", str(options.block_mb), "--folder", f"{scratch}/checkpoints", "--worker-out", scratch]
            start_ranks(__file__, ranks, arguments)
            for rank in range(ranks):
                rows += json.loads(Path(scratch, f"{what}-{rank}.json").read_text())
    for row in rows:
        print("  ".join(f"{k} {v:.4g}" if isinstance(v, float) else f"{k} {v}" for k, v in row.items()))
    if options.out:
        write_csv(options.out / "checkpoint.csv", rows)


if __name__ == "__main__":
    main()
