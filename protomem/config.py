"""The configuration: a typed schema, strict merging of YAML files and key=value overrides, errors that name the key.

Imports no torch, so that a misspelled key is reported at once. `configs/default.yaml` shows every key with a comment;
a test keeps it equal to the defaults here.
"""

from __future__ import annotations

import difflib
import re
from dataclasses import dataclass, field, fields, is_dataclass
from pathlib import Path
from typing import Any, Optional

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from protomem.errors import UserError


@dataclass
class Sampler:
    name: str = "shuffled"
    images_per_identity: int = 4
    refresh: float = 0.2
    pick: str = "random"
    group_size: int = 0
    passes: int = 4


@dataclass
class Augment:
    flip: float = 0.5
    crop: float = 0.0
    low_resolution: float = 0.0
    photometric: float = 0.0
    occlusion: float = 0.0


@dataclass
class Data:
    train: str = "???"
    eval: list[str] = field(default_factory=list)
    size: int = 112
    loader: str = "auto"
    threads: int = 2
    prefetch: int = 2
    on_corrupt: str = "error"
    sampler: Sampler = field(default_factory=Sampler)
    augment: Augment = field(default_factory=Augment)


@dataclass
class Encoder:
    name: str = "iresnet50"
    embedding_size: int = 512
    dropout: float = 0.0
    last_bn: str = "frozen"
    freeze_statistics: bool = False
    sync_bn: bool = False
    weights: Optional[str] = None
    precision: str = "fp32"
    channels_last: bool = True
    checkpointing: bool = False
    compile: bool = False


@dataclass
class Memory:
    size: int = 100_000
    policy: str = "ring"
    momentum: float = 0.0
    fill: str = "empty"
    gradient: str = "none"
    self_exclusion: str = "none"
    average: str = "unit"
    storage: str = "fp32"
    key_encoder: float = 0.0
    check_every: int = 0


@dataclass
class Prototypes:
    source: str = "classifier"
    rate: float = 0.1
    init_std: float = 0.01
    memory: Memory = field(default_factory=Memory)


@dataclass
class Unrecognizable:
    source: str = "synthetic"
    images: int = 16
    decay: float = 0.9
    path: Optional[str] = None
    pinned: bool = False


@dataclass
class Quality:
    estimator: str = "equal"
    usage: str = "soft"
    power: float = 1.0
    minimum: float = 1e-3
    threshold: Optional[float] = None
    quantile: float = 0.1
    on_empty: str = "equal"
    keep: int = 2
    column: str = "quality"
    warmup: float = 0.02
    loss_weight: float = 0.0
    unrecognizable: Unrecognizable = field(default_factory=Unrecognizable)


@dataclass
class Margin:
    name: str = "cosface"
    scale: float = 64.0
    m: Optional[float] = None
    m1: Optional[float] = None
    m2: Optional[float] = None
    m3: Optional[float] = None
    gradient: str = "true"
    beyond_pi: str = "threshold"
    filter_above: float = 0.0


@dataclass
class Head:
    backend: str = "blocked"
    precision: str = "fp32"
    block: int = 0
    store_mb: float = 16.0


@dataclass
class HeadOptimizer:
    lr: Optional[float] = None
    weight_decay: Optional[float] = None


@dataclass
class Optimizer:
    name: str = "sgd"
    lr: float = 0.1
    momentum: float = 0.9
    nesterov: bool = False
    betas: list[float] = field(default_factory=lambda: [0.9, 0.999])
    eps: float = 1e-8
    weight_decay: float = 5e-4
    no_decay_norm: bool = False
    clip: float = 0.0
    fused: Optional[bool] = None
    head: HeadOptimizer = field(default_factory=HeadOptimizer)


@dataclass
class Schedule:
    epochs: int = 20
    steps: int = 0
    warmup_epochs: float = 0.0
    warmup_steps: int = 0
    decay: str = "polynomial"
    power: float = 2.0
    milestones: list[float] = field(default_factory=list)
    gamma: float = 0.1
    final_lr: float = 0.0


@dataclass
class Train:
    batch_size: int = 512
    accumulate: int = 1
    seed: int = 1
    deterministic: bool = False


@dataclass
class Evaluation:
    every: int = 0
    batch_size: int = 128
    flip: bool = False
    initial: bool = True


@dataclass
class Checkpoint:
    every: int = 2000
    keep: int = 2
    best: Optional[str] = None
    resume: str = "auto"


@dataclass
class Wandb:
    mode: str = "disabled"
    project: str = "protomem"
    name: Optional[str] = None


@dataclass
class Log:
    every: int = 50
    tensorboard: bool = False
    wandb: Wandb = field(default_factory=Wandb)


@dataclass
class Distributed:
    device: str = "auto"
    timeout_s: float = 600.0


@dataclass
class Config:
    output: str = "???"
    data: Data = field(default_factory=Data)
    encoder: Encoder = field(default_factory=Encoder)
    prototypes: Prototypes = field(default_factory=Prototypes)
    quality: Quality = field(default_factory=Quality)
    margin: Margin = field(default_factory=Margin)
    head: Head = field(default_factory=Head)
    optimizer: Optimizer = field(default_factory=Optimizer)
    schedule: Schedule = field(default_factory=Schedule)
    train: Train = field(default_factory=Train)
    evaluate: Evaluation = field(default_factory=Evaluation)
    checkpoint: Checkpoint = field(default_factory=Checkpoint)
    log: Log = field(default_factory=Log)
    distributed: Distributed = field(default_factory=Distributed)


