"""The README speaks of things that exist."""

import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()


def test_pictures_files_and_folders_exist():
    named = re.findall(r"!\[[^]]*\]\(([^)]+)\)", README) + re.findall(r"`((?:protomem|configs|launch|benchmarks)/[\w./-]+)`", README)
    assert len(named) > 10
    for path in named:
        assert (ROOT / path.split(" ")[0]).exists(), path


def test_commands_exist():
    commands = set(re.findall(r"(?<![\w./-])protomem ((?:data )?[a-z]+)\b", "\n".join(re.findall(r"`[^`]+`|```.*?```", README, re.S))))
    assert {"train", "evaluate", "data inspect", "data verify"} <= commands
    for command in commands - {"plan"}:  # named in the status table as not there yet
        done = subprocess.run([sys.executable, "-m", "protomem", *command.split(), "--help"], capture_output=True, text=True)
        assert done.returncode == 0, command
    targets = (ROOT / "Makefile").read_text()
    for target in re.findall(r"make ([a-z]+)  ", README):
        assert re.search(rf"^{target}:", targets, re.M), target


def test_nothing_was_left_to_fill_in():
    assert "@@" not in README


def test_every_module_imports_without_the_optional_packages():
    code = """
import importlib, pkgutil, sys
for name in ("wandb", "tensorboard", "apex", "triton", "onnx", "nvidia.dali", "torch.utils.tensorboard"):
    sys.modules[name] = None
import protomem
for module in pkgutil.walk_packages(protomem.__path__, "protomem."):
    if not module.name.endswith("__main__") and not module.name.startswith("protomem.head.kernels."):  # which load() imports
        importlib.import_module(module.name)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
