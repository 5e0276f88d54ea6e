"""Reward functions of every kind keep working; what they do wrong is named, with its sample."""

import asyncio
import math

import pytest
import torch
from rl_models import prompts
from tiny_models import latent, latent_config, make_tokenizer
from transformers import LlamaConfig, LlamaForSequenceClassification

from latent_trl import (
    LatentActionGRPOConfig,
    LatentActionGRPOTrainer,
    LatentActionPPOConfig,
    LatentActionPPOTrainer,
)
from latent_trl.rewards.calling import RewardError

COMMON = {
    "use_cpu": True,
    "bf16": False,
    "per_device_train_batch_size": 4,
    "max_completion_length": 4,
    "logging_steps": 1,
    "learning_rate": 1e-2,
    "save_strategy": "no",
    "disable_tqdm": True,
    "max_steps": 1,
}


def build(folder, reward, kind: str = "grpo", processing_classes=None, **options):
    model, tiny = latent("llama", latent_config(use_projector=False))
    options = {**COMMON, **options}
    if kind == "ppo":
        trainer_class, args = LatentActionPPOTrainer, LatentActionPPOConfig(str(folder), **options)
    else:
        trainer_class = LatentActionGRPOTrainer
        args = LatentActionGRPOConfig(str(folder), **{"num_generations": 4, **options})
    return trainer_class(
        model,
        reward,
        args,
        train_dataset=prompts(8),
        processing_class=tiny.processor,
        reward_processing_classes=processing_classes,
    )


def last_log(trainer):
    trainer.train()
    return next(log for log in trainer.state.log_history if "reward" in log)


def length(completions, **columns):
    return [float(len(completion)) for completion in completions]


def with_bad(value):
    def bad(completions, **columns):
        return [0.0, 1.0, value, 0.5][: len(completions)]

    return bad


@pytest.mark.parametrize("kind", ["grpo", "ppo"])
@pytest.mark.parametrize(
    "value, words",
    [
        (math.nan, "returned nan for sample 2 of 4"),
        (math.inf, "returned inf for sample 2 of 4"),
        (-math.inf, "returned -inf for sample 2 of 4"),
        ("0.7", "returned '0.7', a str, for sample 2 of 4"),
        ([1.0], r"returned \[1.0\], a list, for sample 2 of 4"),
        (1 + 2j, "a complex, for sample 2 of 4"),
    ],
)
def test_what_is_not_a_number_is_named(tmp_path, kind, value, words):
    with pytest.raises(RewardError, match=f"'bad' .*{words}"):
        build(tmp_path, with_bad(value), kind).train()


@pytest.mark.parametrize(
    "answer, words",
    [
        ([0.0] * 3, "'wrong' returned 3 rewards for 4 completions.* sample 3 of 4"),
        ([0.0] * 5, "'wrong' returned 5 rewards for 4 completions"),
        ([], "'wrong' returned 0 rewards for 4 completions"),
        (0.5, "'wrong' must return a list of 4 numbers, got 0.5"),
        ("abcd", "'wrong' must return a list of 4 numbers, got 'abcd'"),
        (None, "'wrong' must return a list of 4 numbers, got None"),
    ],
)
def test_wrong_lengths_and_kinds_are_named(tmp_path, answer, words):
    def wrong(completions, **columns):
        return answer

    with pytest.raises(RewardError, match=words):
        build(tmp_path, wrong).train()


def test_function_that_raises_is_named_with_its_sample(tmp_path):
    def judge(prompts, completions, completion_ids, **columns):
        if any(ids == poison[0] for ids in completion_ids):
            raise KeyError("no score")
        return [0.0] * len(completions)

    poison = [None]
    trainer = build(tmp_path, judge)
    original = trainer.draw_samples

    def remember(inputs):
        samples = original(inputs)
        poison[0] = samples[0].completion_ids
        return samples

    trainer.draw_samples = remember
    with pytest.raises(RewardError, match="'judge' raised KeyError: 'no score' on sample 0 of 4 .*prompt '") as error:
        trainer.train()
    assert isinstance(error.value.__cause__, KeyError)


def test_function_that_raises_on_batches_only(tmp_path):
    def picky(completions, **columns):
        if len(completions) > 1:
            raise RuntimeError("too many")
        return [0.0]

    with pytest.raises(RewardError, match="'picky' raised RuntimeError: too many on a batch of 4 samples"):
        build(tmp_path, picky).train()


def test_async_function_that_fails_is_named(tmp_path):
    async def slow(completions, **columns):
        await asyncio.sleep(0)
        return [0.0, math.nan, 0.0, 0.0]

    async def broken(completions, **columns):
        raise TimeoutError("gone")

    with pytest.raises(RewardError, match="'slow' returned nan for sample 1"):
        build(tmp_path, slow).train()
    with pytest.raises(RewardError, match="'broken' raised TimeoutError: gone on sample 0"):
        build(tmp_path, broken).train()


