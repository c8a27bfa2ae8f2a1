"""The configuration: strict merging of YAML files and key=value overrides, errors that name the key.

Imports no torch, so that a misspelled key is reported at once. The schema is protomem/schema.py, its rules are
protomem/rules.py.
"""

from __future__ import annotations

import difflib
import functools
import math
import re
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from protomem.composition import memory_mistakes, method_mistakes
from protomem.errors import UserError
from protomem.redact import hide_argument, names_secret
from protomem.rules import AT_LEAST, AT_MOST, CHOICES, ONLY_WITH, PROBABILITIES, SWITCHES
from protomem.schema import Config

MAX_FILE = 1 << 20  # bytes of a config file (our default)
MAX_REFERENCES = 16  # ${...} in all of a config (our default): each may repeat another one several times
RESOLVER = re.compile(r"\$\{\s*([\w.]+)\s*:\s*([^}]*)")
NO_SECRETS = (
    "protomem takes no secrets, since a run's config is stored and shown; wandb finds its key itself (`wandb login`, or "
    "WANDB_API_KEY in the environment)"
)
RUN_KEYS = ("data.train", "output")  # what a run needs and its plan does not


def known_keys(schema: Any = Config, prefix: str = "") -> list[str]:
    """Every key of the schema, dotted, sections included."""
    keys = []
    for f in fields(schema):
        keys.append(prefix + f.name)
        default = f.default_factory() if callable(f.default_factory) else f.default
        if is_dataclass(default):
            keys += known_keys(type(default), prefix + f.name + ".")
    return keys


def _leaves(node: Any, prefix: str = "") -> list[str]:
    if not isinstance(node, dict):
        return [prefix[:-1]]
    return [key for name, child in node.items() for key in (_leaves(child, f"{prefix}{name}.") if child != {} else [])]


def _check_known(given: DictConfig, source: str) -> None:
    known = known_keys()
    for key in _leaves(OmegaConf.to_container(given)):
        if key in known:
            continue
        if names_secret(key):
            raise UserError(f"{source}: there is no key {key}: {NO_SECRETS}")
        near = difflib.get_close_matches(key, known, n=1, cutoff=0.5)
        near = near or [k for k in known if k.rsplit(".", 1)[-1] == key.rsplit(".", 1)[-1]][:1]
        hint = f"; did you mean {near[0]}?" if near else "; configs/default.yaml lists all keys"
        raise UserError(f"{source}: unknown key {key}{hint}")


def _merge(config: DictConfig, given: DictConfig, source: str) -> DictConfig:
    _check_known(given, source)
    try:
        return OmegaConf.merge(config, given)
    except OmegaConfBaseException as e:
        message = str(e).splitlines()[0]
        raise UserError(f"{source}: {e.full_key}: {message}" if e.full_key else f"{source}: {message}") from None
    except (TypeError, ValueError, RecursionError) as e:  # of a value that the schema's types do not know
        raise UserError(f"{source}: {(str(e).splitlines() or [type(e).__name__])[0]}") from None


@functools.cache
def _defaults() -> DictConfig:
    """To be read only: making it takes half the time of a load."""
    return OmegaConf.structured(Config)


