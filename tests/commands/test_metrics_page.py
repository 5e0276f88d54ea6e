"""The page of metrics has every figure that is logged or printed, none that nothing gives, and the alarms' ranges."""

import asyncio
import json
import re
from pathlib import Path

import pytest
import torch
from datasets import Dataset
from every_trainer import build
from learning_runs import build_sft, build_space, paired_rows, text_rows
from rewards.judge_server import JudgeServer
from rl_models import prompts
from test_distillation import build as build_distillation
from test_moe import build as build_experts
from test_policy_anchor import build as build_anchored
from tiny_models import llama, make_tokenizer
from transformers import TrainerCallback

from latent_trl import (
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
from latent_trl.commands.evaluate import LAWS, diversity
from latent_trl.commands.main import main
from latent_trl.rewards.weighted_sum import WeightedSumReward
from latent_trl.trainer.plans import rl_trainer, space_trainer
from latent_trl.trainer.rollout.importance import difference_figures
from latent_trl.trainer.run import health
from latent_trl.trainer.space import trainer as space

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "metrics.md").read_text(encoding="utf-8")
FIGURES, ALARMS = PAGE.split("## Alarms")
QUESTIONS = "latent_trl.data.shapes:shape_questions"
ONE_PLAN = ["--samples", "2", "--image-ablation", "--code-ceiling", "1", "--limit", "2", "--max-new-tokens", "2"]
# Names that a run gives stand in brackets on the page.
NAMES = {
    r"^rewards/[^/]+/(mean|std)$": r"rewards/<function>/\1",
    r"^reward/[a-z_]+": "reward/<function>",
    r"best of \d+$": "best of <samples>",
    r", plan \d+ for all prompts$": ", plan <number> for all prompts",
    r"^reference_perplexity/.*": "reference_perplexity/<law>",
    r"^judge/[a-z_]+_[a-z_]+$": "judge/<aspect>",
    r"^a_sum/.*": "<sum>/<function>",
    r"^a_judge/": "<judge>/",
}
SAVING = {"save_strategy": "no", "logging_steps": 1}
EVALUATING = {"eval_strategy": "steps", "eval_steps": 2}


class SkipsAnUpdate(TrainerCallback):
    """Counts an update as skipped, as numbers that are not finite would have it."""

    def __init__(self, trainer):
        self.trainer = trainer

    def on_step_begin(self, *args, **kwargs):
        self.trainer.health.skipped = 1


def figures_of_the_page() -> set[str]:
    cells = re.findall(r"^\| (`[^|]+?) \|", FIGURES, re.MULTILINE)
    return {name for cell in cells for name in re.findall(r"`([^`]+)`", cell)}


def general(name: str) -> str:
    for pattern, text in NAMES.items():
        name = re.sub(pattern, text, name)
    return name


def logged(trainer) -> set[str]:
    trainer.train()
    return {name for row in [*getattr(trainer, "history", []), *trainer.state.log_history] for name in row}


def learning(folder) -> set[str]:
    """Space, SFT and distillation, with evaluation and skipped rows."""
    skipping = {**EVALUATING, "on_bad_row": "skip"}
    found = logged(build_space(folder / "space", coverage_coef=0.1, eval_dataset=paired_rows(4), **skipping))
    sft = build_sft(folder / "sft", eval_dataset=paired_rows(3), **skipping)
    sft.add_callback(SkipsAnUpdate(sft))
    return found | logged(sft) | logged(build_distillation(folder / "plain", eval_dataset=prompts(4), **EVALUATING))


def rl(folder) -> set[str]:
    """Every algorithm and loss that logs something of its own."""
    runs = {
        "grpo": (
            "grpo",
            {"dynamic_sampling_rounds": 2, "entropy_coef": 0.01, "on_bad_row": "skip", "language_guard": True},
        ),
        "cispo": ("grpo", {"loss_type": "cispo", "epsilon_high": 5.0}),
        "vespo": ("grpo", {"loss_type": "vespo"}),
        "rloo": ("rloo", {}),
        "ppo": ("ppo", {"target_kl": 1e-9}),
    }
    found = set()
    for name, (kind, options) in runs.items():
        found |= logged(build(kind, folder / name, steps=4, **SAVING, **options))
    anchored = build_anchored(folder / "anchor", text_rows(), anchor_coef=0.1, max_steps=1)
    return found | logged(anchored) | logged(build_experts(folder / "experts", "Mixtral", train_backbone=True))


def lengths(completions, **columns):
    return [float(len(text) % 2) for text in completions]


def plan_trainers(folder) -> set[str]:
    """The space of plans, and RL over them."""
    tiny = llama(num_hidden_layers=2)
    tiny.model.generation_config.eos_token_id = list(range(2, 140))
    rows = Dataset.from_list([{"prompt": "what " * (1 + i % 3) + str(i)} for i in range(12)])
    common = {"use_cpu": True, "disable_tqdm": True, "max_completion_length": 4, "logging_steps": 1}
    options = {"per_device_train_batch_size": 4, "eval_steps": 2, "save_steps": 2, "max_steps": 2}
    options |= {"answers_per_prompt": 3, "branch_min_prob": 0.005}
    model = PlanModel(tiny.model, PlanConfig(num_plans=4, depth=1, rank=2))
    args = PlanSpaceConfig(str(folder / "plans"), **common, **options)
    learned = PlanSpaceTrainer(
        model, args, rows, rows.select(range(4)), make_tokenizer(), reward_funcs=lengths, is_fluent=str.islower
    )
    found = logged(learned)
    kinds = {
        (PlanBanditTrainer, PlanBanditConfig): 2,
        (PlanGRPOTrainer, PlanGRPOConfig): 2,
        (PlanPPOTrainer, PlanPPOConfig): 1,
    }
    common |= {"max_steps": 4, "num_iterations": 2, "rollout_prompts": 4, "ceiling_prompts": 4, "save_strategy": "no"}
    for (trainer, config), samples in kinds.items():
        own = {"share_rewards": True} if config is PlanBanditConfig else {}
        args = config(str(folder / config.__name__), num_generations=samples, **EVALUATING, **common, **own)
        found |= logged(trainer(model, lengths, args, rows, rows.select(range(4)), make_tokenizer()))
    model = PlanModel(tiny.model, PlanConfig(num_plans=4, depth=1, rank=2, segment="switch"))
    args = PlanGRPOConfig(str(folder / "switch"), num_generations=2, **common)
    return found | logged(PlanGRPOTrainer(model, lengths, args, rows, processing_class=make_tokenizer()))


