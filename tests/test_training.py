"""The whole trainer: the same curve at every world size, and after a kill at any point."""

import json
import os
import signal
import subprocess
import sys
import time
import types

import pytest
import torch

from protomem import checkpointing, config, distributed, evaluation, interval, state, trainer
from protomem.errors import UserError
from protomem.trainer import train
from tests.ranks import run_ranks


def settings(data, output, *more):
    """A run whose encoder does not depend on how the batch is split: its BatchNorms use their running statistics.

    The learning rate is moderate, since a network of ReLUs that is driven hard turns the 1e-7 of float32 rounding into
    1e-4 within 60 steps, whoever computes it.
    """
    return [
        f"output={output}",
        f"data.train={data}",
        "data.size=32",
        "data.threads=1",
        "data.augment.photometric=0.5",
        "encoder.name=small",
        "encoder.embedding_size=16",
        "encoder.freeze_statistics=true",
        "margin.scale=16",
        "optimizer.lr=0.004",
        "optimizer.clip=1",
        "train.batch_size=24",
        "schedule.epochs=0",
        "schedule.steps=60",
        "schedule.warmup_steps=6",
        "checkpoint.every=20",
        "log.every=1",
        *more,
    ]


def run(world, data, output, *more, timeout=300):
    def work():
        train(config.load([], settings(data, output, *more)))

    run_ranks(world, work, timeout=timeout)
    return curve(output)


def curve(output) -> dict[int, float]:
    lines = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    return {line["step"]: line["loss"] for line in lines if "loss" in line}


def assert_close(a: dict, b: dict, tolerance: float):
    assert sorted(a) == sorted(b)
    worst = max(abs(a[k] - b[k]) / abs(b[k]) for k in a)
    assert worst <= tolerance, f"curves differ by {worst:.2g}"


@pytest.fixture(scope="module")
def reference(small_set, tmp_path_factory):
    """60 uninterrupted steps of one process."""
    return run(1, small_set, tmp_path_factory.mktemp("reference"))


@pytest.mark.parametrize("world", [2, 4])
def test_same_curve_at_every_world_size(world, small_set, tmp_path, reference):
    assert_close(run(world, small_set, tmp_path), reference, 1e-4)
    assert reference[60] < 0.8 * reference[1]  # and it is a curve of something that learns


def test_same_curve_with_a_vit_and_adamw(small_set, tmp_path):
    more = ("encoder.name=vit_t", "encoder.freeze_statistics=false", "optimizer.name=adamw", "optimizer.lr=0.0005")
    more += ("optimizer.clip=0", "schedule.steps=20")
    alone = run(1, small_set, tmp_path / "alone", *more)
    assert_close(run(2, small_set, tmp_path / "two", *more), alone, 1e-4)
    assert alone[20] < 0.7 * alone[1]


def test_accumulated_micro_batches_equal_the_large_batch(small_set, tmp_path, reference):
    assert_close(run(2, small_set, tmp_path, "train.accumulate=3"), reference, 1e-4)


def test_dense_equals_blocked(small_set, tmp_path, reference):
    assert_close(run(1, small_set, tmp_path, "head.backend=dense"), reference, 1e-4)


def start_ranks(world, data, output, *more):
    command = ["launch/local.sh", str(world), *settings(data, output, *more)]
    env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHON": sys.executable}
    return subprocess.Popen(command, env=env, start_new_session=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)


def kill_at(process, output, step):
    """SIGKILL the whole job as soon as its log shows `step`."""
    deadline = time.monotonic() + 240
    while time.monotonic() < deadline and process.poll() is None:
        if (output / "metrics.jsonl").exists() and max(curve(output), default=0) >= step:
            break
        time.sleep(0.05)
    assert process.poll() is None, process.stdout.read().decode()[-3000:]
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    process.stdout.close()


