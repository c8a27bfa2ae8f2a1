"""The configuration's schema: every key with its type and default. What values are allowed: protomem/rules.py.

`configs/default.yaml` explains the keys; a test keeps it equal to the defaults here. Imports no torch.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Optional


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
    compile: str = "off"


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
class Injection:
    weight: float = 0.0
    steps: int = 200
    passes: float = 0.0
    coverage: float = 0.0
    start: int = 8000
    key_encoder: float = 0.0


@dataclass
class Empirical:
    enabled: bool = False
    update: str = "before"
    coefficient: str = "softsign"
    k: float = 0.7
    stacked: bool = False
    start_epoch: float = 3.0


@dataclass
class Prototypes:
    source: str = "classifier"
    rate: float = 0.1
    init_std: float = 0.01
    sub_centers: int = 1
    memory: Memory = field(default_factory=Memory)
    injection: Injection = field(default_factory=Injection)
    empirical: Empirical = field(default_factory=Empirical)


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
class Magnitude:
    kind: str = "arcface"
    lower: float = 10.0
    upper: float = 110.0
    lower_margin: float = 0.45
    upper_margin: float = 0.8
    weight: float = 35.0


@dataclass
class Unified:
    bias: Optional[float] = None
    negatives: float = 1.0


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
    magnitude: Magnitude = field(default_factory=Magnitude)
    criterion: str = "softmax"
    unified: Unified = field(default_factory=Unified)


@dataclass
class Contrast:
    weight: float = 0.0
    coupling: str = "one_way"
    negatives: str = "local"
    mask: str = "zero"
    scale: float = 64.0
    momentum: float = 0.01
    start_epoch: float = 7.0
    dropout: float = 0.6


@dataclass
class Head:
    backend: str = "blocked"
    precision: str = "fp32"
    block: int = 0
    store_mb: float = 16.0
    tune: bool = False


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
    fuse_prototypes: bool = False
    untouched: str = "lazy"
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
    asynchronous: bool = True
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
    check_every: int = 0
    straggler: float = 2.0


@dataclass
class Config:
    output: str = "???"
    data: Data = field(default_factory=Data)
    encoder: Encoder = field(default_factory=Encoder)
    prototypes: Prototypes = field(default_factory=Prototypes)
    quality: Quality = field(default_factory=Quality)
    margin: Margin = field(default_factory=Margin)
    contrast: Contrast = field(default_factory=Contrast)
    head: Head = field(default_factory=Head)
    optimizer: Optimizer = field(default_factory=Optimizer)
    schedule: Schedule = field(default_factory=Schedule)
    train: Train = field(default_factory=Train)
    evaluate: Evaluation = field(default_factory=Evaluation)
    checkpoint: Checkpoint = field(default_factory=Checkpoint)
    log: Log = field(default_factory=Log)
    distributed: Distributed = field(default_factory=Distributed)
