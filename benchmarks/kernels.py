"""The triton head on a GPU: its gradients against the dense head in float64, then its time against the other heads.

    python benchmarks/kernels.py OUT                                     # check, then all shapes: OUT/kernels*.csv
    python benchmarks/kernels.py OUT --identities 1000000 --blocks 0,4096,16384 --repeats 5
    python benchmarks/kernels.py OUT --only step --optimizer adamw      # the rows' update in three ways
    python benchmarks/kernels.py OUT --check-only
    python benchmarks/kernels.py OUT --tiles-only                        # what head.tune=true times: OUT/kernels_tiles.csv

Variants run in turn, repeat by repeat, in one process; times are CUDA events around forward and backward of the head, host_ms
is how long the host took to queue both. No optimizer, but for variants with a step of the rows (--optimizer), which counts as
backward: after it; inside it by torch, chunk by chunk; inside it in the kernel that finishes a chunk's gradient. The floor is
the products that cannot be spared (three of 2 B C D FLOPs, C counting rows; two where the rows have no gradient) at the rate
that torch.mm reaches on this card with the same operands.
Eager is what one writes first: a normalised copy of the rows, all logits, cross_entropy, autograd.
"""

from __future__ import annotations

import argparse
import copy
import functools
import itertools
import statistics
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
import torch.nn.functional as F

from benchmarks.common import write_csv
from protomem.block_update import BlockUpdate
from protomem.head import HEADS, Columns, GradSink, Injection, Negatives, objective, tuning
from protomem.head.tuning import WARM_UP, milliseconds
from protomem.objective.margins import interclass_filter
from protomem.optim import build_optimizer

SCALE, MARGIN = 64.0, 0.4
ALL = 1e9  # MiB: keep the exponentials, or logits, of all chunks
# Learned rows; constant unit rows; features in 4 % of learned rows; three learned rows for each identity.
KINDS = ("classifier", "memory", "vpl", "sub-centres")
COVERAGE = 0.04
RATES = dict(lr=0.1, weight_decay=5e-4)


def centers_of(kind: str) -> int:
    return 3 if kind == "sub-centres" else 1


class ByTorch(BlockUpdate):
    """Gets every chunk's gradient, and steps the chunk with torch's fused kernel."""

    fused = False


INSIDE = {"step by torch": ByTorch, "step in the kernel": BlockUpdate}


class Problem:
    """A batch and a shard; `kind` is one of KINDS."""

    def __init__(self, kind: str, batch: int, identities: int, size: int, device):
        g = torch.Generator(device).manual_seed(0)
        random = lambda *shape: torch.randn(*shape, generator=g, device=device)  # noqa: E731
        self.kind, self.centers = kind, centers_of(kind)
        self.x = F.normalize(random(batch, size)).requires_grad_()
        self.rows = random(self.centers * identities, size)
        self.target = torch.randint(0, identities, (batch,), generator=g, device=device)
        self.sink = GradSink() if kind != "memory" else None
        self.injection = None
        if kind == "memory":
            F.normalize(self.rows, out=self.rows)
        if kind == "vpl":
            features = F.normalize(random(identities, size))
            weight = 0.15 * (torch.rand(identities, generator=g, device=device) < COVERAGE)
            self.injection = Injection(features, None, weight)

    def optimize(self, name: str, **options) -> None:
        """Give the rows an optimizer."""
        self.rows = torch.nn.Parameter(self.rows)
        self.optimizer = build_optimizer([{"params": [self.rows]}], name, **RATES, **options)

    def step_inside(self, how: str | None) -> None:
        self.sink.update = INSIDE[how](self.optimizer, self.rows) if how in INSIDE else None

    def double(self) -> Problem:
        """The same numbers in float64."""
        other = copy.copy(self)
        other.x, other.rows = self.x.detach().double().requires_grad_(), self.rows.double()
        other.sink = GradSink() if self.sink is not None else None
        if self.injection is not None:
            other.injection = Injection(self.injection.features.double(), None, self.injection.weight.double())
        return other

    def columns(self) -> Columns:
        if self.sink is not None:
            self.sink.begin(self.rows.detach())
        unit = self.kind == "memory"
        rows = self.rows.detach()
        return Columns(rows, self.target, self.sink, unit=unit, injection=self.injection, centers=self.centers)

    def gradients(self) -> dict[str, torch.Tensor]:
        return {"dx": self.x.grad} | ({"rows": self.sink.buffer} if self.sink is not None else {})


