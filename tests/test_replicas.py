"""Ranks that are not alike are named: another configuration, another state, another speed."""

import json
import time

import pytest
import torch

from protomem import config, distributed, replicas, straggler, trainer
from protomem.encoder.compiled import compiled
from protomem.encoder.small import SmallNet
from tests.ranks import run_ranks
from tests.test_memory_training import BASE
from tests.test_training import settings

SHORT = ("schedule.steps=2", "schedule.warmup_steps=0", "checkpoint.every=0", "log.every=2")


def told(world, data, output, *more, on=None):
    """What rank 0 says when a run does not succeed; on(rank) -> further settings of that rank."""

    def work():
        trainer.train(config.load([], settings(data, output, *SHORT, *more, *(on(distributed.rank()) if on else ()))))

    with pytest.raises(AssertionError) as error:
        run_ranks(world, work)
    text = str(error.value)
    assert text.count("UserError: ") == 1, text  # one line, of one rank
    return text.split("UserError: ")[1].splitlines()[0]


def test_a_rank_with_another_configuration_is_refused(small_set, tmp_path):
    message = told(3, small_set, tmp_path, on=lambda rank: ("optimizer.lr=0.5", "train.seed=9") if rank == 2 else ())
    assert message.startswith("rank 2 (") and "was started with optimizer.lr=0.5, rank 0 with 0.004" in message
    assert not (tmp_path / "checkpoints").exists()


def test_a_rank_with_another_version_is_refused(small_set, tmp_path, monkeypatch):
    def older(rank):
        if rank == 1:
            monkeypatch.setattr(replicas.protomem, "__version__", "0.0.1")
        return ()

    message = told(2, small_set, tmp_path, on=older)
    assert message.startswith("rank 1 (") and "protomem's version=0.0.1" in message


def one_flipped_bit(monkeypatch, which):
    """After step 2, rank 1 has one other bit in the tensor that which(run) returns."""
    step = trainer.Run._one_step

    def disturbed(run, batch):
        stats = step(run, batch)
        if run.step == 2 and distributed.rank() == 1:
            flat = which(run).data.view(-1)
            flat.view(torch.int32 if flat.element_size() == 4 else torch.int64)[3] ^= 1
        return stats

    monkeypatch.setattr(trainer.Run, "_one_step", disturbed)


def test_one_flipped_bit_in_the_encoder_is_found(small_set, tmp_path, monkeypatch):
    one_flipped_bit(monkeypatch, lambda run: run.encoder.state_dict()[weight_name(run.encoder)])
    message = told(3, small_set, tmp_path, "distributed.check_every=2")
    assert message.startswith("step 2: encoder.") and " on rank 1 (" in message and "(1 of " in message, message


def weight_name(encoder):
    return list(dict(encoder.named_parameters()))[-1]


def test_one_flipped_bit_in_the_memorys_bookkeeping_is_found(small_set, tmp_path, monkeypatch):
    one_flipped_bit(monkeypatch, lambda run: run.prototypes.slots.written)
    message = told(2, small_set, tmp_path, *BASE, *SHORT, "prototypes.memory.check_every=0", "distributed.check_every=2")
    assert message.startswith("step 2: memory.written on rank 1 ("), message


def test_fingerprints_see_every_bit_and_its_place():
    g = torch.Generator().manual_seed(1)
    for dtype in (torch.float32, torch.bfloat16, torch.int64, torch.bool):
        base = torch.randn(50, generator=g)
        base = base > 0 if dtype == torch.bool else (base * 100).to(dtype)
        assert replicas.fingerprint(base) == replicas.fingerprint(base.clone())
        swapped = base.flip(0)
        assert replicas.fingerprint(base) != replicas.fingerprint(swapped)
    base = torch.randn(40, generator=g)
    seen = {int(replicas.fingerprint(base))}
    for place in range(40):
        for bit in range(32):
            other = base.clone()
            other.view(torch.int32)[place] ^= torch.tensor(1).to(torch.int32) << bit
            seen.add(int(replicas.fingerprint(other)))
    assert len(seen) == 1 + 40 * 32
    assert replicas.fingerprint(torch.ones(replicas.PIECE + 2)) != replicas.fingerprint(torch.ones(replicas.PIECE + 1))


def test_equal_ranks_pass_and_a_slow_one_is_named(small_set, tmp_path, monkeypatch):
    forward = SmallNet.forward

    def slow(self, *arguments):
        if self.training and distributed.rank() == 2:
            time.sleep(0.5)
        return forward(self, *arguments)

    monkeypatch.setattr(SmallNet, "forward", slow)
    monkeypatch.setattr(trainer, "write_report", lambda folder: folder)

    def work():
        more = ("distributed.check_every=1", "schedule.steps=4", "distributed.straggler=1.5")
        trainer.train(config.load([], settings(small_set, tmp_path, *SHORT, *more)))

    run_ranks(3, work)
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    (found,) = [line for line in lines if line.get("event") == "straggler" and line["step"] == 4]  # the first steps warm up
    assert found["rank"] == 2 and found["ratio"] > 1.5 and found["host"] and found["s_per_step"] > 0.5


def test_even_ranks_are_not_named():
    def work(own):
        return straggler.find(own[distributed.rank()], 10, 2.0, torch.device("cpu"))

    assert run_ranks(3, work, [9.0, 10.0, 11.0]) == [None] * 3
    assert run_ranks(3, work, [0.001, 0.001, 0.4]) == [None] * 3  # a ratio, but of nothing
    slow = run_ranks(3, work, [10.0, 25.0, 11.0])
    assert slow[0] == slow[2] and slow[0] | {"host": ""} == dict(rank=1, host="", ratio=2.27, s_per_step=2.5, usual=1.1)


@pytest.mark.parametrize("mode", ["off", "default", "graphs"])
def test_the_stopwatch_takes_whatever_runs_the_encoder(mode):
    watch = straggler.Stopwatch(torch.device("cpu"))
    timed = watch.around(compiled(torch.nn.Identity(), mode))
    if mode == "off":  # the others compile at their first call
        assert timed(3) == 3 and 0 < watch.read() < 5 and watch.read() == 0
