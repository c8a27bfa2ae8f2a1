"""The check before training: a healthy cluster passes, and each fault is told with its host and rank. Faults are made by
replacing what a rank measures or sees, in that rank's own process."""

import json
import os
import time
from types import SimpleNamespace

import pytest
import torch
from typer.testing import CliRunner

from protomem import config, distributed, state, trainer
from protomem.cli import app
from protomem.data.patterns import PatternRecords  # noqa: F401  imported once here instead of in every forked rank
from protomem.errors import UserError
from protomem.plan import hardware
from protomem.plan.case import make_case
from protomem.plan.memory import checkpoint_bytes
from protomem.preflight import fabric, facts, preflight, ranks, shared, slow
from tests.ranks import free_port, run_ranks
from tests.test_training import settings

HOSTS = ["node0", "node0", "node1", "node1"]
DATA = "data.train=patterns:identities=40,images=2"


class Clock:
    """Stands in for a rank's stopwatch: whatever is measured takes a millisecond, and what a fault adds."""

    def __init__(self):
        self.now = 0.0

    def perf_counter(self):
        self.now += 0.001
        return self.now

    def late(self, act):
        """`act`, a second slower."""

        def slower(*arguments):
            self.now += 1
            return act(*arguments)

        return slower


def check(tmp_path, world, fault=lambda rank: None, hosts=HOSTS, **options):
    """(exit code, what was found) of `preflight` on `world` ranks of these hosts; fault(rank) is done first on each."""
    output = tmp_path / "run"

    def work():
        rank = distributed.rank()
        fabric.GEMM, fabric.SIZES = {"cpu": {"bf16": 64, "fp32": 128}}, {"cpu": (1 << 10, 1 << 14)}
        fabric.LINK_BYTES, fabric.REPEATS, shared.VISIBLE_S = {"cpu": 1 << 14}, {"cpu": 3}, 0.5
        fabric.time = Clock()
        ranks.host = lambda: hosts[rank]
        fault(rank)
        return preflight(["encoder.name=small", "train.batch_size=8", DATA], output=output, **options)

    codes = set(run_ranks(world, work))
    assert len(codes) == 1
    return codes.pop(), json.loads((output / "preflight.json").read_text())


def told(found) -> list[tuple]:
    return [(p["check"], p["ranks"], p["hosts"]) for p in found["problems"]]


@pytest.mark.parametrize("world", [1, 3])
def test_a_healthy_cluster_passes_and_nothing_is_left(tmp_path, world):
    code, found = check(tmp_path, world)
    assert (code, found["problems"]) == (0, []) and found["passed"]
    assert [r["host"] for r in found["ranks"]] == HOSTS[:world] and found["world_size"] == world
    assert len(found["links"]) == world * (world - 1) // 2
    assert len(found["collectives"]) == (6 if world > 1 else 0)
    for c in found["collectives"]:
        factor = (2 if c["kind"] == "all_reduce" else 1) * (world - 1) / world
        assert c["algorithm_rate"] == pytest.approx(c["bytes"] / c["seconds"])
        assert c["bus_rate"] == pytest.approx(factor * c["bytes"] / c["seconds"])
    assert os.listdir(tmp_path / "run") == ["preflight.json"]
    assert found["disk"]["checkpoints"] == 3 and found["data"]["data.train"]["images"] == 80


def test_a_rank_that_is_slow_to_leave_finds_the_others(tmp_path):
    """The main rank has the store: once it saw that all had come to the end, it left, and who asked later failed."""

    def fault(rank):
        def late(store, name, *arguments):
            if name == "end" and rank == 1:
                ranks.time = SimpleNamespace(monotonic=time.monotonic, sleep=lambda _: time.sleep(1.5))
            original(store, name, *arguments)

        original, ranks.roll_call = ranks.roll_call, late

    assert check(tmp_path, 2, fault)[0] == 0


def other_facts(rank):
    original = facts.of_this_rank

    def changed(context, settings, error):
        found = original(context, settings, error)
        if rank == 3:
            found["versions"] |= {"torch": "1.0", "driver": "570.1"}
        if rank == 1:
            found |= {"source": "other", "config": "other"}
            found["device"] |= {"memory": 1e9}
        return found

    facts.of_this_rank = changed


def other_clock():
    shared.time = SimpleNamespace(time=lambda: time.time() - 7, monotonic=time.monotonic, sleep=time.sleep)


