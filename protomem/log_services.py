"""The services that a log is sent to, if asked: tensorboard and wandb."""

from __future__ import annotations

import sys
import uuid
from pathlib import Path

from protomem.errors import UserError
from protomem.redact import hide_argument


def tensorboard_writer():
    """The class that writes event files. Raises UserError where tensorboard is not installed."""
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        raise UserError(
            "tensorboard logging is on but not installed: pip install tensorboard, or switch it off"
        ) from None
    return SummaryWriter


def start_wandb(folder: Path, config: dict, mode: str, project=None, name=None, entity=None):
    """wandb's run of the training run in `folder`: the one that was there before, else a new one. mode: offline or online.

    Raises UserError for another mode, a missing package, and a wandb that cannot start.
    """
    if mode not in ("offline", "online"):
        raise UserError(f"wandb mode={mode} is not one of disabled, offline, online")
    try:
        import wandb
    except ImportError:
        raise UserError(
            "wandb logging is on but not installed: pip install protomem[wandb], or wandb mode=disabled"
        ) from None
    id_file = folder / "wandb_id"
    run_id = id_file.read_text().strip() if id_file.exists() else uuid.uuid4().hex[:8]
    # wandb stores the command line; where that holds a secret, it gets no description of the run but the config.
    secret = any(hide_argument(argument) != argument for argument in sys.argv)
    more = {"x_disable_meta": True} if secret else {}
    try:
        run = wandb.init(
            mode=mode,
            project=project or "protomem",
            entity=entity,
            name=name,
            id=run_id,
            resume="allow",
            dir=folder,
            config=config,
            settings=wandb.Settings(console="off", silent=True, **more),
        )
    except wandb.errors.Error as error:
        reason = " ".join(str(error).split())
        raise UserError(f"wandb cannot start ({reason}); run `wandb login` once, or set wandb mode=offline") from None
    id_file.write_text(run_id + "\n")
    return run
