"""The report of a run: one HTML file that needs no network, made from what the run left in its folder.

A run folder holds: metrics.jsonl, config.yaml, environment.json (`protomem.metrics.RunLog`), and evaluations/ with one
file per tag and pair set (`save_evaluation`). `write_report` adds report.html and report/*.png.
"""

from __future__ import annotations

import io
import json
import math
from pathlib import Path

import numpy as np

from protomem import report_page, report_plots
from protomem.environment import environment
from protomem.errors import UserError
from protomem.evaluate.verification import FARS, Verification, far_name
from protomem.files import parse_json, read_arrays, read_json, replace_file
from protomem.metrics import read_metrics
from protomem.redact import hide

__all__ = ["environment", "extreme_pairs", "load_evaluations", "save_evaluation", "write_report"]

THUMBNAILS = 4  # pairs shown of each kind (our default)


def save_evaluation(run_folder, tag: str, results: dict[str, Verification], encoded: dict[str, list[bytes]]) -> None:
    """Store results as `run_folder/evaluations/<tag>.<set>.npz`; call on the main rank only.

    tag: "initial" (untrained encoder), "step-1234" or "final". encoded[set]: the images of the pairs, as `read_bin`
    gives them; the 4 best and worst pairs of each kind are kept as thumbnails.
    """
    folder = Path(run_folder) / "evaluations"
    folder.mkdir(parents=True, exist_ok=True)
    for name, result in results.items():
        pairs, kinds = extreme_pairs(result.scores, result.same)
        images = [encoded[name][2 * pair + side] for pair in pairs for side in (0, 1)]
        arrays = {
            "summary": np.array(json.dumps(result.summary())),
            "scores": result.scores,
            "same": result.same,
            "norms": result.norms,
            "quality": np.zeros(0) if result.quality is None else result.quality,
            "fold_accuracies": result.fold_accuracies,
            "thumbnail_pairs": np.array(pairs, np.int64),
            "thumbnail_kinds": np.array(kinds, "U16"),
            "thumbnail_sizes": np.array([len(image) for image in images], np.int64),
            "thumbnail_bytes": np.frombuffer(b"".join(images), np.uint8),
        }
        file = io.BytesIO()
        np.savez_compressed(file, **arrays)
        replace_file(folder / f"{tag}.{name}.npz", file.getvalue())


def extreme_pairs(scores, same, count: int = THUMBNAILS) -> tuple[list[int], list[str]]:
    """The `count` pairs of each kind, most extreme first: (pair numbers, their kinds)."""
    rising = np.argsort(scores, kind="stable")
    genuine, impostors = rising[same[rising]], rising[~same[rising]]
    chosen = {
        "worst_genuine": genuine[:count],
        "worst_impostor": impostors[::-1][:count],
        "best_genuine": genuine[::-1][:count],
        "best_impostor": impostors[:count],
    }
    return [int(p) for ps in chosen.values() for p in ps], [kind for kind, ps in chosen.items() for _ in ps]


def load_evaluations(run_folder) -> dict[str, dict[str, dict]]:
    """{set: {tag: arrays}}: sets by name, their tags in the order initial, steps, final."""

    def order(path):
        tag, name = path.stem.split(".", 1)
        return name, {"initial": -1, "final": math.inf}.get(tag, int(tag[5:]) if tag[5:].isdecimal() else 0)

    found = {}
    for path in sorted((Path(run_folder) / "evaluations").glob("*.*.npz"), key=order):
        tag, name = path.stem.split(".", 1)
        try:
            data = read_arrays(path)
            data["summary"] = parse_json(str(data["summary"]))
            _check(data)
        except (OSError, ValueError, KeyError) as error:
            raise UserError(f"{path} is no stored evaluation ({error}); delete it, or evaluate again") from None
        found.setdefault(name, {})[tag] = data
    return found


