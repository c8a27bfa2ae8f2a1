"""Which parts of a method go together: asks the configuration about every combination, and writes docs/composition.md.

    python benchmarks/composition.py

Nothing is trained: what is refused is refused from the config alone (protomem/composition.py). tests/test_composition.py
trains every combination that is allowed for three steps, and compares the file with what this script would write.
"""

from __future__ import annotations

import functools
import itertools
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))
from protomem import config  # noqa: E402
from protomem.errors import UserError  # noqa: E402

FILE = Path(__file__).parent.parent / "docs" / "composition.md"
NEEDED = ["output=runs/x", "data.train=data"]
_MAGFACE = ["margin.name=magface", "encoder.last_bn=learnable"]
_MEMORY = ["prototypes.source=memory", "data.sampler.name=mixed"]
_CENTERS = ["prototypes.sub_centers=3"]
_VPL, _EPL, _CONTRAST = ["prototypes.injection.weight=0.15"], ["prototypes.empirical.enabled=true"], ["contrast.weight=0.05"]

MARGINS = {
    "softmax": ["margin.name=softmax"],
    "CosFace": ["margin.name=cosface"],
    "ArcFace": ["margin.name=arcface"],
    "combined": ["margin.name=combined", "margin.m2=0.3", "margin.m3=0.2"],
    "MagFace": [*_MAGFACE, "margin.beyond_pi=easy"],
    "MagFace, CosFace's form": [*_MAGFACE, "margin.magnitude.kind=cosface", "margin.magnitude.lower_margin=0.35"],
    "CosFace, unified criterion": ["margin.name=cosface", "margin.criterion=unified"],
}
SOURCES = {
    "classifier": [],
    "sampled": ["prototypes.source=sampled"],
    "memory": _MEMORY,
    "classifier + VPL": _VPL,
    "sampled + VPL": ["prototypes.source=sampled", *_VPL],
    "memory + VPL": [*_MEMORY, *_VPL],
    "classifier + EPL": _EPL,
    "sampled + EPL": ["prototypes.source=sampled", *_EPL],
    "memory + EPL": [*_MEMORY, *_EPL],
    "classifier + VPL + EPL": [*_VPL, *_EPL],
    "sub-centres": _CENTERS,
    "sampled sub-centres": ["prototypes.source=sampled", *_CENTERS],
    "sub-centres + EPL": [*_CENTERS, *_EPL],
}
QUALITIES = {
    name: [f"quality.estimator={name}", *more]
    for name, more in {
        "norm": [],
        "recognizability": ["quality.usage=hard"],
        "external": [],
        "magface": [],
        "zscore": ["quality.usage=topk"],
    }.items()
}
REGULARISERS = {"–": [], "contrast": _CONTRAST}

# What is refused beyond the table: what it is, its settings. The reason is the message.
UNDEFINED = {
    "MagFace × a frozen last BatchNorm": ["margin.name=magface"],
    "MagFace × straight-through gradient": [*_MAGFACE, "margin.gradient=straight_through"],
    "MagFace × a regulariser too weak for its margins": [*_MAGFACE, "margin.magnitude.weight=20"],
    "MagFace × images that do not count alike": [
        *_MAGFACE,
        *_MEMORY,
        "quality.estimator=magface",
        "quality.loss_weight=1",
    ],
    "MagFace × split images": [*_MAGFACE, *_MEMORY, "prototypes.memory.self_exclusion=split"],
    "VPL × a memory with gradient=batch": [*_MEMORY, *_VPL, "prototypes.memory.gradient=batch"],
    "VPL's averaged encoder × a memory": [*_MEMORY, *_VPL, "prototypes.injection.key_encoder=0.999"],
    "VPL's averaged encoder × EPL after the loss": [
        *_VPL,
        *_EPL,
        "prototypes.empirical.update=after",
        "prototypes.injection.key_encoder=0.999",
    ],
    "VPL × sub-centres": [*_VPL, *_CENTERS],
    "sub-centres × a memory": [*_MEMORY, *_CENTERS],
    "EPL before the loss × a batch in parts": [*_EPL, "train.accumulate=2"],
    "EPL with k ≥ 2": [*_EPL, "prototypes.empirical.k=2"],
    "contrast × a batch in parts": [*_CONTRAST, "train.accumulate=2"],
    "contrast × views without dropout": [*_CONTRAST, "contrast.dropout=0"],
    "memory × a batch in parts": [*_MEMORY, "train.accumulate=2"],
    "memory × the shuffled sampler": ["prototypes.source=memory"],
    "memory × one image of an identity": [*_MEMORY, "data.sampler.images_per_identity=1"],
    "memory that learns (sgd) × leave-one-out": [
        *_MEMORY,
        "prototypes.memory.gradient=sgd",
        "prototypes.memory.self_exclusion=loo",
    ],
    "memory with gradient × bf16 rows": [*_MEMORY, "prototypes.memory.gradient=sgd", "prototypes.memory.storage=bf16"],
    "memory with gradient=batch × an averaged encoder": [
        *_MEMORY,
        "prototypes.memory.gradient=batch",
        "prototypes.memory.key_encoder=0.999",
    ],
    "classifier × the samplers of a memory": ["data.sampler.name=mixed"],
    "sampled × LAMB": ["prototypes.source=sampled", "optimizer.name=lamb"],
    "sampled, missed steps made up for × AdamW": [
        *("prototypes.source=sampled", "optimizer.untouched=exact", "optimizer.name=adamw"),
    ],
    "tiles chosen by the clock × deterministic": ["head.backend=triton", "head.tune=true", "train.deterministic=true"],
    **{
        f"update inside the backward × {name}": ["optimizer.fuse_prototypes=true", setting]
        for name, setting in {
            "dense head": "head.backend=dense",
            "accumulation": "train.accumulate=2",
            "clipping": "optimizer.clip=5",
            "fp16": "encoder.precision=fp16",
            "LAMB": "optimizer.name=lamb",
        }.items()
    },
}
WITHOUT_EFFECT = {
    "quality × no memory": ["quality.estimator=norm"],
    "EPL's stacked margin × softmax": [*_EPL, "prototypes.empirical.stacked=true", "margin.name=softmax"],
    "VPL that begins after the end": [*_VPL, "schedule.epochs=0", "schedule.steps=1000"],
    "EPL that begins after the end": [*_EPL, "schedule.epochs=3"],
    "contrast that begins after the end": [*_CONTRAST, "schedule.epochs=5"],
    "contrast from the start × dropout before it": [*_CONTRAST, "contrast.start_epoch=0", "encoder.dropout=0.4"],
    "VPL's window × VPL off": ["prototypes.injection.steps=100"],
    "a rule beyond π × no angle": ["margin.name=arcface", "margin.m=0", "margin.beyond_pi=easy"],
    "straight-through gradient × no angle": ["margin.name=arcface", "margin.m=0", "margin.gradient=straight_through"],
    "a rule beyond π × MagFace in CosFace's form": [*MARGINS["MagFace, CosFace's form"], "margin.beyond_pi=easy"],
    "a filter that no negative passes": ["margin.filter_above=1"],
    "choosing whom to refresh × no refresh": [*_MEMORY, "data.sampler.refresh=0", "data.sampler.pick=look_alike"],
    "a quality to the power of 0": [*_MEMORY, "quality.estimator=norm", "quality.power=0"],
    "a threshold that everybody passes": [
        *_MEMORY,
        "quality.estimator=norm",
        "quality.usage=hard",
        "quality.threshold=0",
    ],
    "a ViT × settings of BatchNorm": ["encoder.name=vit_s", "encoder.freeze_statistics=true"],
    "rows that do not learn × their learning rate": [*_MEMORY, "optimizer.head.lr=0.1"],
}


