"""Which ranks and links are slow: those that take more than `factor` times the median of their kind.

The median is the faster one of two middle values, so that of two ranks one can be slow.
"""

from __future__ import annotations

import statistics
from collections import defaultdict

from protomem.preflight.facts import Problem, who

FACTOR = {"cuda": 1.3, "cpu": 3.0}  # CPUs share cores with others (our defaults)


def slow_ranks(rates: list[dict[str, float]], factor: float, facts: list[dict]) -> list[Problem]:
    """rates[rank]: {dtype: TFLOP/s}."""
    out = []
    for name in rates[0]:
        usual = statistics.median_high(rate[name] for rate in rates)
        for rank, rate in enumerate(rates):
            if rate[name] * factor < usual:
                text = f"{who([rank], facts)} does {rate[name]:.3g} TFLOP/s of {name} matrix products, the median is "
                text += f"{usual:.3g} ({usual / rate[name]:.1f} times as fast; limit {factor:g})"
                out.append(Problem("slow rank", f"{text}; look for other jobs, throttling, power limits", [rank]))
    return out


def slow_links(links: list[dict], factor: float, facts: list[dict]) -> list[Problem]:
    """Links within hosts and links between hosts are compared among themselves. First come ends all of whose links are slow
    (a host's, where they lead to other hosts): the best link of each that has several is compared with the others' best.
    Then single links among the rest."""
    out = []
    for same in (True, False):
        kind = [link for link in links if (len({facts[r]["host"] for r in link["ranks"]}) == 1) == same]
        times = defaultdict(list)
        for link in kind:
            for end in _ends(link, same, facts):
                times[end].append(link["seconds"])
        best = {end: min(own) for end, own in times.items() if len(own) > 1}
        usual = statistics.median_low(best.values()) if best else 0.0
        slow = [end for end, seconds in best.items() if seconds > factor * usual]
        size = max((link["rate"] * link["seconds"] for link in kind), default=0.0)
        for end in slow:
            own = [end] if same else [rank for rank, f in enumerate(facts) if f["host"] == end]
            what = f"every link of {who(own, facts)} {'within the host' if same else 'to other hosts'} is slow: the best has"
            out.append(Problem("slow link", _compared(what, size / best[end], size / usual, factor), own))
        rest = [link for link in kind if not set(_ends(link, same, facts)) & set(slow)]
        usual = statistics.median_low(link["seconds"] for link in rest) if rest else 0.0
        for link in rest:
            if link["seconds"] > factor * usual:
                a, b = (who([rank], facts) for rank in link["ranks"])
                out.append(Problem("slow link", _compared(f"{a} – {b} has", link["rate"], size / usual, factor), link["ranks"]))
    return out


def _ends(link: dict, same: bool, facts: list[dict]) -> list:
    return [rank if same else facts[rank]["host"] for rank in link["ranks"]]


def _compared(what: str, rate: float, usual: float, factor: float) -> str:
    return f"{what} {rate / 1e9:.3g} GB/s, the median is {usual / 1e9:.3g} ({usual / rate:.1f} times as fast; limit {factor:g})"
