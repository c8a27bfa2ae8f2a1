"""Files appear whole or not at all; what others wrote is read with care."""

from __future__ import annotations

import contextlib
import json
import os
import zipfile
from pathlib import Path
from typing import Any, Callable

import numpy as np

MAX_TEXT = 64 << 20  # bytes of a JSON file (our default)
MAX_ARRAYS = 4 << 30  # bytes that the arrays of one .npz may take (our default)


def write_atomically(path: Path, write: Callable[[Any], None]) -> None:
    """Call `write(file)` on a temporary binary file in the same folder, then rename it to `path`: whoever reads sees the
    old file until the new one is complete, and a failure leaves nothing behind."""
    temporary = path.with_name(f"{path.name}.tmp-{os.getpid()}")
    try:
        temporary.unlink(missing_ok=True)
        with open(temporary, "xb") as file:  # x: a link that somebody has put there is not followed
            write(file)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def replace_file(path: Path, data: bytes) -> None:
    """`write_atomically` of bytes."""
    write_atomically(path, lambda file: file.write(data))


def cache_folder() -> Path:
    """Where protomem keeps what it found out and can find out again: $XDG_CACHE_HOME/protomem, else ~/.cache/protomem."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "protomem"


def remove_temporaries(folder: Path) -> None:
    """Delete what a kill in `write_atomically` has left in a folder. Nobody else may be writing there."""
    for path in folder.glob("*.tmp-*"):
        path.unlink(missing_ok=True)


def sync_folder(folder: Path) -> None:
    """Bring what a folder lists (names of files, renames) to the disk, where its file system can."""
    with contextlib.suppress(OSError):
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def parse_json(text: str | bytes) -> Any:
    """json.loads that raises ValueError for everything that it cannot read, also for what is nested too deeply."""
    try:
        return json.loads(text)
    except RecursionError:
        raise ValueError("nested too deeply") from None


def read_json(path: Path) -> Any:
    """A JSON file. Raises OSError, and ValueError for whatever is no JSON or larger than MAX_TEXT."""
    with open(path, "rb") as file:
        data = file.read(MAX_TEXT + 1)
    if len(data) > MAX_TEXT:
        raise ValueError(f"larger than {MAX_TEXT >> 20} MB")
    return parse_json(data)


def read_array(path: Path) -> np.ndarray:
    """The array of a .npy file, memory-mapped: no more is allocated than the file holds, whatever its header says.

    Raises ValueError for anything else, OSError. Objects are refused.
    """
    try:
        array = np.load(path, mmap_mode="r", allow_pickle=False)
    except OSError:
        raise
    except Exception as error:  # a damaged header makes numpy's parser fail in many ways
        raise ValueError(" ".join(str(error).split())[:200]) from None
    if not isinstance(array, np.ndarray):
        array.close()
        raise ValueError("it holds several arrays")
    return array


def read_arrays(path: Path) -> dict[str, np.ndarray]:
    """The arrays of a .npz file. Raises ValueError for anything else, and for arrays of more than MAX_ARRAYS bytes, of
    objects, or of another size than the file says; OSError."""
    try:
        found = {}
        with zipfile.ZipFile(path) as archive:
            if sum(max(member.file_size, 0) for member in archive.infolist()) > MAX_ARRAYS:
                raise ValueError(f"arrays of more than {MAX_ARRAYS >> 30} GB")
            for member in archive.infolist():
                with archive.open(member) as file:
                    found[member.filename.removesuffix(".npy")] = _read_member(file, member.file_size)
    except OSError:
        raise
    except Exception as error:  # zipfile and zlib raise a dozen kinds for damaged bytes
        raise ValueError(" ".join(f"{type(error).__name__}: {error}".split())[:200]) from None
    return found


def _read_member(file, size: int) -> np.ndarray:
    version = np.lib.format.read_magic(file)
    if version not in ((1, 0), (2, 0)):
        raise ValueError(f"version {version} of the .npy format")
    read_header = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
    shape, fortran, dtype = read_header(file)
    count = int(np.prod(shape, dtype=object)) if shape else 1
    if dtype.hasobject or not 0 <= count * dtype.itemsize <= size or min(shape, default=0) < 0:
        raise ValueError("an array of objects, or of another size than it says")
    data = file.read(count * dtype.itemsize + 1)
    array = np.frombuffer(data, dtype, count) if count * dtype.itemsize else np.zeros(count, dtype)
    if len(data) != count * dtype.itemsize:
        raise ValueError("an array of another size than it says")
    return array.reshape(shape, order="F" if fortran else "C")
