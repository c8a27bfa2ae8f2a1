"""The RecordIO format of insightface sets (MXNet's), byte by byte, and the index that makes a .rec file random-access.

A .rec file is a run of records, each at a multiple of 4 bytes (dmlc-core, recordio.h):
    u32 magic 0xced7230a | u32 (cflag << 29 | length) | length bytes | zeros up to a multiple of 4
A payload that holds the magic itself at a multiple of 4 is cut there into parts (cflag 1 first, 2 middle, 3 last; 0 =
whole). The payload of an image is (mxnet.recordio.IRHeader):
    u32 flag | f32 label | u64 id | u64 id2 | flag * f32 labels | encoded image      (flag > 0: the label is labels[0])
The .idx file has one line "key<TAB>offset" per record. insightface sets have a header at key 0 (flag 2, no image,
labels [N + 1, N + 1 + identities]): keys 1..N are the images, keys N + 1.. one record per identity with its range of
image keys.
"""

from __future__ import annotations

import os
import struct
import warnings
from array import array
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from protomem.data.index_cache import progress_bar
from protomem.errors import UserError
from protomem.files import write_atomically

MAGIC = 0xCED7230A
MAGIC_BYTES = struct.pack("<I", MAGIC)
EXACT = 1 << 24  # float32 holds every integer up to here
IR_HEADER = struct.Struct("<IfQQ")
_WORDS = struct.Struct("<II")
_HEAD = np.dtype(
    {"names": "magic lrec flag label id id2 first".split(), "formats": "<u4 <u4 <u4 <f4 <u8 <u8 <f4".split()}
)
_MAX_PARTS = 1 << 16  # of a record: images hold the magic number once in 16 GB
_SPAN = 4 << 20  # bytes of the .rec read at once while indexing

# What the index may know about a record; everything but 0 makes the position bad.
REASONS = (
    "",
    "truncated: the record ends behind the end of the file",
    "no RecordIO magic number at this offset",
    "broken record: its length fields contradict each other",
    "the label is no integer",
    "label above 2**24 stored as float32 only, which is inexact",
    "label out of range",
)
TRUNCATED, BAD_MAGIC, BROKEN, NOT_INTEGER, INEXACT, OUT_OF_RANGE = range(1, len(REASONS))


class RecordError(Exception):
    """A record cannot be read; `.status` is an index into REASONS."""

    def __init__(self, status: int):
        super().__init__(REASONS[status])
        self.status = status


@dataclass
class RecIndex:
    """Arrays over the images in key order, and what else the scan found."""

    offset: np.ndarray  # int64 [N] of the record in the .rec file
    extent: np.ndarray  # int64 [N] bytes up to the next indexed record: how much to read
    label: np.ndarray  # int64 [N]; -1 where none could be read
    key: np.ndarray  # int64 [N] of the .idx
    status: np.ndarray  # uint8 [N], index into REASONS
    promised: int  # images that the insightface header speaks of (rounded to float32), -1 without a header


def read_idx(path: Path) -> tuple[np.ndarray, np.ndarray]:
    """Keys and offsets, int64, in ascending order of the key. Raises UserError for a missing or malformed file."""
    try:
        text = path.read_bytes() if path.is_file() or not path.exists() else b""
    except FileNotFoundError:
        raise UserError(
            f"{path} does not exist, and without it records cannot be found: "
            f"`protomem data index {path.with_suffix('.rec')}` writes it by scanning the .rec file"
        ) from None
    malformed = (
        f"{path} is no RecordIO index (lines of key<TAB>offset); `protomem data index` rebuilds it from the .rec file"
    )
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # older numpy only warns when it stops at something that is no number
        try:
            numbers = np.fromstring(text, dtype=np.int64, sep=" ")
        except (ValueError, DeprecationWarning):
            raise UserError(malformed) from None
    lines = text.count(b"\n") + (not text.endswith(b"\n"))
    if len(numbers) == 0 or len(numbers) != 2 * lines or (numbers < 0).any():
        raise UserError(malformed)
    key, offset = np.ascontiguousarray(numbers[0::2]), np.ascontiguousarray(numbers[1::2])
    if (np.diff(key) <= 0).any():
        order = np.argsort(key, kind="stable")
        key, offset = key[order], offset[order]
        repeated = np.flatnonzero(np.diff(key) == 0)
        if len(repeated):
            raise UserError(f"{path} lists key {key[repeated[0]]} more than once; `protomem data index` rebuilds it")
    return key, offset


