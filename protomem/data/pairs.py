"""Verification sets: pairs of aligned faces in the .bin form of insightface (LFW, CFP-FP, AgeDB, CPLFW, CALFW, XQLFW).

A .bin file is a pickle of (encoded images, same): 2n images, of which 2i and 2i + 1 are pair i, and n booleans.
"""

from __future__ import annotations

import os
import pickle
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from protomem.data.folders import SUFFIXES
from protomem.data.images import check_image
from protomem.data.safe_pickle import RefusedError, read_plain_pickle
from protomem.errors import UserError
from protomem.files import write_atomically


def read_bin(path: str | os.PathLike) -> tuple[list[bytes], np.ndarray]:
    """(2n encoded images, bool [n]: pair i = images 2i and 2i + 1 shows one person) of a .bin file.

    Nothing in the file is executed (protomem.data.safe_pickle). Raises UserError if the file asks for that, or is no
    such file. The images are not looked at.
    """
    path = Path(path)
    try:
        content = read_plain_pickle(path.read_bytes())
    except FileNotFoundError:
        raise UserError(f"{path} does not exist; `protomem data pairs` makes verification sets") from None
    except RefusedError as error:
        raise UserError(f"{path} is refused: its pickle asks for {error}, which no verification set needs") from None
    except (ValueError, OSError) as error:
        raise UserError(f"{path} cannot be read as a verification set: {error}") from None
    if not (isinstance(content, (tuple, list)) and len(content) == 2):
        raise UserError(f"{path} holds a {type(content).__name__}, not (images, same)")
    images, same = content
    if not isinstance(images, (list, tuple)) or not isinstance(same, (list, tuple, np.ndarray)):
        raise UserError(f"{path} must hold a list of images and a list of booleans")
    if len(images) != 2 * len(same) or not len(same):
        raise UserError(f"{path} holds {len(images)} images for {len(same)} pairs; every pair needs two")
    flags = np.zeros(len(same), bool)
    for pair, value in enumerate(same):
        if isinstance(value, np.ndarray) and value.size == 1:
            value = value.item()
        if not isinstance(value, (bool, int, np.bool_, np.integer)) or value not in (0, 1):
            shown = value if isinstance(value, (int, np.integer)) else type(value).__name__
            raise UserError(f"{path}: pair {pair} is neither true nor false ({shown})")
        flags[pair] = value
    converted: dict[tuple, bytes] = {}  # data that are listed many times must not be copied as often
    encoded = []
    for number, image in enumerate(images):
        if isinstance(image, np.ndarray) and image.dtype == np.uint8:
            place = image.__array_interface__["data"][0], image.size
            if place not in converted:
                converted[place] = image.tobytes()
            image = converted[place]
        if not isinstance(image, bytes):
            raise UserError(f"{path}: image {number} is a {type(image).__name__}, not encoded bytes")
        encoded.append(image)
    return encoded, flags


def write_bin(path: str | os.PathLike, encoded: Sequence[bytes], issame: Sequence[bool]) -> None:
    """Write a .bin file that insightface reads: images 2i and 2i + 1 are pair i. Appears whole or not at all.

    Raises UserError unless there are two images per pair.
    """
    path = Path(path).expanduser()
    images, same = [bytes(image) for image in encoded], [bool(value) for value in issame]
    if len(images) != 2 * len(same) or not same:
        raise UserError(f"{path}: {len(images)} images for {len(same)} pairs; every pair needs two")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(path, lambda file: pickle.dump((images, same), file, protocol=4))
    except OSError as error:
        raise UserError(f"{path} cannot be written ({error.strerror})") from None


def pairs_from_folder(
    root: str | os.PathLike, list_file: str | os.PathLike, output: str | os.PathLike
) -> tuple[int, int]:
    """Make a .bin from a list of pairs and a folder of images, which are taken as they are, so must be aligned.

    The list has one pair per line, columns parted by blanks, or by tabs alone if the line has one. Forms may be mixed:
      - `fileA fileB 1` or `... 0`: files below `root`, 1 = the same person
      - LFW's pairs.txt: `name 1 4` (two images of one person), `nameA 2 nameB 7` (two people), files
        `root/name/name_0001.jpg` (or .jpeg, .png); its first line with one or two counts is skipped
    Empty lines and lines that begin with # are skipped. Returns (pairs, genuine pairs).
    Raises UserError naming the line for a line of another form, a missing file, or one that is no whole image.
    """
    root, list_file = Path(root).expanduser(), Path(list_file).expanduser()
    try:
        lines = list_file.read_text(encoding="utf-8-sig").splitlines()
    except (OSError, UnicodeError) as error:
        raise UserError(f"{list_file} cannot be read as text: {error}") from None
    encoded: list[bytes] = []
    same: list[bool] = []
    for number, line in enumerate(lines, 1):
        columns = [column.strip() for column in (line.split("\t") if "\t" in line else line.split())]
        where = f"{list_file}, line {number}"
        if not line.strip() or line.startswith("#") or (number == 1 and all(map(str.isdecimal, columns))):
            continue
        if len(columns) == 3 and columns[2] in ("0", "1") and not columns[1].isdecimal():
            files, genuine = [_inside(root, name, where) for name in columns[:2]], columns[2] == "1"
        elif len(columns) == 3 and columns[1].isdecimal() and columns[2].isdecimal():
            files, genuine = [_lfw_file(root, columns[0], image, where) for image in columns[1:]], True
        elif len(columns) == 4 and columns[1].isdecimal() and columns[3].isdecimal():
            files, genuine = [_lfw_file(root, *columns[at : at + 2], where) for at in (0, 2)], False
        else:
            raise UserError(f"{where}: neither 'fileA fileB 0|1' nor a line of LFW's pairs.txt: {line[:80]!r}")
        for file in files:
            try:
                data = file.read_bytes()
            except OSError as error:
                raise UserError(f"{where}: {file} cannot be read ({error.strerror})") from None
            reason = check_image(data)
            if reason is not None:
                raise UserError(f"{where}: {file} is no usable image: {reason}")
            encoded.append(data)
        same.append(genuine)
    if not same:
        raise UserError(f"{list_file} holds no pair")
    write_bin(output, encoded, same)
    return len(same), sum(same)


def _inside(root: Path, name: str, where: str) -> Path:
    """A name of a list. It stays below `root`: a list from elsewhere must not pack other files of this machine."""
    if os.path.isabs(name) or ".." in Path(name).parts or "\0" in name:
        raise UserError(f"{where}: {name} is not below {root}; write names of files in that folder")
    return root / name


def _lfw_file(root: Path, name: str, image: str, where: str) -> Path:
    stem = _inside(root, f"{name}/{name}_{image.lstrip('0') or '0':0>4}", where)
    for suffix in SUFFIXES:
        path = Path(f"{stem}{suffix}")
        if os.path.isfile(path):
            return path
    raise UserError(f"{where}: {stem}.jpg does not exist (nor with {', '.join(SUFFIXES[1:])})")
