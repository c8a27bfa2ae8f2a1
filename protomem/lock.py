"""One run at a time in an output folder: two would delete each other's half-written checkpoints.

A POSIX lock on `output/.lock`, held by the main rank. The kernel (on a shared file system: its server) releases it when the
process is gone, however it ended, so a lock that was left behind does not exist.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import socket
import time
from pathlib import Path

from protomem import distributed
from protomem.errors import UserError

PATIENCE_S = 20.0  # how long the processes of a job that was killed just now may take to die (our default)
SHARE = 0.8  # of the time after which a collective ends: the other ranks wait in one


@contextlib.contextmanager
def one_run(folder: Path, timeout_s: float):
    """Hold `folder` (made if need be) while the block runs. Collective; the main rank holds it for all.

    Waits 20 s for another process that holds it; a job that was started again by its launcher nearly `timeout_s` (of a
    collective), since ranks on a host that was cut off may live for so long. Raises UserError if it is still held, or
    cannot be written. Where the file system knows no locks there is no protection.
    """
    counts = (int(os.environ.get(k, 0)) for k in ("TORCHELASTIC_RESTART_COUNT", "SLURM_RESTART_COUNT"))
    restarted = any(distributed.gather_objects(any(counts)))  # a machine that came back counts from 0 again
    patience_s = SHARE * timeout_s if restarted else min(PATIENCE_S, SHARE * timeout_s)
    path, made, file = folder / ".lock", [p for p in (folder, *folder.parents) if not p.exists()], None

    def hold():
        nonlocal file
        try:
            folder.mkdir(parents=True, exist_ok=True)
            file = _hold(path, patience_s)
        except OSError as error:
            raise unwritable(folder, error) from None

    distributed.main_first(hold)
    try:
        yield
    finally:
        if file is not None:
            path.unlink(missing_ok=True)  # while it is held, see _hold
            file.close()
            with contextlib.suppress(OSError):  # nothing was written: nothing is left
                for new in made:
                    new.rmdir()


def unwritable(folder: Path, error: OSError) -> UserError:
    return UserError(f"output={folder} cannot be written ({error.strerror}); make room, or choose another output")


def _hold(path: Path, patience_s: float):
    end, told = time.monotonic() + patience_s, False
    while True:
        file = open(path, "a+")
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno not in (errno.EACCES, errno.EAGAIN):  # no locks here
                return file
            file.seek(0)
            owner = file.read().strip() or "another process"
            file.close()
            if time.monotonic() > end:
                raise UserError(f"output={path.parent} is in use by {owner}; end it, or choose another output") from None
            if not told:
                print(f"{path.parent} is in use by {owner}; waiting up to {patience_s:.0f} s for its end", flush=True)
                told = True
            time.sleep(0.2)
            continue
        with contextlib.suppress(FileNotFoundError):
            if os.path.samestat(os.fstat(file.fileno()), path.stat()):  # else its last owner has just removed it
                break
        file.close()
    with contextlib.suppress(OSError):  # a full disk
        file.truncate(0)
        file.write(f"process {os.getpid()} on {socket.gethostname()}\n")
        file.flush()
    return file
