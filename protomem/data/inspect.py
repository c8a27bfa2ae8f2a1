"""What is in a data set (statistics), and what in it cannot be used (verify)."""

from __future__ import annotations

import contextlib
import json
import os
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from protomem.data.images import check_image, decode, image_size
from protomem.data.index_cache import progress_bar, side_paths, write_beside
from protomem.errors import UserError
from protomem.files import parse_json, write_atomically

_SUFFIX = ".verified.json"
_CHUNK = 256
_LISTED = 1000  # missing identities that are named


@dataclass
class DataReport:
    """What verify found. `bad`: (position, where it is, why), by position, with all reasons that were found."""

    path: str
    fingerprint: str
    images: int
    num_classes: int
    decoded: bool  # every image was decoded, not only its structure checked
    bad: list[tuple[int, str, str]]
    missing_identities: int  # labels 0..num_classes-1 without a single image
    first_missing: list[int]  # the first of them
    notes: list[str]

    @property
    def positions(self) -> np.ndarray:
        return np.array([position for position, _, _ in self.bad], np.int64)


def statistics(records, sample: int = 2000) -> dict:
    """Facts about a set, ready for JSON: images, identities (with images), num_classes, images per identity (min,
    median, mean, max, and a histogram over powers of two), and from `sample` images spread evenly over the set: bytes,
    width and height (min, median, mean, max), and how many of the sample are unusable."""
    count = len(records)
    labels = np.asarray(records.labels)
    # Not counted in an array over all classes: a damaged label may be as large as it likes.
    per_identity = np.unique(labels[(labels >= 0) & (labels < records.num_classes)], return_counts=True)[1]
    positions = np.unique(np.linspace(0, count - 1, min(sample, count)).astype(np.int64)) if count else []
    sizes, shapes, unusable = [], [], 0
    for position in positions:
        data = records.bytes(int(position))
        sizes.append(len(data))
        try:
            shapes.append(image_size(data))
        except ValueError:
            unusable += 1
    heights, widths = zip(*shapes) if shapes else ((), ())
    edges = 2 ** np.arange(int(per_identity.max(initial=1)).bit_length() + 1)
    histogram = np.histogram(per_identity, edges)[0]
    return {
        "path": records.path,
        "form": type(records).__name__,
        "fingerprint": records.fingerprint,
        "images": count,
        "identities": len(per_identity),
        "num_classes": records.num_classes,
        "images_per_identity": _spread(per_identity),
        "images_per_identity_histogram": {
            f"{low}-{high - 1}" if high - low > 1 else str(low): int(n)
            for low, high, n in zip(edges[:-1].tolist(), edges[1:].tolist(), histogram)
        },
        "sampled": len(positions),
        "sampled_unusable": unusable,
        "encoded_bytes": _spread(sizes),
        "height": _spread(heights),
        "width": _spread(widths),
        "notes": _notes(records),
    }


def _spread(values) -> dict[str, float] | None:
    values = np.asarray(values)
    if not len(values):
        return None
    return {
        "min": int(values.min()),
        "median": float(np.median(values)),
        "mean": round(float(values.mean()), 2),
        "max": int(values.max()),
    }


def _notes(records) -> list[str]:
    promised, count = getattr(records, "promised", -1), len(records)
    if promised >= 0 and abs(promised - count) > np.spacing(np.float32(promised)):
        return [f"the header record speaks of {promised:,} images, the index lists {count:,}"]
    return []


def verify(records, workers: int | None = None, progress: bool = True, decode_all: bool = True) -> DataReport:
    """Look at every record: structure, a whole decode (decode_all), its label; open `records` with strict=False for it.

    workers: threads, by default one per CPU core (the decoders release Python's lock).
    """
    labels = np.asarray(records.labels)
    reasons: dict[int, list[str]] = {int(i): [records.reason(int(i))] for i in records.damaged}

    def examine(begin: int) -> list[tuple[int, str]]:
        found = []
        for position in range(begin, min(begin + _CHUNK, len(records))):
            try:
                data = records.bytes(position)
                if not data and position in reasons:  # no whole record: that has been said
                    continue
                reason = check_image(data)
                if reason is None and decode_all:
                    decode(data)
            except (UserError, ValueError) as error:
                reason = str(error)
            if reason is not None:
                found.append((position, reason))
        return found

    threads = workers or os.cpu_count() or 1
    with progress_bar("verifying", len(records), progress) as advance, ThreadPoolExecutor(threads) as pool:
        for found in pool.map(examine, range(0, len(records), _CHUNK)):
            for position, reason in found:
                reasons.setdefault(position, []).append(reason)
            advance(_CHUNK)
    present = np.unique(labels[(labels >= 0) & (labels < records.num_classes)])
    first = np.setdiff1d(np.arange(min(records.num_classes, len(present) + _LISTED)), present, assume_unique=True)
    return DataReport(
        path=records.path,
        fingerprint=records.fingerprint,
        images=len(records),
        num_classes=records.num_classes,
        decoded=decode_all,
        bad=[(position, records.where(position), "; ".join(reasons[position])) for position in sorted(reasons)],
        missing_identities=records.num_classes - len(present),
        first_missing=first[:_LISTED].tolist(),
        notes=_notes(records),
    )


def save_report(records, report: DataReport, output: Path | None = None) -> Path:
    """Write the report as JSON to `output`, by default where known_bad finds it: `<stem>.verified.json` beside the
    data, or in the cache folder if that cannot be written. Returns the path; raises UserError if nothing can be
    written."""
    text = json.dumps(asdict(report), indent=1).encode()
    if output is None:
        path = write_beside(records.stem, _SUFFIX, lambda file: file.write(text))
        if path is None:
            raise UserError(f"neither {records.stem.parent} nor the cache folder can be written; give --output FILE")
        return path
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(output, lambda file: file.write(text))
    except OSError as error:
        raise UserError(f"{output} cannot be written ({error.strerror})") from None
    return output


def known_bad(records) -> np.ndarray:
    """int64 positions known to be unusable: `records.damaged`, and what the last `protomem data verify` of the same
    data found. Without one, or after the data have changed, only the former."""
    bad = records.damaged
    for path in side_paths(records.stem, _SUFFIX) if hasattr(records, "stem") else ():  # generated records have none
        with contextlib.suppress(OSError, ValueError, KeyError, TypeError, IndexError, OverflowError):
            stored = parse_json(path.read_bytes())
            if stored["fingerprint"] == records.fingerprint:
                found = np.array([int(entry[0]) for entry in stored["bad"]], np.int64)
                return np.union1d(bad, found[(found >= 0) & (found < len(records))])
    return bad


def bin_statistics(path: str) -> dict:
    """Facts about a verification .bin: pairs, genuine pairs, and the positions of images that cannot be decoded."""
    from protomem.data.pairs import read_bin

    encoded, same = read_bin(path)
    shapes, bad = [], []
    for position, data in enumerate(encoded):
        try:
            shapes.append(decode(data).shape)
        except ValueError as error:
            bad.append(f"image {position} (pair {position // 2}): {error}")
    return {
        "path": str(path),
        "form": "verification pairs",
        "pairs": len(same),
        "genuine": int(same.sum()),
        "unusable": len(bad),
        "encoded_bytes": _spread([len(data) for data in encoded]),
        "height": _spread([shape[0] for shape in shapes]),
        "width": _spread([shape[1] for shape in shapes]),
        "notes": bad[:_LISTED],
    }
