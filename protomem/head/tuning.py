"""Tiles and chunk size of the triton head, chosen by timing them on the GPU at hand (head.tune). Not yet run on a GPU.

Rank 0 times the forward and backward of the head on made-up tensors of the run's shapes, once for each candidate, and takes
the fastest. Every rank computes with that choice, from the first step of the run to the last, unless the run goes on with
other shapes (another world size), another GPU or other versions: then it is timed anew.

head.tune is off by default (our decision). Other tiles sum in another order, so with it the last bits of a run depend on
which of two near equals the clock preferred on that day: two runs of one config need not be the same bit for bit. One run is
with itself: its choice is part of its checkpoints and is taken from there, and from `tiles-*.json` in the cache folder
(protomem/files.py) for other runs with the same GPU, kernels, shapes and parts; only where neither has it, it is timed.

Whoever takes the fastest prefers the kernel that leaves work out: what a candidate computes is compared with the blocked
head's, and one that differs is passed over, as are those that a GPU or its compiler refuses.

Legend: B batch, C rows of the shard, D feature size, K rows of a chunk.
"""

from __future__ import annotations

import functools
import hashlib
import json
import logging
import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from importlib import metadata
from pathlib import Path

import torch
import torch.nn.functional as F

from protomem import distributed
from protomem.errors import UserError
from protomem.files import cache_folder, read_json, replace_file
from protomem.head.blocked import blocked_head
from protomem.head.contract import Columns, GradSink, Injection, Negatives
from protomem.head.triton_head import CENTER_TILES, TILES, Tiles, chunk_rows, triton_head

log = logging.getLogger(__name__)

# The default first. All are within the shared memory of compute capability 8.0, and compiled for 8.0, 9.0 and 10.0 no program
# spills more than 128 bytes of a thread's registers (Triton 3.6: 176), most none (tests/test_triton.py).
TRIED = {
    "bf16": [
        TILES["bf16"],
        Tiles(128, 128, 128, 64, 8, 4),
        Tiles(128, 256, 64, 64, 8, 3),  # x and v are read least; spills where the head does all that it can
        Tiles(64, 256, 64, 64, 8, 3),
        Tiles(128, 64, 128, 64, 8, 3),
        Tiles(64, 128, 64, 64, 4, 3),
    ],
    "fp32": [
        TILES["fp32"],
        Tiles(64, 64, 64, 32, 4, 3),
        Tiles(128, 64, 64, 32, 8, 3),
        Tiles(128, 128, 128, 16, 8, 3),
        Tiles(32, 64, 64, 32, 4, 3),
    ],
}
# With sub-centres, where a logit takes three registers instead of one.
TRIED_CENTERS = {
    "bf16": [
        CENTER_TILES["bf16"],
        Tiles(64, 128, 128, 64, 8, 3),
        Tiles(64, 64, 128, 64, 4, 3),
        Tiles(64, 64, 64, 64, 4, 3),
    ],
    "fp32": [CENTER_TILES["fp32"], Tiles(64, 64, 64, 32, 4, 3), Tiles(32, 64, 64, 32, 4, 3)],
}
CHUNKS = (1.0, 0.5, 2.0, 4.0)  # of chunk_rows
NUMBERS = 2**25  # of the rows that are timed, 128 MiB in fp32: more than an L2 cache holds (our default)
PREFERRED = 1.02  # the default stays unless another is faster by this factor (ours): less hangs on the clock's noise
# Relative difference to the blocked head's gradients in fp32 that is rounding alone (ours); with sub-centres in both precisions
# the larger one, since the last bit says which of two is nearer.
SAME = {"bf16": 0.02, "fp32": 1e-4}
WARM_UP, REPEATS = 3, 20

Choice = tuple[Tiles, int]  # and rows of a chunk


@dataclass(frozen=True)
class Work:
    """What the head does in a step, as far as its time depends on it.

    batch B; rows: of the shard, C, or so many of them as are timed; size D; block: rows of a chunk, 0 to choose them, too;
    kept: share of the exponentials that stay for the backward, in eighths; learns: the rows have a gradient; memory: they
    are unit rows, of which some may hold nothing; half: they are stored in bf16; mixed: features are mixed in (VPL);
    centers: rows of each identity. Not timed, since tiles hardly bear on it: live rows, hardest negatives, EPL's second term,
    an update inside the backward.
    """

    batch: int
    rows: int
    size: int
    precision: str
    block: int = 0
    kept: float = 0.0
    learns: bool = True
    memory: bool = False
    half: bool = False
    mixed: bool = False
    filtered: bool = False
    threshold: bool = False
    centers: int = 1


