"""Verification .bin files: every way they are written, and every way to hide code in one."""

import builtins
import os
import pickle
import pickletools
import struct
import tracemalloc
import warnings

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from protomem.data.images import encode_jpeg
from protomem.data.pairs import pairs_from_folder, read_bin, write_bin
from protomem.errors import UserError

RNG = np.random.default_rng(0)
IMAGES = [RNG.bytes(300), b"", b"\xff\xd8\n'\"\\", RNG.bytes(70_000), bytes(range(256)), b"ascii"]
IMAGES[4:4] = IMAGES[:2]  # the same object twice
SAME = [True, False, False, True]
FORMS = {
    "lists": (IMAGES, SAME),
    "tuples": (tuple(IMAGES), tuple(SAME)),
    "list of lists": [IMAGES, SAME],
    "integers": (IMAGES, [int(value) for value in SAME]),
    "numpy booleans": (IMAGES, [np.bool_(value) for value in SAME]),
    "numpy arrays": ([np.frombuffer(image, np.uint8) for image in IMAGES], np.array(SAME)),
    "2-d arrays": ([np.frombuffer(image, np.uint8).copy()[None] for image in IMAGES], np.array(SAME).astype(np.int64)),
    "signed arrays": ([np.frombuffer(image, np.int8) for image in IMAGES], [np.array(value) for value in SAME]),
    "bytearrays": ([bytearray(image) for image in IMAGES], SAME),
}


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("protocol", range(6))
@pytest.mark.parametrize("dump", [pickle.dumps, pickle._dumps], ids=["c", "python"])
def test_forms(tmp_path, form, protocol, dump):
    if dump is pickle._dumps and protocol == 5 and "arrays" in form:
        pytest.skip("Python's own pickler cannot write an empty array with protocol 5")
    (tmp_path / "a.bin").write_bytes(dump(FORMS[form], protocol))
    encoded, same = read_bin(tmp_path / "a.bin")
    assert encoded == IMAGES and all(type(image) is bytes for image in encoded)
    assert same.dtype == bool and same.tolist() == SAME


def python2(protocol: int) -> bytes:
    """What Python 2's cPickle writes: str as STRING / BINSTRING / SHORT_BINSTRING, booleans as I01 or NEWTRUE."""
    out = b"" if protocol == 0 else b"\x80\x02" if protocol == 2 else b""
    out += b"(" + (b"(l" if protocol == 0 else b"]") + b"p1\n" + (b"" if protocol == 0 else b"(")
    for image in IMAGES:
        if protocol == 0:
            text = "".join(
                {10: "\\n", 39: "\\'", 92: "\\\\"}.get(c, chr(c) if 32 <= c < 127 else f"\\x{c:02x}") for c in image
            )
            out += b"S'" + text.encode() + b"'\na"
        elif len(image) < 256:
            out += b"U" + bytes([len(image)]) + image + b"q\x05"
        else:
            out += b"T" + struct.pack("<i", len(image)) + image + b"r\x07\0\0\0"
    out += b"" if protocol == 0 else b"e"
    out += (b"(l" if protocol == 0 else b"](") + b""
    for value in SAME:
        out += (b"\x88" if value else b"\x89") if protocol == 2 else b"I01\n" if value else b"I00\n"
        out += b"a" if protocol == 0 else b""
    return out + (b"" if protocol == 0 else b"e") + b"t."


@pytest.mark.parametrize("protocol", [0, 1, 2])
def test_python_2(tmp_path, protocol):
    data = python2(protocol)
    assert pickle.loads(data, encoding="bytes") == (IMAGES, SAME)  # the pickle written here by hand is a right one
    (tmp_path / "a.bin").write_bytes(data)
    encoded, same = read_bin(tmp_path / "a.bin")
    assert encoded == IMAGES and same.tolist() == SAME


@settings(max_examples=40, deadline=None)
@given(st.lists(st.tuples(st.binary(max_size=40), st.binary(max_size=40), st.booleans()), min_size=1, max_size=9))
def test_round_trip(tmp_path_factory, pairs):
    path = tmp_path_factory.mktemp("bins") / "new folder" / "a.bin"
    encoded, same = [image for pair in pairs for image in pair[:2]], [pair[2] for pair in pairs]
    write_bin(path, encoded, same)
    assert pickle.loads(path.read_bytes()) == (encoded, same)  # as insightface reads it
    read, flags = read_bin(path)
    assert read == encoded and flags.tolist() == same
    assert os.listdir(path.parent) == ["a.bin"]


def test_write_bin_refuses_odd_pairs_and_leaves_nothing(tmp_path):
    for encoded, same in (([b"a"] * 3, [True]), ([], []), ([b"a"] * 2, [True, False])):
        with pytest.raises(UserError, match="every pair needs two"):
            write_bin(tmp_path / "a.bin", encoded, same)
    assert os.listdir(tmp_path) == []
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(UserError, match="cannot be written"):
        write_bin(tmp_path / "file" / "a.bin", [b"a"] * 2, [True])


class Call:
    def __init__(self, function, *arguments, state=None):
        self.parts = (function, arguments) if state is None else (function, arguments, state)

    def __reduce__(self):
        return self.parts