def other_data(kind):
    original = shared.open_records

    def opened(path, strict):
        if kind == "missing":
            raise UserError(f"{path} does not exist")
        records = original(path if kind != "other" else str(path).replace("=40", "=41"), strict)
        if kind == "flipped":
            right = records.bytes
            records.bytes = lambda i: right(i)[:-1] + bytes([right(i)[-1] ^ 1])
        return records

    shared.open_records = opened


def other_folder(place):
    """This rank has another disk at the same path: what it writes to the run's folder lands there."""
    original = shared.folder
    shared.folder = lambda watch, path, facts: original(watch, place, facts)


def slow_products():
    right, late = fabric.product, fabric.time.late(fabric.product)
    fabric.product = lambda a, b: (late if a.dtype == torch.bfloat16 else right)(a, b)


def slow_link(*pair):
    right, late = fabric.exchange, fabric.time.late(fabric.exchange)
    fabric.exchange = lambda peer, *both: (late if peer in pair else right)(peer, *both)


def test_every_fault_is_told_by_host_and_rank(tmp_path):
    def fault(rank):
        other_facts(rank)
        if rank in (2, 3):
            other_clock()
            slow_link(2, 3)
        if rank == 2:
            other_data("other")
            slow_products()

    code, found = check(tmp_path, 4, fault)
    third, second, node1 = ([3], ["node1"]), ([1], ["node0"]), ([2, 3], ["node1"])
    expected = [("versions", *third), ("versions", *third), ("source", *second), ("config", *second), ("devices", *second)]
    expected += [("clock", *node1), ("data", [2], ["node1"]), ("slow rank", [2], ["node1"]), ("slow link", *node1)]
    assert code == 1 and not found["passed"] and told(found) == expected
    text = {p["check"]: p["text"] for p in reversed(found["problems"])}
    assert text["versions"].startswith("torch is 1.0 on node1 (rank 3), ") and "bf16" in text["slow rank"]
    assert "images 82" in text["data"] and "node1 (rank 2) – node1 (rank 3) has" in text["slow link"]
    clock = found["clocks"]["node1"]
    assert abs(clock["offset_s"] + 7) <= clock["error_s"] < 1 and found["clocks"]["node0"] == {"offset_s": 0, "error_s": 0}


def test_a_folder_of_its_own_missing_data_and_a_slow_cable_are_told(tmp_path):
    def fault(rank):
        if rank == 2:
            other_folder(tmp_path / "its_own" / "disk")
        if rank == 1:
            other_data("missing")
        if rank in (0, 2):
            slow_link(0, 2)

    code, found = check(tmp_path, 3, fault, hosts=["node0", "node1", "node2"])
    expected = [("folder", [2], ["node2"]), ("data", [1], ["node1"]), ("slow link", [0, 2], ["node0", "node2"])]
    assert code == 1 and told(found) == expected
    assert "what node0 (rank 0), node1 (rank 1) wrote is not there" in found["problems"][0]["text"]
    assert sorted(os.listdir(tmp_path)) == ["run"], "neither the tokens nor the folders made for them stay"


def test_a_folder_that_cannot_be_written_and_flipped_bits_are_told(tmp_path):
    (tmp_path / "file").write_text("")

    def fault(rank):
        if rank == 1:
            other_folder(tmp_path / "file" / "below")
            other_data("flipped")

    code, found = check(tmp_path, 2, fault)
    assert code == 1 and told(found) == [("folder", [1], ["node0"]), ("data", [1], ["node0"])]
    assert "cannot be written on node0 (rank 1): Not a directory" in found["problems"][0]["text"]


def test_the_way_to_the_clock_and_back_is_taken_out():
    """The store answers rank 1 a tenth of a second late, on the way there and on the way back."""

    def work():
        store = distributed.store()
        late = SimpleNamespace(
            set=lambda key, value: time.sleep(0.1) or store.set(key, value),
            get=lambda key: (store.get(key), time.sleep(0.1))[0],
        )
        rank, gather = distributed.rank(), distributed.gather_objects
        watch = SimpleNamespace(rank=rank, store=late if rank else store, gather=gather)
        return shared.clocks(watch, ["a", "b"])

    offset, error = run_ranks(2, work)[0]["b"]
    assert error >= 0.1 and abs(offset) < error / 2


def test_a_clock_within_the_limit_is_well():
    known = [{"host": "a"}, {"host": "b"}]
    assert [p.ranks for p in shared.compare_clocks({"a": (0, 0), "b": (0.7, 0.1)}, 0.5, known)] == [[1]]
    assert shared.compare_clocks({"a": (0, 0), "b": (-0.7, 0.3)}, 0.5, known) == [], "it may be 0.4 s, for all we know"


