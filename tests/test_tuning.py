"""head.tune: what is chosen, by clocks that are made up; where the choice is kept; and that every rank has the same."""

import json
import multiprocessing as mp
from dataclasses import replace

import pytest
import torch

from benchmarks import kernels
from protomem import build, config, distributed, trainer
from protomem.errors import UserError
from protomem.head import Columns, triton_head, tuning
from protomem.head.blocked import blocked_head
from protomem.head.contract import combine
from tests import test_composition
from tests.ranks import run_ranks
from tests.test_training import curve, settings

CPU = torch.device("cpu")
SHAPE = dict(batch=32, rows=3000, size=8, precision="bf16", store_mb=16.0, learns=True)
WORK = tuning.work(**SHAPE)
CHOICES = tuning.candidates(WORK)


class Clock:
    """A timer that runs nothing: 10 ms for everybody but for those that are named; an exception is raised."""

    def __init__(self, named: dict = {}, usual: float = 10.0):
        self.named, self.usual, self.asked = named, usual, []

    def __call__(self, act) -> float:
        self.asked.append(act.args)
        ms = self.named.get(act.args, self.usual)
        if isinstance(ms, Exception):
            raise ms
        return ms


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "protomem"


def chosen(clock, work=WORK, stored=None):
    found = tuning.agree(work, CPU, stored, clock)
    return tuning.choice_of(found["record"], work)


# --- choosing ----------------------------------------------------------------------------------------------------------


