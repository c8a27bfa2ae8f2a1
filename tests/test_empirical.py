"""Empirical prototypes (EPL) against slow loops: loss, all gradients and the rows, over steps with several images of an
identity, at 1 to 4 ranks; and through the trainer."""

import math
import shutil

import pytest
import torch
import torch.nn.functional as F

from protomem import config, state
from protomem.errors import UserError
from protomem.head import HEADS
from protomem.metadata import Reader
from protomem.objective.criterion import Criterion
from protomem.objective.margins import build_margin
from protomem.prototypes.classifier import ClassifierShard
from protomem.prototypes.empirical import EmpiricalPrototypes
from protomem.step import losses
from tests.empirical_reference import USUAL, compare, run_fast
from tests.ranks import run_ranks
from tests.test_no_sync import no_waiting
from tests.test_training import assert_close, run

COSFACE, ARCFACE = dict(name="cosface"), dict(name="arcface")
CASES = {
    "published": {**USUAL, "empirical": dict()},
    "dense": {**USUAL, "empirical": dict(), "backend": "dense", "classes": 5},
    "arcface_stacked": {
        **USUAL,
        "margin": dict(name="arcface", gradient="straight_through", beyond_pi="raw"),
        "empirical": dict(stacked=True),
    },
    "unified_stacked": {**USUAL, "empirical": dict(stacked=True), "unified": dict(negatives=0.5, bias=2.0)},
    "paper": {**USUAL, "empirical": dict(update="after", coefficient="sigmoid")},
    "paper_dense": {**USUAL, "empirical": dict(update="after"), "backend": "dense"},
    "before_sigmoid": {**USUAL, "margin": ARCFACE, "empirical": dict(coefficient="sigmoid", k=1.2), "classes": 3},
    "after_stacked": {**USUAL, "margin": ARCFACE, "empirical": dict(update="after", stacked=True, k=0.3), "classes": 5},
    "after_accumulated": {**USUAL, "empirical": dict(update="after"), "accumulate": 3},
    "after_unified": {**USUAL, "margin": ARCFACE, "empirical": dict(update="after", start=1), "unified": dict(), "accumulate": 2},
    "softmax": {**USUAL, "margin": dict(name="softmax"), "empirical": dict(start=2)},
    "later": {**USUAL, "empirical": dict(update="after", start=3, stacked=True)},
    "never": {**USUAL, "empirical": dict(start=99)},
    "filtered": {**USUAL, "margin": dict(name="cosface", filter_above=0.1), "empirical": dict(update="after")},
    "sampled": {**USUAL, "empirical": dict(), "rate": 0.5, "classes": 23},
    "sampled_after": {**USUAL, "empirical": dict(update="after", stacked=True), "rate": 0.3, "classes": 23},
    "sampled_unified": {**USUAL, "empirical": dict(), "unified": dict(), "rate": 0.6, "classes": 23},
}


@pytest.mark.parametrize("world", [1, 2, 3, 4])
def test_steps_equal_the_slow_formula(world):
    """Five steps of every case, float64: relative error <= 1e-9 on loss, gradients and rows."""
    assert compare(CASES, run_ranks(world, lambda: [run_fast(case) for case in CASES.values()])) == {}


def whole(update="before", identities=6, size=4, **options) -> ClassifierShard:
    shard = ClassifierShard(identities, size, std=1.0)
    shard.empirical = EmpiricalPrototypes(identities, size, update=update, **options)
    return shard


def test_the_first_feature_becomes_the_row_and_the_last_of_several_stays():
    rows = EmpiricalPrototypes(6, 4)
    x = F.normalize(torch.randn(4, 4, generator=torch.Generator().manual_seed(1)), dim=1)
    rows.see(torch.tensor([2, 5, 2, 2]), x, before=False)
    assert rows.rows.abs().sum() == 0  # that is not its time
    rows.see(torch.tensor([2, 5, 2, 2]), x, before=True)
    assert torch.allclose(rows.rows[[2, 5]], x[[3, 1]], atol=1e-7) and rows.seen.tolist() == [0, 0, 1, 0, 0, 1]
    assert rows.rows[[0, 1, 3, 4]].abs().sum() == 0


@pytest.mark.parametrize("cos, after", [(0.5, 0.945), (0.0, 1.0), (-0.5, 0.98)])
def test_an_image_leaks_into_the_row_that_it_is_compared_with(cos, after):
    """What the docstring says about update=before: the cosine that the margin sees hardly depends on the true one."""
    rows = EmpiricalPrototypes(1, 2)
    label, x = torch.tensor([0]), torch.tensor([[cos, math.sqrt(1 - cos * cos)]])
    rows.see(label, torch.tensor([[1.0, 0.0]]), before=True)
    rows.see(label, x, before=True)
    assert (x @ rows.rows[0]).item() == pytest.approx(after, abs=0.006)


def test_features_that_are_not_finite_are_passed_over():
    rows = EmpiricalPrototypes(3, 2)
    x = torch.tensor([[1.0, 0.0], [float("nan"), 0.0], [float("inf"), 0.0]])
    rows.see(torch.tensor([0, 0, 1]), x, before=True)
    assert rows.rows.tolist() == [[1, 0], [0, 0], [0, 0]] and rows.seen.tolist() == [1, 0, 0]


