"""What `protomem preflight` prints: tables for people (plain where there is no terminal), or JSON."""

from __future__ import annotations

import json
from collections import defaultdict

from rich.markup import escape

from protomem.plan.show import _console, _line, _table

FORMULAS = (
    "S: bytes of the gathered result, of the input of a reduce-scatter, of the buffer of an all-reduce; t: seconds of the "
    "slowest rank (median of calls). Algorithm bandwidth = S / t; bus bandwidth = (W - 1) / W of it, twice that "
    "for an all-reduce."
)


def print_json(found: dict) -> None:
    print(json.dumps(found, indent=1), flush=True)


def print_report(found: dict) -> None:
    console = _console()
    ranks = found["ranks"]
    _line(console, f"[bold]{found['world_size']} ranks on {len(found['clocks'])} hosts, {found['launcher']}[/bold]")
    versions = ", ".join(f"{name} {value}" for name, value in ranks[0]["versions"].items() if value)
    _line(console, f"Rank 0: {versions}; source {ranks[0]['source']}")
    console.print(_host_table(found))
    for name, facts in found["data"].items():
        _line(console, escape(f"{name}: " + ", ".join(f"{key} {value}" for key, value in facts.items())))
    if disk := found["disk"]:
        text = f"{found['folder']}: {disk['free'] / 1e9:.2f} GB free, {disk['checkpoints']} checkpoints of "
        _line(console, escape(f"{text}{disk['checkpoint'] / 1e9:.3g} GB (keep, one being written, best)"))
    if found["collectives"]:
        console.print(_collective_table(found))
        _line(console, FORMULAS)
        console.print(_link_table(found))
    for text in found["skipped"]:
        _line(console, f"not checked: {text}")
    for problem in found["problems"]:
        _line(console, f"[bold red]{problem['check']}[/bold red]: {escape(problem['text'])}")
    count = len(found["problems"])
    verdict = "passed" if not count else f"FAILED, {count} problem{'s' * (count > 1)}"
    _line(console, f"preflight: [bold]{verdict}[/bold]")


def _host_table(found: dict):
    own = defaultdict(list)
    for rank in found["ranks"]:
        own[rank["host"]].append(rank)
    dtypes = list(found["ranks"][0]["tflops"])
    table = _table("host", "ranks", "device", "GB", *(f"{name} TFLOP/s" for name in dtypes), "clock ms")
    for host, ranks in own.items():
        device, clock = ranks[0]["device"], found["clocks"][host]
        rates = [_span([rank["tflops"][name] for rank in ranks]) for name in dtypes]
        numbers = f"{ranks[0]['rank']}–{ranks[-1]['rank']}" if len(ranks) > 1 else str(ranks[0]["rank"])
        offset = f"{clock['offset_s'] * 1e3:+.1f} ± {clock['error_s'] * 1e3:.1f}" if clock["error_s"] else "0"
        memory = f"{device['memory'] / 1e9:.0f}"
        table.add_row(escape(host), f"{len(ranks)} ({numbers})", escape(device["name"]), memory, *rates, offset)
    return table


def _span(values: list[float]) -> str:
    low, high = min(values), max(values)
    return f"{low:.3g}" if f"{low:.3g}" == f"{high:.3g}" else f"{low:.3g} to {high:.3g}"


def _collective_table(found: dict):
    table = _table("collective", "bytes", "ms", "algorithm GB/s", "bus GB/s")
    for c in sorted(found["collectives"], key=lambda c: c["kind"]):
        rates = (f"{c[key] / 1e9:.3g}" for key in ("algorithm_rate", "bus_rate"))
        table.add_row(c["kind"].replace("_", "-"), f"{c['bytes']:,}", f"{c['seconds'] * 1e3:.3f}", *rates)
    return table


def _link_table(found: dict):
    host = [rank["host"] for rank in found["ranks"]]
    table = _table("links, both directions at once", "pairs", "slowest", "GB/s each way: least", "median", "most")
    for same, name in ((True, "within hosts"), (False, "between hosts")):
        kind = sorted((k for k in found["links"] if (len({host[r] for r in k["ranks"]}) == 1) == same), key=lambda k: k["rate"])
        if kind:
            slowest = " – ".join(f"{host[r]} ({r})" for r in kind[0]["ranks"])
            rates = (kind[k]["rate"] for k in (0, len(kind) // 2, -1))
            table.add_row(name, str(len(kind)), escape(slowest), *(f"{rate / 1e9:.3g}" for rate in rates))
    return table
