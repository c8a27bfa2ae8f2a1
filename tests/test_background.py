"""The thread that writes checkpoints works on the GPU of its rank."""

import threading

import torch

from protomem import background


def test_the_thread_that_saves_is_on_the_device_of_its_rank(tmp_path, monkeypatch):
    """CUDA's current device is a thread's own and begins as 0, where every rank of a machine would make a context."""
    device = threading.local()
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: getattr(device, "index", 0))
    monkeypatch.setattr(torch.cuda, "set_device", lambda index: setattr(device, "index", index))
    seen = []

    def save(folder, step, *_, **__):
        seen.append((threading.current_thread() is threading.main_thread(), torch.cuda.current_device()))
        return folder

    monkeypatch.setattr(background.state, "save", save)
    torch.cuda.set_device(3)
    for asynchronous in (True, False):
        options = dict(keep=1, asynchronous=asynchronous, timeout_s=60, written=0, report=lambda *_: None)
        with background.Saver(tmp_path, **options) as saver:
            saver.start(1, {"w": torch.zeros(2)}, 0, {})
    assert seen == [(False, 3), (True, 3)]
