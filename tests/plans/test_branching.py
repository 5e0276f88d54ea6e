"""Alternatives by branching, beside a slow loop that reads everything anew at each token."""

import pytest
import torch
from PIL import Image

from latent_trl.data.prompts import PromptEncoder
from latent_trl.models.backbone import Backbone
from latent_trl.plans.branching import branch_answers
from latent_trl.plans.prompt_cache import PromptCache, decode_greedily

PROMPTS = ["a", "what is it?", "tell me more of that"]
LONGEST = 6


def text_rows():
    return [{"prompt": text} for text in PROMPTS]


def picture_rows():
    rows = []
    for i, text in enumerate(PROMPTS):
        images = [Image.new("RGB", (16, 16), (40 * i + 90 * j, 200, 20)) for j in range((1, 0, 2)[i])]
        content = [{"type": "image"} for _ in images] + [{"type": "text", "text": text}]
        rows.append({"prompt": [{"role": "user", "content": content}], "images": images})
    return rows


def encoded(tiny):
    """An encoder, and what it makes of the prompts."""
    encoder = PromptEncoder(tiny.processor)
    return encoder, [encoder({"_row": i, **row}) for i, row in enumerate(text_rows())]


def slow_law(view, inputs, answer):
    """Log-probabilities of the next token behind a prompt and some tokens, from a pass over the whole."""
    ids = torch.cat([inputs["input_ids"], torch.tensor([answer], dtype=torch.long)], dim=1)
    grown = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    types = {"token_type_ids", "mm_token_type_ids"}
    for name in types & inputs.keys():
        later = inputs[name].new_zeros(1, len(answer))
        grown[name] = torch.cat([inputs[name], later], dim=1)
    completion = torch.zeros_like(ids)
    completion[:, inputs["input_ids"].shape[1] :] = 1
    rest = {k: v for k, v in inputs.items() if k not in {"input_ids", "attention_mask"} | types}
    rest |= {k: v for k, v in grown.items() if k in types}
    with torch.no_grad():
        states = view.encode(ids, grown["attention_mask"], completion, **rest).states[:, -1:]
        logits = view.logits(states)[0, 0].float()
    logits[view.vision_token_ids] = -torch.inf
    return logits.log_softmax(dim=-1)


def slow_answer(view, inputs, end, begin=()):
    answer = list(begin)
    while len(answer) < LONGEST and (not answer or answer[-1] != end):
        answer.append(int(slow_law(view, inputs, answer).argmax()))
    return answer


def slow_branches(view, encoder, row, end, top_k, min_prob, budget):
    inputs = encoder.collate([encoder(row)])
    greedy = slow_answer(view, inputs, end)
    found, before = [], 0.0
    for step, token in enumerate(greedy):
        law = slow_law(view, inputs, greedy[:step])
        for other in law.topk(top_k).indices.tolist():
            if other != token and law[other].exp() >= min_prob:
                begin = [*greedy[:step], other]
                found.append((before + law[other].item(), slow_answer(view, inputs, end, begin)))
        before += law[token].item()
    found.sort(key=lambda one: -one[0])
    texts, kept = set(), []
    for log_prob, ids in [(0.0, greedy), *found[:budget]]:
        text = encoder.encoder.tokenizer.decode(ids, skip_special_tokens=True).strip()
        if text and text not in texts:
            texts.add(text)
            kept.append((ids, log_prob, ids[-1] == end))
    return kept


@pytest.mark.parametrize("family", ["llama", "gemma2", "gpt2", "llava", "qwen2_5_vl", "gemma3", "qwen3_vl", "idefics3"])
def test_branches_are_those_of_a_slow_loop(make_tiny, family):
    tiny = make_tiny(family)
    view, encoder = Backbone(tiny.model), PromptEncoder(tiny.processor)
    rows = picture_rows() if view.vision_token_ids else text_rows()
    end = encoder.encoder.tokenizer.eos_token_id
    options = {"top_k": 3, "min_prob": 0.01}
    prompts = [encoder({"_row": i, **row}) for i, row in enumerate(rows)]
    found = branch_answers(view, encoder, prompts, LONGEST, **options, max_branches=7, batch_size=4)
    for i, row in enumerate(rows):
        expected = slow_branches(view, encoder, {"_row": i, **row}, end, **options, budget=7)
        assert [(one.token_ids, one.ended) for one in found[i]] == [(ids, ended) for ids, _, ended in expected]
        assert [one.log_prob for one in found[i]] == pytest.approx([log_prob for _, log_prob, _ in expected], abs=1e-4)
    assert max(map(len, found)) > 3


def test_the_budget_keeps_the_likeliest_beginnings(tiny_llama):
    view = Backbone(tiny_llama.model)
    options = {"max_new_tokens": LONGEST, "top_k": 4, "min_prob": 0.001}
    wide = branch_answers(view, *encoded(tiny_llama), **options, max_branches=100)
    narrow = branch_answers(view, *encoded(tiny_llama), **options, max_branches=2)
    for many, few in zip(wide, narrow):
        assert 1 <= len(few) <= 3 < len(many)
        assert [one.token_ids for one in few] == [one.token_ids for one in many[: len(few)]]
        assert [one.log_prob for one in many[1:]] == sorted((one.log_prob for one in many[1:]), reverse=True)


def test_a_certain_backbone_has_one_answer(tiny_llama):
    found = branch_answers(Backbone(tiny_llama.model), *encoded(tiny_llama), LONGEST, min_prob=0.99)
    assert [len(answers) for answers in found] == [1, 1, 1]


def test_copied_rows_do_not_touch_each_other(tiny_llama):
    view, inputs = Backbone(tiny_llama.model), tiny_llama.text_inputs
    prompts = PromptCache.encode(view, inputs)
    first = decode_greedily(prompts.rows(torch.tensor([2, 0, 0, 1])), LONGEST, [])
    again = decode_greedily(prompts.rows(torch.tensor([0, 1, 2])), LONGEST, [])
    assert first.token_ids == [again.token_ids[i] for i in (2, 0, 0, 1)]
    assert not any(first.ended)


@pytest.mark.parametrize(
    "name, value", [("top_k", 1), ("min_prob", 0.0), ("min_prob", 1.0), ("max_branches", 0), ("max_new_tokens", 0)]
)
def test_settings_out_of_range_are_named(tiny_llama, name, value):
    with pytest.raises(ValueError, match=rf"`{name}` must be .*{value}"):
        branch_answers(Backbone(tiny_llama.model), *encoded(tiny_llama), **{name: value})
