"""What `protomem plan` prints: tables for people (plain where there is no terminal), or JSON."""

from __future__ import annotations

import json
import sys

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from protomem.plan import advice
from protomem.plan.case import Case
from protomem.plan.collectives import collectives
from protomem.plan.estimate import phases, step
from protomem.plan.hardware import (
    ENCODER_EFFICIENCY,
    GEMM_EFFICIENCY,
    LAUNCH_US,
    LINKS,
    NODE,
    OVERLAP,
)
from protomem.plan.memory import host_bytes, rank_bytes
from protomem.plan.scale import IDENTITIES, WORLDS, Cell, method, power


def title(case: Case) -> str:
    b = sum(row[0] for row in case.parts)
    cut = f" in {len(case.parts)} micro-batches" if len(case.parts) > 1 else ""
    return (
        f"{method(case)}, {case.identities:,} identities, batch {case.config.train.batch_size} ({b} a rank{cut}), "
        f"{case.world} x {case.device.name}"
    )


def as_dict(case: Case) -> dict:
    """Everything that the tables say, in bytes and seconds."""
    needed, whole = rank_bytes(case), step(case)
    found = {
        "title": title(case),
        "identities": case.identities,
        "images": case.images,
        "world_size": case.world,
        "gpu": case.device.name,
        "fabric": case.fabric.name,
        "bytes_per_rank": needed.stays,
        "bytes_by_phase": needed.phases,
        "worst_phase": needed.worst,
        "bytes_assumed": needed.allowance,
        "bytes_total": needed.total,
        "memory": case.device.memory * 1e9,
        "fits": advice.fits(case),
        "phases": [vars(p) for p in phases(case)],
        "collectives": [vars(c) | {"seconds": c.seconds(case)} for c in collectives(case)],
        "step_floor_s": whole.floor,
        "step_estimate_s": whole.estimate,
        "collectives_exposed_s": whole.exposed,
        "images_per_s_estimate": whole.images_per_s,
        "largest_identities": advice.largest_identities(case),
        "host_bytes_per_rank": host_bytes(case),
        "faster": [vars(gain) for gain in advice.faster(case)],
    }
    if not found["fits"]:
        found["changes"] = [vars(c) for c in advice.changes(case)]
    return found


def print_json(case: Case, cells: list[Cell]) -> None:
    found = as_dict(case)
    if cells:
        found["table"] = [vars(cell) for cell in cells]
    print(json.dumps(found, indent=1))


def print_plan(case: Case) -> None:
    console, needed, whole = _console(), rank_bytes(case), step(case)
    _line(console, f"[bold]{title(case)}[/bold]")
    console.print(_bytes_table(needed, case))
    verdict = "fits" if advice.fits(case) else "DOES NOT FIT"
    _line(console, f"{_gb(needed.total)} GB of {case.device.memory:g} GB a rank: [bold]{verdict}[/bold]")
    largest = advice.largest_identities(case)
    more = ", for all that was tried" if largest >= advice.MOST // 2 else ""
    _line(console, f"Largest number of identities that fits, all else equal: {largest:,}{more}")
    if host := host_bytes(case):
        parts = "; ".join(f"{name} {_gb(size)}" for name, size in host.items())
        total = advice.host_total(case)
        machine = _gb(total * min(NODE, case.world))
        _line(console, f"Host, each rank's sampler: {_gb(total)} GB, {machine} GB a machine ({parts})")
    if not advice.fits(case):
        console.print(_changes_table(case))
    console.print(_phase_table(case))
    if case.world > 1:
        console.print(_collective_table(case))
    wait = f", of which {_ms(whole.exposed)} ms wait for collectives" if case.world > 1 else ""
    _line(console, f"Step: floor {_ms(whole.floor)} ms; estimate, not measured: {_ms(whole.estimate)} ms{wait}")
    speed = f"Estimate, not measured: {whole.images_per_s:,.0f} images/s, {whole.images_per_s / case.world:,.0f} a rank"
    if case.images:
        speed += f"; an epoch of {case.images:,} images in {case.images / whole.images_per_s / 3600:,.1f} h"
    _line(console, speed)
    for gain in advice.faster(case):
        _line(console, f"Faster, by the same estimate: {gain.setting} gives {gain.images_per_s:,.0f} images/s")
    _line(console, assumptions(case))


