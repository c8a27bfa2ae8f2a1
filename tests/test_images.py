"""The check before a decoder, and decoding: against Pillow, and against every way of breaking a file we could think
of."""

import io
import struct
import zlib

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from protomem.data.images import check_image, decode, encode_jpeg, image_size


def picture(height=112, width=112, seed=0) -> np.ndarray:
    rng = np.random.default_rng(seed)
    coarse = rng.integers(0, 256, (-(-height // 8), -(-width // 8), 3)).repeat(8, 0).repeat(8, 1)[:height, :width]
    return np.clip(coarse + rng.integers(-9, 9, coarse.shape), 0, 255).astype(np.uint8)


def saved(array, form, mode="RGB", **options) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(array).convert(mode).save(buffer, form, **options)
    return buffer.getvalue()


KINDS = {
    "jpeg": saved(picture(), "JPEG", quality=92),
    "jpeg 4:4:4 optimised": saved(picture(), "JPEG", subsampling=0, optimize=True, quality=100),
    "jpeg 4:2:2": saved(picture(), "JPEG", subsampling=1),
    "jpeg progressive": saved(picture(), "JPEG", progressive=True),
    "jpeg grey": saved(picture(), "JPEG", "L"),
    "jpeg progressive grey": saved(picture(), "JPEG", "L", progressive=True),
    "jpeg restarts": saved(picture(), "JPEG", restart_marker_blocks=4),
    "jpeg odd size": saved(picture(97, 61), "JPEG"),
    "jpeg with exif and comment": saved(
        picture(), "JPEG", exif=b"Exif\0\0" + b"\xff\xd8\xff\xd9" * 9, comment=b"\xff\xd9"
    ),
    "png": saved(picture(), "PNG"),
    "png grey": saved(picture(), "PNG", "L"),
    "png one bit": saved(picture(), "PNG", "1"),
    "png palette": saved(picture(), "PNG", "P"),
    "png alpha": saved(picture(), "PNG", "RGBA"),
    "png grey alpha": saved(picture(), "PNG", "LA"),
}
JPEG, PNG = KINDS["jpeg"], KINDS["png"]


@pytest.mark.parametrize("kind", KINDS)
def test_whole_images_pass_and_decode_like_pillow(kind):
    data = KINDS[kind]
    assert check_image(data) is None
    expected = np.asarray(Image.open(io.BytesIO(data)).convert("RGB"))
    image = decode(data)
    assert image.dtype == np.uint8 and np.array_equal(image, expected)
    assert image_size(data) == expected.shape[:2]
    assert check_image(data + b"\0\0\0") is None and np.array_equal(decode(data + b"\0\0\0"), expected)


def test_16_bit_png():
    grey = np.arange(112 * 112, dtype=np.uint16).reshape(112, 112) * 5
    buffer = io.BytesIO()
    Image.fromarray(grey).save(buffer, "PNG")
    assert np.array_equal(decode(buffer.getvalue()), (grey >> 8).astype(np.uint8)[..., None].repeat(3, 2))


def test_encode_jpeg():
    array = picture()
    data = encode_jpeg(array)
    assert check_image(data) is None and np.abs(decode(data).astype(int) - array).mean() < 12
    assert len(encode_jpeg(array, 50)) < len(data) < len(encode_jpeg(array, 99))
    assert np.array_equal(decode(encode_jpeg(array[:, ::-1])), decode(encode_jpeg(array[:, ::-1].copy())))


@pytest.mark.parametrize("kind", KINDS)
def test_truncation_anywhere_is_seen(kind):
    data = KINDS[kind]
    for length in [*range(0, min(900, len(data))), *range(900, len(data), 37), len(data) - 1]:
        assert check_image(data[:length]) is not None, length
        with pytest.raises(ValueError):
            decode(data[:length])


def find(data: bytes, marker: int) -> int:
    return data.index(bytes([0xFF, marker]))


def patched(data: bytes, at: int, value: bytes) -> bytes:
    return data[:at] + value + data[at + len(value) :]


SOF, SOS, DQT, DHT = (find(JPEG, marker) for marker in (0xC0, 0xDA, 0xDB, 0xC4))


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"", "empty"),
        (b"\0" * 500, "not JPEG or PNG"),
        (b"GIF89a" + b"\0" * 500, "not JPEG or PNG"),
        (JPEG[:-2], "truncated: no end-of-image marker"),
        (JPEG[: len(JPEG) // 2], "truncated: no end-of-image marker"),
        (JPEG + b"junk", "truncated: no end-of-image marker"),
        (JPEG + JPEG, "stray marker d9"),
        (b"\xff\xd8\xff\xd9", "no image data"),
        (patched(JPEG, SOF + 1, b"\xc3"), "unsupported kind of JPEG"),
        (patched(JPEG, SOF + 1, b"\xc9"), "arithmetic coding"),
        (patched(JPEG, SOF + 4, b"\x0c"), "12 bits per sample"),
        (patched(JPEG, SOF + 5, b"\0\0"), "bad dimensions 112 x 0"),
        (patched(JPEG, SOF + 7, b"\0\0"), "bad dimensions 0 x 112"),
        (patched(JPEG, SOF + 5, b"\xff\xff\xff\xff"), "65535 x 65535 pixels: a decompression bomb"),
        (patched(JPEG, SOF + 9, b"\x04"), "4 colour components"),
        (patched(JPEG, SOF + 9, b"\x01"), "frame header of wrong length"),
        (patched(JPEG, SOF + 11, b"\x05"), "bad sampling factors"),
        (patched(JPEG, SOF + 12, b"\x03"), "quantisation table missing"),
        (patched(JPEG, SOF + 13, JPEG[SOF + 10 : SOF + 11]), "two components with the same number"),
        (patched(JPEG, SOS + 5, b"\x09"), "scan header does not fit"),
        (patched(JPEG, SOS + 6, b"\x22"), "Huffman table missing"),
        (patched(JPEG, SOS + 11, b"\x01"), "bad spectral selection"),
        (patched(JPEG, DQT + 4, b"\x09"), "bad quantisation table"),
        (patched(JPEG, DHT + 4, b"\x25"), "bad Huffman table"),
        (patched(JPEG, DHT + 5, b"\x03"), "too many codes"),
        (patched(JPEG, DHT + 2, b"\x00\x01"), "longer than the file"),
        (patched(JPEG, DHT + 2, b"\xff\xff"), "longer than the file"),
        (JPEG[:DHT] + JPEG[SOS:], "Huffman table missing"),
        (JPEG[:SOF] + JPEG[SOF + 19 :], "scan before the frame header"),
        (JPEG[:DHT] + JPEG[SOF : SOF + 19] + JPEG[DHT:], "two frame headers"),
        (JPEG[: SOS + 14] + b"\xff\xd9", "scan without data"),
        (JPEG[:SOS] + b"\xff\xda\0\x08\1\1\0\0\x3f\0" + JPEG[SOS + 14 :], "colour component missing"),
        (JPEG[: SOS + 200] + b"\xff\xd9" + JPEG[SOS + 200 :], "stray marker d9"),
        (JPEG[: SOS + 200] + b"\xff\xc7\0\4ab" + JPEG[SOS + 200 :], "two frame headers"),
        (PNG[:-12], "truncated header"),
        (PNG[:-13], "truncated"),
        (patched(PNG, 40, b"\0\0"), "bad chunk name|CRC"),
        (PNG + b"junk", "data behind the last chunk"),
        (PNG[:33] + PNG[-12:], "no image data"),
        (PNG[:8] + PNG[33:], "IHDR is not the first chunk"),
        (PNG[:33] + PNG[8:], "two IHDR chunks"),
        (saved(picture(), "JPEG", "CMYK"), "4 colour components"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_reasons(data, reason):
    import re

    found = check_image(data)
    assert found is not None and re.search(reason, found), found
    with pytest.raises(ValueError, match=re.escape(found)):
        decode(data)
    with pytest.raises(ValueError, match=re.escape(found)):
        image_size(data)


def chunk(kind: bytes, body: bytes) -> bytes:
    return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))


def png(*chunks) -> bytes:
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunk(*c) for c in chunks)


def test_png_chunks_with_right_checksums():
    head = struct.pack(">IIBBBBB", 4, 4, 8, 2, 0, 0, 0)
    body = zlib.compress(b"".join(b"\0" + bytes(12) for _ in range(4)))
    assert check_image(png((b"IHDR", head), (b"IDAT", body), (b"IEND", b""))) is None
    bomb = struct.pack(">IIBBBBB", 60000, 60000, 8, 2, 0, 0, 0)
    assert "bad dimensions" in check_image(png((b"IHDR", bomb), (b"IDAT", body), (b"IEND", b"")))
    palette = struct.pack(">IIBBBBB", 4, 4, 8, 3, 0, 0, 0)
    assert check_image(png((b"IHDR", palette), (b"IDAT", body), (b"IEND", b""))) == "palette missing"
    depth = struct.pack(">IIBBBBB", 4, 4, 3, 2, 0, 0, 0)
    assert check_image(png((b"IHDR", depth), (b"IDAT", body), (b"IEND", b""))) == "bad PNG header"
    unknown = png((b"IHDR", head), (b"ABCD", b""), (b"IDAT", body), (b"IEND", b""))
    assert "unknown critical chunk" in check_image(unknown)
    parted = png((b"IHDR", head), (b"IDAT", body[:5]), (b"tEXt", b"a\0b"), (b"IDAT", body[5:]), (b"IEND", b""))
    assert "not consecutive" in check_image(parted)
    with pytest.raises(ValueError, match="PNG cannot be decoded"):  # only decoding can see this
        decode(png((b"IHDR", head), (b"IDAT", b"no zlib"), (b"IEND", b"")))


def test_max_pixels():
    data = saved(picture(20, 30), "JPEG")
    assert check_image(data, max_pixels=600) is None
    assert check_image(data, max_pixels=599) == "bad dimensions 30 x 20: more than 599 pixels"


def test_any_flipped_byte_of_a_png_is_seen():
    data = saved(picture(24, 24), "PNG")
    for at in range(len(data)):
        for mask in (0x01, 0x20, 0xFF):
            assert check_image(data[:at] + bytes([data[at] ^ mask]) + data[at + 1 :]) is not None, at


def test_no_flipped_header_byte_of_a_jpeg_upsets_check_or_decode():
    accepted = 0
    for data in (saved(picture(16, 16), "JPEG"), saved(picture(16, 16), "JPEG", progressive=True)):
        for at in range(min(len(data), 700)):
            for mask in (0x01, 0x80, 0xFF):
                changed = data[:at] + bytes([data[at] ^ mask]) + data[at + 1 :]
                reason = check_image(changed, max_pixels=100_000)
                if reason is None:
                    accepted += 1
                    try:
                        decode(changed)
                    except ValueError:
                        pass
    assert accepted > 100  # tables hold many values that are wrong but not impossible


@settings(max_examples=150, deadline=None)
@given(
    st.sampled_from([b"", b"\xff\xd8", b"\xff\xd8\xff\xda", PNG[:33], JPEG[:SOS]]),
    st.binary(max_size=300),
    st.booleans(),
)
def test_random_bytes_raise_nothing(start, data, end):
    data = start + data + (b"\xff\xd9" if end else b"")
    reason = check_image(data)
    try:
        decode(data)
        assert reason is None
    except ValueError:
        pass
