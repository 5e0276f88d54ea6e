"""
How large a policy has to be: on one space, policies of several depths and widths, cloned, tuned and trained by RL.

    pip install -e ".[dev]" && python benchmarks/policy_size.py

Four processor minutes a policy and seed. Each run leaves a file in `--output_dir`, and is not done again where that is:
`--output_dir benchmarks/reproduction/results/policy_size` goes on from those of `benchmarks/logs/policy_size.md`.
"""

import argparse
import contextlib
import io
import json
import os
import shutil
import sys
from argparse import Namespace
from dataclasses import replace
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
sys.path.insert(0, str(Path(__file__).parent / "reproduction"))

import torch  # noqa: E402
from arms import (  # noqa: E402
    DESCRIPTION_TOKENS,
    CodeSpeaker,
    learn,
    load_backbone,
    load_processor,
    quiet,
    rewards_of,
    seconds,
    train_codes,
)
from matrix import SIZES, Cell  # noqa: E402
from measures import perplexities  # noqa: E402
from measuring import table  # noqa: E402
from tasks import SAMPLES, Tasks, is_fluent, small_talk  # noqa: E402
from transformers import set_seed  # noqa: E402
from transformers.utils import logging  # noqa: E402

from latent_trl import (  # noqa: E402
    LatentActionModel,
    LatentActionSFTConfig,
    LatentActionSFTTrainer,
    LatentActionSpaceConfig,
    LatentActionSpaceTrainer,
)
from latent_trl.commands.plan import policy_fields  # noqa: E402
from latent_trl.data.shapes import shape_pairs  # noqa: E402
from latent_trl.models.latent_action_model import fresh_component  # noqa: E402

SIZE = replace(SIZES["levers"], evaluate_every=5)
# Layers and width. The backbone has 4 layers of width 192.
POLICIES = ((1, 192), (2, 192), (4, 192), (8, 192), (4, 96))
SEEDS = (0, 1)
# Of RL; the better one on the validation questions of the first seed is taken for the others.
RATES = (3e-4, 1e-3)
MEASURED = ("held_out", "sampled", "other_style", "fluent_described")
STAGES_BEFORE = ("inverse_dynamics", "projector", "joint")


def cloned(space: Path, layers: int, width: int, seed: int, folder: Path) -> dict[str, Any]:
    """A fresh policy of that size on the space, cloned, and the backbone tuned to follow codes; saved in `folder`."""
    shutil.rmtree(folder, ignore_errors=True)  # of a run that was stopped
    set_seed(seed)
    model = LatentActionModel.from_pretrained(space, backbone=load_backbone(SIZE))
    text_config = model.config.text_config
    model.config.policy_decoder = policy_fields(Namespace(policy_layers=layers, policy_width=width), text_config)
    model.policy = fresh_component("policy", model.config, text_config.hidden_size)
    processor, pairs = load_processor(SIZE), shape_pairs("base", SIZE.pairs, seed, SIZE.error_rate)
    args = LatentActionSpaceConfig(
        str(folder / "clone"),
        stages=["policy"],
        policy_max_steps=SIZE.cloning_steps,
        policy_learning_rate=1e-3,
        per_device_train_batch_size=16,
        max_length=96,
        logging_steps=5,
        seed=seed,
        **quiet(SIZE),
    )
    talk = small_talk(SIZE.texts, seed, SIZE.others)
    cloning = LatentActionSpaceTrainer(model, args, pairs, text_dataset=talk, processing_class=processor)
    start = seconds(SIZE)
    cloning.train()
    spent = seconds(SIZE) - start
    args = LatentActionSFTConfig(
        str(folder / "sft"),
        max_steps=SIZE.sft_steps,
        learning_rate=2e-4,
        per_device_train_batch_size=24,
        seed=seed,
        **quiet(SIZE),
    )
    more = shape_pairs("base", SIZE.pairs, seed + 1, SIZE.error_rate)
    LatentActionSFTTrainer(model, args, more, processing_class=processor).train()
    model.save_pretrained(folder / "model")
    divergence = [row["policy/backbone_kl"] for row in cloning.history if "policy/backbone_kl" in row]
    return {
        "parameters": sum(p.numel() for p in model.policy.parameters()),
        "cloning_seconds": spent,
        # The mean of the last steps, each over another batch.
        "backbone_kl": sum(divergence[-5:]) / len(divergence[-5:]),
    }


def measured(speaker: CodeSpeaker, tasks: Tasks, seed: int) -> dict[str, Any]:
    """Rewards of the likeliest codes, sampled reward, and what RL does not reward."""
    found = {}
    for name in ("held_out", "other_style"):
        rows = getattr(tasks, name)
        found[name] = sum(rewards_of(rows, speaker.say(rows))) / len(rows)
    described = [row for row in tasks.sampled if "answer" not in row]
    questions = [row for row in tasks.sampled if "answer" in row]
    torch.manual_seed(seed)
    texts = [text for _ in range(SAMPLES) for text in speaker.say(described, 1.0, DESCRIPTION_TOKENS)]
    sampled = [r for _ in range(SAMPLES) for r in rewards_of(questions, speaker.say(questions, 1.0))]
    found["fluent_described"] = sum(map(is_fluent, texts)) / len(texts)
    found["sampled"] = sum(sampled) / len(sampled)
    found["small_talk"] = perplexities(speaker, tasks)["marginal"]
    return found


