"""webdataset shards: uncompressed .tar files; the members `<key>.jpg` (.jpeg, .png) and `<key>.cls` make one sample."""

from __future__ import annotations

import glob
import os
import threading
from collections import OrderedDict
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from protomem.data.folders import SUFFIXES
from protomem.data.index_cache import (
    MAX_CLASSES,
    content_fingerprint,
    file_stamp,
    first_changed,
    load_column,
    load_index,
    progress_bar,
    save_index,
)
from protomem.data.recordio import read_property
from protomem.errors import UserError

_OPEN_FILES = 128
_MAX_LABEL_BYTES = 32
_MAX_HEADER_BYTES = 1 << 16
_ZERO_BLOCK = bytes(512)
_REGULAR = (b"0", b"\0", b"7")
_STORED = {"fingerprint": str}, dict.fromkeys(("shard", "offset", "size", "label"), "i8")


class TarRecords:
    """Random access to images inside .tar shards; nothing is unpacked.

    path: a folder (all its *.tar in the order of their names), one .tar file, or a glob pattern. The label is the
    decimal number in the .cls member. `property` beside the shards may give the number of classes, else it is the
    largest label + 1. The members' places are found once and kept in `train.index.cache` (for a file or a pattern under
    a name made from it). strict=False opens the set although labels are out of range. May be pickled and used in
    workers and in threads.
    """

    def __init__(self, path: str | os.PathLike, strict: bool = True):
        self.path = str(path)
        place = Path(path).expanduser().absolute()
        if place.is_dir():
            self.stem = place / "train"
            self.shards = sorted(path for path in place.glob("*.tar") if path.is_file())
        else:
            self.stem = place.with_name(place.name.translate(str.maketrans("*?[]", "____")))
            self.shards = sorted(Path(name) for name in glob.glob(str(place)) if os.path.isfile(name))
        if not self.shards:
            raise UserError(f"{path}: no .tar file there")
        self._open()
        bad = self.damaged
        if strict and len(bad):
            raise UserError(
                f"{self.where(int(bad[0]))}: {self.reason(int(bad[0]))} "
                f"({len(bad):,} such; `protomem data verify {self.path}` lists them all)"
            )

    def _open(self) -> None:
        property_file = self.stem.with_name("property")
        stamp = file_stamp([*self.shards, property_file])
        stored = load_index(self.stem, "tar", stamp, *_STORED)
        if stored is not None and not 0 <= stored[1]["shard"].min() <= stored[1]["shard"].max() < len(self.shards):
            stored = None
        self._cached = stored is not None
        if stored is None:
            arrays = _index(self.shards)
            classes = read_property(property_file)
            possible = arrays["label"][arrays["label"] < MAX_CLASSES]
            meta = {"classes": classes if classes is not None else max(1, int(possible.max(initial=0)) + 1)}
            parts = (np.ascontiguousarray(arrays[name]).data for name in ("offset", "label"))
            meta["fingerprint"] = content_fingerprint([str(meta["classes"]).encode(), *parts], self.shards)
            self._cached = save_index(self.stem, "tar", stamp, meta, arrays) is not None
            stored = (load_index(self.stem, "tar", stamp, *_STORED) if self._cached else None) or (meta, arrays)
        meta, arrays = stored
        self.num_classes: int = meta["classes"]
        self.fingerprint: str = meta["fingerprint"]
        self.labels: np.ndarray = arrays["label"]
        self._shard, self._offset, self._size = arrays["shard"], arrays["offset"], arrays["size"]
        self._files: OrderedDict[int, object] = OrderedDict()
        self._lock = threading.Lock()
        self._stamps = {path: file_stamp([path]) for path in self.shards}

    def changed(self) -> str:
        """The first shard that was changed or replaced since the set was opened, else ""."""
        return first_changed(self._stamps)

    def __len__(self) -> int:
        return len(self.labels)

    def label(self, i: int) -> int:
        return int(self.labels[i])

    def where(self, i: int) -> str:
        return f"{self.shards[self._shard[i]]}: image at byte {self._offset[i]}"

    def reason(self, i: int) -> str:
        """Why position i is in `damaged`, "" if it is not."""
        if 0 <= self.labels[i] < self.num_classes:
            return ""
        return f"label {self.labels[i]} is outside 0..{self.num_classes - 1}"

    @property
    def damaged(self) -> np.ndarray:
        """int64 positions with a label outside 0..num_classes-1. Images are not looked at."""
        return np.flatnonzero((self.labels < 0) | (self.labels >= self.num_classes))

    def bytes(self, i: int) -> bytes:
        """The encoded image as stored; it may be empty or corrupt."""
        shard = int(self._shard[i])
        with self._lock:
            file = self._files.pop(shard, None) or open(self.shards[shard], "rb", buffering=0)
            self._files[shard] = file
            if len(self._files) > _OPEN_FILES:
                self._files.popitem(last=False)  # closed when no other thread reads from it any more
        offset, end = int(self._offset[i]), os.fstat(file.fileno()).st_size
        return os.pread(file.fileno(), max(0, min(int(self._size[i]), end - offset)), offset) if 0 <= offset <= end else b""

    def column(self, name: str) -> np.ndarray:
        """float32 [N] from the side file `<stem>.<name>.npy`, for a folder `train.<name>.npy`."""
        return load_column(self.stem, name, len(self))

    def __getstate__(self) -> dict:
        state = dict(self.__dict__)
        del state["_files"], state["_lock"]
        if self._cached:
            for name in ("labels", "_shard", "_offset", "_size"):
                del state[name]
        return state

    def __setstate__(self, state: dict) -> None:
        self.__dict__.update(state)
        self._files, self._lock = OrderedDict(), threading.Lock()
        if self._cached:
            self._open()
            if self.fingerprint != state["fingerprint"]:
                raise UserError(f"{self.path} was changed while it was in use")


