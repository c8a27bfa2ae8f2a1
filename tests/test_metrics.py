"""The run log: lines, resume without duplicates, values read back late, wandb and tensorboard files."""

import json
import struct
import sys
import time

import pytest
import torch

from protomem import metrics
from protomem.errors import UserError
from protomem.metrics import RunLog, read_metrics

CONFIG = {"optimizer": {"lr": 0.1}, "logger": {"wandb": {"project": "p", "api_key": "0123secret"}}}


def open_log(folder, **kwargs):
    arguments = {"total_steps": 100, "config": CONFIG, "is_main": True, "console": False} | kwargs
    return RunLog(folder, **arguments)


def steps(folder):
    return [record["step"] for record in read_metrics(folder)]


def test_steps_and_events_are_written_in_order(tmp_path):
    log = open_log(tmp_path)
    log.step(10, {"loss": torch.tensor(2.5), "lr": 0.1, "images_per_s": 1000, "data_wait": 0.02})
    log.event("checkpoint", step=10, path="checkpoints/10")
    log.step(20, {"loss": torch.tensor(1.5), "memory_gb": 3.0})
    log.close()
    first, event, second = read_metrics(tmp_path)
    assert (first["step"], first["loss"], first["lr"]) == (10, 2.5, 0.1) and first["memory_gb"] > 0
    assert (event["event"], event["step"], event["path"]) == ("checkpoint", 10, "checkpoints/10")
    assert (second["loss"], second["memory_gb"]) == (1.5, 3.0)


def test_other_ranks_write_nothing(tmp_path, capsys):
    log = open_log(tmp_path / "run", is_main=False, console=True)
    log.step(1, {"loss": 1.0})
    log.event("checkpoint", step=1)
    log.close()
    assert not (tmp_path / "run").exists() and capsys.readouterr().out == ""


def test_resume_drops_what_came_after_the_checkpoint(tmp_path):
    log = open_log(tmp_path)
    for step in (10, 20, 21, 30, 40):
        log.step(step, {"loss": float(step)})
    log.event("checkpoint", step=40)
    log.event("note")  # belongs to the lost steps although it names none
    log.close()
    log = open_log(tmp_path, resume_step=20)
    log.event("resume", step=20)
    log.step(30, {"loss": -30.0})
    log.close()
    assert steps(tmp_path) == [10, 20, 20, 30]
    assert read_metrics(tmp_path)[-1]["loss"] == -30.0
    open_log(tmp_path).close()
    assert steps(tmp_path) == [10, 20, 20, 30]
    open_log(tmp_path, resume_step=-1).close()
    assert steps(tmp_path) == []


@pytest.mark.parametrize("tail", ['{"step": 20, "lo', '{"step": 20, "loss": 3}', "\0\0\0", '{"step": 20}\n{"ev'])
def test_a_half_written_last_line_is_dropped(tmp_path, tail):
    log = open_log(tmp_path)
    log.step(10, {"loss": 1.0})
    log.close()
    with open(tmp_path / "metrics.jsonl", "a") as file:
        file.write(tail)
    log = open_log(tmp_path)
    log.step(30, {"loss": 2.0})
    log.close()
    assert steps(tmp_path) == ([10, 20, 30] if "\n" in tail else [10, 30])
    assert all(json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines())


def test_reading_a_running_log_leaves_the_cut_line_out(tmp_path):
    (tmp_path / "metrics.jsonl").write_text('{"step": 1}\n[1]\n{"step": 2, "l')
    assert read_metrics(tmp_path) == [{"step": 1}]
    assert read_metrics(tmp_path / "nowhere") == []


def test_non_finite_values_are_null_and_the_file_stays_json(tmp_path):
    log = open_log(tmp_path)
    log.step(1, {"loss": float("nan")})
    log.event("evaluation", step=1, name="clean", accuracy=0.5, rates={"a": [float("inf")]})
    log.close()
    text = (tmp_path / "metrics.jsonl").read_text()
    step, event = (json.loads(line, parse_constant=pytest.fail) for line in text.splitlines())
    assert step["loss"] is None and event["rates"] == {"a": [None]}


class LateTensor(torch.Tensor):
    """Stands in for a value on a GPU: claims another device, and counts when it is read back."""

    reads = 0

    @property
    def device(self):
        return torch.device("cuda")

    def item(self):
        LateTensor.reads += 1
        return super().item()


def test_device_values_are_copied_now_and_read_with_the_next_line(tmp_path):
    LateTensor.reads = 0
    log = open_log(tmp_path)
    running = torch.tensor(1.0).as_subclass(LateTensor)
    log.step(1, {"loss": running})
    running.fill_(99)  # running state goes on changing in place
    assert LateTensor.reads == 0 and steps(tmp_path) == []
    log.step(2, {"loss": running})
    assert LateTensor.reads == 1 and steps(tmp_path) == [1]
    log.event("checkpoint", step=2)
    log.close()
    assert [(r["step"], r.get("loss")) for r in read_metrics(tmp_path)] == [(1, 1.0), (2, 99.0), (2, None)]


def test_the_console_line_says_what_one_wants_to_know(tmp_path, capsys):
    log = open_log(tmp_path, console=True, total_steps=2000)
    values = {"loss": 12.3456, "lr": 0.02, "images_per_s": 1843.4, "data_wait": 0.031, "memory_gb": 12.34, "other": 7.0}
    log.step(1200, values)
    log.event("evaluation", step=1200, tag="final", name="clean", accuracy=0.952, accuracy_std=0.0091, eer=float("nan"))
    log.close()
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "step 1200/2000  loss 12.3456  lr 0.02  1843 images/s  wait 3%  mem 12.3 GB"
    assert lines[1].startswith("evaluation  step 1200  final clean  accuracy 95.20 ± 0.91 %")
    assert lines[1].endswith("EER -")


