"""Training with a prototype memory: equal at every world size, after a kill in mid-ring, and resharded."""

import json
import subprocess

import numpy as np
import pytest
import torch

from protomem import config, distributed, state
from protomem.commands import load_run
from protomem.data.pipeline import make_loader
from protomem.data.records import open_records
from protomem.data.sampler import BalancedSampler
from protomem.errors import UserError
from protomem.head import blocked_head
from protomem.objective.margins import build_margin
from protomem.prototypes.memory import PrototypeMemory
from protomem.prototypes.slots import Slots
from protomem.quality import Quality
from protomem.step import losses
from protomem.trainer import train
from tests.ranks import run_ranks
from tests.test_training import assert_close, kill_at, run, settings, start_ranks

SLOTS = 13  # a batch holds 6 of the 31 identities: the ring turns every few steps
BASE = (
    "prototypes.source=memory",
    f"prototypes.memory.size={SLOTS}",
    "prototypes.memory.check_every=1",
    "data.sampler.name=mixed",
    "data.sampler.images_per_identity=4",
    "margin.m=0.2",
    "optimizer.lr=0.002",  # harder driven, rounding grows to 4e-4 within 24 steps; see benchmarks/LOG.md
    "schedule.steps=24",
    "schedule.warmup_steps=3",
    "checkpoint.every=7",
)
VARIANTS = {
    "plain": (),
    "recognizability": ("quality.estimator=recognizability", "prototypes.memory.momentum=0.5", "quality.warmup=0"),
    "hard": (
        "quality.estimator=zscore",
        "quality.usage=hard",
        "quality.on_empty=skip",
        "quality.quantile=0.6",
        "prototypes.memory.policy=lru",
        "prototypes.memory.fill=random",
    ),
    "learning": ("prototypes.memory.gradient=sgd", "prototypes.memory.fill=prefill"),
    "graph": (
        "prototypes.memory.gradient=batch",
        "prototypes.memory.self_exclusion=loo",
        "quality.estimator=norm",
        "quality.loss_weight=0.5",
        "quality.warmup=0.2",
    ),
    "averaged": ("prototypes.memory.key_encoder=0.9", "quality.estimator=recognizability", "prototypes.memory.self_exclusion=split", "data.sampler.name=group", "data.sampler.group_size=12"),
    "pinned": ("quality.estimator=recognizability", "quality.unrecognizable.pinned=true", "quality.unrecognizable.images=5"),
    "look_alike": ("data.sampler.pick=look_alike", "data.sampler.refresh=0.5"),
}


@pytest.mark.parametrize("variant", VARIANTS)
def test_same_curve_at_every_world_size(variant, small_set, tmp_path):
    more = (*BASE, *VARIANTS[variant], "checkpoint.every=0")
    alone = run(1, small_set, tmp_path / "1", *more)
    assert_close(run(3, small_set, tmp_path / "3", *more), alone, 2e-4)
    assert len(set(alone.values())) == 24


@pytest.mark.parametrize("world, variant", [(1, "recognizability"), (2, "look_alike"), (2, "learning"), (4, "pinned"), (2, "averaged")])
def test_resumed_in_mid_ring_equals_the_uninterrupted_run_bit_for_bit(world, variant, small_set, tmp_path):
    more = (*BASE, *VARIANTS[variant])
    whole = run(world, small_set, tmp_path / "whole", *more)
    run(world, small_set, tmp_path / "cut", *more)
    for path in state.checkpoints(tmp_path / "cut" / "checkpoints"):  # as if killed soon after step 14 or 7
        if state.read_info(path)["step"] > 14:
            subprocess.run(["rm", "-r", path], check=True)
    assert run(world, small_set, tmp_path / "cut", *more) == whole


def test_kill_9_in_mid_ring_and_resume_bit_for_bit(small_set, tmp_path):
    more = (*BASE, "quality.estimator=recognizability", "schedule.steps=40")
    whole = run(2, small_set, tmp_path / "whole", *more)
    kill_at(start_ranks(2, small_set, tmp_path / "killed", *more), tmp_path / "killed", 18)
    assert run(2, small_set, tmp_path / "killed", *more) == whole


def test_killed_and_resumed_at_other_world_sizes(small_set, tmp_path):
    """4 ranks, then 2, then 3: the uninterrupted curve of one process."""
    more = (*BASE, "quality.estimator=recognizability", "prototypes.memory.momentum=0.3", "schedule.steps=30")
    whole = run(1, small_set, tmp_path / "whole", *more)
    for world, step in ((4, 9), (2, 18)):
        kill_at(start_ranks(world, small_set, tmp_path / "cut", *more), tmp_path / "cut", step)
    assert_close(run(3, small_set, tmp_path / "cut", *more), whole, 2e-4)


# --- the memory itself in a checkpoint -----------------------------------------------------------------------------


