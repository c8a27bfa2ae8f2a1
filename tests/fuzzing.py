"""Structured fuzzing of what reads foreign bytes: small valid files are changed, and a reader must take or refuse them.

An input is a set of files {name: bytes}. Each is tried in a forked child with bounded address space and processor time,
under an audit hook that sees programs being started, connections, and writes outside of the input's own folder. A reader
passes if it returns, or raises UserError of one line that names something of the input, or an exception that it documents.
"""

from __future__ import annotations

import contextlib
import faulthandler
import mmap
import os
import random
import resource
import shutil
import signal
import struct
import sys
import tempfile
import time
import traceback
from dataclasses import dataclass, field
from pathlib import Path
from typing import Callable, Iterator

from protomem.errors import UserError

Files = dict[str, bytes]
MEMORY = 1536 << 20  # bytes of address space above what the child begins with
SECONDS = 10  # processor time for one input
STILL = 240  # seconds of the clock after which a child that says nothing is ended

NUMBERS = (0, 1, 2, 3, 4, 7, 8, 16, 24, 127, 128, 255, 256, 1023, 4096, 65535, 65536, 2**24, 2**24 + 1, 2**29 - 1, 2**29)
NUMBERS += (2**31 - 1, 2**31, 2**32 - 1, 2**32, 2**40, 2**53, 2**62, 2**63 - 1, 2**63, 2**64 - 1)
WORDS = [str(n).encode() for n in (0, 1, 2**31, 2**53, 2**63, 2**64, 10**30)] + [
    *(b"-1", b"9" * 5000, b"1e999", b"nan", b"\xc2\xb2", b"null", b"true", b"{}", b"[]", b'""', b"[" * 3000, b'{"a":' * 2000),
    *(b"../../../../etc/passwd", b"/etc/passwd", b"a" * 300, b"\0", b"\n", b"\x1b[31m", b"\xff\xfe", b"<script>", b"$\\frac$"),
]
FORMATS = ("<B", "<H", ">H", "<I", ">I", "<Q", ">Q")
OPERATIONS = 12


@dataclass(frozen=True)
class Target:
    """A reader under test. seeds: valid inputs; run(folder): reads the files that lie there.

    mutable: the files that are changed (all, if empty); repair: puts check sums and lengths right again after a change, so
    that it gets behind the first check; words: what else may be inserted; documented: exceptions that are no finding.
    """

    name: str
    what: str
    seeds: Callable[[], list[Files]]
    run: Callable[[Path], object]
    mutable: tuple[str, ...] = ()
    repair: Callable[[str, bytes], bytes] | None = None
    words: tuple[bytes, ...] = ()
    documented: tuple[type, ...] = ()


@dataclass
class Outcome:
    """of one input: None taken, "refused", or what is wrong with it."""

    index: int
    kind: str
    text: str = ""


@dataclass
class Tally:
    inputs: int = 0
    accepted: int = 0
    refused: int = 0
    slowest: float = 0.0  # processor seconds of one input
    findings: dict[str, list[int]] = field(default_factory=dict)  # what -> numbers of the inputs
    examples: dict[str, str] = field(default_factory=dict)  # what -> the whole text of the first


