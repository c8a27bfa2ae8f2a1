"""Checksums of a checkpoint's files: torch.distributed.checkpoint writes none, and a flipped bit would train on unnoticed.

SHA-256, since processors have instructions for it; each rank reads its share of the files.
"""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Iterable

from protomem import distributed
from protomem.errors import UserError

CHUNK = 1 << 22


def sha256(path: Path) -> str:
    """Of a whole file, in hexadecimal."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while chunk := file.read(CHUNK):
            digest.update(chunk)
    return digest.hexdigest()


def of_rank(folder: Path) -> dict[str, str]:
    """{name: checksum} of the files that this rank has written into a checkpoint."""
    return {path.name: sha256(path) for path in sorted(Path(folder).glob(f"__{distributed.rank()}_*"))}


def verify(folder: Path, expected: dict[str, str], names: Iterable[str], alone: bool = False) -> None:
    """Compare the named files with what was written. alone: by this process; else by all ranks, each a share of them.

    Raises UserError, on every rank that takes part, that names the first file that is missing or differs."""
    rank, world = (0, 1) if alone else (distributed.rank(), distributed.world_size())
    problem = None
    for name in sorted(names)[rank::world]:
        try:
            if name in expected and sha256(Path(folder) / name) != expected[name]:
                problem = f"{name} is not what was written"
        except OSError as error:
            problem = f"{name} cannot be read: {error.strerror}"
        if problem:
            break
    problems = [problem] if alone else distributed.gather_objects(problem)
    for problem in filter(None, problems):
        raise UserError(f"checkpoint {folder} is damaged ({problem}); take another checkpoint")
