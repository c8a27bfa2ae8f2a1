"""A run that is killed at any point, also within the writing of a checkpoint, goes on from the newest complete one, and
ends with the losses and the bytes of a run that nobody killed.

Runs are ranks forked from this process. One starts from a checkpoint of step 4 (that of step 2 is there, too), kills
itself within the save of step 6, which also removes that of step 2, and a second one goes on to step 8.
"""

import json
import multiprocessing as mp
import os
import resource
import shutil
import signal
import sys
import time

import pytest
import torch

from protomem import checksums, config, metrics, state, trainer
from protomem.data.recordio import RecordWriter
from protomem.trainer import train
from tests.conftest import coloured_images
from tests.ranks import free_port, rank_env, run_ranks
from tests.test_training import curve

MUTATING = ("os.mkdir", "os.rename", "os.rmdir", "os.symlink")
# What rank 0 of two does to the file system in a save, in its order. A test holds it against what really happens.
SAVE = [
    "mkdir .writing-step-00000006",
    "mkdir .writing-step-00000006",  # DCP makes sure
    "open __0_0.distcp",
    "open .metadata.tmp",
    "rename .metadata.tmp",
    "open training.json",
    "rename .writing-step-00000006",
    "symlink .last.new",
    "rename .last.new",
    "rename step-00000002",
    "remove 1",
    "remove 2",
    "remove 3",
    "remove 4",
    "rmdir .removed-step-00000002",
]


def operations(note):
    """Call `note("verb name")` before every change that this process makes to checkpoints, and to the log as a whole."""
    removed = 0

    def hook(event, arguments):
        nonlocal removed
        if event == "open" and isinstance(arguments[0], str) and "/checkpoints/" in arguments[0]:
            if arguments[2] & (os.O_WRONLY | os.O_RDWR):
                note(f"open {os.path.basename(arguments[0])}")
        elif event == "os.remove":
            if arguments[1] != -1:  # relative to an open folder: shutil.rmtree, in the order of the file system
                removed += 1
                note(f"remove {removed}")
        elif event in MUTATING:
            path = os.fspath(arguments[1] if event == "os.symlink" else arguments[0])
            if "/checkpoints/" in path or "metrics.jsonl" in path:
                note(f"{event[3:]} {os.path.basename(path).split('-')[0] if 'metrics' in path else os.path.basename(path)}")

    sys.addaudithook(hook)


def kill_self():
    os.kill(os.getpid(), signal.SIGKILL)


def at_operation(rank, wanted, own):
    if rank == own:
        operations(lambda name: name == wanted and kill_self())


def at_byte(rank, size, own):
    """The kernel ends the process at this byte of any file."""
    if rank == own:
        signal.signal(signal.SIGXFSZ, signal.SIG_DFL)
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))


def at_step(rank, step, own):
    inner = trainer.Run._one_step

    def one_step(self, batch):
        out = inner(self, batch)
        if self.step == step and rank == own:
            kill_self()
        return out

    trainer.Run._one_step = one_step


def in_a_line(rank, step, own):
    """Half of the line of this step stands in metrics.jsonl."""
    inner = metrics.RunLog._write

    def write(self, record):
        if record.get("step") == step:
            self._file.write(json.dumps(record)[:40].encode())
            kill_self()
        inner(self, record)

    metrics.RunLog._write = write


def in_the_copy(rank, number, own):
    """Of the state, for an asynchronous checkpoint, before tensor `number`."""
    inner, calls = torch.empty_like, 0

    def empty_like(*given, **more):
        nonlocal calls
        calls += rank == own and "pin_memory" in more
        return kill_self() if calls == number else inner(*given, **more)

    torch.empty_like = empty_like


def child(settings, rank, world, port, arm):
    os.environ.update(rank_env(rank, world, port, world))
    torch.set_num_threads(1)  # a pool of threads does not survive the fork: more would wait for it for ever
    arm[0](*arm[1:], rank)
    train(settings)
    os._exit(0)


def run_and_kill(world, settings, arm):
    """The ranks of a run of which one kills itself; then the others are killed, as a launcher does. Whether one did."""
    context, port = mp.get_context("fork"), free_port()
    ranks = [context.Process(target=child, args=(settings, r, world, port, arm)) for r in range(world)]
    for process in ranks:
        process.start()
    end = time.monotonic() + 60
    while all(p.is_alive() for p in ranks) and time.monotonic() < end:
        time.sleep(0.005)
    codes = [p.exitcode for p in ranks]
    for process in ranks:
        process.kill()
        process.join()
    return codes[arm[1]] in (-signal.SIGKILL, -signal.SIGXFSZ)