def by_head(head: str, problem: Problem, negatives: Negatives | None = None, threshold=None, **options):
    cos_y, out = HEADS[head](problem.x, problem.columns(), SCALE, negatives, threshold=threshold, **options)
    z = SCALE * (cos_y - MARGIN)
    return (objective(z, out) if threshold is None else objective(z, threshold) + out).mean()


def stepping(problem: Problem, how: str, **options):
    """(loss, what is to be done after its backward) of the triton head with a step of the rows."""
    problem.step_inside(how)
    loss = by_head("triton", problem, **options)
    problem.rows.grad = problem.sink.buffer
    return loss, problem.optimizer.step


def by_eager(problem: Problem, autocast: bool):
    rows = problem.rows.detach().requires_grad_(problem.sink is not None)
    with torch.autocast(problem.x.device.type, torch.bfloat16, enabled=autocast):
        cos = problem.x @ (rows if problem.kind == "memory" else F.normalize(rows)).t()
        if problem.centers > 1:
            cos = cos.view(len(cos), -1, problem.centers).amax(2)
        margin = torch.zeros_like(cos).scatter_(1, problem.target[:, None], MARGIN)
        return F.cross_entropy(SCALE * (cos - margin), problem.target)


# --- check -------------------------------------------------------------------------------------------------------------


def check(device, shapes: list[tuple[int, int, int]]) -> list[dict]:
    """Relative errors (2-norm) against the dense head in float64, on the same numbers; of the first shape also with every
    candidate of head.tune."""
    extras = {
        "plain": {},
        "filter": dict(negatives=interclass_filter(0.1)),
        "threshold": dict(threshold=torch.full((1,), 10.0, device=device)),
    }
    results = []
    for turn, (batch, identities, size) in enumerate(shapes):
        for kind, (extra, more), precision, store, tiles in (
            (k, e, p, s, t)
            for k in KINDS
            for e in extras.items()
            for p in ("fp32", "bf16")
            for s in (0.0, ALL)
            for t in tuning.tried(p, centers_of(k))[: None if turn == 0 and not s and e[0] == "plain" else 1]
        ):
            problem = Problem(kind, batch, identities, size, device)
            exact = problem.double()
            (expected_loss := by_head("dense", exact, **more)).backward()
            row = dict(kind=kind, extra=extra, precision=precision, stored=store > 0, B=batch, C=identities, D=size, ok=True)
            row["tiles"] = named(tiles)
            for head in ("blocked", "triton"):
                problem.x.grad, own = None, {"tiles": tiles} if head == "triton" else {}
                (loss := by_head(head, problem, precision=precision, store_mb=store, **more, **own)).backward()
                row[f"{head}_loss_error"] = ((loss - expected_loss).abs() / expected_loss.abs()).item()
                found = problem.gradients()
                for name, expected in exact.gradients().items():
                    error = row[f"{head}_{name}_error"] = ((found[name] - expected).norm() / expected.norm()).item()
                    # A filter cuts: where bf16 operands take a cosine over the threshold, they do so in both heads. Which of
                    # two sub-centres is nearer may hang on the last bit.
                    exact_most = 2e-5 if problem.centers == 1 else 2e-4
                    most = exact_most if precision == "fp32" else max(0.012, 1.25 * row[f"blocked_{name}_error"])
                    row["ok"] &= head == "blocked" or error <= most  # False for NaN as well
            results.append(row)
            print({k: f"{v:.2g}" if isinstance(v, float) else v for k, v in row.items()}, flush=True)
    return results


def check_steps(device, shapes: list[tuple[int, int, int]]) -> list[dict]:
    """Relative errors (2-norm) of what three steps add to the rows, and of the optimizer's state, against torch.optim in
    float64 behind the dense head."""
    results = []
    for shape, kind, name, how in itertools.product(shapes, ("classifier", "vpl"), ("sgd", "adamw"), INSIDE):
        problem = Problem(kind, *shape, device)
        start, exact = problem.rows.clone(), problem.double()
        stable = {"eps": 1e-2} if name == "adamw" else {}  # the first steps are signs of the gradient else
        problem.optimize(name, **stable)
        exact.optimize(name, **stable, fused=False)
        for _ in range(3):
            loss, after = stepping(problem, how, precision="fp32", store_mb=0.0)
            loss.backward()
            after()
            by_head("dense", exact).backward()
            exact.rows.grad = exact.sink.buffer
            exact.optimizer.step()
        row = dict(kind=kind, optimizer=name, how=how, **dict(zip("BCD", shape)), ok=problem.sink.buffer is None)
        state, expected = problem.optimizer.state[problem.rows], exact.optimizer.state[exact.rows]
        pairs = {key: (state[key], expected[key]) for key in expected if key != "step"}
        pairs["rows"] = problem.rows.double() - start, exact.rows - start
        for key, (found, wanted) in pairs.items():
            row[f"{key}_error"] = ((found - wanted).norm() / wanted.norm()).item()
            # What a step adds to the rows is rounded as the rows are.
            most = 2e-5 if key != "rows" else 2e-5 + 3 * 2**-24 * (start.norm() / wanted.norm()).item()
            row["ok"] &= row[f"{key}_error"] <= most
        results.append(row)
        print({k: f"{v:.2g}" if isinstance(v, float) else v for k, v in row.items()}, flush=True)
    return results


