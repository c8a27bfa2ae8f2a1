"""The images' recipes, as far as they can be checked without building them: form, pins, and that what they copy is there."""

import re
import runpy
from pathlib import Path

import pytest
import setuptools
from packaging.requirements import Requirement

ROOT = Path(__file__).parent.parent
FILES = ["docker/Dockerfile", "docker/Dockerfile.cpu"]
SECRET = re.compile(r"(password|passwd|secret|token|api_?key)\w*\s*[= ]", re.IGNORECASE)
EXTRAS = {"docker/Dockerfile": {"cuda13", "kernels", "wandb", "tensorboard"}, "docker/Dockerfile.cpu": {"wandb", "tensorboard"}}


def instructions(text: str) -> list[tuple[str, str]]:
    """(INSTRUCTION, rest) with continued lines joined and comments left out."""
    lines = [line for line in text.splitlines() if line.strip() and not line.lstrip().startswith("#")]
    joined = re.sub(r"\\\n\s*", "", "\n".join(lines))
    return [(line.split(None, 1)[0].upper(), line.split(None, 1)[1]) for line in joined.splitlines()]


def commands(run: str) -> list[str]:
    return [part.strip() for part in re.split(r"&&|;", run)]


def complaints(text: str, there: set[str]) -> list[str]:
    """What is wrong with a Dockerfile; `there`: paths that .dockerignore lets through."""
    out, stages, user, entry = [], [], "root", None
    for name, rest in instructions(text):
        if name == "FROM":
            image = rest.split()[0]
            if image not in stages and not re.search(r"@sha256:[0-9a-f]{64}$|:[^:@]*\d+\.\d+\.\d+[^:@]*$", image):
                out.append(f"{image} is not pinned")
            stages += [rest.split()[-1]] if " as " in rest.lower() else []
            user, final = "root", image
        elif name == "ADD":
            out.append("ADD instead of COPY")
        elif name == "COPY" and "--from=" not in rest:
            sources = rest.split()[:-1]
            out += [f"{source} is not there" for source in sources if source not in there or not (ROOT / source).exists()]
        elif name == "USER":
            user = rest
        elif name == "ENTRYPOINT":
            entry = user
        elif name in ("ENV", "ARG") and SECRET.search(rest):
            out.append(f"a secret in {name}")
        elif name == "RUN":
            for command in commands(rest):
                out += [f"{c} in: {command}" for c in _command(command, rest)]
    if entry is None or entry.split(":")[0] in ("root", "0"):
        out.append("the entry point runs as root")
    if "devel" in final:
        out.append("the last stage has a compiler for CUDA")
    return out


def _command(command: str, run: str) -> list[str]:
    words = command.replace('"', "").split()
    out = ["sudo"] if "sudo" in words else []
    if words[:2] == ["apt-get", "install"]:
        out += [f"{flag} is missing" for flag in ("-y", "--no-install-recommends") if flag not in words]
        out += ["lists stay"] if "rm -rf /var/lib/apt/lists/*" not in run else []
        out += [f"{word} is not pinned" for word in words[2:] if not word.startswith("-") and "=" not in word]
    if "pip" in words and "install" in words:
        out += ["--no-cache-dir is missing"] if "--no-cache-dir" not in words else []
        pins = {words[k + 1] for k, word in enumerate(words) if word == "-c"}
        out += ["constraints are missing"] if pins != {"constraints.txt", "docker/constraints.txt"} else []
    if "git" in words and {"clone", "fetch"} & set(words) and "COMMIT" not in command:
        out.append("no commit")
    return out


def let_through() -> set[str]:
    lines = (ROOT / ".dockerignore").read_text().splitlines()
    assert "*" in lines, "all that is not named stays outside"
    return {line[1:] for line in lines if line.startswith("!")}


def pins(path: str) -> dict[str, str]:
    lines = [line.strip() for line in (ROOT / path).read_text().splitlines()]
    return dict(line.split("==") for line in lines if line and not line.startswith("#"))


