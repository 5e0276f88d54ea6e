"""Model cards: every sentence is made from a fact of the checkpoint, and what is not known is said in a line."""

import re
from pathlib import Path
from string import Template
from typing import Any

from huggingface_hub import EvalResult, ModelCardData

from .facts import (
    CodebookReport,
    ComponentFacts,
    TrainingReport,
    TrainingRun,
    component_facts,
    is_of_plans,
    read_record,
)
from .markdown import Markup, SnippetNames, base_model_link, cell, code_span, hub_id, one_line, quoted, table
from .plan_card import ORIGIN, plan_answers, plan_components, plan_limits, plan_snippet, plan_summary
from .plots import CODES_FILE, CURVES_FILE, can_plot, draw_codes, draw_curves, segments
from .secrets import hide_secrets

CARD_FILE = "README.md"
PLOT_FILES = (CURVES_FILE, CODES_FILE)
TEMPLATE = Path(__file__).with_name("card_template.md")
NO_MATPLOTLIB = "Plots are left out: matplotlib was not installed where this card was made."
PURPOSE = {
    "codebook": "the latent actions",
    "projector": "from the state of text alone to that of image and text, and back",
    "policy": "the distribution over codes, given what has been said",
    "world_model": "merges state and code, for the backbone's head to read",
    "inverse_dynamics": "which code explains the next token; for learning alone",
    "value_head": "the value of a state; for PPO alone",
    "adapter": "PEFT adapter of the base model",
    "backbone": "tensors of the base model that were trained",
}


def write_card(
    folder: str | Path,
    repo_id: str | None = None,
    title: str | None = None,
    license: str | None = None,
    tags: list[str] | str | None = None,
    datasets: list[str] | str | None = None,
    language: str | None = None,
    base_model: str | None = None,
    base_model_source: str | None = None,
) -> Path:
    """
    Writes `README.md`, and plots beside it, from what a checkpoint folder holds: its record, the headers of its
    tensors, and `training_report.json`.

    Args:
        folder (`str` or `Path`): The checkpoint.
        repo_id (`str`, *optional*): Where it will be; used in the snippet.
        title (`str`, *optional*): Defaults to the repository's or the folder's name.
        license (`str`, *optional*): A licence id of the Hub. By default the base model's is pointed at.
        tags (`list[str]`, *optional*), datasets (`list[str]`, *optional*), language (`str`, *optional*): Of the
            metadata, beside what the checkpoint itself says.
        base_model (`str`, *optional*): Hub id for the metadata, where the checkpoint names a local model that was made
            from that one.
        base_model_source (`str`, *optional*): How to get the base model, in one line; said above the snippet.

    Returns:
        The path of the card.
    """
    folder = Path(folder)
    record, report, parts = read_record(folder), TrainingReport.read(folder), component_facts(folder)
    title = title or (repo_id or folder.absolute().name).split("/")[-1]
    runs, codebook = report.runs, report.codebook
    data = [name for run in runs for name in run.data.get("datasets", [])] + _listed(datasets)
    base = hub_id(base_model) or hub_id(record.get("base_model_name_or_path"))
    metadata = card_metadata(record, report, title, license, _listed(tags), data, language, base)
    for name in PLOT_FILES:
        (folder / name).unlink(missing_ok=True)
    curves = draw_curves(runs, folder / CURVES_FILE)
    codes = codebook is not None and draw_codes(codebook, folder / CODES_FILE)
    source = f"The base model: {base_model_source}\n\n" if base_model_source else ""
    place, has_processor = repo_id or folder.name, _has_processor(folder)
    if is_of_plans(record):
        said = {
            "kind": "Plans",
            "origin": ORIGIN,
            "summary": plan_summary(record, parts),
            "components": plan_components(parts),
            "snippet": source + plan_snippet(record, parts, place, has_processor),
            "codebook": plan_answers(report.plans),
            "limits": plan_limits(record),
        }
    else:
        said = {
            "kind": "Codebook",
            "origin": "The method is",
            "summary": _summary(record, parts),
            "components": _components(parts),
            "snippet": source + _snippet(record, parts, place, has_processor),
            "codebook": _codebook(codebook, runs, codes),
            "limits": _limits(record),
        }
    body = Template(TEMPLATE.read_text(encoding="utf-8")).substitute(
        title=cell(title),
        training=_training(runs, record),
        curves=_curves(runs, curves),
        evaluation=_evaluation(report),
        hyperparameters=_hyperparameters(runs),
        versions=_versions(record),
        **said,
    )
    body = re.sub(r"\n{3,}", "\n\n", body)
    text = hide_secrets(f"---\n{metadata.to_yaml()}\n---\n\n{body}")
    path = folder / CARD_FILE
    path.unlink(missing_ok=True)
    path.write_text(text, encoding="utf-8")
    return path


