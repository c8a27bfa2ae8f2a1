"""VPL: features mixed into prototypes equal a slow formula, in the heads alone and in whole steps; configuration; resuming."""

import itertools
import json
import subprocess

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from protomem import build, checks, config, distributed, state
from protomem.errors import UserError
from protomem.head import HEADS, Columns, GradSink, Injection, Negatives, mixer, objective
from protomem.objective.margins import build_margin, interclass_filter
from protomem.optim import RowSGD
from protomem.prototypes.classifier import ClassifierShard
from protomem.prototypes.memory import PrototypeMemory
from protomem.prototypes.sampled import SampledShard
from protomem.prototypes.variational import FeatureBank
from protomem.step import Extras, MicroBatch, forward_backward
from tests.ranks import run_ranks
from tests.test_equivalence import MARGINS, SCALE, close, slow_phi
from tests.test_head import Largest, relative
from tests.test_training import assert_close, run

# --- the heads alone -----------------------------------------------------------------------------------------------


def head_problem(share: float, unit: bool, mapped: bool, hidden: bool, classes=14, batch=6, size=5, features=20, seed=0):
    """(x, Columns without a sink) with weights between 0.05 and 0.9 on about this share of the rows."""
    g = torch.Generator().manual_seed(seed)
    random = lambda *shape: torch.randn(*shape, generator=g, dtype=torch.float64)  # noqa: E731
    rows = F.normalize(random(classes, size)) if unit else random(classes, size)
    weight = 0.05 + 0.85 * torch.rand(classes, generator=g, dtype=torch.float64)
    weight *= torch.rand(classes, generator=g) < share
    row = torch.randperm(features, generator=g)[:classes] if mapped else None
    injection = Injection(F.normalize(random(features if mapped else classes, size)), row, weight)
    target = torch.randint(-1, classes, (batch,), generator=g)  # -1: elsewhere
    valid = torch.arange(classes) % 4 != 1 if hidden else None
    x = F.normalize(random(batch, size))
    return x, Columns(rows, target, unit=unit, valid=valid, injection=injection)


def by_head(head, x, columns: Columns, negatives=None, calls=1, scale=8.0, **options):
    """(cos_y, lse, d x, d rows) of the sum of `calls` equal loss terms."""
    before, sink, x = columns.rows.clone(), GradSink(), x.clone().requires_grad_()
    sink.begin(columns.rows)
    columns = Columns(**{**vars(columns), "sink": sink})
    for _ in range(calls):
        cos_y, lse = HEADS[head](x, columns, scale, negatives, **options)
        objective(scale * (cos_y - 0.2), lse).sum().backward()
    assert torch.equal(columns.rows.detach(), before)  # bit for bit
    return cos_y.detach(), lse.detach(), x.grad, sink.buffer


def by_loops(x, c: Columns, threshold=None):
    x, rows = x.clone().requires_grad_(), c.rows.clone().requires_grad_()
    cosines, logits, loss = [], [], 0
    for i in range(len(x)):
        own, negatives = torch.zeros((), dtype=x.dtype), []
        for j in range(len(rows)):
            p = rows[j] if c.unit else rows[j] / rows[j].norm()
            if (weight := c.injection.weight[j]) > 0:
                q = c.injection.features[j if c.injection.row is None else c.injection.row[j]]
                p = (1 - weight) * p + weight * q
                p = p / p.norm()
            cos = x[i] @ p
            if j == c.target[i]:
                own = cos
            elif c.valid is None or c.valid[j]:
                negatives.append(8 * (0 * cos if threshold and cos > threshold else cos))
        cosines.append(own)
        logits.append(torch.stack(negatives).logsumexp(0))
        loss = loss + torch.log1p(torch.exp(logits[-1] - 8 * (own - 0.2)))
    loss.backward()
    return torch.stack(cosines).detach(), torch.stack(logits).detach(), x.grad, rows.grad


