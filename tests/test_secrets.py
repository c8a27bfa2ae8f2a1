"""Secrets of the environment, and those that somebody puts into a config, are in no file that a run leaves and on no line."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from protomem import cli, config, redact
from protomem.errors import UserError
from tests.test_training import settings

ROOT = Path(__file__).parent.parent
# name -> (value, the part of it that is a secret)
SECRETS = {
    "WANDB_API_KEY": "5ec2e700" * 5,
    "HF_TOKEN": "hf_5ec2e701abcdefgh",
    "AWS_SECRET_ACCESS_KEY": "5ec2e702/abcdefgh+xyz",
    "PGPASSWORD": "5ec2e703 with blanks",
}
MARKER = b"5ec2e7"


def files_with_marker(folder: Path) -> list[str]:
    return [str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file() and MARKER in p.read_bytes()]


def go(folder: Path, *arguments: str) -> subprocess.CompletedProcess:
    """`protomem train` with the secrets in its environment."""
    env = {k: v for k, v in os.environ.items() if not k.startswith("WANDB")} | SECRETS | {"OMP_NUM_THREADS": "1"}
    env |= {"DATABASE_URL": "postgres://me:5ec2e704@host/db", "PYTHONPATH": str(ROOT), "WANDB_CACHE_DIR": str(folder / "cache")}
    command = [sys.executable, "-m", "protomem", "train", *arguments]
    return subprocess.run(command, env=env, cwd=folder, capture_output=True, timeout=300)


def test_a_run_leaves_no_secret(small_set, tmp_path):
    """In the environment, and by accident in every text of the config that can hold one."""
    output = tmp_path / "run"
    url = "https://me:5ec2e705@host/x?token=5ec2e706&b=1"
    more = (
        *(
            "schedule.steps=2",
            "schedule.warmup_steps=0",
            "checkpoint.every=1",
            "log.tensorboard=true",
            "log.wandb.mode=offline",
        ),
        *(f"log.wandb.project=p-{SECRETS['WANDB_API_KEY']}", f"log.wandb.name='{url} {SECRETS['PGPASSWORD']}'"),
    )
    done = go(tmp_path, *settings(small_set, output, *more))
    assert done.returncode == 0, done.stderr.decode()
    assert MARKER not in done.stdout + done.stderr
    assert list(output.glob("wandb/offline-run-*/*.wandb")) and (output / "report.html").is_file()
    assert files_with_marker(tmp_path) == []
    stored = json.loads((output / "checkpoints" / "step-00000002" / "training.json").read_text())["config"]["log"]["wandb"]
    assert stored["project"] == "p-(hidden)" and "https://(hidden)@host/x?token=(hidden)&b=1" in stored["name"]
    environment = json.loads((output / "environment.json").read_text())
    assert "log.wandb.project=p-(hidden)" in environment["command"]


def test_an_error_tells_no_secret(tmp_path, monkeypatch, capsys):
    for name, value in SECRETS.items():
        monkeypatch.setenv(name, value)
    given = settings(f"https://me:5ec2e707@host/{SECRETS['HF_TOKEN']}", tmp_path / "run")
    monkeypatch.setattr(sys, "argv", ["protomem", "train", *given])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    told = "".join(capsys.readouterr())
    assert ended.value.code == 2 and "(hidden)" in told and MARKER.decode() not in told
    assert files_with_marker(tmp_path) == []


BASE = ["output=o", "data.train=d"]


@pytest.mark.parametrize(
    "key", ["log.wandb.api_key", "log.wandb.api-key", "token", "data.password", "secret", "aws_secret_access_key"]
)
def test_keys_for_secrets_are_refused_without_the_value(tmp_path, key):
    for files, overrides in (([], [f"{key}=5ec2e7"]), ([tmp_path / "a.yaml"], [])):
        *sections, name = key.split(".")
        (tmp_path / "a.yaml").write_text("".join(f"{s}: {{" for s in sections) + f"{name}: 5ec2e7" + "}" * len(sections) + "\n")
        with pytest.raises(UserError, match="no secrets") as error:
            config.load(files, BASE + overrides)
        assert "5ec2e7" not in str(error.value)


@pytest.mark.parametrize(
    "text", ["${oc.env:WANDB_API_KEY}", "${oc.env:HF_TOKEN,x}", "a ${ oc.env : PGPASSWORD }", "${oc.decode:${oc.env:HF_TOKEN}}"]
)
def test_a_config_reads_no_secret_of_the_environment(monkeypatch, text):
    for name, value in SECRETS.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(UserError) as error:
        config.load([], [*BASE, f"log.wandb.name='{text}'"])
    assert "5ec2e7" not in str(error.value)


def test_other_variables_can_be_read(monkeypatch):
    monkeypatch.setenv("SCRATCH", "/scratch")
    assert config.load([], ["output='${oc.env:SCRATCH}/run'", "data.train='${output}/d'"]).data.train == "/scratch/run/d"


def test_what_is_hidden(monkeypatch):
    for name in list(os.environ):
        if redact.names_secret(name):
            monkeypatch.delenv(name)
    for name, value in SECRETS.items() | {("SHORT_KEY", "abc"), ("PATH_TOKEN", "/a/long/path"), ("MONKEY", "a long animal")}:
        monkeypatch.setenv(name, value)
    same = ["a long animal at /a/long/path abc", "runs/x", "key=3", "http://host:80/x?a=1", "user@host"]
    assert [redact.hide(text) for text in same] == same
    assert redact.hide(f"<{SECRETS['HF_TOKEN']}> {SECRETS['PGPASSWORD']}") == "<(hidden)> (hidden)"
    assert redact.hide("s3://id:5ec2e7@b/x?X-Amz-Signature=5ec2e7&y=1") == "s3://(hidden)@b/x?X-Amz-Signature=(hidden)&y=1"
    assert redact.without_secrets({"a": [{"b": SECRETS["HF_TOKEN"]}], "hf_token": 1, "keep": 2}) == {
        "a": [{"b": "(hidden)"}],
        "hf_token": "(hidden)",
        "keep": 2,
    }
    assert str(UserError(f"x {SECRETS['HF_TOKEN']}\n\x1b[31m")) == "x (hidden)\\n\\x1b[31m"


def test_names_of_secrets():
    yes = "WANDB_API_KEY HF_TOKEN AWS_SECRET_ACCESS_KEY PGPASSWORD MYSQL_PWD KAGGLE_KEY api_key log.wandb.apikey".split()
    no = "PWD OLDPWD GPG_KEY KEYBOARD MONKEY tokens key prototypes.memory.key_encoder AWS_ACCESS_KEY_ID SSH_AUTH_SOCK".split()
    assert [n for n in yes if not redact.names_secret(n)] == [] and [n for n in no if redact.names_secret(n)] == []
    assert [key for key in config.known_keys() if redact.names_secret(key)] == []
