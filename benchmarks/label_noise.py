"""Wrong labels: ArcFace, sub-centres, and ArcFace on what `protomem data clean` leaves; is what it drops wrong?

    python benchmarks/label_noise.py --out benchmarks/results --work runs/label_noise

Generated patterns (synthetic data, no faces), 400 identities x 20 pictures. A fifth of the pictures has a wrong label: half of
these show another identity of the set, half somebody who is not in it. Trained are, for as many steps: ArcFace and Sub-center
ArcFace (K = 3) on the noisy set; ArcFace on what cleaning by the latter leaves, with two angles; and, as a bound, ArcFace on
the noisy set without the wrong pictures. label_noise.csv: accuracy on pairs of unseen people with right labels.
label_noise_cleaning.csv: precision and recall of what either of the first two would drop, over the angle, and the AUC of the
angle; dropping at random has a precision of the noise's share.
"""

from __future__ import annotations

import argparse
import csv
import os
import resource
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import numpy as np
from scipy.stats import rankdata

from benchmarks.common import write_csv
from benchmarks.study import final_figures
from protomem.data.patterns import PatternRecords, write_pattern_pairs
from protomem.data.recordio import RecordWriter

IDENTITIES, IMAGES, NOISE, SIZE = 400, 20, 0.2, 48
ANGLES = (40, 45, 50, 55, 60, 65, 70, 75, 80)
RIGHT, INSIDE, OUTSIDE = 0, 1, 2  # the picture shows: its label, another identity of the set, somebody outside of it


def data(work: Path, seed: int) -> np.ndarray:
    """Write `noisy-SEED` and `right-SEED` (the former without the wrong pictures) and the pairs; returns what each picture of
    the noisy set is, int8 [N]."""
    rng, patterns = np.random.default_rng(seed), PatternRecords(IDENTITIES, 2 * IMAGES, size=SIZE, hard=True)
    strangers = PatternRecords(IDENTITIES * IMAGES, 1, size=SIZE, hard=True, first=20_000_000)
    labels = np.repeat(np.arange(IDENTITIES), IMAGES)
    kind = np.where(rng.random(len(labels)) < NOISE, rng.integers(1, 3, len(labels)), RIGHT).astype(np.int8)
    others = (labels + rng.integers(1, IDENTITIES, len(labels))) % IDENTITIES
    if not (work / f"right-{seed}" / "train.idx").exists():
        with RecordWriter(work / f"noisy-{seed}") as noisy, RecordWriter(work / f"right-{seed}", classes=IDENTITIES) as right:
            for i, label in enumerate(labels):
                if kind[i] == OUTSIDE:
                    picture = strangers.bytes(i)
                else:  # wrong ones are pictures that their own identity does not have
                    image = i % IMAGES + IMAGES * (kind[i] == INSIDE)
                    picture = patterns.bytes(2 * IMAGES * (others[i] if kind[i] else label) + image)
                noisy.add(picture, label)
                if kind[i] == RIGHT:
                    right.add(picture, label)
    if not (work / "unseen.bin").exists():
        write_pattern_pairs(work / "unseen.bin", PatternRecords(1000, 4, size=SIZE, hard=True, first=50_000_000), 4000)
    return kind


def call(*arguments) -> float:
    """Run `protomem ...`; its CPU seconds."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "protomem", *map(str, arguments)]
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{' '.join(command)} failed:\n{(done.stdout + done.stderr)[-2000:]}")
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def train(work: Path, name: str, train_set: Path, seed: int, steps: int, centers: int = 1) -> dict:
    folder = work / "runs" / f"{name.replace(' ', '_')}-{seed}"
    shutil.rmtree(folder, ignore_errors=True)
    more = [f"data.train={train_set}", f"data.eval=[{work / 'unseen.bin'}]", f"train.seed={seed}", f"schedule.steps={steps}"]
    more += [f"schedule.warmup_steps={steps // 10}", f"prototypes.sub_centers={centers}", f"output={folder}"]
    seconds = call("train", ROOT / "configs/results/label_noise.yaml", *more)
    row = {"method": name, "seed": seed, "steps": steps, **final_figures(folder, ("unseen",)), "cpu s": seconds}
    print(f"{name}, seed {seed}: {100 * row['unseen accuracy']:.2f} %, {seconds:.0f} s", flush=True)
    return row


def angles(work: Path, run: str, count: int) -> np.ndarray:
    """The angle of every picture to the dominant prototype of its label."""
    listed = work / f"listed-{run}"
    call("data", "clean", work / "runs" / run, listed, "--list-only", "--force", "--angle", 0)
    out = np.zeros(count)
    with open(listed / "dropped.csv") as file:
        for row in csv.DictReader(file):
            out[int(row["position"])] = float(row["angle"])
    return out


def cleaning(run: str, seed: int, angle: np.ndarray, kind: np.ndarray) -> list[dict]:
    wrong, rank = kind != RIGHT, rankdata(angle)
    auc = (rank[wrong].mean() - (wrong.sum() + 1) / 2) / (~wrong).sum()
    rows = []
    for limit in ANGLES:
        dropped = angle > limit
        row = {"run": run, "seed": seed, "angle": limit, "wrong": wrong.mean(), "dropped": dropped.mean()}
        row |= {"precision": wrong[dropped].mean() if dropped.any() else "", "recall": dropped[wrong].mean()}
        row |= {f"recall {name}": dropped[kind == k].mean() for name, k in (("inside", INSIDE), ("outside", OUTSIDE))}
        rows.append(row | {"auc": auc})
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder for label_noise.csv and label_noise_cleaning.csv")
    parser.add_argument("--work", type=Path, required=True, help="folder for pictures and runs")
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--steps", type=int, default=750)
    parser.add_argument("--angles", type=float, nargs="+", default=[75.0, 50.0], help="of the sets that are trained on")
    options = parser.parse_args()
    work, steps = options.work.resolve(), options.steps
    rows, found = [], []
    for seed in range(1, options.seeds + 1):
        kind = data(work, seed)
        noisy = work / f"noisy-{seed}"
        for name, centers in (("arcface", 1), ("sub-centres", 3)):
            rows.append(train(work, name, noisy, seed, steps, centers))
            found += cleaning(name, seed, angles(work, f"{name}-{seed}", len(kind)), kind)
        for limit in options.angles:
            cleaned = work / f"cleaned-{limit:g}-{seed}"
            call("data", "clean", work / "runs" / f"sub-centres-{seed}", cleaned, "--force", "--angle", limit)
            rows.append(train(work, f"arcface cleaned at {limit:g}", cleaned, seed, steps))
        rows.append(train(work, "arcface on right labels", work / f"right-{seed}", seed, steps))
        write_csv(options.out / "label_noise.csv", rows)
        write_csv(options.out / "label_noise_cleaning.csv", found)


if __name__ == "__main__":
    main()
