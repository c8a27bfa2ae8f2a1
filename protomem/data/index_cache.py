"""Cached index files: what it costs minutes to find out about a data set is written once and memory-mapped afterwards.

One file holds a JSON header and plain little-endian arrays. It lies beside the data, or, where that folder cannot be
written, in $XDG_CACHE_HOME/protomem. It is valid as long as the sizes and modification times of the data files are the
same.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import sys
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from protomem.errors import UserError
from protomem.files import cache_folder, parse_json, read_array, write_atomically

_HEADER_BYTES = 4096
MAX_CLASSES = 2**32  # identities (our default): a larger number is a damaged label, and what it would allocate ends the run
_VERSION = 1  # raise it when the content of any index changes: old files are then rebuilt


def file_stamp(paths: Iterable[Path]) -> str:
    """A hash of the names, sizes and modification times of `paths`; a file that does not exist counts as absent."""
    digest = hashlib.blake2b(digest_size=16)
    for path in paths:
        try:
            status = path.stat()
            digest.update(f"{path.name}\0{status.st_size}\0{status.st_mtime_ns}\0".encode(errors="surrogateescape"))
        except FileNotFoundError:
            digest.update(f"{path.name}\0absent\0".encode(errors="surrogateescape"))
    return digest.hexdigest()


def first_changed(stamps: dict[Path, str]) -> str:
    """The first file that no longer has the stamp it had; "" if there is none."""
    return next((str(path) for path, stamp in stamps.items() if file_stamp([path]) != stamp), "")


def side_paths(stem: Path, suffix: str) -> tuple[Path, Path]:
    """Where a file that protomem derives from the data may lie: beside the data, and in the user's cache folder."""
    absolute = stem.absolute()
    tag = hashlib.blake2b(os.fsencode(absolute), digest_size=8).hexdigest()
    return Path(f"{absolute}{suffix}"), cache_folder() / f"{absolute.parent.name}-{absolute.name}-{tag}{suffix}"


def write_beside(stem: Path, suffix: str, write: Callable[[Any], None]) -> Path | None:
    """Write a derived file beside the data, else into the cache folder. Returns its path, None if neither can be
    written."""
    for path in side_paths(stem, suffix):
        with contextlib.suppress(OSError):
            path.parent.mkdir(parents=True, exist_ok=True)
            write_atomically(path, write)
            return path
    return None


