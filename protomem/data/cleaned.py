"""What `protomem data clean` leaves: the set without the images that were dropped, their list, a summary, two pictures.

Legend: N images.
"""

from __future__ import annotations

import csv
import glob
import json
from pathlib import Path
from typing import Any

import numpy as np

from protomem.data.decode import decode_tolerant
from protomem.data.index_cache import progress_bar
from protomem.data.recordio import RecordWriter
from protomem.errors import UserError

SUMMARY = "clean.json"
_BIN = 5  # degrees
_LISTED = 100  # identities without images that are named
_SHOWN, _BESIDE = 8, 4  # rows of the picture, and images of the identity beside each that was dropped


def write_cleaned(folder: Path, records, found, facts: dict[str, Any], list_only: bool) -> dict[str, Any]:
    """Write everything into the empty `folder`; returns what stands in its clean.json: `facts`, and the counts.

    found: a Findings (protomem/cleaning.py). Raises UserError if no image is kept (not with list_only), and OSError.
    """
    labels, dropped = np.asarray(records.labels), found.usable & ~found.keep
    before, after = np.unique(labels[(labels >= 0) & (labels < records.num_classes)]), np.unique(labels[found.keep])
    emptied = np.setdiff1d(before, after, assume_unique=True)
    edges = np.arange(0, 181, _BIN)
    facts = facts | {
        "data": records.path,
        "fingerprint": records.fingerprint,
        "images": len(records),
        "kept": int(found.keep.sum()),
        "dropped": int(dropped.sum()),
        "unusable": int((~found.usable).sum()),
        "identities": records.num_classes,
        "identities_with_images": len(after),
        "emptied": len(emptied),
        "first_emptied": emptied[:_LISTED].tolist(),
        "columns": [],
        "histogram": {"degrees": edges.tolist(), "images": np.histogram(found.angle[found.usable], edges)[0].tolist()},
    }
    if not list_only:
        if not facts["kept"]:
            raise UserError(f"all {facts['dropped']:,} images are more than {facts['angle']:g} degrees away; raise --angle")
        _pack(folder, records, found.keep)
        facts["columns"] = _carry_columns(folder, records, found.keep)
    _list_dropped(folder / "dropped.csv", records, found, np.flatnonzero(dropped))
    _draw(folder, records, found, dropped, facts["angle"])
    (folder / SUMMARY).write_text(json.dumps(facts, indent=1))
    return facts


def _pack(folder: Path, records, keep: np.ndarray) -> None:
    kept = np.flatnonzero(keep)
    with RecordWriter(folder, classes=records.num_classes) as writer, progress_bar("packing", len(kept)) as advance:
        for position in map(int, kept):  # not a list of so many numbers
            writer.add(records.bytes(position), records.label(position))
            advance(1)


def _carry_columns(folder: Path, records, keep: np.ndarray) -> list[str]:
    """Write the kept rows of the columns beside the data; returns their names. Other arrays there are left alone."""
    names, stem = [], getattr(records, "stem", None)
    for path in sorted(stem.parent.glob(f"{glob.escape(stem.name)}.*.npy")) if stem is not None else ():
        name = path.name[len(stem.name) + 1 : -len(".npy")]
        if name == "labels":  # the exact labels of the set, which the writer makes
            continue
        try:
            values = records.column(name)
        except UserError:
            continue
        np.save(folder / f"train.{name}.npy", values[keep])
        names.append(name)
    return names


def _list_dropped(path: Path, records, found, dropped: np.ndarray) -> None:
    with open(path, "w", newline="", encoding="utf-8", errors="surrogateescape") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(("position", "where", "label", "angle", "nearest", "dominant"))
        for i in dropped.tolist():
            label = records.label(i)
            row = (i, records.where(i), label, f"{found.angle[i]:.3f}", found.nearest[i], found.dominant[label])
            writer.writerow(row)


# --- pictures ------------------------------------------------------------------------------------------------------


def _draw(folder: Path, records, found, dropped: np.ndarray, limit: float) -> None:
    import matplotlib

    from protomem.report_plots import STYLE

    with matplotlib.rc_context(STYLE):
        _histogram(found, limit).savefig(folder / "angles.png", format="png")
        if dropped.any():
            _sheet(records, found, dropped, limit).savefig(folder / "dropped.png", format="png")


def _histogram(found, limit: float):
    from protomem.report_plots import GENUINE, IMPOSTOR, INK, new_figure

    figure, axis = new_figure()
    angle = found.angle[found.usable]
    edges = np.arange(0, 181, 2.0)
    parts = [("kept", GENUINE, angle <= limit), ("dropped", IMPOSTOR, angle > limit)]
    for name, colour, part in parts:
        axis.hist(angle[part], edges, color=colour, label=f"{name}: {part.sum():,}", alpha=0.8)
    axis.axvline(limit, color=INK, linewidth=1, linestyle="--")
    axis.set(title="Angle to the identity's dominant prototype", xlabel="degrees", ylabel="images")
    axis.set_xlim(0, max(90.0, float(np.nanmax(angle, initial=limit))) + 2)
    axis.legend()
    return figure


def _sheet(records, found, dropped: np.ndarray, limit: float):
    """Dropped images, at most one of an identity, each beside the images of its identity that are nearest to the prototype:
    on the left the farthest, on the right those just above the limit, which tell whether it is too low."""
    from protomem.report_plots import IMPOSTOR, new_figure

    order = np.flatnonzero(dropped)[np.argsort(found.angle[dropped], kind="stable")]
    labels = np.asarray(records.labels)
    sides = (_one_of_each(order[::-1], labels), _one_of_each(order, labels))
    columns, rows = 2 * (_BESIDE + 1) + 1, max(map(len, sides))
    figure, axis = new_figure(size=(columns, 1.25 * rows + 0.4))
    axis.axis("off")
    for side, chosen in enumerate(sides):
        for row, position in enumerate(chosen):
            label = labels[position]
            own = np.flatnonzero((labels == label) & found.keep)
            own = own[np.argsort(found.angle[own], kind="stable")][:_BESIDE]
            for column, i in enumerate((position, *own), side * (_BESIDE + 2)):
                text = {"color": IMPOSTOR, "weight": "bold", "s": f"{label}: "} if i == position else {"s": ""}
                text["s"] += f"{found.angle[i]:.0f}°"
                axis.text(column + 0.5, 1.25 * row + 0.2, ha="center", fontsize=8, **text)
                picture = decode_tolerant(records.bytes(int(i)))
                axis.imshow(picture, extent=(column + 0.03, column + 0.97, 1.25 * row + 1.2, 1.25 * row + 0.26))
    axis.set(xlim=(0, columns), ylim=(1.25 * rows, 0))  # imshow sets its own
    axis.set_title(f"Dropped (red: identity, angle), kept ones beside. Left: the farthest; right: just above {limit:g}°")
    return figure


def _one_of_each(order: np.ndarray, labels: np.ndarray) -> list[int]:
    chosen: dict[int, int] = {}
    for position in order.tolist():
        chosen.setdefault(int(labels[position]), position)
        if len(chosen) == _SHOWN:
            break
    return list(chosen.values())
