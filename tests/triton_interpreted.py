"""The triton head by Triton's interpreter on CPU tensors, against the dense head in float64. Run by tests/test_triton.py
in a process of its own, since TRITON_INTERPRET=1 must be set before triton is imported."""

import os

assert os.environ.get("TRITON_INTERPRET") == "1"

import pytest
import torch
import torch.nn.functional as F

from protomem import distributed
from protomem.block_update import BlockUpdate
from protomem.head import HEADS, Columns, GradSink, Injection, Live, Nearest, objective, triton_head, tuning
from protomem.head.triton_head import Tiles
from protomem.objective.margins import build_margin
from tests.ranks import run_ranks
from tests.test_communication import listen
from tests.test_equivalence import CASES as STEP_CASES
from tests.test_equivalence import MARGINS, close, train_once
from tests.test_equivalence import expected as expected_step

BLOCK = 32  # rows of a chunk: two tiles of the interpreter
USUAL = dict(batch=19, classes=75, size=21, scale=16.0, margin=dict(name="cosface", m=0.4))
FILTERED = dict(margin=dict(name="cosface", m=0.4, filter_above=0.2))
ARCFACE = dict(margin=dict(name="arcface"))
CASES = {
    "classifier": {},
    "arcface_filtered": dict(margin=dict(name="arcface", filter_above=0.2), nearest=True),
    "one_sample": dict(batch=1, classes=33, size=16, nearest=True),
    "one_class": dict(batch=4, classes=1),  # at two ranks a shard is empty
    "one_row_each": dict(batch=17, classes=2, size=96, nearest=True),
    "large_scale": dict(scale=200.0, opposite=True),  # exp(z - s) would underflow
    "unit": dict(unit=True, nearest=True),
    "memory_slots": dict(unit=True, hidden=True, sink=False, own=True, live=True, nearest=True, **FILTERED),
    "memory_rows_learn": dict(unit=True, hidden=True, own=True),
    "rows_hold_nothing": dict(hidden=True, calls=2, **ARCFACE),
    "nothing_at_all": dict(hidden="all", unit=True, nearest=True),
    "threshold": dict(threshold=2.0, hidden=True, calls=2, **FILTERED),
    "high_threshold": dict(threshold=40.0),  # softplus(z - b) is e^-40, where log(1 + e) is 0
    "threshold_unit": dict(threshold=-3.0, unit=True, live=True, sink=False, nearest=True, **ARCFACE),
    "injection": dict(share=0.3, **FILTERED),
    "injection_mapped": dict(share=0.3, mapped=True, calls=2, nearest=True),
    "injection_unit": dict(share=0.3, unit=True, hidden=True, calls=2),
    "injection_everywhere": dict(share=1.0, threshold=1.0, mapped=True),
    "constant_injected": dict(share=0.3, unit=True, mapped=True, sink=False),
    "handed_over": dict(updated="torch", **FILTERED),
    "handed_over_injection": dict(updated="torch", share=0.3, mapped=True),
    "updated": dict(updated="kernel", own=True, **FILTERED),
    "updated_injection": dict(updated="kernel", share=0.3, mapped=True),
    "updated_unit": dict(updated="kernel", unit=True, hidden=True, threshold=2.0),
    "updated_unit_injection": dict(updated="kernel", unit=True, share=0.3),
    "x_is_constant": dict(calls=2, frozen=True, own=True),
}
STORES = (0, 0.004, 16)  # exponentials of no chunk, of one or two, of all