def _index(shards: list[Path]) -> dict[str, np.ndarray]:
    rows: list[tuple[int, int, int, int]] = []  # shard, offset, size, label
    with progress_bar("indexing shards (once)", len(shards)) as advance:
        for number, shard in enumerate(shards):
            try:
                rows.extend((number, *sample) for sample in _samples(shard))
            except OSError as error:
                raise UserError(f"{shard} cannot be read ({error.strerror})") from None
            advance(1)
    if not rows:
        raise UserError(f"{shards[0].parent}: no images with a .cls label in {len(shards)} .tar files")
    table = np.array(rows, np.int64)
    return {name: np.ascontiguousarray(table[:, i]) for i, name in enumerate(("shard", "offset", "size", "label"))}


def _samples(shard: Path) -> list[tuple[int, int, int]]:
    """(offset, size, label) of the images of one shard in their order."""
    images: dict[str, tuple[int, int]] = {}
    labels: dict[str, int] = {}
    with open(shard, "rb") as file:
        for name, offset, size in _members(file, shard):
            folder, _, base = name.rpartition("/")
            key, _, extension = base.partition(".")
            key, extension = f"{folder}/{key}", "." + extension.lower()
            if extension in SUFFIXES:
                if key in images:
                    raise UserError(f"{shard}: two images for the key {key.strip('/')}")
                images[key] = (offset, size)
            elif extension == ".cls":
                text = os.pread(file.fileno(), min(size, _MAX_LABEL_BYTES), offset).strip()
                if not text.removeprefix(b"-").isdigit() or len(text) > 18:
                    raise UserError(f"{shard}: {name} holds no whole number ({text[:20]!r})")
                labels[key] = int(text)
    missing = images.keys() - labels.keys()
    if missing:
        first = min(missing, key=lambda key: images[key])
        raise UserError(f"{shard}: {first.strip('/')} has no .cls member ({len(missing)} of {len(images)} images)")
    return [(*place, labels[key]) for key, place in images.items()]


def _members(file, shard: Path) -> Iterator[tuple[str, int, int]]:
    """(name, offset, size) of the regular members: POSIX ustar and pax, GNU long names. Much faster than tarfile.

    A header is 512 bytes: name at 0 (100), size at 124 (12), checksum at 148 (8), type at 156, prefix of the name at
    345 (155). Sizes are octal text, or binary if the first bit is set. Data are padded to 512 bytes; a zero block ends
    the file.
    """
    total = os.fstat(file.fileno()).st_size
    position, extended = 0, {}
    while True:
        file.seek(position)
        block = file.read(512)
        if block == _ZERO_BLOCK:
            return
        if block[:2] == b"\x1f\x8b" and position == 0:
            raise UserError(f"{shard} is compressed; images in it cannot be reached directly: gunzip it")
        if len(block) < 512:
            raise UserError(
                f"{shard} is truncated: it ends at byte {total:,} without the closing zero block of a tar file"
            )
        if block[257:262] != b"ustar" and _number(block[148:156]) != sum(block) - sum(block[148:156]) + 8 * 32:
            raise UserError(f"{shard}: no tar header at byte {position:,}")
        size, kind = _number(block[124:136]), block[156:157]
        size = extended.get("size", size) if kind in _REGULAR else size
        offset = position + 512
        position = offset + (size + 511) // 512 * 512
        if size < 0 or offset + size > total:
            name = block[:100].rstrip(b"\0").decode(errors="replace")
            raise UserError(f"{shard}: member {name} claims {size:,} bytes, more than the file holds (truncated?)")
        if kind in (b"x", b"L"):  # an extended header, or a long name, for the next member
            if size > _MAX_HEADER_BYTES:
                raise UserError(f"{shard}: a member name of {size:,} bytes at byte {offset:,}")
            content = file.read(size)
            extended.update(_pax(content) if kind == b"x" else {"path": content.rstrip(b"\0")})
        elif kind not in (b"g", b"K"):
            if kind in _REGULAR and "sparse" not in extended:
                prefix = block[345:500].split(b"\0", 1)[0] if block[257:263] == b"ustar\0" else b""
                name = block[:100].split(b"\0", 1)[0]
                yield os.fsdecode(extended.get("path") or (prefix + b"/" + name if prefix else name)), offset, size
            extended = {}


def _number(field: bytes) -> int:
    """A number of a tar header, -1 if it is none."""
    if field[0] & 0x80:
        return int.from_bytes(field[1:], "big")
    try:
        return int(field.strip(b" \0") or b"0", 8)
    except ValueError:
        return -1


def _pax(content: bytes) -> dict[str, bytes | int]:
    """What matters of a pax header: lines of "<length> <key>=<value>"."""
    found: dict[str, bytes | int] = {}
    begin = 0
    while begin < len(content):
        digits = content[begin : begin + 12].partition(b" ")[0]
        length = int(digits) if digits.isdigit() and len(digits) < 12 else 0
        if length <= len(digits):
            break  # no length: what follows cannot be read
        key, _, value = content[begin + len(digits) + 1 : begin + length].rstrip(b"\n").partition(b"=")
        begin += length
        if key == b"path":
            found["path"] = value
        elif key == b"size":
            found["size"] = int(value) if value.isdigit() and len(value) < 20 else -1
        elif key.startswith(b"GNU.sparse"):
            found["sparse"] = 1
    return found