def check(config: DictConfig, optional: tuple[str, ...] = ()) -> None:
    """Raise UserError for the first value outside its range, naming key, value and what is allowed. optional: keys that may
    be missing."""
    for key, allowed in CHOICES.items():
        value = OmegaConf.select(config, key)
        if value not in allowed:
            near = difflib.get_close_matches(str(value), allowed, n=1)
            raise UserError(f"{key}={value} is not one of {', '.join(allowed)}" + (f"; did you mean {near[0]}?" if near else ""))
    for key, low in AT_LEAST.items():
        value = OmegaConf.select(config, key)
        if value is not None and not value >= low:  # "not >=" so that nan is refused as well
            raise UserError(f"{key}={value} is too small: at least {low}")
    check_sizes(config)
    for key in _leaves(OmegaConf.to_container(config)):
        value = OmegaConf.select(config, key)
        if isinstance(value, float) and not math.isfinite(value):
            raise UserError(f"{key}={value} is not a finite number")
    defaults = _defaults()
    for key, (other, values) in ONLY_WITH.items():
        value, chosen = OmegaConf.select(config, key), OmegaConf.select(config, other)
        if chosen not in values and value != OmegaConf.select(defaults, key):
            raise UserError(f"{key}={value} has no effect with {other}={chosen}, only with {' or '.join(map(str, values))}; remove it")
    for switch in SWITCHES:
        section = switch.rpartition(".")[0]
        if OmegaConf.select(config, switch) == 0 and OmegaConf.select(config, section) != OmegaConf.select(defaults, section):
            given = [k for k, v in OmegaConf.select(config, section).items() if v != OmegaConf.select(defaults, f"{section}.{k}")]
            raise UserError(f"{section}.{given[0]} has no effect with {switch}=0; remove it, or set the weight")
    if 0 < config.distributed.straggler <= 1:
        raise UserError(f"distributed.straggler={config.distributed.straggler} would name every rank: more than 1, or 0 for never")
    if len(config.optimizer.betas) != 2:
        raise UserError(f"optimizer.betas={list(config.optimizer.betas)} must be two numbers")
    if config.evaluate.every > 0 and not config.data.eval:
        raise UserError("evaluate.every is set, but data.eval names no pair sets; add them, or remove evaluate.every")
    for key in PROBABILITIES:
        value = OmegaConf.select(config, key)
        if not 0 <= value <= 1:
            raise UserError(f"{key}={value} is not a probability between 0 and 1")
    if config.prototypes.source == "sampled" and not 0 < config.prototypes.rate <= 1:
        raise UserError(f"prototypes.rate={config.prototypes.rate} is not in (0, 1]")
    if config.schedule.epochs > 0 and config.schedule.steps > 0:
        raise UserError("schedule.epochs and schedule.steps are both set; set the other one to 0")
    if config.schedule.epochs == 0 and config.schedule.steps == 0:
        raise UserError("schedule.epochs and schedule.steps are both 0; set one of them")
    if config.schedule.warmup_epochs > 0 and config.schedule.warmup_steps > 0:
        raise UserError("schedule.warmup_epochs and schedule.warmup_steps are both set; set one of them to 0")
    s = config.data.sampler
    if s.name != "shuffled" and config.train.batch_size % s.images_per_identity:
        raise UserError(
            f"train.batch_size={config.train.batch_size} is not a multiple of "
            f"data.sampler.images_per_identity={s.images_per_identity}"
        )
    if not 0 <= s.refresh < 1:
        raise UserError(f"data.sampler.refresh={s.refresh} is not a share in [0, 1)")
    if config.prototypes.source == "memory":
        for mistake in memory_mistakes(config):
            raise UserError(mistake)
    elif s.name in ("mixed", "group"):
        raise UserError(f"data.sampler.name={s.name} is for prototypes.source=memory; use shuffled or balanced")
    for mistake in method_mistakes(config):
        raise UserError(mistake)
    for key in sorted(OmegaConf.missing_keys(config) - set(optional)):
        raise UserError(f"{key} is not set; give it in the config file or as {key}=...")


def check_sizes(config: DictConfig) -> None:
    """Raises UserError for the first number that is absurdly large."""
    for key, high in AT_MOST.items():
        if OmegaConf.select(config, key) > high:
            raise UserError(f"{key}={OmegaConf.select(config, key)} is too large: at most {high}")
    for key in _leaves(OmegaConf.to_container(config)):
        value = OmegaConf.select(config, key)
        if isinstance(value, int) and abs(value) >= 2**53:
            raise UserError(f"{key} is too large: at most 2**53")


def _texts(node: Any) -> list[str]:
    if isinstance(node, dict):
        return [text for child in node.values() for text in _texts(child)]
    if isinstance(node, list):
        return [text for child in node for text in _texts(child)]
    return [node] if isinstance(node, str) else []


