"""The HTML of a run report: sections built from plain data, everything escaped, pictures as data URIs, no scripts."""

from __future__ import annotations

import base64
import math
import re
import time
from html import escape
from pathlib import Path

import numpy as np

from protomem.console import event_line
from protomem.evaluate.verification import FARS, far_name

_CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f\ud800-\udfff]")
KINDS = {
    "worst_genuine": "same identity, least alike",
    "worst_impostor": "different identities, most alike",
    "best_genuine": "same identity, most alike",
    "best_impostor": "different identities, least alike",
}
STYLE = """
:root { --ink: #1e293b; --soft: #64748b; --line: #e2e8f0; --pale: #f8fafc; --accent: #2563eb }
* { box-sizing: border-box }
body { margin: 0; background: var(--pale); color: var(--ink); font: 15px/1.5 system-ui, "Segoe UI", Roboto, sans-serif }
main { max-width: 1120px; margin: 0 auto; padding: 28px 24px 60px }
h1 { font-size: 26px; margin: 0; overflow-wrap: anywhere }
h2 { font-size: 18px; margin: 34px 0 10px }
h3 { font-size: 15px; margin: 20px 0 6px }
p { margin: 4px 0 } .soft { color: var(--soft); font-size: 13px }
.notice { background: #fffbeb; border: 1px solid #fde68a; border-radius: 8px; padding: 8px 14px; margin: 14px 0 }
.card { background: #fff; border: 1px solid var(--line); border-radius: 10px; padding: 12px; overflow-x: auto }
.grid { display: grid; grid-template-columns: repeat(auto-fit, minmax(460px, 1fr)); gap: 14px }
.grid + .wide, .wide + .grid { margin-top: 14px }
.grid img, .wide img { width: 100%; display: block }
.facts { display: flex; flex-wrap: wrap; gap: 4px 26px; margin-top: 8px } .facts b { font-weight: 600 }
table { border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums }
th, td { padding: 5px 10px; text-align: right; white-space: nowrap; border-bottom: 1px solid var(--line) }
th { font-size: 13px; font-weight: 600; color: var(--soft) }
th:first-child, td:first-child, td.text, th.text { text-align: left }
tr.before td { color: var(--soft) } tr.after td { font-weight: 600 } tr.end td { border-bottom: 2px solid var(--line) }
tr:last-child td { border-bottom: 0 }
table.plain td { text-align: left; white-space: normal; overflow-wrap: anywhere; vertical-align: top }
table.plain td:first-child { white-space: nowrap; color: var(--soft) }
.pairs { display: grid; grid-template-columns: repeat(auto-fit, minmax(490px, 1fr)); gap: 12px 18px }
.pairs p { font-size: 13px; color: var(--soft); margin: 0 0 4px }
.pair { display: inline-block; margin: 0 8px 6px 0; font-size: 12px; text-align: center }
.pair img { width: 56px; height: 56px; object-fit: cover } .pair img:first-child { border-radius: 6px 0 0 6px }
.pair img:nth-child(2) { border-radius: 0 6px 6px 0 } .pair.wrong { color: #b91c1c; font-weight: 600 }
pre { margin: 0; font: 12.5px/1.45 ui-monospace, Menlo, Consolas, monospace; white-space: pre-wrap }
pre { overflow-wrap: anywhere }
details { margin-top: 10px } summary { cursor: pointer; font-weight: 600 }
@media (max-width: 600px) { .grid, .pairs { grid-template-columns: 1fr } }
@media print { body { background: #fff } .card { break-inside: avoid } }
"""


def page(title: str, sections: list[str]) -> str:
    text = (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{escape(title)} - protomem run report</title><style>{STYLE}</style></head>\n"
        f"<body><main>\n{''.join(sections)}</main></body></html>\n"
    )
    return _CONTROL.sub("\ufffd", text)