@pytest.mark.parametrize("world", [1, 2, 4])
def test_kill_9_and_resume_bit_for_bit(world, small_set, tmp_path):
    """Killed in mid-epoch (10 steps an epoch, checkpoints every 13), resumed at the same world size."""
    more = ("checkpoint.every=13", "schedule.steps=40")
    whole = run(world, small_set, tmp_path / "whole", *more)
    kill_at(start_ranks(world, small_set, tmp_path / "killed", *more), tmp_path / "killed", 17)
    resumed = run(world, small_set, tmp_path / "killed", *more)
    assert resumed == whole


def test_resume_at_other_world_sizes(small_set, tmp_path, reference):
    """4 ranks are killed, 2 go on and are killed, 3 finish: the uninterrupted curve of one process."""
    for world, step in ((4, 23), (2, 45)):
        kill_at(start_ranks(world, small_set, tmp_path), tmp_path, step)
    assert_close(run(3, small_set, tmp_path), reference, 1e-4)


def test_sampled_shards_resume_with_their_momentum(small_set, tmp_path):
    more = ("prototypes.source=sampled", "prototypes.rate=0.5", "schedule.steps=24", "checkpoint.every=10")
    whole = run(2, small_set, tmp_path / "whole", *more)
    run(2, small_set, tmp_path / "cut", *more, "schedule.steps=24")
    for path in state.checkpoints(tmp_path / "cut" / "checkpoints")[1:]:  # as if killed after step 10
        subprocess.run(["rm", "-r", path], check=True)
    assert run(2, small_set, tmp_path / "cut", *more) == whole


def test_sub_centers_resume_at_other_world_sizes(small_set, tmp_path):
    """Identities move to other ranks with all of their prototypes; another number of these is refused."""
    more = ("prototypes.sub_centers=3", "margin.name=arcface", "prototypes.empirical.enabled=true", "schedule.decay=constant")
    more += ("prototypes.empirical.start_epoch=0",)
    whole = run(1, small_set, tmp_path / "whole", *more, "schedule.steps=20")
    for world, steps in ((3, 8), (2, 20)):
        run(world, small_set, tmp_path / "parts", *more, f"schedule.steps={steps}")
    assert_close(curve(tmp_path / "parts"), whole, 1e-4)
    with pytest.raises(UserError, match="made with sub_centers=3, this run has 2"):
        train(config.load([], settings(small_set, tmp_path / "whole", *more, "prototypes.sub_centers=2", "schedule.steps=40")))


def test_checkpoint_of_other_data_or_model_is_refused(small_set, tmp_path):
    run(1, small_set, tmp_path, "schedule.steps=2", "schedule.warmup_steps=0")
    for change, message in (
        ("train.batch_size=31", "made with batch_size=24, this run has 31"),
        ("encoder.embedding_size=8", "is .* there, .* in this run"),
        ("optimizer.name=adamw", "made with optimizer=sgd, this run has adamw"),
    ):
        with pytest.raises(UserError, match=message):
            train(config.load([], settings(small_set, tmp_path, "schedule.steps=4", "schedule.warmup_steps=0", change)))


def test_nan_weights_are_never_saved(small_set, tmp_path, monkeypatch):
    """The loss of step 3 is finite, its update is not: step 3 is not saved, and step 2 goes on."""
    step = trainer.Run._one_step

    def poisoned(self, batch):
        stats = step(self, batch)
        if self.step == 3:
            with torch.no_grad():
                next(self.encoder.parameters()).fill_(float("nan"))
        return stats

    more = ("checkpoint.every=1", "schedule.steps=5", "schedule.warmup_steps=0")
    with monkeypatch.context() as patch, pytest.raises(UserError, match="by step 3; the checkpoint of step 2 is intact"):
        patch.setattr(trainer.Run, "_one_step", poisoned)
        train(config.load([], settings(small_set, tmp_path, *more)))
    assert [path.name for path in state.checkpoints(tmp_path / "checkpoints")] == ["step-00000001", "step-00000002"]
    assert sorted(run(1, small_set, tmp_path, *more)) == [1, 2, 3, 4, 5]


