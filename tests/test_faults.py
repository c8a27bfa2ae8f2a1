"""What else can go wrong: full and read-only disks, data that change under a run, errors beside a checkpoint."""

import contextlib
import json
import os
import re
import resource
import shutil
import signal
import subprocess
import time
from pathlib import Path

import pytest
import torch

from protomem import checkpointing, checksums, distributed, evaluation, metrics, state, trainer
from protomem.data.pairs import write_bin
from protomem.errors import UserError
from protomem.signals import StopRequest
from protomem.trainer import train
from tests.conftest import coloured_images
from tests.ranks import run_ranks
from tests.test_kill_points import runs, steps_of  # noqa: F401  the fixture


def whole(folder):
    """Every checkpoint that is there is complete, and nothing half-written is beside it."""
    for path in state.checkpoints(folder / "checkpoints"):
        sums = state.read_info(path)["checksums"]
        checksums.verify(path, sums, sums, alone=True)
    return not list((folder / "checkpoints").glob(".writing-*"))


@pytest.fixture
def small_disk(tmp_path):
    """A file system of its own: (folder, remount(options))."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=10m", "tmpfs", str(folder)]
    if shutil.which("mount") is None or subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("may not mount a file system")
    try:
        yield folder, lambda options: subprocess.run(["mount", "-o", f"remount,{options}", str(folder)], check=True)
    finally:
        subprocess.run(["umount", "-l", str(folder)], check=True)


@pytest.mark.parametrize("asynchronous", [False, True])
def test_one_rank_that_cannot_write_ends_the_run_and_nothing_is_lost(runs, asynchronous):  # noqa: F811
    """Rank 1's files may not grow beyond 60,000 bytes from step 5 on; once they may again, the run goes on."""
    losses, sums, start = runs.of(2)
    folder, settings = runs.folder / f"limited-{asynchronous}", runs.settings(f"limited-{asynchronous}", asynchronous)
    shutil.copytree(runs.folder / start, folder, symlinks=True)

    def work():
        if os.environ["RANK"] == "1":
            resource.setrlimit(resource.RLIMIT_FSIZE, (60_000, 60_000))
        with pytest.raises(UserError) as error:
            train(settings)
        return str(error.value)

    for message in run_ranks(2, work):
        assert "step-00000006" in message and "File too large" in message and "\n" not in message
        assert message.endswith("free the disk or set another output folder")
    assert steps_of(folder) == [2, 4] and whole(folder)
    run_ranks(2, train, settings)
    assert runs.result(folder.name) == (losses, sums)


def test_a_full_disk(runs, small_disk):  # noqa: F811
    """Checkpoint and log: one clear line, what was there stays whole, and with more room the run goes on bit for bit."""
    losses, sums, start = runs.of(1)
    disk, remount = small_disk
    shutil.copytree(runs.folder / start, disk / "run", symlinks=True)
    settings = runs.settings("x", True)
    settings.output = str(disk / "run")
    used = shutil.disk_usage(disk).used
    remount(f"size={used // 1024 + 60}k")
    with pytest.raises(UserError, match="cannot write checkpoint .*step-00000006: .*No space left on device") as error:
        train(settings)
    assert "\n" not in str(error.value)
    assert steps_of(disk / "run") == [2, 4] and whole(disk / "run")
    remount("size=10m")
    train(settings)
    shutil.copytree(disk / "run", runs.folder / "after-full", symlinks=True)
    assert runs.result("after-full") == (losses, sums)
    remount("ro")
    with pytest.raises(UserError, match="run cannot be written .Read-only file system.; make room, or choose another output"):
        train(settings)
    assert steps_of(disk / "run") == [6, 8] and whole(disk / "run")


@pytest.mark.parametrize("world", [1, 2])
def test_a_disk_that_is_full_when_a_checkpoint_gets_its_marker(tmp_path, world):
    """training.json, whose presence makes a folder a checkpoint, is written last and fails: it is none, all ranks say so."""

    def opened(path, mode="r"):
        return open("/dev/full" if Path(path).name == "training.json" else path, mode)

    def work():
        def save(step):
            return state.save(tmp_path, step, {"encoder.w": torch.full((8,), float(step))}, 0, {}, keep=3)

        save(1)
        state.open = opened
        try:
            save(2)
        except UserError as error:
            message = str(error)
        finally:
            del state.open
        distributed.barrier()
        left = [p.name for p in state.checkpoints(tmp_path)], sorted(p.name for p in tmp_path.iterdir())
        distributed.barrier()
        save(2)
        return message, left

    told = "cannot write checkpoint .*step-00000002: .*No space left on device; free the disk or set another output folder"
    for message, left in run_ranks(world, work):
        assert re.fullmatch(told, message), message
        assert left == (["step-00000001"], ["last", "step-00000001"])
    assert [p.name for p in state.checkpoints(tmp_path)] == ["step-00000001", "step-00000002"]


