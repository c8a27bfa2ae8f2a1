"""When a rank is lost, the others end soon and say which one it was and which collective it is missing from.

A thread of each rank looks every second whether another rank raised the alarm in the store of the process group. A rank
does when a collective fails or exceeds distributed.timeout_s, when a step makes no progress for so long, or when it ends
with an error of its own. All that are alive then answer with their flight record (protomem/flight.py), also written to
`flight-rankN.json` in the run's folder; who does not answer, or is behind, is named.
"""

from __future__ import annotations

import contextlib
import datetime
import json
import os
import re
import socket
import sys
import threading
import time
import uuid
from pathlib import Path

import torch
import torch.distributed as dist

from protomem import distributed, flight
from protomem.errors import UserError
from protomem.files import replace_file
from protomem.redact import hide

LOOK_S = 1.0  # between looks for an alarm (our default)
GRACE_S = 3.0  # that a rank has to answer one, and then to end by itself (our default)
# What RuntimeErrors of a process group speak of, and those of a computation do not.
GROUP = re.compile("gloo|nccl", re.IGNORECASE)
CONNECTION = re.compile("gloo|nccl|connect|timed out|timeout|socket|broken pipe", re.IGNORECASE)


@contextlib.contextmanager
def watched(folder, timeout_s: float, device: torch.device):
    """Watch over all that is done inside. Collective. A collective that fails becomes a UserError that names the rank."""
    if distributed.world_size() == 1:
        yield
        return
    watch = Watch(Path(folder), timeout_s, device)
    try:
        yield
        distributed.barrier()
    except BaseException as error:
        explained = watch.explain(error)
        watch.stopped = True
        if explained is not None:
            raise explained from error
        raise
    watch.stopped = True
    watch.woken.set()
    watch.thread.join(GRACE_S)
    distributed.barrier()  # rank 0 keeps the store and may leave only when nobody looks into it any more