def attacks(flag: str) -> dict[str, object]:
    touch = f"touch {flag}"
    return {
        "os.system": Call(os.system, touch),
        "eval": Call(eval, f"open({flag!r}, 'w')"),
        "exec": Call(exec, f"open({flag!r}, 'w')"),
        "open": Call(open, flag, "w"),
        "getattr": Call(getattr, b"", "hex"),
        "import": Call(builtins.__import__, "os"),
        "nested": [[Call(list, [Call(os.system, touch)])]],
        "nested in numpy": Call(np.frombuffer, Call(os.system, touch)),
        "numpy load": Call(np.load, flag),
        "numpy object array": np.array([Call(os.system, touch)], dtype=object),
        "state of an array": Call(np.ndarray, (1,), state=(1, Call(os.system, touch))),
        "bytes of a number": Call(bytes, 10**12),
        "bytearray of a number": Call(bytearray, 10**12),
        "numpy zeros": Call(np.zeros, 10**12),
        "numpy array of floats": np.zeros(3),
        "memmap": Call(np.memmap, flag, np.uint8, "w+", 0, 10),
        "set": {1, 2},
        "dict": {"a": 1},
        "complex": 1j,
    }


@pytest.mark.parametrize("protocol", [0, 2, 4, 5])
@pytest.mark.parametrize("attack", attacks(""))
def test_attacks_are_refused_and_not_executed(tmp_path, attack, protocol, monkeypatch):
    flag = tmp_path / "executed"
    data = pickle.dumps((IMAGES, [attacks(str(flag))[attack]] * 4), protocol)
    (tmp_path / "a.bin").write_bytes(data)
    monkeypatch.setattr(pickle, "load", None)
    monkeypatch.setattr(pickle, "loads", None)
    with pytest.raises(UserError, match=r"a\.bin is refused: its pickle asks for "):
        read_bin(tmp_path / "a.bin")
    assert not flag.exists()


RAW = {
    "posix.system": b"cposix\nsystem\n(S'touch %s'\ntR.",
    "posix.system by instance": b"(S'touch %s'\niposix\nsystem\n.",
    "posix.system by object": b"(cposix\nsystem\nS'touch %s'\no.",
    "numpy spoofed": b"cnumpy.core.multiarray\nsystem\n(S'touch %s'\ntR.",
    "numpy deeper": b"\x80\x04\x8c\x05numpy\x8c\x11os.system.__call__\x93\x8c\x01a\x85R.",
    "numpy.testing": b"cnumpy.testing\nrundocs\n)R.",
    "new object": b"\x80\x02cposix\nsystem\n(S'touch %s'\nt\x81.",
    "extension registry": b"\x80\x02\x82\x01.",
    "persistent id": b"Pevil\n.",
    "out-of-band buffer": b"\x80\x05\x97.",
    "array by encode": b"c_codecs\nencode\n(Vx\nS'rot13'\ntR.",
    "encode of a number": b"c_codecs\nencode\n(I5\nS'latin1'\ntR.",
    "call of data": b"(S'touch %s'\ntI1\n)R.",
    "bare global": b"cnumpy\nndarray\n.",
    "bare array": b"cnumpy.core.multiarray\n_reconstruct\n)R.",
    "append to a tuple": b")I1\na.",
}


@pytest.mark.parametrize("attack", RAW)
def test_raw_attacks(tmp_path, attack):
    flag = tmp_path / "executed"
    data = RAW[attack]
    (tmp_path / "a.bin").write_bytes(data % str(flag).encode() if b"%s" in data else data)
    with pytest.raises(UserError, match=r"a\.bin is refused") as error:
        read_bin(tmp_path / "a.bin")
    assert not flag.exists()
    if "posix" in attack and "object" not in attack:
        assert "posix.system" in str(error.value)


def bomb(kind: str) -> bytes:
    if kind == "memo index":  # CPython's unpickler allocates a table of that length
        return b"\x80\x02](K\x01er\xff\xff\xff\x7f."
    if kind == "long length":
        return b"\x80\x04\x8e" + struct.pack("<Q", 1 << 40) + b"abc."
    if kind == "negative length":
        return b"T" + struct.pack("<i", -5) + b"abc."
    if kind == "array shape":
        return pickle.dumps(np.zeros(5, np.uint8)).replace(b"K\x05\x85", b"J\xff\xff\xff\x7f\x85")
    if kind == "copies":  # one megabyte of text, turned to bytes a thousand times
        text = b"X" + struct.pack("<I", 1 << 20) + b"a" * (1 << 20) + b"q\x00X\x06\0\0\0latin1q\x01"
        return b"\x80\x02" + text + b"c_codecs\nencode\nq\x02](" + b"h\x02h\x00h\x01\x86R" * 1000 + b"e."
    if kind == "lists of lists":  # 10**8 items, spelt out
        return b"\x80\x02](" + b"K\x01" * 10_000 + b"eq\x00](" + b"h\x00" * 10_000 + b"e\x86."
    return b"L" + b"9" * 1_000_000 + b"L\n."


