"""Samplers for a prototype memory: what comes back and how often, at any time and timing; checked without their mirror."""

import threading
import time
from collections import Counter
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from protomem import config
from protomem.data.look_alikes import LookAlikes
from protomem.data.memory_samplers import HISTORY, PICKS, GroupSampler, MixedSampler
from protomem.data.sampler import BalancedSampler, ShuffledSampler, permute
from protomem.distributed import batch_bounds
from protomem.errors import UserError
from protomem.prototypes.slots import Slots
from protomem.seeds import hash64
from protomem.trainer import Run

LAG = 7


def data(identities=2000, images=3):
    """Labels with gaps (two of three numbers are used) and out of order."""
    names = np.arange(identities) * 3 // 2
    return np.random.default_rng(0).permutation(np.repeat(names, images))


def mixed(labels, p=16, k=2, m=256, *, policy="ring", cls=MixedSampler, **options):
    if options.get("pick") == "look_alike":
        options.setdefault("lag", LAG)
    return cls(labels, p, k, options.pop("seed", 5), slots=Slots(m, int(labels.max()) + 1, policy), **options)


class Replay:
    """A memory's slots of our own, fed with the labels of whole batches; keeps what there is to know about each step."""

    def __init__(self, labels, p, m, policy="ring"):
        self.labels, self.p, self.slots = labels, p, Slots(m, int(labels.max()) + 1, policy)
        self.found, self.refreshed, self.since, self.residence = [], Counter(), {}, []

    def step(self, positions):
        labels = self.labels[positions]
        before = set(self.slots.label[:-1][self.slots.occupied()].tolist())
        plan = self.slots.plan(torch.from_numpy(labels))
        after = set(self.slots.label[:-1][self.slots.occupied()].tolist())
        here = len(self.found)
        again = plan.identity[plan.found].tolist()
        self.found.append(len(again) / self.p)
        self.refreshed.update(again)
        self.since.update(dict.fromkeys(after - before, here))
        self.residence += [here - self.since.pop(label, 0) for label in before - after]

    def state(self):
        return {name: value.clone() for name, value in self.slots.state_dict().items()}


def steps(sampler, count, start=0):
    return [sampler.batch(*divmod(t, sampler.steps_per_epoch)) for t in range(start, start + count)]


def nearest_told(labels, positions, t, size):
    """Answers that depend on the step, a quarter of them unknown, and whose images of an identity disagree."""
    rng = np.random.default_rng(t)
    answers = rng.choice(np.unique(labels), len(positions))
    return labels[positions], np.where(rng.random(len(positions)) < 0.25, -1, answers % size)


def run(sampler, labels, count, start=0, told=None):
    """`count` steps; the trainer, as in life, is one step behind and tells at once."""
    out = []
    for t in range(start, start + count):
        out += steps(sampler, 1, t)
        if sampler.pick == "look_alike":
            pairs = nearest_told(labels, out[-1], t, sampler._slots.num_identities)
            sampler.tell(t, lambda pairs=pairs: pairs)
            if told is not None:
                told[t] = pairs
    return out


# --- what a batch is ---------------------------------------------------------------------------------------------------