def full(path, *_):
    with open("/dev/full", "wb", buffering=0) as file:
        file.write(b"x")


def test_a_full_disk_does_not_make_a_stopped_run_a_failure(runs, monkeypatch):  # noqa: F811
    """All is saved when `stopped` is to be written, and whoever started the run looks for that file."""
    monkeypatch.setattr(trainer, "replace_file", full)
    with StopRequest() as stop:
        os.kill(os.getpid(), signal.SIGTERM)
        assert train(runs.settings("stopped-full"), stop) is False
    assert steps_of(runs.folder / "stopped-full") == [1] and (runs.folder / "stopped-full" / "stopped").exists()


def test_a_full_disk_when_a_run_marks_its_folder_is_one_line(runs, monkeypatch):  # noqa: F811
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "job")
    monkeypatch.setattr(checkpointing, "replace_file", full)
    with pytest.raises(UserError, match="output=.*marked-full cannot be written .No space left on device.; make room"):
        train(runs.settings("marked-full"))


def test_the_log_waits_in_memory_while_the_disk_is_full(tmp_path, capsys):
    log = metrics.RunLog(tmp_path, total_steps=4, config={}, is_main=True)
    log.step(1, {"loss": 1.0})
    file, log._file = log._file, open("/dev/full", "ab", buffering=0)
    log.step(2, {"loss": 2.0})
    log.step(3, {"loss": 3.0})
    log._file = file
    log.step(4, {"loss": 4.0})
    log.close()
    assert [line["step"] for line in metrics.read_metrics(tmp_path)] == [1, 2, 3, 4]
    assert capsys.readouterr().out.count("No space left on device") == 1


def test_an_output_that_cannot_be_a_folder_is_one_line(runs, tmp_path):  # noqa: F811
    (tmp_path / "file").touch()
    settings = runs.settings("x")
    settings.output = str(tmp_path / "file" / "run")
    with pytest.raises(UserError, match="output=.*run cannot be written .*choose another output"):
        train(settings)