@pytest.mark.parametrize(
    "kind", ["memo index", "long length", "negative length", "array shape", "copies", "lists of lists", "long number"]
)
def test_a_small_file_cannot_make_much(tmp_path, kind):
    data = bomb(kind)
    (tmp_path / "a.bin").write_bytes(data)
    tracemalloc.start()
    try:
        with pytest.raises(UserError, match=r"a\.bin"):
            read_bin(tmp_path / "a.bin")
        assert tracemalloc.get_traced_memory()[1] < 8 * len(data) + 1_000_000
    finally:
        tracemalloc.stop()


@settings(max_examples=200, deadline=None)
@given(st.data())
def test_mangled_files_give_one_clear_error(tmp_path_factory, data):
    good = pickle.dumps(FORMS[data.draw(st.sampled_from(sorted(FORMS)))], data.draw(st.integers(0, 5)))[-3000:]
    at = data.draw(st.integers(0, len(good)))
    content = data.draw(
        st.sampled_from([good[:at], good[at:], good[:at] + b"." + good[at:], good[:at] + b"R" + good[at:]])
    ) + data.draw(st.binary(max_size=5))
    path = tmp_path_factory.mktemp("bins") / "a.bin"
    path.write_bytes(content)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            read_bin(path)
    except UserError as error:
        assert "a.bin" in str(error)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (5, "holds a int, not"),
        ((IMAGES, SAME, 1), "not \\(images, same\\)"),
        ((IMAGES[:-1], SAME), "7 images for 4 pairs"),
        (([], []), "0 images for 0 pairs"),
        ((5, SAME), "list of images"),
        ((IMAGES, [True, False, 2, True]), "pair 2 is neither true nor false"),
        ((IMAGES, [True, False, None, True]), "pair 2 is neither"),
        (([*IMAGES[:-1], "text"], SAME), "image 7 is a str"),
    ],
)
def test_wrong_contents(tmp_path, content, message):
    (tmp_path / "a.bin").write_bytes(pickle.dumps(content))
    with pytest.raises(UserError, match=message):
        read_bin(tmp_path / "a.bin")


def test_missing_file(tmp_path):
    with pytest.raises(UserError, match="does not exist"):
        read_bin(tmp_path / "a.bin")


def test_every_opcode_is_known_or_refused(tmp_path):
    for opcode in pickletools.opcodes:
        (tmp_path / "a.bin").write_bytes(opcode.code.encode("latin-1") + b"\n" * 300)
        with pytest.raises(UserError):
            read_bin(tmp_path / "a.bin")


def faces(root):
    images = {}
    for name in ("Ann_Lee", "Bo"):
        (root / name).mkdir(parents=True)
        for number in (1, 2, 3):
            images[name, number] = encode_jpeg(RNG.integers(0, 256, (16, 16, 3), dtype=np.uint8))
            path = root / name / f"{name}_{number:04d}.{'jpg' if number < 3 else 'png'}"
            path.write_bytes(images[name, number])
    return images


def test_pairs_from_lists(tmp_path):
    images = faces(tmp_path / "root")
    lfw = "10\t1\nAnn_Lee\t1\t3\nBo\t2\t1\n\nAnn_Lee\t2\tBo\t3\n"
    plain = "# comment\nAnn_Lee/Ann_Lee_0001.jpg Bo/Bo_0002.jpg 0\nBo/Bo_0001.jpg  Bo/Bo_0002.jpg 1\n"
    (tmp_path / "list.txt").write_text(lfw + plain)
    assert pairs_from_folder(tmp_path / "root", tmp_path / "list.txt", tmp_path / "out" / "a.bin") == (5, 3)
    encoded, same = read_bin(tmp_path / "out" / "a.bin")
    assert same.tolist() == [True, True, False, False, True]
    a, b = (lambda n: images["Ann_Lee", n]), (lambda n: images["Bo", n])
    assert encoded == [a(1), a(3), b(2), b(1), a(2), b(3), a(1), b(2), b(1), b(2)]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("Ann_Lee 1 2\nAnn_Lee 1\n", "line 2: neither"),
        ("Ann_Lee 1 9\n", "line 1: .*Ann_Lee_0009.jpg does not exist"),
        ("Ann_Lee/nothing.jpg Bo/Bo_0001.jpg 1\n", "line 1: .*nothing.jpg cannot be read"),
        ("Ann_Lee 1 2\nBo/broken.jpg Bo/Bo_0001.jpg 1\n", "line 2: .*broken.jpg is no usable image: truncated"),
        ("a b 2\n", "line 1: neither"),
        ("\n", "holds no pair"),
        ("10 300\n", "holds no pair"),
    ],
)
def test_wrong_lists(tmp_path, text, message):
    faces(tmp_path / "root")
    (tmp_path / "root" / "Bo" / "broken.jpg").write_bytes((tmp_path / "root" / "Bo" / "Bo_0001.jpg").read_bytes()[:-5])
    (tmp_path / "list.txt").write_text(text)
    with pytest.raises(UserError, match=message):
        pairs_from_folder(tmp_path / "root", tmp_path / "list.txt", tmp_path / "a.bin")
    assert not (tmp_path / "a.bin").exists()
