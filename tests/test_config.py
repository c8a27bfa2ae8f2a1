"""The configuration: strict, typed, and its documentation complete."""

import re
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import yaml
from omegaconf import OmegaConf

from protomem import checks, config
from protomem.errors import UserError

NEEDED = ["output=x", "data.train=y"]


def test_default_yaml_is_the_schema_with_a_comment_on_every_key():
    lines = Path("configs/default.yaml").read_text().splitlines()
    assert OmegaConf.to_container(OmegaConf.load("configs/default.yaml")) == OmegaConf.to_container(
        OmegaConf.structured(config.Config)
    )
    for line in lines:
        if re.match(r" *\w+:\s*\S", line) and not line.strip().startswith("#"):
            assert "  # " in line, f"no comment: {line}"


@pytest.mark.parametrize("path", sorted((Path(__file__).parent.parent / "configs").rglob("*.yaml")))
def test_every_shipped_config_loads(path):
    if path.name != "default.yaml":
        config.load([str(path)], [] if path.name == "quickstart.yaml" else NEEDED)


@pytest.mark.parametrize(
    "given, message",
    [
        ("optimizr.lr=1", "unknown key optimizr.lr; did you mean optimizer.lr?"),
        ("lr=1", "did you mean optimizer.lr?"),
        ("optimizer.lr=fast", "optimizer.lr.*could not be converted"),
        ("optimizer.name=adam", "not one of sgd, adamw, lamb; did you mean adamw?"),
        ("encoder.dropout=1.5", "encoder.dropout=1.5 is not a probability"),
        ("train.batch_size=0", "train.batch_size=0 is too small"),
        ("schedule.steps=5", "schedule.epochs and schedule.steps are both set"),
        ("optimizer.head.lr=-1", "optimizer.head.lr=-1.0 is too small"),
        ("optimizer.clip=nan", "optimizer.clip=nan is too small"),
        ("optimizer.lr=inf", "optimizer.lr=inf is not a finite number"),
        ("margin.m=nan", "margin.m=nan is not a finite number"),
        ("prototypes.rate=0.5", "no effect with prototypes.source=classifier, only with sampled"),
        ("optimizer.betas=[0.9,0.9]", "no effect with optimizer.name=sgd"),
        ("data.eval=[a.bin", "data.eval=\\[a.bin: the value is not valid YAML"),
        ("nonsense", "neither a config file nor key=value"),
    ],
)
def test_errors_name_the_key(given, message):
    with pytest.raises(UserError, match=message) as error:
        config.load([], [*NEEDED, given])
    assert "\n" not in str(error.value)


def test_missing_and_broken_files(tmp_path):
    with pytest.raises(UserError, match="nowhere.yaml does not exist"):
        config.load(["nowhere.yaml"])
    broken = tmp_path / "broken.yaml"
    broken.write_text("a: [1\nb: {")
    with pytest.raises(UserError, match="broken.yaml: not valid YAML") as error:
        config.load([str(broken)])
    assert "\n" not in str(error.value)
    with pytest.raises(UserError, match="output is not set|data.train is not set"):
        config.load([])


def test_later_files_and_overrides_win(tmp_path):
    file = tmp_path / "mine.yaml"
    file.write_text(yaml.safe_dump({"output": "a", "data": {"train": "d"}, "optimizer": {"lr": 0.5}}))
    loaded = config.load([str(file), "configs/methods/arcface.yaml"], ["optimizer.lr=0.25"])
    assert (loaded.optimizer.lr, loaded.margin.name, loaded.output) == (0.25, "arcface", "a")


def test_a_misspelled_key_fails_fast_on_the_command_line():
    start = time.monotonic()
    command = [sys.executable, "-X", "importtime", "-m", "protomem", "train", "configs/quickstart.yaml", "optimizr.lr=1"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 2
    last = done.stderr.strip().splitlines()[-1]
    assert last == "error: optimizr.lr=1: unknown key optimizr.lr; did you mean optimizer.lr?"
    assert not re.search(r"\| +torch$", done.stderr, re.M)  # what makes it fast; no timed assertion
    print(f"{time.monotonic() - start:.2f} s")


def test_compile_may_be_a_switch_or_a_word(tmp_path):
    (tmp_path / "old.yaml").write_text("encoder:\n  compile: true\n")
    assert config.load([str(tmp_path / "old.yaml")], NEEDED).encoder.compile == "default"
    for given, meant in (("off", "off"), ("false", "off"), ("true", "default"), ("default", "default"), ("graphs", "graphs")):
        assert config.load([], [*NEEDED, f"encoder.compile={given}"]).encoder.compile == meant
    for more, message in (
        (["encoder.compile=graph"], "compile=graph is not one of off, default, graphs; did you mean graphs?"),
        (["encoder.compile=graphs", "train.accumulate=2"], "writes gradients over those of the micro-batch before"),
        (["encoder.compile=graphs", "distributed.device=cpu"], "CUDA graphs need a GPU; use compile=default"),
    ):
        with pytest.raises(UserError, match=message):
            config.load([], [*NEEDED, *more])
    with pytest.raises(UserError, match="compile=graphs needs a GPU, and torch sees none here"):
        checks.graphs(config.load([], [*NEEDED, "encoder.compile=graphs"]), torch.device("cpu"))


def test_margin_gradient_true_may_be_written_without_quotes():
    assert config.load([], [*NEEDED, "margin.gradient=true"]).margin.gradient == "true"