# --- time --------------------------------------------------------------------------------------------------------------


def named(tiles: tuning.Tiles) -> str:
    return f"{tiles.m}x{tiles.n}x{tiles.d} by {tiles.k}, {tiles.warps} warps, {tiles.stages} stages"


def tile_times(kind: str, batch: int, identities: int, size: int, device, timer=None) -> list[dict]:
    """The candidates of head.tune, fastest first. C: of so many rows at most as are timed."""
    rows = []
    for precision in ("fp32", "bf16"):
        centers = centers_of(kind)
        of = dict(learns=kind != "memory", memory=kind == "memory", mixed=kind == "vpl", centers=centers)
        work = tuning.work(batch, centers * identities, size, precision, store_mb=16.0, **of)
        for (tiles, block), ms, why in sorted(tuning.times(work, device, timer), key=lambda found: found[1]):
            row = dict(kind=kind, precision=precision, B=batch, C=work.rows, D=size, tiles=named(tiles), block=block)
            rows.append(row | dict(ms=None if why else ms, state=why or "measured"))
            print(rows[-1], flush=True)
    return rows


def rates(device) -> dict[str, float]:
    """FLOP/s of torch.mm with fp32 (no TF32) and bf16 operands, and bytes/s of a copy."""
    found, n = {}, 8192
    for name, dtype in (("fp32", torch.float32), ("bf16", torch.bfloat16)):
        a, b = torch.randn(n, n, device=device, dtype=dtype), torch.randn(n, n, device=device, dtype=dtype)
        found[name] = 2 * n**3 / (milliseconds(functools.partial(torch.mm, a, b)) / 1e3)
    big = torch.empty(2**28, device=device)
    other = torch.empty_like(big)
    found["copy"] = 2 * big.nbytes / (milliseconds(lambda: other.copy_(big)) / 1e3)
    return found


def variants(kind: str, blocks: list[int]) -> dict:
    """{name: (loss of a problem, precision of its products)}"""
    found = {}
    if kind != "vpl":
        found["eager fp32"] = functools.partial(by_eager, autocast=False), "fp32"
        found["eager bf16 autocast"] = functools.partial(by_eager, autocast=True), "bf16"
    for precision in ("fp32", "bf16"):
        found[f"blocked {precision}"] = functools.partial(by_head, "blocked", precision=precision), precision
        for block in blocks:
            # Constant rows need nothing in the backward, so there is nothing to keep.
            for name, store in (("stored", ALL), ("recomputed", 0.0)) if kind != "memory" else (("", 0.0),):
                label = " ".join(filter(None, ("triton", precision, name, f"block {block}" if block else "")))
                act = functools.partial(by_head, "triton", precision=precision, store_mb=store, block=block)
                found[label] = act, precision
        if kind != "memory":
            for how in ("step after", *INSIDE):
                act = functools.partial(stepping, how=how, precision=precision, store_mb=0.0)
                found[f"triton {precision} recomputed, {how}"] = act, precision
    return found


def once(problem: Problem, act) -> dict[str, float]:
    """Times and extra memory of one forward and backward."""
    problem.x.grad = problem.rows.grad = None
    if problem.sink is not None:
        problem.step_inside(act.keywords.get("how"))
        problem.columns()  # makes the gradient's buffer, which is not the head's, or frees it
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    events, host = [torch.cuda.Event(enable_timing=True) for _ in range(3)], time.perf_counter()
    events[0].record()
    loss, after = act(problem) if act.func is stepping else (act(problem), None)
    events[1].record()
    loss.backward()
    if after is not None:
        after()
    events[2].record()
    host = 1e3 * (time.perf_counter() - host)
    torch.cuda.synchronize()
    peak = (torch.cuda.max_memory_allocated() - before) / 1e9
    forward, backward = (a.elapsed_time(b) for a, b in zip(events, events[1:]))
    return dict(forward_ms=forward, backward_ms=backward, host_ms=host, peak_gb=peak)


