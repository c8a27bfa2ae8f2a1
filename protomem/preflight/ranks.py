"""Ranks that go through the check phase by phase, in bounded time: whoever does not answer is named, and nobody waits for
ever. What they tell each other here goes over the store, not over the fabric that is to be checked."""

from __future__ import annotations

import contextlib
import datetime
import os
import pickle
import socket
import sys
import threading
import time
from typing import Callable, Iterator

import torch.distributed as dist

from protomem import distributed
from protomem.errors import UserError

GRACE_S = 2.0  # the main rank, which tells what happened, gives up so much earlier than the others


def host() -> str:
    return socket.gethostname()


def meet(rank: int, world: int, timeout_s: float) -> dist.Store:
    """The store at which all ranks meet. Raises UserError, in `timeout_s`, that names the ranks that did not come."""
    address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    hosted = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"  # by torchrun itself
    try:
        store = dist.TCPStore(
            address,
            port,
            world,
            is_master=rank == 0 and not hosted,
            timeout=datetime.timedelta(seconds=timeout_s),
            wait_for_workers=False,
            multi_tenant=True,
        )
    except RuntimeError as error:
        raise UserError(
            f"rank {rank} ({host()}) cannot reach {address}:{port}, where the ranks meet, within {timeout_s:g} s: is rank 0 "
            f"running, and can {host()} reach that address? ({_first_line(error)})"
        ) from None
    store = dist.PrefixStore(f"preflight-{os.environ.get('TORCHELASTIC_RESTART_COUNT', 0)}", store)
    roll_call(store, "start", rank, world, timeout_s)
    return store


def roll_call(store: dist.Store, name: str, rank: int, world: int, timeout_s: float) -> None:
    """Wait until every rank has come here. Raises UserError that names those that have not within `timeout_s`; where the
    main rank tells that, the others end quietly."""
    try:
        store.set(f"host/{rank}", host())
        store.set(f"{name}/{rank}", "here")
        store.add(f"{name}/count", 1)
        end, pause = time.monotonic() + timeout_s + (GRACE_S if rank else 0), 0.001
        while (count := store.add(f"{name}/count", 0)) < world:
            if count < 0:
                raise SystemExit(2)
            if time.monotonic() > end:
                absent = [r for r in range(world) if not store.check([f"{name}/{r}"])]
                named = ", ".join(_named(store, r) for r in absent[:8]) + (", ..." if len(absent) > 8 else "")
                if rank == 0:
                    store.add(f"{name}/count", -2 * world)  # it has given up; the store may end with it
                    time.sleep(GRACE_S / 2)
                raise UserError(f"{len(absent)} of {world} ranks did not come to '{name}' within {timeout_s:g} s: {named}")
            time.sleep(pause)
            pause = min(2 * pause, 0.002 + 5e-5 * world)  # one store answers all of them
    except RuntimeError as error:
        raise UserError(f"rank {rank} ({host()}) lost the others at '{name}': {_first_line(error)}") from None


def _named(store: dist.Store, rank: int) -> str:
    where = store.get(f"host/{rank}").decode() if store.check([f"host/{rank}"]) else "it never came"
    return f"rank {rank} ({where})"


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


@contextlib.contextmanager
def limit(seconds: float, end: Callable[[], None]) -> Iterator[None]:
    """Call `end` on another thread if what is inside takes longer."""
    timer = threading.Timer(seconds, end)
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()


def give_up(text: str) -> None:
    """The last word of a process that cannot be interrupted."""
    print(f"error: {text}", file=sys.stderr, flush=True)
    os._exit(1)


class Watch:
    """Sees to it that all ranks are in the same phase and that a phase ends: after `timeout_s` the process is ended, since
    a call into NCCL or into a file server that is gone cannot be interrupted in any other way."""

    def __init__(self, context: distributed.Context, timeout_s: float):
        self.rank, self.world, self.timeout_s = context.rank, context.world_size, timeout_s
        self.steps = self.gathered = 0
        self.store = dist.PrefixStore("preflight", distributed.store())
        self.second = self.store.clone()  # its own connection: the first one may be what hangs

    @contextlib.contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """All ranks enter together. Errors of torch become a UserError of one line."""
        self.meet(name)
        with limit(self.timeout_s + (GRACE_S if self.rank else 0), lambda: self._end(name)):
            try:
                yield
            except RuntimeError as error:
                raise UserError(f"rank {self.rank} ({host()}) failed in '{name}': {_first_line(error)}") from error

    def meet(self, name: str) -> None:
        roll_call(self.store, name, self.rank, self.world, self.timeout_s)
        self.at(name)

    def leave(self) -> None:
        """The end, at which all ranks meet. The main rank, with which the store may end, goes last."""
        self.meet("end")
        self.store.add("gone", 1)
        end = time.monotonic() + self.timeout_s
        while self.rank == 0 and self.store.add("gone", 0) < self.world and time.monotonic() < end:
            time.sleep(0.002)

    def gather(self, value) -> list:
        """One small value per rank -> the list of all, on every rank; over the store."""
        self.gathered += 1
        key = f"gather/{self.gathered}"
        self.store.set(f"{key}/{self.rank}", pickle.dumps(value))
        roll_call(self.store, f"answers, {self.gathered}", self.rank, self.world, self.timeout_s)
        return [pickle.loads(value) for value in self.store.multi_get([f"{key}/{r}" for r in range(self.world)])]

    def at(self, what: str) -> None:
        """Leave word of what this rank begins, for the message if it never ends."""
        self.steps += 1
        self.store.set(f"at/{self.rank}", f"{self.steps} {what}")

    def _end(self, name: str) -> None:
        try:
            word = [self.second.get(f"at/{r}").decode().split(" ", 1) for r in range(self.world)]
            steps = [int(step) for step, _ in word]
            behind = [r for r in range(self.world) if steps[r] < max(steps)] or list(range(self.world))
            told = ", ".join(f"{_named(self.second, r)} in '{word[r][1]}'" for r in behind[:8])
            told += ", ..." if len(behind) > 8 else ""
        except RuntimeError as error:
            behind, told = [self.rank], f"rank {self.rank} ({host()}), which cannot ask the others: {_first_line(error)}"
        if self.rank == 0 or self.rank in behind:
            give_up(f"'{name}' has not ended within {self.timeout_s:g} s; behind: {told}")
        os._exit(1)
