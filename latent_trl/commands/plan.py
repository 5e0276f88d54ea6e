"""`latent-trl plan MODEL --gpu 24GB`: what fits on a GPU, phase by phase, from the configuration alone."""

import argparse
import json
import re
from collections.abc import Callable
from dataclasses import fields
from functools import cache
from typing import TYPE_CHECKING, Any

from .arguments import CommandParser, UsageError, above_zero, at_least

if TYPE_CHECKING:
    from ..sizing.layout import Layout
    from ..sizing.memory import Phase

GIB = 2**30


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = CommandParser(
        prog="latent-trl plan",
        description="Memory of each phase from learning to serving, rows that fit, and hours. Reads the backbone's "
        "configuration and no weights. Arithmetic, not a measurement: see docs/memory.md.",
    )
    parser.add_argument("model", metavar="MODEL", help="folder or Hub id of the backbone")
    parser.add_argument("--gpu", default="24GB", help="memory of one GPU as it is sold: 24GB (the default) is 24 GiB")
    parser.add_argument("--revision", help="branch, tag or commit of a repository")
    parser.add_argument("--quantize", choices=["4bit"], help="the backbone's linear maps in 4 bits")
    parser.add_argument("--policy-layers", type=int, default=2, help="decoder layers of the policy (%(default)s)")
    parser.add_argument("--policy-width", type=int, help="hidden size of the policy; by default the backbone's")
    parser.add_argument(
        "--inverse-dynamics-layers", type=int, default=4, help="of the inverse dynamics model (%(default)s)"
    )
    parser.add_argument("--world-model-intermediate-size", type=int, help="width of the merge blocks; the backbone's")
    parser.add_argument("--num-codes", type=int, default=128, help="K, the number of latent actions (128)")
    parser.add_argument("--rows", type=int, default=4, help="rows of a batch in learning and SFT (4)")
    parser.add_argument("--length", type=int, default=2048, help="tokens of such a row, with the picture's (2048)")
    parser.add_argument("--completions", type=int, default=8, help="completions at once in RL (8)")
    parser.add_argument("--generations", type=int, default=8, help="completions a prompt (8)")
    parser.add_argument("--prompt-length", type=int, default=1024, help="tokens of a prompt in RL (1024)")
    parser.add_argument("--completion-length", type=int, default=256, help="tokens of a completion (256)")
    parser.add_argument("--lora-rank", type=int, default=16, help="of the adapter that SFT trains (16)")
    parser.add_argument("--ppo", action="store_true", help="PPO's value head")
    parser.add_argument("--reference", action="store_true", help="a reference policy (`beta` above 0)")
    parser.add_argument("--gradient-checkpointing", action="store_true", help="run layers again in the backward pass")
    parser.add_argument("--learning-tokens", type=above_zero, default=2e7, help="tokens of each stage (2e7)")
    parser.add_argument("--rl-steps", type=at_least(1), default=500, help="steps of RL (500)")
    parser.add_argument("--json", action="store_true", help="JSON in place of tables")
    return parser.parse_args(argv)


def gpu_memory(text: str) -> float:
    """
    GiB of `"24GB"`, `"24 GiB"` or `"24"`.

    Raises:
        UsageError: For anything else.
    """
    found = re.fullmatch(r"(\d+(?:\.\d+)?)\s*(?:gi?b?)?", text.strip(), re.IGNORECASE)
    if not found or float(found[1]) <= 0:
        raise UsageError("latent-trl plan", f"`--gpu` is the memory of one GPU, such as 24GB or 80; got {text!r}.")
    return float(found[1])


