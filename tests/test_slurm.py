"""Launching by Slurm: what a rank makes of Slurm's variables, and the batch script under a real Slurm on the loopback."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from protomem import config, launcher, slurm
from protomem.data.faces import write_face_set
from protomem.errors import UserError
from protomem.trainer import train
from tests import slurm_cluster
from tests.ranks import run_ranks

ROOT = Path(__file__).parent.parent
QUICKSTART = "configs/quickstart.yaml"


# --- what Slurm's variables say ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "nodes, first",
    [
        ("n[1-2]", "n1"),
        ("gpu[003-010,12],login", "gpu003"),
        ("login,gpu[1-2]", "login"),
        ("rack[1-2]n[07,9]-ib", "rack1n07-ib"),
        ("a-b.c", "a-b.c"),
    ],
)
def test_first_host_of_a_list(nodes, first):
    assert slurm.first_host(nodes) == first


def test_tasks_of_a_node():
    assert [slurm.tasks_of_node("4(x2),3", node) for node in range(3)] == [4, 4, 3]
    assert slurm.tasks_of_node("2", 0) == 2


STEP = {"SLURM_JOB_ID": "41", "SLURM_STEP_ID": "1", "SLURM_PROCID": "5", "SLURM_LOCALID": "1", "SLURM_NODEID": "1"}
STEP |= {"SLURM_STEP_NUM_TASKS": "6", "SLURM_NTASKS": "6", "SLURM_STEP_TASKS_PER_NODE": "4,2"}


def test_launchers_are_told_apart():
    assert launcher.detect_launcher(STEP) == ("slurm", 5, 6, 1)
    assert launcher.ranks_here("slurm", STEP) == 2
    inside = {**STEP, "RANK": "3", "WORLD_SIZE": "4", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "2"}
    assert launcher.detect_launcher(inside) == ("torchrun", 3, 4, 1)
    assert launcher.ranks_here("torchrun", inside) == 2
    # The batch script and the shell of an interactive allocation: one process, whatever the job may start.
    assert launcher.detect_launcher({"SLURM_PROCID": "0", "SLURM_NTASKS": "6"}) == ("single", 0, 1, 0)
    assert launcher.detect_launcher({**STEP, "SLURM_STEP_NUM_TASKS": "1"}) == ("single", 0, 1, 0)


def test_where_the_ranks_meet():
    found = slurm.rendezvous({**STEP, "SLURM_STEP_NODELIST": "localhost,far[1-2]", "SLURM_JOB_NODELIST": "other"})
    assert found == {"MASTER_ADDR": "localhost", "MASTER_PORT": str(20000 + 41 + 1009)}
    assert slurm.rendezvous({**STEP, "MASTER_ADDR": "a", "MASTER_PORT": "1"}) == {}
    ports = {slurm.rendezvous_port({**STEP, "SLURM_JOB_ID": str(j), "SLURM_STEP_ID": str(s), "SLURM_RESTART_COUNT": str(r)})
             for j in range(30) for s in range(5) for r in range(3)}  # fmt: skip
    assert len(ports) == 450 and min(ports) >= 20000 and max(ports) < 32000
    with pytest.raises(UserError, match="names their hosts; export MASTER_ADDR"):
        slurm.rendezvous(STEP)


def test_a_host_without_a_name_has_the_address_that_slurm_knows(tmp_path, monkeypatch):
    commands(tmp_path, scontrol='[ "$*" = "show node -o n1.invalid" ] && echo "NodeName=n1 NodeAddr=127.0.0.9 NodeHostName=n1"')
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    assert slurm.address_of("n1.invalid") == "127.0.0.9"
    with pytest.raises(UserError, match="n2.invalid, has no address that this machine knows .* export MASTER_ADDR"):
        slurm.address_of("n2.invalid")
    monkeypatch.setenv("PATH", str(tmp_path / "nothing"))
    with pytest.raises(UserError, match="No such file or directory: 'scontrol'"):
        slurm.address_of("n1.invalid")


# --- the batch script, with commands that only note how they were called -------------------------------------------


def commands(folder: Path, **scripts: str) -> None:
    for name, script in scripts.items():
        (folder / name).write_text(f"#!/bin/bash\n{script}\n")
        (folder / name).chmod(0o755)


def start_batch(tmp_path, srun: str, *arguments, requeue="kill -TERM $PPID", **env) -> subprocess.Popen:
    """launch/slurm.sbatch as job 42 of 2 nodes; `srun` is what its srun does, for a run in tmp_path/run."""
    run = tmp_path / "run"
    run.mkdir(exist_ok=True)
    note = f"set -- \"${{@//$'\\n'/}}\"; echo $(basename $0) $* >> {tmp_path}/called"
    show = 'case "$1 $2" in "show hostnames") echo n1.invalid; echo n2;; "show node") echo "NodeName=x NodeAddr=10.0.0.1 P=1";;'
    commands(
        tmp_path,
        python=f"echo {run}",
        srun=f"{note}\ntouch {tmp_path}/started\n{srun.format(run=run, folder=tmp_path)}",
        scancel=f"{note}\ntouch {tmp_path}/cancelled",
        scontrol=f"{show} requeue*) {note}; {requeue};; esac",
    )
    given = {"SLURM_JOB_ID": "42", "SLURM_NNODES": "2", "SLURM_JOB_NODELIST": "x", "PYTHON": str(tmp_path / "python"), **env}
    environment = {"PATH": f"{tmp_path}:/usr/bin:/bin", **given}
    command = ["bash", "launch/slurm.sbatch", *(arguments or ("c.yaml", "a=b c"))]
    return subprocess.Popen(command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def ended(tmp_path, process) -> tuple[int, str, list[str]]:
    """Exit code, output, and the commands that were called."""
    output = process.communicate(timeout=30)[0]
    called = (tmp_path / "called").read_text().splitlines() if (tmp_path / "called").exists() else []
    return process.returncode, output, called


def signal_batch(tmp_path, process, number) -> None:
    while not (tmp_path / "started").exists():
        assert process.poll() is None, process.stdout.read()
        time.sleep(0.01)
    process.send_signal(number)


def test_batch_finished_and_how_the_ranks_are_started(tmp_path):
    given = {"SLURM_CPUS_PER_TASK": "16", "SLURM_GPUS_ON_NODE": "8", "SLURM_RESTART_COUNT": "2", "NUMA": "node"}
    given |= {"CONTAINER": f"{tmp_path}/container exec"}
    commands(tmp_path, container='shift; exec "$@"')
    shown = 'echo "omp $OMP_NUM_THREADS signals $PET_SIGNALS_TO_HANDLE last ${{@: -1}}"'
    code, output, called = ended(tmp_path, start_batch(tmp_path, shown, **given))
    assert code == 0 and "omp 2 signals SIGINT last a=b c" in output
    (srun,) = called  # nothing else: not cancelled, not requeued
    words = srun.split()
    assert words[1:4] == ["--nodes=2", "--ntasks=2", "--cpus-per-task=16"] and "--kill-on-bad-exit=1" in words
    torchrun = "--nnodes=2 --nproc-per-node=8 --max-restarts=3 --rdzv-backend=c10d --rdzv-id=42.2"
    assert f"{torchrun} --rdzv-endpoint=10.0.0.1:20244 --numa-binding=node -m protomem" in srun
    assert f"{tmp_path}/container exec {tmp_path}/python -m protomem.torchrun" in srun
    assert srun.endswith("-m protomem train c.yaml a=b c")


def test_batch_failed(tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "stopped").write_text("long ago\n")
    code, _, called = ended(tmp_path, start_batch(tmp_path, "exit 3"))
    assert code == 3 and len(called) == 1


def test_batch_preempted(tmp_path):
    """The ranks were told, the script was not: it puts the job back, and does not end before Slurm ends it."""
    code, output, called = ended(tmp_path, start_batch(tmp_path, "echo at step 7 > {run}/stopped"))
    assert called[1:] == ["scontrol requeue 42"] and "stopped at step 7: back to the queue" in output
    code, output, called = ended(tmp_path, start_batch(tmp_path, "echo > {run}/stopped; exit 1", requeue="exit 1"))
    assert code == 75 and called[-1] == "scontrol requeue 42"  # as an agent that took SIGTERM for itself; requeue refused


def test_batch_near_its_time_limit(tmp_path):
    process = start_batch(tmp_path, "until [ -e {folder}/cancelled ]; do sleep 0.05; done; echo > {run}/stopped")
    signal_batch(tmp_path, process, signal.SIGUSR1)
    assert ended(tmp_path, process)[2][1:] == ["scancel --signal=USR1 42", "scontrol requeue 42"]


def test_batch_cancelled_stays_ended(tmp_path):
    """scancel, `scontrol requeue` and the time limit tell the script as well: what happens then is Slurm's decision."""
    process = start_batch(tmp_path, "sleep 0.3; echo > {run}/stopped")
    signal_batch(tmp_path, process, signal.SIGTERM)
    code, _, called = ended(tmp_path, process)
    assert code == 0 and len(called) == 1