def head(name: str, records: list[dict], environment: dict) -> str:
    """Title and the facts of the run: how far it got, how fast it was, on what."""
    facts, steps = [], [r for r in records if "event" not in r]
    if steps:
        last = steps[-1]
        facts.append(("last step logged", f"{last['step']:,}"))
        if last.get("loss") is not None:
            facts.append(("loss", f"{last['loss']:.4g}"))
        speed = [r["images_per_s"] for r in steps if r.get("images_per_s") is not None]
        if speed:
            facts.append(("median images/s", f"{np.median(speed):,.0f}"))
        if last.get("memory_gb") is not None:
            facts.append(("peak memory", f"{max(r.get('memory_gb') or 0 for r in steps):.1f} GB"))
    if environment:
        gpus = environment.get("gpus")
        gpus = gpus if isinstance(gpus, list) else []
        facts.append(("ranks", environment.get("world_size")))
        facts.append(("device", f"{len(gpus)} × {gpus[0]}" if gpus else environment.get("cpu")))
        facts.append(("protomem", f"{environment.get('protomem')} {environment.get('commit') or ''}"))
    if records and "time" in records[-1]:
        facts.append(("last logged", time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime(records[-1]["time"]))))
    items = "".join(f"<span>{escape(k)} <b>{escape(str(v))}</b></span>" for k, v in facts)
    return f'<h1>{escape(name)}</h1><p class="soft">protomem run report</p><div class="facts">{items}</div>\n'


def headline(evaluations: dict[str, dict[str, dict]]) -> str:
    """The table of results, newest and untrained encoder side by side, and what must be said about it."""
    if not evaluations:
        return '<div class="notice">This run has no evaluation yet.</div>\n'
    rendered = [
        name for name, tags in evaluations.items() if any(data["summary"].get("rendered") for data in tags.values())
    ]
    rows, undefined = [], False
    for name, tags in evaluations.items():
        shown = [tag for tag in tags if tag == "initial"] + [tag for tag in list(tags)[-1:] if tag != "initial"]
        for tag in shown:
            s = tags[tag]["summary"]
            cells = [
                escape(name) + (" (rendered)" if name in rendered else "") if tag == shown[0] else "",
                encoder_name(tag),
            ]
            cells.append(f"{100 * s['accuracy']:.2f} ± {100 * s['accuracy_std']:.2f}")
            rates = [s[f"tar@{far_name(far)}"] for far in FARS]
            undefined |= any(math.isnan(rate) for rate in rates)
            cells += [percent(rate) for rate in rates] + [percent(s["auc"], 3), percent(s["eer"]), f"{s['pairs']:,}"]
            kind = ("before" if tag == "initial" else "after") + (" end" if tag == shown[-1] else "")
            tds = "".join(f'<td class="text">{c}</td>' if i == 1 else f"<td>{c}</td>" for i, c in enumerate(cells))
            rows.append(f'<tr class="{kind}">{tds}</tr>')
    tars = "".join(f"<th>TAR at<br>FAR {far_name(far)}</th>" for far in FARS)
    what = "Accuracy on rendered faces" if len(rendered) == len(evaluations) else "Accuracy"
    notes = ["All values in per cent. Accuracy: mean ± standard deviation over the folds of the LFW protocol."]
    if undefined:
        notes.append("n/a: too few impostor pairs; a false accept rate f needs at least 1/f of them.")
    notice = ""
    if rendered:
        notice = (
            '<div class="notice"><b>Rendered faces, not photographs.</b> The sets marked (rendered) are made by '
            "protomem from synthetic identities. They show that training works and compare methods with each other; "
            "they do not compare with published results on LFW and the like.</div>"
        )
    return (
        f'<h2>{what}</h2>{notice}<div class="card"><table><tr><th>pair set</th><th class="text">encoder</th>'
        f"<th>accuracy</th>{tars}<th>AUC</th><th>EER</th><th>pairs</th></tr>{''.join(rows)}</table></div>"
        f'<p class="soft">{" ".join(notes)}</p>\n'
    )


def encoder_name(tag: str) -> str:
    return {"initial": "untrained", "final": "trained"}.get(tag, escape(tag.replace("-", " ")))