def rewritten(folder):
    """The set with its last byte of an image changed, as long as before."""
    data = bytearray((folder / "train.rec").read_bytes())
    data[len(data) // 2] ^= 1
    (folder / "train.rec").write_bytes(data)


def test_data_that_changed_since_the_checkpoint_are_refused(runs, tmp_path):  # noqa: F811
    shutil.copytree(runs.folder / "set", tmp_path / "set")
    settings = runs.settings("other-data")
    settings.data.train, settings.schedule.steps = str(tmp_path / "set"), 2
    train(settings)
    settings.schedule.steps = 3
    os.utime(tmp_path / "set" / "train.rec")  # the same bytes, copied later: nothing has changed
    train(settings)
    rewritten(tmp_path / "set")
    with pytest.raises(UserError, match=f"{tmp_path / 'set'} has changed since checkpoint .*step-00000003 was written"):
        train(settings)


@pytest.mark.parametrize("on_corrupt", ["error", "skip"])
def test_a_data_file_that_changes_under_the_run_is_named(runs, tmp_path, monkeypatch, on_corrupt):  # noqa: F811
    shutil.copytree(runs.folder / "set", tmp_path / "set")
    inner, rec = trainer.Run._one_step, tmp_path / "set" / "train.rec"

    def one_step(self, batch):
        if self.step == 1:
            rec.write_bytes(bytes(rec.stat().st_size))  # in place
        return inner(self, batch)

    monkeypatch.setattr(trainer.Run, "_one_step", one_step)
    settings = runs.settings(f"changing-{on_corrupt}")
    settings.data.train, settings.data.on_corrupt, settings.schedule.steps = str(tmp_path / "set"), on_corrupt, 30
    with pytest.raises(UserError, match=f"{rec} was changed while it was in use .record .*; put back what was there") as error:
        train(settings)
    assert "\n" not in str(error.value)


@contextlib.contextmanager
def slow_saves(monkeypatch):
    inner = state.save

    def save(*given, **more):
        time.sleep(0.5)
        return inner(*given, **more)

    with monkeypatch.context() as patch:
        patch.setattr(state, "save", save)
        yield patch


@pytest.mark.parametrize("end", ["error", "signal", "last step"])
def test_the_end_waits_for_an_asynchronous_checkpoint(runs, monkeypatch, end):  # noqa: F811
    inner, settings = trainer.Run._one_step, runs.settings(f"ends-{end.replace(' ', '-')}", True)
    settings.schedule.steps = 4 if end == "last step" else 8

    def one_step(self, batch):
        if self.step == 2 and end == "error":
            raise UserError("something else")
        if self.step == 2 and end == "signal":
            os.kill(os.getpid(), signal.SIGTERM)
        return inner(self, batch)

    with slow_saves(monkeypatch) as patch:
        patch.setattr(trainer.Run, "_one_step", one_step)
        with pytest.raises(UserError, match="^something else$") if end == "error" else contextlib.nullcontext():
            train(settings)
    folder = runs.folder / f"ends-{end.replace(' ', '-')}"
    assert steps_of(folder) == {"error": [2], "signal": [2, 3], "last step": [2, 4]}[end] and whole(folder)
    logged = [line for line in metrics.read_metrics(folder) if line.get("event") == "checkpoint"]
    assert [line["step"] for line in logged] == steps_of(folder)
    # Training did not wait for the first one, but for a copy of the state.
    assert logged[0]["waited_s"] < 0.5 <= logged[0]["seconds"]


def test_a_checkpoint_copied_in_part(runs):  # noqa: F811
    """Without its training.json or .metadata it is none, and the one before counts; without another file it is refused."""
    _, _, start = runs.of(1)
    folder = runs.folder / "copied"
    shutil.copytree(runs.folder / start, folder, symlinks=True)
    for name in ("training.json", ".metadata"):
        shutil.copytree(folder / "checkpoints" / "step-00000004", folder / "checkpoints" / "step-00000005")
        (folder / "checkpoints" / "step-00000005" / name).unlink()
        assert state.newest(folder / "checkpoints").name == "step-00000004"
        shutil.rmtree(folder / "checkpoints" / "step-00000005")
    next((folder / "checkpoints" / "step-00000004").glob("__0_*")).unlink()
    with pytest.raises(UserError, match="step-00000004.*a file is missing"):
        train(runs.settings("copied"))
    assert steps_of(folder) == [2, 4]  # both are still there


def test_best_is_finished_after_a_kill(tmp_path):
    """best.json was written, the link was not."""
    for step in (1, 2):
        (tmp_path / f"step-0000000{step}").mkdir()
        for name in ("training.json", ".metadata"):
            (tmp_path / f"step-0000000{step}" / name).touch()
    state.mark_best(tmp_path, tmp_path / "step-00000001", {"step": 1, "set": "lfw", "accuracy": 0.5})
    (tmp_path / "best.json").write_text(json.dumps({"step": 2, "set": "lfw", "accuracy": 0.6}))
    state.tidy(tmp_path)
    assert (tmp_path / "best").resolve().name == "step-00000002"


def test_an_evaluation_that_a_kill_prevented_is_made_up_for(runs, tmp_path, monkeypatch):  # noqa: F811
    """Killed between the last checkpoint and its evaluation; a third start finds nothing to do."""
    write_bin(tmp_path / "pairs.bin", [jpeg for jpeg, _ in coloured_images(8, 5)], [True, False] * 10)
    settings = runs.settings("unevaluated", True)
    settings.data.eval, settings.evaluate.initial, settings.schedule.steps = [str(tmp_path / "pairs.bin")], False, 4
    folder = runs.folder / "unevaluated"

    def evaluations():
        return [(line["tag"], line["step"]) for line in metrics.read_metrics(folder) if line.get("event") == "evaluation"]

    def killed(run, tag):
        raise UserError("killed")

    with monkeypatch.context() as patch, pytest.raises(UserError, match="killed"):
        patch.setattr(evaluation, "evaluate", killed)
        train(settings)
    assert steps_of(folder) == [2, 4] and evaluations() == []
    for _ in range(2):
        train(settings)
        assert evaluations() == [("final", 4)]
        assert (folder / "checkpoints" / "best").resolve().name == "step-00000004"


def test_an_evaluation_whose_checkpoint_was_not_marked_yet_is_made_up_for(runs, tmp_path, monkeypatch):  # noqa: F811
    """Killed between the evaluation's line in the log and the link to the best checkpoint."""
    write_bin(tmp_path / "pairs.bin", [jpeg for jpeg, _ in coloured_images(8, 5)], [True, False] * 10)
    settings = runs.settings("unmarked")
    settings.data.eval, settings.evaluate.initial, settings.schedule.steps = [str(tmp_path / "pairs.bin")], False, 4

    def killed(*_):
        raise UserError("killed")

    with monkeypatch.context() as patch, pytest.raises(UserError, match="killed"):
        patch.setattr(state, "mark_best", killed)
        train(settings)
    folder = runs.folder / "unmarked" / "checkpoints"
    assert not (folder / "best").exists()
    train(settings)
    assert (folder / "best").resolve().name == "step-00000004" and (folder / "best.json").is_file()
