"""What a rank that `srun` started knows from Slurm's variables: where the ranks meet, and how many share its machine."""

from __future__ import annotations

import re
import socket
import subprocess

from protomem.errors import UserError


def first_host(nodes: str) -> str:
    """The first name of a list of nodes as Slurm writes it: `rack1n[03-05,9],login` -> `rack1n03`."""
    first = re.match(r"(?:[^,[]|\[[^]]*])*", nodes)[0]
    return re.sub(r"\[(\w+)[^]]*]", r"\1", first)


def tasks_of_node(counts: str, node: int) -> int:
    """Tasks on the node of that index, of a list as Slurm writes it: `4(x2),3` is 4, 4, 3."""
    each = []
    for count, times in re.findall(r"(\d+)(?:\(x(\d+)\))?", counts):
        each += [int(count)] * int(times or 1)
    return each[node]


def rendezvous_port(env) -> int:
    """A port in [20000, 32000), which no system hands out by itself; others for other jobs, steps and restarts."""
    job, step, restart = (int(env.get(k, 0)) for k in ("SLURM_JOB_ID", "SLURM_STEP_ID", "SLURM_RESTART_COUNT"))
    return 20000 + (job + 1009 * step + 101 * restart) % 12000


def address_of(host: str) -> str:
    """`host` where it resolves, else the NodeAddr that Slurm has for it. Raises UserError if there is neither."""
    told = ""
    try:
        shown = None if _resolves(host) else subprocess.run(
            ["scontrol", "show", "node", "-o", host], capture_output=True, text=True, timeout=60
        )
        if shown is None:
            return host
        address = re.search(r"\bNodeAddr=(\S+)", shown.stdout)
        if address and _resolves(address[1]):
            return address[1]
        told = " ".join((shown.stderr or shown.stdout).split())[:200]
    except (OSError, subprocess.TimeoutExpired) as error:
        told = str(error)
    raise UserError(
        f"the first host of this Slurm step, {host}, has no address that this machine knows (scontrol: {told}); "
        "export MASTER_ADDR=its address before srun"
    )


def _resolves(host: str) -> bool:
    try:
        return bool(socket.getaddrinfo(host, None))
    except OSError:
        return False


def rendezvous(env) -> dict[str, str]:
    """MASTER_ADDR and MASTER_PORT of this step, as far as they are not set: rank 0 is on the step's first host.

    Raises UserError if Slurm names no hosts, or the first one has no address.
    """
    found = {}
    if "MASTER_ADDR" not in env:
        nodes = env.get("SLURM_STEP_NODELIST") or env.get("SLURM_JOB_NODELIST")
        if not nodes:
            raise UserError(
                "Slurm started several ranks, but neither SLURM_STEP_NODELIST nor SLURM_JOB_NODELIST names their hosts; "
                "export MASTER_ADDR=address of the first one before srun"
            )
        found["MASTER_ADDR"] = address_of(first_host(nodes))
    if "MASTER_PORT" not in env:
        found["MASTER_PORT"] = str(rendezvous_port(env))
    return found
