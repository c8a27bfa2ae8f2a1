"""The plan over world sizes and numbers of identities: a table and a picture."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from protomem.plan.case import Case
from protomem.plan.estimate import step
from protomem.plan.memory import rank_bytes

WORLDS = tuple(2**k for k in range(11))
IDENTITIES = tuple(10**k for k in range(5, 10))
COLOURS = ("#2563eb", "#0891b2", "#059669", "#d97706", "#db2777")
INK, PALE, GRID = "#1e293b", "#94a3b8", "#e2e8f0"


@dataclass(frozen=True)
class Cell:
    """bytes of a rank, images/s of all ranks (an estimate), and whether it fits."""

    world: int
    identities: int
    total: float
    images_per_s: float
    fits: bool


def table(case: Case) -> list[Cell]:
    """All of WORLDS x IDENTITIES, each rank with as many images as rank 0 has in `case`, but for batches that the config
    refuses (a memory smaller than the batch's identities)."""
    each = sum(row[0] for row in case.parts)
    cells = []
    for world in WORLDS:
        other = case.with_world(world).with_setting(f"train.batch_size={world * each}")
        if other is None:
            continue
        for identities in IDENTITIES:
            one = other.with_identities(identities)
            total = rank_bytes(one).total
            fits = total <= case.device.memory * 1e9
            cells.append(Cell(world, identities, total, step(one).images_per_s, fits))
    return cells


def method(case: Case) -> str:
    """A config in a few words."""
    c = case.config
    rows = {"classifier": "a full classifier", "sampled": f"a classifier, {c.prototypes.rate:g} of it a step"}
    rows["memory"] = f"a memory of {case.slots:,} slots"
    several = f" with {case.centers} sub-centres" if case.centers > 1 else ""
    return f"{c.encoder.name} ({c.encoder.precision}), {rows[case.source]}{several}, D = {case.size}"


def power(n: int) -> str:
    digits = "⁰¹²³⁴⁵⁶⁷⁸⁹"
    return "10" + "".join(digits[int(d)] for d in str(len(str(n)) - 1))


def plot(case: Case, cells: list[Cell], path: Path) -> None:
    """A PNG of two panels: GB of a rank, and images/s, against the number of ranks."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot, ticker

    style = {"font.size": 9, "axes.spines.top": False, "axes.spines.right": False, "axes.edgecolor": PALE, "text.color": INK}
    style |= {"axes.grid": True, "grid.color": GRID, "axes.axisbelow": True, "xtick.color": INK, "ytick.color": INK}
    with pyplot.rc_context(style):
        figure, (left, right) = pyplot.subplots(1, 2, figsize=(11, 4.2), layout="constrained")
        for identities, colour in zip(IDENTITIES, COLOURS):
            line = [c for c in cells if c.identities == identities]
            worlds, label = [c.world for c in line], f"{power(identities)} identities"
            left.plot(worlds, [c.total / 1e9 for c in line], color=colour, lw=1.6, label=label)
            # What does not fit is not drawn on the right: nothing would run there.
            right.plot(worlds, [c.images_per_s if c.fits else float("nan") for c in line], color=colour, lw=1.6, label=label)
            for axis, value in ((left, lambda c: c.total / 1e9), (right, lambda c: c.images_per_s)):
                for c in line:
                    if c.fits:
                        axis.plot(c.world, value(c), "o", ms=4, color=colour)
                    elif axis is left:
                        axis.plot(c.world, value(c), "x", ms=6, color=colour)
        memory = case.device.memory
        left.axhline(memory, color=INK, lw=1, ls="--")
        left.annotate(f"{case.device.name}: {memory:g} GB", (WORLDS[-1], memory), ha="right", va="bottom", fontsize=8)
        left.set_title("Bytes of a rank (x: does not fit)", loc="left", fontweight="bold", fontsize=10)
        right.set_title("Throughput, an estimate (where it fits)", loc="left", fontweight="bold", fontsize=10)
        left.set_ylabel("GB per rank")
        right.set_ylabel("images/s, all ranks")
        for axis in (left, right):
            axis.set_xscale("log", base=2)
            axis.set_yscale("log")
            axis.set_xticks(WORLDS, [str(w) for w in WORLDS])
            axis.minorticks_off()
            axis.yaxis.set_major_locator(ticker.LogLocator(subs=(1, 2, 5), numticks=20))
            axis.yaxis.set_major_formatter(ticker.FuncFormatter(lambda value, _: f"{value:,.0f}"))
            axis.set_xlabel("ranks")
        right.legend(frameon=False, fontsize=8)
        what = f"{method(case)}, {sum(row[0] for row in case.parts)} images a rank, {case.device.name}, {case.fabric.name}"
        figure.suptitle(what, x=0.01, ha="left", fontsize=9, color=INK)
        path.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path, dpi=130)
        pyplot.close(figure)