def build(size: int, **more) -> PrototypeMemory:
    quality = Quality(5, estimator="recognizability", usage="hard", on_empty="skip", quantile=0.5)
    return PrototypeMemory(40, 5, size=size, quality=quality, pinned=True, **more)


def fill(memory: PrototypeMemory, steps: int) -> None:
    generator = torch.Generator().manual_seed(7)
    for step in range(steps):
        labels = torch.randint(0, 40, (5,), generator=generator).repeat_interleave(2)
        memory.quality.see(torch.randn(3, 5, generator=generator), 3)
        memory.begin_step(labels, step)
        memory.columns(labels, torch.randn(10, 5, generator=generator))


def content(memory: PrototypeMemory) -> dict[str, np.ndarray]:
    """Everything, by slot, whoever holds it."""
    world = distributed.world_size()
    rows = distributed.gather_rows(memory.rows, [memory.local] * world).view(world, memory.local, -1).transpose(0, 1)
    out = {"rows": rows.reshape(-1, rows.shape[-1])[: memory.size + 1], "filled": memory.filled[: memory.size + 1]}
    out |= {k: getattr(memory.slots, k)[:-1] for k in ("label", "seq", "written", "slot_of")}  # without the spare place
    out |= {k: getattr(memory.slots, k) for k in ("cursor", "clock", "time")}
    return {k: v.numpy().copy() for k, v in out.items()} | {"ui": memory.quality.ui.numpy().copy()}


def save_load(world, size, source, target, steps=0):
    """On `world` ranks: load `source` (or make a memory of 17 steps), go on for `steps`, save; return the content."""

    def work():
        memory = build(size)
        if source is None:
            fill(memory, 17)
        else:
            state.load(source, {"encoder": torch.nn.Identity(), "prototypes": memory}, {})
        found = content(memory)
        fill(memory, steps)
        modules = {"encoder": torch.nn.Identity(), "prototypes": memory}
        path = state.save(target, 1, state.named_state(modules, {}), memory.total_rows, {}, keep=1)
        return found, content(memory), str(path)

    results = run_ranks(world, work)
    for other in results[1:]:
        for k in ("rows", "label", "filled", "seq"):
            assert np.array_equal(results[0][0][k], other[0][k])
    return results[0]


def test_4_2_3_ranks_keep_every_prototype_label_and_age(tmp_path):
    first, _, path = save_load(4, SLOTS, None, tmp_path / "4")
    assert first["filled"].sum() > 5 and not first["filled"].all()
    for world in (2, 3, 1, 4):
        now, _, path = save_load(world, SLOTS, path, tmp_path / str(world))
        for key, value in first.items():
            assert np.array_equal(now[key], value), (world, key)


@pytest.mark.parametrize("size", [6, 8, 13, 19])
def test_another_memory_size_keeps_the_newest(size, tmp_path):
    old, _, path = save_load(3, SLOTS, None, tmp_path / "3")
    new, later, _ = save_load(2, size, path, tmp_path / "2", steps=9)
    order = np.argsort(old["seq"][:SLOTS])[-size:]
    kept = {int(old["label"][s]): (old["rows"][s], old["written"][s], old["filled"][s]) for s in order}
    found = {int(label): s for s, label in enumerate(new["label"][:size]) if label >= 0}
    assert set(found) == set(kept)
    for label, slot in found.items():
        row, written, filled = kept[label]
        assert np.array_equal(new["rows"][slot], row) and new["written"][slot] == written and new["filled"][slot] == filled
    assert np.array_equal(new["rows"][size], old["rows"][SLOTS])  # the pinned one
    assert new["filled"][size] and (later["label"][:size] >= 0).all()  # and it goes on


# --- what is refused -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "text, message",
    [
        ("data.sampler.name=shuffled data.sampler.images_per_identity=4", "leaves most identities a single image"),
        ("data.sampler.images_per_identity=1", "the prototype would be the image itself"),
        ("train.accumulate=2", "cannot be cut"),
        ("prototypes.memory.size=5", "less than the 6 identities of a batch"),
        ("prototypes.memory.storage=bf16 prototypes.memory.gradient=sgd", "needs storage=fp32"),
        ("prototypes.memory.gradient=batch prototypes.memory.key_encoder=0.5", "carries no gradient"),
        ("optimizer.head.lr=0.1", "do not learn"),
        ("quality.loss_weight=1 quality.estimator=equal", "no effect with quality.estimator=equal"),
        ("quality.estimator=external", "no column|quality"),
        ("quality.power=2 quality.usage=hard quality.estimator=norm", "quality.power=2.0 has no effect with quality.usage=hard"),
        ("quality.estimator=norm quality.usage=topk quality.keep=4", "keeps all of the 4"),
        ("prototypes.source=classifier", "has no effect with prototypes.source=classifier|is for prototypes.source=memory"),
        ("quality.estimator=recognizability quality.unrecognizable.source=external", "needs quality.unrecognizable.path"),
        ("data.sampler.name=group data.sampler.group_size=99", "would evict itself"),
        ("data.sampler.refresh=0.05", "is none; raise it"),
        ("prototypes.memory.fill=prefill data.sampler.name=balanced", "needs data.sampler.name=mixed"),
        ("prototypes.memory.gradient=sgd prototypes.memory.self_exclusion=loo", "only push"),
        ("quality.estimator=norm quality.warmup=1", "never count"),
        ("quality.estimator=norm quality.usage=hard quality.quantile=0", "rejects nobody"),
    ],
)
def test_what_makes_no_sense_is_refused_in_one_line(text, message, small_set, tmp_path):
    with pytest.raises(UserError, match=message) as error:
        train(config.load([], settings(small_set, tmp_path, *BASE, *text.split())))
    assert "\n" not in str(error.value)


