"""Answers in broken language: how they are told, and what they are worth."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from rl_models import prompts, target_problem
from test_grpo_rollouts import build, rows
from tiny_models import latent

from latent_trl import (
    LatentActionGRPOConfig,
    LatentActionGRPOTrainer,
    LatentActionPPOConfig,
    LatentActionPPOTrainer,
    LatentActionRLOOConfig,
    LatentActionRLOOTrainer,
)
from latent_trl.models.spoken import excess_surprise
from latent_trl.trainer.rollout import language_guard
from latent_trl.trainer.rollout.language_guard import LanguageGuard, largest_surprise, least_where
from latent_trl.trainer.rollout.rollout import Rollout

TRAINERS = {
    "grpo": (LatentActionGRPOTrainer, LatentActionGRPOConfig),
    "rloo": (LatentActionRLOOTrainer, LatentActionRLOOConfig),
    "ppo": (LatentActionPPOTrainer, LatentActionPPOConfig),
}


def test_what_the_backbone_says_itself_does_not_surprise_it_on_average():
    model, _ = latent("llama")
    states = torch.randn(5, model.backbone_view.hidden_size, generator=torch.Generator().manual_seed(0)) * 4
    law = model.backbone_view.logits(states[None])[0].double().softmax(dim=-1)
    tokens = law.shape[1]
    excess = excess_surprise(model, states.repeat_interleave(tokens, dim=0), torch.arange(tokens).repeat(5))
    assert excess.std() > 0.1
    torch.testing.assert_close((law * excess.view(5, tokens)).sum(dim=1), torch.zeros(5).double(), atol=1e-5, rtol=0)


def test_surprise_is_the_largest_sum_from_the_beginning():
    excess = torch.tensor([[1.0, -3.0, 4.0, 9.0], [-1.0, -2.0, 0.5, 0.0], [2.0, 2.0, -5.0, 1.0]])
    mask = torch.tensor([[1, 1, 1, 0], [1, 1, 1, 1], [1, 1, 1, 1]])
    expected = [max(sum(row[: i + 1]) for i in range(n)) for row, n in zip(excess.tolist(), (3, 4, 4), strict=True)]
    assert largest_surprise(excess, mask).tolist() == expected == [2.0, -1.0, 4.0]


def brute_force(trainer, samples) -> list[float]:
    """By whole passes of the plain backbone, a sample at a time."""
    model, found = trainer.model, []
    for sample in samples:
        inputs = trainer.encoder.collate([sample.prompt])
        length = len(sample.completion_ids)
        ids = torch.cat([inputs["input_ids"], torch.tensor([sample.completion_ids])], dim=1)
        shown = {"pixel_values": inputs["pixel_values"]} if "pixel_values" in inputs else {}
        with torch.no_grad():
            logits = model.backbone(input_ids=ids, attention_mask=torch.ones_like(ids), **shown).logits
        log_probs = logits[0, -length - 1 : -1].double().log_softmax(dim=-1)
        sums = [0.0]
        for law, token in zip(log_probs, sample.completion_ids, strict=True):
            sums.append(sums[-1] - law[token].item() + (law.exp() * law).sum().item())
        found.append(max(sums[1:]))
    return found


@pytest.mark.parametrize("pictures", [(1, 1, 2, 1), (0, 0, 0, 0), (1, 0, 2, 0)], ids=["pictures", "text", "both"])
@pytest.mark.parametrize("states", [True, False])
def test_surprise_of_answers_is_that_of_the_plain_backbone(tmp_path, pictures, states):
    trainer = build(
        tmp_path, data=rows(pictures), language_guard=True, reuse_context_states=states, per_device_train_batch_size=8
    )
    samples = trainer.draw_samples([trainer.data[i] for i in (0, 0, 1, 1, 2, 2, 3, 3)])
    rollout = Rollout.of(samples, trainer._tokenizer.pad_token_id, torch.device("cpu"))
    found = trainer.guard.surprises(trainer.model, rollout, samples)
    np.testing.assert_allclose(found.numpy(), brute_force(trainer, samples), atol=1e-4)
    assert found.std() > 0.05
    # Answers that ran out of room, which `mask_truncated_completions` leaves out of the rollout, are told too.
    rollout.completion_mask = torch.zeros_like(rollout.completion_mask)
    torch.testing.assert_close(trainer.guard.surprises(trainer.model, rollout, samples), found, atol=1e-4, rtol=1e-4)
    # A part at a time, and with the backbone run again.
    trainer.guard.rows, trainer.guard.objective.encode = 3, True
    torch.testing.assert_close(trainer.guard.surprises(trainer.model, rollout, samples), found, atol=1e-4, rtol=1e-4)


def test_fence_is_of_the_first_answers_alone():
    guard = LanguageGuard(encoder=None, rows=4)
    first = torch.linspace(-4.0, 12.0, 64)
    assert guard.fence is None and not guard.broken(first[:40]).any()
    assert guard.fence is None and not guard.broken(first[40:]).any()
    low, high = np.quantile(first.numpy(), [0.25, 0.75])
    assert guard.fence == pytest.approx(high + 3 * (high - low), abs=1e-4)
    assert guard.broken(torch.tensor([guard.fence - 0.1, guard.fence + 0.1])).tolist() == [False, True]
    assert len(guard.seen) == 64
    assert guard.broken(torch.tensor([float("nan"), float("inf"), 0.0])).tolist() == [True, True, False]
    unread = LanguageGuard(encoder=None, rows=4)
    unread.broken(torch.tensor([float("nan"), *first[:63].tolist()]))
    assert unread.fence is None and len(unread.seen) == 63
    narrow = LanguageGuard(encoder=None, rows=4)
    narrow.broken(torch.full((64,), 0.5))
    assert narrow.fence == 0.5 + language_guard.LEAST_DISTANCE


def test_broken_answers_are_worth_the_least():
    nan = float("nan")
    rewards, broken = torch.tensor([3.0, nan, 1.0, 2.0, nan]), torch.tensor([True, True, False, False, False])
    torch.testing.assert_close(
        least_where(rewards, broken), torch.tensor([1.0, nan, 1.0, 2.0, nan]), equal_nan=True, atol=0, rtol=0
    )
    assert least_where(torch.full((2,), nan), broken[:2]).isnan().all()


def run_of(folder, kind, letters=None, **options):
    model, tokenizer, ids = target_problem()
    trainer_class, config_class = TRAINERS[kind]
    common = {"use_cpu": True, "bf16": False, "per_device_train_batch_size": 32, "num_generations": 8}
    common |= {"max_completion_length": 4, "learning_rate": 2e-2, "logging_steps": 1, "save_strategy": "no"}
    common |= {"disable_tqdm": True, "seed": 1, "beta": 1e-9}
    args = config_class(str(folder), **{**common, **options})
    gamed = ids[2]

    def share(completion_ids, **columns):
        return [sum(token == gamed for token in one) / len(one) for one in completion_ids]

    trainer = trainer_class(model, share, args, train_dataset=prompts(32), processing_class=tokenizer)
    return trainer, gamed


@pytest.fixture
def one_letter_surprises(monkeypatch):
    """The backbone expects everything but one letter."""

    def of(gamed):
        monkeypatch.setattr(language_guard, "excess_surprise", lambda model, states, ids: 9.0 * (ids == gamed).float())

    return of


@pytest.mark.parametrize("kind", TRAINERS)
def test_advantages_are_of_lowered_rewards_and_the_log_is_not(tmp_path, kind, one_letter_surprises, monkeypatch):
    trainer, gamed = run_of(tmp_path, kind, language_guard=True)
    one_letter_surprises(gamed)
    trainer.guard.seen = [0.0] * 64
    trainer.model.train()
    given, made = [], trainer.set_advantages

    def keep(rollout, rewards, total):
        given.append((rollout.completion_ids, rewards[:, 0], total))
        return made(rollout, rewards, total)

    monkeypatch.setattr(trainer, "set_advantages", keep)
    data = trainer.train_dataset
    trainer._generate_and_score_completions([data[i] for i in range(4) for _ in range(8)])
    ids, rewards, total = given[0]
    broken = (ids == gamed).any(dim=1)
    assert 0 < broken.sum() < len(broken)
    assert torch.equal(total, torch.where(broken, rewards.min(), rewards)) and not torch.equal(total, rewards)
    logged = trainer._metrics["train"]
    assert logged["reward"] == [pytest.approx(rewards.mean().item())]
    assert logged["language/broken"] == [pytest.approx(broken.float().mean().item())]
    assert logged["language/surprise"][0] > 0


@pytest.mark.parametrize("kind", TRAINERS)
def test_a_reward_that_is_earned_by_broken_language_is_not_learned(tmp_path, kind, one_letter_surprises):
    ends = {}
    for guarded in (False, True):
        trainer, gamed = run_of(tmp_path / str(guarded), kind, language_guard=guarded, max_steps=16)
        one_letter_surprises(gamed)
        if guarded:
            trainer.guard.seen = [0.0] * 64
        trainer.train()
        ends[guarded] = [entry["reward"] for entry in trainer.state.log_history if "reward" in entry]
    assert ends[False][-1] > 0.6 > 0.25 > ends[False][0]
    # Where the least is nothing, broken answers are worth nothing, as the others are.
    assert max(ends[True]) < 0.3


def test_the_fence_goes_on_with_a_run(tmp_path):
    saved = {"save_strategy": "steps", "save_steps": 3}
    first, _ = run_of(tmp_path, "grpo", language_guard=True, max_steps=3, **saved)
    first.train()
    # Whole batches are seen until there are enough.
    assert len(first.guard.seen) == 64 and first.guard.fence > 2
    second, _ = run_of(tmp_path, "grpo", language_guard=True, max_steps=4, **saved)
    second.train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
    assert second.guard.seen == first.guard.seen and second.guard.fence == first.guard.fence


def test_evaluation_is_not_guarded(tmp_path, monkeypatch):
    trainer, _ = run_of(tmp_path, "grpo", language_guard=True)
    monkeypatch.setattr(trainer.guard, "surprises", None)
    trainer.model.eval()
    total = torch.tensor([1.0, 2.0])
    assert trainer.guarded(total, SimpleNamespace(), []) is total


@pytest.mark.parametrize(
    "options, words",
    [
        ({"train_backbone": True}, "`train_backbone=True` that moves too"),
        ({"multi_objective_aggregation": "normalize_then_sum"}, "`language_guard=True` lowers the sum"),
    ],
)
def test_what_has_no_frozen_law_or_no_sum_is_refused(options, words):
    with pytest.raises(ValueError, match=words):
        LatentActionGRPOConfig("unused", use_cpu=True, bf16=False, language_guard=True, **options)
