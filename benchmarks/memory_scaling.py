"""One training step of the head (no encoder) at 10**4 to 10**8 identities: prototype memory beside the full classifier.

    python benchmarks/memory_scaling.py --out benchmarks/results
    python benchmarks/memory_scaling.py --out DIR --identities 10000 1000000 --repeats 1 --steps 5      # a quick look

Memory of 65,536 slots, 64 identities x 4 images of 256 numbers, one process and thread, CosFace: forward and backward to
the embeddings, and for the classifier SGD with momentum on all of its rows. A fifth of the identities of a step is in the
memory, the others are not, as the mixed sampler draws them (with fewer identities than slots all are). Every number of
identities has a process of its own, and the whole list is gone through `repeats` times: figures are medians over these
of a round's median step. `peak_extra_bytes` is how far building and stepping raise the process's resident memory.
A classifier whose rows, gradient and momentum would take more than 60 % of the free memory is not run.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import numpy as np
import torch

from benchmarks.common import cpu_seconds, spread, start_ranks, write_csv
from benchmarks.head_step import peak_bytes
from protomem import distributed
from protomem.data.sampler import permute
from protomem.head import HEADS
from protomem.objective.margins import build_margin
from protomem.prototypes.classifier import ClassifierShard
from protomem.prototypes.memory import PrototypeMemory
from protomem.prototypes.slots import Slots
from protomem.step import losses

SLOTS, IDENTITIES, IMAGES, SIZE, REFRESH = 65_536, 64, 4, 256, 0.2
SHARE = 0.6  # of the free memory that a classifier may take
LONGEST = 30.0  # seconds of timed steps in a process, once there are 5 of them
NAMES = {"memory": f"prototype memory, {SLOTS:,} slots", "classifier": "full classifier, SGD with momentum"}


def label_sequence(identities: int, steps: int) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """(labels that fill the memory, labels of `steps` steps): int64 [64 * 4] each."""
    generator = np.random.default_rng(0)
    fill = min(identities, SLOTS) // IDENTITIES
    slots, taken = Slots(SLOTS, identities), 0

    def step(refreshed: int) -> torch.Tensor:
        nonlocal taken
        stored = slots.label[:-1][slots.occupied()].numpy()
        old = generator.choice(stored, refreshed, replace=False) if refreshed else np.zeros(0, np.int64)
        new = permute(np.arange(taken, taken + IDENTITIES - refreshed), identities, 1)
        taken += len(new)
        labels = torch.from_numpy(np.repeat(np.concatenate([old, new]), IMAGES))
        slots.plan(labels)
        return labels

    filling = [step(0) for _ in range(fill)]
    refreshed = round(REFRESH * IDENTITIES) if identities > SLOTS else IDENTITIES
    return filling, [step(refreshed) for _ in range(steps)]


def worker(options) -> None:
    """One variant at one number of identities: writes seconds of each step, bytes of each tensor, and the peak."""
    distributed.init("cpu")
    torch.set_num_threads(1)
    filling, labels = label_sequence(options.identities[0], options.steps + 2)
    generator = torch.Generator().manual_seed(0)
    inputs = [torch.randn(IDENTITIES * IMAGES, SIZE, generator=generator).requires_grad_() for _ in range(4)]
    margin, sizes = build_margin("cosface", scale=64.0, m=0.4), [IDENTITIES * IMAGES]
    found = {"wall": [], "cpu": []}

    def run() -> None:
        optimizer = None
        if options.variant == "memory":
            prototypes = PrototypeMemory(options.identities[0], SIZE, size=SLOTS)
            for number, batch in enumerate(filling):
                prototypes.begin_step(batch, number)
                prototypes.columns(batch, torch.randn(len(batch), SIZE, generator=generator))
        else:
            prototypes = ClassifierShard(options.identities[0], SIZE)
            optimizer = torch.optim.SGD(prototypes.parameters(), lr=0.01, momentum=0.9, weight_decay=5e-4, fused=True)
        begun = time.perf_counter()
        for number, batch in enumerate(labels):
            x = inputs[number % len(inputs)]
            x.grad = None
            wall, cpu = time.perf_counter(), cpu_seconds()
            prototypes.begin_step(batch, number)
            losses((x,), batch, sizes, prototypes, HEADS["blocked"], margin).per_sample.mean().backward()
            if optimizer is not None:
                optimizer.step()
            if number >= 2:  # the first two are warm-up
                found["wall"].append(time.perf_counter() - wall)
                found["cpu"].append(cpu_seconds() - cpu)
            if len(found["wall"]) >= 5 and time.perf_counter() - begun > LONGEST:
                break
        tensors = dict(prototypes.named_buffers())
        if optimizer is not None:
            (state,) = optimizer.state.values()
            tensors |= {"weight": prototypes.weight, "gradient": prototypes.weight.grad}
            tensors |= {"momentum": state["momentum_buffer"]}
        found["bytes"] = {name: tensor.nbytes for name, tensor in tensors.items()}

    found["peak"] = peak_bytes(run)
    Path(options.worker_out).write_text(json.dumps(found))
    distributed.shutdown()


def free_bytes() -> int:
    return next(int(x.split()[1]) * 1024 for x in open("/proc/meminfo") if x.startswith("MemAvailable"))


def measure(identities: list[int], repeats: int, steps: int) -> list[dict]:
    runs: dict[tuple[str, int], list[dict]] = {(variant, count): [] for variant in NAMES for count in identities}
    needed = {count: 3 * count * SIZE * 4 for count in identities}  # rows, gradient, momentum
    fits = {count: needed[count] <= SHARE * free_bytes() for count in identities}
    with tempfile.TemporaryDirectory() as folder:
        out = str(Path(folder) / "out.json")
        for repeat in range(repeats):
            for variant, count in runs:
                if variant == "classifier" and not fits[count]:
                    continue
                arguments = ["--variant", variant, "--identities", str(count), "--steps", str(steps), "--worker-out", out]
                start_ranks(__file__, 1, arguments)
                runs[variant, count].append(json.loads(Path(out).read_text()))
                print(f"round {repeat + 1} of {repeats}: {variant} at {count:,} identities", flush=True)
    rows = []
    for (variant, count), found in runs.items():
        row = {"variant": variant, "identities": count, "slots": SLOTS if variant == "memory" else ""}
        row |= {"size": SIZE, "batch": IDENTITIES * IMAGES, "steps": sum(len(f["wall"]) for f in found)}
        if not found:
            rows.append(row | {"note": "does not fit", "state_bytes": needed[count]})
            continue
        for name in ("wall", "cpu"):
            values = spread([1e3 * statistics.median(f[name]) for f in found])
            row |= {f"{name}_ms_{k}" if k != "repeats" else k: v for k, v in values.items()}
        sizes = found[0]["bytes"]
        row |= {"state_bytes": sum(sizes.values()), "map_bytes": sizes.get("slots.slot_of", 0)}
        row |= {"peak_extra_bytes": statistics.median(f["peak"] for f in found)}
        rows.append(row | {f"bytes {name}": value for name, value in sizes.items()})
    return rows


def table(rows: list[dict]) -> None:
    heads = ("wall ms", "min", "max", "CPU ms", "state MB", "map MB", "peak MB")
    print(f"{'':12}{'identities':>13}" + "".join(f"{head:>10}" for head in heads))
    for row in rows:
        print(f"{row['variant']:12}{row['identities']:13,}", end="")
        if "note" in row:
            print(f"  {row['note']}: rows, gradient and momentum need {row['state_bytes'] / 1e9:,.1f} GB")
            continue
        times = (row[name] for name in ("wall_ms_median", "wall_ms_min", "wall_ms_max", "cpu_ms_median"))
        print("".join(f"{value:10,.1f}" for value in times), end="")
        print("".join(f"{row[name] / 1e6:10,.1f}" for name in ("state_bytes", "map_bytes", "peak_extra_bytes")))


def plot(rows: list[dict], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 4), layout="constrained")
    for variant, colour in (("memory", "tab:blue"), ("classifier", "tab:red")):
        all_ = [row for row in rows if row["variant"] == variant]
        run = [row for row in all_ if "note" not in row]
        x = [row["identities"] for row in run]
        y, low, high = ([row[f"wall_ms_{k}"] for row in run] for k in ("median", "min", "max"))
        errors = [np.subtract(y, low), np.subtract(high, y)]
        left.errorbar(x, y, errors, fmt="o-", color=colour, capsize=3, label=NAMES[variant])
        right.plot(x, [row["state_bytes"] for row in run], "o-", color=colour, label=NAMES[variant])
        if variant == "memory":
            mapped = [row["map_bytes"] for row in run]
            right.plot(x, mapped, "--", color=colour, label="of which the map from identity to slot")
        missing = [row for row in all_ if "note" in row]
        if missing:
            place = [row["identities"] for row in missing], [row["state_bytes"] for row in missing]
            right.plot(*place, "o", color=colour, fillstyle="none", label="would be needed: does not fit")
    for axes, title, unit in ((left, "Time of one step of the head", "ms"), (right, "Memory of all state", "bytes")):
        axes.set(xscale="log", yscale="log", xlabel="identities", ylabel=unit, title=title)
        axes.grid(alpha=0.3, which="both", linewidth=0.5)
        axes.legend(frameon=False, fontsize=9)
    figure.savefig(path, dpi=150)
    print(f"wrote {path}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="folder for memory_scaling.csv and memory_scaling.png")
    parser.add_argument("--repeats", type=int, default=3, help="rounds over the whole list")
    parser.add_argument("--steps", type=int, default=30, help="timed steps in each process (fewer where they take long)")
    parser.add_argument("--identities", type=int, nargs="+", default=[10**k for k in range(4, 9)])
    parser.add_argument("--variant", choices=list(NAMES), help=argparse.SUPPRESS)
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--worker-out", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker:
        return worker(options)
    rows = measure(options.identities, options.repeats, options.steps)
    table(rows)
    if options.out:
        write_csv(options.out / "memory_scaling.csv", rows)
        plot(rows, options.out / "memory_scaling.png")


if __name__ == "__main__":
    main()