@pytest.mark.parametrize("unit", [False, True])
@pytest.mark.parametrize("share", [0.0, 0.2, 1.0])
def test_heads_equal_the_slow_formula(share, unit, monkeypatch):
    for mapped, hidden, filtered in itertools.product((False, True), repeat=3):
        problem = head_problem(share, unit, mapped, hidden)
        count = (problem[1].injection.weight > 0).sum()
        assert count == 14 * share if share != 0.2 else 1 <= count <= 3  # of 14: few enough to be swapped one by one
        expected = by_loops(*problem, 0.3 if filtered else None)
        negatives = interclass_filter(0.3) if filtered else None
        sizes = [dict(block=b, store_mb=m) for b in (1, 5, 14) for m in (0, 3e-4, 16)]
        blocks = itertools.product(["blocked"], ({"cpu"}, set()), sizes)
        for head, asks, options in [("dense", set(), {}), *blocks]:
            monkeypatch.setattr(mixer, "ASKS", asks)
            found = by_head(head, *problem, negatives, **options)
            for a, b in zip(found, expected):
                assert (a - b).abs().max() <= 1e-9 * b.abs().max(), (head, asks, options, mapped, hidden, filtered)
            twice = by_head(head, *problem, negatives, calls=2, **options)[3]
            assert (twice - 2 * expected[3]).abs().max() <= 2e-9 * expected[3].abs().max(), (head, options)


@pytest.mark.parametrize("asks", [{"cpu"}, set()])
@pytest.mark.parametrize("unit", [False, True])
def test_rows_and_operands_of_half_precision(unit, asks, monkeypatch):
    """bf16 operands cost a percent; rows that are stored in bf16 are mixed in fp32, and stay as they are."""
    monkeypatch.setattr(mixer, "ASKS", asks)
    x, columns = head_problem(0.2, unit, True, False, classes=2000, batch=64, size=512, features=2100)
    exact = by_head("dense", x, columns, scale=64.0)
    single = Columns(**{**vars(columns), "rows": columns.rows.float()})
    found = by_head("blocked", x.float(), single, scale=64.0, precision="bf16")
    assert 1e-4 < relative(found[2], exact[2]) < 0.012 and relative(found[3], exact[3]) < 0.012
    stored = Columns(**{**vars(columns), "rows": columns.rows.bfloat16()})
    constant = lambda head, x, c: HEADS[head](x, c, 8.0)  # noqa: E731
    for a, b in zip(constant("blocked", x.float(), stored), constant("dense", x, stored)):
        assert (a - b).abs().max() < 2e-5


def test_rows_come_back_when_something_fails():
    x, columns = head_problem(0.0, False, False, False)
    columns.injection.weight[[5, 9]] = 0.4
    columns.sink, before = GradSink(), columns.rows.clone()
    columns.sink.begin(columns.rows)

    def fails(cos, cos_y):
        assert not torch.equal(columns.rows, before)  # the features stand in the shard just now
        raise KeyboardInterrupt

    cos_y, lse = HEADS["blocked"](x.requires_grad_(), columns, 8.0, Negatives(lambda cos, cos_y: cos, fails), block=7)
    with pytest.raises(KeyboardInterrupt):
        objective(8 * cos_y, lse).sum().backward()
    assert torch.equal(columns.rows, before)


@pytest.mark.parametrize("asks", [{"cpu"}, set()])
@pytest.mark.parametrize("share", [0.1, 1.0])
def test_no_tensor_of_the_size_of_the_shard(share, asks, monkeypatch):
    monkeypatch.setattr(mixer, "ASKS", asks)
    x, columns = head_problem(share, False, False, False, classes=20_000, batch=64, size=64)
    columns.sink = GradSink()
    columns.sink.begin(columns.rows)
    with Largest() as seen:
        for _ in range(2):  # the second term adds
            cos_y, lse = HEADS["blocked"](x.requires_grad_(), columns, 64.0, block=512, store_mb=0)
            objective(64 * cos_y, lse).mean().backward()
    assert 0 < seen.numel <= 2 * 64 * 512 < 0.06 * columns.rows.numel()


def test_features_do_not_go_into_rows_with_a_graph():
    with pytest.raises(ValueError, match="carry a graph"):
        Columns(torch.zeros(2, 2), torch.zeros(1), live=object(), injection=object())


# --- the bank ------------------------------------------------------------------------------------------------------


