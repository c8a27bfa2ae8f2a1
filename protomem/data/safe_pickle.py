"""Reads pickled lists of bytes and booleans without executing anything.

A pickle is a program for a small stack machine that may import and call whatever it names, so pickle.load on a
downloaded file runs its author's code. This is a machine of our own (opcodes: CPython's Lib/pickletools.py) that knows
only data, and numpy's few constructors by name: it imports nothing, calls nothing, and allocates no more than a few
times the file's size.
"""

from __future__ import annotations

import codecs
import struct
import warnings
from typing import Any

import numpy as np


class RefusedError(Exception):
    """The pickle wants something that plain data do not need; the message names it."""


class _Global(str):
    """The name of something importable, never imported."""


class _DType:
    def __init__(self, code: Any):
        self.code = _word(code).lstrip("|<=")


class _Array:
    value: np.ndarray | None = None  # flat; None until its state is set


# numpy types by their code; i1 is taken for raw bytes, as which some have written images
_TYPES = {"b1": np.bool_, "u1": np.uint8, "i1": np.uint8, "i4": np.int32, "i8": np.int64}
_BYTES_OF_PYTHON_2 = ("__builtin__.bytes", "builtins.bytes", "__builtin__.bytearray", "builtins.bytearray")
_MARK = object()
_CONSTANTS = {b"N": None, b"\x88": True, b"\x89": False, b")": (), b"(": _MARK}
_NUMBERS = {b"K": "<B", b"M": "<H", b"J": "<i"}
_SIZES = {  # opcode -> (format of the length, kind of the data)
    **{b"T": ("<i", "bytes"), b"U": ("<B", "bytes"), b"B": ("<I", "bytes"), b"C": ("<B", "bytes")},
    **{b"\x8e": ("<Q", "bytes"), b"\x96": ("<Q", "bytes"), b"\x8a": ("<B", "int")},
    **{b"X": ("<I", "text"), b"\x8c": ("<B", "text"), b"\x8d": ("<Q", "text")},
}
_PUT = {b"p": None, b"q": "<B", b"r": "<I"}
_GET = {b"g": None, b"h": "<B", b"j": "<I"}


def read_plain_pickle(data: bytes) -> Any:
    """The object in a pickle (protocols 0 to 5, Python 2 or 3) made of tuples, lists, bytes, text, booleans, integers,
    None and numpy arrays or scalars of booleans, bytes and integers. Arrays come flat. Python 2's str comes as bytes.

    Raises RefusedError for anything else; ValueError if the data end early or make no sense.
    """
    try:
        return _plain(_Machine(data).run(), {})
    except (IndexError, KeyError, struct.error, TypeError, UnicodeError, RecursionError) as error:
        raise ValueError(f"not a whole pickle ({type(error).__name__})") from None