class Watch:
    def __init__(self, folder: Path, timeout_s: float, device: torch.device):
        self.folder, self.timeout_s, self.rank, self.world = folder, timeout_s, distributed.rank(), distributed.world_size()
        self.hosts = distributed.gather_objects(socket.gethostname())
        key = distributed.broadcast_object(uuid.uuid4().hex)  # not what an earlier attempt left in a shared store
        where = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
        # A connection of its own: the process group's may be waiting.
        store = dist.TCPStore(*where, is_master=False, wait_for_workers=False, timeout=datetime.timedelta(seconds=30))
        self.store = dist.PrefixStore(f"watch/{key}", store)
        self.woken, self.noticed, self.told = threading.Event(), threading.Event(), threading.Event()
        self.stopped = self.quiet = False
        self.own_end = self.error = self.verdict = None
        # NCCL ends the process itself at the time-out, after writing its own record.
        self.patience_s = GRACE_S if device.type == "cpu" else 10 * GRACE_S
        self.thread = threading.Thread(target=self._look, name="watch", daemon=True)
        self.thread.start()

    def name(self, rank: int) -> str:
        return f"rank {rank} ({self.hosts[rank]})"

    # --- the main thread -------------------------------------------------------------------------------------------

    def explain(self, error: BaseException) -> UserError | None:
        """Tell the others that this rank ends with `error`. A UserError in its place if a collective failed."""
        of_the_group = isinstance(error, RuntimeError) and CONNECTION.search(str(error)) is not None
        failed = of_the_group and (flight.open_entry() is not None or GROUP.search(str(error)) is not None)
        self.error = hide((str(error) or type(error).__name__).strip().splitlines()[0])
        # A mistake of the user, told in a line: no record, and nothing in a folder that another run may be using.
        self.quiet = isinstance(error, (SystemExit, UserError)) and not failed
        self.own_end = None if failed else f"{type(error).__name__}: {self.error}"
        self.noticed.set()
        self.woken.set()
        told = self.told.wait(4 * GRACE_S)  # the thread does the talking, since a store behind a cut cable never answers
        if not failed:
            return None
        if not told:
            self.verdict = verdict({self.rank: flight.record()}, [0], self.name, self.error)  # rank 0 keeps the store
            self._write()
        return UserError(self.verdict)

    # --- the thread ------------------------------------------------------------------------------------------------

    def _look(self) -> None:
        while True:
            self.woken.wait(LOOK_S)
            if self.stopped:
                return
            try:
                if self.noticed.is_set() or flight.idle_s() > self.timeout_s or self.store.check(["alarm"]):
                    break
            except RuntimeError:
                self.noticed.wait(self.patience_s)  # until then the main thread's collective fails as well, and can be named
                break
        try:
            self._answer()
        except RuntimeError:  # rank 0 keeps the store
            self.verdict = self.verdict or verdict({self.rank: flight.record()}, [0], self.name, self.error)
        self._write()
        self.told.set()
        if not self.noticed.wait(self.patience_s) and not self.stopped:
            print(f"error: {self.verdict}", file=sys.stderr, flush=True)
            os._exit(1)  # the main thread may never come back

    def _answer(self) -> None:
        """Post this rank's record; the first to do so judges, the others wait for what it says."""
        self.store.set(f"record/{self.rank}", json.dumps(flight.record()))
        first = self.store.add("answers", 1) == 1  # after the record: who sees all answers counted finds all records
        self.store.set("alarm", "")
        if first:
            if self.own_end is not None:
                self.verdict = f"{self.name(self.rank)} ended with {self.own_end}"
            else:
                self._until(lambda: self.store.add("answers", 0) >= self.world)
                self.verdict = self._judge()
            self.store.set("verdict", self.verdict)
        elif self._until(lambda: self.store.check(["verdict"]), 2 * GRACE_S):
            self.verdict = self.store.get("verdict").decode()
        else:
            self.verdict = self._judge()
        self.store.add("told", 1)
        if self.rank == 0:  # the store ends with this rank
            self._until(lambda: self.store.add("told", 0) >= self.store.add("answers", 0), LOOK_S + 0.5, at_least=LOOK_S)

    def _until(self, true, seconds: float | None = None, at_least: float = 0.0) -> bool:
        begin, end = time.monotonic(), time.monotonic() + (GRACE_S if seconds is None else seconds)
        while time.monotonic() < end:
            if time.monotonic() - begin >= at_least and true():
                return True
            time.sleep(0.05)
        return False

    def _judge(self) -> str:
        found = {r: f"record/{r}" for r in range(self.world)}
        records = {r: json.loads(self.store.get(key)) for r, key in found.items() if self.store.check([key])}
        return verdict(records, [r for r in found if r not in records], self.name, self.error)

    def _write(self) -> None:
        if self.quiet:
            return
        shown = {"rank": self.rank, "host": self.hosts[self.rank], "pid": os.getpid(), "time": round(time.time(), 3)}
        shown |= {"verdict": self.verdict, "error": self.error, **flight.record()}
        with contextlib.suppress(OSError):  # a full disk must not hide the verdict
            self.folder.mkdir(parents=True, exist_ok=True)
            replace_file(self.folder / f"flight-rank{self.rank}.json", json.dumps(shown, indent=1).encode())


def verdict(records: dict[int, dict], silent: list[int], name, error: str | None) -> str:
    """One line: who is missing where, from the flight records of the ranks that answered. name(rank) -> how it is called."""
    waiting = {r: record["open"] for r, record in records.items() if record["open"]}
    if not waiting:
        gone = f"{', '.join(map(name, silent))} gave no sign of life within {GRACE_S:g} s; " if silent else ""
        still = max(records, key=lambda r: records[r]["idle_s"])
        return f"{gone}no rank is in a collective; {_standing(name(still), records[still])}"
    place = max(waiting.values(), key=lambda entry: entry["number"])
    behind = [r for r, record in records.items() if record["begun"] < place["number"]]
    here = [(r, entry) for r, entry in waiting.items() if entry["number"] == place["number"]]
    others = [r for r, entry in here if (entry["name"], entry["bytes"]) != (place["name"], place["bytes"])]
    step = "" if place["step"] is None else f" of step {place['step']}"
    what = f"{place['name']} ({place['bytes']} bytes, collective {place['number']}){step}"
    parts = [f"{name(r)} gave no sign of life within {GRACE_S:g} s" for r in silent]
    parts += [_standing(name(r), records[r]) for r in behind]
    if parts:
        return f"missing at {what}: {'; '.join(parts)}"
    if others:
        told = ", ".join(f"{name(r)} is in {waiting[r]['name']} ({waiting[r]['bytes']} bytes)" for r in others)
        return f"the ranks are in different collectives: {told}, the others in {what}"
    return f"all ranks came to {what}, and it failed: {error or 'it takes longer than distributed.timeout_s'}"


def _standing(who: str, record: dict) -> str:
    frame = next((f for f in reversed(record["stack"]) if "/torch/" not in f), record["stack"][-1])
    return f"{who} has been at {frame} for {record['idle_s']:.0f} s"
