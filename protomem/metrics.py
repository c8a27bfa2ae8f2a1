"""The log of a run: one console line per step logged, a JSONL file always, wandb and tensorboard if asked."""

from __future__ import annotations

import json
import math
import resource
import sys
import time
from pathlib import Path

import torch

from protomem.console import event_line, start_progress, step_line
from protomem.environment import environment
from protomem.files import parse_json, replace_file
from protomem.log_services import start_wandb, tensorboard_writer
from protomem.redact import hide, printable, without_secrets


class RunLog:
    """Writes `folder/metrics.jsonl`, `config.yaml` and `environment.json`, prints, and feeds the services.

    Only the main rank (`is_main`) writes or prints; on the others every method does nothing.
    total_steps: the planned end, for the progress and the eta. config: the resolved configuration (plain dict); values
    whose key names a secret, values of environment variables that do, and credentials in URLs (protomem/redact.py) are
    hidden in all that is written, printed and sent.
    console: print a line per call and, on a terminal, a progress bar. wandb: {"mode": "disabled", "offline" or
    "online", "project", "name", "entity"}; the API key is wandb's own business (`wandb login` or WANDB_API_KEY).
    tensorboard: event files in `folder/tensorboard`.

    While the JSONL cannot be written (a full disk) its lines wait in memory, the console tells, and nothing is raised.
    An existing folder is appended to. `resume_step` k drops what was logged after step k (a run killed at step k + 30
    logs those steps again), -1 drops everything; None keeps all. A last line that was cut short by a kill is dropped.
    wandb cannot forget: it keeps one run over all resumes and ignores the steps it has already seen.
    Raises UserError for a missing package, an unknown wandb mode, and a wandb that cannot start.
    """

    def __init__(
        self,
        folder,
        *,
        total_steps: int,
        config: dict,
        is_main: bool,
        console: bool = True,
        wandb: dict | None = None,
        tensorboard: bool = False,
        resume_step: int | None = None,
    ):
        self.is_main, self.total_steps, self.console = is_main, total_steps, console
        self._unwritten, self._full = b"", False
        self._pending = self._file = self._wandb = self._tensorboard = self._progress = self._start = None
        if not is_main:
            return
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        config = without_secrets(config)
        # The services first: they may refuse, and then nothing of this run has been touched.
        writer = tensorboard_writer() if tensorboard else None
        if (wandb or {}).get("mode", "disabled") != "disabled":
            self._wandb = start_wandb(folder, config, **without_secrets(wandb))
        if writer:
            purge = None if resume_step is None else max(resume_step + 1, 0)
            self._tensorboard = writer(folder / "tensorboard", purge_step=purge)
        _write_description(folder, config)
        _truncate(folder / "metrics.jsonl", resume_step)
        self._file = open(folder / "metrics.jsonl", "ab", buffering=0)
        if console and sys.stdout.isatty():
            self._progress = start_progress(total_steps, max(resume_step or 0, 0))

    def step(self, step: int, values: dict) -> None:
        """Log `values` (numbers or 0-d tensors) of `step`, the number of optimizer steps done.

        Shown on the console when present: loss, lr, images_per_s (all ranks together), data_wait (share of the time, 0
        to 1), memory_gb (the process's peak; filled in here if absent). All of them go to the JSONL and the services.
        Values on a GPU are copied there and read back only when the next line is written, so nothing waits for them;
        the line of step k then appears with the call after it.
        """
        if not self.is_main:
            return
        self._flush()
        values = {k: v.detach().clone() if isinstance(v, torch.Tensor) else v for k, v in values.items()}
        values.setdefault("memory_gb", peak_memory_gb())
        now = time.monotonic()
        if self._start is None:
            self._start = step, now
        seconds = (now - self._start[1]) / max(step - self._start[0], 1)
        self._pending = step, values, time.time(), seconds * (self.total_steps - step)
        if not any(isinstance(v, torch.Tensor) and v.device.type != "cpu" for v in values.values()):
            self._flush()

    def _flush(self) -> None:
        if self._pending is None:
            return
        (step, values, when, eta), self._pending = self._pending, None
        values = {k: _number(v) for k, v in values.items()}
        self._write({"step": step, "time": round(when, 3), **values})
        if self._wandb:
            self._wandb.log(values, step=step)
        if self._tensorboard:
            for name, value in values.items():
                self._tensorboard.add_scalar(name, value, step)
        if self._progress:
            self._progress.update(self._progress.task_ids[0], completed=step)
        self._print(step_line(step, self.total_steps, values, eta))

    def event(self, kind: str, **values) -> None:
        """Log something that is no step: JSONL {"event": kind, ...} and a readable line. Give `step` if there is one.

        kind "evaluation" with `name`, `tag` and a `Verification.summary()` is also sent to wandb and tensorboard.
        """
        if not self.is_main:
            return
        self._flush()
        values = {k: v if isinstance(v, (str, bool, list, dict, type(None))) else _number(v) for k, v in values.items()}
        self._write({"event": kind, "time": round(time.time(), 3), **values})
        if kind == "evaluation":
            numbers = {f"{values['name']}/{k}": v for k, v in values.items() if isinstance(v, float)}
            if self._wandb:
                self._wandb.log(numbers, step=values["step"])
            if self._tensorboard:
                for name, value in numbers.items():
                    self._tensorboard.add_scalar(name, value, values["step"])
        self._print(event_line(kind, values))

    def close(self) -> None:
        """Write what is pending and end the services. Call it also when training fails."""
        if not self.is_main or self._file is None:
            return
        self._flush()
        self._append(b"")  # what could not be written so far
        self._file.close()
        self._file = None
        if self._progress:
            self._progress.stop()
        if self._tensorboard:
            self._tensorboard.close()
        if self._wandb:
            self._wandb.finish()

    def _write(self, record: dict) -> None:
        self._append(json.dumps(_finite(without_secrets(record))).encode() + b"\n")

    def _append(self, lines: bytes) -> None:
        self._unwritten += lines
        try:
            while self._unwritten:
                self._unwritten = self._unwritten[self._file.write(self._unwritten) :]
            self._full = False
        except OSError as error:  # training goes on: whoever makes room before the next checkpoint has lost nothing
            if not self._full:
                self._print(f"{self._file.name} cannot be written ({error.strerror}): its lines wait in memory; make room")
            self._full = True

    def _print(self, line: str) -> None:
        line = printable(hide(line))
        if self._progress:
            self._progress.console.print(line, highlight=False, markup=False, soft_wrap=True)
        elif self.console:
            print(line, flush=True)


