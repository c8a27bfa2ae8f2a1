"""Workers of a job of torchrun: they end with the agent that started them, tell it when starting them again is of no use, and
go on when only others leave."""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import sys

from protomem.errors import UserError

PR_SET_PDEATHSIG = 1
RESTARTED = "PROTOMEM_RESTARTED"  # in the environment of ranks that their machine has started before
REFUSED = 78  # exit code of a rank whose start was refused (EX_CONFIG of sysexits.h); see protomem/torchrun.py


def end_with_agent(env=os.environ) -> None:
    """Let the kernel kill this process when torchrun's agent dies; call it before anything slow. Linux only.

    Without it the workers of an agent that was killed train on as orphans: the other nodes keep waiting for them, or write
    checkpoints beside them. The launch scripts export the agent's process id as PROTOMEM_AGENT, by which a worker sees
    that the agent had died before the kernel was asked.
    """
    if "TORCHELASTIC_RUN_ID" not in env or sys.platform != "linux":
        return
    agent = int(env.get("PROTOMEM_AGENT", os.getppid()))
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    if os.getppid() != agent:
        os.kill(os.getpid(), signal.SIGKILL)


@contextlib.contextmanager
def starting(env=os.environ):
    """A UserError inside (or another rank's, told by SystemExit) ends the job if this is its first start: whoever started it is
    there to read the line, nothing was trained, and another start would come to the same. Later ones may come to something
    else, since a machine or a disk was lost meanwhile; so may those of machines that come and go (PROTOMEM_ELASTIC).
    """
    try:
        yield
    except (UserError, SystemExit) as error:
        again = any(int(env.get(k, 0)) for k in ("TORCHELASTIC_RESTART_COUNT", "SLURM_RESTART_COUNT", RESTARTED))
        if "TORCHELASTIC_RUN_ID" in env and "PROTOMEM_ELASTIC" not in env and not again:
            error.code = REFUSED
        raise


def only_others_leave(asked: bool, env=os.environ) -> bool:
    """Whether this machine should go on, now that all ranks have stopped and saved: in a job that may shrink, if none of its
    ranks was asked to stop (`asked`: this rank was). Collective.

    A machine that is drained, or whose agent restarts its workers because another one waits to join, stops all ranks. A
    worker that ended well would end its machine's part of the job; one that fails is restarted, with those that are there.
    """
    if "PROTOMEM_ELASTIC" not in env:
        return False
    from protomem import distributed  # torch

    machine = env.get("GROUP_RANK")
    return (machine, True) not in distributed.gather_objects((machine, asked))
