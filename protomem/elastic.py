"""Workers of an elastic job (torchrun): they end with the agent that started them."""

from __future__ import annotations

import ctypes
import os
import signal
import sys

PR_SET_PDEATHSIG = 1


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
