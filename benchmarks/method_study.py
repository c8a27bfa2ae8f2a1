"""The methods compared on rendered faces: each from its config in configs/methods/, on 2 ranks, for equally many images.

    python benchmarks/method_study.py --out benchmarks/results --work runs/method_study --resume
    python benchmarks/method_study.py --out DIR --work DIR --seeds 1 --steps 20 --methods arcface magface   # a quick look

200 people x 16 images, 30 % of them degraded; pairs of unseen people: clean, cross-pose, low quality. All runs share data,
encoder, batch, steps and learning rate (configs/results/method_study.yaml); what a method counts in units of a large training is scaled
to these 600 steps (`scaled`). CPU time of each run is that of both ranks, final evaluation included. For every method the
correlation (Spearman) of the embedding norm with the true quality is taken over the images of the low-quality pairs.
These are rendered faces and a small network: the figures say how the methods behave here, not what they reach on photographs.
"""

from __future__ import annotations

import argparse
import os
import resource
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import numpy as np
from scipy.stats import spearmanr

from benchmarks.common import write_csv
from benchmarks.study import final_figures, finished, summary
from protomem.data.faces import ImageOptions, write_face_pairs, write_face_set

PAIRS = ("clean", "cross_pose", "low_quality")
DEGRADED = 0.3
IDENTITIES, IMAGES = 200, 16
METHODS = (
    "arcface", "arcface with dropout", "cosface", "prototype_memory", "quality_aware_prototype_memory", "vpl_arcface", "epl_cosface", "magface", "coreface",
    "magface_qapm_vpl", "coreface_epl",
)  # fmt: skip
KEY = ("method", "seed", "steps")


def data(work: Path) -> tuple[Path, list[Path]]:
    """(training set, pair sets); made at the first call."""
    folder = work / "faces"
    options = ImageOptions(degrade=DEGRADED)
    write_face_set(folder, identities=IDENTITIES, images_per_identity=IMAGES, seed=1, options=options)
    write_face_pairs(work / "pairs", kinds=PAIRS, pairs=2000, identities=150)
    return folder, [work / "pairs" / f"{name}.bin" for name in PAIRS]


def scaled(method: str, steps: int) -> list[str]:
    """What the method's config counts in units of a large training, for these few steps.

    In the published trainings VPL starts after a tenth and has most identities in play, EPL starts after a seventh and
    CoReFace after a third. MagFace's norms are those of 512 features, these of 128 are half as long; its weight stays 1.55
    times the bound. Dropout is milder, since the encoder is small; ArcFace with this dropout is there as their control.
    """
    epochs = steps * 64 / (IDENTITIES * IMAGES)
    injection = [f"prototypes.injection.start={steps // 10}", "prototypes.injection.steps=50"]
    empirical = [f"prototypes.empirical.start_epoch={epochs / 7:.3f}"]
    contrast = [f"contrast.start_epoch={epochs / 3:.3f}", "contrast.dropout=0.4", "encoder.dropout=0.2"]
    magnitude = [f"margin.magnitude.{k}" for k in ("lower=5", "upper=55", "weight=8.75")] + ["encoder.dropout=0.2"]
    memory = ["prototypes.memory.size=192"]  # nearly all of the 200 people: slots of others would stay empty
    own = {
        "arcface with dropout": ["encoder.dropout=0.2"],
        "prototype_memory": memory,
        "quality_aware_prototype_memory": memory,
        "vpl_arcface": injection,
        "epl_cosface": empirical,
        "magface": magnitude,
        "coreface": contrast,
        "magface_qapm_vpl": memory + injection + magnitude,
        "coreface_epl": empirical + contrast,
    }
    return ["margin.scale=32", *own.get(method, ())]


def one_run(work: Path, method: str, seed: int, steps: int) -> dict:
    """Train on 2 ranks; the row of the table."""
    train, bins = data(work)
    folder = work / "runs" / f"{method.replace(' ', '_')}-{seed}-{steps}"
    shutil.rmtree(folder, ignore_errors=True)  # a run is short: one that was cut off starts anew
    configs = [str(ROOT / "configs" / path) for path in ("results/method_study.yaml", f"methods/{method.split()[0]}.yaml")]
    command = [str(ROOT / "launch" / "local.sh"), "2", *configs, f"output={folder}", f"data.train={train}"]
    command += [f"data.eval=[{','.join(map(str, bins))}]", f"train.seed={seed}", f"schedule.steps={steps}"]
    command += [f"schedule.warmup_steps={steps // 10}", *scaled(method, steps)]
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHON": sys.executable}
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{folder.name} failed:\n{(done.stdout + done.stderr)[-2000:]}")
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    cpu = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    norms, quality = norms_and_quality(folder)
    rank = float(spearmanr(norms, quality).statistic)
    return {"method": method, "seed": seed, "steps": steps, **final_figures(folder, PAIRS), "spearman norm": rank, "cpu s": cpu}