def engine() -> set[str]:
    """What a rollout on an engine, or on servers, adds; the engine itself needs an environment of its own."""
    told = ""
    for name in ("engine.py", "servers.py"):
        source = (ROOT / "latent_trl" / "vllm" / name).read_text(encoding="utf-8")
        (costs,) = re.findall(r"        return (\{.*perf_counter\(\) - start.*\})", source)
        told += costs
    zeros = torch.zeros(2, 3)
    figures = difference_figures(zeros, zeros, zeros + 1, zeros + 1)
    return {f"engine/sync_{name}" for name in re.findall(r'"(\w+)":', told)} | set(figures)


def reward_functions(monkeypatch) -> set[str]:
    pytest.importorskip("openai")
    from latent_trl.rewards.judge import JudgeReward

    found: list[str] = []

    def log_metric(name, value):
        found.append(name)

    server = JudgeServer()
    judge = JudgeReward("a-judge", base_url=server.url, api_key="none", name="a_judge")
    question = [{"role": "user", "content": "what?"}]
    columns = {"prompts": [question], "completions": ["good"], "reference": ["reference"]}
    asyncio.run(judge(**columns, log_metric=log_metric))
    server.close()
    asyncio.run(WeightedSumReward([lengths], name="a_sum")(**columns, log_metric=log_metric))
    return set(found)


def evaluations(checkpoint, plan_folder, folder, monkeypatch) -> set[str]:
    server = JudgeServer()
    monkeypatch.chdir(folder)
    (folder / "metric_rows.py").write_text(
        "from latent_trl.data.shapes import shape_questions\n\n\ndef rows(split):\n"
        "    some = shape_questions(split).select(range(8))\n"
        "    return some.add_column('reference', some['answer'][:])\n\n\n"
        "def nothing(completions, **columns):\n    return [None] + [0.0] * (len(completions) - 1)\n"
    )
    options = {"model": "a-judge", "base_url": server.url, "template": "pcogalign"}
    rewards = ["--reward-funcs", "exact_match", "metric_rows:nothing"]
    judged = ["--judge", json.dumps(options), "--generations", "2", "--perplexity", *LAWS]
    runs = {
        "codes": [checkpoint, "metric_rows:rows", *rewards, *ONE_PLAN, *judged],
        "plans": [str(plan_folder / "chooser"), "metric_rows:rows", *rewards, *ONE_PLAN[2:]],
    }
    found = set()
    for name, words in runs.items():
        assert main(["evaluate", *words, "--output", f"{name}.json"]) == 0
        found |= set(json.loads((folder / f"{name}.json").read_text())["figures"])
    server.close()
    monkeypatch.setattr(
        "latent_trl.rewards.embedding.TextEmbedder", lambda name: lambda texts: torch.eye(len(texts)) + 0.1
    )
    return found | set(diversity([["a b", "c d"]], "an encoder"))


def test_the_page_has_what_is_logged_and_nothing_else(checkpoint, plans, tmp_path, monkeypatch):
    found = learning(tmp_path) | rl(tmp_path) | plan_trainers(tmp_path) | engine() | reward_functions(monkeypatch)
    found |= evaluations(checkpoint, plans, tmp_path, monkeypatch)
    found, page = {general(name) for name in found}, figures_of_the_page()
    unexplained = {name for name in found if name not in page and name.removeprefix("eval_") not in page}
    assert not unexplained
    never_given = {name for name in page if name not in found and f"eval_{name}" not in found}
    assert not never_given


def test_the_ranges_are_those_of_the_alarms():
    for said in (
        f"`world_model/ce_gap_random_action` below {space.MIN_RANDOM_GAP}",
        f"`codebook/perplexity` below {space.MIN_PERPLEXITY:g}. RL: below {health.MIN_PERPLEXITY:g}",
        f"`entropy` below {health.MIN_ENTROPY}",
        f"equal for {health.MOST_CONSTANT} rollout batches",
        f"`sampling/log_prob_difference` above {health.MAX_ENGINE_DIFFERENCE}",
        f"less than {space_trainer.LEAST_GAIN} above",
        f"within {rl_trainer.NEAR_CEILING} of it",
    ):
        assert said in ALARMS, said
    for said in (
        f"above {space.MIN_RANDOM_GAP};",
        f"below {space.MIN_PERPLEXITY:g} in learning or {health.MIN_PERPLEXITY:g} in RL",
        f"stays above {health.MIN_ENTROPY:g}".replace("0.", "."),
        f"mean below {health.MAX_ENGINE_DIFFERENCE:g}:".replace("0.", "."),
        f"{health.MOST_SKIPPED} in a row stop the run",
    ):
        assert said in FIGURES, said