def read_payload(fd: int, offset: int, size: int, hint: int = 4096) -> bytes:
    """One record's payload, its parts joined. `size`: bytes in the file; `hint`: bytes that probably hold it all."""
    start, parts, total = offset, [], 0
    if not 0 <= offset <= size - 8:
        raise RecordError(TRUNCATED)
    data = os.pread(fd, min(max(hint, 8), 1 << 20), offset)
    while True:
        position = offset - start
        if position + 8 > len(data) and offset + 8 <= size:
            data, start, position = os.pread(fd, 1 << 16, offset), offset, 0
        if position + 8 > len(data):
            raise RecordError(TRUNCATED)
        magic, lrec = _WORDS.unpack_from(data, position)
        flag, length = lrec >> 29, lrec & ((1 << 29) - 1)
        if magic != MAGIC:
            raise RecordError(BROKEN if parts else BAD_MAGIC)
        if flag > 3 or (flag in (2, 3)) != bool(parts):
            raise RecordError(BROKEN)
        if offset + 8 + length > size:
            raise RecordError(TRUNCATED)
        part = data[position + 8 : position + 8 + length]
        if len(part) < length:
            part = os.pread(fd, length, offset + 8)
            if len(part) < length:
                raise RecordError(TRUNCATED)
        parts.append(part)
        total += 4 + length
        if total > 1 << 29 or len(parts) > _MAX_PARTS:  # no writer makes such records; one could be as large as the file
            raise RecordError(BROKEN)
        if flag in (0, 3):
            return MAGIC_BYTES.join(parts)
        offset += 8 + (length + 3) // 4 * 4


def split_header(payload: bytes) -> tuple[int, float, int, int, int]:
    """(flag, label, id, id2, where the image begins) of a payload; label is labels[0] where there is an array."""
    if len(payload) < IR_HEADER.size:
        raise RecordError(BROKEN)
    flag, label, id_, id2 = IR_HEADER.unpack_from(payload)
    begin = IR_HEADER.size + 4 * flag
    if begin > len(payload):
        raise RecordError(BROKEN)
    if flag:
        (label,) = struct.unpack_from("<f", payload, IR_HEADER.size)
    return flag, label, id_, id2, begin


