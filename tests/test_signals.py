"""What `protomem train` does when it is asked to stop, and the code it exits with."""

import json
import multiprocessing as mp
import os
import signal
import sys

import pytest
import torch._dynamo  # noqa: F401  DDP imports it on first use; done once here instead of in every fork

from protomem import cli, config, state, trainer
from protomem.signals import STOPPED, StopRequest
from tests.test_training import curve, settings


def command(arguments, prepare, env):
    """Run `protomem train ...` in a fork, after `prepare()`; returns its exit code."""

    def work():
        os.environ.update(env)
        sys.argv = ["protomem", "train", *arguments]
        prepare()
        cli.main()

    child = mp.get_context("fork").Process(target=work)
    child.start()
    child.join(120)
    assert child.exitcode is not None
    return child.exitcode


def events(output) -> list[str]:
    lines = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    return [line["event"] for line in lines if "event" in line]


@pytest.mark.parametrize("env, stopped", [({}, STOPPED), ({"RANK": "0", "WORLD_SIZE": "1"}, 0)])
def test_signals_before_and_while_it_saves(env, stopped, small_set, tmp_path):
    """Stopped by one signal, hit by all others, twice each, while it writes: one whole checkpoint, and its exit code."""
    arguments = settings(small_set, tmp_path, "schedule.steps=6", "schedule.warmup_steps=0", "checkpoint.every=0")
    save = state.save

    def hit(*args, **kwargs):
        for number in (signal.SIGINT, signal.SIGUSR1, signal.SIGTERM) * 2:
            os.kill(os.getpid(), number)
        return save(*args, **kwargs)

    def prepare():
        state.save, step = hit, trainer.Run._one_step

        def third(self, batch):
            stats = step(self, batch)
            if self.step == 3:
                os.kill(os.getpid(), signal.SIGUSR1)
            return stats

        trainer.Run._one_step = third

    assert command(arguments, prepare, env) == stopped
    assert (tmp_path / "stopped").read_text() == "at step 3 of 6 by SIGUSR1\n"
    assert [p.name for p in state.checkpoints(tmp_path / "checkpoints")] == ["step-00000003"]
    assert events(tmp_path) == ["checkpoint", "stopped"]
    if env:
        return

    assert command(arguments, lambda: None, env) == 0
    assert sorted(curve(tmp_path)) == list(range(1, 7)) and events(tmp_path)[-1] == "report"
    assert not (tmp_path / "stopped").exists()


def test_a_signal_while_torch_is_imported_is_not_lost(small_set, tmp_path):
    with StopRequest() as stop:
        os.kill(os.getpid(), signal.SIGTERM)
        assert trainer.train(config.load([], settings(small_set, tmp_path)), stop) is False
    assert (tmp_path / "stopped").read_text() == "at step 1 of 60 by SIGTERM\n"
    assert [p.name for p in state.checkpoints(tmp_path / "checkpoints")] == ["step-00000001"]


def test_an_error_exits_with_2_and_a_second_interrupt_interrupts(tmp_path):
    assert command(["output=x", "data.train=/nowhere"], lambda: os.chdir(tmp_path), {}) == 2
    before = signal.getsignal(signal.SIGINT)
    with StopRequest() as stop, pytest.raises(KeyboardInterrupt):
        for _ in range(3):
            os.kill(os.getpid(), signal.SIGTERM)
            os.kill(os.getpid(), signal.SIGUSR1)
        os.kill(os.getpid(), signal.SIGINT)
        assert stop.noted.count(signal.SIGINT) == 1
        os.kill(os.getpid(), signal.SIGINT)
    assert signal.getsignal(signal.SIGINT) == before
