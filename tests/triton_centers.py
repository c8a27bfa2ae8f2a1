"""Sub-centres in the triton head by Triton's interpreter, against the dense head in float64 and the slow formula of
tests/test_sub_centers.py. Run by tests/test_triton.py in a process of its own, as tests/triton_interpreted.py is."""

import os

assert os.environ.get("TRITON_INTERPRET") == "1"

import pytest
import torch
import torch.nn.functional as F

from protomem.head import triton_head, tuning
from protomem.head.triton_head import Tiles
from tests import test_sub_centers as slow
from tests.ranks import run_ranks
from tests.triton_interpreted import ARCFACE, FILTERED, STORES, USUAL, compare, compute, joined, problem

CASES = {
    "two": dict(centers=2, nearest=True, calls=2, **FILTERED),
    "three": dict(centers=3),
    "four": dict(centers=4, classes=33, size=96, nearest=True, **ARCFACE),
    "one sample": dict(centers=3, batch=1, classes=20, size=96, nearest=True),
    "one identity": dict(centers=2, batch=4, classes=1, nearest=True),  # at two and three ranks shards are empty
    "one identity each": dict(centers=4, batch=17, classes=2, size=96, nearest=True),
    "threshold": dict(centers=3, threshold=2.0, nearest=True, **FILTERED),
    "large scale": dict(centers=2, scale=200.0, opposite=True),
    "unit": dict(centers=3, unit=True, calls=2),
    "handed over": dict(centers=3, updated="torch", **FILTERED),
    "updated": dict(centers=2, updated="kernel"),
    "x is constant": dict(centers=2, frozen=True, threshold=-3.0),
    "rows are constant": dict(centers=3, sink=False, nearest=True),
}


def cases():
    return {name: {**USUAL, **case} for name, case in CASES.items()}


def two_tiles(case: dict) -> int:
    """Rows of a chunk."""
    return 2 * triton_head.INTERPRETED.n * case["centers"]


@pytest.mark.parametrize("name", list(CASES))
def test_one_process(name):
    case, turn = cases()[name], list(CASES).index(name)
    p = problem(**case)
    expected = compute("dense", case, p, torch.float64)
    for store in STORES if name == "three" else STORES[turn % 3 :][:1]:
        found = compute("triton", case, p, torch.float32, block=two_tiles(case), store_mb=store)
        compare(found, expected, 1e-5, f"{name}, store_mb={store}")


@pytest.mark.parametrize("world", [2, 3])
def test_several_ranks(world):
    tried = {name: cases()[name] for name in list(CASES)[world % 2 :: 2]}
    problems = {name: problem(**case) for name, case in tried.items()}

    def work():
        found = {}
        for k, (name, case) in enumerate(tried.items()):
            options = dict(block=two_tiles(case), store_mb=STORES[(k + world) % 3])
            found[name] = compute("triton", case, problems[name], torch.float32, **options)
        return {name: {key: t.numpy() for key, t in found[name].items()} for name in found}

    results = run_ranks(world, work, timeout=150)
    for name, case in tried.items():
        found = joined([{key: torch.as_tensor(t) for key, t in r[name].items()} for r in results], case)
        compare(found, compute("dense", case, problems[name], torch.float64), 1e-5, name)


@pytest.mark.parametrize("world", [1, 3])
def test_whole_steps_equal_the_slow_formula(world):
    steps = [("uneven", "arcface"), ("empty shard", "filtered"), ("one identity", "softmax"), ("uneven batch", "sphere")]

    def work():
        return [slow.train_once("triton", name, slow.MARGINS[margin], torch.float32, store_mb=0) for name, margin in steps]

    results = run_ranks(world, work)
    for k, (name, margin) in enumerate(steps):
        loss, encoder_grad, row_grad = slow.expected(name, margin)
        for rank in range(world):
            assert results[rank][k][0] == pytest.approx(loss, rel=1e-4, abs=1e-7), name
            slow.close(results[rank][k][1], encoder_grad, 1e-4)
        slow.close(torch.cat([torch.as_tensor(r[k][2]) for r in results]), row_grad, 1e-4)


