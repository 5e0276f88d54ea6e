"""Progress of long jobs with the figures that matter: bars in a terminal, lines in a file or a pipe."""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Column
from transformers import PrinterCallback, ProgressCallback, Trainer, TrainerCallback

console = Console()
# Seconds between two lines of a job that is not drawn.
EVERY = 10.0


@contextmanager
def progress_bars() -> "Iterator[Progress | ProgressLines]":
    """A block in which [`BarCallback`] and others show how far they are. A terminal of 90 columns holds every bar."""
    if not console.is_terminal:
        lines = ProgressLines(console)
        yield lines
        lines.end()
        return
    columns = (
        TextColumn("{task.description}", table_column=Column(min_width=23, no_wrap=True)),
        BarColumn(bar_width=8),
        MofNCompleteColumn(table_column=Column(no_wrap=True)),
        TimeRemainingColumn(compact=True, elapsed_when_finished=True, table_column=Column(no_wrap=True)),
        TextColumn("{task.fields[figures]}", table_column=Column(no_wrap=True)),
    )
    with Progress(*columns, console=console) as bars:
        yield bars


@dataclass
class _Job:
    description: str
    total: int
    figures: str
    started: float
    completed: int = 0

    def __str__(self) -> str:
        seconds = time.monotonic() - self.started
        return f"{self.description}  {self.completed}/{self.total}  {seconds:.0f} s  {self.figures}".rstrip()


class ProgressLines:
    """
    Takes the calls of rich's `Progress`, and prints a line of the job at hand every [`EVERY`] seconds and at its end.

    Args:
        console (`Console`): Where lines are printed.
    """

    def __init__(self, console: Console):
        self.console = console
        self.job: _Job | None = None
        self.said = 0.0

    def add_task(self, description: str, total: int, figures: str = "") -> int:
        self.end()
        self.said = time.monotonic()
        self.job = _Job(description, total, figures, started=self.said)
        return 0

    def update(self, task: int, **values: Any) -> None:
        """Jobs come one after the other, so `task` is always the last one."""
        for name, value in values.items():
            setattr(self.job, name, value)
        # The line of the last step is for `end`: its figures are still to come.
        if self.job is not None and self.job.completed < self.job.total and time.monotonic() - self.said >= EVERY:
            self._say()

    def end(self) -> None:
        """Prints how far the last job came."""
        if self.job is not None:
            self._say()
        self.job = None

    def _say(self) -> None:
        self.said = time.monotonic()
        self.console.print(str(self.job), highlight=False, markup=False, soft_wrap=True)


class BarCallback(TrainerCallback):
    """
    Shows a trainer's progress.

    Args:
        bars (`Progress` or `ProgressLines`): Where.
        name (`Callable[[], str]`): What is being done, asked for at the beginning.
        figures (`dict[str, str]`): Logged metrics to show, and their short names.
    """

    def __init__(self, bars: "Progress | ProgressLines", name, figures: dict[str, str]):
        self.bars, self.name, self.figures = bars, name, figures
        self.task: Any = None

    def on_train_begin(self, args, state, control, **kwargs):
        self.task = self.bars.add_task(self.name(), total=state.max_steps, figures="")

    def on_step_end(self, args, state, control, **kwargs):
        self.bars.update(self.task, completed=state.global_step)

    def on_log(self, args, state, control, logs=None, **kwargs):
        shown = [f"{short} {logs[name]:.3g}" for name, short in self.figures.items() if logs.get(name) is not None]
        if shown and self.task is not None:
            self.bars.update(self.task, figures="  ".join(shown))

    def on_train_end(self, args, state, control, **kwargs):
        if isinstance(self.bars, ProgressLines):
            self.bars.end()
            # What is evaluated after training is logged too.
            self.task = None


def draw_with(trainer: Trainer, callback: BarCallback) -> Trainer:
    """Puts `callback` in the place of the trainer's own progress bar and printed logs."""
    trainer.remove_callback(PrinterCallback)
    trainer.remove_callback(ProgressCallback)
    trainer.add_callback(callback)
    return trainer