def before_rl(folder: Path, policy: tuple[int, int], seed: int) -> Path:
    """Where the figures before RL are written."""
    return folder / f"before-{policy[0]}x{policy[1]}-{seed}.json"


def run(folder: Path, policy: tuple[int, int], seed: int, rate: float) -> dict[str, Any]:
    """GRPO of one policy, after what comes before it where that is not there."""
    layers, width = policy
    work = folder / "work"
    space, start = work / f"space-{seed}" / "model", work / f"{layers}x{width}-{seed}"
    tasks = Tasks.load(SIZE.questions, SIZE.others)
    if not space.is_dir():
        shutil.rmtree(space.parent, ignore_errors=True)
        learn(Cell("space", "learn", seed, {"coverage_coef": 0.0, "stages": STAGES_BEFORE}), SIZE, space.parent)
    before = before_rl(folder, policy, seed)
    if not before.is_file() or not (start / "model").is_dir():
        figures = cloned(space, layers, width, seed, start)
        model = LatentActionModel.from_pretrained(start / "model", backbone=load_backbone(SIZE))
        speaker = CodeSpeaker(model, load_processor(SIZE))
        write(before, {"layers": layers, "width": width, "seed": seed, **figures, **measured(speaker, tasks, seed)})
    cell = Cell(f"{layers}x{width}", "codes", seed, {"action_sampling": "arithmetic"})
    speaker, curve, _ = train_codes(cell, SIZE, start, tasks, rate, start / "model")
    return {
        "layers": layers,
        "width": width,
        "seed": seed,
        "rate": rate,
        "curve": curve.points,
        "rl_seconds": curve.points[-1]["seconds"],
        **measured(speaker, tasks, seed),
    }


def write(path: Path, figures: dict[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(figures) + "\n", encoding="utf-8")


def result(folder: Path, policy: tuple[int, int], seed: int, rate: float) -> dict[str, Any]:
    path = folder / f"{policy[0]}x{policy[1]}-{rate:g}-{seed}.json"
    if not path.is_file():
        with contextlib.redirect_stdout(io.StringIO()):
            figures = run(folder, policy, seed, rate)
        write(path, figures)
    found = json.loads(path.read_text(encoding="utf-8"))
    print(path.stem, {k: round(v, 3) for k, v in found.items() if isinstance(v, float)}, flush=True)
    return found


def validation(found: dict[str, Any]) -> float:
    """Mean of the validation curve, by which a rate is chosen."""
    return sum(point["reward"] for point in found["curve"]) / len(found["curve"])


def spread(values: list[float], digits: int = 3) -> str:
    mean = sum(values) / len(values)
    return f"{mean:.{digits}f} ({min(values):.{digits}f}–{max(values):.{digits}f})"


def tables(before: list[list[dict[str, Any]]], after: list[list[dict[str, Any]]]) -> str:
    """One row a policy, of its runs on each seed."""
    header = ["policy", "parameters", "rate", "KL to the backbone", "held out before RL", "held out", "sampled"]
    header += ["other style", "fluent descriptions", "perplexity, small talk", "s of RL"]
    rows = []
    for start, end in zip(before, after):
        first = end[0]
        rows.append(
            [
                f"{first['layers']} × {first['width']}",
                f"{start[0]['parameters'] / 1e6:.2f} M",
                f"{first['rate']:g}",
                spread([s["backbone_kl"] for s in start]),
                spread([s["held_out"] for s in start]),
                *[spread([e[name] for e in end]) for name in MEASURED],
                spread([e["small_talk"] for e in end], 0),
                spread([e["rl_seconds"] for e in end], 0),
            ]
        )
    return table(header, rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output_dir", type=Path, default=Path("outputs/policy_size"))
    args = parser.parse_args()
    torch.set_num_threads(1)
    logging.set_verbosity_error()
    rates = {
        policy: max(RATES, key=lambda rate: validation(result(args.output_dir, policy, SEEDS[0], rate)))
        for policy in POLICIES
    }
    after = [[result(args.output_dir, policy, seed, rates[policy]) for seed in SEEDS] for policy in POLICIES]
    before = [
        [json.loads(before_rl(args.output_dir, policy, seed).read_text(encoding="utf-8")) for seed in SEEDS]
        for policy in POLICIES
    ]
    print(tables(before, after))
    shutil.rmtree(args.output_dir / "work", ignore_errors=True)


if __name__ == "__main__":
    main()