@pytest.mark.parametrize("world", [1, 3])
def test_the_fused_update_is_that_of_whole_gradients(world):
    """The parameter [C, 3 * D] and its moments, stepped in the kernels or by torch, in fp32; as exact as the gradients."""
    optimizers = [name for name in slow.OPTIMIZERS if "adamw" not in name or world == 1]

    def work():
        ways = (True, "triton", torch.float32), (False, "blocked", torch.float64)
        return [[slow.trained(o, *way) for way in ways] for o in optimizers]

    for results in run_ranks(world, work):
        for name, (found, expected) in zip(optimizers, results):
            assert abs(found - expected).max() <= 1e-4 * abs(expected).max(), name


@pytest.mark.parametrize("more, store_mb", [({}, 0), ({}, 16), (dict(threshold=10.0), 0)])
def test_bf16_costs_one_percent_of_the_gradient(more, store_mb, monkeypatch):
    monkeypatch.setattr(triton_head, "INTERPRETED", Tiles(64, 64, 256, 64, 1, 1))
    case = {**USUAL, **dict(batch=64, classes=200, size=512, scale=64.0, centers=3), **more}
    p = problem(**case)
    expected = compute("dense", case, p, torch.float64)
    found = compute("triton", case, p, torch.float32, precision="bf16", store_mb=store_mb, block=2 * 64 * 3)
    for key in ("dx", "rows"):
        error = (found[key] - expected[key]).norm() / expected[key].norm()
        print(f"{more} store_mb={store_mb} {key}: {100 * error:.2f} %")
        assert 1e-4 < error < 0.012, (key, error)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_of_equal_prototypes_the_first_has_the_gradient(precision):
    g = torch.Generator().manual_seed(0)
    x = F.normalize(torch.randn(5, 24, generator=g))
    once = torch.randn(40, 24, generator=g)
    twice = torch.stack([once.roll(1, 0), once, once], 1).flatten(0, 1)  # one of its own, or two that are equal
    target = torch.tensor([0, 1, 39, 5, -1])
    seen = slow.gradients("triton", x, twice, target, 3, precision=precision, block=96)
    first = slow.gradients("triton", x, twice.view(40, 3, 24)[:, :2].reshape(80, 24), target, 2, precision=precision, block=64)
    rows = seen[3].view(40, 3, 24)
    assert not rows[:, 2].any() and rows[:, 1].any() and rows[:, 0].any()
    for a, b in zip((*seen[:3], rows[:, :2].reshape(80, 24)), first):
        torch.testing.assert_close(a, b)


def test_every_shape_of_the_tuner_s_tiles():
    """In the interpreter's size, see tests/triton_interpreted.py."""
    case = {**USUAL, **dict(centers=2, batch=10, classes=40, nearest=True)}
    p = problem(**case)
    expected = compute("dense", case, p, torch.float64)
    every = [tiles for tried in tuning.TRIED_CENTERS.values() for tiles in tried]
    for tiles in {Tiles(*(16 * size // t.k for size in (t.m, t.n, t.d)), 16, 1, 1) for t in every}:
        compare(compute("triton", case, p, torch.float32, block=64, store_mb=0.004, tiles=tiles), expected, 1e-5, str(tiles))


def test_the_tuner_calls_the_head_as_a_step_does(monkeypatch):
    tried = [Tiles(16, n, 16, 16, 1, 1) for n in (16, 32)]
    monkeypatch.setitem(tuning.TRIED_CENTERS, "fp32", tried)
    work = tuning.work(8, 3 * 75, 21, "fp32", store_mb=0.005, learns=True, centers=3, block=100)
    found = tuning.times(work, torch.device("cpu"), lambda act: act() or 1.0)
    assert found == [((tiles, 3 * n), 1.0, "") for tiles, n in zip(tried, (48, 64))], found


def test_no_gradient_mode():
    case = cases()["three"]
    p = problem(**case)
    with torch.no_grad():
        found = compute("triton", case, p, torch.float32, block=two_tiles(case))
    expected = compute("dense", case, p, torch.float64)
    found, expected = ({k: r[k] for k in ("loss", "cos_y", "out")} for r in (found, expected))
    compare(found, expected, 1e-5, "no_grad")


def test_a_row_that_is_not_a_number_is_not_passed_over():
    for row in range(3):
        rows = torch.ones(20 * 3, 8)
        rows[7 * 3 + row] = float("nan")
        assert slow.gradients("triton", F.normalize(torch.randn(2, 8)), rows, torch.tensor([0, 1]), 3)[1].isnan().all()
