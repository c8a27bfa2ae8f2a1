"""A sharded prototype memory equals its slow reference: loss, gradients, labels, ages and rows, step by step, 1-4 ranks."""

import functools
import os
import sys
import time

import numpy as np
import pytest
import torch

from protomem.prototypes.slots import FILLER
from tests.memory_cases import USUAL, covering_array, product_cases, run_memory, run_reference, tuple_cases
from tests.ranks import run_ranks
from tests.thread_ranks import run_threads

STEPS = {1: 12, 2: 8, 3: 6, 4: 6}  # by world size: several ranks on few cores mostly wait for each other
LONG = 200
TOLERANCE = 1e-9
LONG_CASES = [
    {**USUAL, "estimator": "norm", "gradient": "batch", "momentum": 0.5, "size": 17, "margin": "arcface"},
    {**USUAL, "estimator": "given", "usage": "power", "gradient": "sgd", "policy": "lru", "backend": "dense"},
]


def name_of(case: dict) -> str:
    return "-".join(str(v) for v in case.values())


@functools.cache
def _expected(key: tuple, steps: int, fillers: bytes):
    case = dict(key)
    torch.set_default_dtype(torch.float64)
    try:
        rows = np.frombuffer(fillers, dtype=np.float64).reshape(-1, 6).copy() if fillers else []
        return run_reference(case, steps, [torch.as_tensor(r) for r in rows])
    finally:
        torch.set_default_dtype(torch.float32)


