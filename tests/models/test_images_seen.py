"""A state has seen an image when one stands at or before it: the same in learning, scoring and generation."""

from contextlib import contextmanager

import pytest
import torch
from PIL import Image
from tiny_models import IMAGE, latent

from latent_trl.data.collator import LatentActionDataCollator
from latent_trl.evaluation.perplexity import text_perplexity
from latent_trl.trainer.sft.trainer import guided_loss
from latent_trl.trainer.space.objective import LatentActionSpaceObjective

LENGTH = 5


@pytest.fixture(scope="module")
def perturbed():
    return latent("llava")


def turns(images: int = 1):
    """A question without an image and its answer, then one with it."""
    said = [("user", "who a b?"), ("assistant", "c d e f"), ("user", "and this?"), ("assistant", "g h i")]
    messages = [{"role": role, "content": [{"type": "text", "text": text}]} for role, text in said]
    if images:
        messages[2]["content"].insert(0, {"type": "image"})
    pictures = [Image.new("RGB", (16, 16), (200, 30, 90))] * images
    return {"messages": messages, "images": pictures}


@pytest.fixture(scope="module")
def conversation(perturbed):
    """A batch of two such turns, and beside it of the same without the image."""
    model, tiny = perturbed
    collate = LatentActionDataCollator(tiny.processor, vision_token_ids=model.config.vision_token_ids)
    return collate([{**turns(), "_row": 0}, {**turns(images=0), "_row": 1}])


def expected_states(model, batch):
    """The rule, spelled out position by position."""
    call = model.backbone_view.encode(batch["input_ids"], batch["attention_mask"], **batch["vision"])
    states = model.projector(call.states).clone()
    for row, ids in enumerate(batch["input_ids"].tolist()):
        if IMAGE in ids:
            states[row, ids.index(IMAGE) :] = call.states[row, ids.index(IMAGE) :]
    return states, call.states


@contextmanager
def states_read(model):
    """The states that policy and inverse dynamics model are given inside the block."""
    seen = []
    components = (model.policy, model.inverse_dynamics)
    handles = [c.register_forward_pre_hook(lambda module, args: seen.append(args[0])) for c in components]
    yield seen
    for handle in handles:
        handle.remove()


@torch.no_grad()
def test_learning_and_passes_read_the_states_of_the_rule(perturbed, conversation):
    model, batch = perturbed[0], conversation
    wanted, plain = expected_states(model, batch)
    first = batch["input_ids"][0].tolist().index(IMAGE)
    assert batch["loss_mask"][0, :first].any(), "an answer must stand before the image"
    assert not torch.equal(wanted[0, :first], plain[0, :first]) and torch.equal(wanted[0, first:], plain[0, first:])
    encoded, _ = model.encode(batch["input_ids"], batch["attention_mask"], **batch["vision"])
    assert torch.equal(encoded, wanted)
    with states_read(model) as seen:
        for stage in ("inverse_dynamics", "joint", "policy"):
            LatentActionSpaceObjective(stage)(model, batch)
        for guidance in ("inferred", "policy"):
            guided_loss(model, batch, guidance)
    assert len(seen) == 5 and all(torch.equal(states, wanted) for states in seen)


@torch.no_grad()
@pytest.mark.parametrize("law", ["most_likely", "inferred"])
def test_perplexity_reads_them(perturbed, conversation, law):
    model, tiny = perturbed
    messages, images = turns()["messages"], turns()["images"]
    text = messages[3]["content"][0]["text"]
    with states_read(model) as seen:
        text_perplexity(model, tiny.processor, [{"prompt": messages[:3], "images": images}], [text], law=law)
    wanted, _ = expected_states(model, conversation)
    shown = conversation["attention_mask"][0].bool()
    torch.testing.assert_close(seen[0][0], wanted[0, shown], atol=1e-5, rtol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("row", [0, 1])
@pytest.mark.parametrize("padding", [0, 3])
@pytest.mark.parametrize(
    "options", [{}, {"use_cache": False}, {"cache_implementation": "static"}, {"num_return_sequences": 3}], ids=str
)
def test_generation_reads_them_too(perturbed, conversation, row, padding, options):
    model, _ = perturbed
    ids, mask = conversation["input_ids"][row : row + 1], conversation["attention_mask"][row : row + 1]
    ids = ids[mask.bool()][None]
    prompt = torch.cat([ids.new_zeros(1, padding), ids], dim=1)
    inputs = {"input_ids": prompt, "attention_mask": torch.cat([ids.new_zeros(1, padding), ids * 0 + 1], dim=1)}
    if row == 0:
        inputs["pixel_values"] = conversation["vision"]["pixel_values"]
    settings = {"max_new_tokens": LENGTH, "min_new_tokens": LENGTH}
    settings |= {"output_context_states": True, "return_dict_in_generate": True, "action_do_sample": False}
    out = model.generate(**inputs, **settings, **options)
    whole = out.sequences[:1, padding:]
    vision = {"pixel_values": inputs["pixel_values"]} if row == 0 else {}
    wanted, _ = model.encode(whole, torch.ones_like(whole), **vision)
    for states in out.context_states:
        torch.testing.assert_close(states[padding:], wanted[0, :-1], atol=1e-4, rtol=1e-4)


@torch.no_grad()
def test_turns_one_after_the_other_from_a_cache_are_as_all_at_once(perturbed, conversation):
    """The first turn is answered without the image; then the image comes, and the text goes on from the cache."""
    model, _ = perturbed
    ids = conversation["input_ids"][:1][conversation["attention_mask"][:1].bool()][None]
    first = ids[0].tolist().index(IMAGE)
    settings = {"max_new_tokens": 1, "return_dict_in_generate": True, "action_do_sample": False}
    before = model.generate(ids[:, : first - 1], **settings)
    pixels = conversation["vision"]["pixel_values"]
    whole = model.generate(ids, pixel_values=pixels, output_context_states=True, **settings)
    after = model.generate(ids, pixel_values=pixels, past_key_values=before.past_key_values, **settings)
    assert torch.equal(after.action_ids, whole.action_ids)
    torch.testing.assert_close(after.action_log_probs, whole.action_log_probs, atol=1e-4, rtol=0)
    wanted, _ = model.encode(ids, torch.ones_like(ids), pixel_values=pixels)
    torch.testing.assert_close(whole.context_states, wanted, atol=1e-4, rtol=1e-4)


def test_states_seen_are_counted_position_by_position(perturbed):
    model, _ = perturbed
    ids = torch.tensor([[0, 5, IMAGE, IMAGE, 6, 7], [0, 0, 5, 6, 7, 8], [IMAGE, 5, 6, IMAGE, 7, 8]])
    wanted = [[0, 0, 1, 1, 1, 1], [0] * 6, [1] * 6]
    assert model.has_image(ids).tolist() == [[bool(x) for x in row] for row in wanted]
    states = torch.randn(3, 6, 32)
    for wrong in (model.has_image(ids).any(dim=1), model.has_image(ids)[:, :1]):
        with pytest.raises(ValueError, match=r"`has_image` must be \(3, 6\), one for each state"):
            model.context_states(states, wrong)
