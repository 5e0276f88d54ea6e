"""`latent-trl inspect REPO_OR_FOLDER`: what a checkpoint is, without loading its weights."""

import argparse
import json

from .arguments import CommandParser


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = CommandParser(
        prog="latent-trl inspect",
        description="Shows components, shapes, base model, stage, health and evaluation. Weights are not loaded.",
    )
    parser.add_argument("source", metavar="REPO_OR_FOLDER")
    parser.add_argument("--revision", help="branch, tag or commit of a repository")
    parser.add_argument("--shapes", action="store_true", help="every tensor's shape")
    parser.add_argument("--json", action="store_true", help="JSON in place of tables")
    return parser.parse_args(argv)


def facts_table(found):
    """Base model, sizes and stage."""
    from rich.table import Table

    from ..hub.facts import is_of_plans

    record = found.record
    base = record.get("base_model_name_or_path") or "made in memory"
    fingerprint = record.get("backbone_fingerprint")
    rows = {
        "source": found.source + (f" at {found.commit}" if found.commit else ""),
        "base model": base,
        "its commit": record.get("base_model_revision") or "unknown",
        "fingerprint": f"{fingerprint[:16]}…" if isinstance(fingerprint, str) else "none",
        **(plan_facts(record) if is_of_plans(record) else code_facts(record)),
        "schema": record.get("schema_version"),
    }
    table = Table(title="Plans" if is_of_plans(record) else "Latent actions", show_header=False)
    for name, value in rows.items() if record else [("source", rows["source"])]:
        table.add_row(name, _plain(value))
    return table


def code_facts(record) -> dict[str, object]:
    described = record.get("data_description")
    return {
        "codes": f"{record.get('num_codes')} of width {record.get('hidden_size')}",
        "read-out": record.get("read_out"),
        "stage": record.get("stage"),
        "data": json.dumps(described) if described else "not described",
    }


def plan_facts(record) -> dict[str, object]:
    from ..hub.plan_card import held_for

    return {
        "plans": f"{record.get('num_plans')} of rank {record.get('rank')}, from layer {record.get('depth')} on",
        "held for": held_for(record.get("segment")),
        "LoRA below them": "in the folder `adapter`" if record.get("has_adapter") else "none",
    }


def plans_table(found):
    """What each plan says."""
    from rich.table import Table

    table = Table(title=f"Plans, {found.report.plans.over}")
    for name, justify in (("plan", "right"), ("mean reward", "right"), ("chosen for", "right"), ("says", "left")):
        table.add_column(name, justify=justify)
    for one in found.report.plans.plans:
        reward, chosen = one.get("reward"), one.get("chosen")
        said = ", ".join(f"{text!r} × {count}" for text, count in one.get("answers", [])[:3])
        values = (one["plan"], "-" if reward is None else f"{reward:.3f}", "-" if chosen is None else f"{chosen:.0%}")
        table.add_row(*map(_plain, (*values, said)))
    return table


def components_table(found, every_shape: bool):
    from rich.table import Table

    table = Table(title="Components")
    for name, justify in (("folder", "left"), ("parameters", "right"), ("dtype", "left"), ("tensors", "left")):
        table.add_column(name, justify=justify)
    for name, part in found.parts.items():
        shapes = [f"{tensor} {list(shape)}" for tensor, shape in part.shapes.items()]
        shown = shapes if every_shape or len(shapes) <= 2 else [*shapes[:1], f"and {len(shapes) - 1} more"]
        table.add_row(_plain(name), f"{part.parameters:,}", ", ".join(part.dtypes), _plain("\n".join(shown)))
    total = sum(part.parameters for part in found.parts.values())
    table.add_row("all", f"{total:,}", "", "", style="bold")
    return table


def evaluation_table(found):
    from rich.table import Table

    table = Table(title="Evaluation")
    for name in ("data set", "split", "metric", "value", "interval"):
        table.add_column(name)
    for one in found.report.evaluation:
        bounds = f"{one.low:.4g} to {one.high:.4g}" if one.low is not None and one.high is not None else ""
        table.add_row(*map(_plain, (one.dataset, one.split, one.metric, f"{one.value:.4g}", bounds)))
    return table


def _plain(value):
    """Text of a repository, in which rich and the terminal see no orders."""
    from rich.text import Text

    from ..data.pieces import printable

    return Text(printable(str(value))[:2000])


def to_json(found) -> str:
    parts = {
        name: {"parameters": part.parameters, "dtypes": part.dtypes, "shapes": part.shapes}
        for name, part in found.parts.items()
    }
    return json.dumps(
        {
            "source": found.source,
            "commit": found.commit,
            "config": {name: value for name, value in found.record.items() if name != "layer_shapes"},
            "components": parts,
            "usage": found.usage,
            "plans": found.report.to_dict()["plans"],
            "evaluation": found.report.to_dict()["evaluation"],
            "problems": found.problems,
        },
        indent=2,
    )


def main(argv: list[str] | None = None) -> int:
    args = parse(argv)
    from rich.console import Console

    from ..hub.facts import is_of_plans
    from ..hub.pull import inspect
    from .rows import check_exists

    check_exists(args.source, "model")
    found = inspect(args.source, revision=args.revision)
    if args.json:
        print(to_json(found))
        return 1 if found.problems else 0
    console = Console()
    console.print(facts_table(found))
    console.print(components_table(found, args.shapes))
    usage = found.usage
    if is_of_plans(found.record):
        if found.report.plans:
            console.print(plans_table(found))
        else:
            console.print("Plans: what they say was not kept with the weights")
    elif usage:
        dead = usage["codes"] - usage["used"]
        console.print(
            f"Codebook: {usage['used']:.0f} of {usage['codes']} codes in use, perplexity {usage['perplexity']:.1f}, "
            f"{dead:.0f} dead",
            highlight=False,
        )
    else:
        console.print("Codebook: its usage was not kept with the weights")
    if found.report.evaluation:
        console.print(evaluation_table(found))
    else:
        console.print("Evaluation: none was kept with the weights")
    for problem in found.problems:
        console.print(_plain(f"Problem: {problem}"), style="red")
    return 1 if found.problems else 0
