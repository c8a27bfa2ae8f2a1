"""What people see of a run: a line for a step, a line for an event, a progress bar."""

from __future__ import annotations

import math


def step_line(step: int, total_steps: int, values: dict, eta_s: float) -> str:
    """`step 1200/20000  loss 12.345  lr 0.02  1843 images/s  wait 3%  mem 1.2 GB  eta 1:23:45`"""
    parts = [f"step {step:>{len(str(total_steps))}}/{total_steps}"]
    for key, form in (
        ("loss", "loss {:.4f}"),
        ("lr", "lr {:.4g}"),
        ("images_per_s", "{:.0f} images/s"),
        ("data_wait", "wait {:.0%}"),
        ("memory_gb", "mem {:.1f} GB"),
    ):
        if key in values:
            parts.append(form.format(values[key]))
    if eta_s > 0 or step >= total_steps:
        minutes, seconds = divmod(round(eta_s), 60)
        parts.append(f"eta {minutes // 60}:{minutes % 60:02}:{seconds:02}")
    return "  ".join(parts)


def event_line(kind: str, values: dict) -> str:
    """One readable line for an event; evaluations in per cent."""
    rest = dict(values)
    parts = [kind]
    if "step" in rest:
        parts.append(f"step {rest.pop('step')}")
    if kind == "evaluation" and "accuracy" in rest:
        name = " ".join(str(rest[k]) for k in ("tag", "name") if k in rest)
        parts.append(name + (" (rendered)" if rest.get("rendered") else ""))
        parts.append(f"accuracy {100 * rest['accuracy']:.2f} ± {100 * rest.get('accuracy_std', math.nan):.2f} %")
        for key, name in (("tar@1e-3", "TAR@FAR=1e-3"), ("auc", "AUC"), ("eer", "EER")):
            value = rest.get(key, math.nan)
            parts.append(f"{name} " + ("-" if math.isnan(value) else f"{100 * value:.2f} %"))
        return "  ".join(parts)
    if kind == "templates":
        parts.append(f"pooled by {rest['pooling']}")
        names = {"tar@1e-5": "TAR@FAR=1e-5", "tar@1e-4": "1e-4", "tar@1e-3": "1e-3", "tar@1e-2": "1e-2", "auc": "AUC", "eer": "EER"}
        for key, name in names.items():
            parts.append(f"{name} " + ("-" if math.isnan(rest[key]) else f"{100 * rest[key]:.2f} %"))
        return "  ".join([*parts, f"{rest['pairs']} pairs"])
    parts += [f"{k} {v:.4g}" if isinstance(v, float) else f"{k} {v}" for k, v in rest.items()]
    return "  ".join(parts)


def start_progress(total_steps: int, done: int):
    from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeElapsedColumn

    progress = Progress(TextColumn("training"), BarColumn(None), TaskProgressColumn(), TimeElapsedColumn())
    progress.add_task("training", total=total_steps, completed=done)
    progress.start()
    return progress
