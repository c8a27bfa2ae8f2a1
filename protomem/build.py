"""From a config to the parts of a run: encoder, sampler, prototypes, optimizers, head."""

from __future__ import annotations

import functools
import logging
import math

import torch
from omegaconf import DictConfig, OmegaConf

from protomem import distributed, optim
from protomem.block_update import BlockUpdate
from protomem.data.memory_samplers import GroupSampler, MixedSampler
from protomem.data.pipeline import read_ahead
from protomem.data.sampler import BalancedSampler, ShuffledSampler
from protomem.encoder import build_encoder
from protomem.encoder.ema import EmaEncoder
from protomem.encoder.weights import load_weights
from protomem.errors import UserError
from protomem.head import HEADS, triton_head, tuning
from protomem.objective.contrast import Contrast
from protomem.objective.criterion import Criterion, UnifiedCriterion
from protomem.objective.margins import Margin, build_margin
from protomem.plan.case import Case
from protomem.prototypes.classifier import ClassifierShard
from protomem.prototypes.empirical import EmpiricalPrototypes
from protomem.prototypes.memory import PrototypeMemory
from protomem.prototypes.sampled import SampledShard
from protomem.prototypes.slots import Slots
from protomem.quality import NORMS, Quality
from protomem.seeds import mix

log = logging.getLogger(__name__)


def encoder_from(config: DictConfig, device: torch.device) -> torch.nn.Module:
    """The encoder that a config describes, with its initial weights, on `device`."""
    c = config.encoder
    torch.manual_seed(mix(config.train.seed, 1))
    encoder = build_encoder(
        c.name,
        c.embedding_size,
        dropout=c.dropout,
        last_bn=c.last_bn,
        checkpointing=c.checkpointing,
        input_size=config.data.size,
    )
    if c.weights:
        load_weights(encoder, c.weights)
    if c.sync_bn:
        if device.type != "cuda":
            raise UserError("encoder.sync_bn=true needs GPUs; on CPUs use encoder.freeze_statistics=true or sync_bn=false")
        encoder = torch.nn.SyncBatchNorm.convert_sync_batchnorm(encoder)
    encoder.freeze_statistics(c.freeze_statistics)
    return encoder.to(device, memory_format=torch.channels_last if c.channels_last else torch.contiguous_format)


def slots_from(config: DictConfig, num_identities: int) -> int:
    """Slots of the prototype memory: no more than there are identities, since the others could never be filled."""
    size = config.prototypes.memory.size
    if size > num_identities and distributed.rank() == 0:
        log.warning("prototypes.memory.size=%d, but the data have %d identities: no more slots are made", size, num_identities)
    return min(size, num_identities)