def test_eta_is_the_mean_pace_since_the_log_was_opened(tmp_path, capsys, monkeypatch):
    clock = iter([100.0, 110.0, 140.0])
    monkeypatch.setattr(metrics.time, "monotonic", lambda: next(clock))
    log = open_log(tmp_path, console=True, total_steps=5000)
    for step in (1000, 1010, 1020):  # 2 s per step at the end: 3980 steps to go
        log.step(step, {"memory_gb": 1.0})
    log.close()
    lines = capsys.readouterr().out.splitlines()
    assert "eta" not in lines[0]
    assert lines[1].endswith("eta 1:06:30") and lines[2].endswith("eta 2:12:40")


def test_a_terminal_gets_a_progress_bar_and_the_same_lines(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    log = open_log(tmp_path, console=True)
    log.step(50, {"loss": 1.25})
    assert log._progress.tasks[0].completed == 50
    log.close()
    assert "step  50/100  loss 1.2500" in capsys.readouterr().out


def test_config_is_written_without_secrets(tmp_path):
    open_log(tmp_path).close()
    text = (tmp_path / "config.yaml").read_text()
    assert "lr: 0.1" in text and "0123secret" not in text and "(hidden)" in text
    assert CONFIG["logger"]["wandb"]["api_key"] == "0123secret"  # the caller's config is left alone
    assert json.loads((tmp_path / "environment.json").read_text())["packages"]["torch"]


def test_hidden_keys():
    hidden = metrics.without_secrets({"apikey": 1, "a": [{"hf_token": "x"}], "tokens": 3, "password": None, "key": "k"})
    assert hidden == {"apikey": "(hidden)", "a": [{"hf_token": "(hidden)"}], "tokens": 3, "password": None, "key": "k"}


def test_missing_packages_name_the_cure_and_leave_nothing(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(UserError, match=r"pip install protomem\[wandb\]"):
        open_log(tmp_path, wandb={"mode": "offline"})
    with pytest.raises(UserError, match="wandb mode=on is not one of"):
        open_log(tmp_path, wandb={"mode": "on"})
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    with pytest.raises(UserError, match="pip install tensorboard"):
        open_log(tmp_path, tensorboard=True)
    assert not list(tmp_path.iterdir())
    open_log(tmp_path, wandb={"mode": "disabled", "project": "p"}).close()  # needs no package


def test_tensorboard_files_read_back_without_the_lost_steps(tmp_path):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    log = open_log(tmp_path, tensorboard=True)
    for step in (1, 2, 3):
        log.step(step, {"loss": step / 2})
    log.event("evaluation", step=3, tag="final", name="clean", accuracy=0.75)
    log.close()
    log = open_log(tmp_path, tensorboard=True, resume_step=2)
    log.step(3, {"loss": 9.0})
    log.close()
    events = EventAccumulator(str(tmp_path / "tensorboard"), size_guidance={"scalars": 0}).Reload()
    assert [(e.step, e.value) for e in events.Scalars("loss")] == [(1, 0.5), (2, 1.0), (3, 9.0)]
    assert "clean/accuracy" not in events.Tags()["scalars"] or not events.Scalars("clean/accuracy")  # step 3 is lost


def wandb_records(path):
    """The records of an offline .wandb file: LevelDB log framing, 7-byte file header, blocks of 32 KiB."""
    from wandb.proto.wandb_internal_pb2 import Record

    data, position, parts = path.read_bytes(), 7, b""
    while position + 7 <= len(data):
        room = 32768 - position % 32768
        if room < 7:
            position += room
            continue
        _, length, kind = struct.unpack("<IHB", data[position : position + 7])
        parts += data[position + 7 : position + 7 + length]
        position += 7 + length
        if kind in (1, 4):  # a full record, or the last part of one
            record = Record()
            record.ParseFromString(parts)
            parts = b""
            yield record


def test_wandb_offline_keeps_history_config_and_no_key(tmp_path):
    pytest.importorskip("wandb")
    log = open_log(tmp_path, wandb={"mode": "offline", "project": "protomem-test", "name": "n"})
    for step in (1, 2):
        log.step(step, {"loss": torch.tensor(step * 0.5)})
    log.event("evaluation", step=2, tag="final", name="clean", accuracy=0.75)
    log.close()
    (path,) = tmp_path.glob("wandb/offline-run-*/run-*.wandb")
    for _ in range(300):  # wandb's own process writes the file, on a busy machine after finish() has returned
        records = list(wandb_records(path))
        if records and records[-1].WhichOneof("record_type") == "exit":
            break
        time.sleep(0.1)
    runs = [r.run for r in records if r.WhichOneof("record_type") == "run"]
    assert runs[0].project == "protomem-test" and runs[0].run_id == (tmp_path / "wandb_id").read_text().strip()
    history = [
        {item.key or "/".join(item.nested_key): json.loads(item.value_json) for item in r.history.item}
        for r in records
        if r.WhichOneof("record_type") == "history"
    ]
    assert [(h["_step"], h["loss"]) for h in history] == [(1, 0.5), (2, 1.0)]
    assert history[1]["clean/accuracy"] == 0.75
    assert b"0123secret" not in path.read_bytes() and b"hidden" in path.read_bytes()