def change(data: bytes, operation: int, place: int, value: int, target: Target, other: bytes) -> bytes:
    """One change of a file: place in 0..65535 is where, relative to its length; value picks what is written."""
    at = place * (len(data) + 1) >> 16
    length = 1 + value % 97 if value % 3 else 1 + value * len(data) // 65536
    words = WORDS + list(target.words)
    match operation % OPERATIONS:
        case 0:  # flip a bit
            return data[:at] + bytes(byte ^ 1 << value % 8 for byte in data[at : at + 1]) + data[at + 1 :]
        case 1:
            return data[:at] + bytes([value % 256]) + data[at + 1 :]
        case 2:
            return data[:at]
        case 3:
            return data[:at] + data[at + length :]
        case 4:  # duplicate
            return data[:at] + data[at : at + length] * (1 + value % 5) + data[at:]
        case 5:
            return data[:at] + words[value % len(words)] + data[at:]
        case 6:
            word = words[value % len(words)]
            return data[:at] + word + data[at + len(word) :]
        case 7:  # a number of some width, little- or big-endian
            form = FORMATS[value % len(FORMATS)]
            width = struct.calcsize(form)
            number = NUMBERS[value // len(FORMATS) % len(NUMBERS)] & ((1 << 8 * width) - 1)
            at = at // width * width if value % 2 else at
            return data[:at] + struct.pack(form, number) + data[at + width :]
        case 8:  # a run of digits becomes another number
            end = begin = at
            while begin < len(data) and not 48 <= data[begin] <= 57:
                begin += 1
            end = begin
            while end < len(data) and 48 <= data[end] <= 57:
                end += 1
            return data[:begin] + WORDS[value % 12] + data[end:]
        case 9:  # splice
            return data[:at] + other[value * (len(other) + 1) >> 16 :]
        case 10:
            return data[:at] + bytes(len(data[at : at + length])) + data[at + length :]
        case _:  # two blocks change places
            return data[:at] + data[at + length : at + 2 * length] + data[at : at + length] + data[at + 2 * length :]


def mutate(target: Target, seeds: list[Files], steps: list[tuple[int, int, int, int]]) -> Files:
    """A changed input. steps: (which, operation, place, value) each, all in 0..65535; the first picks the seed."""
    files = dict(seeds[steps[0][0] % len(seeds)])
    for which, operation, place, value in steps:
        names = [name for name in files if not target.mutable or name in target.mutable]
        name = names[which // 7 % len(names)]
        other = seeds[value % len(seeds)].get(name, b"")
        files[name] = change(files[name], operation, place, value, target, other)
        if target.repair is not None and value % 4:
            with contextlib.suppress(Exception):
                files[name] = target.repair(name, files[name])
    return files


def random_steps(rng: random.Random) -> list[tuple[int, int, int, int]]:
    return [tuple(rng.randrange(65536) for _ in range(4)) for _ in range(rng.choice((1, 1, 1, 2, 2, 3, 5, 9)))]


# --- the child -----------------------------------------------------------------------------------------------------


class TooLong(BaseException):
    """Processor time for this input is used up."""


_FORBIDDEN = ("os.system", "subprocess.Popen", "os.exec", "os.posix_spawn", "os.spawn", "pty.spawn", "socket.connect")
_PATHS = {"os.remove": (0,), "os.rename": (0, 1), "os.mkdir": (0,), "os.rmdir": (0,), "os.symlink": (1,), "os.link": (1,)}
_PATHS |= {"os.truncate": (0,), "os.chmod": (0,), "shutil.rmtree": (0,)}
_watch: dict = {"roots": None, "seen": []}


def _audit(event: str, arguments: tuple) -> None:
    if _watch["roots"] is None:
        return
    if event in _FORBIDDEN:
        _watch["seen"].append(f"{event} {str(arguments)[:100]}")
        raise PermissionError(f"forbidden while fuzzing: {event}")
    places = [arguments[i] for i in _PATHS.get(event, ()) if i < len(arguments)]
    if event == "open" and arguments[2] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC):
        places = [arguments[0]]
    for place in places:
        if isinstance(place, (str, bytes, os.PathLike)):
            path = os.path.abspath(os.fsdecode(place))
            if not path.startswith(_watch["roots"]):
                _watch["seen"].append(f"{event} {path}")
                raise PermissionError(f"forbidden while fuzzing: {event} {path}")


def _too_long(*_):
    raise TooLong


def judge(target: Target, folder: Path) -> tuple[str, str]:
    """("accepted" | "refused" | a finding, text) of the files in `folder`."""
    _watch["seen"].clear()
    try:
        target.run(folder)
        kind, text = "accepted", ""
    except target.documented as error:
        kind, text = "refused", str(error)
    except UserError as error:
        kind, text = "refused", str(error)
        if "\n" in text or "\r" in text:
            kind = "message of several lines"
        elif str(folder) not in text and not any(p.name in text for p in folder.iterdir()):
            kind = "message names no file"
    except TooLong:
        kind, text = f"no end within {SECONDS} s of processor time", _where(target)
    except MemoryError:
        kind, text = "memory without bound", _where(target)
    except BaseException as error:
        kind, text = f"{type(error).__name__} escapes", f"{_where(target)}: {str(error)[:150]}"
    if _watch["seen"]:
        kind, text = "outside of its folder", "; ".join(_watch["seen"])[:200]
    return kind, text


def _where(target: Target) -> str:
    frames = [f for f in traceback.extract_tb(sys.exc_info()[2]) if "/protomem/" in f.filename]
    frames = frames or traceback.extract_tb(sys.exc_info()[2])[-1:]
    return f"{Path(frames[-1].filename).name}:{frames[-1].lineno} {frames[-1].name}"


def _lay(folder: Path, files: Files) -> None:
    for entry in os.scandir(folder):
        shutil.rmtree(entry) if entry.is_dir(follow_symlinks=False) else os.unlink(entry)
    for name, data in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
        os.utime(path, ns=(10**18, 10**18))


def _child(target: Target, inputs: Iterator[tuple[int, Files]], cell, pipe: int, root: Path) -> None:
    """Tries input after input; tells through the pipe what came out, and through `cell` which one it is at."""
    faulthandler.disable()  # what a dying child would print is told by its exit code
    folder = root / "input"
    folder.mkdir()
    os.environ["XDG_CACHE_HOME"] = str(root / "cache")
    devnull = os.open(os.devnull, os.O_RDWR)
    os.dup2(devnull, 1), os.dup2(devnull, 2)
    out = os.fdopen(pipe, "w", buffering=1)
    sys.addaudithook(_audit)
    signal.signal(signal.SIGPROF, _too_long)
    for files in target.seeds():  # imports and caches, before anything is bounded
        _lay(folder, files)
        judge(target, folder)
    size = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (size + MEMORY, size + MEMORY))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    _watch["roots"] = (str(root), "/dev/null")
    for index, files in inputs:
        struct.pack_into("<q", cell, 0, index)
        _watch["roots"], roots = None, _watch["roots"]
        _lay(folder, files)
        _watch["roots"] = roots
        begin = time.process_time()
        # What is stuck in C sees no signal handler: the kernel ends it a little later.
        resource.setrlimit(resource.RLIMIT_CPU, (int(begin) + 2 * SECONDS + 1, resource.RLIM_INFINITY))
        signal.setitimer(signal.ITIMER_PROF, SECONDS)
        try:
            kind, text = judge(target, folder)
        except TooLong:
            kind, text = f"no end within {SECONDS} s of processor time", "while cleaning up"
        signal.setitimer(signal.ITIMER_PROF, 0)
        text = text.replace(str(root), "").encode("ascii", "backslashreplace").decode().replace("\n", "\\n").replace("\t", " ")
        out.write(f"{index}\t{time.process_time() - begin:.4f}\t{kind}\t{text}\n")
    _watch["roots"] = None
    out.close()