def card_metadata(
    record: dict[str, Any],
    report: TrainingReport,
    title: str,
    license: str | None,
    tags: list[str],
    datasets: list[str],
    language: str | None,
    base: str | None,
) -> ModelCardData:
    """The YAML block: library, base model, task, data sets, tags, licence and evaluation results."""
    task = "image-text-to-text" if record.get("vision_token_ids") or not record else "text-generation"
    stage = record.get("stage", "none")
    kind = ["plans"] if is_of_plans(record) else []
    own = [
        "latent-actions",
        *kind,
        *(["reinforcement-learning"] if stage == "rl" else []),
        *(["trl"] if report.runs else []),
    ]
    results = [
        EvalResult(
            task_type=task,
            dataset_type=one_line(one.dataset),
            dataset_name=one_line(one.dataset),
            dataset_split=one_line(one.split),
            metric_type=one_line(one.metric),
            metric_name=one_line(one.metric),
            metric_value=one.value,
        )
        for one in report.evaluation
    ]
    licence = {"license": license} if license else {"license": "other", "license_name": "as-the-base-model"}
    return ModelCardData(
        library_name="latent-trl",
        pipeline_tag=task,
        base_model=base,
        datasets=list(dict.fromkeys(name for name in datasets if hub_id(name))) or None,
        tags=list(dict.fromkeys([*own, *tags])),
        language=language,
        model_name=one_line(title) if results else None,
        eval_results=results or None,
        **licence,
    )


def _listed(value: list[str] | str | None) -> list[str]:
    return [value] if isinstance(value, str) else list(value or [])


def _has_processor(folder: Path) -> bool:
    return any((folder / name).is_file() for name in ("processor_config.json", "tokenizer_config.json"))


def _summary(record: dict[str, Any], parts: dict[str, ComponentFacts]) -> str:
    if not record:
        return f"Components of a latent action model, to be loaded one by one: {', '.join(map(code_span, parts))}."
    kind = "vision-language" if record.get("vision_token_ids") else "language"
    k, width = cell(record.get("num_codes")), cell(record.get("hidden_size"))
    stage, read_out = code_span(record.get("stage", "none")), code_span(record.get("read_out"))
    lines = [
        f"A latent action space for a {kind} model: in place of the next token, the model chooses one of **{k} codes** "
        f"of width {width}, and the token follows from the code. Learned on {base_model_link(record)}, whose weights "
        f"are not in this repository. Stage reached: {stage}; read-out: {read_out}."
    ]
    if "policy" not in parts:
        lines.append("There is no policy here: the codebook is for training one.")
    return "\n\n".join(lines)


def _components(parts: dict[str, ComponentFacts]) -> str:
    rows = [
        [Markup(code_span(f"{name}/")), PURPOSE.get(name, ""), f"{part.parameters:,}", ", ".join(part.dtypes)]
        for name, part in parts.items()
    ]
    return table(["folder", "what it is", "parameters", "dtype"], rows) + "\n\nAll weights are safetensors."


def _snippet(record: dict[str, Any], parts: dict[str, ComponentFacts], repo: str, has_processor: bool) -> str:
    if not record or not {"policy", "codebook", "world_model"} <= set(parts):
        lines = ["from latent_trl import Codebook", "", f"codebook = Codebook.from_pretrained({quoted(repo)})"]
        lines.append("print(codebook.weight.shape)  # one row a code")
        if "codebook" not in parts:
            return "Load each component with its class's `from_pretrained`, such as `LatentActionPolicy`."
        return "```python\n" + "\n".join(lines) + "\n```"
    lines = [
        *SnippetNames.of(record).beginning("LatentActionModel", repo, has_processor, "what it was learned on"),
        "# The codes of an answer, one a token.",
        "options = dict(max_new_tokens=32, action_do_sample=False, return_dict_in_generate=True)",
        "answer = model.generate(**inputs, **options)",
        'tokens = answer.sequences[0, inputs["input_ids"].shape[1] :]',
        "codes = answer.action_ids[0]",
        "for token, code in zip(tokens, codes):",
        "    print(int(code), repr(processor.decode([int(token)])))",
        "",
        "# The same again with another first code; -1 would leave a step free.",
        "forced = ((codes[:1] + 1) % model.config.num_codes).unsqueeze(0)",
        "steered = model.generate(**inputs, forced_action_ids=forced, **options)",
        "print(processor.decode(steered.sequences[0], skip_special_tokens=True))",
    ]
    return "```python\n" + "\n".join(lines) + "\n```"


