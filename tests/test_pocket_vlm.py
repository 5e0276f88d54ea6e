"""The pocket VLM in `model_cards/` loads with stock classes, sees, and knows more than it says."""

import importlib.util
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForImageTextToText, AutoProcessor, LlavaForConditionalGeneration, LlavaProcessor

pytest.importorskip("easy_vqa")

ROOT = Path(__file__).parents[1]
FOLDER = ROOT / "model_cards" / "pocket-vlm"

spec = importlib.util.spec_from_file_location("evaluate_pocket_vlm", ROOT / "examples/scripts/evaluate_pocket_vlm.py")
measure = importlib.util.module_from_spec(spec)
spec.loader.exec_module(measure)


@pytest.fixture(scope="module")
def model():
    return AutoModelForImageTextToText.from_pretrained(FOLDER).eval()


@pytest.fixture(scope="module")
def processor():
    return AutoProcessor.from_pretrained(FOLDER)


@pytest.fixture(scope="module")
def rows():
    return measure.shape_questions("test", limit=300)


@pytest.fixture(scope="module")
def reward(rows):
    score = measure.ExactMatchReward()
    return lambda said: sum(score(prompts=None, completions=said, answer=rows["answer"][:])) / len(rows)


@pytest.fixture(scope="module")
def greedy(model, processor, rows):
    return measure.answers(model, processor, rows)


def test_it_is_a_small_stock_llava(model, processor):
    assert isinstance(model, LlavaForConditionalGeneration) and isinstance(processor, LlavaProcessor)
    assert 3e6 < model.num_parameters() < 5e6
    assert model.dtype == torch.float32
    assert sum(file.stat().st_size for file in FOLDER.iterdir()) < 20e6


def test_tokenizer_and_generation_config_suit_batched_generation(model, processor):
    tokenizer = processor.tokenizer
    assert tokenizer.padding_side == "left"
    assert tokenizer.pad_token_id != tokenizer.eos_token_id
    assert model.generation_config.eos_token_id == tokenizer.eos_token_id
    assert model.generation_config.pad_token_id == tokenizer.pad_token_id
    assert tokenizer.decode(tokenizer("Déjà vu, 12!")["input_ids"]) == "Déjà vu, 12!"


def test_chat_template_takes_plain_and_structured_content_and_marks_the_assistant(processor, rows):
    plain = [{"role": "user", "content": "hi there"}, {"role": "assistant", "content": "hello"}]
    parts = [{"role": turn["role"], "content": [{"type": "text", "text": turn["content"]}]} for turn in plain]
    text = processor.apply_chat_template(plain)
    assert text == processor.apply_chat_template(parts) == "<|user|>hi there<|end|><|assistant|>hello<|end|>"
    prompt = processor.apply_chat_template(plain[:1], add_generation_prompt=True)
    assert prompt == "<|user|>hi there<|end|><|assistant|>"
    batch = measure.training_batch(processor, [measure.with_image(plain, rows[0]["images"][0])])
    generated = batch["input_ids"][batch["labels"] != -100]
    assert processor.tokenizer.decode(generated) == "hello<|end|>"
    assert (batch["input_ids"] == processor.tokenizer.convert_tokens_to_ids("<image>")).sum() == 16


def test_it_sees(model, processor, rows, reward, greedy):
    swapped = reward(measure.answers(model, processor, rows, shift=1))
    assert reward(greedy) > swapped + 0.15


def test_greedy_answers_leave_a_gap_to_what_the_states_hold(model, processor, rows, reward, greedy):
    fitted_on = measure.shape_questions("rl", limit=1200)
    states, test_states = (measure.prompt_states(model, processor, questions) for questions in (fitted_on, rows))
    torch.manual_seed(0)
    known = reward(measure.probe(states, fitted_on["answer"][:], test_states))
    assert 0.42 <= reward(greedy) <= 0.62
    assert known >= reward(greedy) + 0.2


def test_no_fixed_answer_comes_near(rows, reward, greedy):
    assert max(reward([answer] * len(rows)) for answer in measure.ANSWERS) < reward(greedy) - 0.25


def test_errors_lie_in_the_word_not_in_the_format(greedy):
    assert measure.share(measure.known_answers(), greedy) > 0.97
