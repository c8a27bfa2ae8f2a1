"""Files appear whole or not at all."""

from __future__ import annotations

import contextlib
import os
from pathlib import Path
from typing import Any, Callable


def write_atomically(path: Path, write: Callable[[Any], None]) -> None:
    """Call `write(file)` on a temporary binary file in the same folder, then rename it to `path`: whoever reads sees the
    old file until the new one is complete, and a failure leaves nothing behind."""
    temporary = path.with_name(f"{path.name}.tmp-{os.getpid()}")
    try:
        with open(temporary, "wb") as file:
            write(file)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def replace_file(path: Path, data: bytes) -> None:
    """`write_atomically` of bytes."""
    write_atomically(path, lambda file: file.write(data))


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
