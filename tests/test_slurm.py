"""Launching by Slurm: what a rank makes of Slurm's variables, and the batch script under a real Slurm on the loopback."""

import json
import os
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest

from protomem import config, state
from protomem.data.faces import write_face_set
from protomem.trainer import train
from tests import slurm_cluster
from tests.ranks import run_ranks

ROOT = Path(__file__).parent.parent
QUICKSTART = "configs/quickstart.yaml"


@pytest.fixture(scope="module")
def faces(tmp_path_factory):
    """8 rendered people x 16 images: 16 steps of 8 images an epoch."""
    folder = tmp_path_factory.mktemp("faces")
    write_face_set(folder, identities=8, images_per_identity=16)
    return folder


def settings(faces, output, *more):
    """The quickstart with few people and steps; nothing is saved on the way."""
    short = ["schedule.epochs=0", "schedule.steps=36", "schedule.warmup_epochs=0", "schedule.warmup_steps=4"]
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


# --- the real thing ------------------------------------------------------------------------------------------------


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


def until(cluster, number, log, condition, what: str, seconds: float = 120):
    """Wait for `condition(job)`; a job that waits for its time after a requeue gets it, once the nodes have forgotten that
    they ended it: they refuse a job that comes back within the same second."""
    end, hurried = time.monotonic() + seconds, set()
    while True:
        job = cluster.job(number)
        if condition(job):
            return job
        said = f"{what}: {job['JobState']} {job['Reason']} after {seconds} s\n{log.read_text() if log.exists() else ''}{cluster.logs()}"
        assert time.monotonic() < end and job["JobState"] not in ("FAILED", "TIMEOUT", "CANCELLED"), said
        if job["JobState"] == "PENDING" and job["Reason"] == "BeginTime" and job["Restarts"] not in hurried:
            cluster.ask("scontrol", "update", f"jobid={number}", "starttime=now+2")
            hurried.add(job["Restarts"])
        time.sleep(0.1)


def reached(output: Path, step: int):
    return lambda job: (output / "metrics.jsonl").exists() and max(losses(output), default=0) >= step


def test_interrupted_twice_and_the_curve_of_an_uninterrupted_run(cluster, faces, tmp_path):
    """Near its time limit a job of two nodes saves and goes back to the queue; started again, a job of a higher partition
    takes the nodes, with ranks that plain srun starts; then the first one finishes."""
    output, log, high = tmp_path / "job", tmp_path / "job.txt", tmp_path / "high"
    number = submit(cluster, log, ["--nodes=2", "--cpus-per-task=2"], settings(faces, output))

    until(cluster, number, log, reached(output, 5), "five steps")
    cluster.ask("scancel", "--batch", "--signal=USR1", number)  # as --signal=B:USR1@180 has it 180 s before the limit
    until(cluster, number, log, lambda job: job["Restarts"] == "1", "requeued")
    (first,) = state.checkpoints(output / "checkpoints")

    until(cluster, number, log, reached(output, state.read_info(first)["step"] + 3), "three steps more")
    short = settings(faces, high, "schedule.steps=3", "schedule.warmup_steps=0")
    command = ["srun", "-p", "high", "-N2", "-n2", "--cpus-per-task=2", "--kill-on-bad-exit=1", sys.executable, "-m", "protomem"]
    plain = subprocess.run([*command, "train", QUICKSTART, *short], env=cluster.env, capture_output=True, text=True, timeout=120)
    assert plain.returncode == 0, plain.stdout + plain.stderr
    assert sorted(losses(high)) == [1, 2, 3]
    assert json.loads((high / "checkpoints" / "last" / "training.json").read_text())["world_size"] == 2

    job = until(cluster, number, log, lambda job: job["JobState"] == "COMPLETED", "finished")
    text = log.read_text()
    assert job["Restarts"] == "2", text
    assert re.findall(r"^stopped at step \d+ of 36 by (\w+)", text, re.M) == ["SIGUSR1", "SIGTERM"], text
    assert not (output / "stopped").exists() and (output / "report.html").exists()
    resumed = [int(step) for step in re.findall(r"^resume +step (\d+)", text, re.M)]
    assert len(resumed) == 2 and 5 <= resumed[0] < resumed[1] < 36, text
    assert losses(output) == uninterrupted(faces, tmp_path / "whole")


def test_a_failure_ends_the_job(cluster, faces, tmp_path):
    """Neither a mistake in the config nor one that the ranks run into is tried again by Slurm."""
    log = tmp_path / "job.txt"
    typo = submit(cluster, log, [], settings(faces, tmp_path / "typo", "train.batchsize=3"))
    missing = submit(cluster, log, ["--open-mode=append"], settings("/nowhere", tmp_path / "missing"))
    for number, said in ((typo, "unknown key train.batchsize"), (missing, "/nowhere")):
        while (job := cluster.job(number))["JobState"] in ("PENDING", "RUNNING", "COMPLETING"):
            time.sleep(0.1)
        assert job["JobState"] == "FAILED" and job["Restarts"] == "0", log.read_text()
        assert job["ExitCode"] == ("2:0" if number == typo else "1:0")
        assert said in log.read_text()