def save_index(stem: Path, kind: str, stamp: str, meta: dict[str, Any], arrays: dict[str, np.ndarray]) -> Path | None:
    """Store 1-D arrays and a small JSON-able `meta`. Returns the file's path, None if no place could be written."""
    layout, position = {}, _HEADER_BYTES
    for name, array in arrays.items():
        layout[name] = (array.dtype.newbyteorder("<").str, len(array), position)
        position += -(-array.nbytes // 64) * 64  # every array starts at a multiple of 64 bytes
    header = {
        "protomem_index": _VERSION,
        "kind": kind,
        "stamp": stamp,
        "meta": meta,
        "arrays": layout,
        "size": position,
    }
    text = json.dumps(header).encode()
    if len(text) > _HEADER_BYTES:
        raise ValueError(f"index header needs {len(text)} bytes, {_HEADER_BYTES} are reserved")

    def write(file):
        file.write(text.ljust(_HEADER_BYTES))
        for name, array in arrays.items():
            file.seek(layout[name][2])
            file.write(memoryview(np.ascontiguousarray(array, dtype=layout[name][0])).cast("B"))
        file.truncate(position)

    return write_beside(stem, ".index.cache", write)


def load_index(
    stem: Path, kind: str, stamp: str, facts: dict[str, type], arrays: dict[str, str]
) -> tuple[dict[str, Any], dict[str, np.ndarray]] | None:
    """The stored (meta, memory-mapped arrays), or None where there is no valid index for this kind and stamp.

    facts: {name: type} of what `meta` holds besides "classes"; arrays: {name: dtype}. The file may have come with the data:
    whatever in it is not as `save_index` writes it makes it invalid, so that it is made again.
    """
    for path in side_paths(stem, ".index.cache"):
        try:
            with open(path, "rb") as file:
                header = parse_json(file.read(_HEADER_BYTES))
                size = os.fstat(file.fileno()).st_size
            if (header["protomem_index"], header["kind"], header["stamp"], header["size"]) != (_VERSION, kind, stamp, size):
                continue
            meta = header["meta"]
            if not all(type(meta[name]) is form for name, form in ({"classes": int} | facts).items()):
                continue
            if not 1 <= meta["classes"] <= MAX_CLASSES:
                continue
            found = {name: _mapped(path, size, dtype, *header["arrays"][name]) for name, dtype in arrays.items()}
        except (OSError, ValueError, KeyError, TypeError):
            continue
        lengths = {len(array) for name, array in found.items() if name != "names"}  # one entry per record, names joined
        if len(lengths) == 1 and lengths != {0}:
            return meta, found
    return None


def _mapped(path: Path, size: int, expected: str, dtype: str, length: int, position: int) -> np.ndarray:
    width = np.dtype(expected).itemsize
    if np.dtype(expected).newbyteorder("<").str != dtype or not (type(length) is type(position) is int):
        raise ValueError(f"no {expected} array")
    if not (0 <= length and _HEADER_BYTES <= position and position + length * width <= size):
        raise ValueError("an array outside of the file")
    return np.memmap(path, dtype, "r", position, (length,)) if length else np.zeros(0, dtype)


def load_column(stem: Path, name: str, length: int) -> np.ndarray:
    """The side file `<stem>.<name>.npy`: one float32 per record, in record order. Raises UserError if missing or
    unfit."""
    path = Path(f"{stem}.{name}.npy")
    if not path.exists():
        raise UserError(f"{path} does not exist: column '{name}' needs one float32 per image in record order")
    try:
        values = read_array(path)
    except (ValueError, OSError) as error:
        raise UserError(f"{path} is no readable .npy file ({error}); write it again with numpy.save") from None
    if values.shape != (length,) or values.dtype.kind not in "fiub":
        raise UserError(
            f"{path} has shape {values.shape}, but the data have {length:,} records; write it again, one number for each"
            if values.dtype.kind in "fiub"
            else f"{path} holds {values.dtype}, no numbers; write it again, one number for each record"
        )
    return np.array(values, np.float32)


def content_fingerprint(parts: Iterable[bytes], files: Iterable[Path]) -> str:
    """A hash of `parts` and of the content of `files`: all of it up to 64 MB, above that 256 blocks of 64 KB.

    Modification times do not enter: a copy on another disk has the same fingerprint.
    """
    digest = hashlib.blake2b(digest_size=16)
    for part in parts:
        digest.update(part)
    files = [(path, path.stat().st_size) for path in files]
    total = sum(size for _, size in files)
    for path, size in files:
        digest.update(f"\0{size}\0".encode())
        with open(path, "rb") as file:
            if total <= 64 << 20:
                digest.update(file.read())
                continue
            blocks = max(1, round(256 * size / total))
            for block in range(blocks):
                file.seek(size * block // blocks)
                digest.update(file.read(1 << 16))
            file.seek(max(0, size - (1 << 16)))
            digest.update(file.read(1 << 16))
    return digest.hexdigest()


@contextlib.contextmanager
def progress_bar(description: str, total: int, enabled: bool = True) -> Iterator[Callable[[int], None]]:
    """A rich progress bar on stderr if that is a terminal. Yields advance(n); safe to call from threads."""
    if not (enabled and sys.stderr.isatty()):
        yield lambda count: None
        return
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = [TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn()]
    with Progress(*columns, console=Console(stderr=True), transient=True) as progress:
        task = progress.add_task(description, total=total)
        yield lambda count: progress.advance(task, count)
