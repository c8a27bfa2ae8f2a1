"""What the studies (many short training runs, several seeds) share: reading runs, resuming a table, mean and spread."""

from __future__ import annotations

import csv
import statistics
from pathlib import Path
from typing import Iterable

from protomem.metrics import read_metrics


def final_figures(run: Path, pairs: Iterable[str]) -> dict[str, float]:
    """{`<set> accuracy`: ..., `<set> tar@1e-2`: ..., `loss`: of the last logged step} of a finished run."""
    records, row = read_metrics(run), {}
    for name in pairs:
        (final,) = (r for r in records if r.get("event") == "evaluation" and r["tag"] == "final" and r["name"] == name)
        row |= {f"{name} {key}": final[key] for key in ("accuracy", "tar@1e-2", "tar@1e-3")}
    return row | {"loss": [record for record in records if "loss" in record][-1]["loss"]}


def finished(path: Path) -> list[dict]:
    """Rows of an earlier call, with numbers as numbers."""
    rows = []
    for line in csv.DictReader(path.open()) if path.exists() else ():
        row = {}
        for name, value in line.items():
            try:
                row[name] = int(value) if value.isdecimal() else float(value)
            except ValueError:
                row[name] = value
        rows.append(row)
    return rows


def summary(rows: list[dict], keys: tuple[str, ...], order: Iterable[str], pairs: Iterable[str]) -> list[dict]:
    """Mean and sample standard deviation over the seeds of all rows that agree in `keys`, the last of which is `method`
    (in this order)."""
    out, order = [], list(order)
    figures = [name for name in rows[0] if name in ("loss", "cpu s") or name.split(" ")[0] in (*pairs, "spearman")]
    for case in sorted({tuple(row[k] for k in keys) for row in rows}, key=lambda c: (*c[:-1], order.index(c[-1]))):
        found = [row for row in rows if tuple(row[k] for k in keys) == case]
        line = {**dict(zip(keys, case)), "seeds": len(found)}
        for name in figures:
            values = [row[name] for row in found]
            line |= {f"{name} mean": statistics.fmean(values)}
            line |= {f"{name} std": statistics.stdev(values) if len(values) > 1 else ""}
        out.append(line)
    return out