def test_a_nan_loss_stops(small_set, tmp_path):
    more = ("checkpoint.every=0", "optimizer.lr=1e30", "schedule.warmup_steps=0", "schedule.decay=constant", "optimizer.clip=0")
    with pytest.raises(UserError, match="NaN or infinite by step 2; nothing was saved"):
        train(config.load([], settings(small_set, tmp_path, *more)))


def test_fp16_follows_fp32_and_resumes_its_loss_scale(small_set, tmp_path):
    more = ("encoder.precision=fp16", "schedule.steps=12", "checkpoint.every=6", "log.every=1", "train.accumulate=2")
    half = run(2, small_set, tmp_path / "half", *more)
    whole = run(2, small_set, tmp_path / "whole", *more, "encoder.precision=fp32")
    assert_close(half, whole, 0.1)  # steps 1 and 6 overflow and are skipped, on both ranks alike
    scale = [json.loads(line).get("loss_scale") for line in (tmp_path / "half" / "metrics.jsonl").read_text().splitlines()]
    assert 65536 in scale
    subprocess.run(["rm", "-r", *map(str, state.checkpoints(tmp_path / "half" / "checkpoints")[1:])], check=True)
    assert run(2, small_set, tmp_path / "half", *more) == half


def test_resume_none_refuses_a_folder_with_a_run_and_a_path_starts_from_it(small_set, tmp_path):
    more = ("schedule.steps=4", "schedule.warmup_steps=0", "checkpoint.every=2")
    first = run(1, small_set, tmp_path / "first", *more)
    with pytest.raises(UserError, match="holds a run"):
        train(config.load([], settings(small_set, tmp_path / "first", *more, "checkpoint.resume=none")))
    start = state.checkpoints(tmp_path / "first" / "checkpoints")[0]
    second = run(1, small_set, tmp_path / "second", *more, f"checkpoint.resume={start}")
    assert second == {k: first[k] for k in (3, 4)}


def test_two_pair_sets_of_one_name_and_an_unknown_best_are_refused(small_set, tmp_path):
    for folder in ("a", "b"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "lfw.bin").touch()
    both = f"data.eval=[{tmp_path / 'a' / 'lfw.bin'},{tmp_path / 'b' / 'lfw.bin'}]"
    one = f"data.eval=[{tmp_path / 'a' / 'lfw.bin'}]"
    for given, message in (([both], "two sets are called lfw"), ([one, "checkpoint.best=lfv"], "checkpoint.best=lfv is not")):
        with pytest.raises(UserError, match=message):
            train(config.load([], settings(small_set, tmp_path / "run", *given)))


def test_sigterm_saves_and_resumes(small_set, tmp_path):
    more = ("checkpoint.every=0", "schedule.steps=40", "log.every=1")
    process = start_ranks(2, small_set, tmp_path, *more)
    deadline = time.monotonic() + 240
    while max(curve(tmp_path), default=0) < 8 if (tmp_path / "metrics.jsonl").exists() else True:
        assert time.monotonic() < deadline and process.poll() is None
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=120)
    (path,) = state.checkpoints(tmp_path / "checkpoints")
    assert 8 <= state.read_info(path)["step"] < 40
    run(2, small_set, tmp_path, *more)
    assert sorted(curve(tmp_path)) == list(range(1, 41))


def test_config_errors_are_raised_before_training(small_set, tmp_path):
    for text, message in (
        ("train.batch_size=1000", "1000 cannot be drawn from 248 images"),
        ("schedule.warmup_steps=100", "warmup_steps=100"),
        ("data.eval=[nowhere.bin]", "nowhere.bin does not exist"),
        ("margin.m1=2", "has no effect on margin.name=cosface"),
        ("checkpoint.resume=/nowhere", "no complete checkpoint"),
    ):
        with pytest.raises(UserError, match=message):
            train(config.load([], settings(small_set, tmp_path, text)))


