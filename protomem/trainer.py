"""The training loop: builds a run from its config, goes on from the last checkpoint, trains, evaluates, saves."""

from __future__ import annotations

import contextlib
import functools
import os
import time
from pathlib import Path

import torch
from omegaconf import DictConfig, OmegaConf

from protomem import build, checkpointing, checks, composition, distributed, flight, lock, optim, replicas, state, straggler
from protomem.data.augment import AugmentOptions
from protomem.data.inspect import known_bad
from protomem.data.pairs import read_bin
from protomem.data.pipeline import make_loader, normalise
from protomem.data.records import open_records
from protomem.elastic import only_others_leave
from protomem.encoder.compiled import compiled
from protomem.errors import UserError
from protomem.evaluate.extract import evaluate_bins
from protomem.files import replace_file
from protomem.head import tuning
from protomem.memory_run import MemoryRun
from protomem.metrics import RunLog, read_metrics
from protomem.report import save_evaluation, write_report
from protomem.schedule import learning_rate
from protomem.seeds import mix
from protomem.signals import STOPPED, StopRequest
from protomem.step import Extras, MicroBatch, enqueue, forward_backward
from protomem.watch import watched

HALF = {"bf16": torch.bfloat16, "fp16": torch.float16}


class Run:
    """One training run on this rank. `step` counts finished optimizer steps; everything else follows from it."""

    def __init__(self, config: DictConfig, context: distributed.Context):
        self.config, self.context, self.device = config, context, context.device
        self.folder, self.step, self.overflows = Path(config.output), 0, 0
        self.tiles = None  # the choice of head.tune (protomem/head/tuning.py)
        self.goes_on = False  # after a stop that concerned other machines only
        self.best = None

        def look():
            self.best = state.best_so_far(self.folder / "checkpoints")

        distributed.main_first(look)  # whether an evaluation is the best decides whether all save: what rank 0 reads counts
        self.best = distributed.broadcast_object(self.best)
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
        self.scaler = optim.LossScaler(self.device) if config.encoder.precision == "fp16" else None
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
        self._learning_rate(0)  # a schedule that makes no sense is told before anything is built

    def _learning_rate(self, step: int) -> float:
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

    # --- evaluation ------------------------------------------------------------------------------------------------

    def evaluate(self, tag: str) -> dict:
        """Verify all pair sets; stores them for the report; returns {set: Verification}, equal on every rank."""
        if not self.sets:
            return {}
        state.average_statistics(self.encoder)
        c = self.config
        with flight.collective("evaluation"):
            results = evaluate_bins(
                self.encoder,
                list(self.sets.values()),
                device=self.device,
                batch_size=c.evaluate.batch_size,
                precision=c.encoder.precision,
                flip=c.evaluate.flip,
                backend=c.data.loader,
                size=c.data.size,
            )
        if self.context.is_main:
            save_evaluation(self.folder, tag, results, {name: read_bin(path)[0] for name, path in self.sets.items()})
        for name, result in results.items():
            self.log.event("evaluation", step=self.step, tag=tag, name=name, **result.summary())
        return results

    def _killed_before_evaluation(self, resumed: Path) -> bool:
        """Whether this run's checkpoint has not been evaluated, or is not yet known as the best. Equal on all ranks."""
        if resumed.parent != (self.folder / "checkpoints").resolve():  # of another run
            return False
        events = read_metrics(self.folder) if self.context.is_main else []
        events = [e for e in events if e.get("event") == "evaluation" and e["step"] == self.step and e["tag"] != "initial"]
        found = {e["name"]: e.get("accuracy") for e in events}
        best = self.best["accuracy"] if self.best and self.best["set"] == self._decisive() else -1.0
        unmarked = (found.get(self._decisive()) or -1.0) > best
        return distributed.broadcast_object(unmarked or not set(self.sets) <= set(found))

    def _decisive(self) -> str | None:
        return self.config.checkpoint.best or next(iter(self.sets), None)

    def _improved(self, results: dict) -> bool:
        """Whether checkpoint.best (a pair set; null: the first) has its highest accuracy so far; remembers it."""
        name = self._decisive()
        accuracy = results[name].summary()["accuracy"]
        if self.best is not None and self.best["set"] == name and accuracy <= self.best["accuracy"]:
            return False
        self.best = {"step": self.step, "set": name, "accuracy": accuracy}
        return True

    # --- the loop --------------------------------------------------------------------------------------------------

    def run(self, stop: StopRequest) -> bool:
        """Train up to the end, or until `stop` was asked for; whether it was the end."""
        resumed = checkpointing.resume(self)
        c = self.config
        tuned = self._tune() if c.head.tune else None
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
                if self._killed_before_evaluation(resumed):
                    self._evaluate_if_due(resumed)
            elif c.evaluate.initial:
                self.evaluate("initial")
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
        model = distributed.data_parallel(self.encoder, self.device)
        model.train()
        if self.context.world_size > 1:
            self._settle_buckets(model)
        self.stopwatch = straggler.Stopwatch(self.device)
        self.model = self.stopwatch.around(compiled(model, self.config.encoder.compile))
        self.saved = self.first = self.step
        self.finite = torch.ones((), device=self.device)
        self.interval = {"images": 0, "skipped": 0, "wait": 0.0, "since": time.monotonic(), "from": self.step}

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
                for batch in self._timed(loader.epoch(epoch, position)):
                    stats = self._one_step(batch)
                    if self.step % c.log.every == 0 or self.step == self.total:
                        self._report(stats)
                    self._check_replicas()
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

    def _settle_buckets(self, model: torch.nn.Module) -> None:
        """DDP re-orders its gradient buckets after its first backward, and with three or more ranks their order decides
        how float sums round. One empty pass before the first step lets a resumed run round as the uninterrupted one."""
        kept = [b.clone() for b in self.encoder.buffers()]
        size = self.config.data.size
        model(torch.zeros(2, 3, size, size, device=self.device)).sum().mul(0).backward()
        for buffer, value in zip(self.encoder.buffers(), kept):
            buffer.copy_(value)

    def _timed(self, batches):
        """Yields the batches; measures how long the loop waits for each."""
        batches = iter(batches)
        while True:
            start = time.monotonic()
            batch = next(batches, None)
            self.interval["wait"] += time.monotonic() - start
            if batch is None:
                return
            yield batch

    def _one_step(self, batch) -> dict[str, torch.Tensor]:
        c, rank = self.config, self.context.rank
        compiles = c.encoder.compile != "off" and self.step == self.first  # which may take minutes
        flight.at_step(None if compiles else self.step + 1)
        lr = self._learning_rate(self.step)
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
            stats["grad_norm"] = optim.clip_gradients(encoder_params, shard, self.config.optimizer.clip)
        for optimizer in self.optimizers.values():
            optimizer.step()
        return True

    def _report(self, stats: dict) -> None:
        now, i = time.monotonic(), self.interval
        seconds = max(now - i["since"], 1e-9)
        values = {**stats, "epoch": self.step / self.epoch_steps, "images_per_s": i["images"] / seconds}
        # The others wait in a collective for the rank that waits for its data.
        own = torch.tensor([[i["wait"] / seconds, i["skipped"]]], dtype=torch.float64, device=self.device)
        wait, skipped = distributed.gather_rows(own, [1] * self.context.world_size).unbind(1)
        values["data_wait"] = wait.max()
        if skipped.sum() > 0:
            values["skipped_images"] = int(skipped.sum())
        self.log.step(self.step, values)
        self.check_finite()
        if self.memory:
            self.memory.check()
        self._find_straggler()
        self.interval = {"images": 0, "skipped": 0, "wait": 0.0, "since": now, "from": self.step}

    def _find_straggler(self) -> None:
        factor, i, own = self.config.distributed.straggler, self.interval, self.stopwatch.read()
        if factor and self.context.world_size > 1:
            found = straggler.find(i["wait"] + own, self.step - i["from"], factor, self.device)
            if found:
                self.log.event("straggler", step=self.step, **found)

    def _check_replicas(self) -> None:
        every = self.config.distributed.check_every
        if not every or self.step % every or self.context.world_size == 1:
            return
        modules = checkpointing.modules(self)
        # BatchNorm statistics are each rank's own between checkpoints.
        encoders = [part for part in ("encoder", "key_encoder") if part in modules]
        own = {f"{part}.{k}" for part in encoders for k, _ in modules[part].named_buffers()}
        tensors = state.named_state(modules, self.optimizers)
        tensors = {k: v.to(self.device) for k, v in tensors.items() if k not in own and not state.is_rows(k, v)}
        position = torch.tensor([self.step, self._learning_rate(self.step)], dtype=torch.float64, device=self.device)
        replicas.check_state({"step and learning rate": position, **tensors}, self.step)

    def check_finite(self) -> None:
        if not self.finite.item():
            with contextlib.suppress(UserError):
                self.saver.wait()  # what is being written was finite
            kept = f"the checkpoint of step {self.saver.written} is intact" if self.saver.written else "nothing was saved"
            raise UserError(
                f"the loss became NaN or infinite by step {self.step}; {kept}: lower optimizer.lr, set optimizer.clip, or "
                "lengthen the warm-up, and start again"
            )

    def _periodic(self) -> None:
        c, last, start = self.config, self.step == self.total, time.monotonic()
        flight.at_step(None)
        path = None  # saved first: an evaluation that fails must not cost the training
        if last or (c.checkpoint.every and self.step % c.checkpoint.every == 0):
            path = checkpointing.save(self)
        self._evaluate_if_due(path)
        flight.at_step(self.step + 1)
        self.interval["since"] += time.monotonic() - start  # evaluating and saving is not training time

    def _evaluate_if_due(self, path: Path | None) -> None:
        """path: the checkpoint of this step, None if there is none so far."""
        c, last = self.config, self.step == self.total
        if not self.sets or not (last or (c.evaluate.every and self.step % c.evaluate.every == 0)):
            return
        results = self.evaluate("final" if last else f"step-{self.step}")
        if self._improved(results):
            path = path or checkpointing.save(self)
            self.saver.wait()
            if self.context.is_main:
                state.mark_best(self.folder / "checkpoints", path, self.best)


def train(config: DictConfig, stop: StopRequest | None = None) -> bool:
    """Train as the config says, on all ranks that the launcher started; False if a signal stopped it, all being saved.

    stop: the caller's, if it listens for signals already.
    """
    folder, timeout_s = Path(config.output), config.distributed.timeout_s
    flight.nccl_records(folder)
    with contextlib.ExitStack() as listening:
        stop = stop or listening.enter_context(StopRequest())
        context = distributed.init(config.distributed.device, timeout_s)
        with watched(config.output, timeout_s, context.device), lock.one_run(folder, timeout_s):
            replicas.check_config(config)
            run = Run(config, context)
            finished = run.run(stop)
        distributed.shutdown()  # not after an error: leaving the group can hang, and the message must come out
    if run.goes_on:
        raise SystemExit(STOPPED)  # for torchrun's agent a failure: it starts the workers anew
    return finished
