"""Perplexity of given answers, against the probabilities of whole sequences worked out one text at a time."""

import copy
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from tiny_models import latent

from latent_trl.data.collator import LatentActionDataCollator
from latent_trl.evaluation.perplexity import LAWS, Perplexity, answer_perplexity, text_perplexity

ROWS = [
    {"prompt": [{"role": "user", "content": "what is it?"}], "reference": "a boat", "images": [0]},
    {"prompt": [{"role": "user", "content": "why?"}], "reference": "so", "images": []},
    {"prompt": [{"role": "user", "content": "and here, again?"}], "reference": "two red boats", "images": [1]},
]


@pytest.fixture(scope="module")
def some():
    """A model, its processor and rows with pictures and without."""
    model, tiny = latent("llava")
    side = tiny.processor.image_processor.crop_size["height"]
    noise = np.random.default_rng(0).integers(0, 255, (2, side, side, 3), dtype=np.uint8)
    rows = [{**row, "images": [Image.fromarray(noise[i]) for i in row["images"]]} for row in ROWS]
    return model, tiny.processor, rows


@torch.no_grad()
def log_probs_by_hand(model, processor, row, law):
    """Log-probability of each token of one answer, from the model's own outputs over the whole sequence."""
    words = {"prompt": row["prompt"], "completion": row["reference"], "images": row["images"]}
    batch = LatentActionDataCollator(processor, vision_token_ids=model.config.vision_token_ids)([words])
    ids, vision = batch["input_ids"], batch["vision"]
    start = int(batch["loss_mask"][0].nonzero()[0])
    states, positions = model.encode(ids, batch["attention_mask"], **vision)
    policy = model.forward(ids, batch["attention_mask"], **vision).action_logits[0]
    found = []
    for t in range(start, ids.shape[1]):
        if law == "backbone":
            logits = model.backbone(input_ids=ids, attention_mask=batch["attention_mask"], **vision).logits[0, t - 1]
            found.append(logits.log_softmax(-1)[ids[0, t]])
            continue
        weights = policy[t - 1].softmax(-1)
        if law != "marginal":
            choice = policy[t - 1] if law == "most_likely" else model.infer(states, ids)[0, t - 1]
            weights = torch.nn.functional.one_hot(choice.argmax(), len(weights)).float()
        each = [
            model.read(states[:, t - 1 : t], torch.tensor([[k]]))[0, 0].softmax(-1)[ids[0, t]]
            for k in range(model.config.num_codes)
        ]
        found.append((weights * torch.stack(each)).sum().log())
    return torch.stack(found)


@pytest.mark.parametrize("law", LAWS)
def test_the_perplexity_is_that_of_the_tokens_taken_one_by_one(some, law):
    model, processor, rows = some
    found = text_perplexity(model, processor, rows, law=law, batch_size=2)
    by_hand = [log_probs_by_hand(model, processor, row, law) for row in rows]
    assert found.tokens == [len(part) for part in by_hand]
    # A byte is a token, and the turn ends with one.
    assert found.tokens == [len(row["reference"]) + 1 for row in rows]
    assert found.nats == pytest.approx([-part.sum().item() for part in by_hand], rel=1e-4)
    assert found.value == pytest.approx(torch.cat(by_hand).mean().neg().exp().item(), rel=1e-4)


def test_only_the_laws_of_the_policy_see_what_rl_changes(some):
    model, processor, rows = some
    moved = copy.deepcopy(model)
    with torch.no_grad():
        moved.policy.head.weight.neg_()
    for law in LAWS:
        before, after = (text_perplexity(m, processor, rows, law=law).value for m in (model, moved))
        assert (before == after) == (law in ("inferred", "backbone")), law


def test_the_mean_runs_over_tokens_and_the_interval_over_texts():
    found = Perplexity(nats=[2.0, 4.0], tokens=[1, 3])
    assert found.value == pytest.approx(math.e**1.5)
    interval = found.interval()
    assert interval.estimate == pytest.approx(found.value) and interval.count == 2
    assert (interval.low, interval.high) == pytest.approx((math.e ** (4 / 3), math.e**2))


