"""From a config to the parts of a run: encoder, sampler, prototypes, optimizers, head."""

from __future__ import annotations

import functools

import torch
from omegaconf import DictConfig

from protomem import optim
from protomem.data.sampler import BalancedSampler, ShuffledSampler
from protomem.encoder import build_encoder
from protomem.encoder.weights import load_weights
from protomem.errors import UserError
from protomem.head import HEADS
from protomem.prototypes.classifier import ClassifierShard
from protomem.prototypes.sampled import SampledShard
from protomem.seeds import mix


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


def sampler_from(config: DictConfig, records):
    batch, s = config.train.batch_size, config.data.sampler
    if s.name == "balanced":
        k = s.images_per_identity
        return BalancedSampler(records.labels, batch // k, k, config.train.seed)
    return ShuffledSampler(len(records), batch, config.train.seed)


def prototypes_from(config: DictConfig, num_identities: int, device: torch.device):
    size, p = config.encoder.embedding_size, config.prototypes
    options = {"seed": mix(config.train.seed, 2), "std": p.init_std}
    if p.source == "sampled":
        return SampledShard(num_identities, size, rate=p.rate, **options).to(device)
    return ClassifierShard(num_identities, size, **options).to(device)


def optimizers_from(config: DictConfig, encoder, prototypes) -> dict[str, torch.optim.Optimizer]:
    """One optimizer for the encoder, one for this rank's prototypes (its own rate and decay, rows only if sampled)."""
    o = config.optimizer
    head_lr = o.lr if o.head.lr is None else o.head.lr
    head_decay = o.weight_decay if o.head.weight_decay is None else o.head.weight_decay
    options = dict(momentum=o.momentum, nesterov=o.nesterov, betas=tuple(o.betas), eps=o.eps)
    groups = optim.encoder_groups(encoder, o.weight_decay, o.no_decay_norm)
    built = {"encoder": optim.build_optimizer(groups, o.name, lr=o.lr, fused=o.fused, **options)}
    ratio = head_lr / o.lr if o.lr else 1.0
    group = {"params": [prototypes.weight], "lr_scale": ratio, "weight_decay": head_decay, "sharded": True}
    if not prototypes.row_sparse:
        built["prototypes"] = optim.build_optimizer([group], o.name, lr=o.lr, fused=o.fused, **options)
    elif o.name == "lamb":
        raise UserError("optimizer.name=lamb has no row-sparse form; use sgd or adamw with prototypes.source=sampled")
    elif o.name == "sgd":
        del group["sharded"]
        built["prototypes"] = optim.RowSGD([group], o.lr, o.momentum, head_decay, o.nesterov)
    else:
        del group["sharded"]
        built["prototypes"] = optim.RowAdamW([group], o.lr, tuple(o.betas), o.eps, head_decay)
    return built


def head_from(config: DictConfig):
    """The head's back end with its options, as a function (x, columns, scale, negatives) -> (cos_y, lse_neg)."""
    h = config.head
    if h.backend == "dense":
        if h.precision != "fp32":
            raise UserError("head.precision=bf16 has no effect on head.backend=dense; use head.backend=blocked")
        return HEADS["dense"]
    return functools.partial(HEADS[h.backend], precision=h.precision, block=h.block, store_mb=h.store_mb)