def test_the_candidates_are_few_whole_and_begin_with_the_default():
    for precision, tried in tuning.TRIED.items():
        assert tried[0] == triton_head.TILES[precision] and len(set(tried)) == len(tried) <= 6
        work = tuning.work(**{**SHAPE, "precision": precision, "batch": 1024, "size": 512, "rows": 10**6})
        found = tuning.candidates(work)
        assert work.rows == 65536 and len(set(found)) == len(found) == 4 * len(tried)
        assert found[0] == (tried[0], triton_head.chunk_rows(1024, 512, tried[0].n))
        for tiles, block in found:
            assert block % tiles.n == 0 and tiles.n % tiles.k == 0  # add_dx takes a tile's rows k at a time
            assert all(size & (size - 1) == 0 for size in (tiles.m, tiles.n, tiles.d, tiles.k, tiles.warps))
    for precision, tried in tuning.TRIED_CENTERS.items():
        assert tried[0] == triton_head.CENTER_TILES[precision] and len(set(tried)) == len(tried) <= 6
        work = tuning.work(**{**SHAPE, "precision": precision, "batch": 1024, "size": 512, "rows": 3 * 10**6}, centers=3)
        found = tuning.candidates(work)
        assert work.rows == 65535 and len(set(found)) == len(found) == 4 * len(tried)
        assert found[0] == (tried[0], triton_head.chunk_rows(1024, 512, tried[0].n, 3))
        assert all(block % (3 * tiles.n) == 0 and tiles.n % tiles.k == 0 for tiles, block in found)
    assert [block for _, block in CHOICES] == [-(-3000 // t.n) * t.n for t in tuning.TRIED["bf16"]]  # all in one
    given = tuning.candidates(tuning.work(**SHAPE, block=1000))
    assert [block for _, block in given] == [-(-1000 // tiles.n) * tiles.n for tiles, _ in given]


def test_the_fastest_is_taken_and_the_default_stays_where_it_is_as_good(capsys):
    clock = Clock({CHOICES[2]: 7.0, CHOICES[3]: 8.0})
    assert chosen(clock) == CHOICES[2] and clock.asked == CHOICES
    assert capsys.readouterr().out.count("\n") == 1
    assert chosen(Clock({CHOICES[2]: 9.85}), tuning.work(**SHAPE, mixed=True)) == CHOICES[0]  # 1.5 % are noise
    assert chosen(Clock({CHOICES[2]: 9.7}), tuning.work(**SHAPE, filtered=True)) == CHOICES[2]


def test_what_cannot_run_is_passed_over(caplog):
    class OutOfResources(Exception):
        pass

    wrong = {CHOICES[0]: OutOfResources("shared memory"), CHOICES[1]: torch.OutOfMemoryError("no room"), CHOICES[2]: 9.0}
    found = tuning.agree(WORK, CPU, timer=Clock(wrong))
    assert tuning.choice_of(found["record"], WORK) == CHOICES[2] and found["record"]["default_ms"] is None
    assert [r.message.count("cannot be used: ") for r in caplog.records] == [1, 1] and "shared memory" in caplog.text
    with pytest.raises(UserError, match="no candidate can be used here .OutOfResources: shared memory.; set head.tune=false"):
        chosen(Clock(usual=OutOfResources("shared memory")), tuning.work(**SHAPE, mixed=True))


@pytest.mark.parametrize("centers", [1, 2, 3])
def test_the_fastest_must_compute_the_same(centers, monkeypatch):
    """A kernel that leaves the rows' gradient, or that of one sub-centre, is the fastest; also where the default does not run."""
    work = tuning.work(**{**SHAPE, "rows": 600, "centers": centers})
    default, idle, partial, right = tuning.candidates(work)[:4]

    def head(x, columns, scale, negatives, threshold, tiles, block, **_):
        if (tiles, block) == default:
            raise RuntimeError("no room")
        sink, choice = columns.sink, (tiles, block)
        given = columns if choice not in (idle, partial) else replace(columns, sink=None)
        found = blocked_head(x, given, scale, negatives, threshold)
        if choice == partial:  # all but the last of each identity's rows
            sink.buffer.copy_(scratch[0])
            sink.buffer[centers - 1 :: centers] = 0
        return found

    scratch, reference = [], tuning._Scratch.reference
    monkeypatch.setattr(tuning._Scratch, "reference", lambda s: (reference(s), scratch.append(s.columns.sink.buffer.clone())))
    monkeypatch.setattr(tuning, "triton_head", head)
    ms = {idle: 1.0, partial: 2.0, right: 3.0}
    found = {choice: why for choice, _, why in tuning.times(work, CPU, lambda act: (act(), ms.get(act.args, 9.0))[1])}
    assert found[right] == "" and "no room" in found[default]
    assert found[idle] == "its gradients differ by nan" and "differ by" in found[partial]


def test_a_gpu_is_needed_to_time_anything():
    with pytest.raises(UserError, match="head.tune=true times kernels on a GPU, and there is none; remove it"):
        tuning.agree(WORK, CPU)


def test_the_setting_belongs_to_the_kernels():
    with pytest.raises(UserError, match="head.tune=True has no effect with head.backend=blocked, only with triton"):
        config.load([], ["data.train=x", "output=y", "head.tune=true"])


def test_random_streams_and_gradient_modes_are_left_alone():
    before = torch.get_rng_state()
    chosen(Clock())
    assert torch.equal(before, torch.get_rng_state()) and torch.is_grad_enabled() and distributed.world_size() == 1


def test_the_benchmark_lists_them_by_time(capsys):
    fp32 = tuning.work(8, 75, 21, "fp32", store_mb=16.0, learns=True, mixed=True)
    second = tuning.candidates(fp32)[1]
    rows = kernels.tile_times("vpl", 8, 75, 21, CPU, Clock({second: 5.0}))
    assert len(rows) == sum(map(len, tuning.TRIED.values())) and rows[0]["ms"] == 5.0
    assert rows[0]["tiles"] == kernels.named(second[0]) and all(row["state"] == "measured" for row in rows)


# --- keeping -----------------------------------------------------------------------------------------------------------


def test_the_next_run_reads_what_this_one_found(cache):
    first = tuning.agree(WORK, CPU, timer=Clock({CHOICES[1]: 5.0}))
    (file,) = cache.iterdir()
    assert f"kept in {file}" in first["source"] and json.loads(file.read_text()) == first["record"]
    clock = Clock()
    assert tuning.agree(WORK, CPU, timer=clock) == dict(record=first["record"], source=str(file)) and not clock.asked
    other = Clock({CHOICES[2]: 5.0})
    assert chosen(other, tuning.work(**{**SHAPE, "batch": 64})) == CHOICES[2] and other.asked
    assert chosen(Clock()) == CHOICES[1] and len(list(cache.iterdir())) == 2


def test_everything_that_the_time_depends_on_is_in_the_key(monkeypatch, tmp_path):
    gpu, seen = torch.device("cuda"), set()
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: "A")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (9, 0))

    def new():
        key = json.dumps(tuning._key(work, gpu))
        known = key in seen
        seen.add(key)
        return not known

    work = WORK
    assert new() and not new()
    changes = dict(batch=33, rows=2999, size=9, precision="fp32", store_mb=0.1, learns=False, memory=True, half=True)
    for name, value in (changes | dict(mixed=True, filtered=True, threshold=True, block=64, centers=2)).items():
        work = tuning.work(**{**SHAPE, name: value})
        assert new(), name
    work = WORK
    for target, name, value in (
        (torch.cuda, "get_device_name", lambda _: "B"),
        (torch.cuda, "get_device_capability", lambda _: (10, 0)),
        (tuning.metadata, "version", lambda _: "99"),
        (torch, "__version__", "99"),
    ):
        monkeypatch.setattr(target, name, value)
        assert new(), name
    for changed in ("kernels/rows.py", "triton_head.py", "tuning.py"):
        copy = tmp_path / changed.replace("/", "-") / "head"
        (copy / "kernels").mkdir(parents=True)
        for name in ("kernels/rows.py", "kernels/products.py", "triton_head.py", "tuning.py"):
            source = (build.tuning.Path(triton_head.__file__).parent / name).read_text()
            (copy / name).write_text(source + "#" * (name == changed))
        monkeypatch.setattr(tuning, "__file__", str(copy / "tuning.py"))
        assert new(), changed
    # Shards that differ in size alone are timed alike, as long as they keep the same share.
    big = {**SHAPE, "size": 512, "store_mb": 0.0}
    assert tuning.work(**{**big, "rows": 10**6}) == tuning.work(**{**big, "rows": 10**7})


def spoiled(record: dict) -> dict:
    tiles = record["tiles"]
    return {
        "cut": json.dumps(record)[:40].encode(),
        "binary": b"\xff\x00" * 30,
        "deep": b"[" * 100_000,
        "a list": b"[1, 2]",
        "a number": b"3",
        "of another key": {**record, "for": {**record["for"], "batch": 33}},
        "no tiles": {k: v for k, v in record.items() if k != "tiles"},
        "tiles that nobody tried": {**record, "tiles": {**tiles, "m": 7}},
        "too many numbers": {**record, "tiles": {**tiles, "x": 1}},
        "lists": {**record, "tiles": {**tiles, "m": [128]}},
        "a chunk that nobody tried": {**record, "block": 2**40},
        "nothing": b"",
    }


@pytest.mark.parametrize("how", spoiled({"for": {}, "tiles": {}}))
def test_a_damaged_or_foreign_file_is_said_once_and_replaced(how, cache, caplog):
    record = tuning.agree(WORK, CPU, timer=Clock({CHOICES[1]: 5.0}))["record"]
    (file,) = cache.iterdir()
    damage = spoiled(record)[how]
    file.write_bytes(damage if isinstance(damage, bytes) else json.dumps(damage).encode())
    assert chosen(Clock({CHOICES[2]: 5.0})) == CHOICES[2]
    (line,) = caplog.records
    assert str(file) in line.message and "timed again" in line.message and "\n" not in line.message
    assert list(cache.iterdir()) == [file] and chosen(Clock()) == CHOICES[2]
    assert chosen(Clock({CHOICES[2]: 5.0}), stored=damage if isinstance(damage, dict) else how) == CHOICES[2]  # a checkpoint's


def test_a_folder_that_cannot_be_written_costs_only_the_next_run_its_time(monkeypatch, caplog):
    monkeypatch.setenv("XDG_CACHE_HOME", "/dev/null")
    clock = Clock({CHOICES[1]: 5.0})
    assert [chosen(clock), chosen(clock)] == [CHOICES[1]] * 2 and len(clock.asked) == 2 * len(CHOICES)
    assert "cannot be written" in caplog.text


def test_a_checkpoint_s_choice_goes_before_the_cache_s(cache):
    stored = tuning.agree(WORK, CPU, timer=Clock({CHOICES[1]: 5.0}))["record"]
    for file in cache.iterdir():
        file.unlink()
    assert chosen(Clock({CHOICES[2]: 5.0})) == CHOICES[2]
    clock = Clock()
    found = tuning.agree(WORK, CPU, json.loads(json.dumps(stored)), clock)
    assert found == dict(record=stored, source="checkpoint") and not clock.asked
    other = tuning.work(**{**SHAPE, "batch": 64})  # it goes on with another batch
    assert chosen(clock, other, stored) == CHOICES[0] and clock.asked


def _hammer(worker: int) -> None:
    warnings = []
    tuning.log.warning = lambda *said: warnings.append(said)
    for turn in range(40):
        for path in tuning.cache_folder().glob("*.json") if turn % 3 == worker else ():
            path.unlink(missing_ok=True)  # so that it is made again while others look
        choice = tuning.candidates(WORK)[worker]
        found = tuning.agree(WORK, CPU, timer=Clock({choice: 5.0}))
        assert tuning.choice_of(found["record"], WORK) is not None
    assert not warnings  # about half a file


def test_processes_at_the_same_time_leave_whole_files(cache, capfd):
    workers = [mp.get_context("fork").Process(target=_hammer, args=(k,)) for k in range(3)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(60)
    assert [worker.exitcode for worker in workers] == [0] * 3
    assert all(path.suffix == ".json" for path in cache.iterdir())


# --- ranks -------------------------------------------------------------------------------------------------------------


def test_every_rank_has_rank_0_s_choice(tmp_path, monkeypatch):
    def work():
        rank = distributed.rank()
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / f"rank{rank}"))  # of another machine
        clock = Clock({CHOICES[1 + rank]: 5.0})
        first = chosen(clock)
        again = chosen(clock)
        return CHOICES.index(first), CHOICES.index(again), len(clock.asked)

    assert run_ranks(2, work) == [(1, 1, len(CHOICES)), (1, 1, 0)]


def test_no_rank_goes_on_when_nothing_runs():
    def work():
        with pytest.raises(UserError if distributed.rank() == 0 else SystemExit):
            chosen(Clock(usual=RuntimeError("no")))
        return True

    assert run_ranks(2, work) == [True, True]


def test_one_rank_alone_computes_without_the_others():
    def work():
        own, top, total = torch.tensor([0.5]), torch.tensor([0.0]), torch.tensor([2.0 + distributed.rank()])
        lone = None
        if distributed.rank() == 1:
            with distributed.alone():
                assert (distributed.rank(), distributed.world_size()) == (0, 1)
                lone = combine(own, top, total, 8.0)[1].exp().item()
        return lone, combine(own, top, total, 8.0)[1].exp().item()

    (nobody, both), (lone, same) = run_ranks(2, work)
    assert nobody is None and lone == pytest.approx(3) and both == same == pytest.approx(5)


# --- what a run's head does --------------------------------------------------------------------------------------------

MEMORY = ["prototypes.source=memory", "data.sampler.name=balanced", "data.sampler.images_per_identity=2"]
MEMORY += ["prototypes.memory.size=6"]
KINDS = {
    "classifier": [],
    "sampled": ["prototypes.source=sampled", "prototypes.rate=0.5"],
    "VPL, filter": ["prototypes.injection.weight=0.2", "prototypes.injection.start=0", "margin.filter_above=0.4"],
    "two views": ["contrast.weight=0.1", "contrast.start_epoch=0"],
    "threshold": ["margin.criterion=unified"],
    "memory": MEMORY,
    "memory, bf16": [*MEMORY, "prototypes.memory.storage=bf16"],
    "sub-centres": ["prototypes.sub_centers=3"],
    "memory that learns": [*MEMORY, "prototypes.memory.gradient=sgd"],
}


@pytest.mark.parametrize("name", KINDS)
def test_what_is_timed_is_what_the_head_meets(name, monkeypatch):
    small = [f"{k}={v}" for k, v in test_composition.TINY.items()]
    c = config.load([], [*test_composition.composition.NEEDED, *small, *KINDS[name]])
    expected, met, plain = build.head_work_from(c, test_composition.IDENTITIES), [], build.head_from(c)

    def head(x, columns: Columns, scale, negatives, threshold=None):
        met.append(
            tuning.work(
                len(x),
                len(columns.rows),
                x.shape[1],
                "fp32",
                store_mb=16.0,
                learns=columns.sink is not None,
                memory=columns.valid is not None,
                half=columns.rows.dtype == torch.bfloat16,
                mixed=columns.injection is not None,
                filtered=negatives is not None,
                threshold=threshold is not None,
                centers=columns.centers,
            )
        )
        return plain(x, columns, scale, negatives, **({} if threshold is None else dict(threshold=threshold)))

    monkeypatch.setattr(build, "head_from", lambda _: head)
    test_composition.train(c)
    assert set(met) == {expected}


def test_the_largest_micro_batch_counts():
    c = config.load([], ["data.train=x", "output=y", "train.batch_size=50", "train.accumulate=4", "head.block=77"])
    work = build.head_work_from(c, 1000)
    assert (work.batch, work.rows, work.block) == (13, 1000, 77)


class Recorder:
    """The triton head for a run without a GPU: notes how it is called, and is the blocked one."""

    def __init__(self):
        self.calls = []

    def __call__(self, *args, tiles=None, block=0, **options):
        self.calls.append((tiles, block))
        return build.HEADS["blocked"](*args, **options)


def test_a_run_says_what_it_takes_and_a_later_start_takes_it_again(small_set, tmp_path, cache, monkeypatch):
    monkeypatch.setattr(triton_head, "check", lambda *_: None)
    agree, output = tuning.agree, tmp_path / "run"

    def train(steps: int, clock: Clock, *more):
        head = Recorder()
        monkeypatch.setitem(build.HEADS, "triton", head)
        monkeypatch.setattr(tuning, "agree", lambda *args: agree(*args, clock))
        more = ("head.backend=triton", "head.tune=true", f"schedule.steps={steps}", "schedule.warmup_steps=0", *more)
        trainer.train(config.load([], settings(small_set, output, *more)))
        events = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
        return set(head.calls), [e for e in events if e.get("event") == "tuned"]

    work = build.head_work_from(config.load([], settings(small_set, output)), 31)
    _, second, third = tuning.candidates(work)[:3]
    calls, (event,) = train(1, Clock({second: 5.0}))
    assert calls == {second} and event["block"] == second[1] and event["ms"] == 5.0 and event["default_ms"] == 10.0
    assert event["tiles"] == vars(second[0]) and event["source"].startswith("timed in 0 s, kept in ")
    for file in cache.iterdir():
        file.unlink()
    clock = Clock({third: 5.0})
    calls, (_, event) = train(2, clock)
    assert calls == {second} and event["source"] == "checkpoint" and event["step"] == 1 and not clock.asked
    assert sorted(curve(output)) == [1, 2]
    calls, events = train(3, clock, "train.accumulate=2")  # other shapes: another choice
    assert calls == {third} and len(events) == 3 and clock.asked
