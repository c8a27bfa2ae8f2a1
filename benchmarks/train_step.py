"""A whole training step by phases, on the code that trains: loader, encoder, collectives, head, optimizers.

    python benchmarks/train_step.py --out benchmarks/results --plot docs/train_step.png      # on what is here
    python benchmarks/train_step.py --ranks 2 --variants classifier,memory train.batch_size=128 encoder.name=iresnet18

One GPU a rank where there are any (times by events in the stream: what the GPU waits for, not the host), else the CPU with one
thread a rank, where besides the time that passes the CPU time of the training thread is taken, in which waiting and other jobs
of the machine do not count. Rank 0 is timed. Variants run in processes of their own, in turn, round by round; a figure is the
median over the steps of a round, then over the rounds. key=value changes every variant's settings.

The phases, each from the end of the one before it:
    data wait         for the next batch of the loader
    host to device    the batch, and the gradients of the last step are dropped
    encoder forward   while the labels travel
    plan              waiting for the labels; the step's prototypes (a memory's bookkeeping, a sampled shard's rows)
    gather            of the embeddings
    head forward      prototypes, logits, statistics and their all-reduce, loss
    head backward     to the gathered embeddings; prototype gradients, too, but for the triton head
    reduce-scatter    of the embeddings' gradient; the triton head's prototype gradients
    encoder backward  with DDP's all-reduces
    update            what is kept of the features, clipping, optimizers
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch

from benchmarks.common import spread, start_ranks, write_csv
from protomem import config, distributed, step
from protomem.trainer import Run

PHASES = ("data wait", "host to device", "encoder forward", "plan", "gather", "head forward")
PHASES += ("head backward", "reduce-scatter", "encoder backward", "update")
KINDS = {"ms": "time that passes", "cpu_ms": "CPU time of the training thread"}
SHAPES = {
    "cpu": {
        "data.train": "patterns:identities=20000,images=8,size=64",
        "data.size": 64,
        "encoder.name": "small",
        "encoder.embedding_size": 128,
        "train.batch_size": 64,
        "prototypes.memory.size": 8192,
    },
    "cuda": {
        "data.train": "patterns:identities=1000000,images=4,size=112",
        "encoder.name": "iresnet50",
        "encoder.precision": "bf16",
        "head.precision": "bf16",
        "train.batch_size": 1024,
        "prototypes.memory.size": 100000,
    },
}
COMMON = ("schedule.epochs=0", "schedule.steps=100000", "log.every=100000", "optimizer.lr=0.01")
MEMORY = ("prototypes.source=memory", "data.sampler.name=balanced", "data.sampler.images_per_identity=4")
VARIANTS = {
    "classifier": (),
    "classifier-dense": ("head.backend=dense", "head.precision=fp32"),
    "classifier-triton": ("head.backend=triton",),
    "sampled": ("prototypes.source=sampled", "prototypes.rate=0.1"),
    "memory": MEMORY,
    "memory-triton": (*MEMORY, "head.backend=triton"),
}


class Clock:
    """The points between the phases of each step."""

    def __init__(self, device: torch.device):
        self.gpu, self.steps = device.type == "cuda", []

    def mark(self, name: str) -> None:
        point = time.perf_counter(), time.thread_time()
        if self.gpu:
            point = (torch.cuda.Event(enable_timing=True),)
            point[0].record()
        self.steps[-1].append((name, point))

    def milliseconds(self, step: int) -> dict[str, dict[str, float]]:
        """{kind of time: {phase: ms}}. A phase has the name of the point that ends it; the first point begins."""
        if self.gpu:
            torch.cuda.synchronize()
        found = {kind: dict.fromkeys(PHASES, 0.0) for kind in (("ms",) if self.gpu else ("ms", "cpu_ms"))}
        for (_, before), (name, now) in zip(self.steps[step], self.steps[step][1:]):
            for kind, a, b in zip(found, before, now):
                found[kind][name] += a.elapsed_time(b) if self.gpu else 1e3 * (b - a)
        return found


def listen(run: Run, clock: Clock) -> None:
    """Marks where the phases end, around the functions of the step; the code of the step itself stays as it is."""

    def after(owner, attribute: str, name: str) -> None:
        real = getattr(owner, attribute)

        def call(*args, **kwargs):
            out = real(*args, **kwargs)
            clock.mark(name)
            return out

        setattr(owner, attribute, call)

    after(run, "_parts", "host to device")
    after(step, "encode", "encoder forward")
    after(run.prototypes, "begin_step", "plan")
    gather, backward = distributed.gather_with_grad, torch.Tensor.backward

    def gather_and_mark(x, sizes):
        # A view, so that a single process, which gathers nothing, has two tensors to hang the marks on.
        out = gather(x, sizes).view_as(x) if distributed.world_size() == 1 else gather(x, sizes)
        clock.mark("gather")
        out.register_hook(lambda _: clock.mark("head backward"))
        x.register_hook(lambda _: clock.mark("reduce-scatter"))
        return out

    def backward_and_mark(*args, **kwargs):
        clock.mark("head forward")
        backward(*args, **kwargs)
        clock.mark("encoder backward")

    distributed.gather_with_grad, torch.Tensor.backward = gather_and_mark, backward_and_mark


def worker(options) -> None:
    context = distributed.init("auto")
    shape = [f"{key}={value}" for key, value in SHAPES[context.device.type].items()]
    variant = VARIANTS[options.variants]
    if "prototypes.source=memory" not in variant:
        shape = [s for s in shape if not s.startswith("prototypes.memory")]
    run = Run(config.load([], [*shape, *COMMON, f"output={options.worker_out}", *variant, *options.settings]), context)
    run.prepare()
    clock = Clock(context.device)
    listen(run, clock)
    loader = run._loader(run.sampler)
    batches = iter(loader.epoch(0))
    for _ in range(options.warm_up + options.steps):
        clock.steps.append([])
        clock.mark("start")
        batch = next(batches)
        clock.mark("data wait")
        run._one_step(batch)
        clock.mark("update")
    found = [clock.milliseconds(k) for k in range(options.warm_up, options.warm_up + options.steps)]  # read at the end: no wait
    loader.close()
    if run.memory:
        run.memory.close()
    if context.is_main:
        c = run.config
        shape = {"encoder": c.encoder.name, "precision": c.encoder.precision, "head": c.head.backend}
        shape |= {"head_precision": c.head.precision, "identities": run.records.num_classes, "size": c.encoder.embedding_size}
        shape |= {"pixels": c.data.size, "batch": c.train.batch_size, "device": context.device.type}
        result = {"shape": shape, "steps": found, "load": os.getloadavg()[0]}
        Path(options.worker_out).write_text(json.dumps(result))
    distributed.shutdown()


def measure(options) -> list[dict]:
    """One row for each phase of each variant, and one for the step."""
    found: dict[str, list] = {name: [] for name in options.variants.split(",")}
    with tempfile.TemporaryDirectory() as folder:
        for k in range(options.rounds):
            for name in found:
                out = Path(folder) / f"{k}.json"
                out.unlink(missing_ok=True)
                arguments = ["--variants", name, "--steps", str(options.steps), "--warm-up", str(options.warm_up)]
                start_ranks(__file__, options.ranks, [*arguments, "--worker-out", str(out), *options.settings])
                found[name].append(json.loads(out.read_text()))
                print(f"round {k + 1} of {options.rounds}: {name}", flush=True)
    rows = []
    for name, rounds in found.items():
        shape = {"variant": name, "ranks": options.ranks, **rounds[0]["shape"], "steps": options.steps}
        for phase in (*PHASES, "step"):
            row = shape | {"phase": phase}
            for kind in rounds[0]["steps"][0]:
                each = [[sum(s[kind].values()) if phase == "step" else s[kind][phase] for s in r["steps"]] for r in rounds]
                values = spread([statistics.median(steps) for steps in each])
                row |= {f"{kind}_{k}" if k != "repeats" else k: v for k, v in values.items()}
            rows.append(row)
        # load: processes that wanted to run; what is above ranks x threads was other work, and slowed the time that passes
        row |= {"images_per_s": 1e3 * shape["batch"] / row["ms_median"], "load": max(r["load"] for r in rounds)}
    return rows


def table(rows: list[dict]) -> None:
    names = list(dict.fromkeys(row["variant"] for row in rows))
    for kind in KINDS:
        if f"{kind}_median" not in rows[0]:
            continue
        print(f"{KINDS[kind]}\n{'':18}" + "".join(f"{name:>24}" for name in names))
        for phase in (*PHASES, "step"):
            print(f"{phase:18}", end="")
            for row in (row for row in rows if row["phase"] == phase):
                median, low, high = (row[f"{kind}_{k}"] for k in ("median", "min", "max"))
                print(f"{f'{median:.2f} ({low:.2f}-{high:.2f})':>24}", end="")
            print()
    print(f"{'images/s':18}" + "".join(f"{row['images_per_s']:24.0f}" for row in rows if row["phase"] == "step"))


def plot(rows: list[dict], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    names = list(dict.fromkeys(row["variant"] for row in rows))
    kinds = [kind for kind in KINDS if f"{kind}_median" in rows[0]]
    figure, panels = plt.subplots(
        1, len(kinds), figsize=(7 * len(kinds), 2 + 0.55 * len(names)), layout="constrained", sharey=True, squeeze=False
    )
    first = rows[0]
    for axes, kind in zip(panels[0], kinds):
        left = dict.fromkeys(names, 0.0)
        for phase, colour in zip(PHASES, plt.get_cmap("tab10").colors):
            widths = {row["variant"]: row[f"{kind}_median"] for row in rows if row["phase"] == phase}
            label = phase if axes is panels[0, 0] else None
            axes.barh(names, [widths[n] for n in names], 0.6, [left[n] for n in names], color=colour, label=label)
            for n in names:
                left[n] += widths[n]
        load = max(row["load"] for row in rows if row["phase"] == "step")
        busy = f" (load average {load:.0f} on {os.cpu_count()} cores)" if kind == "ms" and first["device"] == "cpu" else ""
        axes.set(xlabel="ms", xlim=(0, 1.18 * max(left.values())), title=KINDS[kind] + busy)
        axes.spines[["top", "right"]].set_visible(False)
        if kind == "ms":
            for row in (row for row in rows if row["phase"] == "step"):
                n = row["variant"]
                text = f"{row['images_per_s']:,.0f} images/s"
                axes.annotate(text, (left[n], n), (4, 0), textcoords="offset points", va="center", fontsize=9)
    panels[0, 0].invert_yaxis()
    what = f"{first['encoder']}, {first['pixels']} pixels, batch {first['batch']} on {first['ranks']} ranks ({first['device']})"
    figure.suptitle(f"One training step: {what}, {first['identities']:,} identities, D = {first['size']}", fontsize=11)
    figure.legend(loc="outside lower center", ncols=5, frameon=False, fontsize=9)
    figure.savefig(path, dpi=150)
    print(f"wrote {path}")


def main() -> None:
    usual = [name for name in VARIANTS if "dense" not in name and ("triton" not in name or torch.cuda.is_available())]
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("settings", nargs="*", metavar="key=value")
    parser.add_argument("--out", type=Path, help="folder for train_step.csv")
    parser.add_argument("--plot", type=Path, help="the picture")
    parser.add_argument("--ranks", type=int, default=torch.cuda.device_count() or 2)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=20, help="timed steps of a round")
    parser.add_argument("--warm-up", type=int, default=5, help="steps before them")
    parser.add_argument("--variants", default=",".join(usual), help="of " + ", ".join(VARIANTS))
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--worker-out", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker:
        return worker(options)
    rows = measure(options)
    table(rows)
    if options.out:
        write_csv(options.out / "train_step.csv", rows)
    if options.plot:
        plot(rows, options.plot)


if __name__ == "__main__":
    main()