def test_one_card_for_two_ranks_and_a_rank_left_on_the_cpu_are_told():
    def rank(host, kind, uuid, visible, wanted="auto"):
        device = {"type": kind, "name": "card", "memory": 8e9, "uuid": uuid, "visible": visible}
        return {"host": host, "device_wanted": wanted, "device": device}

    good = [rank("a", "cuda", "0", 2), rank("a", "cuda", "1", 2), rank("b", "cuda", "0", 1)]
    assert facts.devices(good) == []
    (shared_card,) = facts.devices([*good, rank("b", "cuda", "0", 1)])
    assert shared_card.ranks == [2, 3] and "b (ranks 2, 3)" in shared_card.text
    (left,) = facts.devices([rank("a", "cpu", None, 1), rank("a", "cpu", None, 1)])
    assert left.ranks == [0, 1] and "1 GPUs visible, 2 ranks" in left.text
    assert facts.devices([rank("a", "cpu", None, 1, "cpu"), rank("a", "cpu", None, 1, "cpu")]) == []


def slow_links(hosts, times):
    """Of all pairs; seconds are 1 within a host, 10 between hosts (which is as it should be), and what `times` says."""
    pairs = [pair for turn in fabric.rounds(hosts) for pair in turn]
    seconds = {p: times.get(p, 1.0 if hosts[p[0]] == hosts[p[1]] else 10.0) for p in pairs}
    links = [{"ranks": list(p), "seconds": t, "rate": 1 / t} for p, t in seconds.items()]
    return slow.slow_links(links, 1.5, [{"host": name} for name in hosts])


def test_which_links_are_slow():
    hosts = ["a", "a", "b", "b", "c", "c"]
    assert slow_links(hosts, {}) == []
    found = slow_links(hosts, {(2, 3): 5.0, (1, 4): 16.0})
    assert [p.ranks for p in found] == [[2, 3], [1, 4]]
    cable = {(a, b): 40.0 for a in range(4) for b in (4, 5)}  # host c as a whole
    found = slow_links(hosts, cable)
    assert [p.ranks for p in found] == [[4, 5]] and "every link of c (ranks 4, 5) to other hosts" in found[0].text
    three = ["a", "b", "c"]  # the slow host has two of all three links
    found = slow_links(three, {(0, 2): 40.0, (1, 2): 40.0})
    assert [p.ranks for p in found] == [[2]]


@pytest.mark.parametrize("hosts", ["a", "aaaaa", "ab", "aabbcc", "aaabbc", "abcdabcdabcdabcd"])
def test_every_pair_meets_once_in_rounds_of_disjoint_pairs(hosts):
    turns = fabric.rounds(list(hosts))
    pairs = [pair for turn in turns for pair in turn]
    assert sorted(pairs) == sorted((a, b) for b in range(len(hosts)) for a in range(b))
    for turn in turns:
        assert len({rank for pair in turn for rank in pair}) == 2 * len(turn)
        assert len({hosts[a] == hosts[b] for a, b in turn}) == 1


@pytest.mark.parametrize("world", [17, 24])
def test_many_ranks_measure_their_ring(world):
    hosts = [f"n{rank // 4}" for rank in range(world)]
    turns = fabric.rounds(hosts)
    pairs = [pair for turn in turns for pair in turn]
    assert sorted(pairs) == sorted(tuple(sorted((rank, (rank + 1) % world))) for rank in range(world)) and len(turns) <= 6
    assert all(len({rank for pair in turn for rank in pair}) == 2 * len(turn) for turn in turns)


# --- ranks that do not answer --------------------------------------------------------------------------------------


def test_a_rank_that_never_starts_is_named():
    port = free_port()

    def work():
        os.environ["MASTER_PORT"] = str(port)
        ranks.GRACE_S = 1.0
        start = time.monotonic()
        with pytest.raises((UserError, SystemExit)) as error:
            ranks.meet(distributed.rank(), 3, timeout_s=0.7)
        return str(error.value), time.monotonic() - start

    (message, seconds), (other, _) = run_ranks(2, work)
    assert message == "1 of 3 ranks did not come to 'start' within 0.7 s: rank 2 (it never came)" and seconds < 20
    assert other == "2", "the main rank has told it"


def test_nobody_at_the_address_is_told():
    port = free_port()

    def work():
        os.environ["MASTER_PORT"] = str(port)
        with pytest.raises(UserError) as error:
            ranks.meet(1, 2, timeout_s=0.5)
        return str(error.value)

    assert f"cannot reach 127.0.0.1:{port}, where the ranks meet, within 0.5 s" in run_ranks(1, work)[0]