def difference(case: dict, ranks: list[list[dict]], steps: int) -> str | None:
    """What first differs between the ranks' records and the reference, or None."""
    world = len(ranks)

    def by_slot(step):
        return {s: ranks[s % world][step]["rows"][s // world] for s in range(case["size"])}

    fillers = np.stack(list(by_slot(0).values())).astype(np.float64) if case["fill"] == "random" else np.zeros(0)
    # The longest run serves all world sizes: batches of a shorter one are its beginning.
    expected = _expected(tuple(case.items()), max(steps, max(STEPS.values())), fillers.tobytes())
    tolerance = TOLERANCE
    for step, want in enumerate(expected[:steps]):
        # ArcFace divides by the sine. sin^2 = 1 - cos^2 has an error of some 1e-16, in either formula: of a sine of 1e-5 six
        # digits are left. Rows that learn (sgd) keep what came of it.
        # So does a sum of all but one image, which is the sum of all less that one, where that one has nearly all of the weight.
        now = max(TOLERANCE, 1e-15 / want["square"], 1e-15 / want["left_over"])
        tolerance = max(tolerance, now) if case["gradient"] == "sgd" else now
        got = [records[step + 1] for records in ranks]
        labels = [FILLER if s in want["fillers"] else -1 if c is None else c for s, c in enumerate(want["slots"])]
        for r, one in enumerate(got):
            where = f"step {step}, rank {r}"
            if one["label"] != labels:
                return f"{where}: labels {one['label']}, expected {labels}"
            if one["written"] != want["written"]:
                return f"{where}: steps of the last write {one['written']}, expected {want['written']}"
            filled = [s for s, c in enumerate(want["slots"]) if c is not None]
            if sorted(filled, key=lambda s: one["seq"][s]) != want["order"]:
                return f"{where}: order of the slots"
            if [s for s, f in enumerate(one["filled"]) if f] != sorted(want["rows"]):
                return f"{where}: slots that take part {one['filled']}, expected {sorted(want['rows'])}"
            if not abs(one["loss"] - want["loss"]) <= tolerance * max(1, abs(want["loss"])):
                return f"{where}: loss {one['loss']}, expected {want['loss']}"
        rows = by_slot(step + 1)
        for s, row in want["rows"].items():
            if not np.abs(rows[s] - row).max() <= tolerance:
                return f"step {step}: row of slot {s} is {rows[s]}, expected {row}"
        grad = np.concatenate([one["grad"] for one in got])
        if not np.abs(grad - want["grad"]).max() <= tolerance * max(0.1, np.abs(want["grad"]).max()):
            return f"step {step}: gradient differs by {np.abs(grad - want['grad']).max()} of {np.abs(want['grad']).max()}"
    return None


def compare(cases: list[dict], world: int, steps: int, run=functools.partial(run_ranks, timeout=300)) -> list[str]:
    """Run all cases in one set of ranks; what differs, one line per case that does."""
    ranks = run(world, lambda: [run_memory(case, steps) for case in cases])
    found = [difference(case, [records[k] for records in ranks], steps) for k, case in enumerate(cases)]
    return [f"{name_of(case)}: {text}" for case, text in zip(cases, found) if text]


@pytest.mark.parametrize("world", [1, 2, 3, 4])
def test_every_pair_of_options(world):
    """A covering array: every pair of values of two options occurs in some configuration."""
    wrong = compare(covering_array(), world, STEPS[world])
    assert not wrong, "\n".join([f"{len(wrong)} configurations differ", *wrong])


@pytest.mark.parametrize("world", [1, 2, 3, 4])
def test_many_steps(world):
    """200 steps: the memory is overwritten about a hundred times."""
    wrong = compare(LONG_CASES[world % 2 :][:1], world, LONG)
    assert not wrong, "\n".join(wrong)


BUILDERS = {
    "split_topk": dict(estimator="norm", usage="topk", self_exclusion="split"),
    "split_best": dict(estimator="external", usage="threshold_best", self_exclusion="split"),
    "split_skip": dict(estimator="norm", usage="quantile_skip", self_exclusion="split"),
    "loo_skip": dict(estimator="norm", usage="quantile_skip", self_exclusion="loo"),
    "batch_skip": dict(estimator="norm", usage="quantile_skip", gradient="batch"),
    "batch_skip_dense": dict(estimator="norm", usage="quantile_skip", gradient="batch", backend="dense"),
}


@pytest.mark.parametrize("name", list(BUILDERS))
def test_usages_where_few_images_build(name):
    """A usage chooses among the images that build (split). Without a new prototype (skip) the stored row is the positive, as
    it is, whatever the self-exclusion, gradient and head."""
    wrong = compare([{**USUAL, **BUILDERS[name]}], 1, 16)
    assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize("world", [2, 3])
def test_ranks_that_are_threads(world):
    """What the long comparisons below run on finds the same."""
    try:
        wrong = compare([covering_array()[world]], world, STEPS[world], run_threads)
        assert not wrong, "\n".join(wrong)
    finally:
        torch.set_default_dtype(torch.float32)


def compare_all(cases: list[dict], worlds: tuple[int, ...], steps: int, run, chunk: int = 12) -> None:
    """All cases at all world sizes; prints progress and a summary, and exits with 1 if any differs."""
    failures, begin = [], time.monotonic()
    for start in range(0, len(cases), chunk):
        part = cases[start : start + chunk]
        for world in worlds:
            found = [f"{world} ranks, {text}" for text in compare(part, world, steps, run)]
            failures += found
            print("".join(f"{text}\n" for text in found), end="")
        done = start + len(part)
        each = (time.monotonic() - begin) / done
        print(f"{done}/{len(cases)}  {each:.2f} s each  {len(failures)} differ", flush=True)
        _expected.cache_clear()
    print("\n".join([f"{len(failures)} of {len(cases) * len(worlds)} runs of {steps} steps differ", *failures]))
    sys.exit(bool(failures))


# By hand, since it takes hours:  python -m tests.test_memory pairs|tuples|product STEPS [gloo|threads] [WORLD ...]
#   pairs: the covering array; tuples: policy x momentum x estimator x usage x gradient; product: that x self-exclusion
if __name__ == "__main__":
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    torch.set_num_threads(1)
    name, steps, *more = sys.argv[1:]
    chosen = {"pairs": covering_array, "tuples": tuple_cases, "product": product_cases}[name]()
    run = run_threads if "threads" in more else functools.partial(run_ranks, timeout=1200)
    compare_all(chosen, tuple(int(w) for w in more if w.isdigit()) or (1, 2, 3, 4), int(steps), run)