class Runs:
    """A tiny set, its runs, and for each world size the run that nobody kills."""

    def __init__(self, folder):
        self.folder, self.whole = folder, {}
        with RecordWriter(folder / "set") as writer:
            for jpeg, label in coloured_images(8, 4):
                writer.add(jpeg, label)
        lines = (
            f"output={folder / 'x'} data.train={folder / 'set'} data.size=32 data.threads=1 data.loader=torch "
            "encoder.name=small encoder.embedding_size=8 optimizer.lr=0.01 train.batch_size=8 schedule.epochs=0 schedule.steps=8 "
            "schedule.decay=constant checkpoint.every=2 checkpoint.keep=2 log.every=1"
        )
        self.loaded = config.load([], lines.split())
        train(self.settings("warm"))  # what is imported and compiled here, no rank does again

    def settings(self, name, asynchronous=False):
        out = self.loaded.copy()
        out.output, out.checkpoint.asynchronous = str(self.folder / name), asynchronous
        return out

    def of(self, world):
        """(losses, checksums of the last checkpoint, folder as it is after step 4) of a run on `world` ranks."""
        if world not in self.whole:
            assert run_and_kill(world, self.settings(f"start-{world}"), (at_step, 0, 6))  # with step 5 in its log
            settings = self.settings(f"whole-{world}")
            run_ranks(world, train, settings)
            self.whole[world] = (*self.result(f"whole-{world}"), f"start-{world}")
        return self.whole[world]

    def result(self, name):
        path = state.newest(self.folder / name / "checkpoints")
        sums = state.read_info(path)["checksums"]
        return curve(self.folder / name), {k: v for k, v in sums.items() if k != ".metadata"}


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(trainer, "write_report", lambda folder: "none")
        yield Runs(tmp_path_factory.mktemp("runs"))


def steps_of(folder):
    return [int(path.name[5:]) for path in state.checkpoints(folder / "checkpoints")]


LOG = "rename metrics.jsonl.tmp"  # a resumed run drops the lines of lost steps
SOME = ["mkdir .writing-step-00000006", "open .metadata.tmp", "rename .writing-step-00000006", "rename .last.new", "remove 2"]
POINTS = [
    *((1, False, at_operation, 0, name) for name in (*SOME, LOG)),
    *((2, False, at_operation, 0, name) for name in dict.fromkeys(SAVE)),
    (2, False, at_operation, 1, "open __1_0.distcp"),
    *((2, False, at_byte, rank, size) for rank in (0, 1) for size in (30_000, 60_000)),
    (1, False, at_step, 0, 7),
    (2, False, at_step, 1, 5),
    (2, False, in_a_line, 0, 6),
    *((2, True, at_operation, 0, name) for name in SOME),
    (2, True, at_operation, 1, "open __1_0.distcp"),
    (2, True, at_byte, 1, 60_000),
    (2, True, in_the_copy, 0, 9),
    (2, True, at_step, 1, 7),
]


def name_of(point):
    world, asynchronous, kind, rank, where = point
    return f"{world}-{'asynchronous' if asynchronous else 'synchronous'}-rank {rank}-{kind.__name__} {where}".replace(" ", "_")


@pytest.mark.parametrize("point", POINTS, ids=name_of)
def test_no_checkpoint_is_lost_and_no_curve_diverges(runs, point):
    world, asynchronous, *arm = point
    losses, sums, start = runs.of(world)
    name = name_of(point)
    folder, settings = runs.folder / name, runs.settings(name, asynchronous)
    shutil.copytree(runs.folder / start, folder, symlinks=True)
    assert steps_of(folder) == [2, 4]
    assert run_and_kill(world, settings, arm), "it was not killed"
    left = steps_of(folder)
    # Step 6 is there as soon as it has its name, and step 4 is never gone.
    assert 4 in left and max(left) <= 6
    for path in state.checkpoints(folder / "checkpoints"):  # and what is there is whole
        sums_of_all = state.read_info(path)["checksums"]
        checksums.verify(path, sums_of_all, sums_of_all, alone=True)
    run_ranks(world, train, settings)
    resumes = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines() if '"resume"' in line]
    assert resumes[-1]["step"] == max(left)
    assert runs.result(name) == (losses, sums)
    assert sorted(p.name for p in (folder / "checkpoints").iterdir()) == ["last", "step-00000006", "step-00000008"]
    assert (folder / "checkpoints" / "last").resolve().name == "step-00000008"
    assert not list(folder.glob("*.tmp-*"))
    shutil.rmtree(folder)


def test_these_are_all_operations_of_a_save(runs):
    """In the order above, and at each of them the newest complete checkpoint is step 4, or 6 once it has its name."""
    _, _, start = runs.of(2)
    folder = runs.folder / "watched"
    shutil.copytree(runs.folder / start, folder, symlinks=True)

    def watched():
        seen = []

        def note(name):
            if os.environ["RANK"] == "0":
                seen.append((name, state.newest(folder / "checkpoints").name))

        operations(note)
        settings = runs.settings("watched")
        settings.schedule.steps = 6
        train(settings)
        return seen

    seen, _ = run_ranks(2, watched)
    assert seen.pop(0) == (LOG, "step-00000004")
    assert [name for name, _ in seen] == SAVE
    renamed = SAVE.index("rename .writing-step-00000006")
    assert [newest for _, newest in seen] == ["step-00000004"] * (renamed + 1) + ["step-00000006"] * (len(SAVE) - renamed - 1)
