"""Signals that ask a run to stop: noted when they come, acted on between steps, by all ranks together."""

from __future__ import annotations

import signal

import torch

from protomem import distributed

SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)


class StopRequest:
    """While active, the first SIGTERM, SIGINT or SIGUSR1 only leaves a note; a second SIGINT or SIGUSR1 acts as usual."""

    def __enter__(self) -> StopRequest:
        self.noted: list[int] = []
        self._previous = {s: signal.signal(s, self._note) for s in SIGNALS}
        return self

    def __exit__(self, *_) -> None:
        for s, handler in self._previous.items():
            signal.signal(s, handler)

    def _note(self, number, frame) -> None:
        self.noted.append(number)
        if number != signal.SIGTERM:  # Slurm and torchrun both send SIGTERM: twice is normal there
            signal.signal(number, self._previous[number])

    def on_any_rank(self, device: torch.device) -> bool:
        """Whether any rank was asked to stop; a collective, and on a GPU a wait."""
        return bool(distributed.all_reduce(torch.tensor(float(bool(self.noted)), device=device), "max").item())

    def reason(self) -> str:
        return signal.Signals(self.noted[0]).name if self.noted else "a signal to another rank"