def test_the_last_image_of_an_identity_counts_whatever_the_order_of_writing():
    bank = FeatureBank(5, 2, weight=0.5, steps=2, start=1)
    rows = torch.arange(14.0).view(7, 2)
    bank.begin_step(3)
    rows[4] = torch.inf  # passed over: sample 1 is the last of row 2 then
    bank.take(torch.tensor([2, 2, -1, 0, 2, 0, -1]), rows)
    assert bank.features.tolist() == [[10, 11], [0, 0], [2, 3], [0, 0], [0, 0]]
    assert bank.seen.tolist() == [3, -1, 3, -1, -1]
    before = bank.features.clone()
    bank.take(torch.full((7,), -1), rows)  # a batch of which nothing is here
    assert torch.equal(bank.features, before)
    bank.take(torch.tensor([4, -1, -1, -1, -1, -1, -1]), rows)
    assert bank.seen.tolist() == [3, -1, 3, -1, 3] and bank.features[4].tolist() == [0, 1]
    for step, counts in ((4, True), (5, True), (6, False)):  # up to 2 steps later
        bank.begin_step(step)
        assert bank.injection().weight.tolist() == [0.5 * counts, 0, 0.5 * counts, 0, 0.5 * counts]
    early = FeatureBank(2, 2, weight=0.5, steps=9, start=0)
    early.begin_step(0)
    assert early.injection().weight.tolist() == [0, 0]  # of which nobody has been seen
    bank.begin_step(0)
    assert bank.injection() is None and bank.statistics(5)["injected"] == 0


# --- whole steps ---------------------------------------------------------------------------------------------------

STEPS, RATE, D, INPUTS = 5, 0.3, 6, 5
VPL = dict(weight=0.3, steps=2, start=2)
# name: (identities, batch, margin, back end, source, micro-batches, devices that are asked)
CASES = {
    "arcface": (13, 10, "arcface", "blocked", "classifier", 1, {"cpu"}),
    "filtered": (13, 9, "filtered", "dense", "classifier", 1, {"cpu"}),
    "all_rows": (13, 10, "combined", "blocked", "classifier", 1, set()),
    "accumulated": (13, 11, "arcface", "blocked", "classifier", 2, {"cpu"}),
    "few_of_many": (41, 10, "arcface", "blocked", "classifier", 1, {"cpu"}),
    "few_of_many_accumulated": (41, 10, "filtered", "blocked", "sampled", 2, {"cpu"}),
    "fewer_identities_than_ranks": (3, 8, "cosface", "blocked", "classifier", 1, {"cpu"}),
    "sampled_all": (13, 10, "arcface", "blocked", "sampled", 1, {"cpu"}),
    "sampled_accumulated": (13, 10, "arcface_straight_through", "dense", "sampled", 2, {"cpu"}),
}


