"""The configuration: strict merging of YAML files and key=value overrides, errors that name the key.

Imports no torch, so that a misspelled key is reported at once. The schema is protomem/schema.py.
"""

from __future__ import annotations

import difflib
import re
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any, Iterator

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from protomem.errors import UserError
from protomem.schema import AT_LEAST, CHOICES, ONLY_WITH, PROBABILITIES, Config


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


def check(config: DictConfig) -> None:
    """Raise UserError for the first value outside its range, naming key, value and what is allowed."""
    for key, allowed in CHOICES.items():
        value = OmegaConf.select(config, key)
        if value not in allowed:
            near = difflib.get_close_matches(str(value), allowed, n=1)
            raise UserError(f"{key}={value} is not one of {', '.join(allowed)}" + (f"; did you mean {near[0]}?" if near else ""))
    for key, low in AT_LEAST.items():
        value = OmegaConf.select(config, key)
        if value is not None and not value >= low:  # "not >=" so that nan is refused as well
            raise UserError(f"{key}={value} is too small: at least {low}")
    defaults = OmegaConf.structured(Config)
    for key, (other, values) in ONLY_WITH.items():
        value, chosen = OmegaConf.select(config, key), OmegaConf.select(config, other)
        if chosen not in values and value != OmegaConf.select(defaults, key):
            raise UserError(f"{key}={value} has no effect with {other}={chosen}, only with {' or '.join(values)}; remove it")
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
    for key in sorted(OmegaConf.missing_keys(config)):
        raise UserError(f"{key} is not set; give it in the config file or as {key}=...")


def memory_mistakes(config: DictConfig) -> Iterator[str]:
    """What makes no sense with a prototype memory, each with its reason and cure."""
    s, m, q, batch = config.data.sampler, config.prototypes.memory, config.quality, config.train.batch_size
    k, u = s.images_per_identity, config.quality.unrecognizable
    builders = (k + 1) // 2 if m.self_exclusion == "split" else k
    if s.name == "shuffled":
        yield (
            "data.sampler.name=shuffled leaves most identities a single image, which would be their whole prototype; use mixed, "
            "group or balanced"
        )
    if k < 2:
        yield "data.sampler.images_per_identity=1: the prototype would be the image itself; use 2 or more"
    if config.train.accumulate > 1:
        yield f"train.accumulate={config.train.accumulate}: prototypes are made of the whole batch, so it cannot be cut; use 1"
    if m.size < batch // k:
        yield f"prototypes.memory.size={m.size} is less than the {batch // k} identities of a batch; use {8 * batch // k} or more"
    if s.name == "group" and s.group_size > m.size:
        yield (
            f"data.sampler.group_size={s.group_size} is more than prototypes.memory.size={m.size}: a group would evict itself; "
            "lower it"
        )
    if s.name == "mixed" and config.data.prefetch > 100:
        yield f"data.prefetch={config.data.prefetch} is more than the mixed sampler can look back on; use 100 or less"
    if m.momentum >= 1:
        yield f"prototypes.memory.momentum={m.momentum} is not in [0, 1): nothing new would ever enter"
    if m.fill == "prefill" and s.name != "mixed":
        yield f"prototypes.memory.fill=prefill needs data.sampler.name=mixed, not {s.name}"
    if m.gradient == "sgd" and m.self_exclusion == "loo":
        yield (
            "prototypes.memory.gradient=sgd with self_exclusion=loo would only push stored rows away: their positives are made "
            "without them; use none or split"
        )
    if m.gradient != "none" and m.storage == "bf16":
        yield f"prototypes.memory.gradient={m.gradient} needs storage=fp32: bf16 rows lose small steps"
    if m.gradient == "batch" and m.key_encoder > 0:
        yield "prototypes.memory.gradient=batch: the averaged encoder of key_encoder carries no gradient; use one of the two"
    if m.gradient != "sgd" and config.optimizer.head.lr is not None:
        yield f"optimizer.head.lr has no effect: the rows of prototypes.memory.gradient={m.gradient} do not learn; remove it"
    if config.optimizer.head.weight_decay is not None:
        yield "optimizer.head.weight_decay has no effect on a prototype memory; remove it"
    if q.usage == "topk" and q.keep >= builders:
        yield f"quality.keep={q.keep} keeps all of the {builders} images that make a prototype; lower it"
    if q.usage == "hard" and q.threshold is None and not 0 < q.quantile < 1:
        yield f"quality.quantile={q.quantile} rejects nobody or everybody; set it between 0 and 1, or set quality.threshold"
    if q.threshold is not None and q.quantile != 0.1:
        yield "quality.threshold and quality.quantile are both set; keep one"
    if q.threshold is not None and q.threshold > 1 and q.estimator != "external":
        yield (
            f"quality.threshold={q.threshold} rejects everything: scores of quality.estimator={q.estimator} are between 0 and 1"
        )
    if q.estimator != "equal" and q.warmup >= 1:
        yield f"quality.warmup={q.warmup}: the quality would never count; lower it"
    if not 0 <= u.decay < 1:
        yield f"quality.unrecognizable.decay={u.decay} is not in [0, 1)"
    if u.source == "external" and u.path is None:
        yield "quality.unrecognizable.source=external needs quality.unrecognizable.path, a set of such images"
    if u.source != "external" and u.path is not None:
        yield f"quality.unrecognizable.path has no effect with source={u.source}; set source=external"
    if u.source == "low_norm" and u.images != 16:
        yield "quality.unrecognizable.images has no effect with source=low_norm; remove it"


def load(files: list[str], overrides: list[str] = ()) -> DictConfig:
    """Merge the schema's defaults, YAML files in order, then `key=value` overrides. Raises UserError, one line."""
    config = OmegaConf.structured(Config)
    for path in files:
        if not Path(path).is_file():
            raise UserError(f"config file {path} does not exist")
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
        try:
            given = OmegaConf.from_dotlist([text])
        except Exception as e:  # YAML's own errors span many lines
            raise UserError(f"{text}: the value is not valid YAML: {str(e).splitlines()[0]}") from None
        config = _merge(config, given, text)
    try:
        OmegaConf.resolve(config)
    except OmegaConfBaseException as e:
        raise UserError(f"config: {str(e).splitlines()[0]}") from None
    if config.margin.gradient == "True":  # YAML's true
        config.margin.gradient = "true"
    check(config)
    return config


def split_arguments(arguments: list[str]) -> tuple[list[str], list[str]]:
    """Separate `a.yaml b.yaml key=value ...` into files and overrides."""
    files = [a for a in arguments if "=" not in a]
    return files, [a for a in arguments if "=" in a]