CHOICES = {
    "data.loader": ("auto", "dali", "torch"),
    "data.on_corrupt": ("error", "skip"),
    "data.sampler.name": ("shuffled", "balanced", "mixed", "group"),
    "data.sampler.pick": ("random", "random_old", "look_alike"),
    "encoder.last_bn": ("frozen", "learnable"),
    "encoder.precision": ("fp32", "bf16", "fp16"),
    "prototypes.source": ("classifier", "sampled", "memory"),
    "prototypes.memory.policy": ("ring", "lru"),
    "prototypes.memory.fill": ("empty", "random", "prefill"),
    "prototypes.memory.gradient": ("none", "batch", "sgd"),
    "prototypes.memory.self_exclusion": ("none", "loo", "split"),
    "prototypes.memory.average": ("unit", "raw"),
    "prototypes.memory.storage": ("fp32", "bf16"),
    "quality.estimator": ("equal", "norm", "recognizability", "external", "magface", "zscore"),
    "quality.usage": ("soft", "hard", "topk"),
    "quality.on_empty": ("equal", "skip", "best"),
    "quality.unrecognizable.source": ("synthetic", "external", "low_norm"),
    "margin.name": ("softmax", "cosface", "arcface", "combined"),
    "margin.gradient": ("true", "straight_through"),
    "margin.beyond_pi": ("threshold", "easy", "plain", "raw", "monotone"),
    "head.backend": ("dense", "blocked"),
    "head.precision": ("fp32", "bf16"),
    "optimizer.name": ("sgd", "adamw", "lamb"),
    "schedule.decay": ("polynomial", "cosine", "step", "constant"),
    "log.wandb.mode": ("disabled", "offline", "online"),
    "distributed.device": ("auto", "cpu", "cuda"),
}
AT_LEAST = {
    "data.size": 16,
    "data.threads": 1,
    "data.prefetch": 1,
    "data.sampler.images_per_identity": 1,
    "encoder.embedding_size": 1,
    "head.block": 0,
    "head.store_mb": 0,
    "margin.scale": 1e-6,
    "optimizer.lr": 0,
    "optimizer.clip": 0,
    "optimizer.weight_decay": 0,
    "optimizer.head.lr": 0,
    "optimizer.head.weight_decay": 0,
    "prototypes.init_std": 1e-12,
    "prototypes.memory.size": 1,
    "prototypes.memory.momentum": 0,
    "prototypes.memory.key_encoder": 0,
    "prototypes.memory.check_every": 0,
    "data.sampler.group_size": 0,
    "data.sampler.passes": 1,
    "quality.power": 0,
    "quality.minimum": 0,
    "quality.keep": 1,
    "quality.loss_weight": 0,
    "quality.unrecognizable.images": 1,
    "margin.filter_above": 0,
    "schedule.epochs": 0,
    "schedule.steps": 0,
    "schedule.warmup_epochs": 0,
    "schedule.warmup_steps": 0,
    "train.batch_size": 1,
    "train.accumulate": 1,
    "evaluate.every": 0,
    "evaluate.batch_size": 1,
    "checkpoint.every": 0,
    "checkpoint.keep": 1,
    "log.every": 1,
    "distributed.timeout_s": 1,
}
# A setting without effect is a mistake: these keys may only leave their default where the other key has such a value.
ONLY_WITH = {
    "data.sampler.images_per_identity": ("data.sampler.name", ("balanced",)),
    "prototypes.rate": ("prototypes.source", ("sampled",)),
    "margin.beyond_pi": ("margin.name", ("arcface", "combined")),
    "margin.gradient": ("margin.name", ("arcface", "combined")),
    "head.precision": ("head.backend", ("blocked",)),
    "head.block": ("head.backend", ("blocked",)),
    "head.store_mb": ("head.backend", ("blocked",)),
    "optimizer.momentum": ("optimizer.name", ("sgd",)),
    "optimizer.nesterov": ("optimizer.name", ("sgd",)),
    "optimizer.betas": ("optimizer.name", ("adamw", "lamb")),
    "optimizer.eps": ("optimizer.name", ("adamw", "lamb")),
    "schedule.power": ("schedule.decay", ("polynomial",)),
    "schedule.gamma": ("schedule.decay", ("step",)),
}
PROBABILITIES = tuple(f"data.augment.{f.name}" for f in fields(Augment)) + ("encoder.dropout",)


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
    if config.data.sampler.name == "balanced" and config.train.batch_size % config.data.sampler.images_per_identity:
        raise UserError(
            f"train.batch_size={config.train.batch_size} is not a multiple of "
            f"data.sampler.images_per_identity={config.data.sampler.images_per_identity}"
        )
    for key in sorted(OmegaConf.missing_keys(config)):
        raise UserError(f"{key} is not set; give it in the config file or as {key}=...")


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
