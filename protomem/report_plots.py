"""The figures of a run report, with matplotlib. One colour per pair set; the untrained encoder is dashed or grey."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from protomem.evaluate.verification import FARS, error_versus_reject, roc

COLOURS = ("#2563eb", "#d97706", "#059669", "#db2777", "#7c3aed", "#0891b2", "#65a30d", "#dc2626", "#475569", "#a16207")
INK, PALE, GRID = "#1e293b", "#94a3b8", "#e2e8f0"
GENUINE, IMPOSTOR = "#059669", "#dc2626"
STYLE = {
    "font.size": 9,
    "axes.titlesize": 10,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.edgecolor": PALE,
    "axes.labelcolor": INK,
    "axes.grid": True,
    "axes.axisbelow": True,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "grid.color": GRID,
    "xtick.color": INK,
    "ytick.color": INK,
    "text.color": INK,
    "legend.frameon": True,
    "legend.framealpha": 0.85,
    "legend.edgecolor": "white",
    "legend.fontsize": 8,
    "figure.facecolor": "white",
    "savefig.dpi": 150,
}
SHOWN = {"step", "time", "loss", "lr", "images_per_s", "data_wait"}  # values with a figure of their own
LINE, WIDE = (6.2, 3.2), 12.8  # inches
MOST_PANELS = 64  # of values without a figure of their own (our default)

# Panels of the figure `memory`: title; left axis and its values with their names; right axis and its value, if any.
MEMORY_PANELS = (
    (
        "Slots in use",
        ("slots", {"memory_occupied": "in use", "memory_size": "in all"}),
        ("identities refreshed, %", "memory_refreshed"),
    ),
    (
        "Age of the prototypes",
        ("steps since written", {"memory_age_max": "oldest", "memory_age_mean": "mean"}),
        None,
    ),
    ("New against old at refresh (high is good)", ("cosine", {"refresh_cos": "refreshed prototypes"}), None),
    (
        "Own and other prototypes (far apart is good)",
        ("cosine", {"cos_y": "own", "cos_hardest": "hardest negative"}),
        None,
    ),
    (
        "Image quality (a wide band is good)",
        ("quality", {"quality_q90": "90 % quantile", "quality_q50": "median", "quality_q10": "10 % quantile"}),
        None,
    ),
    (
        "Loss of the lowest tenth (10 % is neutral)",
        ("share of the loss, %", {"loss_lowest_decile": "tenth of lowest quality"}),
        ("identities with equal weights", "fallbacks"),
    ),
)
MEMORY = {key for _, (_, left), right in MEMORY_PANELS for key in (*left, *(right or ())[1:])}
MEMORY_LOOKS = {
    "memory_size": {"color": PALE, "linestyle": "--"},
    "quality_q90": {"color": COLOURS[0], "alpha": 0.4},
    "quality_q50": {"color": COLOURS[0]},
    "quality_q10": {"color": COLOURS[0], "alpha": 0.4},
}
SHARES = {"memory_refreshed", "loss_lowest_decile"}  # logged in 0..1, shown in per cent


def draw(
    folder: Path, steps: list[dict], events: list[dict], evaluations: dict[str, dict[str, dict]]
) -> dict[str, Path]:
    """Save every figure for which there are data as `folder/<name>.png`; {name: path}. See the functions below."""
    import matplotlib

    results = [e for e in events if e["event"] == "evaluation" and e.get("accuracy") is not None and "step" in e]
    with matplotlib.rc_context(STYLE):
        figures = {}
        if any("loss" in r for r in steps):
            figures["loss"] = loss_figure(steps)
        if any("images_per_s" in r for r in steps):
            figures["speed"] = speed_figure(steps)
        logged = {k for r in steps for k in r}
        if logged & MEMORY - {"cos_y"}:  # every other source of prototypes has a cos_y, too
            figures["memory"] = memory_figure(steps)
            logged -= MEMORY
        if others := sorted(logged - SHOWN)[:MOST_PANELS]:
            figures["others"] = others_figure(steps, others)
        if len({e["step"] for e in results}) > 1:
            figures["accuracy"] = accuracy_figure(results)
        if evaluations:
            figures["roc"] = roc_figure(evaluations)
            figures["reject"] = reject_figure(evaluations)
            figures["histograms"] = histogram_figure(evaluations)
        paths = {name: folder / f"{name}.png" for name in figures}
        for name, figure in figures.items():
            figure.savefig(paths[name], format="png")
    return paths


def new_figure(columns: int = 1, rows: int = 1, size=LINE, **kwargs):
    """(figure, axes) without pyplot: no display and no global state is touched."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=size, layout="constrained")
    return figure, figure.subplots(rows, columns, **kwargs)


