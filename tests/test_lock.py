"""One run at a time in an output folder: who waits for how long, and who is refused."""

import multiprocessing as mp
import os
import signal
import time

import pytest

from protomem import distributed, lock
from protomem.errors import UserError
from tests.ranks import run_ranks


def hold(folder, held):
    with lock.one_run(folder, 1):
        held.set()
        time.sleep(60)


def test_a_second_run_in_the_same_folder_waits_and_is_refused(tmp_path, monkeypatch, capsys):
    """While the first lives; as soon as it is killed, the second goes on. Nothing stays of a run that wrote nothing."""
    context, folder = mp.get_context("fork"), tmp_path / "run"
    held = context.Event()
    first = context.Process(target=hold, args=(folder, held))
    first.start()
    try:
        assert held.wait(60)
        monkeypatch.setattr(lock, "PATIENCE_S", 0.1)
        with pytest.raises(UserError, match=f"run is in use by process {first.pid} on .*; end it, or choose another output"):
            with lock.one_run(folder, 1):
                pass
        monkeypatch.setattr(lock, "PATIENCE_S", 60)
        signal.signal(signal.SIGALRM, lambda *_: os.kill(first.pid, signal.SIGKILL))
        signal.setitimer(signal.ITIMER_REAL, 0.3)
        with lock.one_run(folder, 600):
            assert not first.is_alive() and str(os.getpid()) in (folder / ".lock").read_text()
        assert capsys.readouterr().out.count("waiting up to 60 s") == 1
    finally:
        first.kill()
        first.join()
    assert list(folder.iterdir()) == []
    with lock.one_run(tmp_path / "new" / "run", 1):
        pass
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize(
    "timeout_s, counts, expected_s",
    [
        (600, [{}, {}], 20),
        (600, [{"TORCHELASTIC_RESTART_COUNT": "0", "SLURM_RESTART_COUNT": "0"}] * 2, 20),
        (10, [{}, {}], 8),  # the other ranks wait in a collective
        (600, [{"TORCHELASTIC_RESTART_COUNT": "2"}] * 2, 480),
        (600, [{"SLURM_RESTART_COUNT": "1"}] * 2, 480),
        (600, [{}, {"TORCHELASTIC_RESTART_COUNT": "1"}], 480),  # rank 0 is on a machine that came back
    ],
)
def test_a_job_that_was_started_again_waits_for_ranks_that_were_cut_off(tmp_path, timeout_s, counts, expected_s):
    def work():
        for name in ("TORCHELASTIC_RESTART_COUNT", "SLURM_RESTART_COUNT"):
            os.environ.pop(name, None)
        os.environ.update(counts[distributed.rank()])
        waited, hold = [], lock._hold
        lock._hold = lambda path, patience_s: waited.append(patience_s) or hold(path, patience_s)
        with lock.one_run(tmp_path, timeout_s):
            return waited

    assert run_ranks(2, work) == [[expected_s], []]
