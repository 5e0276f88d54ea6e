"""Progress bars of long jobs: one line a job, with the figures that matter."""

from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from transformers import PrinterCallback, ProgressCallback, Trainer, TrainerCallback

console = Console()


@contextmanager
def progress_bars():
    """A block in which [`BarCallback`] and others draw their bars."""
    columns = (
        TextColumn("{task.description:<28}"),
        BarColumn(bar_width=24),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.fields[figures]}"),
    )
    with Progress(*columns, console=console) as bars:
        yield bars


class BarCallback(TrainerCallback):
    """
    Draws a trainer's progress.

    Args:
        bars (`Progress`): Where to draw.
        name (`Callable[[], str]`): What is being done, asked for at the beginning.
        figures (`dict[str, str]`): Logged metrics to show, and their short names.
    """

    def __init__(self, bars: Progress, name, figures: dict[str, str]):
        self.bars, self.name, self.figures = bars, name, figures
        self.task = None

    def on_train_begin(self, args, state, control, **kwargs):
        self.task = self.bars.add_task(self.name(), total=state.max_steps, figures="")

    def on_step_end(self, args, state, control, **kwargs):
        self.bars.update(self.task, completed=state.global_step)

    def on_log(self, args, state, control, logs=None, **kwargs):
        shown = [f"{short} {logs[name]:.3g}" for name, short in self.figures.items() if logs.get(name) is not None]
        if shown and self.task is not None:
            self.bars.update(self.task, figures="  ".join(shown))


def draw_with(trainer: Trainer, callback: BarCallback) -> Trainer:
    """Puts `callback` in the place of the trainer's own progress bar and printed logs."""
    trainer.remove_callback(PrinterCallback)
    trainer.remove_callback(ProgressCallback)
    trainer.add_callback(callback)
    return trainer