def norms_and_quality(run: Path) -> tuple[np.ndarray, np.ndarray]:
    """Embedding norm and true quality of every image of the low-quality pairs, none of which was trained on."""
    with np.load(run / "evaluations" / "final.low_quality.npz", allow_pickle=False) as stored:
        return stored["norms"], stored["quality"]


def plot(lines: list[dict], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, len(PAIRS), figsize=(13, 4.4), layout="constrained", sharey=True)
    rows = np.arange(len(lines))[::-1]
    for panel, name in zip(axes, PAIRS):
        x = [100 * line[f"{name} accuracy mean"] for line in lines]
        error = [100 * (line[f"{name} accuracy std"] or 0) for line in lines]
        panel.errorbar(x, rows, xerr=error, fmt="o", capsize=3, color="#2563eb")
        panel.set(title=f"{name.replace('_', ' ')} pairs", xlabel="accuracy, % (mean and std over seeds)")
        panel.set_yticks(rows, [line["method"].replace("_", " ") for line in lines])
        panel.grid(alpha=0.3)
    figure.suptitle("Rendered faces, 30 % degraded; unseen people", fontsize=10)
    figure.savefig(path, dpi=150)
    print(f"wrote {path}")


def plot_magnitude(work: Path, steps: int, methods: tuple[str, ...], path: Path) -> None:
    """Norm against true quality, seed 1: a method whose margin depends on the norm beside one whose margin does not."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, len(methods), figsize=(4.6 * len(methods), 3.8), layout="constrained", squeeze=False)
    for panel, method in zip(axes[0], methods):
        norms, quality = norms_and_quality(work / "runs" / f"{method}-1-{steps}")
        rank = spearmanr(norms, quality).statistic
        panel.scatter(quality, norms, s=3, alpha=0.25, color="#2563eb", linewidths=0)
        edges = np.quantile(quality, np.linspace(0, 1, 11))
        inside = np.clip(np.searchsorted(edges, quality, side="right") - 1, 0, 9)
        tenths = [inside == k for k in range(10) if (inside == k).any()]
        panel.plot([quality[t].mean() for t in tenths], [np.median(norms[t]) for t in tenths], "o-", color="#d97706", label="median")
        panel.set(title=f"{method.replace('_', ' ')}: Spearman {rank:.2f}", xlabel="true quality", ylabel="embedding norm")
        panel.legend(frameon=False)
        panel.grid(alpha=0.3)
    figure.savefig(path, dpi=150)
    print(f"wrote {path}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder for method_study*.csv and .png")
    parser.add_argument("--work", type=Path, required=True, help="folder for rendered faces and runs")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=600)
    parser.add_argument("--methods", nargs="+", default=list(METHODS), choices=list(METHODS))
    parser.add_argument("--resume", action="store_true", help="keep the lines of finished runs")
    parser.add_argument("--data-only", action="store_true", help="make the data and stop")
    options = parser.parse_args()
    work, table = options.work.resolve(), options.out / "method_study.csv"
    data(work)
    if options.data_only:
        return
    rows = finished(table) if options.resume else []
    there = {tuple(row[name] for name in KEY) for row in rows}
    wanted = [(m, seed, options.steps) for seed in range(1, options.seeds + 1) for m in options.methods]
    todo = [run for run in wanted if run not in there]
    for number, run in enumerate(todo, 1):
        rows.append(one_run(work, *run))
        row = rows[-1]
        figures = "  ".join(f"{name} {100 * row[f'{name} accuracy']:.2f} %" for name in PAIRS)
        print(f"{number}/{len(todo)}  {row['method']}, seed {row['seed']}: {figures}  {row['cpu s']:.0f} s", flush=True)
        write_csv(table, rows)
    lines = summary([row for row in rows if tuple(row[name] for name in KEY) in set(wanted)], ("method",), options.methods, PAIRS)
    write_csv(options.out / "method_study_summary.csv", lines)
    plot(lines, options.out / "method_study.png")
    shown = tuple(m for m in ("arcface", "magface") if m in options.methods)
    if shown:
        plot_magnitude(work, options.steps, shown, options.out / "magnitude_quality.png")


if __name__ == "__main__":
    main()
