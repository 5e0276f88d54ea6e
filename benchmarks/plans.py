"""
Plans on the shape questions: what a space of plans says before RL, and the curves of RL over it.

    python benchmarks/plans.py --size pocket --spaces 0 1 2 --seeds 0 1 2
    python benchmarks/reproduction/rare.py && python benchmarks/plans.py --size rare --spaces 0 1 2 --seeds 0 1 2
    python benchmarks/plans.py --size reduced

A space is learned without a reward from prompts of all kinds about pictures of the split `base`; learning stops when
its ceiling on validation questions is flat. RL asks the questions of the split `rl`. All figures are of test
questions, and of requests to describe their pictures, that neither of the two has seen. Settings are the same for both
sizes, but for the least probability of a branch. Answers under a plan are greedy, so that all plans answer the test
questions once, and a curve looks up the answers of the plans that are chosen. A space is kept and used again.

Tokens beside it are the runs of `benchmarks/reproduction` on the same backbones, questions and rollouts.
"""

import argparse
import json
import shutil
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForImageTextToText, AutoProcessor, TrainerCallback, set_seed

sys.path[:0] = [str(Path(__file__).parent / "reproduction")]

from matrix import SIZES  # noqa: E402
from tasks import Tasks, is_fluent  # noqa: E402

from latent_trl import (  # noqa: E402
    PlanBanditConfig,
    PlanBanditTrainer,
    PlanConfig,
    PlanGRPOConfig,
    PlanGRPOTrainer,
    PlanModel,
    PlanPPOConfig,
    PlanPPOTrainer,
    PlanSpaceConfig,
    PlanSpaceTrainer,
)
from latent_trl.data.prompts import PromptEncoder  # noqa: E402
from latent_trl.data.shapes import DESCRIPTION_REQUESTS, shape_pairs, shape_questions  # noqa: E402
from latent_trl.generation.answers import end_tokens  # noqa: E402
from latent_trl.rewards.calling import RewardCaller  # noqa: E402
from latent_trl.rewards.exact_match import ExactMatchReward  # noqa: E402
from latent_trl.trainer.plans.report import report_plans  # noqa: E402

MIN_PROB = {"pocket": 0.02, "rare": 0.01}
ROLLOUTS = (256, 512, 1024, 1920, 3840)
QUESTION_TOKENS, DESCRIPTION_TOKENS = 12, 24
ROOT = Path(__file__).resolve().parents[1]
REWARD = ExactMatchReward()
ARMS = {
    "bandit": (PlanBanditTrainer, PlanBanditConfig, {}),
    "bandit, shared rewards": (PlanBanditTrainer, PlanBanditConfig, {"share_rewards": True}),
    "bandit, T = 0.3": (PlanBanditTrainer, PlanBanditConfig, {"exploration_temperature": 0.3}),
    "grpo": (PlanGRPOTrainer, PlanGRPOConfig, {}),
    "ppo": (PlanPPOTrainer, PlanPPOConfig, {}),
}
SAMPLES = 10_000


