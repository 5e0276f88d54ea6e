"""The demo's HTML report: one self-contained page of tables, plots, pictures and coloured answers."""

import base64
import colorsys
import io
import re
from pathlib import Path
from typing import Any

TEMPLATE = "report.html.j2"
# What is drawn in the page's own colour is drawn in this one first.
INK = "#010203"
COLOURS = ("#2f7fd1", "#d9772b", "#3f9f5f")
STAGE_NAMES = {
    "inverse_dynamics": "Stage 1, inverse dynamics: codes from conversations with pictures",
    "projector": "Stage 2, projector: pictures' states from text",
    "joint": "Stage 3, joint: codes from conversations with and without pictures",
    "policy": "Stage 4, policy: cloning",
}
# Title of a drawing: logged metric to its label.
STAGE_FIGURES = {
    "Cross-entropy of the next token (nats)": {"world_model/ce": "with inferred codes"},
    "What codes gain (nats)": {
        "world_model/ce_gap_no_action": "over no code",
        "world_model/ce_gap_random_action": "over random codes",
    },
    "Usage of the codebook": {"codebook/used": "codes used", "codebook/perplexity": "perplexity"},
    "Negative log-likelihood (nats)": {"projector/nll": "projector"},
    "KL to the backbone (nats)": {"policy/backbone_kl": "policy"},
    "Accuracy of cloning": {"policy/cloning_accuracy": "policy"},
}


def code_colour(code: int) -> str:
    """A pale colour of its own for each code, as CSS."""
    # Steps of the golden ratio keep neighbouring codes apart.
    red, green, blue = colorsys.hls_to_rgb((code * 0.618034) % 1.0, 0.82, 0.75)
    return f"#{int(red * 255):02x}{int(green * 255):02x}{int(blue * 255):02x}"


def image_url(image) -> str:
    """A PIL picture as a data URL."""
    buffer = io.BytesIO()
    image.convert("RGB").save(buffer, format="PNG")
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()


def _svg(figure) -> str:
    """A figure as SVG to put into a page, its lines and words in the page's own colour, its ground transparent."""
    import matplotlib.pyplot as plt

    buffer = io.StringIO()
    with plt.rc_context({"svg.fonttype": "none"}):
        figure.savefig(buffer, format="svg", bbox_inches="tight", transparent=True)
    plt.close(figure)
    drawn = buffer.getvalue()
    drawn = drawn[drawn.index("<svg") :].replace(INK, "currentColor")
    head, rest = drawn.split(">", 1)
    # The page says how large it is.
    return re.sub(r' (width|height)="[^"]*"', "", head) + ">" + rest


def _axes(width: float, height: float):
    """A figure and its axes, all in [`INK`]."""
    import matplotlib.pyplot as plt

    names = ("text.color", "axes.labelcolor", "axes.edgecolor", "axes.titlecolor", "xtick.color", "ytick.color")
    with plt.rc_context(dict.fromkeys(names, INK)):
        figure, axis = plt.subplots(figsize=(width, height))
    axis.grid(alpha=0.25, color=INK)
    axis.spines[["top", "right"]].set_visible(False)
    return figure, axis


def _curve(rows: list[dict[str, Any]], names: dict[str, str], title: str) -> str:
    """Curves over steps; empty when no row has any of `names`."""
    curves = {}
    for name, label in names.items():
        points = [(row["step"], row[name]) for row in rows if row.get(name) is not None]
        if points:
            curves[label] = points
    if not curves:
        return ""
    figure, axis = _axes(5.2, 3)
    for colour, (label, points) in zip(COLOURS, curves.items()):
        axis.plot(*zip(*points, strict=True), label=label, linewidth=1.8, color=colour)
    axis.set_title(title, fontsize=11, color=INK)
    axis.set_xlabel("step")
    if len(curves) > 1:
        axis.legend(fontsize=9, labelcolor=INK, framealpha=0)
    return _svg(figure)


def _usage_plot(counts: list[int]) -> str:
    figure, axis = _axes(10.6, 2.6)
    order = sorted((code for code in range(len(counts)) if counts[code]), key=lambda code: -counts[code])
    axis.bar(range(len(order)), [counts[c] for c in order], color=[code_colour(c) for c in order], edgecolor="#888888")
    axis.set_xticks(range(len(order)), [str(code) for code in order], fontsize=7, rotation=90 if len(order) > 40 else 0)
    axis.set_title("How often each code was taken in the answers after RL", fontsize=11, color=INK)
    axis.set_xlabel("code, most frequent first")
    return _svg(figure)


def _space_plots(history: list[dict[str, Any]]) -> list[tuple[str, list[str]]]:
    """The figures of each stage on axes of their own: stages see different data, and their steps begin anew."""
    stages = list(dict.fromkeys(row["stage"] for row in history))
    found = []
    for stage in stages:
        rows = [row for row in history if row["stage"] == stage]
        plots = [_curve(rows, names, title) for title, names in STAGE_FIGURES.items()]
        found.append((STAGE_NAMES.get(stage, stage), [plot for plot in plots if plot]))
    return [(name, plots) for name, plots in found if plots]


def write_report(result, path: Path) -> Path:
    """
    Writes the report of a demo run.

    Args:
        result (`DemoResult`): What the demo measured.
        path (`Path`): The HTML file to write.

    Returns:
        `path`.
    """
    try:
        import matplotlib

        matplotlib.use("Agg")
        from jinja2 import Environment, PackageLoader
    except ImportError as error:
        raise ImportError("The report needs matplotlib and jinja2: `pip install matplotlib jinja2`.") from error
    plots = [
        _curve(result.rl_history, {"reward": "reward"}, "Mean reward of sampled answers"),
        _curve(result.rl_history, {"entropy": "entropy of codes"}, "Entropy of codes (nats)"),
        _curve(result.rl_history, {"kl": "KL"}, "KL to the policy before RL (nats a code)"),
    ]
    examples = [{**example, "image": image_url(example["image"])} for example in result.examples]
    environment = Environment(loader=PackageLoader("latent_trl.evaluation", "."), autoescape=True)
    environment.globals["code_colour"] = code_colour
    page = environment.get_template(TEMPLATE).render(
        result=result,
        before=list(result.reward)[0],
        after=list(result.reward)[-1],
        plots=[plot for plot in plots if plot],
        stages=_space_plots(result.space_history),
        usage=_usage_plot(result.code_counts),
        used=sum(count > 0 for count in result.code_counts),
        examples=examples,
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(page, encoding="utf-8")
    return path