def test_the_log_and_the_report_tell_about_the_memory(small_set, tmp_path):
    run(2, small_set, tmp_path, *BASE, "quality.estimator=norm")
    last = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines() if "memory_occupied" in line][-1]
    wanted = {"memory_refreshed", "memory_age_mean", "memory_age_max", "refresh_cos", "cos_hardest", "quality_q50"}
    assert wanted <= set(last) and last["memory_occupied"] == SLOTS
    assert 0 < last["memory_refreshed"] < 1 and last["cos_y"] > last["cos_hardest"] - 1


def test_unrecognizable_copies_do_not_touch_the_training(small_set, tmp_path):
    """With a power of next to 0 the estimator decides nothing, so the run is the plain one, BatchNorm statistics included."""
    more = (*BASE, "encoder.freeze_statistics=false", "schedule.steps=8", "checkpoint.every=0")
    plain = run(1, small_set, tmp_path / "plain", *more)
    watched = ("quality.estimator=recognizability", "quality.power=1e-30", "quality.warmup=0")
    assert run(1, small_set, tmp_path / "watched", *more, *watched) == plain
    one, other = (load_run(tmp_path / name, torch.device("cpu"))[1].state_dict() for name in ("plain", "watched"))
    assert all(torch.equal(value, other[name]) for name, value in one.items())


def test_an_overflowed_step_leaves_no_trace():
    """Infinite embeddings once, as fp16 makes them: statistics and rows stay sound, and the memory fills again."""
    for estimator in ("zscore", "recognizability"):
        memory = build_with(estimator)
        generator = torch.Generator().manual_seed(3)
        for step in range(12):
            labels = torch.randint(0, 40, (5,), generator=generator).repeat_interleave(2)
            x = torch.randn(10, 5, generator=generator) * (float("inf") if step == 3 else 1)
            x.requires_grad_()
            memory.quality.see(x[:3], 3)
            memory.begin_step(labels, step)
            loss = losses((x,), labels, [10], memory, blocked_head, build_margin("cosface", scale=8.0), observe=True).per_sample.mean()
            loss.backward()
            if step != 3:
                assert loss.isfinite() and x.grad.isfinite().all(), (estimator, step)
        assert memory.filled[:SLOTS].all() and memory.rows.isfinite().all()
        assert all(value.isfinite().all() for value in memory.quality.state_dict().values())


def build_with(estimator: str) -> PrototypeMemory:
    quality = Quality(5, estimator=estimator)
    return PrototypeMemory(40, 5, size=SLOTS, quality=quality, gradient="batch", momentum=0.5)


def test_a_corrupt_image_is_replaced_within_its_identity(small_set):
    """Else the sampler's copy of the bookkeeping would part from the memory's."""
    records = open_records(small_set)
    sampler = BalancedSampler(records.labels, 6, 4, seed=1)
    bad = [int(i) for i in np.flatnonzero(np.arange(len(records)) % 8 >= 5)]  # the last three of each identity's eight
    options = dict(backend="torch", size=32, threads=1, on_corrupt="skip", bad_positions=bad)
    loader = make_loader(records, sampler, **options)
    try:
        batches = [next(loader.epoch(0, step)) for step in range(4)]
    finally:
        loader.close()
    assert sum(batch.skipped for batch in batches) > 10
    for step, batch in enumerate(batches):
        assert np.array_equal(batch.labels.numpy(), records.labels[sampler.batch(0, step)])
        assert not set(batch.index.tolist()) & set(bad)


def test_a_hundred_million_identities():
    slots = Slots(64, 100_000_000)
    assert slots.slot_of.numel() * slots.slot_of.element_size() == 4 * 100_000_001
    last = torch.arange(99_999_990, 100_000_000).repeat_interleave(2)
    plan = slots.plan(last)
    assert plan.new.sum() == 10 and slots.slot_of[-11:-1].tolist() == list(range(10))
    again = slots.plan(torch.cat([last, torch.tensor([5, 5])]))
    assert again.found.sum() == 10 and slots.label[:11].tolist() == [*range(99_999_990, 100_000_000), 5]
