"""`protomem preflight` from a checkout, for launchers that want a file. Start it as training will be started:

torchrun --nproc-per-node=8 launch/preflight.py CONFIG.yaml [key=value ...] [--output DIR]
srun python launch/preflight.py CONFIG.yaml [key=value ...] [--output DIR]
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from protomem.cli import main  # noqa: E402

if __name__ == "__main__":
    sys.argv.insert(1, "preflight")
    main()
