"""A check of machines, fabric, folders and data on all ranks, before a GPU hour is spent. It trains nothing."""

from __future__ import annotations

import datetime
import json
from pathlib import Path

from omegaconf import DictConfig, OmegaConf

from protomem import config as configs
from protomem import distributed
from protomem.errors import UserError
from protomem.files import replace_file
from protomem.preflight import fabric, facts, shared, show, slow
from protomem.preflight.ranks import GRACE_S, Watch, give_up, host, limit, meet
from protomem.redact import without_secrets


def preflight(
    arguments: list[str],
    *,
    output: Path | None = None,
    timeout_s: float = 120.0,
    clock_limit_s: float = 0.5,
    slow_factor: float | None = None,
    json_output: bool = False,
) -> int:
    """Collective: check everything, print it on the main rank; returns 0 if all is well, 1 if not, on all ranks.

    arguments: config files and key=value, or none; then data and output folder are not checked (output: this folder is).
    timeout_s, clock_limit_s: seconds. slow_factor: times the median; None: by device (protomem/preflight/slow.py). All three
    defaults are ours.
    Raises UserError for a config that is wrong on all ranks, and when a rank does not come within timeout_s.
    """
    config, config_error = _load(arguments)
    device = config.distributed.device if config is not None else "auto"
    late = f"{host()}: joining the other ranks has not ended within {2 * timeout_s:g} s, though all have come"
    with limit(2 * timeout_s + GRACE_S, lambda: give_up(late)):  # NCCL's first connection, which nothing else bounds
        context = distributed.init(device, timeout_s + 60, meet=lambda rank, world: meet(rank, world, timeout_s))
    try:
        watch = Watch(context, timeout_s)
        with watch.phase("facts"):
            all_facts = watch.gather(facts.of_this_rank(context, config, config_error))
        if errors := [f["config_error"] for f in all_facts if f["config_error"]]:
            _refuse(errors, all_facts, context)
        found = without_secrets(measure(watch, context, config, all_facts, output, clock_limit_s, slow_factor))
        if context.is_main:
            (show.print_json if json_output else show.print_report)(found)
            if output is not None:
                output.mkdir(parents=True, exist_ok=True)
                replace_file(output / "preflight.json", json.dumps(found, indent=1).encode())
        watch.leave()  # nobody leaves before the report is out: a launcher ends the others with the first that fails
        return 0 if found["passed"] else 1
    finally:
        distributed.shutdown()


def measure(
    watch: Watch,
    context: distributed.Context,
    config: DictConfig,
    all_facts: list[dict],
    output: Path | None,
    clock_limit_s: float,
    slow_factor: float | None,
) -> dict:
    """Everything that is found, the same on all ranks; `problems` says what is wrong, `skipped` what was not looked at."""
    hosts, device, skipped = [f["host"] for f in all_facts], context.device, []
    factor = slow_factor or slow.FACTOR[device.type]
    problems = facts.compare(all_facts)
    with watch.phase("clock"):
        clocks = shared.clocks(watch, hosts)
    problems += shared.compare_clocks(clocks, clock_limit_s, all_facts)

    where = output if output is not None else None if OmegaConf.is_missing(config, "output") else Path(config.output)
    if where is not None:
        where = where.expanduser().absolute()
        with watch.phase("folder"):
            problems += shared.folder(watch, where, all_facts)
    else:
        skipped.append("folder: neither a config with an output nor --output was given")

    data = [{}]
    if OmegaConf.is_missing(config.data, "train"):
        skipped.append("data: no config with data.train was given")
    else:
        with watch.phase("data"):
            data = watch.gather(shared.look_at_data(watch, config))
        problems += shared.compare_data(data, all_facts)

    room = None
    if where is None or "identities" not in data[0].get("data.train", {}):
        skipped.append("disk: without folder and data the size of a checkpoint is not known")
    else:
        with watch.phase("disk"):
            room, lacking = watch.gather(_room(config, where, data[0]["data.train"], context))[0]
        problems += lacking

    with watch.phase("matrix products"):
        rates = watch.gather(fabric.gemm_rates(watch, device))
    problems += slow.slow_ranks(rates, factor, all_facts)
    collectives, links = [], []
    if context.world_size > 1:
        with watch.phase("collectives"):
            collectives = fabric.collectives(watch, device)
        with watch.phase("links"):
            links = fabric.links(watch, device, hosts)
        problems += slow.slow_links(links, factor, all_facts)
    else:
        skipped.append("collectives and links: there is a single rank")
    return {
        "passed": not problems,
        "problems": [vars(p) | {"hosts": sorted({hosts[r] for r in p.ranks})} for p in problems],
        "skipped": skipped,
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "launcher": context.launcher,
        "world_size": context.world_size,
        "limits": {"timeout_s": watch.timeout_s, "clock_s": clock_limit_s, "slow_factor": factor},
        "ranks": [f | {"tflops": rate} for f, rate in zip(all_facts, rates)],
        "clocks": {name: {"offset_s": offset, "error_s": error} for name, (offset, error) in clocks.items()},
        "folder": str(where) if where is not None else None,
        "data": data[0],
        "disk": room,
        "collectives": collectives,
        "links": links,
    }


def _load(arguments: list[str]) -> tuple[DictConfig | None, str | None]:
    """The config, or why there is none: a rank must not stay away because a file is missing on its host alone."""
    try:
        return configs.load(*configs.split_arguments(arguments), optional=configs.RUN_KEYS), None
    except UserError as error:
        return None, str(error)


def _refuse(errors: list[str], all_facts: list[dict], context: distributed.Context) -> None:
    """All ranks end; the main rank says why."""
    wrong = [f["rank"] for f in all_facts if f["config_error"]]
    where = "" if len(wrong) == len(all_facts) else f", on {facts.who(wrong, all_facts)} alone"
    raise UserError(errors[0] + where) if context.is_main else SystemExit(2)


def _room(config: DictConfig, where: Path, train: dict, context: distributed.Context) -> tuple[dict, list] | None:
    """(sizes, problems) of the disk of the output folder, by the main rank."""
    if not context.is_main:
        return None
    from protomem.plan import hardware
    from protomem.plan.case import make_case
    from protomem.plan.memory import checkpoint_bytes

    on = hardware.device("cpu")  # rates do not matter here
    case = make_case(config, context.world_size, on, hardware.fabric(None, on), train["identities"], train["images"])
    one = sum(checkpoint_bytes(case).values())
    # One more while a new one is written before an old one goes, and the best one besides the newest.
    count = config.checkpoint.keep + 1 + bool(config.data.eval)
    existing = sum(p.stat().st_size for p in (where / "checkpoints").glob("step-*/*") if p.is_file())
    free, problem = facts.disk(where, count * one, existing)
    sizes = {"free": free, "checkpoint": one, "checkpoints": count, "existing": existing}
    return sizes, [problem] if problem else []
