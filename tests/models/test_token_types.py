"""Backbones that read a prompt both ways: what is learned from must not see what it is to say."""

import pytest
import torch
import transformers
from PIL import Image
from tiny_models import CHAT_TEMPLATE, IMAGE, latent, make_tokenizer

from latent_trl.data.collator import LatentActionDataCollator

ANSWERS = ("it is red", "it is rex")


def stock_processor():
    return transformers.PaliGemmaProcessor(
        transformers.SiglipImageProcessorPil(size={"height": 16, "width": 16}, image_seq_length=4),
        make_tokenizer(),
        chat_template=CHAT_TEMPLATE,
    )


def batch_of(processor, answer: str, turns: int = 1, text_alone: bool = True):
    """Two rows: with an image, and without; only the last answers' last letters differ between `ANSWERS`."""
    question = {"role": "user", "content": "what is it?"}
    said = [{"role": "assistant", "content": "it is red"}, question] * (turns - 1)
    messages = [question, *said, {"role": "assistant", "content": answer}]
    rows = [{"messages": messages, "images": [Image.new("RGB", (16, 16), "red")]}]
    collate = LatentActionDataCollator(processor, vision_token_ids=[IMAGE])
    return collate([*rows, {"messages": messages}] if text_alone else rows)


@torch.no_grad()
def states_of(model, batch):
    return model.backbone_view.encode(batch["input_ids"], batch["attention_mask"], **batch["vision"]).states


@pytest.mark.parametrize("turns", [1, 2])
@pytest.mark.parametrize("processor", ["own", "stock"])
def test_learning_from_a_bidirectional_prompt_does_not_see_the_answer(processor, turns):
    model, tiny = latent("paligemma")
    processor = tiny.processor if processor == "own" else stock_processor()
    one, other = (batch_of(processor, answer, turns) for answer in ANSWERS)
    assert "labels" not in one["vision"] and "token_type_ids" in one["vision"]
    differing = one["input_ids"] != other["input_ids"]
    assert differing.any(dim=1).all()
    first = differing.int().argmax(dim=1).tolist()
    for row, (a, b) in enumerate(zip(states_of(model, one), states_of(model, other), strict=True)):
        torch.testing.assert_close(a[: first[row]], b[: first[row]], atol=1e-5, rtol=1e-5)
        assert (a[first[row]] - b[first[row]]).abs().max() > 1e-3


def test_a_bidirectional_prompt_is_read_as_generate_reads_it():
    """States of a row with an image equal those of the backbone's own pass, where answers are of type 1."""
    model, tiny = latent("paligemma")
    batch = batch_of(tiny.processor, ANSWERS[0], text_alone=False)
    types = batch["loss_mask"].long()
    types[:, batch["loss_mask"][0].int().argmax() :] = 1
    inputs = {"pixel_values": batch["vision"]["pixel_values"], "token_type_ids": types}
    with torch.no_grad():
        own = model.backbone.model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], **inputs)
    torch.testing.assert_close(states_of(model, batch), own.last_hidden_state, atol=1e-5, rtol=1e-5)


def test_a_row_without_an_image_does_not_depend_on_its_batch():
    model, tiny = latent("paligemma")
    batch = batch_of(tiny.processor, ANSWERS[0])
    alone = {k: batch[k][1:] for k in ("input_ids", "attention_mask")} | {"vision": {}}
    shown = alone["attention_mask"][0].bool()
    mixed = states_of(model, batch)[1, shown]
    torch.testing.assert_close(mixed, states_of(model, alone)[0, shown], atol=1e-5, rtol=1e-5)


def test_token_types_of_images_stay():
    model, tiny = latent("gemma3")
    batch = batch_of(tiny.processor, ANSWERS[0])
    vision = {k: v for k, v in batch["vision"].items() if k != "completion_mask"}
    assert batch["vision"]["token_type_ids"].sum() == 4
    assert torch.equal(states_of(model, batch), states_of(model, {**batch, "vision": vision}))


@pytest.mark.parametrize("family", ["paligemma", "gemma3", "llava"])
def test_the_type_of_a_generated_token_is_what_generate_appends(family):
    model, tiny = latent(family)
    assert model.backbone_view.completion_type == tiny.later_type