def _exponentials(batch: int, rows: int, precision: str, centers: int) -> int:
    """Bytes of all of them, and of what stands beside them."""
    one, winner = (2, 1) if precision == "bf16" else (4, 4)
    return batch * (rows // centers) * (one + (winner if centers > 1 else 0))


def tried(precision: str, centers: int) -> list[Tiles]:
    return (TRIED if centers == 1 else TRIED_CENTERS)[precision]


def work(
    batch: int, rows: int, size: int, precision: str, *, store_mb: float, learns: bool, centers: int = 1, **more
) -> Work:
    """The Work of a shard of `rows` rows; more: as Work's."""
    share = store_mb * 2**20 / max(1, _exponentials(batch, rows, precision, centers))
    kept = round(8 * min(1.0, share)) / 8 if learns else 0.0
    rows = min(rows, centers * max(1, NUMBERS // size // centers))
    return Work(batch, rows, size, precision, kept=kept, learns=learns, centers=centers, **more)


def candidates(work: Work) -> list[Choice]:
    """What is tried; the default is the first."""
    found = {}
    for tiles in tried(work.precision, work.centers):
        usual, n = chunk_rows(work.batch, work.size, tiles.n, work.centers), tiles.n * work.centers
        for rows in [work.block] if work.block else [factor * usual for factor in CHUNKS]:
            found[tiles, min(-(-int(rows) // n) * n, -(-work.rows // n) * n)] = None
    return list(found)


def milliseconds(act: Callable[[], None], repeats: int = REPEATS) -> float:
    """Median GPU time of `act`. The host may run ahead, as it does in a step."""
    for _ in range(WARM_UP):
        act()
    events = [(torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)) for _ in range(repeats)]
    for start, end in events:
        start.record()
        act()
        end.record()
    torch.cuda.synchronize()
    return statistics.median(start.elapsed_time(end) for start, end in events)


_FILTER = Negatives(
    value=lambda cos, _: cos * (cos <= 0.4), slope=lambda cos, _: (cos <= 0.4).to(cos.dtype), filter_above=0.4
)


class _Scratch:
    """Tensors of the shapes of a Work, and its forward and backward on them. The global random streams are left alone."""

    def __init__(self, work: Work, device: torch.device):
        g = torch.Generator(device).manual_seed(0)
        random = lambda *shape: torch.randn(*shape, generator=g, device=device)  # noqa: E731
        self.work = work
        self.x = F.normalize(random(work.batch, work.size)).requires_grad_()
        rows = random(work.rows, work.size)
        if work.memory:
            F.normalize(rows, out=rows)
        target = torch.randint(0, work.rows // work.centers, (work.batch,), generator=g, device=device)
        rows, unit = rows.bfloat16() if work.half else rows, work.memory and not work.half
        self.columns = Columns(rows, target, unit=unit, centers=work.centers)
        if work.learns:
            self.columns.sink = GradSink()
        if work.memory:
            self.columns.valid = torch.ones(work.rows, dtype=torch.bool, device=device)
        if work.mixed:
            share = 0.15 * (torch.rand(work.rows, generator=g, device=device) < 0.04)
            self.columns.injection = Injection(F.normalize(random(work.rows, work.size)), None, share)
        self.threshold = torch.full((1,), 10.0, device=device) if work.threshold else None
        self.negatives = _FILTER if work.filtered else None
        exponentials = _exponentials(work.batch, work.rows, work.precision, work.centers)
        self.store_mb = 1e9 if work.kept == 1 else work.kept * exponentials / 2**20

    def __call__(self, tiles: Tiles, block: int) -> None:
        self._step(triton_head, precision=self.work.precision, store_mb=self.store_mb, block=block, tiles=tiles)

    def _step(self, head: Callable, **options) -> None:
        self.x.grad = None
        if self.columns.sink is not None:
            self.columns.sink.begin(self.columns.rows)
        cos_y, out = head(self.x, self.columns, 64.0, self.negatives, self.threshold, **options)
        (cos_y.sum() + out.sum()).backward()

    def reference(self) -> None:
        """Computes what candidates are compared with: the blocked head in fp32."""
        self._step(blocked_head)
        self.right = self._gradients()

    def forget(self) -> None:
        """A candidate that writes no gradient must not find another's."""
        self.x.grad = None
        if self.columns.sink is not None:
            self.columns.sink.buffer.fill_(float("nan"))

    def _gradients(self) -> list[torch.Tensor]:
        found = [self.x.grad.clone()]
        if self.columns.sink is not None:
            found.append(self.columns.sink.buffer[:: 8 * self.work.centers + 1].clone())  # some of every tile, and of every centre
        return found

    def difference(self) -> float:
        """Of the last gradients to the right ones, relative (2-norm), the larger of x's and the rows'; NaN where they are. 0 if
        nothing ran."""
        if self.x.grad is None:
            return 0.0
        apart = [(a - b).norm() / b.norm().clamp_min(1e-30) for a, b in zip(self._gradients(), self.right)]
        return torch.stack(apart).max().item()  # max() in Python passes over a NaN


def times(work: Work, device: torch.device, timer: Callable | None = None) -> list[tuple[Choice, float, str]]:
    """Of each candidate (choice, milliseconds of a forward and backward, ""), or (choice, inf, why it cannot be used)."""
    found, scratch = [], _Scratch(work, device)
    with distributed.alone():
        scratch.reference()
        for choice in candidates(work):
            try:
                scratch.forget()
                ms, different = (timer or milliseconds)(functools.partial(scratch, *choice)), scratch.difference()
                most = SAME["bf16" if work.centers > 1 else work.precision]
                why = "" if different <= most else f"its gradients differ by {different:.2g}"
            except UserError:
                raise
            except Exception as error:  # the compiler's, too few registers or too little shared memory, out of memory
                why = f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
            found.append((choice, float("inf") if why else ms, why))
    return found


# --- what was chosen before --------------------------------------------------------------------------------------------


def _key(work: Work, device: torch.device) -> dict:
    """All that the fastest choice depends on."""
    sources = hashlib.blake2b(digest_size=16)
    here = Path(__file__)
    for path in (*sorted(here.parent.glob("kernels/*.py")), *sorted(here.parent.glob("triton_*.py")), here):
        sources.update(path.read_bytes())
    gpu, capability = "none", ""
    if device.type == "cuda":
        gpu, capability = torch.cuda.get_device_name(device), "{}.{}".format(*torch.cuda.get_device_capability(device))
    try:
        triton = metadata.version("triton")
    except metadata.PackageNotFoundError:
        triton = ""
    facts = dict(gpu=gpu, capability=capability, triton=triton, torch=torch.__version__, kernels=sources.hexdigest())
    return facts | asdict(work)


def choice_of(record, work: Work) -> Choice | None:
    """What a record says, if it is one of the candidates."""
    try:
        said = Tiles(**record["tiles"]), record["block"]
    except (TypeError, KeyError):
        return None
    return next((choice for choice in candidates(work) if choice == said), None)


def _fits(record, key: dict, work: Work) -> bool:
    return isinstance(record, dict) and record.get("for") == key and choice_of(record, work) is not None


def _cached(path: Path, key: dict, work: Work) -> dict | None:
    try:
        record = read_json(path)
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        log.warning("%s cannot be read (%s): tiles are timed again", path, error)
        return None
    if _fits(record, key, work):
        return record
    log.warning("%s is not what protomem wrote for this GPU and these shapes: tiles are timed again", path)
    return None


def _find(work: Work, device: torch.device, stored, timer: Callable | None) -> dict:
    began, key = time.monotonic(), _key(work, device)
    if _fits(stored, key, work):
        return dict(record=stored, source="checkpoint")
    text = json.dumps(key, sort_keys=True)
    path = cache_folder() / f"tiles-{hashlib.blake2b(text.encode(), digest_size=12).hexdigest()}.json"
    if (record := _cached(path, key, work)) is not None:
        return dict(record=record, source=str(path))
    if timer is None and device.type != "cuda":
        raise UserError("head.tune=true times kernels on a GPU, and there is none; remove it")
    print(f"head.tune: timing {len(candidates(work))} candidates, each compiled first; minutes, once", flush=True)
    try:
        found = times(work, device, timer)
        if device.type == "cuda":
            torch.cuda.empty_cache()
    except RuntimeError as error:  # no room for the made-up tensors, or a candidate has left the GPU unusable
        raise UserError(f"head.tune=true: {' '.join(str(error).split())[:200]}; set head.tune=false") from None
    (tiles, block), ms, _ = min(found, key=lambda entry: entry[1])
    if ms == float("inf"):
        raise UserError(f"head.tune=true: no candidate can be used here ({found[0][2]}); set head.tune=false")
    usual, usual_ms, _ = found[0]
    if usual_ms <= PREFERRED * ms:
        (tiles, block), ms = usual, usual_ms
    record = {"for": key, "tiles": asdict(tiles), "block": block, "ms": ms}
    record["default_ms"] = None if usual_ms == float("inf") else usual_ms
    for choice, _, why in found:
        if why:
            log.warning("head.tune: %s with chunks of %d rows cannot be used: %s", *choice, why)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        replace_file(path, json.dumps(record, indent=1).encode())
    except OSError as error:
        log.warning("%s cannot be written (%s): the next run times its tiles again", path, error.strerror)
    return dict(record=record, source=f"timed in {time.monotonic() - began:.0f} s, kept in {path}")


def agree(work: Work, device: torch.device, stored=None, timer: Callable | None = None) -> dict:
    """{record, source}: rank 0's choice for this work, on every rank, and where it comes from. Collective.

    stored: the record of a checkpoint, if there is one; it is data from a file. timer(act): milliseconds of act();
    None: `milliseconds`.
    Raises UserError (SystemExit on other ranks) without a GPU, and where no candidate can be used.
    """
    found = None

    def act():
        nonlocal found
        found = _find(work, device, stored, timer)

    distributed.main_first(act)
    return distributed.broadcast_object(found)
