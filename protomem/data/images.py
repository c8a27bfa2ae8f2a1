"""Encoded images: a cheap structural check before a native decoder sees them, decoding, encoding.

A corrupt or empty image can end the whole process inside a native decoder (DALI) instead of raising an error.
check_image therefore reads the file's skeleton (JPEG: ITU-T T.81 annex B; PNG: RFC 2083) without decoding a pixel.
"""

from __future__ import annotations

import functools
import re
import struct
import zlib
from typing import NamedTuple

import numpy as np

MAX_PIXELS = 64_000_000  # (our default) 8000 x 8000: above that a file is taken for a decompression bomb
_MAX_DENSITY = 1000  # (our default) pixels that a byte may stand for: baseline JPEG has at most 256, a face about 10
_SMALL = 1 << 20  # pixels that may be made of nothing
_U16 = struct.Struct(">H").unpack_from
_FRAME = struct.Struct(">BHHB").unpack_from  # precision, height, width, components
# The first marker behind entropy-coded data: not a stuffed zero, not a restart marker, not a fill byte.
_MARKER = re.compile(rb"\xff[^\x00\xd0-\xd7\xff]").search
_MAX_SCANS = 200  # progressive files have about ten; every further scan costs a pass over the image
_MAX_WORK = 20 * MAX_PIXELS  # (our default) scans times pixels
_PNG = b"\x89PNG\r\n\x1a\n"
_PNG_DEPTHS = {0: (1, 2, 4, 8, 16), 2: (8, 16), 3: (1, 2, 4, 8), 4: (8, 16), 6: (8, 16)}  # colour type -> bit depths


class _Bad(Exception):
    """The reason why an image must not be decoded."""


def check_image(data: bytes, max_pixels: int = MAX_PIXELS) -> str | None:
    """None if `data` has the structure of a whole JPEG or PNG of 1..max_pixels pixels, else the reason in words.

    Seen: empty or foreign data, truncation, broken or contradicting segments, kinds of JPEG that the decoders here do
    not support (12 bit, lossless, arithmetic coding, CMYK), stray markers inside the coded data, wrong PNG checksums.
    Not seen: damage inside the entropy-coded data of a JPEG that leaves its markers whole; decode() notices most of it.
    """
    try:
        _size(data, max_pixels)
    except _Bad as reason:
        return str(reason)
    return None


def image_size(data: bytes) -> tuple[int, int]:
    """(height, width) of an encoded image, by its structure alone. Raises ValueError with the reason of check_image."""
    try:
        return _size(data, MAX_PIXELS)
    except _Bad as reason:
        raise ValueError(str(reason)) from None


def decode(data: bytes) -> np.ndarray:
    """uint8 [H, W, 3], RGB. JPEG as libjpeg-turbo's accurate integer transform and smooth upsampling give it (as do
    Pillow and DALI on the CPU); grey images get three equal channels; PNG transparency is dropped.

    Raises ValueError with a reason for anything that is not a whole image, also where a decoder would only warn.
    """
    try:
        _size(data, MAX_PIXELS)
    except _Bad as reason:
        raise ValueError(str(reason)) from None
    if data[:2] == b"\xff\xd8":
        import simplejpeg

        return simplejpeg.decode_jpeg(data, colorspace="RGB", fastdct=False, fastupsample=False)
    import io

    from PIL import Image

    try:
        with Image.open(io.BytesIO(data), formats=["PNG"]) as image:
            if image.mode.startswith("I"):  # 16-bit grey, which convert would cut off at 255
                return np.repeat((np.asarray(image) >> 8).astype(np.uint8)[..., None], 3, axis=2)
            return np.asarray(image.convert("RGB"))
    except Exception as error:  # Pillow raises OSError, SyntaxError, zlib.error, ... for broken PNG data
        raise ValueError(f"PNG cannot be decoded: {error}") from None


def encode_jpeg(array: np.ndarray, quality: int = 92) -> bytes:
    """JPEG bytes of uint8 [H, W, 3] RGB; chroma at half resolution (4:2:0), the usual form of face sets."""
    import simplejpeg

    return simplejpeg.encode_jpeg(
        np.ascontiguousarray(array), quality=quality, colorspace="RGB", colorsubsampling="420", fastdct=False
    )


