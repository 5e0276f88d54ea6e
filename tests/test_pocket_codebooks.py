"""The latent action models in `model_cards/`: that their codes mean something, and that no trick earns their reward."""

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForImageTextToText, AutoProcessor

from latent_trl import LatentActionModel
from latent_trl.data.collator import LatentActionDataCollator
from latent_trl.data.shapes import ANSWERS, chitchat, shape_pairs, shape_questions
from latent_trl.evaluation.answers import answer
from latent_trl.rewards.exact_match import ExactMatchReward
from latent_trl.trainer.space.objective import LatentActionSpaceObjective

CARDS = Path(__file__).parents[1] / "model_cards"
LEARNED = "pocket-vlm-latent-actions"


@pytest.fixture(scope="module")
def processor():
    return AutoProcessor.from_pretrained(CARDS / "pocket-vlm")


@pytest.fixture(scope="module")
def questions():
    return shape_questions("test", 240, seed=11)


def load(name: str) -> LatentActionModel:
    backbone = AutoModelForImageTextToText.from_pretrained(CARDS / "pocket-vlm", dtype=torch.float32)
    return LatentActionModel.from_pretrained(CARDS / name, backbone=backbone)


def reward_of(model, processor, questions, **kwargs) -> float:
    return answer(model, processor, questions, ExactMatchReward(), max_new_tokens=12, **kwargs).mean_reward


@pytest.fixture(scope="module")
def learned():
    return load(LEARNED)


@pytest.fixture(scope="module")
def start(learned, processor, questions):
    return reward_of(learned, processor, questions)


def test_codes_carry_information(learned, processor):
    collator = LatentActionDataCollator(processor, vision_token_ids=learned.config.vision_token_ids, max_length=96)
    objective = LatentActionSpaceObjective("joint")
    pairs, text = shape_pairs("test", 200, seed=5), chitchat()
    pairs_objective = LatentActionSpaceObjective("joint")
    with torch.no_grad():
        for rows in [pairs[:50], pairs[50:100], pairs[100:150], pairs[150:]]:
            batch = collator([dict(zip(rows, values)) for values in zip(*rows.values())])
            objective(learned, batch)
            pairs_objective(learned, batch)
        last = text.select(range(len(text) - 150, len(text)))
        for i in range(0, 150, 50):
            objective(learned, collator([last[j] for j in range(i, i + 50)]))
    both, paired = objective.figures.drain(), pairs_objective.figures.drain()
    # Of the backbone's own cross-entropy, which codes hardly better on small talk: there they are many wordings.
    for figures, least in ((paired, 0.2), (both, 0.1)):
        gap = figures["world_model/ce_gap_no_action"]
        assert gap >= least * (figures["world_model/ce"] + gap)
    assert both["world_model/ce_gap_random_action"] > 0.05
    assert both["codebook/used"] >= 64
    assert both["codebook/perplexity"] >= 32
    assert both["codebook/distinct_next_tokens"] > 2


def test_blind_answers_score_less_than_the_model(start, questions):
    reward = ExactMatchReward()
    for said in ANSWERS:
        texts = [f"it is {said}."] * len(questions)
        scores = reward(prompts=None, completions=texts, answer=questions["answer"])
        assert sum(scores) / len(scores) < start - 0.2


@pytest.mark.parametrize("seed", range(4))
def test_permuted_codes_score_no_better_than_the_model(learned, processor, questions, start, seed):
    codes = learned.codebook.weight.data.clone()
    order = torch.randperm(len(codes), generator=torch.Generator().manual_seed(seed))
    learned.codebook.weight.data.copy_(codes[order])
    try:
        # Two standard errors of a mean of 240 zeros and ones.
        assert reward_of(learned, processor, questions) <= start + 0.065
    finally:
        learned.codebook.weight.data.copy_(codes)


@pytest.mark.parametrize("algorithm", ["grpo", "ppo"])
def test_rl_raised_the_reward(processor, questions, start, algorithm):
    assert reward_of(load(f"{LEARNED}-{algorithm}"), processor, questions) >= start + 0.15


def test_rl_looks_at_the_picture(processor, questions):
    model = load(f"{LEARNED}-grpo")
    swapped = [{**questions[i], "images": questions[(i + 7) % len(questions)]["images"]} for i in range(len(questions))]
    assert reward_of(model, processor, swapped) < reward_of(model, processor, questions) - 0.3