def sampler_from(config: DictConfig, records):
    """Which records make up each batch. `mixed` follows the memory's content in a copy of its bookkeeping."""
    batch, s, m = config.train.batch_size, config.data.sampler, config.prototypes.memory
    if s.name == "shuffled":
        return ShuffledSampler(len(records), batch, config.train.seed)
    k = s.images_per_identity
    shape = records.labels, batch // k, k, config.train.seed
    if s.name == "balanced":
        return BalancedSampler(*shape)
    size = slots_from(config, records.num_classes)
    if s.name == "group":
        return GroupSampler(*shape, group_size=s.group_size or max(size // 2, batch // k), passes=s.passes)
    slots = Slots(size, records.num_classes, m.policy)
    return MixedSampler(*shape, slots=slots, refresh=s.refresh, pick=s.pick, lag=read_ahead(config.data.prefetch) + 1)


def prototypes_from(config: DictConfig, num_identities: int, device: torch.device, total_steps: int, epoch_steps: int):
    size, p = config.encoder.embedding_size, config.prototypes
    injection = injection_from(config, num_identities)
    if p.source == "memory":
        return memory_from(config, num_identities, total_steps, injection).to(device)
    options = {"seed": mix(config.train.seed, 2), "std": p.init_std, "injection": injection, "sub_centers": p.sub_centers}
    if p.source == "sampled":
        shard = SampledShard(num_identities, size, rate=p.rate, **options)
    else:
        shard = ClassifierShard(num_identities, size, **options)
    if p.empirical.enabled:
        given = {k: p.empirical[k] for k in ("update", "coefficient", "k", "stacked")}
        start = round(p.empirical.start_epoch * epoch_steps)
        shard.empirical = EmpiricalPrototypes(num_identities, size, start=start, **given)
    return shard.to(device)


def injection_from(config: DictConfig, num_identities: int) -> dict | None:
    """weight, steps and start of the features that are mixed into the prototypes (VPL), or None.

    passes and coverage become steps from the n identities that a batch holds (with data.sampler.name=shuffled: that one of
    equally frequent identities is expected to hold). passes: C / n of them each. coverage: after how many this share of all
    identities has come, on average; with images in random order that is log(1 - coverage) / log(1 - n / C).
    """
    i, s, c = config.prototypes.injection, config.data.sampler, num_identities
    if not i.weight:
        return None
    batch = config.train.batch_size
    n = c * (1 - (1 - 1 / c) ** batch) if s.name == "shuffled" else batch // s.images_per_identity
    steps = i.steps
    if i.passes:
        steps = i.passes * c / n
    elif i.coverage and n >= c:
        steps = 1
    elif i.coverage:
        steps = balanced_passes(i.coverage) * c / n if s.name == "balanced" else math.log1p(-i.coverage) / math.log1p(-n / c)
    return {"weight": i.weight, "steps": max(1, round(steps)), "start": i.start}


def balanced_passes(coverage: float) -> float:
    """Passes f over all identities within which this share of them comes, when every pass has each of them once, in a new
    order, and the f begin anywhere: the share is f - f^3 / 6 up to f = 1, then 1 - (2 - f)^3 / 6."""
    if coverage > 5 / 6:
        return 2 - (6 * (1 - coverage)) ** (1 / 3)
    return 8**0.5 * math.sin(math.asin(3 * coverage / 8**0.5) / 3)


def memory_from(config: DictConfig, num_identities: int, total_steps: int, injection: dict | None = None) -> PrototypeMemory:
    size, m, q = config.encoder.embedding_size, config.prototypes.memory, config.quality
    g = config.margin.magnitude
    quality = Quality(
        size,
        **{k: q[k] for k in ("estimator", "usage", "power", "minimum", "threshold", "quantile", "on_empty", "keep", "loss_weight")},
        warmup=round(q.warmup * total_steps),
        unrecognizable="low_norm" if q.unrecognizable.source == "low_norm" else "given",
        decay=q.unrecognizable.decay,
        norms=(g.lower, g.upper) if config.margin.name == "magface" else NORMS,
    )
    return PrototypeMemory(
        num_identities,
        size,
        size=min(m.size, num_identities),
        **{k: m[k] for k in ("policy", "momentum", "fill", "gradient", "self_exclusion", "average", "storage")},
        quality=quality,
        pinned=q.unrecognizable.pinned,
        seed=mix(config.train.seed, 2),
        look_alikes=config.data.sampler.name == "mixed" and config.data.sampler.pick == "look_alike",
        injection=injection,
    )


def optimizers_from(config: DictConfig, encoder, prototypes, criterion) -> dict[str, torch.optim.Optimizer]:
    """One optimizer for the encoder, one for this rank's prototypes (its own rate and decay, rows only if sampled), one for
    what the criterion learns (at the prototypes' rate, without decay: our decision)."""
    o = config.optimizer
    head_lr = o.lr if o.head.lr is None else o.head.lr
    head_decay = o.weight_decay if o.head.weight_decay is None else o.head.weight_decay
    options = dict(momentum=o.momentum, nesterov=o.nesterov, betas=tuple(o.betas), eps=o.eps)
    groups = optim.encoder_groups(encoder, o.weight_decay, o.no_decay_norm)
    built = {"encoder": optim.build_optimizer(groups, o.name, lr=o.lr, fused=o.fused, **options)}
    ratio = head_lr / o.lr if o.lr else 1.0
    if learned := list(criterion.parameters()):
        group = {"params": learned, "lr_scale": ratio, "weight_decay": 0.0}
        built["criterion"] = optim.build_optimizer([group], o.name, lr=o.lr, fused=o.fused, **options)
    if config.prototypes.source == "memory":
        if prototypes.gradient_mode == "sgd":
            built["prototypes"] = optim.UnitRowSGD(prototypes, o.lr, ratio)
        return built
    group = {"params": [prototypes.weight], "lr_scale": ratio, "weight_decay": head_decay, "sharded": True}
    if not prototypes.row_sparse:
        built["prototypes"] = optim.build_optimizer([group], o.name, lr=o.lr, fused=o.fused, **options)
        if o.fuse_prototypes:
            prototypes.sink.update = BlockUpdate(built["prototypes"], prototypes.weight)
    elif o.name == "sgd":
        del group["sharded"]
        built["prototypes"] = optim.RowSGD([group], o.lr, o.momentum, head_decay, o.nesterov, o.untouched)
        if o.untouched == "exact":
            prototypes.before_use = built["prototypes"].catch_up
    else:
        del group["sharded"]
        built["prototypes"] = optim.RowAdamW([group], o.lr, tuple(o.betas), o.eps, head_decay)
    return built


def margin_from(config: DictConfig) -> Margin:
    own = ("criterion", "unified")  # of the loss, not of the margin
    return build_margin(**{key: value for key, value in config.margin.items() if key not in own})


def criterion_from(config: DictConfig, num_identities: int, device: torch.device) -> Criterion:
    """The criterion. UniFace's initial threshold, where the config has none, depends on how many prototypes there are."""
    m = config.margin
    if m.criterion == "softmax":
        return Criterion().to(device)
    compared = min(config.prototypes.memory.size, num_identities) if config.prototypes.source == "memory" else num_identities
    return UnifiedCriterion(compared, **m.unified).to(device)


def contrast_from(config: DictConfig, epoch_steps: int, device: torch.device) -> Contrast | None:
    """CoReFace's loss between two views, or None."""
    c = config.contrast
    if c.weight == 0:
        return None
    options = {key: c[key] for key in ("coupling", "negatives", "mask", "scale", "momentum", "dropout")}
    return Contrast(c.weight, start=round(c.start_epoch * epoch_steps), **options).to(device)


def key_encoder_from(config: DictConfig, encoder: torch.nn.Module) -> EmaEncoder | None:
    """The averaged copy of the encoder that makes a memory's prototypes, or the features that are injected (VPL)."""
    decay = config.prototypes.memory.key_encoder or config.prototypes.injection.key_encoder
    return EmaEncoder(encoder, decay) if decay else None


def head_from(config: DictConfig):
    """The head's back end with its options, as a function (x, columns, scale, negatives) -> (cos_y, lse_neg)."""
    h = config.head
    if h.backend == "dense":
        if h.precision != "fp32":
            raise UserError("head.precision=bf16 has no effect on head.backend=dense; use head.backend=blocked")
        return HEADS["dense"]
    if h.backend == "triton":
        triton_head.check(None if config.distributed.device == "auto" else config.distributed.device)
    return functools.partial(HEADS[h.backend], precision=h.precision, block=h.block, store_mb=h.store_mb)


def head_work_from(config: DictConfig, num_identities: int) -> tuning.Work:
    """What head.tune times: the largest micro-batch, in all of its views (from contrast.start_epoch on there are two), against
    the shard of rank 0."""
    h, m = config.head, config.margin
    case = Case(OmegaConf.to_object(config), num_identities, 0, distributed.world_size(), None, None, None)
    memory = case.source == "memory"
    return tuning.work(
        case.views * case.batch,
        case.centers * case.active,
        case.size,
        h.precision,
        store_mb=h.store_mb,
        block=h.block,
        learns=case.learns,
        memory=memory,
        half=memory and config.prototypes.memory.storage == "bf16",
        mixed=config.prototypes.injection.weight > 0,
        filtered=m.filter_above > 0,
        threshold=m.criterion == "unified",
        centers=case.centers,
    )