def _training(runs: list[TrainingRun], record: dict[str, Any]) -> str:
    if not runs:
        return "No record of the training came with these weights."
    lines = []
    for number, run in enumerate(runs, 1):
        names = [str(name) for name in run.data.get("datasets", [])]
        what = ", ".join(f"[{n}](https://huggingface.co/datasets/{n})" if hub_id(n) else code_span(n) for n in names)
        sizes = [f"{run.data[key]:,} {label}" for key, label in (("rows", "rows"), ("text_rows", "text-only rows"))
                 if isinstance(run.data.get(key), int)]  # fmt: skip
        data = " of ".join(part for part in (" and ".join(sizes), what) if part)
        steps = ", ".join(
            f"{cell(rows[-1]['step'])} steps{_of_stage(rows[-1])}" for rows in segments(run) if "step" in rows[-1]
        )
        line = f"{number}. **{cell(run.method)}** trained {', '.join(map(cell, run.trained)) or 'the components'}"
        line += f" on {data}" if data else ""
        line += f", {steps}" if steps else ""
        line += f"; rewards: {', '.join(map(cell, run.reward_functions))}" if run.reward_functions else ""
        lines.append(line + "." + _ends(run))
    return "\n".join(lines)


def _of_stage(row: dict[str, Any]) -> str:
    return f" of {cell(row['stage'])}" if row.get("stage") else ""


def _ends(run: TrainingRun) -> str:
    """First and last of the loss and of the reward."""
    said = []
    for name in ("loss", "reward"):
        values = [row[name] for row in run.history if isinstance(row.get(name), (int, float))]
        if len(values) > 1 and not any("stage" in row for row in run.history):
            said.append(f"{name} from {values[0]:.3f} to {values[-1]:.3f}")
    return f" Logged {' and '.join(said)}." if said else ""


def _curves(runs: list[TrainingRun], drawn: bool) -> str:
    if drawn:
        return f"![Losses, rewards and other metrics of the training]({CURVES_FILE})"
    return NO_MATPLOTLIB if any(run.history for run in runs) and not can_plot() else ""


def _codebook(codebook: CodebookReport | None, runs: list[TrainingRun], drawn: bool) -> str:
    if codebook is None:
        logged = [row for run in runs for row in run.history if _is_number(row.get("codebook/used"))]
        last = logged[-1] if logged else None
        if last is None:
            return "How often each code is used was not measured."
        said = f"When it was last logged, {last['codebook/used']:.0f} codes were in use"
        perplexity = last.get("codebook/perplexity")
        return said + (f", with perplexity {perplexity:.1f}." if _is_number(perplexity) else ".")
    dead = codebook.dead
    lines = [
        f"In {cell(codebook.over)}: **{codebook.used} of {len(codebook.counts)} codes** in use, perplexity "
        f"**{codebook.perplexity:.1f}**, {len(dead)} dead codes"
        + (f" ({', '.join(map(str, dead[:24]))}{', …' if len(dead) > 24 else ''})." if dead else ".")
    ]
    if drawn:
        lines.append(f"![How often each code was chosen]({CODES_FILE})")
    elif not can_plot():
        lines.append(NO_MATPLOTLIB)
    rows = []
    for entry in codebook.codes:
        code = int(entry["code"])
        tokens = ", ".join(f"{code_span(repr(str(token)))} × {int(count)}" for token, count in entry.get("tokens", []))
        examples = " / ".join(str(text) for text in entry.get("examples", []))
        rows.append([code, codebook.counts[code], Markup(tokens) or "not kept", examples or "not kept"])
    if rows:
        head = ["code", "times", "tokens most often emitted", "answers that it occurs in"]
        lines.append("The codes most used:\n\n" + table(head, rows))
    return "\n\n".join(lines)


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float))


def _evaluation(report: TrainingReport) -> str:
    if not report.evaluation:
        return "These weights have not been evaluated, or the figures were not kept with them."
    rows = []
    for one in report.evaluation:
        bounds = f"{one.low:.4g} to {one.high:.4g}" if one.low is not None and one.high is not None else "not measured"
        rows.append([one.dataset, one.split, one.metric, float(one.value), bounds, one.interval or "", one.note or ""])
    return table(["data set", "split", "metric", "value", "interval", "of", "note"], rows)


def _hyperparameters(runs: list[TrainingRun]) -> str:
    tables = []
    for number, run in enumerate(runs, 1):
        if run.hyperparameters:
            rows = [[Markup(code_span(name)), value] for name, value in sorted(run.hyperparameters.items())]
            tables.append(f"{number}. {cell(run.method)}\n\n" + table(["setting", "value"], rows))
    return "\n\n".join(tables) or "No settings were kept with these weights."


def _limits(record: dict[str, Any]) -> str:
    lines = [
        "- Codes have no meaning of their own: what a code does was learned from the data and may differ by context.",
        "- The base model's biases, errors and terms of use apply; a forced code can make the text worse or wrong.",
        "- Use it with the base model that it was learned on: the fingerprint of its tensors is checked on loading.",
    ]
    if record.get("vision_token_ids") == []:
        lines.append("- Text alone: this model has no images.")
    return "\n".join(lines)


def _versions(record: dict[str, Any]) -> str:
    from .. import __version__

    versions = record.get("package_versions")
    versions = versions if isinstance(versions, dict) else {}
    return "\n".join(
        f"- {cell(name)}: {cell(version)}" for name, version in {"latent_trl": __version__, **versions}.items()
    )