def learned_space(size: str, seed: int, args: argparse.Namespace, folder: Path) -> tuple[PlanModel, Any, float]:
    """A space of plans, the processor, and the processor seconds that learning took; learned where it is not there."""
    backbone = AutoModelForImageTextToText.from_pretrained(SIZES[size].backbone, dtype="float32")
    processor = AutoProcessor.from_pretrained(SIZES[size].backbone)
    if (folder / "model").is_dir():
        return PlanModel.from_pretrained(folder / "model", backbone=backbone), processor, float("nan")
    shutil.rmtree(folder, ignore_errors=True)  # of a run that was stopped
    set_seed(seed)
    pairs = shape_pairs("base", args.prompts, seed=seed)
    rows = [{"prompt": row["messages"][:-1], "images": row["images"]} for row in pairs]
    trainer = PlanSpaceTrainer(
        PlanModel(backbone, PlanConfig(num_plans=args.plans, seed=seed)),
        PlanSpaceConfig(
            str(folder / "space"),
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
        reward_funcs=REWARD,
    )
    before = time.process_time()
    trainer.train()
    spent = time.process_time() - before
    trainer.save_model(str(folder / "model"))
    return trainer.model, processor, spent


def before_rl(model: PlanModel, processor: Any, tasks: Tasks) -> tuple[dict[str, float], torch.Tensor]:
    """Figures of all plans on test questions and requests to describe, and their rewards `[questions, K]`."""
    requests = [
        {"prompt": [{"role": "user", "content": DESCRIPTION_REQUESTS[i % 5]}], "images": row["images"]}
        for i, row in enumerate(tasks.held_out[:60])
    ]
    encoder = PromptEncoder(processor)
    ends = end_tokens(model.backbone, processor.tokenizer, {}) or []
    options = {"ends": ends, "is_fluent": is_fluent}
    asked = report_plans(model, encoder, tasks.held_out, QUESTION_TOKENS, reward=RewardCaller(REWARD), **options)
    told = report_plans(model, encoder, requests, DESCRIPTION_TOKENS, **options)
    return {**asked.metrics(), "fluent_descriptions": told.metrics()["fluent"]}, asked.rewards


class Chosen(TrainerCallback):
    """What the chosen plans are worth on the test questions after so many rollouts, each question by itself."""

    def __init__(self, trainer: Any, tasks: Tasks, rewards: torch.Tensor):
        self.trainer, self.rewards = trainer, rewards
        prompts = [trainer.encoder(row) for row in tasks.held_out]
        batches = [trainer.encoder.collate(prompts[i : i + 100]) for i in range(0, len(prompts), 100)]
        self.states = [states for batch in batches for states in trainer.states_of(batch)]
        self.curve: dict[str, list[float]] = {}
        self.rollouts = trainer.args.rollout_prompts * trainer.args.num_generations

    def on_step_end(self, args, state, control, **kwargs):
        batches, left = divmod(state.global_step, args.num_iterations)
        if left == 0 and batches * self.rollouts in ROLLOUTS:
            plans = self.trainer.logits(self.states).argmax(dim=1)
            self.curve[str(batches * self.rollouts)] = self.rewards.gather(1, plans[:, None])[:, 0].tolist()


def changed(model: PlanModel, **changes: Any) -> PlanModel:
    """The plans of a model in one whose configuration differs in these fields."""
    other = PlanModel(model.backbone, replace(model.plan_config, **changes))
    other.plans.load_state_dict(model.plans.state_dict())
    return other


def forget(model: PlanModel, seed: int) -> None:
    """Gives the model a chooser that knows nothing."""
    torch.manual_seed(seed)
    for module in model.chooser.modules():
        if isinstance(module, torch.nn.Linear):
            module.reset_parameters()
    torch.nn.init.zeros_(model.chooser.attended.weight)
    for parameter in model.chooser.switch.parameters() if model.has_switch else ():
        torch.nn.init.zeros_(parameter)


def curve(
    arm: str, model: PlanModel, processor: Any, tasks: Tasks, rewards: torch.Tensor, seed: int, args: Any, folder: Path
) -> dict[str, Any]:
    """Rewards of the greedy answers to the test questions after so many rollouts, and what updates cost."""
    trainer_class, config_class, options = ARMS[arm]
    forget(model, seed)
    batches = args.rollouts // (config_class.rollout_prompts * config_class.num_generations)
    trainer = trainer_class(
        model,
        REWARD,
        config_class(
            str(folder),
            max_steps=batches * config_class.num_iterations,
            max_completion_length=QUESTION_TOKENS,
            save_strategy="no",
            seed=seed,
            use_cpu=True,
            disable_tqdm=True,
            logging_steps=1000,
            **options,
        ),
        train_dataset=list(shape_questions("rl", args.rl_questions, seed=0)),
        processing_class=processor,
    )
    chosen, spent = Chosen(trainer, tasks, rewards), {"rollouts": 0.0}
    trainer.add_callback(chosen)
    roll_out = trainer.roll_out

    def timed(batch: int) -> None:
        before = time.process_time()
        roll_out(batch)
        spent["rollouts"] += time.process_time() - before

    trainer.roll_out = timed
    before = time.process_time()
    trainer.train()
    updates = time.process_time() - before - spent["rollouts"]
    return {"curve": chosen.curve, "rollout_seconds": spent["rollouts"], "update_seconds": updates}


def interval(runs: list[list[list[float]]], seed: int = 0) -> tuple[float, float, float]:
    """The mean, and its 95 % interval by a bootstrap over spaces, runs of a space and questions `[S][R][Q]`."""
    values = torch.tensor(runs)
    spaces, seeds, questions = values.shape
    generator = torch.Generator().manual_seed(seed)
    means = []
    for _ in range(SAMPLES // 10):
        some = values[torch.randint(spaces, (spaces,), generator=generator)]
        some = some[:, torch.randint(seeds, (seeds,), generator=generator)]
        some = some[:, :, torch.randint(questions, (questions,), generator=generator)]
        means.append(some.mean())
    low, high = torch.stack(means).quantile(torch.tensor([0.025, 0.975])).tolist()
    return values.mean().item(), low, high


def main(arguments: list[str] | None = None) -> list[dict[str, Any]]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=[*MIN_PROB, "reduced"], default="pocket")
    parser.add_argument("--spaces", type=int, nargs="+", default=[0])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0], help="of RL")
    parser.add_argument("--arms", nargs="+", choices=list(ARMS), default=["bandit"])
    parser.add_argument("--plans", type=int, default=16)
    parser.add_argument("--prompts", type=int, default=300, help="prompts that the space is learned from")
    parser.add_argument("--space_steps", type=int, default=80)
    parser.add_argument("--rollouts", type=int, default=1920)
    parser.add_argument("--rl_questions", type=int, default=900)
    parser.add_argument("--questions", type=int, default=300, help="test questions")
    parser.add_argument("--validation", type=int, default=60)
    parser.add_argument("--reads_plans", action="store_true", help="the chooser reads plans (chooser_reads_plans)")
    parser.add_argument("--output_dir", type=Path, default=ROOT / "outputs" / "plans")
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args(arguments)
    if args.size == "reduced":
        args.size, args.space_steps, args.rollouts, args.questions, args.prompts = "pocket", 20, 512, 100, 100
        args.output_dir = args.output_dir / "reduced"
    torch.set_num_threads(args.threads)
    tasks, results = Tasks.load(args.questions, args.validation), []
    for space in args.spaces:
        folder = args.output_dir / f"{args.size}-{space}"
        model, processor, seconds = learned_space(args.size, space, args, folder)
        if args.reads_plans:
            model = changed(model, chooser_reads_plans=True)
        figures, rewards = before_rl(model, processor, tasks)
        found: dict[str, Any] = {"size": args.size, "space": space, "space_seconds": seconds, **figures, "runs": {}}
        for arm in args.arms:
            found["runs"][arm] = [
                curve(arm, model, processor, tasks, rewards, seed, args, folder / f"{arm}-{seed}")
                for seed in args.seeds
            ]
        results.append(found)
        kind = "-reads-plans" if args.reads_plans else ""
        (folder / f"figures{kind}-{'-'.join(args.arms)}.json").write_text(json.dumps(found) + "\n", encoding="utf-8")
        print(json.dumps({name: value for name, value in found.items() if name != "runs"}, indent=1), flush=True)
    for arm in args.arms:
        runs = [found["runs"][arm] for found in results]
        for count in runs[0][0]["curve"]:
            mean, low, high = interval([[run["curve"][count] for run in own] for own in runs])
            of_spaces = ", ".join(
                f"{sum(sum(r['curve'][count]) for r in own) / len(own) / args.questions:.3f}" for own in runs
            )
            print(f"{args.size}, {arm}, {count} rollouts: {mean:.3f} ({low:.3f}-{high:.3f}); spaces {of_spaces}")
        seconds = [(run["rollout_seconds"], run["update_seconds"]) for own in runs for run in own]
        rolled, updated = (sum(column) / len(seconds) for column in zip(*seconds, strict=True))
        print(f"{args.size}, {arm}: {rolled:.1f} s of rollouts, {updated:.1f} s of updates a run")
    return results


if __name__ == "__main__":
    main()
