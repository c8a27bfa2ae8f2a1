"""Which parts of a method go together: what makes no sense, each with its reason and cure.

Found before a run starts, from the config alone. Imports no torch.
"""

from __future__ import annotations

from typing import Iterator

from omegaconf import DictConfig


def least_weight(scale: float, lower: float, upper: float, lower_margin: float, upper_margin: float) -> float:
    """MagFace's bound on the weight of its regulariser, above which the best magnitude lies inside [lower, upper] (Meng et
    al. 2021, section 3.3 and its appendix): s k u^2 l^2 / (u^2 - l^2), k = (upper_margin - lower_margin) / (upper - lower)."""
    k = (upper_margin - lower_margin) / (upper - lower)
    return scale * k * upper**2 * lower**2 / (upper**2 - lower**2)


def method_mistakes(config: DictConfig) -> Iterator[str]:
    """Undefined combinations of margin, prototype source and regulariser."""
    yield from _margin_mistakes(config)
    yield from _injection_mistakes(config)
    yield from _empirical_mistakes(config)
    yield from _contrast_mistakes(config)
    yield from _encoder_mistakes(config)
    yield from _optimizer_mistakes(config)
    yield from late_parts(config)


def _margin_mistakes(config: DictConfig) -> Iterator[str]:
    m = config.margin
    if m.filter_above >= 1:
        yield f"margin.filter_above={m.filter_above}: no cosine is larger, so nothing would be filtered; use less (0.4)"
    angle = {"arcface": m.m, "combined": m.m2}.get(m.name)
    if angle == 0 and (m.name == "arcface" or m.m1 in (None, 1)):
        if m.beyond_pi != "threshold":
            yield f"margin.beyond_pi={m.beyond_pi} has no effect without an angle in the margin; remove it"
        if m.gradient != "true":
            yield f"margin.gradient={m.gradient} has no effect without an angle in the margin; remove it"
    if m.name != "magface":
        return
    g, p = m.magnitude, config.prototypes
    if config.encoder.last_bn == "frozen" and not config.encoder.name.startswith("vit"):  # those have none
        yield (
            "margin.name=magface with encoder.last_bn=frozen: a frozen last BatchNorm pins the embedding norm that MagFace wants "
            "to move; set encoder.last_bn=learnable"
        )
    if m.gradient == "straight_through":
        yield (
            "margin.name=magface with margin.gradient=straight_through: the margin would have no gradient, and nothing would pull "
            "the norms down; use true"
        )
    if g.kind == "cosface" and m.beyond_pi != "threshold":
        yield f"margin.beyond_pi={m.beyond_pi} has no effect with margin.magnitude.kind=cosface; remove it"
    if not g.lower < g.upper:
        yield f"margin.magnitude: lower={g.lower} must be less than upper={g.upper}"
    elif not g.lower_margin <= g.upper_margin:
        yield f"margin.magnitude: lower_margin={g.lower_margin} is more than upper_margin={g.upper_margin}"
    elif g.kind == "arcface" and g.upper_margin >= 3.14:
        yield f"margin.magnitude.upper_margin={g.upper_margin} is an angle in radians below pi"
    else:
        bound, why = least_weight(m.scale, g.lower, g.upper, g.lower_margin, g.upper_margin), "these magnitudes"
        if p.source == "memory" and p.memory.self_exclusion == "split":
            k = config.data.sampler.images_per_identity
            # Only what is classified has a margin, and counts so much more in the mean; every image has the regulariser.
            bound, why = bound * k / max(k // 2, 1), why + ", and self_exclusion=split, where fewer images are classified"
        if g.weight < bound:
            yield (
                f"margin.magnitude.weight={g.weight} is below the bound {bound:.4g} of margin.scale={m.scale} and {why}: "
                f"norms would collapse to the lower end; use {bound:.4g} or more"
            )
    if config.quality.loss_weight > 0:
        yield (
            "margin.name=magface with quality.loss_weight: an image that counts more than others in the loss breaks the "
            "bound on margin.magnitude.weight, which rewards every norm alike; set quality.loss_weight=0"
        )


def _injection_mistakes(config: DictConfig) -> Iterator[str]:
    i, p = config.prototypes.injection, config.prototypes
    if i.weight == 0:
        return
    if p.sub_centers > 1:
        yield (
            f"prototypes.injection with prototypes.sub_centers={p.sub_centers}: nobody has said into which of an identity's "
            "prototypes its feature goes; use one of the two"
        )
    if i.weight >= 1:
        yield f"prototypes.injection.weight={i.weight}: nothing of the prototype would be left; use less than 1 (0.15)"
    if (i.passes > 0) + (i.coverage > 0) + (i.steps != 200) > 1:
        yield "prototypes.injection: steps, passes and coverage say the same thing; set one of them"
    if not 0 <= i.coverage < 1:
        yield f"prototypes.injection.coverage={i.coverage} is not a share in [0, 1)"
    if not 0 <= i.key_encoder < 1:
        yield f"prototypes.injection.key_encoder={i.key_encoder} is not in [0, 1)"
    if p.source == "memory" and p.memory.gradient == "batch":
        yield (
            "prototypes.injection with prototypes.memory.gradient=batch: the batch's prototypes carry its graph, into which nothing "
            "is injected; use gradient=none or sgd"
        )
    if p.source == "memory" and i.key_encoder > 0:
        yield "prototypes.injection.key_encoder has no effect with prototypes.source=memory; set prototypes.memory.key_encoder"
    if p.source == "memory" and (i.coverage > 0 or i.passes > 0):
        yield "prototypes.injection: passes and coverage count a classifier's identities; with a memory set steps"


def _empirical_mistakes(config: DictConfig) -> Iterator[str]:
    e, p = config.prototypes.empirical, config.prototypes
    if not e.enabled:
        return
    update = e["update"]  # e.update is the method of a mapping
    if p.source == "memory":
        yield (
            "prototypes.empirical with prototypes.source=memory: the memory's prototypes are empirical ones already; use "
            "source=classifier or sampled"
        )
    if update == "before" and config.train.accumulate > 1:
        yield (
            f"prototypes.empirical.update=before with train.accumulate={config.train.accumulate}: the whole batch updates them "
            "before its loss, so it cannot be cut; use update=after or accumulate=1"
        )
    if update == "after" and p.injection.key_encoder > 0:
        yield (
            "prototypes.empirical.update=after with prototypes.injection.key_encoder: the averaged encoder's features are for "
            "injection alone; use update=before or key_encoder=0"
        )
    if e.k >= 2:
        yield f"prototypes.empirical.k={e.k}: the own cosine would count less than -1 times; use less than 2 (0.7)"
    if e.stacked and config.margin.name == "softmax":
        yield "prototypes.empirical.stacked has no effect with margin.name=softmax, which has no margin; remove it"


def _contrast_mistakes(config: DictConfig) -> Iterator[str]:
    c = config.contrast
    if c.weight == 0:
        return
    if not 0 < c.dropout < 1:
        same = "the two views of an image would be the same" if c.dropout == 0 else "nothing of an image would be left"
        yield f"contrast.dropout={c.dropout}: {same}; use a number between 0 and 1 (0.6)"
    if config.train.accumulate > 1:
        yield (
            f"contrast with train.accumulate={config.train.accumulate}: images are contrasted within the batch, so it cannot be "
            "cut; use accumulate=1"
        )
    if c.start_epoch == 0 and config.encoder.dropout > 0:
        yield (
            f"encoder.dropout={config.encoder.dropout} has no effect with contrast.start_epoch=0, from where on "
            "contrast.dropout counts; remove it"
        )


def _encoder_mistakes(config: DictConfig) -> Iterator[str]:
    e = config.encoder
    if e.name.startswith("vit"):
        for key, default in (("last_bn", "frozen"), ("freeze_statistics", False), ("sync_bn", False)):
            if e[key] != default:
                yield f"encoder.{key}={e[key]} has no effect on encoder.name={e.name}, which has no BatchNorm; remove it"
    if e.compile == "graphs" and config.train.accumulate > 1:
        yield (
            f"encoder.compile=graphs with train.accumulate={config.train.accumulate}: a CUDA graph writes gradients over "
            "those of the micro-batch before; use compile=default or accumulate=1"
        )
    if e.compile == "graphs" and config.distributed.device == "cpu":
        yield "encoder.compile=graphs with distributed.device=cpu: CUDA graphs need a GPU; use compile=default"
    if e.freeze_statistics and e.sync_bn:
        yield "encoder.sync_bn has no effect with encoder.freeze_statistics=true: no batch statistics are taken; remove one"


def _optimizer_mistakes(config: DictConfig) -> Iterator[str]:
    o = config.optimizer
    if config.head.tune and config.train.deterministic:
        yield "head.tune=true with train.deterministic=true: the clock would choose the order of sums; use one of the two"
    if o.name == "lamb" and config.prototypes.source == "sampled":
        yield "optimizer.name=lamb has no row-sparse form; use sgd or adamw with prototypes.source=sampled"
    if o.nesterov and o.momentum == 0:
        yield "optimizer.nesterov has no effect with optimizer.momentum=0; remove it"
    decay = o.weight_decay if o.head.weight_decay is None else o.head.weight_decay
    if o.untouched == "exact" and o.name != "sgd":
        yield (
            f"optimizer.untouched=exact with optimizer.name={o.name}: its missed steps have no closed form; use sgd, or "
            "untouched=lazy"
        )
    elif o.untouched == "exact" and config.prototypes.rate == 1:
        yield "optimizer.untouched=exact has no effect with prototypes.rate=1, which draws every row; remove it"
    elif o.untouched == "exact" and o.momentum == 0 and decay == 0:
        yield "optimizer.untouched=exact has no effect without momentum and weight decay; remove it"
    if o.fuse_prototypes:
        yield from _fused_update_mistakes(config)


def _fused_update_mistakes(config: DictConfig) -> Iterator[str]:
    """What needs all of a step's prototype gradient before a row changes."""
    o = config.optimizer
    for found, why in (
        (config.head.backend == "dense", "head.backend=dense, which makes the whole gradient at once; use blocked or triton"),
        (config.train.accumulate > 1, f"train.accumulate={config.train.accumulate}: later micro-batches add to the gradient"),
        (o.clip > 0, f"optimizer.clip={o.clip}, which needs the norm of the whole gradient"),
        (config.encoder.precision == "fp16", "encoder.precision=fp16, whose overflows skip a step when gradients are known"),
        (o.name == "lamb", "optimizer.name=lamb, which needs the norm of the whole update; use sgd or adamw"),
    ):
        if found:
            yield f"optimizer.fuse_prototypes=true with {why}" + ("" if "; use" in why else "; use one of the two")


def late_parts(config: DictConfig, epoch_steps: int = 0) -> Iterator[str]:
    """Parts that would begin when the run is over. epoch_steps: 0 while the data are not known, and with them what an epoch
    is in steps."""
    s, p, c = config.schedule, config.prototypes, config.contrast
    epochs = {}
    if p.empirical.enabled:
        epochs["prototypes.empirical.start_epoch"] = p.empirical.start_epoch
    if c.weight > 0:
        epochs["contrast.start_epoch"] = c.start_epoch
    total, starts = s.steps or s.epochs * epoch_steps, {}
    if p.injection.weight > 0:
        starts["prototypes.injection.start"] = (p.injection.start, p.injection.start)
    if epoch_steps:
        starts |= {key: (start, round(start * epoch_steps)) for key, start in epochs.items()}
    for key, (start, step) in starts.items():
        if total and step >= total:
            yield f"{key}={start:g} is step {step} of only {total}, so it would never begin; lower it, or train longer"
    for key, start in epochs.items():
        if s.epochs and start >= s.epochs:
            yield f"{key}={start:g} is past the last of {s.epochs} epochs, so it would never begin; lower it, or train longer"


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
    if s.pick != "random" and s.refresh == 0:
        yield f"data.sampler.pick={s.pick} has no effect with data.sampler.refresh=0: nobody is drawn again; remove it"
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
    if m.gradient != "sgd" and config.margin.criterion != "unified" and config.optimizer.head.lr is not None:
        yield f"optimizer.head.lr has no effect: the rows of prototypes.memory.gradient={m.gradient} do not learn; remove it"
    if config.optimizer.head.weight_decay is not None:
        yield "optimizer.head.weight_decay has no effect on a prototype memory; remove it"
    if q.usage == "soft" and q.power == 0:
        yield "quality.power=0 gives every image the same weight; use more than 0, or quality.estimator=equal"
    if q.usage == "soft" and q.minimum >= 1 and q.estimator != "external":
        yield (
            f"quality.minimum={q.minimum} gives every image the same weight, since scores of "
            f"quality.estimator={q.estimator} are between 0 and 1; lower it"
        )
    if q.usage == "topk" and q.keep >= builders:
        yield f"quality.keep={q.keep} keeps all of the {builders} images that make a prototype; lower it"
    if q.usage == "hard" and q.threshold is None and not 0 < q.quantile < 1:
        yield f"quality.quantile={q.quantile} rejects nobody or everybody; set it between 0 and 1, or set quality.threshold"
    if q.usage == "hard" and q.threshold is None and 0 < q.quantile * batch < 1:
        yield f"quality.quantile={q.quantile} of train.batch_size={batch} is less than one image: nobody is rejected; raise it"
    if q.threshold is not None and q.threshold <= 0:
        yield f"quality.threshold={q.threshold} accepts everything: scores are not negative; raise it"
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