def problem(
    batch,
    classes,
    size,
    centers=1,
    unit=False,
    hidden=False,
    own=False,
    live=False,
    share=0.0,
    mapped=False,
    opposite=False,
    **_,
) -> dict:
    """Tensors of the whole problem, float64 numbers that float32 holds exactly (but unit vectors)."""
    g = torch.Generator().manual_seed(batch * 1000 + classes)
    random = lambda *shape: torch.randn(*shape, generator=g).double()  # noqa: E731
    p = dict(x=F.normalize(random(batch, size)), rows=random(classes * centers, size))
    p["labels"] = torch.randint(0, classes, (batch,), generator=g)
    if opposite:
        p["rows"] = -random(classes * centers, 1).abs() * p["x"].mean(0) + 0.01 * p["rows"]
    if unit:
        p["rows"] = F.normalize(p["rows"])
    if hidden:
        p["valid"] = torch.arange(classes) % 3 != 1 if hidden != "all" else torch.zeros(classes, dtype=torch.bool)
    if own:
        p["own"], p["uses_own"] = F.normalize(random(batch, size)), torch.arange(batch) % 3 != 0
    if live:
        p["place"] = torch.randperm(classes, generator=g)[: classes // 3]
        p["place"] = torch.cat([p["place"], torch.full((2,), -1), p["labels"][:1]]).unique()  # a target among them
    if share:
        weight = 0.05 + 0.85 * torch.rand(classes, generator=g).double()
        p["weight"] = weight * (torch.rand(classes, generator=g) < share)
        p["features"] = F.normalize(random(classes + 9 if mapped else classes, size))
        p["map"] = torch.randperm(classes + 9, generator=g)[:classes] if mapped else None
    return p


class Collected:
    """In the place of an update inside the backward: what it is given for each block. Rows change, as they would."""

    fused = False

    def __init__(self, rows):
        self.rows, self.gradient = rows, torch.full_like(rows, 7)

    def begin(self):
        pass

    def __call__(self, start, stop, grad):
        self.gradient[start:stop] = grad
        self.rows[start:stop] = -3


class Kept(BlockUpdate):
    """One step by the kernel, which leaves the gradient in the momentum, as the buffer was zero before."""

    def __init__(self, rows):
        parameter = torch.nn.Parameter(rows)
        super().__init__(torch.optim.SGD([parameter], lr=3.0, momentum=0.9, fused=True), parameter)

    @property
    def gradient(self):
        return self._moments(0, *self.parameter.shape)[0]


def compute(head: str, case: dict, p: dict, dtype, **options) -> dict:
    """All results of this rank's shard: values that are equal on every rank, gradients of which the ranks' sum counts, and
    those of the shard."""
    first, last = distributed.shard_bounds(case["classes"], distributed.rank(), distributed.world_size())
    mine, centers = lambda index: torch.where((index >= first) & (index < last), index - first, -1), case.get("centers", 1)
    leaf = lambda t: t.to(dtype).detach().clone().requires_grad_()  # noqa: E731
    rows = p["rows"][first * centers : last * centers].to(dtype)
    x, sink = leaf(p["x"]).requires_grad_(not case.get("frozen")), GradSink() if case.get("sink", True) else None
    columns = Columns(rows, mine(p["labels"]), sink, unit=case.get("unit", False), centers=centers)
    columns.nearest = Nearest() if case.get("nearest") else None
    leaves = dict(dx=x)
    if "valid" in p:
        columns.valid = p["valid"][first:last]
    if "own" in p:
        columns.own = leaves["d_own"] = leaf(p["own"])
        columns.uses_own = p["uses_own"]
    if "place" in p:
        place = mine(p["place"])
        leaves["d_live"] = leaf(p["rows"][p["place"]])
        columns.live = Live(leaves["d_live"], place)
    if "weight" in p:
        features = p["features"] if p["map"] is not None else p["features"][first:last]
        row = p["map"][first:last] if p["map"] is not None else None
        columns.injection = Injection(features.to(dtype), row, p["weight"][first:last].to(dtype))
    threshold = None
    if "threshold" in case:
        threshold = leaves["d_b"] = torch.tensor([case["threshold"]], dtype=dtype).requires_grad_()
    margin = build_margin(scale=case["scale"], **case["margin"])
    if sink is not None:
        if case.get("updated") and head == "triton":
            sink.update = {"torch": Collected, "kernel": Kept}[case["updated"]](rows)
        if sink.begin(rows) is not None:
            sink.buffer.fill_(7)  # the first write overwrites
    for _ in range(case.get("calls", 1)):
        cos_y, out = HEADS[head](x, columns, margin.scale, margin.negatives, threshold=threshold, **options)
        z_y = margin.scale * margin.target(cos_y, None)
        loss = (objective(z_y, out) if threshold is None else objective(z_y, threshold) + out).mean()
        if loss.requires_grad:
            loss.backward()
    found = dict(loss=loss, cos_y=cos_y, out=out)
    for name, t in leaves.items():
        if t.requires_grad:
            found[name] = torch.zeros_like(t) if t.grad is None else t.grad
    if sink is not None:
        found["rows"] = sink.buffer if sink.update is None else sink.update.gradient
    if columns.nearest is not None:
        found |= dict(near=columns.nearest.cos, near_row=columns.nearest.row)
    return {name: t.detach().double() for name, t in found.items()}


def joined(results: list[dict], case: dict) -> dict:
    """Of all ranks' results one, as a single process would have it."""
    whole = dict(results[0])
    for name in ("dx", "d_own", "d_live"):
        if name in whole:
            whole[name] = torch.stack([r[name] for r in results]).sum(0)
    if "rows" in whole:
        whole["rows"] = torch.cat([r["rows"] for r in results])
    if "near" in whole:
        starts = [distributed.shard_bounds(case["classes"], r, len(results))[0] for r in range(len(results))]
        whole["near"], rank = torch.stack([r["near"] for r in results]).max(0)
        rows = torch.stack([r["near_row"] + start for r, start in zip(results, starts)])
        whole["near_row"] = rows.gather(0, rank[None])[0]
    return whole


def compare(found: dict, expected: dict, tolerance: float, name: str) -> None:
    assert found.keys() == expected.keys()
    for key, b in expected.items():
        a = found[key]
        if key == "near_row" and expected["near"].isinf().all():
            continue
        assert a.shape == b.shape and torch.equal(a.isinf(), b.isinf()), (name, key)
        a, b = a[~b.isinf()], b[~b.isinf()]
        if not a.numel():
            continue
        scale = b.abs().max().clamp_min(1e-30 if key == "out" else 1e-6)
        assert (a - b).abs().max() <= tolerance * scale, (name, key, ((a - b).abs().max() / scale).item())


def cases():
    return {name: {**USUAL, **case} for name, case in CASES.items()}


@pytest.mark.parametrize("name", list(CASES))
def test_one_process(name):
    case, turn = cases()[name], list(CASES).index(name)
    p = problem(**case)
    expected = compute("dense", case, p, torch.float64)
    for store in STORES if name in ("classifier", "threshold") else STORES[turn % 3 :][:1]:
        found = compute("triton", case, p, torch.float32, block=BLOCK, store_mb=store)
        compare(found, expected, 1e-5, f"{name}, store_mb={store}")


def scaled() -> list[Tiles]:
    """The tuner's candidates in the interpreter's size: k is 16, and the others have the same ratio to it."""
    every = [tiles for tried in tuning.TRIED.values() for tiles in tried]
    return list({Tiles(*(16 * size // t.k for size in (t.m, t.n, t.d)), 16, 1, 1): None for t in every})


@pytest.mark.parametrize("tiles", scaled(), ids=lambda t: f"{t.m}x{t.n}x{t.d}")
def test_every_shape_of_the_tuner_s_tiles(tiles):
    for name, block in (("injection_mapped", 32), ("memory_rows_learn", 64)):
        case = cases()[name]
        p = problem(**case)
        found = compute("triton", case, p, torch.float32, block=block, store_mb=0.004, tiles=tiles)
        compare(found, compute("dense", case, p, torch.float64), 1e-5, f"{name}, {tiles}")


WORKS = {
    "bf16": dict(precision="bf16", mixed=True),
    "kept": dict(store_mb=16.0, filtered=True),
    "memory": dict(learns=False, memory=True, half=True),
    "memory learns": dict(memory=True, threshold=True),
}


@pytest.mark.parametrize("name", WORKS)
def test_the_tuner_compares_what_candidates_compute(name, monkeypatch):
    """It calls the head as a step does, and passes over one that leaves half of d x out."""
    work = tuning.work(8, 75, 21, **{**dict(precision="fp32", store_mb=0.0, learns=True), **WORKS[name]}, block=64)
    tried = [Tiles(16, n, 16, 16, 1, 1) for n in (16, 32)] + [Tiles(32, 16, 32, 16, 1, 1)]
    monkeypatch.setitem(tuning.TRIED, work.precision, tried)
    real = triton_head.launch

    def lazy(kernel, grid, *args, **constants):
        short = kernel.fn.__name__ == "add_dx" and constants["BN"] == 32
        real(kernel, (*grid[:2], 1) if short else grid, *args, **constants)

    def clock(act):
        act()
        return 1.0

    for launch, wrong in ((real, []), (lazy, [1])):
        monkeypatch.setattr(triton_head, "launch", launch)
        found = tuning.times(work, torch.device("cpu"), clock)
        assert [choice for choice, *_ in found] == [(tiles, 64) for tiles in tried]
        assert [k for k, (_, _, why) in enumerate(found) if why] == wrong
        assert all("its gradients differ by" in found[k][2] and found[k][1] == float("inf") for k in wrong)


def test_two_ranks():
    problems = {name: problem(**case) for name, case in cases().items()}

    def work():
        found = {}
        for k, (name, case) in enumerate(cases().items()):
            options = dict(block=BLOCK, store_mb=STORES[(k + 1) % 3])
            found[name] = compute("triton", case, problems[name], torch.float32, **options)
        return {name: {key: t.numpy() for key, t in found[name].items()} for name in found}

    results = run_ranks(2, work, timeout=150)
    for name, case in cases().items():
        found = joined([{key: torch.as_tensor(t) for key, t in r[name].items()} for r in results], case)
        compare(found, compute("dense", case, problems[name], torch.float64), 1e-5, name)


@pytest.mark.parametrize("store_mb", [0, 16])
@pytest.mark.parametrize("more", [{}, dict(share=0.04, mapped=True), dict(unit=True, threshold=10.0)])
def test_bf16_costs_one_percent_of_the_gradient(more, store_mb, monkeypatch):
    """Random unit vectors at D = 512, s = 64. `blocked` is nearer on CPUs with bf16 units: its logits are fp32 products there."""
    monkeypatch.setattr(triton_head, "INTERPRETED", triton_head.Tiles(64, 128, 256, 128, 1, 1))
    case = {**USUAL, **dict(batch=64, classes=1000, size=512, scale=64.0), **more}
    p = problem(**case)
    expected = compute("dense", case, p, torch.float64)
    found = compute("triton", case, p, torch.float32, precision="bf16", store_mb=store_mb, block=512)
    blocked = compute("blocked", case, p, torch.float32, precision="bf16")
    for key in ("dx", "rows"):
        error, usual = ((r[key] - expected[key]).norm() / expected[key].norm() for r in (found, blocked))
        print(f"{more} store_mb={store_mb} {key}: {100 * error:.2f} %, blocked {100 * usual:.2f} %")
        assert 1e-4 < error < 0.012, (key, error)


def test_rows_stored_in_bf16():
    case = {**USUAL, "unit": True, "sink": False}
    p = problem(**case)
    p["rows"] = p["rows"].bfloat16().double()
    expected = compute("dense", case, p, torch.float64)
    for precision, tolerance in (("fp32", 1e-5), ("bf16", 0.03)):
        x = p["x"].float().requires_grad_()
        columns = Columns(p["rows"].bfloat16(), p["labels"], unit=True)
        cos_y, lse = HEADS["triton"](x, columns, 16.0, precision=precision, block=BLOCK)
        objective(16 * (cos_y - 0.4), lse).mean().backward()
        compare(dict(dx=x.grad.double()), dict(dx=expected["dx"]), tolerance, precision)


def test_no_gradient_mode():
    case = cases()["classifier"]
    p = problem(**case)
    with torch.no_grad():
        found = compute("triton", case, p, torch.float32, block=BLOCK)
    expected = compute("dense", case, p, torch.float64)
    found, expected = ({k: r[k] for k in ("loss", "cos_y", "out")} for r in (found, expected))
    compare(found, expected, 1e-5, "no_grad")


def test_whole_steps_equal_the_slow_formula():
    """The cases of tests/test_equivalence.py that try something else than those above, through DDP and micro-batches."""
    tried = [("accumulated", "arcface"), ("uneven_batch", "filtered"), ("one_class", "cosface")]
    tried.append(("classes_all_elsewhere", "softmax"))

    def work():
        steps = [(MARGINS[margin], *STEP_CASES[case], torch.float32, 4, 0) for case, margin in tried]
        return [train_once("triton", *step) for step in steps]

    results = run_ranks(2, work)
    for k, (case, margin) in enumerate(tried):
        loss, encoder_grad, weight_grad = expected_step(case, margin)
        for rank in range(2):
            assert results[rank][k][0] == pytest.approx(loss, rel=1e-4, abs=1e-7)
            close(results[rank][k][1], encoder_grad, 1e-4)
        close(torch.cat([torch.as_tensor(r[k][2]) for r in results]), weight_grad, 1e-4)


def test_the_rows_gradient_is_made_while_the_embeddings_gradient_travels(monkeypatch):
    def work():
        events, real = [], triton_head.launch
        listen(events)

        def launch(kernel, *args, **constants):
            events.append(kernel.fn.__name__)
            real(kernel, *args, **constants)

        monkeypatch.setattr(triton_head, "launch", launch)
        train_once("triton", MARGINS["cosface"], *STEP_CASES["uneven"], torch.float32, 4, 0)
        return events[events.index("scatter sent") :], events.count("row_grads")

    for (sent, *kernels, waited), count in run_ranks(2, work):
        assert (sent, waited) == ("scatter sent", "scatter waited for") and kernels.count("row_grads") == count > 0
        assert set(kernels) == {"operands", "logits", "row_grads", "finish"}
