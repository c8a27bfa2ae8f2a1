"""Write rendered people to disk: a RecordIO training set, and the contact sheet to look at it."""

from __future__ import annotations

import hashlib
import json
import os
import sys
import time
from collections import deque
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path

import numpy as np
import torch

from protomem.data.faces.long_tail import images_per_person
from protomem.data.faces.render import RENDERER, render_faces
from protomem.data.faces.scene import ImageOptions
from protomem.errors import UserError
from protomem.files import read_json, write_atomically

_BLOCK = 32  # pictures handed to a worker at a time


def write_face_set(
    path: str | os.PathLike,
    *,
    identities: int,
    images_per_identity: int,
    seed: int = 0,
    long_tail: bool = False,
    first_identity: int = 0,
    spread: float = 0.35,
    options: ImageOptions = ImageOptions(),
    quality: int = 92,
    device: torch.device | str = "cpu",
    workers: int | None = None,
    progress: bool = True,
) -> dict:
    """Render a training set in insightface's form into the folder `path`: train.rec, train.idx, property, and
    train.quality.npy (float32 per image in record order, 1 = clean). Label k is person first_identity + k.

    long_tail: the number of images per identity falls like a power of its rank, between 2 and 20 times the mean, with
    `images_per_identity` as its mean (our default is the same number for all). quality: of the JPEG encoder, 1..100.
    workers: threads that render, by default one per CPU core. Returns statistics; if train.json shows that the folder
    holds exactly this set, they are returned at once, with `cached` True. Raises UserError for impossible numbers."""
    from protomem.data.images import encode_jpeg
    from protomem.data.recordio import RecordWriter

    least = 2 if long_tail else 1
    if identities < 1 or images_per_identity < least:
        raise UserError(
            f"a face set needs identities >= 1 and images_per_identity >= {least}, not "
            f"{identities} and {images_per_identity}"
        )
    folder = Path(path)
    wanted = {
        "identities": identities,
        "images_per_identity": images_per_identity,
        "seed": seed,
        "long_tail": long_tail,
        "first_identity": first_identity,
        "spread": spread,
        "options": asdict(options),
        "quality": quality,
    }
    found = read_manifest(
        folder / "train.json", wanted, [folder / "train.rec", folder / "train.idx", folder / "property"]
    )
    if found is not None:
        return found | {"cached": True}
    counts = images_per_person(identities, images_per_identity, long_tail, seed)
    labels = np.repeat(np.arange(identities), counts)
    numbers = np.arange(len(labels)) - np.repeat(np.cumsum(counts) - counts, counts)
    begun = time.perf_counter()
    truth = []
    with RecordWriter(folder) as writer:
        blocks = render_blocks(
            labels + first_identity,
            numbers,
            options,
            seed=seed,
            spread=spread,
            device=device,
            workers=workers,
            title="rendering faces" if progress else None,
            encode=lambda picture: encode_jpeg(picture, quality),
        )
        for start, encoded, block_quality in blocks:
            for k, data in enumerate(encoded):
                writer.add(data, int(labels[start + k]))
            truth.append(block_quality)
        # from here on the folder no longer holds what train.json may say
        (folder / "train.json").unlink(missing_ok=True)
    truth = np.concatenate(truth)
    write_atomically(folder / "train.quality.npy", lambda file: np.save(file, truth))
    seconds = time.perf_counter() - begun
    statistics = {
        "images": len(labels),
        "identities": identities,
        "images_per_identity_min": int(counts.min()),
        "images_per_identity_mean": float(counts.mean()),
        "images_per_identity_max": int(counts.max()),
        "degraded": float((truth < 1).mean()),
        "quality_mean": float(truth.mean()),
        "seconds": round(seconds, 2),
        "images_per_second": round(len(labels) / seconds, 1),
    }
    write_manifest(
        folder / "train.json", wanted, [folder / "train.rec", folder / "train.idx", folder / "property"], statistics
    )
    return statistics | {"cached": False}


