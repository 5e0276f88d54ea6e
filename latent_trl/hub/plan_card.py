"""What a model card says of plans, in the place of what it says of codes a token."""

from typing import Any

from ..checkpoint.plan_files import PLAN_FOLDER
from .facts import ComponentFacts, PlansReport
from .markdown import Markup, SnippetNames, base_model_link, cell, code_span, table

ORIGIN = "Plans are of latent_trl; reinforcement learning over a codebook of latent actions is"
PURPOSE = {"chooser": "which plan to hold for a prompt", "adapter": "PEFT adapter of the base model, below all plans"}
# Answers of a plan that are shown.
SHOWN = 3


def held_for(segment: Any) -> str:
    """For what a plan is held, as `segment` of a record says."""
    held = {"answer": "the whole answer", "sentence": "a sentence", "switch": "a segment that a learned switch ends"}
    return held.get(str(segment)) or f"{segment} tokens"


def plan_summary(record: dict[str, Any], parts: dict[str, ComponentFacts]) -> str:
    """What it is, and on what it was learned."""
    kind = "vision-language" if record.get("vision_token_ids") else "language"
    lines = [
        f"**{cell(record.get('num_plans'))} plans** for a {kind} model: latent actions that are held for "
        f"{cell(held_for(record.get('segment')))}, each a LoRA of rank {cell(record.get('rank'))} on the layers from "
        f"{cell(record.get('depth'))} on. Learned on {base_model_link(record)}, whose weights are not in this "
        "repository."
    ]
    if "chooser" not in parts:
        lines.append("There is no chooser here: a plan is picked by hand, or a chooser trained by RL.")
    return "\n\n".join(lines)


def plan_components(parts: dict[str, ComponentFacts]) -> str:
    """A row for all plans, and one for each other part."""
    plans = [name for name in parts if PLAN_FOLDER.fullmatch(name)]
    rows: list[list[Any]] = []
    if plans:
        named = Markup(f"{code_span(plans[0] + '/')} to {code_span(plans[-1] + '/')}")
        dtypes = sorted({dtype for name in plans for dtype in parts[name].dtypes})
        each = parts[plans[0]].parameters
        rows.append([named, "a plan each, in PEFT's format", f"{each:,} each", ", ".join(dtypes)])
    for name, part in parts.items():
        if name not in plans:
            rows.append(
                [Markup(code_span(name)), PURPOSE.get(name, ""), f"{part.parameters:,}", ", ".join(part.dtypes)]
            )
    return table(["part", "what it is", "parameters", "dtype"], rows) + "\n\nAll weights are safetensors."


def plan_snippet(record: dict[str, Any], parts: dict[str, ComponentFacts], repo: str, has_processor: bool) -> str:
    """Code that answers under the chosen plan and under one picked by hand, and that loads one plan in PEFT."""
    lines = SnippetNames.of(record).beginning("PlanModel", repo, has_processor, "what they were learned on")
    if "chooser" in parts:
        lines += [
            "print(model.plan_logits(**inputs).argmax())  # the plan that is chosen",
            "print(processor.decode(model.generate(**inputs)[0], skip_special_tokens=True))",
            "",
        ]
    lines += [
        "# What each plan answers.",
        "for plan in range(model.plan_config.num_plans):",
        "    ids = model.generate(**inputs, plan_ids=plan)",
        "    print(plan, processor.decode(ids[0], skip_special_tokens=True))",
    ]
    return "```python\n" + "\n".join(lines) + "\n```"


def plan_answers(report: PlansReport | None) -> str:
    """A row a plan: what it says."""
    if report is None or not report.plans:
        return "What each plan says was not measured."
    rows = []
    for one in report.plans:
        answers = [f"{code_span(text)} × {count}" for text, count in one.get("answers", [])[:SHOWN]]
        reward, chosen = one.get("reward"), one.get("chosen")
        rows.append(
            [
                one["plan"],
                "not measured" if reward is None else float(reward),
                "not measured" if chosen is None else f"{chosen:.0%}",
                Markup(", ".join(answers)),
            ]
        )
    head = ["plan", "mean reward", "chosen for", "what it says most often"]
    return f"In {cell(report.over)}:\n\n" + table(head, rows)


def plan_limits(record: dict[str, Any]) -> str:
    """What to expect of them, and what not."""
    lines = [
        "- What no plan says cannot be found by choosing among them.",
        "- A plan has no meaning of its own: what it does was learned, and may differ by context.",
        "- The base model's biases, errors and terms of use apply; a plan can make the text worse or wrong.",
        "- Use them with the base model that they were learned on: a fingerprint of its tensors is checked on loading.",
    ]
    if record.get("vision_token_ids") == []:
        lines.append("- Text alone: this model has no images.")
    return "\n".join(lines)