def test_answers_may_be_given_as_messages_or_to_plain_prompts(some):
    model, processor, rows = some
    messages = [[{"role": "assistant", "content": row["reference"]}] for row in rows]
    assert text_perplexity(model, processor, rows, messages) == text_perplexity(model, processor, rows)
    text_model, tiny = latent("llama")
    plain = [{"prompt": "one and ", "reference": "one"}, {"prompt": "two", "reference": " and two"}]
    found = text_perplexity(text_model.train(), tiny.processor, plain)
    assert found.tokens == [4, 9] and text_model.training


def test_wrong_arguments_are_named(some):
    model, processor, rows = some
    with pytest.raises(ValueError, match=r"`law` must be one of \['most_likely', .* got 'greedy'"):
        text_perplexity(model, processor, rows, law="greedy")
    with pytest.raises(ValueError, match=r"each of the 3 rows; got 3, empty or missing at \[1\]"):
        text_perplexity(model, processor, rows, ["a", " ", "b"])
    with pytest.raises(ValueError, match=r"column `reference` by default.*missing at \[0\]"):
        text_perplexity(model, processor, [{"prompt": "a"}])
    bare = copy.deepcopy(model)
    bare.inverse_dynamics = None
    with pytest.raises(ValueError, match="no inverse_dynamics"):
        text_perplexity(bare, processor, rows, law="inferred")


def test_empty_answers_are_left_out(some):
    model, processor, rows = some
    found = answer_perplexity(model, processor, rows, ["a boat", " ", "why"])
    expected = text_perplexity(model, processor, [rows[0], rows[2]], ["a boat", "why"], law="backbone")
    assert found == expected and found.interval().count == 2
    nothing = answer_perplexity(model, processor, rows, ["", "", ""])
    assert math.isnan(nothing.value) and nothing.interval().count == 0 and math.isnan(nothing.interval().low)


CARDS = Path(__file__).parents[2] / "model_cards"


def pocket():
    from transformers import AutoModelForImageTextToText, AutoProcessor

    from latent_trl import LatentActionModel

    backbone = AutoModelForImageTextToText.from_pretrained(CARDS / "pocket-vlm", dtype=torch.float32)
    model = LatentActionModel.from_pretrained(CARDS / "pocket-vlm-latent-actions", backbone=backbone)
    return model, AutoProcessor.from_pretrained(CARDS / "pocket-vlm", padding_side="left")


def test_broken_language_is_unlikely():
    pytest.importorskip("easy_vqa")
    from latent_trl.data.shapes import shape_questions

    model, processor = pocket()
    rows = shape_questions("test", 24)
    said = [f"it is {answer}." if answer not in ("yes", "no") else f"{answer}." for answer in rows["answer"]]
    fluent = answer_perplexity(model, processor, rows, said).value
    broken = answer_perplexity(model, processor, rows, [f"is {text[:-1]} is it." for text in said]).value
    assert broken > 2 * fluent


@pytest.mark.slow
def test_reward_earned_by_broken_language_shows(tmp_path):
    """RL on the number of times that a word is said: reward rises, and so does the perplexity of the answers."""
    pytest.importorskip("easy_vqa")
    from latent_trl import LatentActionGRPOConfig, LatentActionGRPOTrainer
    from latent_trl.data.shapes import shape_questions
    from latent_trl.evaluation.answers import answer

    def count(prompts, completions, **columns):
        return [float(completion[0]["content"].split().count("is")) for completion in completions]

    model, processor = pocket()
    rows = shape_questions("test", 120, seed=11)

    def measured():
        found = answer(model, processor, rows, count, max_new_tokens=12)
        return found.mean_reward, answer_perplexity(model, processor, rows, found.texts, batch_size=32).interval()

    reward, before = measured()
    options = {"per_device_train_batch_size": 64, "num_generations": 8, "max_completion_length": 12, "beta": 0.0}
    options |= {"action_temperature": 2.0, "learning_rate": 3e-4, "max_steps": 60, "on_collapse": "ignore"}
    args = LatentActionGRPOConfig(str(tmp_path), use_cpu=True, save_strategy="no", disable_tqdm=True, **options)
    LatentActionGRPOTrainer(model, count, args, train_dataset=shape_questions("rl"), processing_class=processor).train()
    later, after = measured()
    assert later > reward + 0.3
    assert after.low > before.high