def test_several_functions_sync_async_weighted_and_none(tmp_path):
    async def constant(completions, **columns):
        await asyncio.sleep(0)
        return [2.0] * len(completions)

    def sometimes(completions, **columns):
        return [1.0, None, 1.0, None]

    class Callable:
        __name__ = "callable_object"

        def __call__(self, completions, log_extra, log_metric, **columns):
            log_extra("size", [len(c) for c in completions])
            log_metric("mine", 3.0)
            return [True] * len(completions)

    trainer = build(tmp_path, [constant, sometimes, Callable()], reward_weights=[0.5, 2.0, 1.0])
    log = last_log(trainer)
    assert log["rewards/constant/mean"] == 2.0
    assert log["rewards/sometimes/mean"] == 1.0
    assert log["rewards/callable_object/mean"] == 1.0
    assert log["mine"] == 3.0
    assert log["reward"] == pytest.approx((0.5 * 2 + 1) + 2.0 * 0.5)
    assert len(trainer._logs["extra"]["size"]) == 4 and len(trainer._logs["extra"]["action_ids"]) == 4


def test_reward_model_scores_and_its_nan_is_named(tmp_path):
    tokenizer = make_tokenizer()
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_labels=1,
        pad_token_id=tokenizer.pad_token_id,
    )
    scorer = LlamaForSequenceClassification(config).eval()
    log = last_log(build(tmp_path, [scorer, length], processing_classes=[tokenizer, None]))
    name = next(key for key in log if key.startswith("rewards/") and "length" not in key and key.endswith("mean"))
    assert math.isfinite(log[name])
    with torch.no_grad():
        scorer.score.weight.fill_(math.nan)
    with pytest.raises(RewardError, match="reward model .* gave nan for sample 0 of 4"):
        build(tmp_path, scorer, processing_classes=tokenizer).train()


@pytest.mark.parametrize("kind", ["grpo", "ppo"])
def test_all_none_teaches_nothing_and_is_not_a_zero(tmp_path, kind):
    """TRL's documented treatment: the completions are left out, and the reward is logged as missing."""

    def silent(completions, **columns):
        return [None] * len(completions)

    trainer = build(tmp_path, silent, kind, beta=0.0)
    before = trainer.model.policy.head.weight.detach().clone()
    trainer.train()
    log = next(log for log in trainer.state.log_history if "reward" in log)
    assert log["reward"] is None
    assert torch.equal(before, trainer.model.policy.head.weight)


def test_overlong_punishment_is_added_before_advantages(tmp_path):
    def zero(completions, **columns):
        return [0.0] * len(completions)

    trainer = build(tmp_path, zero, overlong_buffer=2)
    log = last_log(trainer)
    assert log["rewards/soft_overlong_punishment/mean"] == log["reward"]
    # Never-ending completions have the maximum length, and the whole punishment.
    assert log["completions/clipped_ratio"] == 1.0 and log["reward"] == -1.0


def test_overlong_punishment_alone_makes_no_reward(tmp_path):
    def silent(completions, **columns):
        return [None, None, 0.0, 0.0]

    trainer = build(tmp_path, silent, overlong_buffer=2)
    trainer.model.train()
    samples = trainer.draw_samples([trainer.train_dataset[0]] * 4)
    assert trainer.rewards(samples, trainer.state).isnan().all(dim=1).tolist() == [True, True, False, False]


@pytest.mark.parametrize("name", ["tools", "rollout_func", "environment_factory"])
def test_what_cannot_work_is_refused_with_what_to_use(tmp_path, name):
    model, tiny = latent("llama", latent_config(use_projector=False))
    with pytest.raises(ValueError, match=f"`{name}` cannot be used over latent actions. Use reward functions"):
        LatentActionGRPOTrainer(
            model,
            length,
            LatentActionGRPOConfig(str(tmp_path), num_generations=4, **COMMON),
            train_dataset=prompts(8),
            processing_class=tiny.processor,
            **{name: [length]},
        )


@pytest.mark.parametrize(
    "options, words",
    [
        ({"use_vllm": True, "vllm_mode": "alone"}, "`vllm_mode` must be one of"),
        ({"temperature": 0.7}, "Use `action_temperature`"),
        ({"top_k": 5}, "Use `action_temperature`"),
        ({"preset": "ppo"}, "`preset` must be one of"),
        ({"overlong_buffer": 99}, "`overlong_buffer` must be between"),
        ({"dynamic_sampling_rounds": -1}, "`dynamic_sampling_rounds` must not be negative"),
    ],
)
def test_wrong_options_are_refused(tmp_path, options, words):
    with pytest.raises(ValueError, match=words):
        LatentActionGRPOConfig(str(tmp_path), num_generations=4, **{**COMMON, **options})


def test_data_set_smaller_than_a_rollout_batch_is_refused(tmp_path):
    with pytest.raises(ValueError, match="`train_dataset` has 8 prompts, fewer than the 16"):
        build(tmp_path, length, num_generations=2, per_device_train_batch_size=32)
