"""A node is lost in mid-epoch and comes back: the job shrinks, goes on and grows, and the curve does not show it."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

from protomem import distributed
from protomem.elastic import only_others_leave
from protomem.files import replace_file
from tests.nodes import nodes
from tests.ranks import run_ranks
from tests.test_training import assert_close, curve, run, settings

ROOT = Path(__file__).parent.parent


def test_a_worker_whose_agent_died_before_it_looked_ends():
    code = "from protomem.elastic import end_with_agent; end_with_agent(); print('alive')"

    def worker(**env):
        return subprocess.run([sys.executable, "-c", code], env={**os.environ, **env}, capture_output=True, text=True, cwd=ROOT)

    assert worker(TORCHELASTIC_RUN_ID="job", PROTOMEM_AGENT="1").returncode == -signal.SIGKILL  # adopted by another process
    assert worker(TORCHELASTIC_RUN_ID="job", PROTOMEM_AGENT=str(os.getpid())).stdout == "alive\n"
    assert worker(PROTOMEM_AGENT="1").stdout == "alive\n"  # no agent, as with plain srun


def test_machines_of_which_nobody_was_asked_to_stop_go_on():
    def work(asked, elastic):
        env = {"GROUP_RANK": str(distributed.rank() // 2), **({"PROTOMEM_ELASTIC": "1"} if elastic else {})}
        return only_others_leave(distributed.rank() in asked, env)

    assert run_ranks(4, work, {1}, True) == [False, False, True, True]
    assert run_ranks(4, work, {0, 3}, True) == [False] * 4
    assert run_ranks(4, work, {1}, False) == [False] * 4


def wait_for(what, seconds, said):
    """Poll until what() is true; on failure show what `said()` returns."""
    deadline = time.monotonic() + seconds
    while not what():
        assert time.monotonic() < deadline, said()
        time.sleep(0.05)


def test_a_node_is_lost_and_comes_back(small_set, tmp_path):
    """Epochs have 10 steps, checkpoints are made every 10. `alpha` (rank 0) dies, `omega` (where they meet) survives."""
    more = ("schedule.steps=60", "checkpoint.every=10", "distributed.timeout_s=20", "distributed.device=cpu")
    whole = run(1, small_set, tmp_path / "whole", *more)
    output, pace = tmp_path / "run", tmp_path / "pace"
    pace.write_text("0.2")
    env = {
        "HEAD": "omega:29400",
        "NODES": "1:2",
        "RANKS": "1",
        "LAST_CALL": "2",
        "KEEP_ALIVE": "1",
        "PYTHON": sys.executable,
        "OMP_NUM_THREADS": "1",
        "GLOO_SOCKET_IFNAME": "eth0",
        "PYTHONPATH": f"{ROOT / 'tests' / 'pace'}:{ROOT}",
        "PROTOMEM_PACE": str(pace),
    }

    with nodes(tmp_path, "alpha", "omega") as (alpha, omega):

        def lines():
            path = output / "metrics.jsonl"
            text = path.read_text() if path.exists() else ""
            return [json.loads(line) for line in text.splitlines(True) if line.endswith("\n")]

        def step():
            return max((line["step"] for line in lines() if "loss" in line), default=0)

        def resumed(world):
            return [line["step"] for line in lines() if line.get("event") == "resume" and line["world_size"] == world]

        def said():
            return "\n".join(f"--- {node.name}\n{node.log()[-4000:]}" for node in (alpha, omega)) + str(lines()[-1:])

        def start(node):
            return node.start(str(ROOT / "launch" / "multinode.sh"), *settings(small_set, output, *more), **env)

        survivor, lost = start(omega), start(alpha)
        wait_for(lambda: step() >= 12, 90, said)
        replace_file(pace, b"1.5")  # nobody reaches step 20 before the blow falls
        os.kill(lost.pid, signal.SIGKILL)  # the agent alone; its worker is another process, in a session of its own
        lost.wait()
        wait_for(lambda: not alpha.processes(), 5, lambda: f"workers outlive their agent: {alpha.processes()}\n{said()}")
        replace_file(pace, b"0.1")
        wait_for(lambda: resumed(1) and step() > 20, 90, said)
        replace_file(pace, b"1")  # 40 seconds for the node to come back
        back = start(alpha)
        wait_for(lambda: resumed(2), 90, said)
        replace_file(pace, b"0")
        wait_for(lambda: survivor.poll() is not None and back.poll() is not None, 90, said)
        assert (survivor.returncode, back.returncode) == (0, 0), said()
        assert re.search(r"error: missing at .* of step 1\d: rank 0 \(alpha\) gave no sign of life", omega.log()), said()
        assert json.loads((output / "flight-rank1.json").read_text())["host"] == "omega"
        assert resumed(1) == [10] and len(resumed(2)) == 1 and 20 < resumed(2)[0] < 60, said()
    assert_close(curve(output), whole, 1e-4)