def data(identities: int, batch: int):
    """(encoder [D, INPUTS], prototypes, [(inputs, labels) of each step]); every batch has identities twice or more."""
    g = torch.Generator().manual_seed(identities * 100 + batch)
    random = lambda *shape: torch.randn(*shape, generator=g, dtype=torch.float64)  # noqa: E731
    encoder, weight, steps = random(D, INPUTS), random(identities, D), []
    for _ in range(STEPS):
        few = torch.randperm(identities, generator=g)[: min(max(2, identities // 3), 4)]
        steps.append((random(batch, INPUTS), few[torch.randint(0, len(few), (batch,), generator=g)]))
    return encoder, weight, steps


def slow_steps(identities: int, batch: int, margin: str, active=None):
    """One process, sample by sample and identity by identity. active[step]: identities that take part; None: all.

    Yields (loss, encoder gradient, prototype gradient) of each step, then (prototypes, {identity: (feature, step)}).
    """
    encoder, weight, steps = data(identities, batch)
    last = {}
    for step, (inputs, labels) in enumerate(steps):
        encoder, weight = encoder.detach().requires_grad_(), weight.detach().requires_grad_()
        columns = {}
        for j in range(identities) if active is None else active[step]:
            p = weight[j] / weight[j].norm()
            if step >= VPL["start"] and j in last and step - last[j][1] <= VPL["steps"]:
                p = (1 - VPL["weight"]) * p + VPL["weight"] * last[j][0]
                p = p / p.norm()
            columns[j] = p
        loss, options = 0, MARGINS[margin]
        for i, y in enumerate(labels.tolist()):
            x = encoder @ inputs[i]
            x = x / x.norm()
            z = {y: SCALE * slow_phi(options, x @ columns[y])}
            for j in columns:
                if j != y:
                    cos = x @ columns[j]
                    z[j] = SCALE * (0 * cos if options.get("filter_above") and cos > options["filter_above"] else cos)
            loss = loss - (z[y] - torch.stack(list(z.values())).logsumexp(0)) / len(labels)
        loss.backward()
        for i, y in enumerate(labels.tolist()):
            x = (encoder @ inputs[i]).detach()
            last[y] = (x / x.norm(), step)
        yield loss.item(), encoder.grad, weight.grad
        with torch.no_grad():
            encoder, weight = encoder - RATE * encoder.grad, weight - RATE * weight.grad
    yield weight, last


def fast_steps(case: str, rate: float = 1.0):
    """The same by the real step on this rank: (records of the steps, prototypes, features, seen, active rows per step)."""
    identities, batch, margin, backend, source, accumulate, asks = CASES[case]
    mixer.ASKS = asks  # in this forked rank only
    encoder_weight, weight, steps = data(identities, batch)
    rank, world = distributed.rank(), distributed.world_size()
    encoder = torch.nn.Linear(INPUTS, D, bias=False).double()
    encoder.weight.data.copy_(encoder_weight)
    model = torch.nn.parallel.DistributedDataParallel(encoder) if world > 1 else encoder
    if source == "sampled":
        shard = SampledShard(identities, D, rate=rate, seed=3, injection=VPL).double()
        learner = RowSGD([shard.weight], lr=RATE, momentum=0.0)
    else:
        shard = ClassifierShard(identities, D, injection=VPL).double()
        learner = torch.optim.SGD([shard.weight], lr=RATE)
    shard.weight.data.copy_(weight[shard.first : shard.last])
    encoder_learner = torch.optim.SGD(encoder.parameters(), lr=RATE)
    first, _ = distributed.batch_bounds(batch, rank, world)
    records, active = [], []

    for step, (inputs, labels) in enumerate(steps):
        parts = []
        for bounds in checks.cut_rows(batch, 1, world, accumulate):
            lo, hi = (first + v for v in bounds[rank])
            parts.append(MicroBatch(inputs[lo:hi], labels[lo:hi], [b - a for a, b in bounds]))

        def head(x, columns, scale, negatives):
            return HEADS[backend](x, columns, scale, negatives, block=(3, 16)[step % 2], store_mb=(0, 0.0003, 16)[step % 3])

        encoder_learner.zero_grad()
        stats = forward_backward(parts, model, shard, head, build_margin(scale=SCALE, **MARGINS[margin]), step, observe=True)
        grad = torch.zeros_like(shard.weight)
        index = shard.index if source == "sampled" else torch.arange(len(grad))
        grad[index] = shard.gradient()
        active.append((index + shard.first).tolist())
        records.append((stats["loss"].item(), stats["injected"].item(), encoder.weight.grad.numpy().copy(), grad.numpy()))
        encoder_learner.step()
        learner.step()
    return records, *(t.detach().numpy() for t in (shard.weight, shard.bank.features, shard.bank.seen)), active


def compare(case: str, results: list, expected: list) -> None:
    *steps, (weight, last) = expected
    for k, (loss, d_encoder, d_weight) in enumerate(steps):
        for records, *_ in results:
            assert records[k][0] == pytest.approx(loss, rel=1e-9), (case, k)
            close(records[k][2], d_encoder, 1e-9)
        close(np.concatenate([records[k][3] for records, *_ in results]), d_weight, 1e-9)
    close(np.concatenate([r[1] for r in results]), weight, 1e-9)
    features, seen = np.concatenate([r[2] for r in results]), np.concatenate([r[3] for r in results])
    assert seen.tolist() == [last[j][1] if j in last else -1 for j in range(len(weight))]
    for j, (feature, _) in last.items():
        assert np.abs(features[j] - feature.numpy()).max() < 1e-9, (case, j)


@pytest.mark.parametrize("world", [1, 2, 3, 4])
def test_steps_equal_the_slow_formula(world):
    """Loss, gradients, prototypes and features over five steps, in which features come to count and cease to."""
    ranks = run_ranks(world, lambda: [fast_steps(case) for case in CASES])
    for k, (case, (identities, batch, margin, *_)) in enumerate(CASES.items()):
        results = [r[k] for r in ranks]
        compare(case, results, list(slow_steps(identities, batch, margin)))
        assert all(records[1][1] == 0 < records[-1][1] <= 1 for records, *_ in results)
    assert any(r[k][0][-1][1] < 1 for r in ranks for k in range(len(CASES)))


def test_sampled_rows_equal_the_slow_formula_on_the_rows_that_were_drawn():
    (result,) = run_ranks(1, lambda: fast_steps("sampled_all", rate=0.6))
    identities, batch, margin, *_ = CASES["sampled_all"]
    assert len({tuple(a) for a in result[-1]}) > 1 and len(result[-1][0]) < identities
    compare("sampled", [result], list(slow_steps(identities, batch, margin, result[-1])))


def test_an_averaged_encoder_makes_the_features():
    shard, x = ClassifierShard(5, 4, injection=VPL), torch.randn(3, 4)
    part = MicroBatch(x.clone().requires_grad_(), torch.tensor([2, 0, 2]), [3])
    extras = Extras(key_encoder=lambda images: 2 * images.flip(1))
    forward_backward([part], torch.nn.Identity(), shard, HEADS["blocked"], build_margin("cosface"), 0, extras=extras)
    assert torch.allclose(shard.bank.features[[0, 2]], F.normalize(x.flip(1)[1:]))


def test_what_is_counted_is_the_share_of_all_rows():

    def work():
        shard = ClassifierShard(10, 4, injection=dict(weight=0.1, steps=1, start=1))
        for step, labels in enumerate(([0, 1, 9], [9, 9, 9], [5, 5, 5])):
            part = MicroBatch(torch.randn(3, 4), torch.tensor(labels), [3] + [0] * (distributed.world_size() - 1))
            if distributed.rank():
                part = MicroBatch(torch.randn(0, 4), torch.empty(0, dtype=torch.long), part.sizes)
            part.images.requires_grad_()
            margin = build_margin("cosface")
            stats = forward_backward([part], torch.nn.Identity(), shard, HEADS["blocked"], margin, step, observe=True)
            yield stats["injected"].item()

    for world in (1, 3):
        assert all(r == pytest.approx([0, 0.3, 0.1]) for r in run_ranks(world, lambda: list(work())))


# --- configuration -------------------------------------------------------------------------------------------------


def loaded(*more):
    return config.load([], ["output=x", "data.train=x", *more])


@pytest.mark.parametrize(
    "more, expected",
    [
        (("train.batch_size=64",), 200),
        (("prototypes.injection.steps=31",), 31),
        (("prototypes.injection.passes=0.5", "data.sampler.name=balanced", "train.batch_size=40"), 500),  # half of 10,000 / 10
        (("prototypes.injection.coverage=0.5", "data.sampler.name=balanced", "train.batch_size=40"), 693),  # about ln 2 of 1000
        (("prototypes.injection.passes=1", "train.batch_size=10000"), 2),  # 6321 different ones of 10,000 draws
        (("prototypes.injection.coverage=0.9", "data.sampler.name=balanced", "train.batch_size=40000"), 1),
    ],
)
def test_steps_that_a_feature_counts(more, expected):
    c = loaded("prototypes.injection.weight=0.15", "prototypes.injection.start=7", *more)
    assert build.injection_from(c, 10_000, 100_000) == {"weight": 0.15, "steps": expected, "start": 7}


def test_an_injection_that_would_never_act_is_refused():
    c = loaded("prototypes.injection.weight=0.15")
    with pytest.raises(UserError, match="prototypes.injection.start=8000: the run ends after 8000 steps"):
        build.injection_from(c, 100, 8000)
    assert build.injection_from(c, 100, 8001) and build.injection_from(loaded(), 100, 1) is None


@pytest.mark.parametrize("name", ["vpl_arcface", "vpl_cosface"])
def test_recipes(name):
    i = config.load([f"configs/methods/{name}.yaml"], ["output=x", "data.train=x"]).prototypes.injection
    assert (i.weight, i.steps, i.start) == (0.15, 200, 8000)


# --- training and checkpoints --------------------------------------------------------------------------------------

INJECTED = ("prototypes.injection.weight=0.3", "prototypes.injection.steps=3", "prototypes.injection.start=4")
SHORT = (*INJECTED, "schedule.steps=12", "schedule.warmup_steps=2", "checkpoint.every=4", "checkpoint.keep=9")
MEMORY = (
    *("prototypes.source=memory", "prototypes.memory.size=13", "prototypes.memory.gradient=sgd", "margin.m=0.2"),
    *("data.sampler.name=mixed", "optimizer.lr=0.002", "prototypes.memory.check_every=1"),
)
SOURCES = {
    "classifier": ("prototypes.injection.key_encoder=0.9",),
    "sampled": ("prototypes.source=sampled", "prototypes.rate=0.5"),
    "memory": MEMORY,
}


def cut(folder, step):
    """As if the run had been killed soon after this step."""
    for path in state.checkpoints(folder / "checkpoints"):
        if state.read_info(path)["step"] > step:
            subprocess.run(["rm", "-r", path], check=True)


@pytest.mark.parametrize("source", SOURCES)
def test_resumed_equals_the_uninterrupted_run(source, small_set, tmp_path):
    """At the same world size bit for bit; a classifier's 4 ranks go on as 2 and then as 3."""
    more, world = (*SHORT, *SOURCES[source]), 4 if source == "classifier" else 2
    whole = run(world, small_set, tmp_path, *more)
    cut(tmp_path, 4)
    assert run(world, small_set, tmp_path, *more) == whole
    if source == "classifier":
        for world, step in ((2, 4), (3, 8)):
            cut(tmp_path, step)
            assert_close(run(world, small_set, tmp_path, *more), whole, 1e-4)
    values = [json.loads(line).get("injected") for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    values = [v for v in values if v is not None]
    assert values[:4] == [0] * 4 and 0 < min(values[4:]) <= max(values) <= 1


def held(memory: PrototypeMemory) -> dict:
    """label -> (feature, seen) of this rank's slots."""
    out = {}
    for row in range(memory.local):
        slot = row * memory.world + memory.rank
        if slot < memory.size and (label := int(memory.slots.label[slot])) >= 0:
            out[label] = (memory.bank.features[row].tolist(), int(memory.bank.seen[row]))
    return out


def test_features_of_a_memory_move_with_their_slots(tmp_path):
    """4 ranks of 13 slots, 2 of 13, 3 of 21, 2 of 7: identities keep their features, those that fall out lose them."""
    sizes, path = ((4, 13), (2, 13), (3, 21), (2, 7)), None
    labels = [torch.tensor(v).repeat_interleave(2) for v in ([0, 1, 2, 3, 4], [5, 6, 2, 7, 8], [9, 10, 11, 2, 30], [31, 7, 32])]

    def work(size, source, target):
        memory = PrototypeMemory(40, 5, size=size, injection=dict(weight=0.2, steps=2, start=0))
        modules = {"encoder": torch.nn.Identity(), "prototypes": memory}
        if source is None:
            for step, batch in enumerate(labels):
                x = torch.randn(len(batch), 5, generator=torch.Generator().manual_seed(step))
                memory.begin_step(batch, step)
                memory.columns(batch, x)
                memory.after_step(batch, F.normalize(x))
        else:
            state.load(source, modules, {})
        found = state.save(target, 1, state.named_state(modules, {}), memory.total_rows, {}, keep=1)
        empty = [memory.bank.seen[r].item() for r in range(memory.local) if memory.rank + r * memory.world >= memory.size]
        assert empty == [-1] * len(empty)
        return held(memory), str(found)

    contents = []
    for k, (world, size) in enumerate(sizes):
        results = run_ranks(world, work, size, path, tmp_path / str(k))
        path = results[0][1]
        contents.append({label: value for part, _ in results for label, value in part.items()})
    assert len(contents[0]) == 13 and {contents[0][c][1] for c in (2, 7, 9)} == {2, 3}
    assert contents[0] == contents[1] == contents[2]
    assert len(contents[3]) == 7 and all(contents[0][c] == v for c, v in contents[3].items())