def _check_references(config: DictConfig) -> None:
    """Refuse ${...} that would bring a secret of the environment into the logs, or grow without bound."""
    texts = [text for text in _texts(OmegaConf.to_container(config)) if "${" in text]
    if sum(text.count("${") for text in texts) > MAX_REFERENCES:
        raise UserError(f"config: more than {MAX_REFERENCES} references ${{...}}; write the values out")
    for text in texts:
        for resolver, argument in RESOLVER.findall(text):
            name = argument.split(",")[0].strip()
            if resolver != "oc.env" or not re.fullmatch(r"[A-Za-z_]\w*", name):
                raise UserError(f"config: {text}: only ${{key}} and ${{oc.env:NAME}} are read; write the value out")
            if names_secret(name):
                raise UserError(f"config: {text}: {name} looks like a secret: {NO_SECRETS}")


def of_checkpoint(stored: Any, checkpoint: Path) -> DictConfig:
    """The config that `training.json` holds. Raises UserError if it is none, or refers to anything outside of itself."""
    try:
        given = OmegaConf.create(stored if isinstance(stored, dict) else {})
        if not isinstance(stored, dict) or any("${" in text for text in _texts(stored)):
            raise ValueError("it is not as it was written")
        merged = OmegaConf.merge(_defaults(), given)
        check_sizes(merged)
    except (OmegaConfBaseException, ValueError, TypeError, RecursionError, UserError) as error:
        reason = f"the config in training.json cannot be used ({(str(error).splitlines() or ['?'])[0]})"
        raise UserError(f"checkpoint {checkpoint}: {reason}; take another one") from None
    return merged


def load(files: list[str], overrides: list[str] = (), optional: tuple[str, ...] = ()) -> DictConfig:
    """Merge the schema's defaults, YAML files in order, then `key=value` overrides. optional: keys that may be missing.
    Raises UserError, one line."""
    config = OmegaConf.structured(Config)
    for path in files:
        if not Path(path).is_file():
            raise UserError(f"config file {path} does not exist")
        if Path(path).stat().st_size > MAX_FILE:
            raise UserError(f"{path} is larger than {MAX_FILE >> 20} MB, so it is no config file")
        try:
            given = OmegaConf.load(path)
        except Exception as e:  # YAML's own errors span many lines; the position is what helps
            raise UserError(f"{path}: not valid YAML: {re.sub(chr(10) + ' *', ' ', str(e))}") from None
        if not isinstance(given, DictConfig):
            raise UserError(f"{path}: expected keys and values at the top level")
        config = _merge(config, given, path)
    for text in overrides:
        key, sep, _ = text.partition("=")
        if not sep or not key:
            raise UserError(f"{text!r} is neither a config file nor key=value")
        if names_secret(key):
            raise UserError(f"there is no key {key}: {NO_SECRETS}")
        try:
            given = OmegaConf.from_dotlist([text])
        except Exception as e:  # YAML's own errors span many lines
            raise UserError(f"{text}: the value is not valid YAML: {str(e).splitlines()[0]}") from None
        config = _merge(config, given, hide_argument(text))
    _check_references(config)
    try:
        OmegaConf.resolve(config)
    except (OmegaConfBaseException, RecursionError) as e:
        raise UserError(f"config: {str(e).splitlines()[0]}") from None
    if config.margin.gradient == "True":  # YAML's true
        config.margin.gradient = "true"
    # YAML's off, false, true: a switch before there were CUDA graphs.
    config.encoder.compile = {"False": "off", "True": "default"}.get(config.encoder.compile, config.encoder.compile)
    check(config, optional)
    return config


def split_arguments(arguments: list[str]) -> tuple[list[str], list[str]]:
    """Separate `a.yaml b.yaml key=value ...` into files and overrides."""
    files = [a for a in arguments if "=" not in a]
    return files, [a for a in arguments if "=" in a]