def read_metrics(folder) -> list[dict]:
    """The records of `folder/metrics.jsonl`, oldest first; lines that are no record (a cut last line) left out."""
    path, records = Path(folder) / "metrics.jsonl", []
    if not path.exists():
        return records
    with open(path, encoding="utf-8", errors="replace") as file:
        for line in file:
            try:
                record = parse_json(line)
            except ValueError:
                continue
            if _is_record(record):
                records.append(record)
    return records


def _is_record(record) -> bool:
    """Whether this is what RunLog writes: numbers of a step, or an event with a name."""
    if not isinstance(record, dict):
        return False
    step, event, when = record.get("step", 0), record.get("event", ""), record.get("time", 0)
    if type(step) is not int or not 0 <= step < 2**53 or not isinstance(event, str):
        return False
    if type(when) not in (int, float) or not 0 <= when < 2**36:
        return False
    rest = {k: v for k, v in record.items() if k != "event"}
    if "event" not in record:
        return "step" in record and all(_is_value(v) for v in rest.values())
    if event == "evaluation":
        kinds = {"name": str, "tag": str, "rendered": bool}
        return all(isinstance(v, kinds[k]) if k in kinds else _is_value(v) for k, v in rest.items())
    return event != "templates"


def _is_value(value) -> bool:
    return value is None or type(value) in (int, float) and abs(value) < 1e300


def peak_memory_gb() -> float:
    """Peak GPU memory of this process where it uses one, else its peak resident memory, in GB (1e9 bytes)."""
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        return torch.cuda.max_memory_allocated() / 1e9
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak * (1 if sys.platform == "darwin" else 1024) / 1e9


def _number(value):
    value = value.item() if hasattr(value, "item") else value  # tensors and numpy scalars
    return value if isinstance(value, int) else float(value)


def _finite(value):
    # JSON has no NaN and no infinity; null is what other readers understand.
    if isinstance(value, dict):
        return {k: _finite(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(v) for v in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _truncate(path: Path, resume_step: int | None) -> None:
    if not path.exists():
        return
    data = path.read_bytes()
    kept = []
    for line in data.splitlines(keepends=True):
        try:
            step = parse_json(line).get("step", -1)
        except (ValueError, AttributeError):
            continue
        if type(step) is not int:
            continue
        # Lines are in order of time: what stands behind the first line past the resume point belongs to the lost steps.
        if not line.endswith(b"\n") or (resume_step is not None and step > resume_step) or resume_step == -1:
            break
        kept.append(line)
    if b"".join(kept) != data:
        replace_file(path, b"".join(kept))


def _write_description(folder: Path, config: dict) -> None:
    from omegaconf import OmegaConf

    replace_file(folder / "config.yaml", OmegaConf.to_yaml(OmegaConf.create(config)).encode())
    replace_file(folder / "environment.json", json.dumps(environment(), indent=1).encode() + b"\n")
