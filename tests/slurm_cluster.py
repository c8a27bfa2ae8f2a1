"""A real Slurm on the loopback: munged, a controller and two node daemons, all of whose files are in one folder.

They run in the foreground as children of the caller, who ends them by their process ids; nothing else is touched.
"""

import contextlib
import os
import re
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from pathlib import Path

from tests import debian
from tests.ranks import free_port

PACKAGES = ("slurmctld", "slurmd", "slurm-client", "munge")
PROGRAMS = ("slurmctld", "slurmd", "srun", "sbatch", "munged")
CONFIG = """
ClusterName=protomem
SlurmctldHost={host}(127.0.0.1)
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=socket={folder}/munge.sock
CredType=cred/munge
MpiDefault=none
SlurmctldPort={controller}
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd-%n.pid
SlurmdSpoolDir={folder}/spool-%n
StateSaveLocation={folder}/state
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd-%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SwitchType=switch/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
SchedulerParameters=sched_interval=1,bf_interval=1,batch_sched_delay=0,sched_min_interval=100000
SlurmdParameters=config_overrides
ReturnToService=2
JobRequeue=1
KillWait=20
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
NodeName=n1 NodeHostname={host} NodeAddr=127.0.0.1 Port={first} CPUs=2 RealMemory=1000
NodeName=n2 NodeHostname={host} NodeAddr=127.0.0.1 Port={second} CPUs=2 RealMemory=1000
PartitionName=low Nodes=n1,n2 Default=YES MaxTime=UNLIMITED State=UP PriorityTier=1 PreemptMode=REQUEUE GraceTime=60
PartitionName=high Nodes=n1,n2 MaxTime=UNLIMITED State=UP PriorityTier=10 PreemptMode=OFF
"""


def why_not() -> str | None:
    """Install what is missing; the reason why there can be no Slurm here, if there is one."""
    if reason := debian.why_not(PROGRAMS, PACKAGES):
        return reason
    return None if os.geteuid() == 0 else "Slurm's daemons are here, but only root may start them for this test"


class Cluster:
    def __init__(self, folder: Path):
        self.folder = folder
        kept = {k: v for k, v in os.environ.items() if not k.startswith(("SLURM_", "SBATCH_", "PET_", "TORCHELASTIC"))}
        self.env = {**kept, "SLURM_CONF": str(folder / "slurm.conf")}

    def ask(self, *command) -> str:
        return subprocess.run(command, env=self.env, capture_output=True, text=True, timeout=60, check=True).stdout

    def job(self, number: str) -> dict[str, str]:
        """JobState, Restarts, ExitCode, BatchHost, ... of a job."""
        return dict(re.findall(r"(\w+)=(\S*)", self.ask("scontrol", "show", "job", "-o", number)))

    def logs(self) -> str:
        return "".join(f"--- {p.name}\n{p.read_text(errors='replace')[-2000:]}\n" for p in sorted(self.folder.glob("*.log")))


def _wait_for(condition, what: str, seconds: float, cluster: Cluster) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, f"{what} not within {seconds:.0f} s\n{cluster.logs()}"
        time.sleep(0.05)


@contextlib.contextmanager
def running():
    """A Cluster with the nodes n1 and n2 and the partitions low (preempted, with a minute of grace) and high."""
    folder = Path(tempfile.mkdtemp(prefix="slurm-", dir="/tmp"))
    folder.chmod(0o755)  # munged wants others to reach its socket
    cluster, daemons = Cluster(folder), []
    (folder / "munge.key").write_bytes(os.urandom(1024))
    (folder / "munge.key").chmod(0o600)
    (folder / "state").mkdir()
    ports = dict(controller=free_port(), first=free_port(), second=free_port())
    host = socket.gethostname().split(".")[0]
    (folder / "slurm.conf").write_text(CONFIG.format(folder=folder, host=host, **ports))

    def start(*command):
        output = open(folder / f"{len(daemons)}-{command[0]}.log", "wb")
        daemons.append(subprocess.Popen(command, env=cluster.env, stdout=output, stderr=output, start_new_session=True))
        output.close()

    def up() -> bool:
        try:
            return cluster.ask("sinfo", "-h", "-N", "-p", "low", "-t", "idle", "-o", "%N").split() == ["n1", "n2"]
        except subprocess.CalledProcessError:
            return False

    try:
        files = {"key-file": "munge.key", "socket": "munge.sock", "pid-file": "munged.pid", "seed-file": "munged.seed"}
        files["log-file"] = "munged.log"
        start("munged", "--foreground", "--force", "--num-threads=2", *(f"--{k}={folder / v}" for k, v in files.items()))
        _wait_for((folder / "munge.sock").exists, "munged", 10, cluster)
        start("slurmctld", "-D", "-c")
        for node in ("n1", "n2"):
            (folder / f"spool-{node}").mkdir()
            start("slurmd", "-D", "-N", node)
        _wait_for(up, "two idle nodes", 30, cluster)
        yield cluster
    finally:
        try:
            if cluster.ask("squeue", "-h", "-o", "%i").split():
                subprocess.run(["scancel", "-u", "root"], env=cluster.env, timeout=30)
                _wait_for(lambda: not cluster.ask("squeue", "-h", "-o", "%i").split(), "cancelled jobs", 40, cluster)
        finally:
            for daemon in reversed(daemons):
                daemon.send_signal(signal.SIGTERM)
            for daemon in reversed(daemons):
                try:
                    daemon.wait(15)
                except subprocess.TimeoutExpired:
                    daemon.kill()
                    daemon.wait()
            shutil.rmtree(folder, ignore_errors=True)