def assumptions(case: Case) -> str:
    d, f = case.device, case.fabric
    within = f.within or LINKS[d.name]
    return (
        f"Floors: {d.name} at {d.half:g} TFLOP/s bf16, {d.full:g} fp32, {d.bandwidth:g} TB/s ({d.source}); each operation "
        "takes its arithmetic or its bytes, whichever is more, nothing fused. Estimates assume that the encoder reaches "
        f"{ENCODER_EFFICIENCY:.0%} of its floor, GEMMs and updates {GEMM_EFFICIENCY:.0%}, {LAUNCH_US:g} us a kernel launch in "
        f"the head, and {OVERLAP:.0%} of the encoder's backward to hide DDP behind. Collectives: rings over {within:g} GB/s "
        f"within machines of {NODE}, {f.between:g} GB/s a GPU beyond ({f.name}: {f.source})."
    )


def print_table(case: Case, cells: list[Cell]) -> None:
    console = _console()
    each = sum(row[0] for row in case.parts)
    what = f"GB of a rank · images/s of all ranks (estimate), {each} images a rank"
    _line(console, f"{what}; !: does not fit {case.device.memory:g} GB")
    table = _table("ranks", *(f"{power(n)} identities" for n in IDENTITIES))
    for world in WORLDS:
        row = [c for c in cells if c.world == world]
        if not row:
            table.add_row(str(world), *["refused"] * len(IDENTITIES))
            continue
        table.add_row(str(world), *(f"{_gb(c.total)} · {c.images_per_s:,.0f}" if c.fits else f"{_gb(c.total)} !" for c in row))
    console.print(table)


# --- parts ---------------------------------------------------------------------------------------------------------


def _console() -> Console:
    # Piped output has no width of its own; 160 columns keep every row on one line.
    return Console(highlight=False, width=None if sys.stdout.isatty() else 160)


def _line(console: Console, text: str) -> None:
    console.print(text, soft_wrap=not console.is_terminal)


def _table(first: str, *others: str) -> Table:
    table = Table(box=SIMPLE_HEAD if sys.stdout.isatty() else None, pad_edge=False)
    table.add_column(first)
    for name in others:
        table.add_column(name, justify="right", no_wrap=True)
    return table


def _gb(size: float) -> str:
    gb = size / 1e9
    return f"{gb:,.0f}" if gb >= 100 else f"{gb:.1f}" if gb >= 10 else f"{gb:.2f}" if gb >= 0.1 else f"{gb:.4f}"


def _ms(seconds: float) -> str:
    ms = seconds * 1e3
    return f"{ms:,.0f}" if ms >= 100 else f"{ms:.1f}" if ms >= 1 else f"{ms:.3f}"


def _bytes_table(needed, case: Case) -> Table:
    table = _table("bytes of a rank", "GB")
    for name, size in needed.stays.items():
        table.add_row(name, _gb(size))
    for name, size in needed.phases[needed.worst].items():
        table.add_row(f"{name} [dim](at its most: {needed.worst})[/dim]", _gb(size))
    for name, size in needed.allowance.items():
        table.add_row(name, _gb(size))
    return table


def _phase_table(case: Case) -> Table:
    table = _table("phase", "TFLOP", "GB moved", "floor ms", "estimate ms")
    for p in phases(case):
        table.add_row(p.name, f"{p.flops / 1e12:.3g}", _gb(p.moved), _ms(p.floor), _ms(p.estimate))
    return table


def _collective_table(case: Case) -> Table:
    table = _table("collective, each step", "kind", "count", "MB each", "ms in all")
    for c in collectives(case):
        name = c.name + (f" [dim](behind {c.behind})[/dim]" if c.behind else "")
        table.add_row(name, c.kind.replace("_", "-"), str(c.count), f"{c.size / 1e6:.4g}", _ms(c.seconds(case)))
    return table


def _changes_table(case: Case) -> Table:
    table = _table("what would make it fewer", "GB of a rank", "fits", "what it costs")
    table.columns[-1].justify = "left"
    for change in advice.changes(case):
        fits = "yes" if change.total <= case.device.memory * 1e9 else "no"
        table.add_row(change.setting, _gb(change.total), fits, change.note)
    return table