@pytest.mark.parametrize("path", FILES)
def test_the_recipes_are_well_formed(path):
    assert complaints((ROOT / path).read_text(), let_through()) == []


GOOD = """FROM a:1.2.3 AS build
RUN apt-get update && apt-get install -y --no-install-recommends git=1.2 && rm -rf /var/lib/apt/lists/*
RUN pip install --no-cache-dir -c constraints.txt -c docker/constraints.txt torch
RUN git fetch url "$APEX_COMMIT"
COPY setup.py ./
FROM a:1.2.3
COPY --from=build /x /x
USER me
ENTRYPOINT ["protomem"]
"""


@pytest.mark.parametrize(
    "old, new, complaint",
    [
        ("FROM a:1.2.3\n", "FROM a:latest\n", "a:latest is not pinned"),
        ("FROM a:1.2.3\n", "FROM a\n", "a is not pinned"),
        ("FROM a:1.2.3\n", "FROM a:1.2.3-devel\n", "compiler"),
        ("COPY setup.py", "COPY nothing.py", "nothing.py is not there"),
        ("COPY setup.py", "COPY tests", "tests is not there"),
        ("COPY setup.py", "ADD setup.py", "ADD"),
        ("USER me\n", "", "as root"),
        ("USER me\n", "USER root\n", "as root"),
        ('USER me\nENTRYPOINT ["protomem"]\n', 'ENTRYPOINT ["protomem"]\nUSER me\n', "as root"),
        ("USER me\n", "USER me\nENV WANDB_API_KEY=1\n", "secret"),
        ("--no-install-recommends ", "", "--no-install-recommends is missing"),
        (" && rm -rf /var/lib/apt/lists/*", "", "lists stay"),
        ("git=1.2", "git", "git is not pinned"),
        ("--no-cache-dir ", "", "--no-cache-dir is missing"),
        ("-c docker/constraints.txt ", "", "constraints are missing"),
        (' "$APEX_COMMIT"', "", "no commit"),
    ],
)
def test_every_complaint_is_made(old, new, complaint):
    assert complaints(GOOD, let_through()) == []
    assert old in GOOD
    (found,) = complaints(GOOD.replace(old, new), let_through())
    assert complaint in found


def test_pins_agree_and_cover_what_setup_asks_for(monkeypatch):
    asked = {}
    monkeypatch.setattr(setuptools, "setup", lambda **given: asked.update(given))
    monkeypatch.setattr(setuptools, "find_packages", lambda **given: [])
    runpy.run_path(str(ROOT / "setup.py"))
    all_pins = pins("docker/constraints.txt")
    shared = pins("constraints.txt")
    assert shared == {name: all_pins[name] for name in shared} and {"torch", "triton"} <= set(shared)
    for extra in set().union(*EXTRAS.values()):
        for text in [*asked["install_requires"], *asked["extras_require"][extra]]:
            wanted = Requirement(text)
            assert wanted.specifier.contains(all_pins[wanted.name]), text
    for path, extras in EXTRAS.items():
        (given,) = re.findall(r"\"\.\[([\w,]+)\]\"", (ROOT / path).read_text())
        assert set(given.split(",")) == extras
    runs = [rest for file in FILES for name, rest in instructions((ROOT / file).read_text()) if name == "RUN"]
    for command in re.findall(r"pip install [^&]*", " && ".join(runs)):
        named = {word for word in command.split()[2:] if re.fullmatch(r"[a-z][\w-]*", word)}
        assert named <= set(all_pins), command


def test_the_image_has_the_cuda_that_torch_was_built_with():
    text = (ROOT / "docker/Dockerfile").read_text()
    images = re.findall(r"^FROM nvidia/cuda:([\d.]+)-", text, re.M)
    assert len(images) == 2 and len(set(images)) == 1
    assert pins("docker/constraints.txt")["cuda-toolkit"].startswith(images[0] + ".")
    assert f"torch.version.cuda == '{images[0].rpartition('.')[0]}'" in text
    assert re.search(r"^ARG APEX_COMMIT=[0-9a-f]{40}$", text, re.M)
