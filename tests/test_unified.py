"""The unified criterion (UniFace) against slow loops: loss and all gradients, the threshold's too, at 1 to 4 ranks."""

import math

import pytest
import torch
import torch.nn.functional as F

from protomem import build, config, distributed
from protomem.errors import UserError
from protomem.head import HEADS, Columns, GradSink, Live, Nearest
from protomem.objective.criterion import UnifiedCriterion
from protomem.objective.margins import build_margin, interclass_filter
from protomem.step import MicroBatch, forward_backward
from tests.empirical_reference import USUAL, compare, run_fast
from tests.memory_cases import SCALE, batches, build as build_memory, rows_per_rank, run_reference, slow_phi
from tests.memory_cases import USUAL as MEMORY
from tests.ranks import run_ranks
from tests.test_no_sync import no_waiting

CASES = {
    "cosface": {**USUAL, "unified": dict()},
    "dense": {**USUAL, "unified": dict(negatives=0.3), "backend": "dense"},
    "arcface": {**USUAL, "margin": dict(name="arcface"), "unified": dict(bias=1.0, negatives=2.0)},
    "softmax": {**USUAL, "margin": dict(name="softmax"), "unified": dict(bias=-3.0), "accumulate": 2},
    "filtered": {**USUAL, "margin": dict(name="cosface", filter_above=0.1), "unified": dict(bias=0.5)},
    "filtered_dense": {
        **USUAL,
        "margin": dict(name="arcface", filter_above=0.1),
        "unified": dict(bias=0.5),
        "backend": "dense",
        "accumulate": 3,
    },
    "empty_shard": {**USUAL, "classes": 5, "unified": dict()},  # 4 ranks hold 2, 2, 1 and 0 rows
    "empty_shards_dense": {**USUAL, "classes": 3, "unified": dict(), "backend": "dense"},
    "one_class": {**USUAL, "classes": 1, "unified": dict()},
    "sampled": {**USUAL, "classes": 23, "rate": 0.4, "unified": dict(negatives=3.0)},
}


@pytest.mark.parametrize("world", [1, 2, 3, 4])
def test_steps_equal_the_slow_formula(world):
    """Five steps of every case, float64: relative error <= 1e-9 on loss and gradients; the threshold's on every rank."""
    ranks = run_ranks(world, lambda: [run_fast(case) for case in CASES.values()])
    assert compare(CASES, ranks) == {}
    for records in zip(*ranks):
        for steps in zip(*records):
            assert len({one["bias"].tobytes() for one in steps}) == 1  # bit for bit, or the ranks' thresholds drift apart


# --- the heads' options ----------------------------------------------------------------------------------------------


def slow_head(x, rows, target, scale, bias, *, valid=None, own=None, uses_own=None, unit=False, above=None):
    """(z_y [B], sum over negatives of log(1 + e^(z - b)) [B]) by loops; target may be -1."""
    out, totals = [], []
    for i in range(len(x)):
        cos = [x[i] @ (r if unit else r / r.norm()) for r in rows]
        t = target[i].item()
        y = x[i] @ own[i] if own is not None and uses_own[i] and t >= 0 else cos[t] if t >= 0 else 0 * x[i].sum()
        total = 0 * x[i].sum()
        for j, c in enumerate(cos):
            if j != t and (valid is None or valid[j]):
                c = 0 * c if above is not None and c > above else c
                total = total + torch.log(1 + torch.exp(scale * c - bias[0]))
        out.append(scale * y)
        totals.append(total)
    return torch.stack(out), torch.stack(totals)


