"""Signals that ask a run to stop: noted when they come, acted on between steps, by all ranks together."""

from __future__ import annotations

import os
import signal

SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)
STOPPED = 75  # exit code of a single process that a signal stopped, all being saved (EX_TEMPFAIL of sysexits.h: try again)


class StopRequest:
    """While active, SIGTERM, SIGINT and SIGUSR1 only leave a note, however often they come: Slurm and torchrun both pass
    them on. Only a second SIGINT (Ctrl-C) interrupts at once, and not even that after `hold`.

    Imports torch when it is asked, not before: it listens from a program's start on, when torch has yet to be imported.
    """

    def __init__(self):
        self.noted: list[int] = []
        self.held = False

    def __enter__(self) -> StopRequest:
        self._previous = {s: signal.signal(s, self._note) for s in SIGNALS}
        return self

    def __exit__(self, *_) -> None:
        for s, handler in self._previous.items():
            signal.signal(s, handler)

    def _note(self, number, frame) -> None:
        again = number in self.noted
        self.noted.append(number)
        if again and number == signal.SIGINT and not self.held:
            raise KeyboardInterrupt
        if not again and os.environ.get("RANK", os.environ.get("SLURM_PROCID", "0")) == "0":
            more = "; once more to stop at once" if number == signal.SIGINT else ""
            # print() may not be called while another print() runs, and that is when a signal may come.
            os.write(2, f"{signal.Signals(number).name}: saving and stopping as soon as a step is done{more}\n".encode())

    def on_any_rank(self, device) -> bool:
        """Whether any rank was asked to stop; a collective, and on a GPU a wait."""
        import torch

        from protomem import distributed

        return bool(distributed.all_reduce(torch.tensor(float(bool(self.noted)), device=device), "max").item())

    def hold(self) -> None:
        """From now on no signal interrupts: the last checkpoint is being written."""
        self.held = True

    def reason(self) -> str:
        return signal.Signals(self.noted[0]).name if self.noted else "a signal to another rank"