def _scan_heads(rec: Path, offset: np.ndarray, description: str) -> tuple[np.ndarray, np.ndarray]:
    """The fixed part of every record (array of _HEAD) and its status. `offset` must ascend.

    The file is read in order in large pieces, because at a few KB an image every page must be touched anyway.
    """
    heads, status = np.zeros(len(offset), _HEAD), np.zeros(len(offset), np.uint8)
    size = rec.stat().st_size
    readable = int(np.searchsorted(offset, size - 8, side="right"))
    status[readable:] = TRUNCATED
    width = _HEAD.itemsize
    with open(rec, "rb", buffering=0) as file, progress_bar(description, len(offset)) as advance:
        fd = file.fileno()

        def scan(bounds: tuple[int, int]) -> None:
            low, high = bounds
            base, end = int(offset[low]), min(int(offset[high - 1]) + width, size)
            raw = np.empty(end - base + width, np.uint8)
            filled = 0
            while filled < end - base:
                count = os.preadv(fd, [raw[filled : end - base]], base + filled)
                if count == 0:
                    break
                filled += count
            raw[filled:] = 0
            windows = np.lib.stride_tricks.sliding_window_view(raw, width)
            heads[low:high] = windows[offset[low:high] - base].view(_HEAD)[:, 0]
            part = heads[low:high]
            flag, length = part["lrec"] >> 29, (part["lrec"] & ((1 << 29) - 1)).astype(np.int64)
            result = np.zeros(high - low, np.uint8)
            result[(length < 24 + 4 * part["flag"].astype(np.int64)) | (flag > 1)] = BROKEN
            for row in np.flatnonzero(flag == 1):  # split records are rare: read them whole
                try:
                    after = offset[low + row + 1] if low + row + 1 < len(offset) else size
                    # Not beyond the next record: else a small index could have one large record read a million times.
                    payload = read_payload(fd, int(offset[low + row]), min(int(after), size))
                    record_flag, label, id_, id2, begin = split_header(payload)
                    part[row] = (MAGIC, len(payload), record_flag, label, id_, id2, label)
                    result[row] = 0
                except RecordError as error:
                    result[row] = error.status
            result[(flag == 0) & (offset[low:high] + 8 + length > size)] = TRUNCATED
            result[part["magic"] != MAGIC] = BAD_MAGIC
            status[low:high] = result
            advance(high - low)

        pieces, low = [], 0
        while low < readable:
            high = int(np.searchsorted(offset[:readable], offset[low] + _SPAN, side="left"))
            pieces.append((low, min(high, low + 500_000)))
            low = pieces[-1][1]
        with ThreadPoolExecutor(4) as pool:
            list(pool.map(scan, pieces))
    return heads, status


def _is_empty_array(heads: np.ndarray) -> np.ndarray:
    """True for header and identity records: two labels and nothing behind them."""
    return (heads["flag"] == 2) & (heads["lrec"] == 32)


def _image_rows(key: np.ndarray, heads: np.ndarray, status: np.ndarray) -> tuple[np.ndarray, int]:
    """Which rows are images, and how many images an insightface header promises (-1 without one). Keys must ascend."""
    first = float(heads["first"][0])
    if key[0] != 0 or status[0] or not _is_empty_array(heads[:1])[0] or not 1 <= first < 2**40:
        return np.ones(len(key), bool), -1
    boundary = int(first)
    if boundary >= EXACT:  # rounded to float32: the first identity record is within one step of it
        step = int(np.spacing(np.float32(first)))
        near = (np.abs(key - boundary) <= step) & _is_empty_array(heads) & (status == 0)
        boundary = int(key[near][0]) if near.any() else boundary + step
    return (key > 0) & (key < boundary), int(first) - 1


def _exact_labels(heads: np.ndarray, status: np.ndarray) -> np.ndarray:
    """int64 labels of the rows; `status` is updated in place where a label cannot be had exactly."""
    stored = np.where(heads["flag"] == 0, heads["label"], heads["first"]).astype(np.float64)
    fine = status == 0
    whole = fine & np.isfinite(stored) & (np.abs(stored) < 2.0**53) & (stored == np.floor(stored))
    status[fine & ~whole] = NOT_INTEGER
    label = np.full(len(heads), -1, np.int64)
    label[whole] = stored[whole].astype(np.int64)
    large = np.flatnonzero(whole & (stored >= EXACT))
    # float32 has lost the low bits. Our writer keeps the label in id2. id is mostly a running number, which may even
    # lie near the label: it counts as the label only if it is the label wherever that can be checked.
    exact = whole & (stored < EXACT)
    fields = ["id", "id2"] if exact.any() and (heads["id"][exact] == label[exact].astype(np.uint64)).all() else ["id2"]
    found = np.zeros(len(large), bool)
    for field in fields:
        candidate = heads[field][large].astype(np.int64)
        match = candidate.astype(np.float32) == stored[large]
        label[large[match]] = candidate[match]
        found |= match
    status[large[~found]] = INEXACT
    return label


