"""The training loop: builds a run from its config, goes on from the last checkpoint, trains, evaluates, saves."""

from __future__ import annotations

import contextlib
import functools
import os
import time
from pathlib import Path

import torch
from omegaconf import DictConfig, OmegaConf

from protomem import build, checkpointing, checks, composition, distributed, evaluation, flight, interval, lock, optim, replicas
from protomem.data.augment import AugmentOptions
from protomem.data.inspect import known_bad
from protomem.data.pipeline import make_loader, normalise
from protomem.data.records import open_records
from protomem.data_parallel import data_parallel, settle_buckets
from protomem.elastic import only_others_leave, starting
from protomem.encoder.compiled import compiled
from protomem.errors import UserError
from protomem.files import replace_file
from protomem.gradients import LossScaler, clip_gradients
from protomem.head import tuning
from protomem.launcher import choose_device, detect_launcher, ranks_here
from protomem.memory_run import MemoryRun
from protomem.metrics import RunLog
from protomem.report import write_report
from protomem.schedule import learning_rate
from protomem.seeds import mix
from protomem.signals import STOPPED, StopRequest
from protomem.step import Extras, MicroBatch, enqueue, forward_backward
from protomem.straggler import Stopwatch
from protomem.watch import watched

HALF = {"bf16": torch.bfloat16, "fp16": torch.float16}