def percent(value: float, digits: int = 2) -> str:
    return "n/a" if math.isnan(value) else f"{100 * value:.{digits}f}"


def figures(title: str, paths: dict[str, Path], names: tuple[str, ...], wide: bool = False) -> str:
    cards = [
        f'<div class="card"><img alt="{name}" src="{data_uri(paths[name].read_bytes())}"></div>'
        for name in names
        if name in paths
    ]
    heading = f"<h2>{title}</h2>" if title else ""
    return f'{heading}<div class="{"wide" if wide else "grid"}">{"".join(cards)}</div>\n' if cards else ""


def thumbnails(evaluations: dict[str, dict[str, dict]]) -> str:
    """Best and worst pairs of the newest evaluation of every set; wrong decisions at the mean threshold in red."""
    out = []
    for name, tags in evaluations.items():
        tag = list(tags)[-1]
        data = tags[tag]
        threshold = 1 - data["summary"]["threshold"] / 2
        ends = np.cumsum(data["thumbnail_sizes"])
        images = [bytes(data["thumbnail_bytes"][end - size : end]) for end, size in zip(ends, data["thumbnail_sizes"])]
        groups = {kind: [] for kind in KINDS}
        for i, (pair, kind) in enumerate(zip(data["thumbnail_pairs"], data["thumbnail_kinds"])):
            score = data["scores"][pair]
            wrong = (score > threshold) != data["same"][pair]
            both = "".join(f'<img alt="" src="{data_uri(image)}">' for image in images[2 * i : 2 * i + 2])
            title = f"pair {pair}: cosine {score:.3f}, {'wrong' if wrong else 'right'} at threshold {threshold:.3f}"
            css = "pair wrong" if wrong else "pair"
            groups[str(kind)].append(f'<span class="{css}" title="{title}">{both}<br>{score:.2f}</span>')
        cells = "".join(f"<div><p>{KINDS[kind]}</p>{''.join(pairs)}</div>" for kind, pairs in groups.items() if pairs)
        out.append(
            f'<h3>{escape(name)}, {encoder_name(tag)}</h3><div class="card"><div class="pairs">{cells}</div></div>'
        )
    note = '<p class="soft">Below each pair: its cosine; red where the decision at the mean threshold is wrong.</p>'
    return f"<h2>Best and worst pairs</h2>{note}{''.join(out)}\n" if out else ""


def events(records: list[dict], limit: int = 100) -> str:
    """What happened besides steps and evaluations: resumes, checkpoints, skipped images; the newest `limit`."""
    told = [r for r in records if r["event"] != "evaluation"]
    lines = [event_line(r["event"], {k: v for k, v in r.items() if k not in ("event", "time")}) for r in told]
    if not lines:
        return ""
    left = f"({len(lines) - limit} earlier ones left out)\n" if len(lines) > limit else ""
    text = escape(left + "\n".join(lines[-limit:]))
    summary = f"<summary>{len(lines)} events</summary>"
    return f'<h2>Events</h2><div class="card"><details>{summary}<pre>{text}</pre></details></div>\n'


def details(config: str, environment: dict) -> str:
    rows = []
    for key, value in environment.items():
        if isinstance(value, dict):
            value = ", ".join(f"{k} {v}" for k, v in value.items())
        elif isinstance(value, list):
            value = ", ".join(map(str, value))
        if value not in (None, ""):
            rows.append(f"<tr><td>{escape(key.replace('_', ' '))}</td><td>{escape(str(value))}</td></tr>")
    out = f'<h2>Environment</h2><div class="card"><table class="plain">{"".join(rows)}</table></div>' if rows else ""
    if config:
        out += f'<h2>Configuration</h2><div class="card"><pre>{escape(config)}</pre></div>'
    return out + "\n"


def data_uri(image: bytes) -> str:
    kind = "png" if image.startswith(b"\x89PNG") else "jpeg"
    return f"data:image/{kind};base64,{base64.b64encode(image).decode()}"
