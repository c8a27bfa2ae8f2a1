"""insightface RecordIO sets (`train.rec`, `train.idx`, `property`) without mxnet: a random-access reader and a writer.

The format is described in protomem/data/rec_index.py.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import struct
from array import array
from pathlib import Path

import numpy as np

from protomem.data import rec_index
from protomem.data.index_cache import (
    MAX_CLASSES,
    content_fingerprint,
    file_stamp,
    first_changed,
    load_column,
    load_index,
    save_index,
)
from protomem.data.rec_index import EXACT, IR_HEADER, MAGIC, MAGIC_BYTES, RecIndex, RecordError
from protomem.errors import UserError
from protomem.files import read_array


# What the index cache holds: facts, arrays.
_STORED = {"promised": int, "fingerprint": str}, {"offset": "i8", "extent": "i8", "label": "i8", "key": "i8", "status": "u1"}


class RecordIO:
    """Random access to the images of a RecordIO set, with or without the identity header of insightface at key 0.

    path: the .rec file, or a folder that holds train.rec. Beside it: the .idx; `property` ("classes,height,width",
    optional); `<stem>.labels.npy` (int64 [N], optional: exact labels where float32 cannot hold them).
    strict: True raises UserError at once if any record is damaged or any label unusable. False opens the set all the
    same; such positions are in `.damaged`, and `bytes` gives b"" where there is no whole record.

    The first opening reads the head of every record; the result is kept in `<stem>.index.cache` and memory-mapped
    later. Open on one rank before the others do, or each of them builds the index for itself (harmless, but slow).
    May be pickled and used in forked and spawned workers and in threads: reads carry their own offset (pread).
    """

    def __init__(self, path: str | os.PathLike, strict: bool = True):
        path = Path(path).expanduser()
        self.rec = (path / "train.rec" if path.is_dir() else path).absolute()
        self.stem = self.rec.with_suffix("")
        self.path, self.strict = str(path), strict
        if not self.rec.is_file():
            raise UserError(f"{self.rec} does not exist" if not self.rec.exists() else f"{self.rec} is no file")
        self._open()
        self._check()

    def _open(self) -> None:
        idx, side = self.stem.with_suffix(".idx"), Path(f"{self.stem}.labels.npy")
        property_file = self.rec.with_name("property")
        if not idx.exists():
            rec_index.read_idx(idx)  # raises the message with the cure
        stamp = file_stamp([self.rec, idx, side, property_file])
        stored = load_index(self.stem, "recordio", stamp, *_STORED)
        self._cached = stored is not None
        if stored is None:
            index = rec_index.build_index(self.rec, idx)
            if side.exists():
                _use_side_labels(index, side)
            classes = read_property(property_file)
            possible = index.label[index.label < MAX_CLASSES]
            known = classes if classes is not None else max(1, int(possible.max(initial=0)) + 1)
            outside = (index.status == 0) & ((index.label < 0) | (index.label >= known))
            index.status[outside] = rec_index.OUT_OF_RANGE
            arrays = {name: getattr(index, name) for name in ("offset", "extent", "label", "key", "status")}
            parts = (np.ascontiguousarray(arrays[name]).data for name in ("offset", "label"))
            fingerprint = content_fingerprint([f"{known}\0".encode(), *parts], [self.rec])
            meta = {"classes": known, "promised": index.promised, "fingerprint": fingerprint}
            self._cached = save_index(self.stem, "recordio", stamp, meta, arrays) is not None
            stored = (load_index(self.stem, "recordio", stamp, *_STORED) if self._cached else None) or (meta, arrays)
        meta, arrays = stored
        self.num_classes: int = meta["classes"]
        self.promised: int = meta["promised"]  # images according to the header record (float32), -1 without one
        self.fingerprint: str = meta["fingerprint"]
        self.labels: np.ndarray = arrays["label"]
        self._offset, self._extent, self._key = arrays["offset"], arrays["extent"], arrays["key"]
        self._status = arrays["status"]
        self._size = self.rec.stat().st_size
        self._file = open(self.rec, "rb", buffering=0)
        self._stamps = {self.rec: file_stamp([self.rec])}

    def changed(self) -> str:
        """The data file if it was changed or replaced since it was opened, else ""."""
        return first_changed(self._stamps)

    def _check(self) -> None:
        bad = self.damaged
        if not (self.strict and len(bad)):
            return
        first, cure = int(bad[0]), f"`protomem data verify {self.path}` lists them all"
        if self._status[first] == rec_index.OUT_OF_RANGE:
            cure = f"correct the first number in {self.rec.with_name('property')}, or the labels; {cure}"
        elif self._status[first] == rec_index.INEXACT:
            cure = f"give the exact labels, int64 in record order, in {self.stem.name}.labels.npy beside it; {cure}"
        raise UserError(
            f"{self.where(first)}: {self.reason(first)} ({len(bad):,} of {len(self):,} records cannot be used; {cure})"
        )

    def __len__(self) -> int:
        return len(self.labels)

    def label(self, i: int) -> int:
        return int(self.labels[i])

    def where(self, i: int) -> str:
        """File, key and offset of position i, for messages."""
        return f"{self.rec}: key {self._key[i]} at byte {self._offset[i]}"

    def reason(self, i: int) -> str:
        """Why position i is in `damaged`, "" if it is not."""
        status = min(int(self._status[i]), len(rec_index.REASONS) - 1)
        if status == rec_index.OUT_OF_RANGE:
            return f"label {self.labels[i]} is outside 0..{self.num_classes - 1}"
        return rec_index.REASONS[status]

    @property
    def damaged(self) -> np.ndarray:
        """int64 positions that cannot be used: no whole record, or no usable label. Images are not looked at."""
        return np.flatnonzero(self._status)

    def bytes(self, i: int) -> bytes:  # noqa: A003
        """The encoded image as stored; it may be empty or corrupt. Raises UserError (strict) for a broken record."""
        try:
            if self._status[i] in (rec_index.TRUNCATED, rec_index.BAD_MAGIC, rec_index.BROKEN):
                raise RecordError(int(self._status[i]))  # it was read once, and may be long
            payload = rec_index.read_payload(
                self._file.fileno(), int(self._offset[i]), self._size, int(self._extent[i])
            )
            return payload[rec_index.split_header(payload)[-1] :]
        except RecordError as error:
            if self.strict:
                raise UserError(
                    f"{self.where(i)}: {error}; `protomem data verify {self.path}` lists all such"
                ) from None
            return b""

    def column(self, name: str) -> np.ndarray:
        """float32 [N] from the side file `<stem>.<name>.npy`."""
        return load_column(self.stem, name, len(self))

    def __getstate__(self) -> dict:
        state = dict(self.__dict__)
        del state["_file"]
        if self._cached:  # the arrays are in a file: workers map it again instead of receiving gigabytes
            for name in ("labels", "_offset", "_extent", "_key", "_status"):
                del state[name]
        return state

    def __setstate__(self, state: dict) -> None:
        self.__dict__.update(state)
        if not self._cached:
            self._file = open(self.rec, "rb", buffering=0)
            return
        self._open()
        if self.fingerprint != state["fingerprint"]:
            raise UserError(f"{self.rec} was changed while it was in use")


def read_property(path: Path) -> int | None:
    """The number of classes in `property`, None without that file."""
    try:
        with open(path, "rb") as file:
            text = file.read(200).decode(errors="replace")
    except FileNotFoundError:
        return None
    try:
        classes = int(text.split(",")[0])
    except ValueError:
        classes = 0
    if not 1 <= classes <= MAX_CLASSES:
        raise UserError(
            f"{path} must begin with the number of identities, like '85742,112,112', at most {MAX_CLASSES:,}; "
            f"it holds {text[:40]!r}"
        )
    return classes


def _use_side_labels(index: RecIndex, path: Path) -> None:
    try:
        labels = read_array(path)
    except (ValueError, OSError) as error:
        raise UserError(f"{path} is no readable .npy file ({error})") from None
    if labels.shape != index.label.shape or labels.dtype.kind not in "iu":
        raise UserError(
            f"{path} holds {labels.dtype} {labels.shape}; it must be int64 [{len(index.label)}] in record order"
        )
    labels = np.array(labels).astype(np.int64)
    readable = (index.status == 0) | (index.status == rec_index.INEXACT)
    # A file left over from another set would give wrong labels silently.
    different = np.flatnonzero(readable & (labels.astype(np.float32) != index.label.astype(np.float32)))
    if len(different):
        i = different[0]
        raise UserError(
            f"{path} gives label {labels[i]} for record {i}, the .rec file {index.label[i]}; delete or renew it"
        )
    index.label[readable] = labels[readable]
    index.status[index.status == rec_index.INEXACT] = 0


def pack_record(encoded: bytes, label: float | tuple[float, ...], key: int, id2: int = 0) -> bytes:
    """One record ready to be appended to a .rec file."""
    if isinstance(label, tuple):
        payload = IR_HEADER.pack(len(label), 0.0, key, id2) + struct.pack(f"<{len(label)}f", *label) + encoded
    else:
        payload = IR_HEADER.pack(0, label, key, id2) + encoded
    if len(payload) >= 1 << 29:
        raise UserError(f"record {key} has {len(payload):,} bytes, a RecordIO record holds fewer than {1 << 29:,}")
    aligned_end = len(payload) // 4 * 4
    cuts, found = [], payload.find(MAGIC_BYTES)
    while 0 <= found <= aligned_end - 4:
        if found % 4 == 0:
            cuts.append(found)
        found = payload.find(MAGIC_BYTES, found + 1)  # the magic cannot overlap itself
    pieces, begin = [], 0
    for number, end in enumerate([*cuts, len(payload)]):
        part = payload[begin:end]
        flag = 0 if not cuts else 1 if number == 0 else 3 if number == len(cuts) else 2
        pieces.append(struct.pack("<II", MAGIC, flag << 29 | len(part)) + part + b"\0" * (-len(part) % 4))
        begin = end + 4
    return b"".join(pieces)


class RecordWriter:
    """Writes a RecordIO set that insightface, MXNet and DALI read: `<stem>.rec`, `<stem>.idx`, `property`.

        with RecordWriter("my_set") as writer:
            writer.add(jpeg_bytes, label)

    If every identity's images arrive in one run, the set gets the identity header (key 0) and the identity records
    behind the images (keys 1..N); otherwise it is header-less (keys 0..N-1). `property` is "max label + 1,112,112", or more
    identities than that if `classes` says so: the last ones have no image then.
    Labels from 2**24 on, which float32 rounds, are kept exactly in id2 and in `<stem>.labels.npy` (int64).
    The files appear when the block is left without an exception; after an exception nothing is left behind.
    """

    def __init__(self, folder: str | os.PathLike, stem: str = "train", classes: int = 0):
        self.folder, self.stem, self.classes = Path(folder).expanduser(), stem, classes
        self._offsets, self._labels = array("q"), array("q")
        self._seen: set[int] = set()
        self._grouped = True

    def __enter__(self) -> RecordWriter:
        self._made = [p for p in (self.folder, *self.folder.parents) if not p.exists()]
        self._temporary = self.folder / f"{self.stem}.rec.tmp-{os.getpid()}"
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            self._file = open(self._temporary, "wb")
        except OSError as error:
            raise UserError(f"{self.folder} cannot be written ({error.strerror})") from None
        return self

    def add(self, encoded: bytes, label: int) -> None:
        """Append one encoded image. Raises UserError for a label outside 0..2**32-1."""
        label = int(label)
        if label < 0:
            raise UserError(f"label {label} of image {len(self._labels)} is negative; labels run from 0")
        if label >= MAX_CLASSES:
            raise UserError(f"label {label} of image {len(self._labels)} is too large; labels run up to {MAX_CLASSES - 1:,}")
        if not self._labels or label != self._labels[-1]:
            self._grouped = self._grouped and label not in self._seen
            self._seen.add(label)
        self._append(encoded, float(label), len(self._labels) + 1, label if label >= EXACT else 0)
        self._labels.append(label)

    def _append(self, encoded: bytes, label: float | tuple[float, ...], key: int, id2: int = 0) -> None:
        self._offsets.append(self._file.tell())
        self._file.write(pack_record(encoded, label, key, id2))

    def __exit__(self, kind, error, trace) -> None:
        outputs: dict[Path, Path] = {}  # final name -> temporary name
        complete = False
        try:
            if kind is None:
                self._finish(outputs)
                # The old index goes first and the new one comes last: an interrupted exchange has none, and says so.
                for suffix in (".idx", ".labels.npy", ".verified.json"):
                    self._path(suffix).unlink(missing_ok=True)
                for path, temporary in outputs.items():
                    os.replace(temporary, path)
                complete = True
        finally:
            self._file.close()
            for temporary in (self._temporary, *outputs.values()):
                temporary.unlink(missing_ok=True)
            if not complete:
                with contextlib.suppress(OSError):  # folders made for this set, as far as they are empty
                    for folder in self._made:
                        folder.rmdir()

    def _path(self, suffix: str) -> Path:
        return self.folder / f"{self.stem}{suffix}"

    def _finish(self, outputs: dict[Path, Path]) -> None:
        """Complete all files under temporary names; `outputs` lists them, the index last."""
        if not self._labels:
            raise UserError(f"{self.folder}: no image was added, nothing is written")
        labels = np.frombuffer(self._labels, np.int64)
        count = len(labels)
        order = range(count)  # of the index lines: which record has key 0, 1, ...
        if self._grouped:
            starts = np.append(np.flatnonzero(np.diff(labels, prepend=-1)), count) + 1  # keys of the first images
            self._append(b"", (float(count + 1), float(count + len(starts))), 0)
            for number, (begin, end) in enumerate(zip(starts[:-1].tolist(), starts[1:].tolist())):
                self._append(b"", (float(begin), float(end)), count + 1 + number)
            order = itertools.chain([count], range(count), range(count + 1, count + len(starts)))
        self._file.flush()
        os.fsync(self._file.fileno())
        outputs[self._path(".rec")] = self._temporary
        if labels.max() >= EXACT:
            np.save(self._new(outputs, self._path(".labels.npy")), labels)
        with open(self._new(outputs, self.folder / "property"), "w") as file:
            file.write(f"{max(labels.max() + 1, self.classes)},112,112\n")
        with open(self._new(outputs, self._path(".idx")), "w") as file:
            file.writelines(f"{key}\t{self._offsets[row]}\n" for key, row in enumerate(order))

    def _new(self, outputs: dict[Path, Path], path: Path) -> Path:
        outputs[path] = path.with_name(f"{path.stem}.tmp-{os.getpid()}{path.suffix}")
        return outputs[path]