def test_batch_refuses(tmp_path):
    code, output, called = ended(tmp_path, start_batch(tmp_path, "", SLURM_NTASKS_PER_NODE="4"))
    assert code == 2 and "one task per node" in output and not called
    code, output, called = ended(tmp_path, start_batch(tmp_path, "", SLURM_JOB_ID=""))
    assert code == 2 and "usage: sbatch" in output and not called


# --- the real thing ------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def faces(tmp_path_factory):
    """8 rendered people x 16 images: 16 steps of 8 images an epoch."""
    folder = tmp_path_factory.mktemp("faces")
    write_face_set(folder, identities=8, images_per_identity=16)
    return folder


def settings(faces, output, *more):
    """The quickstart with few people and steps; nothing is saved on the way."""
    short = ["schedule.epochs=0", "schedule.steps=32", "schedule.warmup_epochs=0", "schedule.warmup_steps=4"]
    short += ["train.batch_size=8", "data.size=64", "data.eval=[]", "checkpoint.every=0", "log.every=1"]
    return [f"output={output}", f"data.train={faces}", *short, *more]


def losses(output: Path) -> dict[int, float]:
    lines = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    return {line["step"]: line["loss"] for line in lines if "loss" in line}


def uninterrupted(faces, output, *more):
    def work():
        train(config.load([QUICKSTART], settings(faces, output, *more)))

    run_ranks(2, work)
    return losses(output)


