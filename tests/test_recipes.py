"""The recipes: every file explained, every explanation with its file, what is shown read off the config."""

import contextlib
import os
import pty
import re
import subprocess
import sys
from dataclasses import fields
from pathlib import Path

import pytest
from typer.testing import CliRunner

from protomem import config, recipe_commands
from protomem.cli import app
from protomem.errors import UserError
from protomem.recipe_commands import HEAD, load, names, parts
from protomem.recipes import RECIPES

METHODS = Path(__file__).parent.parent / "configs" / "methods"
FILES = sorted(path.stem for path in METHODS.glob("*.yaml"))


def protomem(*arguments: str) -> str:
    done = CliRunner().invoke(app, ["recipes", *arguments])
    assert done.exit_code == 0, (done.output, done.exception)
    return done.output


def test_every_file_is_explained_and_every_explanation_has_its_file():
    assert sorted(RECIPES) == FILES
    for name, recipe in RECIPES.items():
        assert all(getattr(recipe, f.name).strip() for f in fields(recipe)), name
    titles = [recipe.title for recipe in RECIPES.values()]
    assert len(set(titles)) == len(titles)


@pytest.mark.parametrize("name", FILES)
def test_every_recipe_loads_with_a_minimal_config(name, tmp_path):
    """After the user's own file, as `show` says; and it sets nothing that is its user's business."""
    mine = tmp_path / "mine.yaml"
    mine.write_text("output: runs/mine\ndata: {train: data}\ntrain: {batch_size: 256}\n")
    loaded = config.load([str(mine), str(METHODS / f"{name}.yaml")])
    assert (loaded.output, loaded.data.train, loaded.train.batch_size) == ("runs/mine", "data", 256)


@pytest.mark.parametrize(
    "name, expected",
    [
        ("softmax", {"rows": "embeddings", "columns": "classifier", "margin": "none", "regulariser": "–", "quality": "–"}),
        ("cosface", {"margin": "cos − 0.4"}),
        ("arcface_insightface", {"margin": "angle + 0.5, straight through"}),
        ("combined", {"margin": "cos(1 θ + 0.3) − 0.2"}),
        ("partial_fc", {"columns": "classifier, 0.1 sampled", "margin": "cos − 0.4, filter 0.4"}),
        ("subcenter_arcface", {"columns": "classifier, the nearest of 3", "margin": "angle + 0.5"}),
        ("prototype_memory", {"columns": "memory", "quality": "equal"}),
        ("quality_aware_prototype_memory_hard", {"quality": "recognizability, hard"}),
        ("magface", {"margin": "angle + 0.45 to 0.8 by norm", "regulariser": "norm 35"}),
        ("magface_cosface", {"margin": "cos − 0.35 to 0.8 by norm", "regulariser": "norm 150"}),
        ("magface_qapm_vpl", {"columns": "memory + last features 0.15 (VPL)", "quality": "magface, soft"}),
        (
            "coreface_epl",
            {
                "rows": "two dropout views from epoch 7 on",
                "columns": "classifier + means, after the loss (EPL)",
                "regulariser": "contrast 0.05",
            },
        ),
    ],
)
def test_parts(name, expected):
    found = parts(load(name))
    assert {key: found[key] for key in expected} == expected


def test_parts_follow_the_config():
    """They are not written down beside it."""
    base = ["output=x", "data.train=y"]

    def shown(*more):
        return parts(config.load([], [*base, *more]))

    assert shown("margin.m=0.25")["margin"] == "cos − 0.25"
    assert shown("margin.criterion=unified")["margin"] == "cos − 0.4, one threshold"
    assert shown("prototypes.injection.weight=0.3")["columns"] == "classifier + last features 0.3 (VPL)"
    assert shown("contrast.weight=0.2", "contrast.start_epoch=2")["rows"] == "two dropout views from epoch 2 on"


def test_table():
    lines = protomem().splitlines()
    assert lines[0].split() == list(HEAD)
    assert [line.split()[0] for line in lines[1:]] == names()
    (line,) = [line for line in lines if line.startswith("magface ")]
    assert "MagFace" in line and "norm 35" in line and line.endswith("configs/methods/magface.yaml")


@pytest.mark.parametrize("name", FILES)
def test_show(name):
    output = protomem("show", name)
    words = " ".join(output.split())
    for part in [*parts(load(name)).values(), *(getattr(RECIPES[name], f.name) for f in fields(RECIPES[name]))]:
        assert " ".join(part.split()) in words
    assert f"protomem train my.yaml configs/methods/{name}.yaml" in output
    for line in (METHODS / f"{name}.yaml").read_text().splitlines():
        assert line in output


def test_unknown_and_missing(monkeypatch, tmp_path):
    with pytest.raises(UserError, match="recipe magfase is unknown; did you mean magface?"):
        load("magfase")
    with pytest.raises(UserError, match="`protomem recipes` lists them"):
        load("zzz")
    monkeypatch.setattr(recipe_commands, "__file__", str(tmp_path / "protomem" / "recipe_commands.py"))
    with pytest.raises(UserError, match="configs/methods is neither beside nor inside"):
        names()
    inside = tmp_path / "protomem" / "configs" / "methods"  # as a wheel has it
    inside.mkdir(parents=True)
    (inside / "softmax.yaml").write_text("margin: {name: softmax}\n")
    (inside / "mine.yaml").write_text("margin: {m: 0.1}\n")
    assert names() == ["softmax", "mine"] and load("mine").margin.m == 0.1


def test_on_a_terminal_and_without_torch(tmp_path):
    master, slave = pty.openpty()
    command = [sys.executable, "-X", "importtime", "-m", "protomem", "recipes"]
    with open(tmp_path / "stderr", "w") as errors:
        child = subprocess.Popen(command, stdout=slave, stderr=errors, env={**os.environ, "COLUMNS": "100"})
    os.close(slave)
    shown = b""
    with contextlib.suppress(OSError):  # how Linux says that the other side is closed
        while chunk := os.read(master, 65536):
            shown += chunk
    os.close(master)
    assert child.wait() == 0
    assert "prototype_memory" in shown.decode() and "│" in shown.decode()
    assert not re.search(r"\| +torch$", (tmp_path / "stderr").read_text(), re.M)
