"""torchrun, with one change: ranks whose first start was refused are not started again. `python -m protomem.torchrun` takes
torchrun's arguments; launch/multinode.sh and slurm.sbatch use it.

torchrun starts all ranks again, `--max-restarts` times, whatever a rank ended with. A mistake in the settings or the data
then takes minutes, and its line stands in the log as many times. Ranks that end later, or otherwise, are started again.
"""

from __future__ import annotations

import os

from torch.distributed import run
from torch.distributed.elastic.agent.server.local_elastic_agent import LocalElasticAgent

from protomem.elastic import REFUSED, RESTARTED


def main() -> None:
    monitor, restart = (getattr(LocalElasticAgent, name, None) for name in ("_monitor_workers", "_restart_workers"))
    if monitor is None or restart is None:  # private; without them this is plain torchrun
        return run.main()

    def look(agent, *given, **more):
        result = monitor(agent, *given, **more)
        if any(failure.exitcode == REFUSED for failure in result.failures.values()):
            agent._remaining_restarts = 0
        return result

    def again(agent, *given, **more):
        os.environ[RESTARTED] = "1"  # ranks inherit it; torch counts no restart that another machine caused
        return restart(agent, *given, **more)

    LocalElasticAgent._monitor_workers, LocalElasticAgent._restart_workers = look, again
    run.main()


if __name__ == "__main__":
    main()
