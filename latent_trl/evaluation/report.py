"""The demo's HTML report: one self-contained page of tables, plots, pictures and coloured answers."""

import base64
import colorsys
import io
from pathlib import Path
from typing import Any

TEMPLATE = "report.html.j2"


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


def _figure_url(figure) -> str:
    import matplotlib.pyplot as plt

    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=110, bbox_inches="tight")
    plt.close(figure)
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()


def _curve(rows: list[dict[str, Any]], x: str, names: dict[str, str], title: str) -> str:
    import matplotlib.pyplot as plt

    figure, axis = plt.subplots(figsize=(5.2, 3))
    for name, label in names.items():
        points = [(row[x], row[name]) for row in rows if row.get(name) is not None]
        if points:
            axis.plot(*zip(*points, strict=True), label=label, linewidth=1.6)
    axis.set_title(title, fontsize=10)
    axis.set_xlabel(x)
    axis.grid(alpha=0.3)
    if len(names) > 1:
        axis.legend(fontsize=8)
    return _figure_url(figure)


def _usage_plot(counts: list[int]) -> str:
    import matplotlib.pyplot as plt

    figure, axis = plt.subplots(figsize=(10.6, 2.4))
    order = sorted(range(len(counts)), key=lambda code: -counts[code])
    axis.bar(range(len(order)), [counts[c] for c in order], color=[code_colour(c) for c in order], edgecolor="#999")
    axis.set_title("How often each code was taken in the answers after RL, most frequent first", fontsize=10)
    axis.set_xlabel("rank of the code")
    return _figure_url(figure)


def _numbered(history: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """History of several stages, with steps that go on counting."""
    rows, offset, last, stage = [], 0, 0, None
    for row in history:
        if row["stage"] != stage:
            offset, last, stage = offset + last, 0, row["stage"]
        last = max(last, row["step"])
        rows.append({**row, "step": offset + row["step"]})
    return rows


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
        raise ImportError("The report needs matplotlib and jinja2: `pip install latent_trl[demo]`.") from error
    space = _numbered(result.space_history)
    plots = [
        _curve(result.rl_history, "step", {"reward": "reward"}, "RL: mean reward of sampled answers"),
        _curve(result.rl_history, "step", {"entropy": "entropy", "kl": "KL"}, "RL: entropy of codes, KL to the start"),
        _curve(
            space,
            "step",
            {
                "world_model/ce": "with inferred codes",
                "world_model/ce_gap_no_action": "gain over no code",
                "world_model/ce_gap_random_action": "gain over random codes",
            },
            "Learning the space: cross-entropy (nats)",
        ),
        _curve(
            space, "step", {"codebook/used": "codes used", "codebook/perplexity": "perplexity"}, "Usage of the codebook"
        ),
    ]
    examples = [{**example, "image": image_url(example["image"])} for example in result.examples]
    environment = Environment(loader=PackageLoader("latent_trl.evaluation", "."), autoescape=True)
    environment.globals["code_colour"] = code_colour
    page = environment.get_template(TEMPLATE).render(
        result=result,
        before=list(result.reward)[0],
        after=list(result.reward)[-1],
        plots=plots,
        usage=_usage_plot(result.code_counts),
        used=sum(count > 0 for count in result.code_counts),
        examples=examples,
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(page, encoding="utf-8")
    return path
