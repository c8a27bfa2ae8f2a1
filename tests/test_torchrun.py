"""Ranks whose first start was refused are not started again; all others are. With torchrun's own agents."""

import multiprocessing as mp
import os
import subprocess
import sys
from pathlib import Path

import pytest

from protomem import torchrun
from protomem.elastic import REFUSED, starting
from protomem.errors import UserError
from tests.ranks import free_port
from tests.test_signals import command
from tests.test_training import settings

ROOT = Path(__file__).parent.parent
RANK = """
import os, sys, time
attempt = int(os.environ["TORCHELASTIC_RESTART_COUNT"])
code = int(sys.argv[2:][attempt])
if os.environ["REFUSED"] in (os.environ["LOCAL_RANK"], os.environ["MACHINE"]):
    open(sys.argv[1], "a").write(f"{attempt} ")
    sys.exit(code)
while code and not os.path.exists(sys.argv[1]):
    time.sleep(0.05)
time.sleep(1)  # until a collective fails
sys.exit(code and 2)
"""


def agents(tmp_path, options, codes, refused):
    """(exit code of the agent on each machine, how often the rank `refused` was started, which ends with codes[attempt]).

    options: torchrun's, for each machine. refused: a local rank of the only machine, or `m` and the number of a machine.
    """
    (tmp_path / "rank.py").write_text(RANK)

    def work(machine, options):
        os.environ |= {"OMP_NUM_THREADS": "1", "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"}
        os.environ |= {"MACHINE": f"m{machine}", "REFUSED": refused}
        rank = [tmp_path / "rank.py", tmp_path / "seen", *codes]
        sys.argv = ["torchrun", "--max-restarts=2", *options, *map(str, rank)]
        torchrun.main()

    processes = [mp.get_context("fork").Process(target=work, args=given) for given in enumerate(options)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(120)
        process.kill()
    return [process.exitcode for process in processes], len((tmp_path / "seen").read_text().split())


@pytest.mark.parametrize("codes, starts", [((REFUSED, 0), 1), ((2, 1, 0), 3)], ids=["refused", "failed"])
def test_only_ranks_that_were_refused_are_not_started_again(tmp_path, codes, starts):
    ended = agents(tmp_path, [["--standalone", "--nproc-per-node=2"]], codes, "1")
    assert ended == ([int(codes[0] == REFUSED)], starts)


@pytest.mark.parametrize("refused", [0, 1])
def test_the_other_machine_ends_as_well(tmp_path, refused):
    """Whether the one that is refused keeps the store where they meet (0) or not."""
    meeting = f"--nnodes=2 --nproc-per-node=1 --rdzv-backend=c10d --rdzv-endpoint=127.0.0.1:{free_port()} --rdzv-id=job"
    machines = [[*meeting.split(), f"--rdzv-conf=is_host={k == 0}"] for k in range(2)]
    assert agents(tmp_path, machines, (REFUSED, 0), f"m{refused}") == ([1, 1], 1)


FIRST = {"TORCHELASTIC_RUN_ID": "a", "TORCHELASTIC_RESTART_COUNT": "0"}


@pytest.mark.parametrize(
    "env, code",
    [
        ({}, 2),
        (FIRST, REFUSED),
        ({**FIRST, "TORCHELASTIC_RESTART_COUNT": "1"}, 2),  # a machine may have lost a disk meanwhile
        ({**FIRST, "SLURM_RESTART_COUNT": "1"}, 2),
        ({**FIRST, "PROTOMEM_ELASTIC": "1"}, 2),  # a machine that comes back counts from 0
        ({**FIRST, "PROTOMEM_RESTARTED": "1"}, 2),  # another machine's rank was lost, which torch counts there alone
    ],
)
def test_which_start_is_refused_for_good(env, code):
    for error in (UserError("no data"), SystemExit(2)):  # on rank 0 and on the others
        with pytest.raises(type(error)) as told, starting(env):
            raise error
        assert told.value.code == code
    with pytest.raises(RuntimeError), starting(env):  # a lost rank
        raise RuntimeError
    assert UserError("another one").code == 2


@pytest.mark.parametrize("mistake", ["train.batchsize=3", "data.train=/nowhere", "checkpoint.resume=/nowhere", "distributed.device=cuda"])
def test_a_rank_tells_that_its_start_was_refused(small_set, tmp_path, mistake):
    given = settings(small_set, tmp_path / "run", mistake)
    assert command(given, lambda: None, FIRST) == REFUSED
    assert command(given, lambda: None, {**FIRST, "TORCHELASTIC_RESTART_COUNT": "1"}) == 2
    assert not (tmp_path / "run").exists()


def test_the_script_for_many_machines_starts_it():
    env = {**os.environ, "PYTHON": "echo", "HEAD": "a:1", "NODES": "2", "RANKS": "4"}
    shown = subprocess.check_output([ROOT / "launch" / "multinode.sh", "c.yaml"], env=env, text=True)
    assert shown.startswith("-m protomem.torchrun --nnodes=2 --nproc-per-node=4 --max-restarts=10 ")
    assert shown.endswith("-m protomem train c.yaml\n")