@pytest.fixture(scope="module")
def cluster():
    reason = slurm_cluster.why_not()
    if reason:
        pytest.skip(f"no Slurm here: {reason}")
    with slurm_cluster.running() as cluster:
        cluster.env |= {"RESTARTS": "0", "PYTHON": sys.executable, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
        yield cluster


def submit(cluster, log: Path, options: list[str], arguments: list[str]) -> str:
    command = ["sbatch", "--parsable", f"--output={log}", *options, "launch/slurm.sbatch", QUICKSTART, *arguments]
    return cluster.ask(*command).strip()


def until(cluster, number, log, condition, what: str, seconds: float = 240):
    """Wait for `condition(job)`; a job that waits for its time after a requeue gets it, once the nodes have forgotten that
    they ended it: they refuse a job that comes back within the same second."""
    end, hurried = time.monotonic() + seconds, set()
    while True:
        job = cluster.job(number)
        if condition(job):
            return job
        if time.monotonic() > end or job["JobState"] in ("FAILED", "TIMEOUT", "CANCELLED"):
            said = log.read_text() if log.exists() else ""
            pytest.fail(f"{what}: {job['JobState']} {job['Reason']}\n{said}\n{cluster.logs()}", pytrace=False)
        if job["JobState"] == "PENDING" and job["Reason"] == "BeginTime" and job["Restarts"] not in hurried:
            cluster.ask("scontrol", "update", f"jobid={number}", "starttime=now+2")
            hurried.add(job["Restarts"])
        time.sleep(0.2)


def reached(output: Path, step: int):
    return lambda job: (output / "metrics.jsonl").exists() and max(losses(output), default=0) >= step


def ranks_of(output: Path) -> list[int]:
    """The ranks' process ids: those whose command line names this output folder, without torchrun and srun."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            command = (folder / "cmdline").read_bytes().split(b"\0")
        except OSError:
            continue  # ended meanwhile
        if f"output={output}".encode() in command and command[2:5] == [b"-m", b"protomem", b"train"]:
            found.append(int(folder.name))
    return found


def pending(process: int, number: int) -> bool:
    """Whether a stopped process will get that signal as soon as it goes on."""
    masks = re.findall(r"^(?:Sig|Shd)Pnd:\s*(\w+)", Path(f"/proc/{process}/status").read_text(), re.M)
    return any(int(mask, 16) >> (number - 1) & 1 for mask in masks)


def test_preempted_in_mid_epoch_and_the_curve_of_an_uninterrupted_run(cluster, faces, tmp_path):
    """A job of two nodes comes near its time limit, and at that moment one of a higher partition takes its nodes, with
    ranks that plain srun starts. It saves once, goes back to the queue, and finishes."""
    output, log, high = tmp_path / "job", tmp_path / "job.txt", tmp_path / "high"
    number = submit(cluster, log, ["--nodes=2", "--cpus-per-task=2"], settings(faces, output))
    until(cluster, number, log, reached(output, 5), "five steps")
    ranks = ranks_of(output)
    assert len(ranks) == 2
    for rank in ranks:  # a fast machine would have finished before the signals are there
        os.kill(rank, signal.SIGSTOP)
    cluster.ask("scancel", "--batch", "--signal=USR1", number)  # what --signal=B:USR1@180 does 180 s before the limit
    until(cluster, number, log, lambda job: all(pending(rank, signal.SIGUSR1) for rank in ranks), "USR1 at the ranks")

    short = settings(faces, high, "schedule.steps=3", "schedule.warmup_steps=0")
    command = ["srun", "-p", "high", "-N2", "-n2", "--cpus-per-task=2", "--kill-on-bad-exit=1"]
    # Preemption sends SIGCONT and SIGTERM to the first job's steps.
    command += [sys.executable, "-m", "protomem", "train", QUICKSTART, *short]
    plain = subprocess.run(command, env=cluster.env, capture_output=True, text=True, timeout=240)
    assert plain.returncode == 0, plain.stdout + plain.stderr
    assert sorted(losses(high)) == [1, 2, 3]
    assert json.loads((high / "checkpoints" / "last" / "training.json").read_text())["world_size"] == 2

    job = until(cluster, number, log, lambda job: job["JobState"] == "COMPLETED", "finished")
    text = log.read_text()
    assert job["Restarts"] == "1", text
    ((step, reason),) = re.findall(r"^stopped at step (\d+) of 32 by (\w+)", text, re.M)
    assert 5 < int(step) < 32 and reason == "SIGUSR1", text
    assert re.findall(r"^resume +step (\d+)", text, re.M) == [step]
    assert len(re.findall(r"^checkpoint ", text, re.M)) == 2  # when stopped, and at the end
    assert not (output / "stopped").exists() and (output / "report.html").exists()
    assert losses(output) == uninterrupted(faces, tmp_path / "whole")


def test_a_failure_ends_the_job(cluster, faces, tmp_path):
    """Neither a mistake in the config nor one that the ranks run into is tried again by Slurm."""
    log = tmp_path / "job.txt"
    typo = submit(cluster, log, [], settings(faces, tmp_path / "typo", "train.batchsize=3"))
    missing = submit(cluster, log, [], settings("/nowhere", tmp_path / "missing"))
    for number, said in ((typo, "unknown key train.batchsize"), (missing, "/nowhere")):
        while (job := cluster.job(number))["JobState"] in ("PENDING", "RUNNING", "COMPLETING"):
            time.sleep(0.1)
        assert job["JobState"] == "FAILED" and job["Restarts"] == "0", log.read_text()
        assert job["ExitCode"] == ("2:0" if number == typo else "1:0")
        assert said in log.read_text()