def fuzz(target: Target, inputs: Callable[[int], Iterator[tuple[int, Files]]], seconds: float | None = None) -> Tally:
    """Try inputs(start), which yields (number, files) from number `start` on, in forked children; a child that died is
    replaced behind the input that it died of. seconds: of the clock, None: until the inputs end."""
    tally, start, end = Tally(), 0, time.monotonic() + (seconds or 1e9)
    while start >= 0 and time.monotonic() < end:
        cell = mmap.mmap(-1, 8)
        root = Path(tempfile.mkdtemp(prefix="fuzz-", dir="/dev/shm" if os.access("/dev/shm", os.W_OK) else None))
        struct.pack_into("<q", cell, 0, -1)
        receive, send = os.pipe()
        sys.stdout.flush(), sys.stderr.flush()
        child = os.fork()
        if child == 0:
            code = 1
            try:
                os.close(receive)
                _child(target, inputs(start), cell, send, root)
                code = 0
            finally:
                os._exit(code)
        os.close(send)
        try:
            start = _follow(child, receive, cell, end, tally)
        finally:
            shutil.rmtree(root, ignore_errors=True)  # not the child: it may be killed
    return tally


def _follow(child: int, receive: int, cell, end: float, tally: Tally) -> int:
    """Collect a child's lines; the number at which the next one has to start, -1 if there is no more to do."""
    import select

    buffer, last, heard, killed = b"", -1, time.monotonic(), None
    while True:
        ready = select.select([receive], [], [], 0.5)[0]
        now = time.monotonic()
        if ready:
            part = os.read(receive, 1 << 16)
            if not part:
                break
            buffer, heard = buffer + part, now
            *lines, buffer = buffer.split(b"\n")
            for line in lines:
                index, took, kind, text = line.decode().split("\t", 3)
                last = int(index)
                tally.inputs += 1
                tally.slowest = max(tally.slowest, float(took))
                if kind in ("accepted", "refused"):
                    setattr(tally, kind, getattr(tally, kind) + 1)
                else:
                    what = f"{kind}: {text.partition(': ')[0]}"
                    tally.findings.setdefault(what, []).append(last)
                    tally.examples.setdefault(what, text)
        if killed is None and (now > end or now > heard + STILL):
            killed = "end" if now > end and now < heard + STILL else f"no answer within {STILL} s"
            os.kill(child, signal.SIGKILL)
    os.close(receive)
    status = os.waitpid(child, 0)[1]
    (at,) = struct.unpack_from("<q", cell, 0)
    if os.waitstatus_to_exitcode(status) == 0 or killed == "end":
        return -1
    what = killed or f"the process died: exit code {os.waitstatus_to_exitcode(status)}"
    tally.inputs += at > last
    tally.findings.setdefault(what, []).append(at)
    if at < 0:
        raise RuntimeError(f"the child died before its first input: {what}")
    return at + 1


def random_inputs(target: Target, seed: int) -> Callable[[int], Iterator[tuple[int, Files]]]:
    seeds = target.seeds()

    def inputs(start: int):
        index = start
        while True:
            yield index, mutate(target, seeds, random_steps(random.Random(f"{target.name} {seed} {index}")))
            index += 1

    return inputs
