"""
Plans on the shape questions: what a space of plans says before RL, and the curve of the bandit over it.

    python benchmarks/plans.py --size pocket --seeds 0
    python benchmarks/reproduction/rare.py && python benchmarks/plans.py --size rare --seeds 0

The space is learned without a reward from prompts of all kinds about pictures of the split `base`; learning stops when
its ceiling on validation questions is flat. The bandit asks the questions of the split `rl`. All figures are of test
questions, and of requests to describe their pictures, that neither of the two has seen. Settings are the same for both
sizes, but for the least probability of a branch.
"""

import argparse
import json
import sys
import time
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForImageTextToText, AutoProcessor, set_seed

sys.path[:0] = [str(Path(__file__).parent / "reproduction")]

from matrix import SIZES  # noqa: E402
from tasks import Tasks, is_fluent  # noqa: E402

from latent_trl import (  # noqa: E402
    PlanBanditConfig,
    PlanBanditTrainer,
    PlanConfig,
    PlanModel,
    PlanSpaceConfig,
    PlanSpaceTrainer,
)
from latent_trl.data.shapes import DESCRIPTION_REQUESTS, shape_pairs, shape_questions  # noqa: E402
from latent_trl.rewards.exact_match import ExactMatchReward  # noqa: E402
from latent_trl.trainer.plans.report import report_plans  # noqa: E402

MIN_PROB = {"pocket": 0.02, "rare": 0.01}
ROLLOUTS = (256, 512, 1024)
QUESTION_TOKENS, DESCRIPTION_TOKENS = 12, 24
ROOT = Path(__file__).resolve().parents[1]


def learned_space(size: str, seed: int, args: argparse.Namespace, folder: Path) -> tuple[PlanSpaceTrainer, float]:
    """A space of plans, and the processor seconds that it took."""
    backbone = AutoModelForImageTextToText.from_pretrained(SIZES[size].backbone, dtype="float32")
    processor = AutoProcessor.from_pretrained(SIZES[size].backbone)
    pairs = shape_pairs("base", args.prompts, seed=seed)
    rows = [{"prompt": row["messages"][:-1], "images": row["images"]} for row in pairs]
    trainer = PlanSpaceTrainer(
        PlanModel(backbone, PlanConfig(num_plans=args.plans, seed=seed)),
        PlanSpaceConfig(
            str(folder),
            max_steps=args.space_steps,
            max_completion_length=DESCRIPTION_TOKENS,
            branch_min_prob=MIN_PROB[size],
            seed=seed,
            use_cpu=True,
            disable_tqdm=True,
        ),
        train_dataset=rows,
        eval_dataset=Tasks.load(args.questions, args.validation).validation,
        processing_class=processor,
        reward_funcs=ExactMatchReward(),
    )
    before = time.process_time()
    trainer.train()
    return trainer, time.process_time() - before


def before_rl(trainer: PlanSpaceTrainer, tasks: Tasks) -> dict[str, float]:
    """Figures of all plans on test questions and requests to describe."""
    requests = [
        {"prompt": [{"role": "user", "content": DESCRIPTION_REQUESTS[i % 5]}], "images": row["images"]}
        for i, row in enumerate(tasks.held_out[:60])
    ]
    model, encoder, ends = trainer.model, trainer.encoder, trainer.ends
    asked = report_plans(
        model, encoder, tasks.held_out, QUESTION_TOKENS, ends, reward=trainer.caller, is_fluent=is_fluent
    )
    told = report_plans(model, encoder, requests, DESCRIPTION_TOKENS, ends, is_fluent=is_fluent)
    return {**asked.metrics(), "fluent_descriptions": told.metrics()["fluent"]}


def curve(model: PlanModel, processor: Any, tasks: Tasks, seed: int, args: argparse.Namespace, folder: Path) -> dict:
    """Reward of the greedy answers to the test questions after so many rollouts, and what an update costs."""
    trainer = PlanBanditTrainer(
        model,
        ExactMatchReward(),
        PlanBanditConfig(
            str(folder),
            max_steps=max(ROLLOUTS) * PlanBanditConfig.num_iterations // 128,
            max_completion_length=QUESTION_TOKENS,
            eval_strategy="steps",
            eval_steps=20,
            save_strategy="no",
            measure_ceiling=False,
            seed=seed,
            use_cpu=True,
            disable_tqdm=True,
        ),
        train_dataset=list(shape_questions("rl", args.rl_questions, seed=0)),
        eval_dataset=tasks.held_out,
        processing_class=processor,
    )
    trainer.train()
    rewards = {row["step"]: row["eval_reward"] for row in trainer.state.log_history if "eval_reward" in row}
    return {str(count): rewards[count * PlanBanditConfig.num_iterations // 128] for count in ROLLOUTS}


def main(arguments: list[str] | None = None) -> list[dict[str, Any]]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=sorted(MIN_PROB), default="pocket")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--plans", type=int, default=16)
    parser.add_argument("--prompts", type=int, default=300, help="prompts that the space is learned from")
    parser.add_argument("--space_steps", type=int, default=80)
    parser.add_argument("--rl_questions", type=int, default=900)
    parser.add_argument("--questions", type=int, default=300, help="test questions")
    parser.add_argument("--validation", type=int, default=60)
    parser.add_argument("--output_dir", type=Path, default=ROOT / "outputs" / "plans")
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args(arguments)
    torch.set_num_threads(args.threads)
    tasks, results = Tasks.load(args.questions, args.validation), []
    for seed in args.seeds:
        set_seed(seed)
        folder = args.output_dir / f"{args.size}-{seed}"
        space, seconds = learned_space(args.size, seed, args, folder / "space")
        found = {"size": args.size, "seed": seed, "space_steps": space.state.global_step, "space_seconds": seconds}
        found |= before_rl(space, tasks)
        found["rewards"] = curve(space.model, space.encoder.processing_class, tasks, seed, args, folder / "bandit")
        results.append(found)
        print(json.dumps(found, indent=1), flush=True)
        (folder / "figures.json").write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
        (folder / "plans.md").write_text(space.report.table(), encoding="utf-8")
    return results


if __name__ == "__main__":
    main()
