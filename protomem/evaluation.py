"""A run evaluates itself while it trains: when, what is logged, and which checkpoint is the best.

The measuring itself is protomem/evaluate/; which steps: evaluate.every, the last one, and before the first if asked.
"""

from __future__ import annotations

from pathlib import Path

from protomem import checkpointing, distributed, flight, state
from protomem.data.pairs import read_bin
from protomem.evaluate.extract import evaluate_bins
from protomem.metrics import read_metrics
from protomem.report import save_evaluation


def best_so_far(folder: Path) -> dict | None:
    """What the best evaluation of the run in `folder` was, as rank 0 reads it: whether another is better decides whether all
    ranks save. None without one. Collective."""
    best = None

    def look():
        nonlocal best
        best = state.best_so_far(folder / "checkpoints")

    distributed.main_first(look)
    return distributed.broadcast_object(best)


def evaluate(run, tag: str) -> dict:
    """Verify all pair sets; stores them for the report; returns {set: Verification}, equal on every rank."""
    if not run.sets:
        return {}
    state.average_statistics(run.encoder)
    c = run.config
    with flight.collective("evaluation"):
        results = evaluate_bins(
            run.encoder,
            list(run.sets.values()),
            device=run.device,
            batch_size=c.evaluate.batch_size,
            precision=c.encoder.precision,
            flip=c.evaluate.flip,
            backend=c.data.loader,
            size=c.data.size,
        )
    if run.context.is_main:
        save_evaluation(run.folder, tag, results, {name: read_bin(path)[0] for name, path in run.sets.items()})
    for name, result in results.items():
        run.log.event("evaluation", step=run.step, tag=tag, name=name, **result.summary())
    return results


def if_due(run, path: Path | None) -> None:
    """Evaluate, if this step is one for it, and mark its checkpoint if it is the best. path: the checkpoint of this step, None
    if there is none so far."""
    c, last = run.config, run.step == run.total
    if not run.sets or not (last or (c.evaluate.every and run.step % c.evaluate.every == 0)):
        return
    results = evaluate(run, "final" if last else f"step-{run.step}")
    if _improved(run, results):
        path = path or checkpointing.save(run)
        run.saver.wait()
        if run.context.is_main:
            state.mark_best(run.folder / "checkpoints", path, run.best)


def killed_before(run, resumed: Path) -> bool:
    """Whether this run's checkpoint has not been evaluated, or is not yet known as the best. Equal on all ranks."""
    if resumed.parent != (run.folder / "checkpoints").resolve():  # of another run
        return False
    events = read_metrics(run.folder) if run.context.is_main else []
    events = [e for e in events if e.get("event") == "evaluation" and e["step"] == run.step and e["tag"] != "initial"]
    found = {e["name"]: e.get("accuracy") for e in events}
    best = run.best["accuracy"] if run.best and run.best["set"] == _decisive(run) else -1.0
    unmarked = (found.get(_decisive(run)) or -1.0) > best
    return distributed.broadcast_object(unmarked or not set(run.sets) <= set(found))


def _decisive(run) -> str | None:
    return run.config.checkpoint.best or next(iter(run.sets), None)


def _improved(run, results: dict) -> bool:
    """Whether checkpoint.best (a pair set; null: the first) has its highest accuracy so far; remembers it."""
    name = _decisive(run)
    accuracy = results[name].summary()["accuracy"]
    if run.best is not None and run.best["set"] == name and accuracy <= run.best["accuracy"]:
        return False
    run.best = {"step": run.step, "set": name, "accuracy": accuracy}
    return True