def plain(name: str) -> str:
    """A name as it is: matplotlib takes what stands between two dollars for a formula, and fails where it is none."""
    return name.replace("$", r"\$")


def series(steps: list[dict], key: str) -> tuple[np.ndarray, np.ndarray]:
    """The steps at which a value was logged and the values; values that were not finite (null) are NaN."""
    rows = [(r["step"], np.nan if r[key] is None else r[key]) for r in steps if key in r]
    return (np.array([s for s, _ in rows]), np.array([v for _, v in rows], float)) if rows else (np.zeros(0),) * 2


def smooth(values: np.ndarray, window: int) -> np.ndarray:
    """Centred running mean over `window` values, NaN left out."""
    ok = np.isfinite(values)
    kernel = np.ones(window)
    count = np.convolve(ok, kernel, "same")
    total = np.convolve(np.where(ok, values, 0), kernel, "same")
    return np.divide(total, count, out=np.full(len(values), np.nan), where=count > 0)


def loss_figure(steps: list[dict]):
    figure, axis = new_figure()
    x, loss = series(steps, "loss")
    marker = "o" if len(x) < 3 else None
    if len(x) >= 60:
        axis.plot(x, loss, color=COLOURS[0], alpha=0.25, linewidth=0.8)
        axis.plot(x, smooth(loss, len(x) // 30 | 1), color=COLOURS[0], linewidth=1.6)
    else:
        axis.plot(x, loss, color=COLOURS[0], linewidth=1.6, marker=marker)
    axis.set(title="Training loss and learning rate", xlabel="step", ylabel="loss")
    x, rate = series(steps, "lr")
    if len(x):
        right = axis.twinx()
        right.plot(x, rate, color=PALE, linewidth=1.2, linestyle="--", marker=marker)
        right.set_ylabel("learning rate (dashed)", color="#64748b")
        right.set_ylim(0)
        right.grid(False)
    return figure


def speed_figure(steps: list[dict]):
    figure, axis = new_figure()
    x, speed = series(steps, "images_per_s")
    axis.plot(x, speed, color=COLOURS[2], linewidth=1.4, marker="o" if len(x) < 3 else None)
    axis.set(title="Throughput and waiting for data", xlabel="step", ylabel="images/s, all ranks")
    axis.set_ylim(0)
    x, wait = series(steps, "data_wait")
    if len(x):
        right = axis.twinx()
        right.fill_between(x, 100 * wait, color=COLOURS[1], alpha=0.25, linewidth=0)
        right.set_ylabel("time spent waiting for data, %", color=COLOURS[1])
        right.set_ylim(0, max(10.0, 130 * float(np.nanmax(wait, initial=0))))
        right.grid(False)
    return figure


def others_figure(steps: list[dict], names: list[str]):
    """A small panel for every other value that the run logged."""
    columns = min(max(len(names), 2), 4)
    rows = -(-len(names) // columns)
    figure, axes = new_figure(columns, rows, size=(WIDE, 1.8 * rows + 0.3), squeeze=False)
    for axis in axes.flat[len(names) :]:
        axis.set_visible(False)
    for axis, name in zip(axes.flat, names):
        axis.plot(*series(steps, name), color=COLOURS[4], linewidth=1.2)
        axis.set_title(plain(name))
    return figure


def memory_figure(steps: list[dict]):
    """Panels on the state of a prototype memory and on the qualities it weights by; those without values are left out."""
    values = {key: _finite(steps, key) for key in MEMORY}
    panels = [
        (title, left, right)
        for title, left, right in MEMORY_PANELS
        if any(len(values[key][0]) for key in (*left[1], *(right or ())[1:]))
    ]
    columns = min(max(len(panels), 2), 3)
    rows = -(-len(panels) // columns)
    figure, axes = new_figure(columns, rows, size=(WIDE, 2.5 * rows), squeeze=False)
    for axis in axes.flat[len(panels) :]:
        axis.set_visible(False)
    for axis, (title, (label, names), right) in zip(axes.flat, panels):
        axis.set(title=title, xlabel="step")
        names = {key: name for key, name in names.items() if len(values[key][0])}
        for key, colour in zip(names, COLOURS):
            _line(axis, *values[key], label=names[key], **{"color": colour} | MEMORY_LOOKS.get(key, {}))
        if {"quality_q10", "quality_q90"} <= set(names):
            (x, low), (other_x, high) = values["quality_q10"], values["quality_q90"]
            axis.fill_between(x, low, np.interp(x, other_x, high), color=COLOURS[0], alpha=0.15, linewidth=0)
        if len(names) > 1:
            axis.legend()
        if names:
            axis.set_ylabel(label)
        else:
            axis.set_yticks([])
        if label not in ("cosine", "quality"):  # counts and shares
            axis.set_ylim(0, 1.08 * max((values[key][1].max() for key in names), default=0) or 1)
        if right and len(values[right[1]][0]):
            x, y = values[right[1]]
            other = axis.twinx()
            _line(other, x, smooth(y, len(y) // 30 | 1), color=COLOURS[1])  # counts of single batches: they jump
            other.set_ylabel(right[0], color=COLOURS[1])
            other.set_ylim(0, 1.08 * y.max() or 1)
            other.grid(False)
    return figure


def _finite(steps: list[dict], key: str) -> tuple[np.ndarray, np.ndarray]:
    """As `series`, without the steps at which there was nothing to measure, and shares in per cent."""
    x, y = series(steps, key)
    ok = np.isfinite(y)
    return x[ok], y[ok] * (100 if key in SHARES else 1)


def _line(axis, x, y, **look):
    axis.plot(x, y, linewidth=1.2, marker="o" if len(x) < 3 else None, **look)


def accuracy_figure(evaluations: list[dict]):
    """Accuracy of every set over the steps; `evaluations` are the log's events."""
    figure, axis = new_figure()
    names = sorted({e["name"] for e in evaluations})
    for colour, name in zip(_colours(names), names):
        mine = sorted((e["step"], e["accuracy"], e.get("accuracy_std") or 0) for e in evaluations if e["name"] == name)
        x, y, spread = np.array(mine).T * np.array([[1], [100], [100]])
        axis.plot(x, y, color=colour, marker="o", markersize=3, label=plain(name))
        axis.fill_between(x, y - spread, y + spread, color=colour, alpha=0.12, linewidth=0)
    axis.set(title="Verification accuracy, band: ± std of the folds", xlabel="step", ylabel="accuracy, %")
    axis.legend()
    return figure


def roc_figure(evaluations: dict[str, dict[str, dict]]):
    figure, axis = new_figure()
    lowest = 0.1
    for colour, (name, tags) in zip(_colours(evaluations), evaluations.items()):
        for tag, _, style in _first_and_last(tags):
            data = tags[tag]
            far, tar, _ = roc(data["scores"], data["same"])
            if np.isnan(far).any() or np.isnan(tar).any():
                continue
            lowest = min(lowest, 1 / np.sum(~data["same"]))
            look = {"linewidth": 1.6, "label": plain(name)} if style == "-" else {"linewidth": 1, "alpha": 0.6}
            axis.step(far, 100 * tar, where="post", color=colour, linestyle=style, **look)
    grid = np.geomspace(lowest, 1, 50)
    axis.plot(grid, 100 * grid, color=PALE, linestyle=":", linewidth=1)
    both = any(len(_first_and_last(tags)) == 2 for tags in evaluations.values())
    axis.set(title="ROC (dashed: untrained encoder)" if both else "ROC")
    axis.set(xscale="log", xlim=(lowest, 1), ylim=(0, 101))
    axis.set(xlabel="false accept rate (FAR), from one false accept on", ylabel="true accept rate (TAR), %")
    if axis.get_legend_handles_labels()[0]:
        axis.legend(loc="lower right")
    return figure


def histogram_figure(evaluations: dict[str, dict[str, dict]]):
    """One panel per set and shown tag: the cosines of genuine and impostor pairs, and the mean threshold."""
    shown = [(name, _first_and_last(tags)) for name, tags in evaluations.items()]
    most = max(len(tags) for _, tags in shown)
    columns = most if len(shown) <= 2 else min(len(shown), 4)  # one or two sets: before and after side by side
    rows = len(shown) if len(shown) <= 2 else most * -(-len(shown) // columns)
    figure, axes = new_figure(columns, rows, size=(WIDE, 1.9 * rows + 0.5), squeeze=False, sharex=True)
    for axis in axes.flat:
        axis.set_visible(False)
    for i, (name, tags) in enumerate(shown):
        for k, (tag, label, _) in enumerate(tags):
            place = (i, k) if len(shown) <= 2 else (most * (i // columns) + k, i % columns)
            axis, data = axes[place], evaluations[name][tag]
            axis.set_visible(True)
            bins = np.linspace(np.floor(data["scores"].min() * 10) / 10, 1, 61)
            for kind, colour in ((data["same"], GENUINE), (~data["same"], IMPOSTOR)):
                if kind.any():
                    weights = np.full(kind.sum(), 100 / kind.sum())
                    axis.hist(data["scores"][kind], bins, weights=weights, color=colour, alpha=0.55)
            axis.axvline(1 - data["summary"]["threshold"] / 2, color=INK, linewidth=1, linestyle="--")
            axis.set_title(f"{plain(name)}, {label}")
            axis.tick_params(labelleft=False, left=False, labelbottom=True)
            axis.grid(False)
    figure.suptitle(
        "Cosines of genuine (green) and impostor (red) pairs; dashed: mean threshold of the folds", fontsize=10
    )
    return figure


def reject_far(evaluations: dict[str, dict[str, dict]]) -> float:
    """The lowest FAR at which every set's threshold rests on five false accepts or more; 0.1 if there is none."""
    impostors = min(np.sum(~tags[list(tags)[-1]]["same"]) for tags in evaluations.values())
    return min((far for far in FARS if far * impostors >= 5), default=max(FARS))


def reject_figure(evaluations: dict[str, dict[str, dict]]):
    """False non-match rate when the pairs are rejected whose weaker image has the lowest quality; newest results."""
    figure, axis = new_figure()
    far = reject_far(evaluations)
    for colour, (name, tags) in zip(_colours(evaluations), evaluations.items()):
        data = tags[list(tags)[-1]]
        looks = {"norms": {"label": plain(name), "linewidth": 1.6}, "quality": {"linestyle": ":", "linewidth": 1.2}}
        for source, look in looks.items():
            if len(data[source]):
                quality = data[source].reshape(-1, 2).min(1)
                shares, rates = error_versus_reject(data["scores"], data["same"], quality, far)
                axis.plot(100 * shares, 100 * rates, color=colour, **look)
    known = any(len(tags[list(tags)[-1]]["quality"]) for tags in evaluations.values())
    by = "embedding norm (dotted: known quality)" if known else "embedding norm"
    axis.set(title=f"Error versus reject, threshold at FAR = {far:g}", xlim=(0, 95))
    axis.set(xlabel=f"genuine pairs rejected by {by}, %", ylabel="false non-match rate, %")
    axis.set_ylim(0)
    axis.legend()
    return figure


def _colours(names):
    return [COLOURS[i % len(COLOURS)] for i in range(len(names))]


def _first_and_last(tags: dict) -> list[tuple[str, str, str]]:
    """(tag, label, line style) of the untrained encoder, if it was evaluated, and of the newest one."""
    last = list(tags)[-1]
    if last == "initial":
        return [("initial", "untrained", "-")]
    label = "trained" if last == "final" else last.replace("-", " ")
    return ([("initial", "untrained", "--")] if "initial" in tags else []) + [(last, label, "-")]