@given(
    identities=st.integers(3, 60),
    p=st.integers(1, 20),
    k=st.integers(2, 4),
    slots=st.integers(1, 80),
    refresh=st.floats(0, 0.9),
    pick=st.sampled_from(PICKS),
    policy=st.sampled_from(["ring", "lru"]),
    seed=st.integers(0, 99),
)
@settings(max_examples=40, deadline=None)
def test_batches_are_p_distinct_identities_times_k_neighbours_and_the_mirror_is_right(
    identities, p, k, slots, refresh, pick, policy, seed
):
    labels = data(identities, 4)
    if p > min(identities, slots) or round(refresh * p) == p or (refresh > 0 and round(refresh * p) == 0):
        return
    sampler = mixed(labels, p, k, slots, policy=policy, refresh=refresh, pick=pick, seed=seed, **_lag(pick))
    assert (sampler.batch_size, sampler.together, sampler.steps_per_epoch) == (p * k, k, 4 * identities // (p * k))
    replay = Replay(labels, p, slots, policy)
    for positions in run(sampler, labels, 40):
        assert positions.dtype == np.int64 and positions.shape == (p * k,)
        rows = labels[positions].reshape(p, k)
        assert (rows == rows[:, :1]).all() and len(set(rows[:, 0])) == p
        assert all(len(set(row)) == k for row in positions.reshape(p, k))  # all have 4 images
        replay.step(positions)
    for name in ("label", "seq", "written"):
        assert torch.equal(getattr(replay.slots, name)[:-1], getattr(sampler._slots, name)[:-1])
    assert (replay.slots.cursor, replay.slots.clock) == (sampler._slots.cursor, sampler._slots.clock)
    assert not sampler._slots.overfull


def _lag(pick):
    return {"lag": 3} if pick == "look_alike" else {}


def test_an_identity_with_fewer_images_than_k_repeats_them_evenly():
    labels = np.repeat(np.arange(50), np.arange(50) % 6 + 1)
    for sampler in (mixed(labels, 8, 4, 20), GroupSampler(labels, 8, 4, 0, group_size=20, passes=2)):
        for positions in steps(sampler, 100):
            for row in positions.reshape(8, 4):
                have = labels[row[0]] % 6 + 1
                assert max(Counter(row.tolist()).values()) == -(-4 // have)


@given(p=st.integers(1, 40), k=st.integers(1, 6), world=st.integers(1, 12))
def test_bounds_keep_the_images_of_an_identity_together(p, k, world):
    bounds = [batch_bounds(p * k, r, world, k) for r in range(world)]
    assert bounds[0][0] == 0 and bounds[-1][1] == p * k
    assert all(a[1] == b[0] for a, b in zip(bounds, bounds[1:]))
    sizes = [b - a for a, b in bounds]
    assert all(size % k == 0 for size in sizes) and max(sizes) - min(sizes) in (0, k)
    with pytest.raises(ValueError, match="7 rows are not a multiple of 2"):
        batch_bounds(7, 0, world, 2)


@pytest.mark.parametrize("make", [mixed, lambda x: BalancedSampler(x, 16, 2, 0)])
@pytest.mark.parametrize("world", [3, 5])
def test_ranks_share_no_identity(make, world):
    labels = data()
    sampler = make(labels)
    for positions in steps(sampler, 10):
        ranks = [positions[slice(*batch_bounds(32, r, world, sampler.together))] for r in range(world)]
        sets = [set(labels[rows]) for rows in ranks]
        assert sum(map(len, sets)) == len(set.union(*sets)) == 16


@pytest.mark.parametrize(
    "p, world, accumulate, words",
    [
        (3, 4, 1, "batch_size=12 has only 3 identities of 4 images for 4 ranks; raise it, or start fewer ranks"),
        (3, 2, 5, "batch_size=12 leaves a rank 4 rows, too few for 5 micro-batches; raise it, or lower train.accumulate"),
    ],
)
def test_a_rank_without_rows_is_refused_before_training(p, world, accumulate, words):
    run = Run.__new__(Run)
    run.sampler, run.context = BalancedSampler(np.arange(80) // 8, p, 4, 0), SimpleNamespace(world_size=world)
    run.config = config.load([], ["output=x", "data.train=x", "train.batch_size=12", f"train.accumulate={accumulate}"])
    with pytest.raises(UserError, match=words):
        run._plan()


def test_shuffled_batches_may_be_cut_anywhere():
    assert ShuffledSampler(20, 5, 0).together == 1


# --- what comes back ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("policy", ["ring", "lru"])
@pytest.mark.parametrize("refresh, pick", [(0.25, "random"), (0.5, "random_old"), (0.5, "random"), (0.25, "look_alike")])
def test_the_refreshed_fraction_is_what_was_asked_for(policy, refresh, pick):
    labels = data()
    sampler, replay = mixed(labels, policy=policy, refresh=refresh, pick=pick), Replay(labels, 16, 256, policy)
    for positions in run(sampler, labels, 200):
        replay.step(positions)
    assert replay.found[0] == 0 and set(replay.found[1:]) == {refresh}


def test_without_refresh_almost_nothing_comes_back():
    labels = data()
    for sampler in (mixed(labels, refresh=0.0), BalancedSampler(labels, 16, 2, 5)):
        replay = Replay(labels, 16, 256)
        for positions in steps(sampler, 500):
            replay.step(positions)
        assert np.mean(replay.found) < 0.02


class StrictOldest(MixedSampler):
    """The trap: with `lru`, those refreshed once are refreshed for ever."""

    def _random(self, wanted, taken, t):
        slots = self._occupied[np.argsort(self._seq[self._occupied])][: wanted + len(taken)]
        labels = self._label[slots]
        return labels[~np.isin(labels, taken)][:wanted]


def refreshed_equally(cls, policy, pick="random", refresh=0.25):
    """(chi-square of refreshes per identity over its degrees of freedom, residence of the evicted x n_new / M)."""
    labels, m, p = data(400), 64, 16
    sampler = mixed(labels, p, 2, m, policy=policy, cls=cls, refresh=refresh, pick=pick)
    replay = Replay(labels, p, m, policy)
    for positions in steps(sampler, 1200):
        replay.step(positions)
    counts = np.array([replay.refreshed[label] for label in np.unique(labels)])
    chi = ((counts - counts.mean()) ** 2 / counts.mean()).sum() / (len(counts) - 1)
    return chi, np.mean(replay.residence[300:]) * round((1 - refresh) * p) / m


@pytest.mark.parametrize("policy", ["ring", "lru"])
@pytest.mark.parametrize("pick", ["random", "random_old"])
def test_every_identity_is_refreshed_equally_often_and_stays_equally_long(policy, pick):
    chi, residence = refreshed_equally(MixedSampler, policy, pick)
    assert chi < 1.6 and abs(residence - 1) < 0.05  # 400 identities: 1.6 is 8 standard deviations above a Poisson's 1


def test_the_strict_oldest_would_fail_that_check():
    chi, residence = refreshed_equally(StrictOldest, "lru")
    assert chi > 50 and abs(residence - 0.75) < 0.05  # M / n instead of M / n_new


def test_random_old_takes_the_older_half():
    labels = data()
    for policy in ("ring", "lru"):
        sampler, replay = mixed(labels, pick="random_old", refresh=0.5, policy=policy), Replay(labels, 16, 256, policy)
        for t, positions in enumerate(steps(sampler, 100)):
            seq = replay.slots.seq[:-1].clone()
            middle, slot_of = seq[seq >= 0].sort().values, replay.slots.slot_of.clone()
            replay.step(positions)
            slots = slot_of[np.unique(labels[positions])]
            if t > 40:
                assert (slots >= 0).sum() == 8 and (seq[slots[slots >= 0].long()] <= middle[127]).all()


def test_picks_do_not_depend_on_labels():
    """Half of the refreshed have small labels. M >> n: slots are given away by ascending label inside a step, so with a
    few steps per cycle of the memory small labels stay measurably shorter (5 % fewer picks at M = 4 n)."""
    labels = data(800)
    sampler, slots = mixed(labels, 8, 2, 256, refresh=0.25), Slots(256, int(labels.max()) + 1)
    low = total = 0
    for positions in steps(sampler, 1500):
        plan = slots.plan(torch.from_numpy(labels[positions]))
        low += int((plan.identity[plan.found] < 600).sum())
        total += int(plan.found.sum())
    assert abs(low / total - 0.5) < 4 * 0.5 / total**0.5


def test_refreshed_identities_stand_anywhere_in_the_batch():
    labels = data()
    sampler, slots = mixed(labels, refresh=0.25), Slots(256, int(labels.max()) + 1)
    at = np.zeros(16)
    for positions in steps(sampler, 500):
        at += (slots.slot_of[labels[positions][::2]] >= 0).numpy()
        slots.plan(torch.from_numpy(labels[positions]))
    assert ((at - at.mean()) ** 2 / at.mean()).sum() < 40  # 15 degrees of freedom: p < 5e-4


@pytest.mark.parametrize("refresh", [0.0, 0.25])
def test_the_others_are_the_next_in_line_outside_of_the_memory(refresh):
    labels, place, window = data(150), 0, 8 * 16
    sampler, slots, names = mixed(labels, m=64, refresh=refresh), Slots(64, int(labels.max()) + 1), np.unique(labels)
    for t, positions in enumerate(steps(sampler, 150)):
        batch, wanted = set(labels[positions].tolist()), 16 - (round(refresh * 16) if t else 0)
        line = [int(names[permute(i % 150, 150, hash64(5, 4, i // 150))[0]]) for i in range(place, place + window)]
        expected = []
        for i, label in enumerate(line):
            if slots.slot_of[label] < 0 and label not in expected and len(expected) < wanted:
                expected.append(label)
                after = place + i + 1
        assert len(expected) == wanted and {x for x in batch if slots.slot_of[x] < 0} == set(expected)
        place = after
        slots.plan(torch.from_numpy(labels[positions]))
    assert sampler.state(150)[0] == {"place": place} and place > 150 * 14


@pytest.mark.parametrize("pick, policy", [("random", "ring"), ("random_old", "lru")])
@pytest.mark.parametrize("identities, m", [(64, 64), (64, 500), (70, 64), (17, 17)])
def test_a_memory_as_large_as_the_data_visits_all_equally(identities, m, pick, policy):
    labels = data(identities, 4)
    sampler = mixed(labels, 16, 2, m, pick=pick, policy=policy, refresh=0.2)
    visits = Counter(np.concatenate([labels[x[::2]] for x in steps(sampler, 700)]).tolist())
    counts = np.array(list(visits.values()))
    assert len(counts) == identities
    assert counts.max() / counts.min() < 1.25


def test_without_refresh_every_identity_of_a_small_set_comes_once_a_round():
    labels = data(48, 4)
    sampler = mixed(labels, 16, 2, 64, refresh=0.0)
    for round_ in np.array(steps(sampler, 60))[:, ::2].reshape(20, 48):
        assert len(set(labels[round_])) == 48


def test_with_refresh_every_identity_of_a_small_set_comes_once_a_round():
    labels = data(60, 4)
    sampler = mixed(labels, 15, 2, 64, refresh=0.2)  # 12 in line: a round begins every 5 steps and touches 6
    seen = [set(labels[x]) for x in steps(sampler, 100)]
    assert all(len(set.union(*seen[t : t + 11])) == 60 for t in range(5, 90))


# --- recent steps, and going on ------------------------------------------------------------------------------------------


def test_recent_steps_can_be_asked_again_and_others_not():
    sampler = mixed(data(200))
    first = steps(sampler, HISTORY + 5)
    again = steps(sampler, HISTORY, 5)
    assert all(np.array_equal(a, b) for a, b in zip(first[5:], again))
    again[-1][:] = 0  # what a caller does with its batch is its own affair
    assert np.array_equal(steps(sampler, 1, HISTORY + 4)[0], first[-1])
    for t in (0, 4, HISTORY + 6):
        with pytest.raises(RuntimeError, match=f"{t} is neither the next, {HISTORY + 5}, nor one of the last {HISTORY}"):
            steps(sampler, 1, t)
    with pytest.raises(RuntimeError, match="step 4 is neither"):
        sampler.state(4)


@pytest.mark.parametrize("policy", ["ring", "lru"])
@pytest.mark.parametrize("pick", PICKS)
@pytest.mark.parametrize("done", [0, 3, 40])
def test_a_restored_sampler_goes_on_exactly(pick, policy, done):
    labels, told = data(300), {}
    whole = run(mixed(labels, m=64, pick=pick, policy=policy), labels, 80, told=told)
    assert done == 0 or (done % mixed(labels).steps_per_epoch) != 0

    sampler, replay = mixed(labels, m=64, pick=pick, policy=policy), Replay(labels, 16, 64, policy)
    for t in range(done):
        replay.step(steps(sampler, 1, t)[0])
        if pick == "look_alike":
            sampler.tell(t, lambda t=t: told[t])
    steps(sampler, 5, done)  # read ahead; the trainer has told nothing of these
    numbers, tensors = sampler.state(done)
    assert all(type(value) is int for value in numbers.values())

    other = mixed(labels, m=64, pick=pick, policy=policy)
    steps(other, 1)  # restoring replaces whatever it was at
    other.restore(done, numbers, tensors, replay.state())
    again = other.state(done)
    assert again[0] == numbers and all(torch.equal(again[1][name], tensors[name]) for name in tensors)
    rest = run(other, labels, 80 - done, done)
    assert all(np.array_equal(a, b) for a, b in zip(whole[done:], rest))
    with pytest.raises(RuntimeError, match=f"step {done - 1} is neither"):
        other.state(done - 1)


@pytest.mark.parametrize("m", [40, 64, 200])
def test_a_restored_memory_may_have_another_size(m):
    labels = data(300)
    sampler, old = mixed(labels, m=64), Replay(labels, 16, 64)
    for positions in steps(sampler, 30):
        old.step(positions)
    new = Replay(labels, 16, m)  # what the memory itself does when its size was changed
    s = old.slots
    new.slots.adopt(s.label[:-1], s.seq[:-1], s.written[:-1], s.cursor, s.clock, s.time)
    other = mixed(labels, m=m)
    other.restore(30, *sampler.state(30), old.state())
    for positions in steps(other, 60, 30):
        new.step(positions)
    assert new.found == [3 / 16] * 60
    assert torch.equal(new.slots.label[:-1], other._slots.label[:-1])


def test_a_memory_of_other_data_is_refused():
    labels = data(300)
    sampler, replay = mixed(labels, m=64), Replay(labels, 16, 64)
    replay.step(steps(sampler, 1)[0])
    missing = replay.slots.label[0]
    with pytest.raises(UserError, match=f"holds identity {missing}, which has no images here"):
        other = mixed(labels[labels != int(missing)], m=64)
        other.restore(1, *sampler.state(1), replay.state())


@pytest.mark.parametrize("identities, p, m, count", [(300, 16, 64, 4), (300, 16, 70, 5), (50, 16, 64, 4), (66, 16, 65, 5)])
def test_prefill_fills_the_memory_with_distinct_identities(identities, p, m, count):
    labels = data(identities)
    sampler, replay = mixed(labels, p, 2, m), Replay(labels, p, m)
    batches = sampler.prefill_batches()
    assert len(batches) == count and all(len(set(labels[x])) == p and len(x) == 2 * p for x in batches)
    for positions in batches:
        replay.step(positions)
    distinct = len(set(labels[np.concatenate(batches)]))
    assert distinct == min(count * p, identities) and replay.slots.occupied().sum() == min(m, identities)
    for positions in steps(sampler, 20):
        replay.step(positions)
    assert torch.equal(replay.slots.label[:-1], sampler._slots.label[:-1])
    assert replay.found[count] >= 3 / 16  # refreshed from the first step on
    with pytest.raises(RuntimeError, match="before the first batch"):
        sampler.prefill_batches()


# --- look-alikes ---------------------------------------------------------------------------------------------------------


def test_look_alikes_are_drawn_together():
    """Each identity's neighbour in the numbering is its look-alike; the others in the batch are as rare as by chance."""
    labels = data(120, 4)
    names = np.unique(labels)
    alike = dict(zip(names.tolist(), np.roll(names.reshape(-1, 2), 1, axis=1).ravel().tolist()))  # pairs
    pairs = {}
    for pick in ("look_alike", "random"):
        sampler = mixed(labels, 12, 2, 90, refresh=0.5, pick=pick)
        pairs[pick] = 0
        for t in range(400):
            positions = steps(sampler, 1, t)[0]
            batch = set(labels[positions].tolist())
            pairs[pick] += sum(alike[label] in batch for label in batch)
            if pick == "look_alike":
                told = np.array([alike[label] for label in labels[positions].tolist()])
                sampler.tell(t, lambda a=labels[positions], b=told: (torch.from_numpy(a), torch.from_numpy(b)))
    assert pairs["look_alike"] > 3 * pairs["random"]


def test_look_alikes_come_in_order_once_and_only_from_the_memory():
    labels = np.repeat(np.arange(100), 2)
    sampler = mixed(labels, 6, 2, 50, refresh=0.5, pick="look_alike")
    sampler._slots.plan(torch.arange(50, 80))
    sampler._alike.table[:10] = [70, -1, 71, 70, 3, 72, 99, 73, 60, 61]  # 99 is not in the memory, 3 is in the batch
    got = sampler._look_alikes(np.arange(10), 5)
    assert got.tolist() == [70, 71, 72, 73, 60]


def test_a_late_trainer_changes_nothing():
    labels, told = data(300), {}
    prompt = run(mixed(labels, m=64, pick="look_alike"), labels, 60, told=told)
    late, seen, waits = mixed(labels, m=64, pick="look_alike"), [], np.random.default_rng(0)

    def trainer():
        for t in range(60):
            while t >= len(seen):
                time.sleep(0.0005)
            time.sleep(waits.random() * 0.01)
            late.tell(t, lambda t=t: (time.sleep(0.002), told[t])[1])

    thread = threading.Thread(target=trainer)
    thread.start()
    for t in range(60):  # always as far ahead as the lag allows
        seen += steps(late, 1, t)
    thread.join()
    assert all(np.array_equal(a, b) for a, b in zip(prompt, seen))
    unaware = steps(mixed(labels, m=64, pick="random"), 60)
    assert not all(np.array_equal(a, b) for a, b in zip(prompt, unaware))


def test_the_sampler_waits_for_the_trainer_but_not_for_ever(monkeypatch):
    monkeypatch.setattr(LookAlikes, "patience_s", 0.05)
    sampler = mixed(data(300), m=64, pick="look_alike")
    steps(sampler, LAG)  # these need nothing
    with pytest.raises(RuntimeError, match="waited 0.05 s for the look-alikes of step 0"):
        steps(sampler, 1, LAG)
    sampler.tell(0, lambda: ([1], [2]))
    steps(sampler, 1, LAG)
    monkeypatch.setattr(LookAlikes, "patience_s", 60)
    threading.Timer(0.05, sampler.close).start()
    start = time.monotonic()
    with pytest.raises(RuntimeError, match="closed while it waited"):
        steps(sampler, 1, LAG + 1)
    assert time.monotonic() - start < 30


@given(
    tells=st.lists(st.lists(st.tuples(st.integers(0, 9), st.integers(-1, 9)), min_size=4, max_size=4), min_size=1),
    lag=st.integers(1, 6),
    data=st.data(),
)
@settings(max_examples=80, deadline=None)
def test_the_table_of_any_recent_step_can_be_had(tells, lag, data):
    """Against a table written step by step; the drawing has run ahead of the step that is asked for."""
    tables, table = [], np.full(10, -1)
    for t in range(len(tells) + 1):  # tables[t]: before t is drawn
        tables.append(table.copy())
        if t - lag >= 0:
            for label, nearest in reversed(tells[t - lag]):
                table[label] = nearest if nearest >= 0 else table[label]
    alike, told = LookAlikes(10, lag, 20), 0
    ahead = data.draw(st.integers(0, min(lag, len(tells))))
    for t in range(len(tells)):
        while told <= t - ahead:
            alike.tell(told, lambda pairs=tells[told]: tuple(np.array(pairs).T))
            told += 1
        alike.advance(t)
    for t in range(max(0, len(tells) - 20), told + 1):
        state = alike.state(t)
        assert state["look_alike"].tolist() == tables[t].tolist()
        first = max(0, t - lag)
        assert state["pending"].tolist() == [[list(pair) for pair in tells[s]] for s in range(first, t)]
    if len(tells) > 20:
        with pytest.raises(RuntimeError, match="are not kept"):
            alike.state(len(tells) - 21)
    if told < len(tells):
        with pytest.raises(RuntimeError, match=f"step {told} told no look-alikes"):
            alike.state(told + 1)


def test_a_shorter_lag_after_restoring_can_be_undone():
    pairs = [[(0, 1)], [(0, 2)], [(0, 3)]]
    long, short = LookAlikes(5, 4, 20), LookAlikes(5, 1, 20)
    for t in range(3):
        long.advance(t)
        long.tell(t, lambda t=t: tuple(np.array(pairs[t]).T))
    short.restore(3, long.state(3))
    short.advance(3)  # applies all three at once
    assert short.table[0] == 3
    assert all(torch.equal(a, b) for a, b in zip(short.state(3).values(), long.state(3).values()))


# --- groups --------------------------------------------------------------------------------------------------------------


@given(
    c=st.integers(2, 80), p=st.integers(1, 12), size=st.integers(1, 100), passes=st.integers(1, 4), seed=st.integers(0, 99)
)
@settings(max_examples=40, deadline=None)
def test_groups_are_balanced_and_gone_through_so_many_times(c, p, size, passes, seed):
    labels = data(c, 6)
    count = max(1, -(-c // size))
    if p > c or c // count < p:
        return
    sampler = GroupSampler(labels, p, 2, seed, group_size=size, passes=passes)
    assert (sampler.batch_size, sampler.together, sampler.steps_per_epoch) == (2 * p, 2, 6 * c // (2 * p))
    sizes = [c // count + (g < c % count) for g in range(count)]
    assert max(sizes) <= size or c < size
    t, rounds = 0, []
    for _ in range(3):
        groups = []
        for n in sizes:
            members = Counter()
            for _ in range(passes):
                seen = []
                for positions in steps(sampler, n // p, t):
                    identities = labels[positions].reshape(p, 2)
                    assert (identities[:, 0] == identities[:, 1]).all()
                    seen += identities[:, 0].tolist()
                t += n // p
                assert len(set(seen)) == n // p * p  # nobody twice in a pass
                members.update(seen)
            assert len(members) <= n and max(members.values()) <= passes
            assert n % p or set(members.values()) == {passes}
            groups.append(set(members))
        assert len(set.union(*groups)) == sum(map(len, groups))  # groups share nobody
        rounds.append(groups)
    if c >= 40 and count > 1:
        assert rounds[0] != rounds[1] != rounds[2]


def test_groups_refresh_all_but_the_first_pass():
    labels = data(960)
    sampler, replay = GroupSampler(labels, 16, 2, 0, group_size=96, passes=4), Replay(labels, 16, 128)
    for positions in steps(sampler, 10 * 4 * 6):  # a round
        replay.step(positions)
    found = np.array(replay.found).reshape(10, 4, 6)
    assert (found[:, 0] == 0).all() and (found[:, 1:] == 1).all() and found.mean() == 0.75


def test_a_group_s_identity_goes_through_its_images_in_turn():
    labels = np.repeat(np.arange(16), 6)
    sampler = GroupSampler(labels, 4, 2, 0, group_size=8, passes=3)
    rows = np.concatenate([x.reshape(4, 2) for x in steps(sampler, 2 * 3 * 2)])  # a round: three visits of each
    for identity in range(16):
        assert len(set(rows[labels[rows[:, 0]] == identity].ravel())) == 6


def test_the_order_never_changes_between_versions():
    labels = np.arange(1000) // 5
    assert GroupSampler(labels, 3, 2, 7, group_size=50, passes=3).batch(2, 9).tolist() == [15, 17, 755, 759, 348, 347]
    assert steps(mixed(labels, 3, 2, 20, refresh=0.4, seed=7), 30)[-1].tolist() == [7, 6, 781, 782, 433, 432]


# --- what is refused -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "make, words",
    [
        (lambda x: mixed(x, 11, 2, 20), "11 identities per batch, but the set has only 10"),
        (lambda x: mixed(x, 8, 2, 7), "8 identities per batch, but the memory has only 7 slots; enlarge it"),
        (lambda x: mixed(x, 8, 1, 20), "images_per_identity=1: the prototype would be the image itself"),
        (lambda x: mixed(x, 8, 2, 20, refresh=0.95), "leave room for others"),
        (lambda x: mixed(x, 8, 2, 20, refresh=float("nan")), "leave room for others"),
        (lambda x: mixed(x, 8, 6, 20), "cannot be drawn from 40 images"),
        (lambda x: MixedSampler(x, 8, 2, 0, slots=Slots(20, 5)), r"labels go from 0 to 13, outside 0\.\.4"),
        (lambda x: MixedSampler(x - 1, 8, 2, 0, slots=Slots(20, 50)), "labels go from -1 to 12"),
        (lambda x: GroupSampler(x, 11, 2, 0, group_size=20, passes=2), "11 identities per batch, but the set has only 10"),
        (lambda x: GroupSampler(x, 4, 2, 0, group_size=4, passes=2), "groups of 3 identities are too small for 4"),
        (lambda x: GroupSampler(x, 4, 1, 0, group_size=5, passes=2), "images_per_identity=1"),
    ],
)
def test_impossible_batches_are_refused(make, words):
    with pytest.raises(UserError, match=words):
        make(data(10, 4))


def test_wrong_arguments_are_errors():
    with pytest.raises(ValueError, match="pick 'oldest' is not one of random, random_old, look_alike"):
        mixed(data(10), 2, 2, 5, pick="oldest")
    with pytest.raises(ValueError, match="lag=0"):
        mixed(data(10), 2, 2, 5, pick="look_alike", lag=0, refresh=0.5)