class Run:
    """One training run on this rank. `step` counts finished optimizer steps; everything else follows from it."""

    def __init__(self, config: DictConfig, context: distributed.Context):
        self.config, self.context, self.device = config, context, context.device
        self.folder, self.step, self.overflows = Path(config.output), 0, 0
        self.tiles = None  # the choice of head.tune (protomem/head/tuning.py)
        self.goes_on = False  # after a stop that concerned other machines only
        self.best = evaluation.best_so_far(self.folder)
        checks.graphs(config, self.device)
        if config.train.deterministic:
            os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # cuBLAS asks for it
            torch.use_deterministic_algorithms(True)
        lenient = config.data.on_corrupt == "skip"
        # The first to open a large set builds its index; the others find it.
        distributed.main_first(lambda: open_records(config.data.train, strict=not lenient))
        self.records = open_records(config.data.train, strict=not lenient)
        self.sampler = build.sampler_from(config, self.records)
        self._plan()
        self.encoder = build.encoder_from(config, self.device)
        self.prototypes = build.prototypes_from(config, self.records.num_classes, self.device, self.total, self.epoch_steps)
        self.criterion = build.criterion_from(config, self.prototypes.num_identities, self.device)
        self.contrast = build.contrast_from(config, self.epoch_steps, self.device)
        self.optimizers = build.optimizers_from(config, self.encoder, self.prototypes, self.criterion)
        self.scaler = LossScaler(self.device) if config.encoder.precision == "fp16" else None
        self.margin = build.margin_from(config)
        self.head = build.head_from(config)
        self.key_encoder = build.key_encoder_from(config, self.encoder)
        self.extras = Extras(encoder=self.encoder, key_encoder=self.key_encoder)
        self.memory = None
        if config.prototypes.source == "memory":
            rows = distributed.batch_bounds(config.train.batch_size, context.rank, context.world_size, self.sampler.together)
            self.memory = MemoryRun(config, self.prototypes, self.sampler, self.extras, self.records, rows, self.device)
        self.sets = checks.pair_sets(config)
        checks.batchnorm(config, self.encoder, self.parts)
        checks.contrast(config, self.parts, self.sampler.together)

    def _plan(self) -> None:
        """How many steps, and how a step's rows are cut: over ranks, then into micro-batches."""
        s, t, world = self.config.schedule, self.config.train, self.context.world_size
        self.epoch_steps = self.sampler.steps_per_epoch
        self.total = s.steps or s.epochs * self.epoch_steps
        for mistake in composition.late_parts(self.config, self.epoch_steps):
            raise UserError(mistake)
        self.warmup = s.warmup_steps or round(s.warmup_epochs * self.epoch_steps)
        self.parts = checks.cut_rows(t.batch_size, self.sampler.together, world, t.accumulate)
        self.learning_rate(0)  # a schedule that makes no sense is told before anything is built

    def learning_rate(self, step: int) -> float:
        s = self.config.schedule
        return learning_rate(
            step,
            self.total,
            self.config.optimizer.lr,
            self.warmup,
            s.decay,
            s.power,
            tuple(s.milestones),
            s.gamma,
            s.final_lr,
        )

    def _tune(self) -> dict:
        """Take the fastest tiles for the head, or those of the checkpoint; what the log says of it."""
        work = build.head_work_from(self.config, self.records.num_classes)
        found = tuning.agree(work, self.device, self.tiles)
        self.tiles = found["record"]
        tiles, block = tuning.choice_of(self.tiles, work)
        self.head = functools.partial(self.head, tiles=tiles, block=block)
        return {k: self.tiles.get(k) for k in ("tiles", "block", "ms", "default_ms")} | {"source": found["source"]}

    def run(self, stop: StopRequest) -> bool:
        """Train up to the end, or until `stop` was asked for; whether it was the end."""
        resumed, c, tuned = checkpointing.resume(self), self.config, None
        if c.head.tune and self.step < self.total:
            with starting():
                tuned = self._tune()
        try:
            self.log = RunLog(
                self.folder,
                total_steps=self.total,
                config=OmegaConf.to_container(c),
                is_main=self.context.is_main,
                wandb=OmegaConf.to_container(c.log.wandb),
                tensorboard=c.log.tensorboard,
                resume_step=self.step if resumed else -1,
            )
        except OSError as error:
            raise lock.unwritable(self.folder, error) from None
        self.saver = checkpointing.saver(self)
        with contextlib.closing(self.log), self.saver:
            if tuned:
                self.log.event("tuned", step=self.step, **tuned)
            if resumed:
                self.log.event("resume", step=self.step, path=str(resumed), world_size=self.context.world_size)
                if evaluation.killed_before(self, resumed):
                    evaluation.if_due(self, resumed)
            elif c.evaluate.initial:
                evaluation.evaluate(self, "initial")
            marker = self.folder / "stopped"
            if self.context.is_main:
                marker.unlink(missing_ok=True)
            finished = self._train(stop)
            self.saver.wait()
            if finished and self.context.is_main:
                self.log.event("report", path=str(write_report(self.folder)))
            elif self.context.is_main and not self.goes_on:  # for scripts: torchrun does not pass on which of the two it was
                try:
                    replace_file(marker, f"at step {self.step} of {self.total} by {stop.reason()}\n".encode())
                except OSError:  # a full disk; all is saved, so this must not look like a failure
                    marker.touch()
            return finished

    def prepare(self) -> None:
        """What `_one_step` needs: the encoder as it is trained, and the counters of a logging interval."""
        model = data_parallel(self.encoder, self.device)
        model.train()
        if self.context.world_size > 1:
            settle_buckets(model, self.encoder, self.config.data.size, self.device)
        self.stopwatch = Stopwatch(self.device)
        self.model = self.stopwatch.around(compiled(model, self.config.encoder.compile))
        self.saved = self.first = self.step
        self.finite = torch.ones((), device=self.device)
        interval.begin(self)

    def _train(self, stop: StopRequest) -> bool:
        c = self.config
        self.prepare()
        if self.step == 0 and self.memory and c.prototypes.memory.fill == "prefill":
            steps = self.memory.fill(self._loader, lambda batch, step: self._enqueue(self._parts(batch)[0], step))
            self.log.event("prefill", steps=steps)
        loader = self._loader(self.sampler)
        ask = 1 if self.device.type == "cpu" else 10  # reading the answer makes a GPU wait
        with contextlib.ExitStack() as open_things:
            open_things.callback(flight.at_step, None)
            open_things.callback(loader.close)
            if self.memory:
                open_things.callback(self.memory.close)  # first: the loader may be waiting in the sampler
            while self.step < self.total:
                epoch, position = divmod(self.step, self.epoch_steps)
                for batch in interval.timed(self, loader.epoch(epoch, position)):
                    stats = self._one_step(batch)
                    if self.step % c.log.every == 0 or self.step == self.total:
                        interval.report(self, stats)
                    replicas.check_run(self)
                    self._periodic()
                    if self.step == self.total:
                        break
                    if self.step % ask == 0:
                        self.saver.poll(self.device)
                    if self.step % ask == 0 and stop.on_any_rank(self.device):
                        stop.hold()
                        flight.at_step(None)
                        if self.saved != self.step:
                            checkpointing.save(self)
                        self.saver.wait()
                        self.log.event("stopped", step=self.step, reason=stop.reason())
                        self.goes_on = only_others_leave(bool(stop.noted))
                        return False
        return True

    def _loader(self, sampler):
        c = self.config
        a = c.data.augment
        return make_loader(
            self.records,
            sampler,
            backend=c.data.loader,
            rank=self.context.rank,
            world_size=self.context.world_size,
            augment=AugmentOptions(a.flip, a.crop, a.low_resolution, a.photometric, a.occlusion),
            seed=c.train.seed,
            size=c.data.size,
            device=self.device,
            threads=c.data.threads,
            prefetch=c.data.prefetch,
            on_corrupt=c.data.on_corrupt,
            bad_positions=known_bad(self.records),
        )

    def _parts(self, batch) -> list[MicroBatch]:
        """This rank's rows of a batch on the device, cut into micro-batches."""
        rank, quality = self.context.rank, self.memory.numbers(batch.index) if self.memory else None
        images, labels = batch.images.to(self.device, non_blocking=True), batch.labels.to(self.device, non_blocking=True)
        parts = []
        for bounds in self.parts:
            lo, hi = bounds[rank]
            own = None if quality is None else quality[lo:hi]
            parts.append(MicroBatch(images[lo:hi], labels[lo:hi], [b - a for a, b in bounds], own))
        return parts

    def _forms(self) -> dict:
        """How images become the encoder's input, and in which precision it runs."""
        c, half = self.config, HALF.get(self.config.encoder.precision)
        return {
            "prepare": lambda x: normalise(x, channels_last=c.encoder.channels_last),
            "autocast": lambda: torch.autocast(self.device.type, dtype=half, enabled=half is not None),
            "extras": self.extras,
        }

    def _enqueue(self, part: MicroBatch, step: int) -> None:
        torch.manual_seed(mix(self.config.train.seed, 5, step, self.context.rank))
        enqueue(part, self.encoder, self.prototypes, **self._forms())

    def _one_step(self, batch) -> dict[str, torch.Tensor]:
        c, rank = self.config, self.context.rank
        compiles = c.encoder.compile != "off" and self.step == self.first  # which may take minutes
        flight.at_step(None if compiles else self.step + 1)
        lr = self.learning_rate(self.step)
        for optimizer in self.optimizers.values():
            optimizer.zero_grad(set_to_none=True)
            optim.set_learning_rate(optimizer, lr)
        # Dropout and its stream are functions of (seed, step, rank): nothing about them needs to be saved.
        self._set_dropout()
        torch.manual_seed(mix(c.train.seed, 3, self.step, rank))
        if self.memory:
            self.memory.before_step(self.step)
        shown = (self.step + 1) % c.log.every == 0 or self.step + 1 == self.total
        stats = forward_backward(
            self._parts(batch),
            self.model,
            self.prototypes,
            self.head,
            self.margin,
            self.step,
            scale_loss=self.scaler.scale if self.scaler else lambda loss: loss,
            observe=shown,
            criterion=self.criterion,
            contrast=self.contrast,
            **self._forms(),
        )
        stats["lr"] = lr
        if self._update(stats):
            self.finite *= torch.isfinite(stats["loss"])
        if self.key_encoder is not None:
            self.key_encoder.update()
        if self.memory:
            self.memory.after_step()
        self.step += 1
        self.interval["images"] += c.train.batch_size
        self.interval["skipped"] += batch.skipped
        return stats

    def _set_dropout(self) -> None:
        """CoReFace's second phase has a dropout of its own; the averaged copy of the encoder follows."""
        if self.contrast is not None:
            copies = [] if self.key_encoder is None else [self.key_encoder.encoder]
            for encoder in (self.encoder, *copies):
                encoder.dropout.p = self.contrast.dropout if self.contrast.active(self.step) else self.config.encoder.dropout

    def _update(self, stats: dict) -> bool:
        """Clip and step; False if an fp16 overflow made all ranks skip this step."""
        # Equal on all ranks, the encoder's by DDP, the criterion's because every rank computes them alike.
        encoder_params = [p for p in (*self.encoder.parameters(), *self.criterion.parameters()) if p.grad is not None]
        gradient = self.prototypes.gradient()
        shard = [] if gradient is None else [gradient]
        if self.scaler:
            found = self.scaler.unscale_([p.grad for p in encoder_params] + shard)
            stats["loss_scale"] = self.scaler.factor.clone()
            self.scaler.update()
            if found.item():  # the one wait of an fp16 step; all ranks decide alike
                self.overflows += 1
                if self.overflows >= 100:
                    raise UserError(f"fp16 overflowed in 100 steps in a row up to step {self.step}; use encoder.precision=bf16")
                return False
            self.overflows = 0
        if self.config.optimizer.clip > 0:
            stats["grad_norm"] = clip_gradients(encoder_params, shard, self.config.optimizer.clip)
        for optimizer in self.optimizers.values():
            optimizer.step()
        return True

    def _periodic(self) -> None:
        c, last, start = self.config, self.step == self.total, time.monotonic()
        flight.at_step(None)
        path = None  # saved first: an evaluation that fails must not cost the training
        if last or (c.checkpoint.every and self.step % c.checkpoint.every == 0):
            path = checkpointing.save(self)
        evaluation.if_due(self, path)
        flight.at_step(self.step + 1)
        self.interval["since"] += time.monotonic() - start  # evaluating and saving is not training time


def train(config: DictConfig, stop: StopRequest | None = None) -> bool:
    """Train as the config says, on all ranks that the launcher started; False if a signal stopped it, all being saved.

    stop: the caller's, if it listens for signals already.
    """
    folder, timeout_s = Path(config.output), config.distributed.timeout_s
    flight.nccl_records(folder)
    with contextlib.ExitStack() as listening:
        stop = stop or listening.enter_context(StopRequest())
        with starting():
            launcher, _, _, local_rank = detect_launcher()
            choose_device(config.distributed.device, local_rank, ranks_here(launcher))
        context = distributed.init(config.distributed.device, timeout_s)
        with watched(config.output, timeout_s, context.device), lock.one_run(folder, timeout_s):
            with starting():
                replicas.check_config(config)
                run = Run(config, context)
            finished = run.run(stop)
        distributed.shutdown()  # not after an error: leaving the group can hang, and the message must come out
    if run.goes_on:
        raise SystemExit(STOPPED)  # for torchrun's agent a failure: it starts the workers anew
    return finished
