"""Quality weighting of prototypes on rendered faces whose true quality is known: who gains, and does each score rank it?

    python benchmarks/quality_study.py --out benchmarks/results --work runs/quality_study --resume
    python benchmarks/quality_study.py --out DIR --work DIR --shares 0.3 --seeds 1 --steps 20       # a quick look

200 people x 16 images with 0, 10 and 30 % of the images degraded; a set per share, the same people. Methods: plain
Prototype Memory (all images count alike), its quality-aware forms, the true quality as the weight, and, our own addition,
a loss weight beside soft recognizability. Every run is evaluated on pairs of unseen people: clean, low quality, and
mixed (every other pair of each). Two runs at a time, one thread each. --resume keeps the lines of finished runs.

After training the images of the 30 % set are embedded in eval mode: Spearman's rank correlation of a score with the true
quality, over all images and over the degraded ones alone (70 % of all share the quality 1). The prototype of the
unrecognizable is made anew for every run, from 256 destroyed copies of these images.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import numpy as np
import torch
from scipy.stats import spearmanr

from benchmarks.common import write_csv
from benchmarks.study import finished, final_figures, summary
from protomem.commands import load_run
from protomem.data.faces import ImageOptions, write_face_pairs, write_face_set
from protomem.data.pairs import read_bin, write_bin
from protomem.data.pipeline import eval_batches, normalise
from protomem.data.records import open_records
from protomem.data.unrecognizable import destroy
from protomem.evaluate.extract import extract
from protomem.quality import Quality

SOFT = ["quality.estimator=recognizability", "quality.usage=soft"]
METHODS = {
    "equal": [],
    "norm soft": ["quality.estimator=norm", "quality.usage=soft"],
    "recognizability soft": SOFT,
    "recognizability hard": ["quality.estimator=recognizability", "quality.usage=hard"],
    "true quality": ["quality.estimator=external", "quality.column=quality"],
    "recognizability soft + loss weight": [*SOFT, "quality.loss_weight=1"],
}
PAIRS = ("clean", "mixed", "low_quality")
RANKED = 0.3  # the share of the set whose images are ranked
COPIES = 256
KEY = ("share", "seed", "method", "steps")


def training_set(work: Path, share: float) -> Path:
    folder = work / f"faces-{round(100 * share)}"
    write_face_set(folder, identities=200, images_per_identity=16, seed=1, options=ImageOptions(degrade=share))
    return folder


def pair_sets(work: Path) -> list[Path]:
    """The three sets. Mixed takes the even pairs of the clean and the odd ones of the low-quality set, which have the same
    people and genuine pairs in the same places, so its folds are as balanced as theirs."""
    folder = work / "pairs"
    write_face_pairs(folder, kinds=("clean", "low_quality"), pairs=2000, identities=150)
    if not (folder / "mixed.bin").exists():
        (clean, same), (low, _) = read_bin(folder / "clean.bin"), read_bin(folder / "low_quality.bin")
        quality = [np.load(folder / f"{name}.quality.npy") for name in ("clean", "low_quality")]
        from_low = (np.arange(len(clean)) // 2) % 2 == 1
        np.save(folder / "mixed.quality.npy", np.where(from_low, quality[1], quality[0]))
        write_bin(folder / "mixed.bin", [b if use else a for a, b, use in zip(clean, low, from_low)], same.tolist())
    return [folder / f"{name}.bin" for name in PAIRS]


def one_run(work: Path, bins: list[Path], share: float, seed: int, method: str, steps: int) -> dict:
    """Train in a process of its own; the row of the table."""
    folder = work / "runs" / f"{round(100 * share)}-{seed}-{method.replace(' ', '_')}"
    shutil.rmtree(folder, ignore_errors=True)  # a run is short: one that was cut off starts anew
    command = [sys.executable, "-m", "protomem", "train", str(ROOT / "configs" / "results" / "quality_study.yaml")]
    command += [f"output={folder}", f"data.train={training_set(work, share)}", f"data.eval=[{','.join(map(str, bins))}]"]
    command += [f"train.seed={seed}", f"schedule.steps={steps}", f"schedule.warmup_steps={steps // 10}", *METHODS[method]]
    done = subprocess.run(command, cwd=ROOT, env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{folder.name} failed:\n{(done.stdout + done.stderr)[-2000:]}")
    row = {"share": share, "seed": seed, "method": method, "steps": steps}
    return row | final_figures(folder, PAIRS) | correlations(folder, training_set(work, RANKED))


@torch.no_grad()
def correlations(run: Path, data: Path) -> dict[str, float]:
    """Spearman's correlation of each score with the true quality, on the images of `data`."""
    settings, encoder, _ = load_run(run, torch.device("cpu"))
    records, size = open_records(data), settings.data.size
    encoded, truth = [records.bytes(i) for i in range(len(records))], records.column("quality")
    embeddings = torch.from_numpy(extract(encoder, encoded, device="cpu", size=size))
    chosen = encoded[:: len(encoded) // COPIES][:COPIES]
    images = torch.cat(list(eval_batches(chosen, COPIES, "auto", size=size)))
    copies = encoder(normalise(destroy(images, range(COPIES), COPIES, seed=0, step=0), channels_last=False))
    out = {}
    for estimator in ("norm", "recognizability"):
        quality = Quality(embeddings.shape[1], estimator=estimator)
        quality.see(copies, COPIES)
        scores = quality.scores(embeddings).numpy()
        for name, rows in (("all", truth >= 0), ("degraded", truth < 1)):
            out[f"spearman {estimator} {name}"] = float(spearmanr(scores[rows], truth[rows]).statistic)
    return out


def plot(lines: list[dict], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, len(PAIRS), figsize=(13, 4.2), layout="constrained")
    for panel, name in zip(axes, PAIRS):
        for number, method in enumerate(METHODS):
            found = [line for line in lines if line["method"] == method]
            # side by side, so that the error bars can be told apart
            x = [100 * line["share"] + 0.4 * (number - (len(METHODS) - 1) / 2) for line in found]
            y = [100 * line[f"{name} accuracy mean"] for line in found]
            error = [100 * (line[f"{name} accuracy std"] or 0) for line in found]
            panel.errorbar(x, y, error, fmt="o-", markersize=4, capsize=3, label=method)
        panel.set(title=f"{name.replace('_', ' ')} pairs", xlabel="degraded training images, %", ylabel="accuracy, %")
        panel.set_xticks(sorted({100 * line["share"] for line in lines}))
        panel.grid(alpha=0.3)
    handles = axes[0].get_legend_handles_labels()
    figure.legend(*handles, loc="outside lower center", ncols=len(METHODS), frameon=False, fontsize=9)
    figure.savefig(path, dpi=150)
    print(f"wrote {path}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder for quality_study*.csv and quality_study.png")
    parser.add_argument("--work", type=Path, required=True, help="folder for rendered faces and runs")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--shares", type=float, nargs="+", default=[0.0, 0.1, 0.3])
    parser.add_argument("--steps", type=int, default=600)
    parser.add_argument("--resume", action="store_true", help="keep the lines of finished runs")
    options = parser.parse_args()
    torch.set_num_threads(1)
    work, table = options.work.resolve(), options.out / "quality_study.csv"
    bins = pair_sets(work)
    for share in {*options.shares, RANKED}:
        training_set(work, share)
    rows = finished(table) if options.resume else []
    there = {tuple(row[name] for name in KEY) for row in rows}
    seeds = range(1, options.seeds + 1)  # outermost: what is there after an interruption covers all methods
    wanted = [(share, seed, method, options.steps) for seed in seeds for share in options.shares for method in METHODS]
    todo = [run for run in wanted if run not in there]
    with ThreadPoolExecutor(2) as pool:
        waiting = [pool.submit(one_run, work, bins, *run) for run in todo]
        for number, future in enumerate(as_completed(waiting), 1):
            try:
                rows.append(future.result())
            except BaseException:
                pool.shutdown(wait=False, cancel_futures=True)
                raise
            row = rows[-1]
            figures = "  ".join(f"{name} {100 * row[f'{name} accuracy']:.2f} %" for name in PAIRS)
            which = f"{100 * row['share']:.0f} % degraded, seed {row['seed']}, {row['method']}"
            print(f"{number}/{len(todo)}  {which}: {figures}")
            write_csv(table, rows)
    rows = [row for row in rows if tuple(row[name] for name in KEY) in set(wanted)]
    lines = summary(rows, ("share", "method"), METHODS, PAIRS)
    write_csv(options.out / "quality_study_summary.csv", lines)
    plot(lines, options.out / "quality_study.png")


if __name__ == "__main__":
    main()
