"""`protomem recipes ...`: the methods that come with protomem, in a table, and each explained. Imports no torch."""

from __future__ import annotations

import difflib
import os
import textwrap
from pathlib import Path

import typer
from omegaconf import DictConfig

from protomem import config
from protomem.errors import UserError
from protomem.recipes import RECIPES

app = typer.Typer(invoke_without_command=True, help="The methods: short config files, each explained.")

NEEDED = ["output=runs/mine", "data.train=data"]  # what every config must have, to load a recipe alone
HEAD = ("name", "title", "columns", "margin", "regulariser", "quality", "file")
EXPLAINED = {
    "formula": "formula",
    "state": "state",
    "communication": "sent besides",
    "source": "source",
    "published": "published",
    "ours": "ours",
    "deviations": "deviations",
    "goes_with": "goes with",
}


def folder() -> Path:
    """Where the recipes' files are: beside the package in a checkout, inside it when it was installed from a wheel.

    Raises UserError if they are in neither place."""
    package = Path(__file__).parent
    for place in (package.parent / "configs" / "methods", package / "configs" / "methods"):
        if (place / "softmax.yaml").is_file():
            return place
    raise UserError(
        f"configs/methods is neither beside nor inside {package}; run protomem from a checkout of its repository "
        "(pip install -e .)"
    )


def names() -> list[str]:
    """The recipes that have a file, in the order of the registry, and files of the user's own after them."""
    there = {path.stem for path in folder().glob("*.yaml")}
    return [name for name in RECIPES if name in there] + sorted(there - set(RECIPES))


def load(name: str) -> DictConfig:
    """The config of a recipe alone. Raises UserError, naming the nearest, for an unknown one."""
    known = names()
    if name not in known:
        near = difflib.get_close_matches(name, known, n=1, cutoff=0.4)
        raise UserError(
            f"recipe {name} is unknown; " + (f"did you mean {near[0]}? " if near else "") + "`protomem recipes` lists them"
        )
    return config.load([str(folder() / f"{name}.yaml")], NEEDED)


def parts(c: DictConfig) -> dict[str, str]:
    """What a config is made of, in words, with its numbers: rows, columns, margin, regulariser, quality."""
    return {
        "rows": "embeddings" if c.contrast.weight == 0 else f"two dropout views from epoch {c.contrast.start_epoch:g} on",
        "columns": _columns(c),
        "margin": _margin(c.margin),
        "regulariser": _regulariser(c),
        "quality": _quality(c.quality) if c.prototypes.source == "memory" else "–",
    }


def _columns(c: DictConfig) -> str:
    p = c.prototypes
    what = {"classifier": "classifier", "sampled": f"classifier, {p.rate:g} sampled", "memory": "memory"}[p.source]
    if p.sub_centers > 1:
        what += f", the nearest of {p.sub_centers}"
    if p.injection.weight > 0:
        what += f" + last features {p.injection.weight:g} (VPL)"
    if p.empirical.enabled:
        what += f" + means, {p.empirical['update']} the loss (EPL)"
    return what


def _margin(m: DictConfig) -> str:
    g = m.magnitude
    what = {
        "softmax": lambda: "none",
        "cosface": lambda: f"cos − {0.4 if m.m is None else m.m:g}",
        "arcface": lambda: f"angle + {0.5 if m.m is None else m.m:g}",
        "combined": lambda: f"cos({1 if m.m1 is None else m.m1:g} θ + {0.5 if m.m2 is None else m.m2:g}) − {m.m3 or 0:g}",
        "magface": lambda: f"{'angle +' if g.kind == 'arcface' else 'cos −'} {g.lower_margin:g} to {g.upper_margin:g} by norm",
    }[m.name]()
    if m.gradient == "straight_through":
        what += ", straight through"
    if m.filter_above > 0:
        what += f", filter {m.filter_above:g}"
    return what + (", one threshold" if m.criterion == "unified" else "")


def _regulariser(c: DictConfig) -> str:
    found = [f"norm {c.margin.magnitude.weight:g}"] if c.margin.name == "magface" else []
    found += [f"contrast {c.contrast.weight:g}"] if c.contrast.weight > 0 else []
    return ", ".join(found) or "–"


def _quality(q: DictConfig) -> str:
    return "equal" if q.estimator == "equal" else f"{q.estimator}, {q.usage}"


@app.callback()
def table(context: typer.Context) -> None:
    """List the methods: name, parts, file. `protomem recipes show NAME` explains one."""
    if context.invoked_subcommand:
        return
    rows = []
    for name in names():
        found = parts(load(name))
        title = RECIPES[name].title if name in RECIPES else "(your own)"
        rows.append((name, title, *(found[key] for key in HEAD[2:6]), _path(name)))
    _print_table(rows)


@app.command()
def show(name: str = typer.Argument(help="A name of the table.", show_default=False)) -> None:
    """Explain a method: formula, state, communication, source, defaults, decisions, and its settings."""
    found, path = parts(load(name)), _path(name)
    recipe = RECIPES.get(name)
    typer.echo(f"{name}: {recipe.title if recipe else 'your own; nothing is written about it'}\n")
    lines = {key: getattr(recipe, field) for field, key in EXPLAINED.items()} if recipe else {}
    for key, value in {**found, **lines}.items():
        typer.echo(textwrap.fill(value, 110, initial_indent=f"{key:<14}", subsequent_indent=" " * 14))
    typer.echo(f"\n{path}\n")
    typer.echo(textwrap.indent((folder() / f"{name}.yaml").read_text().rstrip(), "    "))
    typer.echo(f"\nprotomem train my.yaml {path}")
    typer.echo("    my.yaml has output, data.train and what is yours; of two files that set the same key the later one counts.")


def _path(name: str) -> str:
    path = folder() / f"{name}.yaml"
    near = os.path.relpath(path)
    return str(path) if near.startswith("..") else near


def _print_table(rows: list[tuple[str, ...]]) -> None:
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    console = Console()
    if not console.is_terminal:  # one line each, nothing folded: for grep
        rows = [HEAD, *rows]
        width = [max(len(row[k]) for row in rows) for k in range(len(HEAD))]
        for row in rows:
            typer.echo("  ".join(cell.ljust(w) for cell, w in zip(row, width)).rstrip())
        return
    wide = console.width >= 160
    shown = range(len(HEAD)) if wide else [k for k, name in enumerate(HEAD) if name not in ("title", "file")]
    table = Table()
    for k in shown:
        table.add_column(HEAD[k], overflow="fold", no_wrap=k == 0)
    for row in rows:
        table.add_row(*(escape(row[k]) for k in shown))
    console.print(table)
    typer.echo(f"files: {os.path.dirname(_path('softmax'))}/NAME.yaml; `protomem recipes show NAME` explains one")
