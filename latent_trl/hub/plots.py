"""The pictures beside a model card. Without matplotlib there are none, and the card says so."""

from importlib.util import find_spec
from pathlib import Path
from typing import Any

from .facts import CodebookReport, TrainingRun

CURVES_FILE = "training_curves.png"
CODES_FILE = "codebook_usage.png"
# Metrics worth a panel, in this order.
PANELS = (
    "loss",
    "reward",
    "eval_loss",
    "eval_reward",
    "world_model/ce",
    "projector/nll",
    "policy/cloning_accuracy",
    "policy/backbone_kl",
    "codebook/perplexity",
    "kl",
    "entropy",
    "ppo/value_loss",
    "rollout/semantic_diversity",
)


def can_plot() -> bool:
    return find_spec("matplotlib") is not None


def _points(history: list[dict[str, Any]], name: str) -> list[tuple[float, float]]:
    rows = [row for row in history if isinstance(row.get(name), (int, float))]
    return [(row.get("step", i), row[name]) for i, row in enumerate(rows)]


def segments(run: TrainingRun) -> list[list[dict[str, Any]]]:
    """A run's rows, stage by stage: steps begin anew with each stage."""
    segments: list[list[dict[str, Any]]] = []
    for row in run.history:
        if not segments or row.get("stage") != segments[-1][-1].get("stage"):
            segments.append([])
        segments[-1].append(row)
    return segments


def _label(text: str) -> str:
    """A text in which matplotlib sees no formula."""
    return " ".join(text.split())[:120].replace("$", r"\$")


def draw_curves(runs: list[TrainingRun], path: Path) -> bool:
    """Losses, rewards and what else was logged, a line a run. Returns whether there was anything to draw."""
    lines = [
        (run.method + (f": {rows[0]['stage']}" if rows[0].get("stage") else ""), rows)
        for run in runs
        for rows in segments(run)
    ]
    wanted = [name for name in PANELS if any(len(_points(rows, name)) > 1 for _, rows in lines)]
    if not wanted or not can_plot():
        return False
    from matplotlib.figure import Figure

    columns = min(3, len(wanted))
    rows_of_panels = -(-len(wanted) // columns)
    figure = Figure(figsize=(4.2 * columns, 2.8 * rows_of_panels), layout="constrained")
    axes: list[Any] = list(figure.subplots(rows_of_panels, columns, squeeze=False).flat)
    for axis, name in zip(axes, wanted, strict=False):
        for label, rows in lines:
            points = _points(rows, name)
            if len(points) > 1:
                axis.plot(*zip(*points, strict=True), linewidth=1.4, label=_label(label))
        axis.set_title(name, fontsize=10)
        axis.set_xlabel("step", fontsize=8)
        axis.grid(alpha=0.3)
        axis.legend(fontsize=6)
    for axis in axes[len(wanted) :]:
        axis.set_visible(False)
    figure.savefig(path, dpi=100)
    return True


def draw_codes(codebook: CodebookReport, path: Path) -> bool:
    """How often each code was chosen, most frequent first. Returns whether it was drawn."""
    if not sum(codebook.counts) or not can_plot():
        return False
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8.4, 2.4), layout="constrained")
    axis = figure.subplots()
    axis.bar(range(len(codebook.counts)), sorted(codebook.counts, reverse=True), width=1.0)
    axis.set_title(_label(f"Use of the {len(codebook.counts)} codes in {codebook.over}"), fontsize=10)
    axis.set_xlabel("rank of the code", fontsize=8)
    axis.set_ylabel("times chosen", fontsize=8)
    figure.savefig(path, dpi=100)
    return True