def combinations() -> dict[tuple[str, str, str], list[str]]:
    """(margin, regulariser, source) -> key=value settings, for the whole table."""
    return {
        (m, r, s): [*MARGINS[m], *REGULARISERS[r], *SOURCES[s]]
        for m, r, s in itertools.product(MARGINS, REGULARISERS, SOURCES)
    }


def qualities() -> dict[tuple[str, str, str], list[str]]:
    """(margin, quality, source) -> key=value settings, for the second table."""
    return {
        (m, q, s): [*MARGINS[m], *QUALITIES[q], *SOURCES[s]]
        for m, q, s in itertools.product(("CosFace", "MagFace"), QUALITIES, ("classifier", "memory", "memory + VPL"))
    }


def _table(found: dict[tuple[str, str, str], str | None], heads: str, notes: list[str]) -> list[str]:
    """A row for the first two names of each key, a column for the last; new reasons are added to the notes."""
    columns = list(dict.fromkeys(s for _, _, s in found))
    notes += [reason for reason in dict.fromkeys(found.values()) if reason and reason not in notes]
    lines = [f"| {heads} | " + " | ".join(columns) + " |", "|---|---|" + ":-:|" * len(columns)]
    for a, b in dict.fromkeys((a, b) for a, b, _ in found):
        cells = ["✓" if (x := found[a, b, s]) is None else str(notes.index(x) + 1) for s in columns]
        lines.append(f"| {a} | {b} | " + " | ".join(cells) + " |")
    return lines


def refusal(settings: list[str]) -> str | None:
    """Why the configuration refuses these settings; None: it does not."""
    return _refusal(tuple(settings))


@functools.cache
def _refusal(settings: tuple[str, ...]) -> str | None:
    try:
        config.load([], [*NEEDED, *settings])
    except UserError as error:
        return str(error)


def text() -> str:
    """What docs/composition.md says."""
    notes: list[str] = []
    tables = [
        _table({key: refusal(settings) for key, settings in found.items()}, heads, notes)
        for found, heads in ((combinations(), "margin | regulariser"), (qualities(), "margin | quality"))
    ]
    lines = [
        "# What goes with what",
        "",
        "Written by `python benchmarks/composition.py`, which asks the configuration; a test compares this file with it, and",
        "trains every combination that has a ✓ on two ranks. Numbers: refused, for the reason below the tables.",
        "",
        *tables[0],
        "",
        "Quality weighs images within a prototype, so it needs a source that makes prototypes of images:",
        "",
        *tables[1],
        "",
        *(f"{k}. {reason}" for k, reason in enumerate(notes, 1)),
        "",
    ]
    lines += [
        "MagFace's regulariser belongs to its margin. A ✓ says that the combination is defined and trains, not that anybody",
        "has published it: VPL with sampled prototypes or a memory, VPL with EPL, and a contrast on a memory are ours.",
    ]
    for title, cases in (("Undefined, and refused", UNDEFINED), ("Without effect, and refused", WITHOUT_EFFECT)):
        lines += ["", f"## {title}", "", "| what | the message |", "|---|---|"]
        lines += [f"| {what} | {refusal(settings) or 'NOT REFUSED'} |" for what, settings in cases.items()]
    lines += ["", "More rules, of single settings, are in `protomem/composition.py` and `protomem/rules.py`."]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    FILE.write_text(text())
    print(FILE)
