"""A rank that dies, hangs or fails: the others end within a bound, and name it and the collective it is missing from."""

import json
import os
import time

import pytest
import torch

from protomem import config, distributed, flight, trainer, watch
from protomem.errors import UserError
from tests.ranks import run_ranks

WORLD, LOST, GROUP_S = 3, 1, 3.0


def training(folder, act, at=3, timeout_s=GROUP_S):
    """Steps of two collectives on each rank; before the second one of step `at` rank LOST does `act`. Returns what ended the
    others, and after how many seconds."""
    flight._ring.clear()
    begin = time.monotonic()
    try:
        with watch.watched(folder, timeout_s, torch.device("cpu")):
            for step in range(1, 6):
                flight.at_step(step)
                distributed.all_reduce(torch.ones(4))
                if step == at:
                    begin = time.monotonic()
                    if distributed.rank() == LOST:
                        act()
                distributed.gather_rows(torch.ones(2, 3), [2] * WORLD)
            flight.at_step(None)
    except Exception as error:
        return f"{type(error).__name__}: {error}", time.monotonic() - begin
    return "", time.monotonic() - begin


def ends(tmp_path, monkeypatch, act, grace=1.0, **options):
    """(messages, seconds) of the ranks other than LOST."""
    monkeypatch.setattr(watch, "GRACE_S", grace)
    monkeypatch.setattr(watch, "LOOK_S", 0.2)

    def work():
        result = training(tmp_path, act, **options)
        (tmp_path / f"ended-{distributed.rank()}").write_text(json.dumps(result))
        os._exit(2)

    with pytest.raises(AssertionError, match="exit code"):
        run_ranks(WORLD, work, group_timeout=GROUP_S, timeout=25)
    found = [json.loads((tmp_path / f"ended-{r}").read_text()) for r in range(WORLD) if r != LOST]
    return [message for message, _ in found], [seconds for _, seconds in found]


def record(folder, rank):
    return json.loads((folder / f"flight-rank{rank}.json").read_text())



def test_a_rank_that_dies_is_named(tmp_path, monkeypatch):
    messages, seconds = ends(tmp_path, monkeypatch, lambda: os._exit(9))
    assert len(set(messages)) == 1 and messages[0].startswith("UserError: missing at all_gather (72 bytes, collective ")
    assert " of step 3: rank 1 (" in messages[0] and "gave no sign of life within 1 s" in messages[0]
    assert max(seconds) < GROUP_S + 4, seconds
    for rank in (0, 2):
        shown = record(tmp_path, rank)
        assert shown["open"]["name"] == "all_gather" and shown["open"]["step"] == 3
        assert [e["name"] for e in shown["collectives"][-3:]] == ["all_gather", "all_reduce", "all_gather"]
        assert shown["collectives"][-1]["ended_s_ago"] is None and shown["collectives"][-2]["ended_s_ago"] is not None
        assert shown["verdict"] in messages[0]


def test_rank_0_that_keeps_the_store_dies(tmp_path, monkeypatch):
    monkeypatch.setattr("tests.test_watch.LOST", 0)
    messages, seconds = ends(tmp_path, monkeypatch, lambda: os._exit(9))
    for message in messages:
        assert message.startswith("UserError: missing at all_gather (72 bytes, collective "), message
        assert " of step 3: rank 0 (" in message, message
    assert max(seconds) < GROUP_S + 4, seconds


def test_a_store_that_is_silent_does_not_hold_anybody_up(tmp_path, monkeypatch):
    """As behind a cut cable: no request is answered, none fails."""
    monkeypatch.setattr("tests.test_watch.LOST", 0)
    monkeypatch.setattr(watch.Watch, "_answer", lambda self: time.sleep(60))
    messages, seconds = ends(tmp_path, monkeypatch, lambda: os._exit(9), grace=0.3)
    for message in messages:
        assert message.startswith("UserError: missing at all_gather (72 bytes, collective ") and "rank 0 (" in message, message
    assert max(seconds) < GROUP_S + 4 and record(tmp_path, 1)["open"]["name"] == "all_gather"


def fall_asleep():
    time.sleep(60)


def test_a_rank_that_hangs_is_named_and_shows_where(tmp_path, monkeypatch):
    # Its own watch would not stir for a minute: it answers the alarm of the others, whose collective exceeds the group's limit.
    messages, seconds = ends(tmp_path, monkeypatch, fall_asleep, timeout_s=60)
    for message in messages:
        assert "missing at all_gather (72 bytes, collective " in message and "of step 3: rank 1 (" in message, message
        assert "test_watch.py:" in message and "fall_asleep" in message, message
    assert GROUP_S - 1 < min(seconds) and max(seconds) < GROUP_S + 6, seconds
    assert any("fall_asleep" in frame for frame in record(tmp_path, LOST)["stack"])  # the rank itself has said so


def test_a_rank_that_fails_says_why_to_the_others(tmp_path, monkeypatch):
    def fail():
        raise UserError("record 17 is damaged")

    messages, seconds = ends(tmp_path, monkeypatch, fail)
    for message in messages:
        assert message.startswith("UserError: rank 1 (") and message.endswith("ended with UserError: record 17 is damaged")
    assert max(seconds) < GROUP_S + 4, seconds


def test_without_progress_the_watch_ends_the_process(tmp_path, monkeypatch):
    """As on GPUs, where a collective that waits is not an error of the main thread: the group's own time-out is far away."""
    monkeypatch.setattr(watch, "GRACE_S", 1.0)
    monkeypatch.setattr(watch, "LOOK_S", 0.2)
    begin = time.monotonic()
    with pytest.raises(AssertionError):  # they end one by one; who sees another go may raise before its watch ends it
        run_ranks(WORLD, training, tmp_path, fall_asleep, 3, 1.5, timeout=25)
    assert time.monotonic() - begin < 20
    for rank in range(WORLD):
        told = record(tmp_path, rank)["verdict"]
        assert told.startswith("missing at all_gather (72 bytes, collective ") and "fall_asleep" in told, told


def test_different_collectives_are_told_apart():
    def one(number, name, size):
        entry = dict(number=number, name=name, bytes=size, step=7)
        return dict(begun=number, open=entry, idle_s=5.0, stack=["a.py:1 f"], step=7)

    records = {0: one(4, "all_reduce", 8), 1: one(4, "all_gather", 96)}
    told = watch.verdict(records, [], lambda r: f"rank {r} (h{r})", "timed out")
    assert told == (
        "the ranks are in different collectives: rank 1 (h1) is in all_gather (96 bytes), the others in all_reduce "
        "(8 bytes, collective 4) of step 7"
    )
    same = watch.verdict({0: one(4, "all_reduce", 8), 1: one(4, "all_reduce", 8)}, [], str, "cable out")
    assert same == "all ranks came to all_reduce (8 bytes, collective 4) of step 7, and it failed: cable out"


def test_a_quiet_run_is_left_alone(tmp_path):
    assert [message for message, _ in run_ranks(WORLD, training, tmp_path, lambda: time.sleep(0.1))] == [""] * WORLD
    assert not list(tmp_path.glob("flight-*"))


def test_a_users_mistake_leaves_no_records(tmp_path):
    """Nothing is left of a run that was refused, and nothing is put into a folder that another run may be using."""
    given = ["data.train=/nowhere", f"output={tmp_path / 'run'}", "schedule.steps=2", "schedule.epochs=0", "encoder.name=small"]
    with pytest.raises(AssertionError, match="/nowhere"):
        run_ranks(2, lambda: trainer.train(config.load([], given)))
    assert not (tmp_path / "run").exists()
