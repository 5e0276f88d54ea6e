"""RL with rollouts from the engine: the same samples, states and updates, and what it learns."""

import pytest
import torch
from datasets import Dataset
from exact import SIZES, register_classes, tiny
from rl_models import prompts as target_prompts
from rl_models import target_problem, target_reward
from test_grpo_rollouts import letters, rows
from tiny_models import make_tokenizer

from latent_trl import (
    LatentActionGRPOConfig,
    LatentActionGRPOTrainer,
    LatentActionPPOConfig,
    LatentActionPPOTrainer,
    LatentActionRLOOConfig,
    LatentActionRLOOTrainer,
)

KINDS = {
    "grpo": (LatentActionGRPOTrainer, LatentActionGRPOConfig),
    "rloo": (LatentActionRLOOTrainer, LatentActionRLOOConfig),
    "ppo": (LatentActionPPOTrainer, LatentActionPPOConfig),
}
COMMON = {"use_cpu": True, "bf16": False, "logging_steps": 1, "save_strategy": "no", "disable_tqdm": True}
# The CPU's cache would take half of the memory.
ENGINE = {"use_vllm": True, "vllm_max_model_length": 128}


def build(folder, kind="grpo", model=None, reward=letters, data=None, tokenizer=None, **options):
    trainer_class, config_class = KINDS[kind]
    register_classes("LlamaForCausalLM")
    options = {**COMMON, "per_device_train_batch_size": 8, "max_completion_length": 6, **options}
    evaluated = options.pop("eval_dataset", None)

    trainer = trainer_class(
        model or tiny("llama"),
        reward,
        config_class(str(folder), **{"num_generations": 2, **options}),
        train_dataset=data or Dataset.from_list(rows(())),
        eval_dataset=evaluated,
        processing_class=tokenizer or make_tokenizer(),
    )
    trainer.current_gradient_accumulation_steps = 1
    return trainer


@pytest.fixture
def close():
    trainers = []
    yield trainers.append
    for trainer in trainers:
        if trainer.engine_source.engine is not None:
            trainer.engine_source.engine.close()


@pytest.mark.parametrize("truncated", [False, True])
def test_samples_have_the_states_and_log_probs_of_the_model(tmp_path, close, truncated):
    law = {"action_top_k": 5, "action_temperature": 1.2} if truncated else {}
    trainer = build(tmp_path, beta=0.1, **ENGINE, **law)
    close(trainer)
    trainer.model.train()
    data = rows(())
    samples = trainer.draw_samples([data[i] for i in (0, 0, 1, 1)])
    for sample in samples:
        ids = torch.tensor([sample.prompt.ids + sample.completion_ids])
        states, positions = trainer.model.encode(ids[:, :-1])
        torch.testing.assert_close(sample.context_states, states[0], atol=1e-5, rtol=1e-5)
        assert torch.equal(sample.position_ids, positions[0])
        assert (sample.action_support is not None) == truncated
    batch = trainer._generate_and_score_completions([data[i] for i in (0, 0, 1, 1)])
    mask = batch["completion_mask"].bool()
    difference = (batch["old_per_token_logps"] - batch["sampling_per_token_logps"]).abs()[mask]
    assert difference.max() < 1e-3
    torch.testing.assert_close(batch["importance_sampling_ratio"], torch.ones(4, 1), atol=1e-3, rtol=0)
    assert trainer._metrics["train"]["sampling/log_prob_difference"][-1] < 1e-3


def test_evaluation_answers_from_the_engine_with_the_policy_as_it_is(tmp_path, close):
    data = Dataset.from_list(rows(()))
    model = tiny("llama")
    own = build(tmp_path / "own", model=model, eval_dataset=data)
    trainer = build(tmp_path / "engine", model=model, eval_dataset=data, **ENGINE)
    close(trainer)
    first = own.evaluate()
    assert trainer.evaluate()["eval_reward"] == first["eval_reward"] and trainer.engine_source.engine is not None
    # Other weights at the same step, as those of the best checkpoint.
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.policy.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * parameter.shape[-1] ** -0.5)
    second = own.evaluate()
    assert second["eval_completions/mean_length"] > 0 and second["eval_reward"] != first["eval_reward"]
    assert trainer.evaluate()["eval_reward"] == second["eval_reward"]


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_learned_is_the_optimum(tmp_path, close, kind):
    model, tokenizer, ids = target_problem(**SIZES)
    options = {"max_completion_length": 4, "beta": 0.0, "learning_rate": 3e-3, "seed": 1, "max_steps": 60}
    options |= {"num_generations": 1 if kind == "ppo" else 16, "per_device_train_batch_size": 64, "num_iterations": 2}
    if kind != "ppo":
        # With less, one seed in three stops at three tokens of four, with and without an engine.
        options["entropy_coef"] = 0.1
    else:
        options |= {"value_learning_rate": 1e-2, "num_iterations": 4, "max_steps": 120}
    trainer = build(tmp_path, kind, model, target_reward(ids), target_prompts(64), tokenizer, **options, **ENGINE)
    close(trainer)
    trainer.train()
    history = [log for log in trainer.state.log_history if "rewards/share_of_target/mean" in log]
    rewards = [log["rewards/share_of_target/mean"] for log in history]
    assert sum(rewards[:3]) / 3 < 0.4 and sum(rewards[-5:]) / 5 > 0.8
    assert max(log["sampling/log_prob_difference"] for log in history) < 1e-3
    synced = [log for log in history if "engine/sync_bytes" in log]
    assert synced and synced[-1]["engine/sync_bytes"] == sum(p.numel() * 4 for p in model.policy.parameters())
