"""What all ranks must see alike outside of their own memory: the time, the run's folder, the data."""

from __future__ import annotations

import contextlib
import hashlib
import os
import secrets
import time
from pathlib import Path

from omegaconf import DictConfig, OmegaConf

from protomem.data.index_cache import content_fingerprint
from protomem.data.records import open_records
from protomem.errors import UserError
from protomem.preflight.facts import Problem, agree, who
from protomem.preflight.ranks import Watch

PINGS = 8  # questions to the main rank's clock, of which the quickest answered one counts (our default)
VISIBLE_S = 10.0  # so long a file of another host may take to be seen; file servers' clients keep listings (our default)
SAMPLES = 64  # images that are read on every rank, evenly spread over the set (our default)


# --- time ----------------------------------------------------------------------------------------------------------


def clocks(watch: Watch, hosts: list[str]) -> dict[str, tuple[float, float]]:
    """{host: (its clock minus rank 0's, in seconds, and how far that can be wrong)}.

    One rank of each host asks rank 0 for the time over the store. With t0, t1 its own clock before and after and t the
    answer, the offset is (t0 + t1) / 2 - t; it is wrong by (t1 - t0) / 2 at most, whichever way was the slower one.
    """
    own, store = None, watch.store
    for asker in [hosts.index(name) for name in dict.fromkeys(hosts)]:
        if asker == 0:
            continue
        for k in range(PINGS):
            question, answer = f"clock/{asker}/{k}/question", f"clock/{asker}/{k}/answer"
            if watch.rank == 0:
                store.get(question)
                store.set(answer, repr(time.time()))
            elif watch.rank == asker:
                before = time.time()
                store.set(question, "?")
                there = float(store.get(answer))
                after = time.time()
                found = (before + after) / 2 - there, (after - before) / 2
                own = found if own is None or found[1] < own[1] else own
    answers = watch.gather(own)
    return {name: answers[hosts.index(name)] or (0.0, 0.0) for name in dict.fromkeys(hosts)}


def compare_clocks(found: dict[str, tuple[float, float]], limit_s: float, facts: list[dict]) -> list[Problem]:
    out = []
    for name, (offset, error) in found.items():
        if abs(offset) - error > limit_s:
            own = [rank for rank, f in enumerate(facts) if f["host"] == name]
            text = f"the clock of {who(own, facts)} is {offset:+.3f} s (± {error:.3f}) off that of {facts[0]['host']}"
            out.append(Problem("clock", f"{text}, more than {limit_s:g} s; synchronise it (chrony, ntpd)", own))
    return out


# --- the run's folder ----------------------------------------------------------------------------------------------


def folder(watch: Watch, path: Path, facts: list[dict]) -> list[Problem]:
    """Every rank leaves a file in the folder and looks for everybody else's; nothing of it stays, nor a folder that was
    not there before."""
    absent = [p for p in (path, *path.parents) if not p.exists()]
    tokens = path / watch.gather(f".preflight-{secrets.token_hex(8)}")[0]
    own, problem, seen = tokens / str(watch.rank), None, set()
    watch.meet("folder: everybody has looked what is there")
    try:
        tokens.mkdir(parents=True, exist_ok=True)
        own.write_text("here")
    except OSError as error:
        problem = error.strerror
    problems = watch.gather(problem)
    writers = {rank for rank, failed in enumerate(problems) if not failed}
    end = time.monotonic() + VISIBLE_S
    while True:
        with contextlib.suppress(OSError):
            seen = {int(name) for name in os.listdir(tokens)}
        if problem or seen >= writers or time.monotonic() > end:
            break
        time.sleep(0.05)
    views = watch.gather([] if problem else sorted(writers - seen))
    with contextlib.suppress(OSError):
        own.unlink(missing_ok=True)
    watch.meet("folder: everybody has removed its file")
    for made in (tokens, *absent):
        with contextlib.suppress(OSError):  # another rank was first, or there is something in it by now
            made.rmdir()
    return _unwritable(path, problems, facts) + _unshared(path, views, facts)


def _unwritable(path: Path, problems: list[str | None], facts: list[dict]) -> list[Problem]:
    out = []
    for reason in sorted(set(filter(None, problems))):
        own = [rank for rank, problem in enumerate(problems) if problem == reason]
        out.append(Problem("folder", f"{path} cannot be written on {who(own, facts)}: {reason}", own))
    return out


def _unshared(path: Path, views: list[list[int]], facts: list[dict]) -> list[Problem]:
    """views[rank]: whose files it does not see. The ranks that see one another's with most others are right."""
    groups: dict[tuple, list[int]] = {}
    for rank, unseen in enumerate(views):
        groups.setdefault(tuple(unseen), []).append(rank)
    usual = max(groups, key=lambda unseen: (len(groups[unseen]), -groups[unseen][0]))
    out = []
    for unseen, own in groups.items():
        if unseen and unseen != usual:
            others = who(list(unseen), facts)
            text = f"{path} on {who(own, facts)} is not the folder of the others: what {others} wrote is not there"
            out.append(Problem("folder", f"{text}; put the output on a shared file system", own))
    return out


# --- data ----------------------------------------------------------------------------------------------------------


def look_at_data(watch: Watch, config: DictConfig) -> dict:
    """What this rank finds at data.train and data.eval: counts, fingerprint, hash of sampled images, or an error.

    The main rank goes first, since the first to open a large set builds its index."""
    if watch.rank == 0:
        found = _look(config)
    watch.meet("data: the other ranks")
    return found if watch.rank == 0 else _look(config)


def _look(config: DictConfig) -> dict:
    out = {}
    if not OmegaConf.is_missing(config.data, "train"):
        out["data.train"] = _train(config)
    for path in config.data.eval:
        try:
            out[f"data.eval {path}"] = {"fingerprint": content_fingerprint([], [Path(path)])}
        except OSError as error:
            out[f"data.eval {path}"] = {"error": f"{path}: {error.strerror}"}
    return out


def _train(config: DictConfig) -> dict:
    try:
        records = open_records(config.data.train, strict=config.data.on_corrupt != "skip")
        digest, count = hashlib.sha256(), min(SAMPLES, len(records))
        damaged = set(records.damaged.tolist())
        for i in (k * len(records) // count for k in range(count)):
            if i not in damaged:
                digest.update(f"{i}\0{records.label(i)}\0".encode() + records.bytes(i))
    except (UserError, OSError) as error:
        return {"error": str(error)}
    numbers = {"images": len(records), "identities": records.num_classes}
    return {**numbers, "fingerprint": records.fingerprint, "sampled": digest.hexdigest()[:16]}


def compare_data(found: list[dict], facts: list[dict]) -> list[Problem]:
    """found[rank] = look_at_data there."""
    out = []
    for name in found[0]:
        own = [rank for rank, f in enumerate(found) if "error" in f[name]]
        for reason in sorted({found[rank][name]["error"] for rank in own}):
            there = [rank for rank in own if found[rank][name]["error"] == reason]
            out.append(Problem("data", f"{name} cannot be read on {who(there, facts)}: {reason}", there))
        shown = [", ".join(f"{key} {value}" for key, value in f[name].items()) for f in found]
        sound = [rank for rank in range(len(found)) if rank not in own]
        if sound:
            usual = max((shown[rank] for rank in sound), key=lambda s: [shown[r] for r in sound].count(s))
            shown = [usual if rank in own else text for rank, text in enumerate(shown)]
            out += agree("data", f"{name}: what is read", shown, facts, "copy it again, or share one copy")
    return out
