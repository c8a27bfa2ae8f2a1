"""Put on PYTHONPATH by tests: training sleeps before each step for as many seconds as the file $PROTOMEM_PACE says."""

import importlib.abc
import importlib.util
import os
import sys
import time
from pathlib import Path


class _Pace(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path, target=None):
        if name != "protomem.trainer":
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(name)
        execute = spec.loader.exec_module

        def paced(module):
            execute(module)
            step = module.Run._one_step

            def slow(run, batch):
                time.sleep(float(Path(os.environ["PROTOMEM_PACE"]).read_text()))
                return step(run, batch)

            module.Run._one_step = slow

        spec.loader.exec_module = paced
        return spec


if "PROTOMEM_PACE" in os.environ:
    sys.meta_path.insert(0, _Pace())