def test_a_rank_that_stays_away_or_hangs_is_named(capfd):
    def watch():
        ranks.GRACE_S = 0.3
        ranks.host = lambda: f"node{distributed.rank()}"
        context = SimpleNamespace(rank=distributed.rank(), world_size=2)
        return ranks.Watch(context, 0.7)

    def away():
        seen = watch()
        with seen.phase("facts"):
            pass
        if seen.rank == 1:
            time.sleep(1.5)
            return None
        with pytest.raises(UserError) as error:
            with seen.phase("clock"):
                pass
        return str(error.value)

    message, _ = run_ranks(2, away)
    assert message == "1 of 2 ranks did not come to 'clock' within 0.7 s: rank 1 (node1)"

    def hangs():
        seen = watch()
        with seen.phase("links"):
            if seen.rank == 1:
                time.sleep(30)
            seen.at("links, round 1")
            distributed.barrier()

    with pytest.raises(AssertionError, match="died with exit code 1"):
        run_ranks(2, hangs, timeout=20)
    assert "error: 'links' has not ended within 0.7 s; behind: rank 1 (node1) in 'links'" in capfd.readouterr().err


def test_a_config_that_one_rank_lacks_is_told():
    def work():
        ranks.host = lambda: HOSTS[distributed.rank()]
        arguments = ["nowhere.yaml"] if distributed.rank() == 2 else []
        try:
            preflight(arguments)
        except UserError as error:
            return str(error)
        except SystemExit as end:
            return end.code

    assert run_ranks(3, work) == ["config file nowhere.yaml does not exist, on node1 (rank 2) alone", 2, 2]


# --- disk and command ----------------------------------------------------------------------------------------------

MEMORY = ("prototypes.source=memory", "data.sampler.name=mixed", "prototypes.memory.size=31", "optimizer.name=adamw")
VPL = ("prototypes.injection.weight=0.2", "prototypes.injection.start=0", "encoder.embedding_size=64")


@pytest.mark.parametrize("more", [VPL, MEMORY])
def test_the_size_of_a_checkpoint_is_known_before(tmp_path, small_set, more, monkeypatch):
    saved = {}
    monkeypatch.setattr(trainer, "write_report", lambda folder: folder)
    monkeypatch.setattr(state, "save", lambda folder, step, tensors, *rest, **options: saved.update(tensors) or folder)
    loaded = config.load([], settings(small_set, tmp_path, *more, "schedule.steps=1", "schedule.warmup_steps=0"))
    trainer.train(loaded)
    on = hardware.device("cpu")
    counted = sum(checkpoint_bytes(make_case(loaded, 1, on, hardware.fabric(None, on))).values())
    small = sum(value.nbytes for value in saved.values() if value.ndim == 0)  # step counts
    whole = sum(value.nbytes for value in saved.values())
    assert whole - small <= counted * 1.002 and counted <= whole * 1.002


def test_a_full_disk_is_told(tmp_path):
    assert facts.disk(tmp_path / "not" / "there", 1.0, 0.0)[1] is None
    free, problem = facts.disk(tmp_path, 1e18, 0.0)
    assert problem.ranks == [0] and f"has {free / 1e9:.2f} GB free, checkpoints need 1000000000.00 GB" in problem.text
    assert facts.disk(tmp_path, 1e18, 1e18)[1] is None


def test_the_command_prints_reasons_and_its_exit_code_says_so(monkeypatch):
    arguments = ["preflight", "distributed.device=cpu", "--slow-factor", "1e6", "--timeout", "60"]  # a busy machine is well

    def work():
        rank = distributed.rank()
        ranks.host = lambda: HOSTS[rank + 1]
        facts.source_hash = lambda package: str(rank)
        done = CliRunner().invoke(app, [*arguments, *([] if rank else ["--json"])])
        return done.exit_code, done.stdout

    for name, value in {"GEMM": {"fp32": 64}, "SIZES": (1 << 10,), "LINK_BYTES": 1 << 10}.items():
        monkeypatch.setattr(fabric, name, {"cpu": value})
    (code, output), (other, nothing) = run_ranks(2, work)
    found = json.loads(output)
    assert code == other == 1 and nothing == "" and told(found) == [("source", [1], ["node1"])]
    assert any(text.startswith("data") for text in found["skipped"])
    done = CliRunner().invoke(app, arguments)
    lines = done.stdout.splitlines()
    assert done.exit_code == 0 and lines[-1] == "preflight: passed" and lines[0].startswith("1 ranks on 1 hosts, single")
