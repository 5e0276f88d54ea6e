"""SIGTERM and SIGINT during a run: the step is finished, a checkpoint is written, and the process ends."""

import os
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from transformers import TrainerCallback
from transformers.utils import logging

logger = logging.get_logger(__name__)

SIGNALS = (signal.SIGTERM, signal.SIGINT)
# Launchers pass on what the terminal has sent already: only a later second SIGINT is one of impatience.
SAME_WITHIN = 1.0


class StopOnSignal(TrainerCallback):
    """
    While [`~StopOnSignal.watched`] lasts, SIGTERM and SIGINT let the step end on all processes, and have a checkpoint
    written whatever `save_strategy` is. The first is raised as `SystemExit(143)`, the second as `KeyboardInterrupt`,
    with which Python ends with code 130. A second SIGINT ends the run at once.

    A signal that comes after the last step changes nothing: the run is done.
    """

    def __init__(self):
        self.signal = 0
        self.stopped_at: int | None = None
        self._since = 0.0
        self._process = os.getpid()

    def on_step_end(self, args, state, control, **kwargs):
        number = self._anywhere(args.device)
        if number:
            self.signal, self.stopped_at = number, state.global_step
            control.should_save = control.should_training_stop = True

    def _anywhere(self, device: torch.device) -> int:
        """The signal that some process has got: one may be a step ahead of another."""
        if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
            return self.signal
        number = torch.tensor(float(self.signal), device=device)
        torch.distributed.all_reduce(number, torch.distributed.ReduceOp.MAX)
        return int(number.item())

    @contextmanager
    def watched(self) -> Iterator[None]:
        """Handles the signals in the block, and raises at its end when the run was stopped by one."""
        self.stopped_at = None
        # Python runs handlers in the main thread alone.
        mine = SIGNALS if threading.current_thread() is threading.main_thread() else ()
        before = {number: signal.signal(number, self._handle) for number in mine}
        try:
            yield
        finally:
            for number, handler in before.items():
                # A callback may have put back its own predecessor.
                if signal.getsignal(number) == self._handle and handler is not None:
                    signal.signal(number, handler)
        if self.stopped_at is not None:
            number, self.signal = signal.Signals(self.signal), 0
            message = (
                f"Stopped by {number.name} after step {self.stopped_at}, whose checkpoint is written. Go on with "
                "`resume_from_checkpoint=True`."
            )
            logger.warning(message)
            if number == signal.SIGINT:
                raise KeyboardInterrupt(message)
            raise SystemExit(128 + number)

    def _handle(self, number: int, frame) -> None:
        if os.getpid() != self._process:
            # A child that was forked with this handler ends as it would without.
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)
            return
        now = time.monotonic()
        if number == signal.SIGINT and self.signal and now - self._since > SAME_WITHIN:
            raise KeyboardInterrupt
        if not self.signal:
            self.signal, self._since = number, now