def measure(kind: str, batch: int, identities: int, size: int, options, rate: dict[str, float]) -> list[dict]:
    runs = {name: [] for name in variants(kind, options.blocks)}
    failed = {}
    problem = Problem(kind, batch, identities, size, torch.device("cuda"))
    if problem.sink is not None:
        problem.optimize(options.optimizer)
        BlockUpdate(problem.optimizer, problem.rows).begin()  # makes the state, which is not the head's
    for repeat in range(options.repeats + WARM_UP):
        for name, (act, _) in variants(kind, options.blocks).items():
            if name in failed or (options.only and not any(word in name for word in options.only)):
                continue
            try:
                found = once(problem, act)
            except torch.cuda.OutOfMemoryError:
                failed[name] = "out of memory"
                torch.cuda.empty_cache()
                continue
            if repeat >= WARM_UP:
                runs[name].append(found)
    rows, products = [], 2 if kind == "memory" else 3
    for name, (_, precision) in variants(kind, options.blocks).items():
        row = dict(variant=name, kind=kind, B=batch, C=identities, D=size)
        row |= dict(state=failed.get(name, "measured"), repeats=len(runs[name]))
        if runs[name]:
            row |= {k: statistics.median(r[k] for r in runs[name]) for k in runs[name][0]}
            totals = [r["forward_ms"] + r["backward_ms"] for r in runs[name]]
            flops = products * 2 * batch * centers_of(kind) * identities * size
            floor = 1e3 * flops / rate[precision]
            row |= dict(ms=statistics.median(totals), min_ms=min(totals), max_ms=max(totals))
            row |= dict(tflops=flops / row["ms"] / 1e9, floor_ms=floor, floor_fraction=floor / row["ms"])
        elif name not in failed:
            continue
        rows.append(row)
        print({k: f"{v:.3g}" if isinstance(v, float) else v for k, v in row.items()}, flush=True)
    return rows


def numbers(text: str) -> list[int]:
    return [int(part) for part in text.split(",")]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path, help="folder for kernels_check.csv, kernels_tiles.csv and kernels.csv")
    parser.add_argument("--batches", type=numbers, default=[1024], metavar="B,...")
    shards = [100_000, 1_000_000, 4_000_000]
    parser.add_argument("--identities", type=numbers, default=shards, metavar="C,...", help="of the shard")
    parser.add_argument("--sizes", type=numbers, default=[512], metavar="D,...")
    parser.add_argument("--kinds", type=lambda text: text.split(","), default=list(KINDS), help=",".join(KINDS))
    parser.add_argument("--blocks", type=numbers, default=[0], metavar="K,...", help="rows of a chunk; 0: the default")
    parser.add_argument("--only", type=lambda text: text.split(","), help="variants with one of these words, as bf16,eager")
    parser.add_argument("--optimizer", choices=("sgd", "adamw"), default="sgd", help="of the variants with a step")
    parser.add_argument("--repeats", type=int, default=10)
    parser.add_argument("--check-only", action="store_true")
    parser.add_argument("--tiles-only", action="store_true")
    options = parser.parse_args()
    if unknown := set(options.kinds) - set(KINDS):
        parser.error(f"--kinds: {', '.join(sorted(unknown))} is none of {', '.join(KINDS)}")
    if not torch.cuda.is_available():
        raise SystemExit("no GPU: nothing measured")
    device = torch.device("cuda")
    shapes = [(256, 20_000, 512), (1, 5000, 512), (333, 7001, 96), (64, 3001, 33), (16, 2, 512)]
    checked, steps = check(device, shapes), check_steps(device, shapes)
    write_csv(options.out / "kernels_check.csv", checked)
    write_csv(options.out / "kernels_steps_check.csv", steps)
    if not all(row["ok"] for row in checked + steps):
        raise SystemExit("gradients or steps differ, see ok in kernels_check.csv, kernels_steps_check.csv: nothing measured")
    if options.check_only:
        return
    times = []
    for size, batch, kind in itertools.product(options.sizes, options.batches, options.kinds):
        times += tile_times(kind, batch, max(options.identities), size, device)
        write_csv(options.out / "kernels_tiles.csv", times)
    if options.tiles_only:
        return
    rate = rates(device)
    print({k: f"{v / 1e12:.3g} T/s" for k, v in rate.items()}, flush=True)
    rows = []
    for size in options.sizes:
        for batch in options.batches:
            for identities in options.identities:
                for kind in options.kinds:
                    rows += measure(kind, batch, identities, size, options, rate)
                    torch.cuda.empty_cache()
                    write_csv(options.out / "kernels.csv", [row | {f"mm_{k}": v for k, v in rate.items()} for row in rows])


if __name__ == "__main__":
    main()