def _size(data: bytes, max_pixels: int) -> tuple[int, int]:
    """(height, width), or raises _Bad."""
    if not data:
        raise _Bad("empty")
    try:
        if data[:2] == b"\xff\xd8":
            height, width = _jpeg(data)
        elif data[:8] == _PNG:
            height, width = _png(data)
        else:
            raise _Bad("not JPEG or PNG")
    except (struct.error, IndexError):
        raise _Bad("truncated header") from None
    if not (height and width):
        raise _Bad(f"bad dimensions {width} x {height}")
    if height * width > max_pixels:
        raise _Bad(f"bad dimensions {width} x {height}: more than {max_pixels:,} pixels")
    if height * width > max(_SMALL, _MAX_DENSITY * len(data)):
        raise _Bad(f"bad dimensions {width} x {height} for a file of {len(data):,} bytes: a decompression bomb")
    return height, width


def _jpeg(data: bytes) -> tuple[int, int]:
    end = _jpeg_end(data)
    frame: _Frame | None = None
    quantisation: set[int] = set()
    huffman: set[int] = set()
    scanned: set[int] = set()
    scans, position = 0, 2
    while True:
        marker = data[position + 1]
        if data[position] != 0xFF:
            raise _Bad(f"no marker at byte {position}")
        if marker == 0xFF:  # a fill byte
            position += 1
            continue
        if position >= end - 2:
            break
        if marker <= 0x01 or 0xD0 <= marker <= 0xD9:
            raise _Bad(f"stray marker {marker:02x} at byte {position}")
        begin = position + 4
        stop = begin - 2 + _U16(data, position + 2)[0]
        if not begin <= stop <= end - 2:
            raise _Bad(f"segment {marker:02x} at byte {position} is longer than the file")
        position = stop
        if marker == 0xDB:
            quantisation |= _quantisation_tables(data[begin:stop])
        elif marker == 0xC4:
            huffman |= _huffman_tables(data[begin:stop])
        elif marker == 0xDA:
            scans += 1
            if frame is None or scans > _MAX_SCANS:
                raise _Bad("scan before the frame header" if frame is None else f"more than {_MAX_SCANS} scans")
            scanned.update(_scan(data[begin:stop], frame, quantisation, huffman))
            position = _MARKER(data, stop).start()  # there is one: the end of the image
            if position == stop:
                raise _Bad("scan without data")
        elif 0xC0 <= marker <= 0xCF and marker != 0xC8:
            if frame is not None:
                raise _Bad("two frame headers")
            frame = _frame(marker, data[begin:stop])
    if frame is None or not scanned:
        raise _Bad("no image data before the end-of-image marker")
    if scans * frame.height * frame.width > _MAX_WORK:
        raise _Bad(f"{scans} scans of {frame.width} x {frame.height} pixels: a decompression bomb")
    if len(scanned) < len(frame.tables):
        raise _Bad("image data of a colour component missing")
    return frame.height, frame.width


def _jpeg_end(data: bytes) -> int:
    """Where the file ends, behind its end-of-image marker; zeros behind it are padding."""
    if data.endswith(b"\xff\xd9"):
        return len(data)
    end = len(data.rstrip(b"\0"))
    if data[end - 2 : end] != b"\xff\xd9":
        raise _Bad("truncated: no end-of-image marker")
    return end


class _Frame(NamedTuple):
    height: int
    width: int
    progressive: bool
    tables: dict[int, int]  # component id -> its quantisation table


# Segments repeat from file to file, so what was checked once is remembered.
@functools.lru_cache(maxsize=512)
def _frame(marker: int, segment: bytes) -> _Frame:
    if marker not in (0xC0, 0xC1, 0xC2):
        raise _Bad("arithmetic coding" if marker > 0xC8 else f"unsupported kind of JPEG (SOF{marker - 0xC0})")
    precision, height, width, count = _FRAME(segment)
    if precision != 8:
        raise _Bad(f"{precision} bits per sample")
    if count not in (1, 3):
        raise _Bad(f"{count} colour components")
    if len(segment) != 6 + 3 * count:
        raise _Bad("frame header of wrong length")
    if any(not (1 <= sampling >> 4 <= 4 and 1 <= sampling & 15 <= 4) for sampling in segment[7::3]):
        raise _Bad("bad sampling factors")
    tables = dict(zip(segment[6::3], segment[8::3]))
    if len(tables) != count:
        raise _Bad("two components with the same number")
    return _Frame(height, width, marker == 0xC2, tables)


