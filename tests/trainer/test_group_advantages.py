"""Advantages of groups against loops over their definitions, and against TRL's own."""

import math

import pytest
import torch
from rl_models import prompts, skip_without_token_scoring
from tiny_models import llama
from trl import GRPOConfig, GRPOTrainer

from latent_trl.trainer.rollout.advantages import (
    STD_EPS,
    grpo_advantages,
    nan_std,
    normalize_then_sum,
    reinforce_advantages,
    rloo_advantages,
    weighted_rewards,
)

NAN = math.nan
# Groups of four: all scored, two not, one alone scored, none scored, all equal.
REWARDS = [1.0, 0.0, 2.5, -1.0, NAN, 3.0, NAN, 1.0, NAN, NAN, 2.0, NAN, NAN, NAN, NAN, NAN, 0.5, 0.5, 0.5, 0.5]
SECOND = [0.0, 1.0, NAN, 2.0, 1.0, NAN, 0.5, 0.0, 4.0, NAN, 1.0, NAN, NAN, NAN, NAN, NAN, 0.2, 0.1, 0.9, NAN]
SIZE = 4


def numbers(values):
    return [value for value in values if value == value]


def mean(values):
    kept = numbers(values)
    return sum(kept) / len(kept) if kept else NAN


def std(values):
    """Over n - 1; 0 for a single number."""
    kept = numbers(values)
    if not kept:
        return NAN
    return math.sqrt(sum((x - mean(kept)) ** 2 for x in kept) / max(len(kept) - 1, 1))


def groups(values, size=SIZE):
    return [values[i : i + size] for i in range(0, len(values), size)]


def by_hand_grpo(rewards, scale, size=SIZE):
    out = []
    for group in groups(rewards, size):
        for value in group:
            divisor = {"group": std(group) + STD_EPS, "batch": std(rewards) + STD_EPS, "none": 1.0}[scale]
            out.append((value - mean(group)) / divisor)
    return out


def by_hand_rloo(rewards, scale, size=SIZE):
    out = []
    for group in groups(rewards, size):
        for i, value in enumerate(group):
            out.append(value - mean(group[:i] + group[i + 1 :]))
    if scale == "batch":
        middle, spread = mean(out), std(out)
        out = [(value - middle) / (spread + STD_EPS) for value in out]
    return out


def by_hand_reinforce(rewards, scale, size=SIZE):
    divisor = 1.0 if scale == "none" else std(rewards) + STD_EPS
    return [(value - mean(rewards)) / divisor for value in rewards]


def close(found, wanted):
    wanted = torch.tensor(wanted, dtype=torch.float64)
    torch.testing.assert_close(found.double(), wanted, atol=1e-5, rtol=1e-5, equal_nan=True)
    assert found.isfinite().any()


@pytest.mark.parametrize(
    "function, by_hand, scales",
    [
        (grpo_advantages, by_hand_grpo, ("group", "batch", "none")),
        (rloo_advantages, by_hand_rloo, ("batch", "none")),
        (reinforce_advantages, by_hand_reinforce, ("batch", "none")),
    ],
)
def test_advantages_are_the_loops(function, by_hand, scales):
    for scale in scales:
        close(function(torch.tensor(REWARDS), SIZE, scale), by_hand(REWARDS, scale))
        complete = [float(i * i % 7) for i in range(12)]
        close(function(torch.tensor(complete), SIZE, scale), by_hand(complete, scale))


def test_groups_of_one():
    """A group of one has nothing to be compared with, but for the batch's mean."""
    rewards = torch.tensor([1.0, NAN, 3.0])
    assert grpo_advantages(rewards, 1, "group").nan_to_num(0.0).tolist() == [0.0] * 3
    assert rloo_advantages(rewards, 1).nan_to_num(0.0).tolist() == [0.0] * 3
    close(reinforce_advantages(rewards, 1), by_hand_reinforce(rewards.tolist(), "batch", 1))


def test_weighted_rewards_leave_out_what_is_none():
    rewards = torch.tensor([[1.0, 2.0], [NAN, 2.0], [1.0, NAN], [NAN, NAN]])
    found = weighted_rewards(rewards, torch.tensor([0.5, 3.0]))
    torch.testing.assert_close(found, torch.tensor([6.5, 6.0, 0.5, NAN]), equal_nan=True)


def test_normalize_then_sum_is_the_loops():
    weights = [0.5, 2.0]
    each = [by_hand_grpo(REWARDS, "group"), by_hand_grpo(SECOND, "group")]
    total = []
    for pair in zip(*each, strict=True):
        parts = [weight * value for weight, value in zip(weights, pair, strict=True) if value == value]
        total.append(sum(parts) if parts else NAN)
    wanted = [(value - mean(total)) / (std(total) + STD_EPS) for value in total]
    found = normalize_then_sum(torch.tensor([REWARDS, SECOND]).T, torch.tensor(weights), SIZE)
    close(found, wanted)


def test_deviation():
    rows = torch.tensor([[1.0, NAN, 3.0], [NAN, NAN, 2.0], [NAN, NAN, NAN]])
    found = nan_std(rows, dim=1)
    torch.testing.assert_close(found, torch.tensor([2.0**0.5, 0.0, NAN]), equal_nan=True)


@pytest.fixture(scope="module")
def stock(tmp_path_factory):
    """TRL's trainer, whose rewards are those that it is told, for rollouts of one token."""
    skip_without_token_scoring()
    tiny = llama(num_hidden_layers=1)
    told = {}

    def one(completions, **columns):
        return [None if value != value else value for value in told["rewards"][0]]

    def two(completions, **columns):
        return [None if value != value else value for value in told["rewards"][1]]

    args = GRPOConfig(
        str(tmp_path_factory.mktemp("stock")),
        use_cpu=True,
        bf16=False,
        per_device_train_batch_size=len(REWARDS),
        num_generations=SIZE,
        max_completion_length=1,
        gradient_checkpointing=False,
        report_to="none",
    )
    trainer = GRPOTrainer(tiny.model, [one, two], args, train_dataset=prompts(8), processing_class=tiny.processor)
    trainer.model.train()

    def advantages(rewards, weights=(1.0, 1.0), **fields):
        told["rewards"] = rewards
        trainer.reward_weights = torch.tensor(weights)
        for name, value in fields.items():
            setattr(trainer, name, value)
        rows = [trainer.train_dataset[i // SIZE] for i in range(len(REWARDS))]
        return trainer._generate_and_score_completions(rows)["advantages"]

    return advantages


@pytest.mark.parametrize("scale", ["group", "batch", "none"])
def test_grpos_are_trls(stock, scale):
    theirs = stock([REWARDS, SECOND], (0.5, 2.0), scale_rewards=scale, multi_objective_aggregation="sum_then_normalize")
    total = weighted_rewards(torch.tensor([REWARDS, SECOND]).T, torch.tensor([0.5, 2.0]))
    torch.testing.assert_close(grpo_advantages(total, SIZE, scale).nan_to_num(0.0), theirs, atol=1e-5, rtol=1e-5)
    assert theirs.abs().max() > 0.1


def test_normalize_then_sum_is_trls(stock):
    theirs = stock([REWARDS, SECOND], (0.5, 2.0), multi_objective_aggregation="normalize_then_sum")
    rewards = torch.tensor([REWARDS, SECOND]).T
    ours = normalize_then_sum(rewards, torch.tensor([0.5, 2.0]), SIZE).nan_to_num(0.0)
    torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-5)
    assert theirs.abs().max() > 0.1