def render_blocks(
    identities: np.ndarray,
    images: np.ndarray,
    options: ImageOptions | list[ImageOptions],
    *,
    seed: int,
    spread: float,
    device,
    workers: int | None,
    title: str | None,
    encode,
) -> Iterator[tuple[int, list, np.ndarray]]:
    """Render in threads, in order: (first position, encoded pictures, their quality). Of a list of
    options, picture number i takes the one at i modulo its length."""
    workers = workers or len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else workers or os.cpu_count()
    kinds = options if isinstance(options, list) else [options]

    def work(start: int):
        rows = slice(start, min(start + _BLOCK, len(images)))
        encoded, truth = [b""] * (rows.stop - start), np.empty(rows.stop - start, np.float32)
        for k, kind in enumerate(kinds):
            chosen = np.nonzero(images[rows] % len(kinds) == k)[0]
            pixels, found = render_faces(
                identities[rows][chosen], images[rows][chosen], seed=seed, spread=spread, device=device, options=kind
            )
            for place, picture in zip(chosen, pixels.numpy()):
                encoded[place] = encode(picture)
            truth[chosen] = found["quality"]
        return start, encoded, truth

    before = torch.get_num_threads()
    # Threads suffice: torch and the JPEG encoder release the interpreter. One torch thread each avoids idle spinning.
    pool = ThreadPoolExecutor(workers, initializer=torch.set_num_threads, initargs=(1,))
    try:
        with progress_bar(title, len(images)) as advance:
            waiting: deque = deque()
            for start in range(0, len(images), _BLOCK):
                waiting.append(pool.submit(work, start))
                if len(waiting) > 2 * workers:
                    block = waiting.popleft().result()
                    advance(len(block[1]))
                    yield block
            while waiting:
                block = waiting.popleft().result()
                advance(len(block[1]))
                yield block
    finally:
        pool.shutdown(wait=True, cancel_futures=True)
        torch.set_num_threads(before)


@contextmanager
def progress_bar(title: str | None, total: int):
    """Yields a function that advances the bar; silent when there is no title or no terminal."""
    if title is None or not sys.stderr.isatty():
        yield lambda count: None
        return
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True)) as bar:
        task = bar.add_task(title, total=total)
        yield lambda count: bar.advance(task, count)


def _fingerprint(wanted: dict) -> str:
    return hashlib.sha256(json.dumps(wanted | {"renderer": RENDERER}, sort_keys=True).encode()).hexdigest()[:24]


def read_manifest(path: Path, wanted: dict, files: list[Path]) -> dict | None:
    """The statistics in `path` if it describes `wanted` and the files have the recorded sizes, else None."""
    try:
        manifest = read_json(path)
        sizes = {file.name: file.stat().st_size for file in files}
        same = manifest["fingerprint"] == _fingerprint(wanted) and manifest["files"] == sizes
        return manifest["statistics"] if same else None
    except (OSError, ValueError, KeyError, TypeError):
        return None


def write_manifest(path: Path, wanted: dict, files: list[Path], statistics: dict) -> None:
    manifest = {
        "fingerprint": _fingerprint(wanted),
        "renderer": RENDERER,
        "arguments": wanted,
        "statistics": statistics,
        "files": {file.name: file.stat().st_size for file in files},
    }
    write_atomically(path, lambda file: file.write(json.dumps(manifest, indent=1).encode()))


def contact_sheet(
    path: str | os.PathLike,
    *,
    identities: int = 8,
    images: int = 10,
    seed: int = 0,
    first_identity: int = 0,
    size: int = 112,
    spread: float = 0.35,
    options: ImageOptions = ImageOptions(),
    device: torch.device | str = "cpu",
) -> Path:
    """A PNG with one row per identity and one column per image; the bar under each picture shows its quality (full and
    green = clean)."""
    from PIL import Image

    who, which = np.repeat(np.arange(identities), images), np.tile(np.arange(images), identities)
    pixels, truth = render_faces(
        who + first_identity, which, seed=seed, size=size, spread=spread, device=device, options=options
    )
    bar = max(3, size // 28)
    cells = np.full((len(who), size + bar + 2, size + 2, 3), 255, np.uint8)
    cells[:, :size, :size] = pixels.numpy()
    for cell, value in zip(cells, truth["quality"]):
        cell[size : size + bar, : max(1, round(size * float(value)))] = (
            round(220 * (1 - value)),
            round(60 + 120 * value),
            60,
        )
    sheet = cells.reshape(identities, images, *cells.shape[1:]).transpose(0, 2, 1, 3, 4)
    sheet = sheet.reshape(identities * cells.shape[1], images * cells.shape[2], 3)
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, lambda file: Image.fromarray(sheet).save(file, "PNG"))
    return path