def build_index(rec: Path, idx: Path) -> RecIndex:
    """Read the .idx and every record's head (once; the caller stores the result)."""
    key, offset = read_idx(idx)
    order = np.argsort(offset, kind="stable")
    inverse = np.empty_like(order)
    inverse[order] = np.arange(len(order))
    heads, status = _scan_heads(rec, offset[order], f"indexing {rec.name} (once)")
    after = np.append(offset[order][1:], rec.stat().st_size)
    extent = np.maximum(after - offset[order], 0)[inverse]
    heads, status = heads[inverse], status[inverse]
    rows, promised = _image_rows(key, heads, status)
    if not rows.any():
        raise UserError(f"{idx} lists no image; `protomem data index {rec}` rebuilds it from the .rec file")
    heads, status, key = heads[rows], status[rows], key[rows]
    label = _exact_labels(heads, status)
    return RecIndex(offset[rows], extent[rows], label, key, status, promised)


def rebuild_idx(rec: Path, idx: Path) -> tuple[int, list[int]]:
    """Write the .idx of a .rec file by walking through it: (number of lines, offsets at which the chain was broken).

    Keys follow the order in the file, as every known writer has it; a header record gets key 0 wherever it lies. Where
    the chain breaks, it is taken up at the next magic number (writers split payloads so that none occurs inside a
    record). Raises UserError where there is no record at all.
    """
    starts, empty, broken = array("q"), [], []
    size = rec.stat().st_size
    with open(rec, "rb") as file, progress_bar(f"scanning {rec.name} (MB)", size >> 20) as advance:
        window, position, previous = _Window(file), 0, -4
        while position + 8 <= size:
            base = window.base
            head = window.at(position, 12)
            advance(max(0, (window.base >> 20) - (base >> 20)))
            if len(head) < 8:
                break
            magic, lrec = _WORDS.unpack_from(head)
            length = lrec & ((1 << 29) - 1)
            if magic != MAGIC or position + 8 + length > size:
                broken.append(position)
                position = _next_magic(window, max(previous, position if magic == MAGIC else previous) + 4, size)
                continue
            if lrec >> 29 < 2:
                if lrec == 32 and head[8:] == b"\2\0\0\0":
                    empty.append(len(starts))
                starts.append(position)
            previous = position
            position += 8 + (length + 3) // 4 * 4
        if not starts:
            raise UserError(f"{rec} holds no RecordIO record")
        order = list(range(len(starts)))
        tail = len(starts) - len(empty)
        if empty and tail > 0 and empty == list(range(tail, len(starts))):
            file.seek(starts[tail] + 32)
            (first,) = struct.unpack("<f", file.read(4))
            # images first, then the header, then the identities (as face2rec2 writes them)
            if abs(first - (tail + 1)) <= np.spacing(np.float32(tail + 1)):
                order = [tail, *range(tail), *range(tail + 1, len(starts))]

    def write(output):
        for low in range(0, len(order), 100_000):
            rows = enumerate(order[low : low + 100_000], low)
            output.write(b"".join(b"%d\t%d\n" % (key, starts[row]) for key, row in rows))

    write_atomically(idx, write)
    return len(order), broken


class _Window:
    """The piece of a file that was read last: looking for the next record step by step reads nothing twice."""

    def __init__(self, file):
        self.file, self.base, self.buffer = file, 0, b""

    def at(self, position: int, count: int) -> bytes:
        """`count` bytes from there, fewer only at the end of the file."""
        if not self.base <= position <= self.base + len(self.buffer) - count:
            self.file.seek(position)
            self.base, self.buffer = position, self.file.read(_SPAN)
        return self.buffer[position - self.base : position - self.base + count]


def _next_magic(window: _Window, position: int, size: int) -> int:
    """The next multiple of 4 from `position` on where the magic number stands; `size` if there is none."""
    position = -(-position // 4) * 4
    while position + 4 <= size:
        if len(window.at(position, 4)) < 4:
            break
        begin = position - window.base
        found = window.buffer.find(MAGIC_BYTES, begin)
        while found >= 0 and (window.base + found) % 4:
            found = window.buffer.find(MAGIC_BYTES, found + 1)
        if found >= 0:
            return window.base + found
        position = window.base + (len(window.buffer) & ~3)
    return size