def test_the_second_term_is_finite_where_unshifted_exponentials_are_not():
    """Own cosine -0.9, a negative at 0.9, s = 64, float32: e^z e^-z_y is inf; the cross-entropy is 64 (0.9 + 0.9 + m)."""
    x = torch.tensor([[1.0, 0.0]]).requires_grad_()
    sine = math.sqrt(1 - 0.81)
    rows = torch.tensor([[-0.9, sine], [0.9, -sine]])
    margin = build_margin("cosface", m=0.4)
    shard = whole(identities=2, size=2, update="after")
    shard.weight.data.copy_(rows)
    shard.empirical.rows.copy_(rows)
    shard.empirical.seen.fill_(1)
    label = torch.tensor([0])
    for head in (HEADS["dense"], HEADS["blocked"]):
        shard.begin_step(label, 0)
        found = losses((x,), label, [1], shard, head, margin)
        first, second = 64 * 2.2, 64 * (0.9 + 0.3 * 0.9)
        assert found.per_sample.item() == pytest.approx((first + second) / 2, rel=1e-6)
        x.grad = None
        found.per_sample.sum().backward()
        assert x.grad.isfinite().all() and x.grad.abs().sum() > 0
    assert torch.tensor(first).exp().isinf() and first == pytest.approx(140.8)


def test_rows_without_a_feature_are_no_negatives():
    shard = whole(update="after")
    x, label = F.normalize(torch.randn(1, 4), dim=1), torch.tensor([3])
    shard.begin_step(label, 0)
    columns = shard.empirical.columns(shard.columns(label))
    loss, cos = Criterion()(x, x.norm(dim=1), columns, HEADS["blocked"], build_margin("softmax"))
    assert cos.item() == 0 and loss.item() == 0  # nobody else is known


@pytest.mark.parametrize("update", ["before", "after"])
def test_nothing_waits(update):
    shard, x = whole(update=update), torch.randn(5, 4, requires_grad=True)
    labels, margin = torch.tensor([0, 1, 1, 5, 0]), build_margin("cosface")
    for step in range(2):
        with no_waiting():
            shard.begin_step(labels, step)
            found = losses((x,), labels, [5], shard, HEADS["blocked"], margin)
            found.per_sample.sum().backward()
            shard.after_step(labels, found.unit)


@pytest.mark.parametrize(
    "given, message",
    [
        (["prototypes.source=memory", "data.sampler.name=mixed"], "the memory's prototypes are empirical ones already"),
        (["train.accumulate=2"], "the whole batch updates them before its loss"),
        (["prototypes.empirical.k=2"], "would count less than -1 times"),
        (["prototypes.empirical.stacked=true", "margin.name=softmax"], "has no margin"),
        (
            ["prototypes.empirical.update=after", "prototypes.injection.weight=0.15", "prototypes.injection.key_encoder=0.999"],
            "are for injection alone",
        ),
        (["prototypes.empirical.enabled=false", "prototypes.empirical.k=0.5"], "no effect with prototypes.empirical.enabled"),
    ],
)
def test_what_makes_no_sense_is_refused(given, message):
    with pytest.raises(UserError, match=message) as error:
        config.load([], ["output=x", "data.train=y", "prototypes.empirical.enabled=true", *given])
    assert "\n" not in str(error.value)


def saved(path, *names) -> dict[str, torch.Tensor]:
    """Tensors of a checkpoint."""
    metadata = Reader(path).read_metadata().state_dict_metadata
    out = {name: torch.zeros(metadata[name].size, dtype=metadata[name].properties.dtype) for name in names}
    state._load(out, path, *state._read(path, True), True)
    return out


def test_rows_and_threshold_survive_other_world_sizes(small_set, tmp_path):
    """EPL with UniFace's criterion: 1 rank resumes bit for bit; 4 ranks, then 2, then 3 follow the curve of one."""
    more = (
        "prototypes.empirical.enabled=true",
        "prototypes.empirical.stacked=true",
        "prototypes.empirical.start_epoch=1",  # step 10
        "margin.criterion=unified",
        "optimizer.head.lr=0.05",
        "schedule.steps=24",
        "checkpoint.every=8",
        "checkpoint.keep=9",
        "data.augment.photometric=0",
    )
    names = ("criterion.bias", "optimizer.criterion.bias.momentum_buffer", "prototypes.empirical.rows", "prototypes.empirical.seen")
    alone, moved = tmp_path / "alone", tmp_path / "moved"

    def cut(folder, step):
        for path in state.checkpoints(folder / "checkpoints"):
            if state.read_info(path)["step"] > step:
                shutil.rmtree(path)

    reference = run(1, small_set, alone, *more)
    final = saved(state.newest(alone / "checkpoints"), *names)
    cut(alone, 8)
    assert run(1, small_set, alone, *more) == reference
    assert reference[24] < 0.9 * reference[11]
    for world, step in ((4, 8), (2, 16), (3, 24)):
        curve = run(world, small_set, moved, *more)
        assert_close(curve, reference, 1e-4)
        cut(moved, step)
    found = saved(state.newest(moved / "checkpoints"), *names)
    assert abs(final["criterion.bias"].item() - math.log(310)) > 0.01 and final["prototypes.empirical.seen"].all()
    for name in names:
        assert torch.allclose(found[name].double(), final[name].double(), atol=1e-4, rtol=1e-3), name
    assert torch.allclose(found["prototypes.empirical.rows"].norm(dim=1), torch.ones(31))