class _Machine:
    def __init__(self, data: bytes):
        self.data, self.position = data, 0
        self.stack: list[Any] = []
        self.memo: dict[int, Any] = {}
        self.copied = 0  # bytes made by calls: bounded, or one string could be copied a million times

    def take(self, count: int) -> bytes:
        end = self.position + count
        if not self.position <= end <= len(self.data):
            raise ValueError("not a whole pickle (it ends early)")
        piece = self.data[self.position : end]
        self.position = end
        return piece

    def number(self, form: str | None) -> int:
        if form is None:
            return int(self.line(20))
        return struct.unpack(form, self.take(struct.calcsize(form)))[0]

    def line(self, limit: int | None = None) -> bytes:
        end = self.data.find(b"\n", self.position)
        if end < 0 or (limit is not None and end - self.position > limit):
            raise ValueError("not a whole pickle (a line does not end)")
        piece = self.data[self.position : end]
        self.position = end + 1
        return piece

    def pop_to_mark(self) -> list[Any]:
        start = len(self.stack) - 1
        while self.stack[start] is not _MARK:
            start -= 1
            if start < 0:
                raise ValueError("not a whole pickle (no mark)")
        items = self.stack[start + 1 :]
        del self.stack[start:]
        return items

    def run(self) -> Any:
        stack, push = self.stack, self.stack.append
        while True:
            op = self.take(1)
            if op in _SIZES:
                form, kind = _SIZES[op]
                piece = self.take(self.number(form))
                if kind == "text":
                    piece = piece.decode("utf-8", "surrogatepass")
                push(int.from_bytes(piece, "little", signed=True) if kind == "int" else piece)
            elif op in _PUT:
                self.memo[self.number(_PUT[op])] = stack[-1]
            elif op == b"\x94":
                self.memo[len(self.memo)] = stack[-1]
            elif op in _GET:
                push(self.memo[self.number(_GET[op])])
            elif op in _CONSTANTS:
                push(_CONSTANTS[op])
            elif op in _NUMBERS:
                push(self.number(_NUMBERS[op]))
            elif op == b"I":
                text = self.line(20)
                push({b"01": True, b"00": False}[text] if text in (b"00", b"01") else int(text))
            elif op == b"L":
                push(int(self.line(20).rstrip(b"L")))
            elif op == b"S":
                with warnings.catch_warnings():  # about unknown escapes in what is no Python source
                    warnings.simplefilter("ignore")
                    push(codecs.escape_decode(self.line().strip()[1:-1])[0])
            elif op == b"V":
                push(self.line().decode("raw-unicode-escape"))
            elif op == b"]":
                push([])
            elif op == b"e":
                items = self.pop_to_mark()
                _list(stack[-1]).extend(items)
            elif op == b"a":
                item = stack.pop()
                _list(stack[-1]).append(item)
            elif op == b"l":
                push(self.pop_to_mark())
            elif op == b"t":
                push(tuple(self.pop_to_mark()))
            elif op in (b"\x85", b"\x86", b"\x87"):
                count = op[0] - 0x84
                items = tuple(stack[-count:])
                del stack[-count:]
                push(items)
            elif op == b"c":
                push(_allowed(self.line(200).decode() + "." + self.line(200).decode()))
            elif op == b"\x93":
                name = stack.pop()
                push(_allowed(f"{_word(stack.pop())}.{_word(name)}"))
            elif op == b"R":
                arguments = stack.pop()
                push(self.build(stack.pop(), arguments))
            elif op == b"b":
                state = stack.pop()
                self.set_state(stack[-1], state)
            elif op == b"\x80":
                self.take(1)
            elif op == b"\x95":
                self.take(8)
            elif op == b"0":
                stack.pop()
            elif op == b"1":
                self.pop_to_mark()
            elif op == b".":
                return stack.pop()
            elif op == b"i":  # an instance by name, from protocol 0
                raise RefusedError(self.line(200).decode() + "." + self.line(200).decode())
            else:
                raise RefusedError(f"opcode {op!r}")

    def build(self, function: Any, arguments: Any) -> Any:
        """What the known constructors would return. None of them is called."""
        name = str(function) if isinstance(function, _Global) else ""
        if name.endswith("multiarray._reconstruct"):
            return _Array()
        if name == "numpy.dtype":
            return _DType(arguments[0])
        if name.endswith("multiarray.scalar"):
            return self.values(arguments[0], arguments[1])[0].item()
        if name.endswith("numeric._frombuffer"):
            array = _Array()
            array.value = self.values(arguments[1], arguments[0])
            return array
        if name == "_codecs.encode" or name in _BYTES_OF_PYTHON_2:
            raw = arguments[0] if arguments else b""
            if isinstance(raw, str):
                if _word(arguments[1]).replace("-", "").replace("_", "").lower() not in ("latin1", "iso88591"):
                    raise RefusedError(f"{name} with encoding {_word(arguments[1])}")
                return self.encoded(raw)
            if not isinstance(raw, bytes):
                raise RefusedError(f"{name} of something that is no text")
            return raw
        raise RefusedError(f"a call of {name or type(function).__name__}")

    def encoded(self, text: str) -> bytes:
        self.copied += len(text)
        if self.copied > 2 * len(self.data):
            raise RefusedError("the same data copied again and again")
        return text.encode("latin-1")

    def values(self, dtype: Any, raw: Any) -> np.ndarray:
        """A flat array over `raw`; nothing is copied unless it comes as text."""
        if not isinstance(dtype, _DType) or dtype.code not in _TYPES:
            raise RefusedError(f"a numpy array of type {getattr(dtype, 'code', type(dtype).__name__)}")
        return np.frombuffer(self.encoded(raw) if isinstance(raw, str) else raw, _TYPES[dtype.code])

    def set_state(self, target: Any, state: Any) -> None:
        if isinstance(target, _DType):
            if len(state) < 2 or _text(state[1]) not in ("|", "<", "="):
                raise RefusedError("a numpy array in foreign byte order")
        elif isinstance(target, _Array):
            target.value = self.values(state[2], state[4])
        else:
            raise RefusedError(f"a state for a {type(target).__name__}")


_ALLOWED = {
    *(f"numpy.{core}.multiarray.{name}" for core in ("core", "_core") for name in ("_reconstruct", "scalar")),
    *(
        "numpy.core.numeric._frombuffer",
        "numpy._core.numeric._frombuffer",
        "numpy.ndarray",
        "numpy.dtype",
        "_codecs.encode",
    ),
    *_BYTES_OF_PYTHON_2,
}


def _allowed(name: str) -> _Global:
    if name not in _ALLOWED:
        raise RefusedError(name)
    return _Global(name)


def _list(value: Any) -> list[Any]:
    if type(value) is not list:
        raise RefusedError(f"items appended to a {type(value).__name__}")
    return value


def _text(value: Any) -> Any:
    return value.decode("latin-1") if isinstance(value, bytes) else value


def _word(value: Any) -> str:
    """A name. Anything else is not turned into text: a list that holds itself a few times may spell out to terabytes."""
    value = _text(value)
    if not isinstance(value, str) or len(value) > 200:
        raise RefusedError(f"a {type(value).__name__} as a name")
    return value


def _plain(value: Any, done: dict[int, Any], depth: int = 0) -> Any:
    """Stand-ins replaced by numpy arrays; anything that is no data refused. `done` keeps a list that is listed many
    times in itself from growing to what it spells out."""
    if isinstance(value, _Array) and value.value is not None:
        return value.value
    if isinstance(value, (_Global, _DType, _Array)) or value is _MARK or depth > 3:
        raise RefusedError(f"a bare {type(value).__name__.strip('_')}")
    if isinstance(value, (list, tuple)):
        if id(value) not in done:
            done[id(value)] = type(value)(_plain(item, done, depth + 1) for item in value)
        return done[id(value)]
    return value