def test_a_slow_loader_shows_as_waiting(monkeypatch):
    """By a clock that only the test moves: 3 s for each batch on rank 1, none on rank 0, then 1 s of training; evaluating does
    not count."""

    def work():
        now = [100.0]
        monkeypatch.setattr(interval.time, "monotonic", lambda: now[0])
        slow = distributed.rank() == 1

        def batches():
            for k in range(4):
                now[0] += 3.0 * slow
                yield k

        shown, world = [], distributed.world_size()
        run = trainer.Run.__new__(trainer.Run)
        run.context = distributed.Context(distributed.rank(), world, 0, torch.device("cpu"), "torchrun")
        run.device, run.finite, run.memory = run.context.device, torch.ones(()), None
        run.step, run.epoch_steps, run.total = 1, 4, 9
        run.log = types.SimpleNamespace(step=lambda step, values: shown.append({k: float(v) for k, v in values.items()}))
        interval.begin(run)
        monkeypatch.setattr(interval, "_find_straggler", lambda run: None)
        run.config = config.load([], settings("x", "y", "evaluate.every=1", "data.eval=[z]", "checkpoint.every=0"))
        run.sets = {"z": "z.bin"}
        monkeypatch.setattr(evaluation, "evaluate", lambda run, tag: now.__setitem__(0, now[0] + 50.0))
        monkeypatch.setattr(evaluation, "_improved", lambda run, results: False)
        for _ in interval.timed(run, batches()):
            now[0] += 1.0 + 3.0 * (not slow)  # rank 0 waits for rank 1 inside its step
            run.interval["images"] += 24
            run.interval["skipped"] += 1
            interval.report(run, {})
            run._periodic()
        return shown

    expected = {"epoch": 0.25, "images_per_s": 6.0, "data_wait": 0.75, "skipped_images": 2.0}
    assert run_ranks(2, work) == [[expected] * 4] * 2


@pytest.mark.parametrize(
    "job, mark, restarts, ours",
    [("a", "a", 1, True), ("a", "b", 1, False), ("a", None, 1, False), ("a", "a", 0, False), ("", "", 1, False)],
)
def test_resume_none_goes_on_only_with_the_job_that_began(tmp_path, monkeypatch, job, mark, restarts, ours):
    """A run that was refused and then restarted by torchrun is refused again; a requeued one goes on."""
    for name in ("SLURM_JOB_ID", "PROTOMEM_ELASTIC", "TORCHELASTIC_RUN_ID"):
        monkeypatch.delenv(name, raising=False)
    if job:
        monkeypatch.setenv("TORCHELASTIC_RUN_ID", job)
    if mark is not None:
        (tmp_path / ".job").write_text(mark)
    assert checkpointing._begun_by_this_job(tmp_path / ".job", restarts > 0) == ours
    monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
    assert checkpointing._begun_by_this_job(tmp_path / ".job", False) == (ours or (job == mark == "a"))


def test_resume_none_under_a_launcher(small_set, tmp_path, monkeypatch):
    more = ("schedule.warmup_steps=0", "checkpoint.every=2", "checkpoint.resume=none")

    def start(job, restarts, steps):
        monkeypatch.setenv("TORCHELASTIC_RUN_ID", job)
        monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", str(restarts))
        train(config.load([], settings(small_set, tmp_path / "run", *more, f"schedule.steps={steps}")))

    start("a", 0, 2)
    start("a", 1, 4)
    assert [p.name for p in state.checkpoints(tmp_path / "run" / "checkpoints")][-1] == "step-00000004"
    for restarts in (0, 1):  # refused, restarted by torchrun, and refused again
        with pytest.raises(UserError, match="holds a run"):
            start("b", restarts, 6)