@functools.lru_cache(maxsize=512)
def _quantisation_tables(segment: bytes) -> frozenset[int]:
    known, begin = set(), 0
    while begin < len(segment):
        kind = segment[begin]
        if kind >> 4 > 1 or kind & 15 > 3:
            raise _Bad("bad quantisation table")
        known.add(kind & 15)
        begin += 129 if kind >> 4 else 65
    if begin != len(segment):
        raise _Bad("quantisation table of wrong length")
    return frozenset(known)


@functools.lru_cache(maxsize=512)
def _huffman_tables(segment: bytes) -> frozenset[int]:
    """The tables of a DHT segment, each named by its class and number (0x00, 0x01 for DC, 0x10, 0x11 for AC, ...)."""
    known, begin = set(), 0
    while begin < len(segment):
        kind, counts = segment[begin], segment[begin + 1 : begin + 17]
        if kind >> 4 > 1 or kind & 15 > 3:
            raise _Bad("bad Huffman table")
        used = sum(count << 15 - bits for bits, count in enumerate(counts))
        # counted in 16-bit code words, of which the last, all ones, is no code (annex C)
        if used > 0xFFFF or not 0 < sum(counts) <= 256:
            raise _Bad("Huffman table with too many codes, or none")
        known.add(kind)
        begin += 17 + sum(counts)
    if begin != len(segment):
        raise _Bad("Huffman table of wrong length")
    return frozenset(known)


def _scan(segment: bytes, frame: _Frame, quantisation: set[int], huffman: set[int]) -> bytes:
    """Check a scan header against the tables seen so far; returns the components of the scan."""
    count = segment[0]
    components, selectors = segment[1 : 1 + 2 * count : 2], segment[2 : 2 + 2 * count : 2]
    if len(segment) != 4 + 2 * count or not count or not frame.tables.keys() >= set(components):
        raise _Bad("scan header does not fit the frame header")
    first, last, approximation = segment[-3:]
    if frame.progressive:
        if first > last or last > 63 or (first == 0) != (last == 0) or (first and count > 1):
            raise _Bad("bad spectral selection in a progressive scan")
    elif (first, last, approximation) != (0, 63, 0):
        raise _Bad("bad spectral selection")
    for component, selector in zip(components, selectors):
        if frame.tables[component] not in quantisation:
            raise _Bad("quantisation table missing")
        needs_dc = first == 0 and not (frame.progressive and approximation >> 4)
        if needs_dc and selector >> 4 not in huffman or last and 0x10 | selector & 15 not in huffman:
            raise _Bad("Huffman table missing")
    return components


def _png(data: bytes) -> tuple[int, int]:
    view, position, seen, size = memoryview(data), 8, set(), (0, 0)
    kind = previous = b""
    while kind != b"IEND":
        length, kind = struct.unpack_from(">I4s", data, position)
        stop = position + 12 + length
        if stop > len(data):
            raise _Bad("truncated: chunk longer than the file")
        name = kind.decode("latin-1")
        if not (kind.isalpha() and kind.isascii()):
            raise _Bad(f"bad chunk name at byte {position + 4}")
        if zlib.crc32(view[position + 4 : stop - 4]) != struct.unpack_from(">I", data, stop - 4)[0]:
            raise _Bad(f"PNG chunk CRC wrong ({name})")
        if (kind == b"IHDR") != (not seen):
            raise _Bad("IHDR is not the first chunk" if not seen else "two IHDR chunks")
        if kind == b"IHDR":
            width, height, depth, colour, compression, filtering, interlace = struct.unpack_from(">IIBBBBB", data, 16)
            if length != 13 or depth not in _PNG_DEPTHS.get(colour, ()) or compression or filtering or interlace > 1:
                raise _Bad("bad PNG header")
            size, palette = (height, width), colour == 3
        elif kind == b"IDAT":
            if kind in seen and previous != kind:
                raise _Bad("IDAT chunks are not consecutive")
            if palette and b"PLTE" not in seen:
                raise _Bad("palette missing")
        elif kind[0] < 97 and kind not in (b"PLTE", b"IEND"):
            raise _Bad(f"unknown critical chunk {name}")
        seen.add(kind)
        previous, position = kind, stop
    if b"IDAT" not in seen:
        raise _Bad("no image data")
    if data[position:].strip(b"\0"):
        raise _Bad("data behind the last chunk")
    return size