def policy_fields(options: argparse.Namespace, text_config) -> dict[str, Any]:
    """Of the policy's decoder. A narrower one keeps the size of a head and the ratio of the feed-forward block."""
    fields: dict[str, Any] = {"num_hidden_layers": options.policy_layers}
    width = options.policy_width
    if width is None:
        return fields
    heads = text_config.num_attention_heads
    head_size = text_config.hidden_size // heads
    if width < head_size or width % head_size:
        raise UsageError("latent-trl plan", f"`--policy-width` must be a multiple of a head's size, {head_size}.")
    key_value = max(1, (text_config.num_key_value_heads or heads) * width // text_config.hidden_size)
    while (width // head_size) % key_value:
        key_value -= 1
    inner = text_config.intermediate_size * width // text_config.hidden_size
    return fields | {
        "hidden_size": width,
        "num_attention_heads": width // head_size,
        "num_key_value_heads": key_value,
        "intermediate_size": inner,
    }


def what_helps(name: str, memory: float, layouts: Callable[[int | None], "Layout"], choices: dict[str, Any]) -> str:
    """
    The first of a few changes under which a phase fits, the cheapest first.

    Args:
        name (`str`): The phase.
        memory (`float`): Of the GPU, in bytes.
        layouts (`Callable`): From a number of decoder layers, or `None` for those asked for, to a layout.
        choices (`dict`): Keyword arguments of [`~latent_trl.sizing.memory.phases`], as asked for.
    """
    from ..sizing.memory import phases

    tries: list[tuple[str, int | None, dict[str, Any]]] = [("", None, {})]
    tries.append(("`gradient_checkpointing`", None, {"gradient_checkpointing": True}))
    if not choices["four_bit"]:
        tries.append(("4 bits and `gradient_checkpointing`", None, {"gradient_checkpointing": True, "four_bit": True}))
    small = "4 bits, `gradient_checkpointing`, 2 layers in policy and inverse dynamics model, a world model of width d"
    tries.append((small, 2, {"gradient_checkpointing": True, "four_bit": True}))
    for text, layers, change in tries:
        found = {phase.name: phase for phase in phases(layouts(layers), **{**choices, **change})}
        rows = min(found[name].rows_that_fit(memory), found[name].rows)
        if rows:
            batch = f"{rows} row{'s' * (rows > 1)} at once" if rows < found[name].rows else ""
            return " and ".join(part for part in (text, batch) if part)
    return "a larger GPU, or the backbone sharded over several"


def report(options: argparse.Namespace, layouts: Callable[[int | None], "Layout"]) -> dict[str, Any]:
    """All figures, in GiB, seconds and hours. `layouts` gives a layout for a number of decoder layers."""
    from ..sizing.hours import learning_seconds, nearest_gpu, rl_step_seconds
    from ..sizing.memory import Batch, phases

    layout, memory = layouts(None), gpu_memory(options.gpu)
    batch = Batch(**{field.name: getattr(options, field.name) for field in fields(Batch)})
    choices = {
        "batch": batch,
        "four_bit": options.quantize == "4bit",
        "value_head": options.ppo,
        "reference": options.reference,
        "gradient_checkpointing": options.gradient_checkpointing,
    }
    gpu = nearest_gpu(memory)
    rollout, update = rl_step_seconds(layout, gpu, batch, choices["four_bit"])
    figures = [_figures(phase, memory * GIB) for phase in phases(layout, **choices)]
    for found in figures:
        found["what_helps"] = "" if found["fits"] else what_helps(found["phase"], memory * GIB, layouts, choices)
    names = ["backbone", *[name for name in layout.components if name != "value_head" or options.ppo]]
    return {
        "model": options.model,
        "gpu_gib": memory,
        "parameters": {name: layout.parameters(name) for name in names},
        "decoder_kind": layout.config.decoder_kind,
        "phases": figures,
        "hours_on": gpu.name,
        "learning_hours": learning_seconds(layout, gpu, batch, options.learning_tokens) / 3600,
        "rl_step_seconds": {"rollout": rollout, "update": update},
        "rl_hours": (rollout + update) * options.rl_steps / 3600,
    }


def _figures(phase: "Phase", memory: float) -> dict[str, Any]:
    return {
        "phase": phase.name,
        "weights_gib": phase.weights / GIB,
        "training_gib": phase.training / GIB,
        "batch_gib": (phase.working + phase.row * phase.rows) / GIB,
        "total_gib": phase.total / GIB,
        "rows": phase.rows,
        "rows_that_fit": phase.rows_that_fit(memory),
        "fits": phase.total <= memory,
    }


def show(figures: dict[str, Any], options: argparse.Namespace) -> None:
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    console = Console(highlight=False)
    sizes = ", ".join(f"{name} {count / 1e6:,.0f} M" for name, count in figures["parameters"].items() if count >= 5e5)
    console.print(f"{escape(figures['model'])}: {sizes}")
    if figures["decoder_kind"] == "plain":
        console.print("Policy and inverse dynamics model have plain layers: this family's cannot be had by themselves.")
    table = Table(title=f"GiB on a GPU of {figures['gpu_gib']:g}")
    for name in ("phase", "weights", "trained", "batch", "total", "rows", "fit"):
        table.add_column(name, justify="left" if name == "phase" else "right", no_wrap=True)
    for phase in figures["phases"]:
        values = [f"{phase[f'{name}_gib']:.1f}" for name in ("weights", "training", "batch", "total")]
        row = [phase["phase"], *values, str(phase["rows"]), f"{phase['rows_that_fit']:,}"]
        table.add_row(*row, style=None if phase["fits"] else "bold red")
    console.print(table)
    console.print("rows: at once; fit: as many as would.")
    for phase in figures["phases"]:
        if not phase["fits"]:
            console.print(f"{phase['phase']} does not fit. It would with {phase['what_helps']}.")
    step = figures["rl_step_seconds"]
    console.print(
        f"Time on one {figures['hours_on']}, estimated: learning {figures['learning_hours']:.1f} h for "
        f"{options.learning_tokens:.0e} tokens a stage; an RL step {step['rollout'] + step['update']:.1f} s, "
        f"{options.rl_steps} steps {figures['rl_hours']:.1f} h."
    )
    console.print("Arithmetic from the configuration; nothing was run. docs/memory.md has the terms.")


def main(argv: list[str] | None = None) -> int:
    options = parse(argv)
    gpu_memory(options.gpu)
    from transformers import AutoConfig, PreTrainedConfig
    from transformers.utils import logging

    from ..checkpoint.configuration import check_counts
    from ..sizing.layout import Layout
    from .loading import check_is_backbone

    check_is_backbone(options.model)
    logging.set_verbosity_error()
    check_counts(PreTrainedConfig.get_config_dict(options.model, revision=options.revision)[0])
    config = AutoConfig.from_pretrained(options.model, revision=options.revision)

    @cache
    def layouts(layers: int | None) -> Layout:
        text_config = config.get_text_config(decoder=True)
        policy, width = policy_fields(options, text_config), options.world_model_intermediate_size
        inverse = {"num_hidden_layers": options.inverse_dynamics_layers}
        if layers is not None:
            policy, inverse = ({**decoder, "num_hidden_layers": layers} for decoder in (policy, inverse))
            width = min(width or text_config.hidden_size, text_config.hidden_size)
        return Layout.of_config(
            config,
            num_codes=options.num_codes,
            policy_decoder=policy,
            inverse_dynamics_decoder=inverse,
            world_model_intermediate_size=width,
        )

    figures = report(options, layouts)
    if options.json:
        print(json.dumps(figures, indent=1))
    else:
        show(figures, options)
    return 0