def _check(data: dict) -> None:
    """Raises ValueError, or KeyError, for arrays that `save_evaluation` does not write."""
    n, pictures = data["scores"].size, data["thumbnail_sizes"]
    shapes = {"scores": (n,), "same": (n,), "norms": (2 * n,), "thumbnail_pairs": (pictures.size // 2,)}
    shapes |= {"thumbnail_kinds": (pictures.size // 2,), "thumbnail_sizes": (pictures.size // 2 * 2,)}
    for name, shape in shapes.items():
        if data[name].shape != shape:
            raise ValueError(f"{name} has shape {data[name].shape}")
    forms = {"scores": "f", "norms": "f", "same": "b", "quality": "fiub", "thumbnail_pairs": "i", "thumbnail_sizes": "i"}
    for name, kinds in (forms | {"thumbnail_bytes": "u", "thumbnail_kinds": "U", "fold_accuracies": "f"}).items():
        if data[name].dtype.kind not in kinds:
            raise ValueError(f"{name} is {data[name].dtype}")
    if not (n and (np.abs(data["scores"]) <= 1.001).all() and (data["norms"] >= 0).all() and np.isfinite(data["norms"]).all()):
        raise ValueError("scores are no cosines, or norms no lengths")
    if data["quality"].shape not in ((0,), (2 * n,)) or set(data["thumbnail_kinds"].tolist()) - report_page.KINDS.keys():
        raise ValueError("quality or thumbnail_kinds do not fit")
    if not ((data["thumbnail_pairs"] >= 0) & (data["thumbnail_pairs"] < n)).all() or (pictures < 0).any():
        raise ValueError("thumbnail_pairs or thumbnail_sizes are out of range")
    numbers = {"accuracy", "accuracy_std", "auc", "eer", "threshold", "pairs", *(f"tar@{far_name(far)}" for far in FARS)}
    summary = data["summary"]
    if not isinstance(summary, dict) or any(type(summary[name]) not in (int, float) for name in numbers):
        raise ValueError("its summary is not one")
    if any(math.isinf(summary[name]) for name in numbers):
        raise ValueError("its summary is not finite")


def _machine(path: Path) -> dict:
    """What environment.json tells; nothing where it is missing or damaged."""
    try:
        found = read_json(path)
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def write_report(run_folder) -> Path:
    """Write report.html (one file, pictures inside) and report/*.png; return the path of the page.

    Works on a running, a stopped and a finished run, and leaves out what the run did not log; a stored evaluation
    counts if the log has its event (tag, name). An older page stays in place until the new one is complete. Raises
    UserError if the folder holds neither a log nor an evaluation.
    """
    folder = Path(run_folder)
    records, evaluations = read_metrics(folder), load_evaluations(folder)
    if not records and not evaluations:
        raise UserError(f"{folder} holds no run to report on: no metrics.jsonl, no evaluations/*.npz")
    steps, events = [r for r in records if "event" not in r], [r for r in records if "event" in r]
    if records:  # a resume cuts the log back: results of lost steps lie about until they are made again
        logged = {(e.get("name"), e.get("tag")) for e in events if e["event"] == "evaluation"}
        evaluations = {
            name: current
            for name, tags in evaluations.items()
            if (current := {tag: data for tag, data in tags.items() if (name, tag) in logged})
        }
    environment_file, config_file = folder / "environment.json", folder / "config.yaml"
    machine = _machine(environment_file)
    config = hide(config_file.read_text(encoding="utf-8", errors="replace")) if config_file.exists() else ""
    (folder / "report").mkdir(exist_ok=True)
    figures = report_plots.draw(folder / "report", steps, events, evaluations)
    name = folder.resolve().name
    sections = [
        report_page.head(name, records, machine),
        report_page.headline(evaluations),
        report_page.figures("Verification", figures, ("roc", "reject")),
        report_page.figures("", figures, ("histograms",), wide=True),
        report_page.figures("Training", figures, ("loss", "accuracy", "speed")),
        report_page.figures("", figures, ("others",), wide=True),
        report_page.figures("Prototype memory", figures, ("memory",), wide=True),
        report_page.thumbnails(evaluations),
        report_page.events(events),
        report_page.details(config, machine),
    ]
    target = folder / "report.html"
    replace_file(target, report_page.page(name, sections).encode())
    return target