@pytest.mark.parametrize("head", ["dense", "blocked_kept", "blocked"])
@pytest.mark.parametrize("above", [None, 0.2])
def test_every_kind_of_columns(head, above):
    """Rows that hold nothing, own positives with a graph, rows with a graph, the nearest negative, in one call."""
    g = torch.Generator().manual_seed(1)
    rows = F.normalize(torch.randn(10, 4, generator=g, dtype=torch.float64))
    x0 = F.normalize(torch.randn(6, 4, generator=g, dtype=torch.float64))
    own0 = F.normalize(torch.randn(6, 4, generator=g, dtype=torch.float64))
    valid = torch.tensor([1, 1, 0, 1, 1, 1, 0, 1, 1, 1]).bool()
    target, place = torch.tensor([0, 4, -1, 4, 9, 3]), torch.tensor([3, -1, 4])
    uses_own = torch.tensor([True, False, True, True, False, False])
    weights = torch.rand(2, 6, generator=g, dtype=torch.float64)
    found = []
    for slow in (True, False):
        x, own, live = x0.clone().requires_grad_(), own0.clone().requires_grad_(), rows[[3, 0, 4]].clone().requires_grad_()
        bias, leaf = torch.tensor([1.5], dtype=torch.float64, requires_grad=True), rows.clone().requires_grad_()
        if slow:
            whole = torch.stack([live[0] if j == 3 else live[2] if j == 4 else leaf[j] for j in range(10)])
            z_y, total = slow_head(
                x, whole, target, 8.0, bias, valid=valid, own=own, uses_own=uses_own, unit=True, above=above
            )
        else:
            nearest = Nearest()
            columns = Columns(
                rows, target, unit=True, valid=valid, own=own, uses_own=uses_own, live=Live(live, place), nearest=nearest
            )
            options = {} if head == "dense" else dict(block=3, store_mb=16 if head == "blocked_kept" else 0)
            negatives = interclass_filter(above) if above else None
            cos_y, total = HEADS[head.split("_")[0]](x, columns, 8.0, negatives, bias, **options)
            z_y = 8 * cos_y
            cos = (x @ rows.t()).masked_fill(~valid, -9)
            cos[torch.arange(6)[target >= 0], target[target >= 0]] = -9
            assert torch.allclose(nearest.cos, cos.max(1).values) and torch.equal(nearest.row, cos.argmax(1))
        (weights[0] * z_y + weights[1] * total).sum().backward()
        live.grad[1] = 0  # its row is elsewhere
        found.append([z_y.detach(), total.detach(), x.grad, own.grad, live.grad, bias.grad])
    for a, b in zip(*found):
        assert torch.allclose(a, b, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("head", ["dense", "blocked"])
def test_float32_is_exact_far_from_the_threshold(head):
    """A softplus of -76 (e^-76 = 1e-33), of 140, and a row that holds nothing: finite, and right to float32."""
    x = torch.tensor([[1.0, 0.0]]).requires_grad_()
    rows, bias = torch.tensor([[0.0, 1.0], [-1.0, 0.0], [0.0, -1.0]]), torch.tensor([12.0], requires_grad=True)
    none = HEADS[head](x, Columns(rows, torch.tensor([0]), valid=torch.tensor([1, 1, 0]).bool()), 64.0, threshold=bias)[1]
    assert none.item() == pytest.approx(math.exp(-76), rel=1e-5)
    far = HEADS[head](x, Columns(-rows, torch.tensor([0]), unit=True), 152.0, threshold=bias)[1]
    assert far.item() == pytest.approx(140, rel=1e-6)
    alone = HEADS[head](x, Columns(rows[:1], torch.tensor([0])), 64.0, threshold=bias)[1]
    nobody = HEADS[head](x, Columns(rows[:0], torch.tensor([-1])), 64.0, threshold=bias)[1]
    assert alone.item() == pytest.approx(0, abs=1e-30) and nobody.item() == 0
    (none + far + alone + nobody).sum().backward()
    assert x.grad.isfinite().all() and bias.grad.item() == pytest.approx(-1.0, abs=1e-4)


def test_bf16_operands_cost_one_percent_of_the_gradient():
    g = torch.Generator().manual_seed(0)
    x = F.normalize(torch.randn(64, 512, generator=g))
    rows, target = torch.randn(2000, 512, generator=g), torch.randint(0, 2000, (64,), generator=g)
    grads = []
    for dtype, head, options in ((torch.float64, "dense", {}), (torch.float32, "blocked", dict(precision="bf16"))):
        leaf, sink, bias = x.to(dtype).requires_grad_(), GradSink(), torch.tensor([1.0], requires_grad=True)
        sink.begin(rows.to(dtype))
        HEADS[head](leaf, Columns(rows.to(dtype), target, sink), 64.0, threshold=bias, **options)[1].mean().backward()
        grads.append((leaf.grad.double(), sink.buffer.double(), bias.grad.double()))
    errors = [((a - b).norm() / a.norm()).item() for a, b in zip(*grads)]
    assert max(errors) < 0.012 and min(errors[:2]) > 1e-4  # the threshold's comes from logits alone, which may be fp32


# --- a memory, the config ---------------------------------------------------------------------------------------------


def memory_steps(case: dict, steps: int) -> list[dict]:
    torch.set_default_dtype(torch.float64)
    rank, world = distributed.rank(), distributed.world_size()
    memory, criterion, records = build_memory(case), UnifiedCriterion(40, 1.0, 0.7), []
    for step, batch in enumerate(batches(case, steps)):
        sizes = rows_per_rank(world, step)
        mine = slice(sum(sizes[:rank]), sum(sizes[: rank + 1]))
        x = batch["x"][mine].clone().requires_grad_()
        part = MicroBatch(x, torch.tensor(batch["labels"], dtype=torch.int64)[mine], sizes)

        def head(*arguments, **options):
            return HEADS[case["backend"]](*arguments, block=4, store_mb=(0, 0.0006, 16)[step % 3], **options)

        criterion.zero_grad()
        margin = build_margin("cosface", m=0.4, scale=SCALE)
        stats = forward_backward([part], torch.nn.Identity(), memory, head, margin, step, criterion=criterion, observe=True)
        records.append(dict(loss=stats["loss"].item(), grad=x.grad.numpy() / world, bias=criterion.bias.grad.item()))
    return records


@pytest.mark.parametrize("world", [1, 2])
def test_a_prototype_memory(world):
    """The memory's own reference makes the rows; the loss over them is this criterion's, in loops."""
    torch.set_default_dtype(torch.float64)
    try:
        for case in (MEMORY, {**MEMORY, "self_exclusion": "loo", "backend": "dense", "size": 17}):
            ranks = run_ranks(world, memory_steps, case, 4)
            for step, (want, batch) in enumerate(zip(run_reference(case, 4, []), batches(case, 4))):
                x, bias = batch["x"].clone().requires_grad_(), torch.tensor([1.0], requires_grad=True)
                total = 0
                for i, y in enumerate(batch["labels"]):
                    xh, positive = x[i] / x[i].norm(), torch.as_tensor(want["rows"][want["slots"].index(y)])
                    others = [j for j in range(len(x)) if batch["labels"][j] == y and j != i]
                    if case["self_exclusion"] == "loo" and others:  # no batch here has images that cancel out
                        rest = sum(batch["x"][j] / batch["x"][j].norm() for j in others)
                        positive = rest / rest.norm()
                    total = total + torch.log(1 + torch.exp(bias - SCALE * slow_phi(dict(name="cosface", m=0.4), xh @ positive)))
                    for slot, row in want["rows"].items():
                        if want["slots"][slot] != y:
                            total = total + 0.7 * torch.log(1 + torch.exp(SCALE * (xh @ torch.as_tensor(row)) - bias))
                loss = (total / len(x)).sum()
                loss.backward()
                for one in (records[step] for records in ranks):
                    assert one["loss"] == pytest.approx(loss.item(), rel=1e-9)
                    assert one["bias"] == pytest.approx(bias.grad.item(), rel=1e-9)
                grad = torch.cat([torch.as_tensor(records[step]["grad"]) for records in ranks])
                assert torch.allclose(grad, x.grad, rtol=1e-9, atol=1e-10 * x.grad.abs().max().item())
    finally:
        torch.set_default_dtype(torch.float32)


def test_nothing_waits():
    x, rows = F.normalize(torch.randn(5, 4)).requires_grad_(), torch.randn(9, 4)
    criterion, target = UnifiedCriterion(9), torch.tensor([0, 3, -1, 8, 0])
    with no_waiting():
        loss, _ = criterion(x, x.norm(dim=1), Columns(rows, target), HEADS["blocked"], build_margin("cosface"))
        loss.mean().backward()
    assert criterion.bias.grad is not None


def test_the_config_makes_the_criterion():
    given = ["output=x", "data.train=y"]
    criterion = build.criterion_from(config.load([], [*given, "margin.criterion=unified"]), 1000, torch.device("cpu"))
    assert criterion.bias.item() == pytest.approx(math.log(10_000)) and criterion.bias.dtype == torch.float32
    more = ["margin.criterion=unified", "margin.unified.bias=3", "margin.unified.negatives=0.5"]
    criterion = build.criterion_from(config.load([], [*given, *more]), 1000, torch.device("cpu"))
    assert criterion.bias.item() == 3 and criterion.negatives == 0.5
    memory = [*given, "prototypes.source=memory", "data.sampler.name=mixed", "optimizer.head.lr=0.01"]
    config.load([], [*memory, "margin.criterion=unified"])  # the threshold learns at this rate
    for more, message in (
        (["margin.unified.bias=3"], "margin.unified.bias=3.0 has no effect with margin.criterion=softmax"),
        (["margin.criterion=unified", "margin.unified.negatives=0"], "margin.unified.negatives=0.0 is too small"),
    ):
        with pytest.raises(UserError, match=message):
            config.load([], [*given, *more])
    with pytest.raises(UserError, match="optimizer.head.lr has no effect"):
        config.load([], memory)
