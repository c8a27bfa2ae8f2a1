"""Training on 100,000 generated identities with few images each: prototype memory of 8,192 slots against the full classifier.

    python benchmarks/memory_training.py --out benchmarks/results --work runs/memory_training
    python benchmarks/memory_training.py --out DIR --work DIR --steps 40        # a quick look

Two runs, one after the other, on 2 ranks of this machine: configs/results/patterns_classifier.yaml and
patterns_memory.yaml. Same encoder, images seen, loss and learning rate; both are evaluated on the same pairs of
identities that neither has seen. A run that is finished in the work folder is read, not repeated. Memory is the peak
resident memory of rank 0; seconds of training leave out evaluation and saving.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from omegaconf import OmegaConf

from benchmarks.common import write_csv
from protomem.data.patterns import write_pattern_pairs
from protomem.data.records import open_records
from protomem.metrics import read_metrics

RUNS = ("classifier", "memory")
PAIRS = "patterns:identities=2000,images=4,seed=1,first=50000000,size=48,hard=1"
RATES = ("tar@1e-1", "tar@1e-2", "tar@1e-3")


def start(name: str, folder: Path, pairs: Path, ranks: int, more: list[str]) -> None:
    command = [str(ROOT / "launch" / "local.sh"), str(ranks), str(ROOT / "configs" / "results" / f"patterns_{name}.yaml")]
    command += [f"output={folder}", f"data.eval=[{pairs}]", *more]
    env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHON": sys.executable}
    if subprocess.run(command, env=env, cwd=ROOT).returncode:
        raise SystemExit(f"the run with the {name} failed")


def result(name: str, folder: Path, ranks: int) -> dict:
    """What the log of a finished run says: one row of the table."""
    records, config = read_metrics(folder), OmegaConf.load(folder / "config.yaml")
    steps = [record for record in records if "loss" in record]
    evaluations = {record["tag"]: record for record in records if record.get("event") == "evaluation"}
    final, batch = evaluations["final"], config.train.batch_size
    row = {"prototypes": name, "ranks": ranks, "data": config.data.train, "sampler": config.data.sampler.name}
    row |= {"slots": config.prototypes.memory.size if name == "memory" else "", "batch": batch, "steps": steps[-1]["step"]}
    row |= {"images": batch * steps[-1]["step"], "accuracy_untrained": evaluations["initial"]["accuracy"]}
    row |= {key: final[key] for key in ("accuracy", "accuracy_std", *RATES, "auc", "pairs")}
    spans = [later["step"] - earlier for later, earlier in zip(steps, [0, *(record["step"] for record in steps)])]
    seconds = sum(batch * span / record["images_per_s"] for span, record in zip(spans, steps))
    return row | {
        "seconds": seconds,
        "images_per_s": row["images"] / seconds,
        "data_wait": sum(record["data_wait"] for record in steps) / len(steps),
        "peak_memory_gb": max(record["memory_gb"] for record in steps),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder for memory_training.csv")
    parser.add_argument("--work", type=Path, default=Path("runs/memory_training"), help="folder of the runs")
    parser.add_argument("--steps", type=int, help="of both runs, instead of what the configs say")
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="for both runs")
    options = parser.parse_args()
    work = options.work.resolve()
    pairs = work / "unseen.bin"
    if not pairs.exists():
        write_pattern_pairs(pairs, open_records(PAIRS), 4000, seed=1)
    more = list(options.overrides)
    if options.steps:
        more += [f"schedule.steps={options.steps}", f"schedule.warmup_steps={min(100, options.steps // 10)}"]
    rows = []
    for name in RUNS:
        if not any(record.get("tag") == "final" for record in read_metrics(work / name)):
            start(name, work / name, pairs, options.ranks, more)
        rows.append(result(name, work / name, options.ranks))
    for row in rows:
        row["accuracy_minus_classifier_points"] = 100 * (row["accuracy"] - rows[0]["accuracy"])
        row["seconds_over_classifier"] = row["seconds"] / rows[0]["seconds"]
        row["memory_over_classifier"] = row["peak_memory_gb"] / rows[0]["peak_memory_gb"]
        print(
            f"{row['prototypes']:11} accuracy {100 * row['accuracy']:.2f} ± {100 * row['accuracy_std']:.2f} % (untrained "
            f"{100 * row['accuracy_untrained']:.2f} %)  TAR@FAR=1e-3 {100 * row['tar@1e-3']:.2f} %  "
            f"{row['seconds']:.0f} s  {row['images_per_s']:.0f} images/s  peak {row['peak_memory_gb']:.2f} GB a rank"
        )
    write_csv(options.out / "memory_training.csv", rows)


if __name__ == "__main__":
    main()
