"""Segments: each is a request of its own under its plan, chosen from the prompt and what has been said."""

import pytest
import torch
from peft import PeftModel
from test_branching import picture_rows, text_rows

from latent_trl import PlanConfig, PlanModel
from latent_trl.data.prompts import PromptEncoder
from latent_trl.plans.segments import PlannedAnswer, continued_inputs, sentence_ends, speak


def plan_model(tiny, **options):
    return PlanModel(tiny.model, PlanConfig(**{"num_plans": 3, "depth": 1, "rank": 2, "init_std": 0.5, **options}))


def alone(tiny, row):
    """One row of a text batch without its padding."""
    mask = tiny.text_inputs["attention_mask"][row].bool()
    return tiny.text_inputs["input_ids"][row : row + 1, mask]


@pytest.mark.parametrize("family", ["llama", "gemma2", "gpt2"])
def test_segments_are_requests_of_adapters(make_tiny, family, tmp_path):
    """An engine that is asked for a segment at a time, under the adapter of its plan, says the same."""
    tiny = make_tiny(family)
    model = plan_model(tiny, segment=3)
    plans = [[0, 2], [1, 1], [2, 0]]
    options = {"max_new_tokens": 8, "eos_token_id": []}
    found = model.generate(**tiny.text_inputs, plan_ids=plans, **options)[:, tiny.text_inputs["input_ids"].shape[1] :]
    model.save_pretrained(tmp_path)
    for row, own in enumerate(plans):
        ids = alone(tiny, row)
        for tokens, plan in ((3, own[0]), (3, own[1]), (2, own[1])):
            adapter = PeftModel.from_pretrained(make_tiny(family).model, str(tmp_path / f"plan_{plan:02d}")).eval()
            ids = adapter.generate(input_ids=ids, max_new_tokens=tokens, do_sample=False, eos_token_id=-1)
        assert found[row].tolist() == ids[0, -8:].tolist()


@pytest.mark.parametrize("family", ["llama", "llava", "gemma3", "qwen2_5_vl", "qwen3_vl"])
def test_a_plan_that_is_held_is_not_changed_by_segments(make_tiny, family):
    """Prompts of unlike length, with pictures, and the same plan in all segments: what was said is read as it was."""
    tiny = make_tiny(family)
    options = {"plan_ids": [1, 0, 2], "max_new_tokens": 7, "eos_token_id": []}
    whole = plan_model(tiny).generate(**tiny.inputs, **options)
    assert torch.equal(plan_model(tiny, segment=2).generate(**tiny.inputs, **options), whole)


@pytest.mark.parametrize("family", ["llama", "llava", "qwen2_5_vl"])
def test_trainers_and_generate_say_the_same(make_tiny, family):
    tiny = make_tiny(family)
    model, encoder = plan_model(tiny, segment=2), PromptEncoder(tiny.processor)
    torch.nn.init.normal_(model.chooser.output.weight, std=20.0, generator=torch.Generator().manual_seed(0))
    model.chooser_is_trained = True
    rows = picture_rows() if model.view.vision_token_ids else text_rows()
    prompts = [encoder({"_row": i, **row}) for i, row in enumerate(rows)]
    seen = []

    def choose(places, answers, inputs):
        seen.append((places, [list(answer.token_ids) for answer in answers]))
        return model.plan_logits(**inputs).argmax(dim=-1)

    ends = list(range(0, 140, 5))
    spoken = model.speak(encoder, prompts, choose, 8, ends, batch_size=2)
    inputs = encoder.collate(prompts)
    found = model.generate(**inputs, max_new_tokens=8, eos_token_id=ends)[:, inputs["input_ids"].shape[1] :]
    for row, answer in enumerate(spoken):
        assert found[row, : len(answer.token_ids)].tolist() == answer.token_ids
        assert answer.starts == list(range(0, len(answer.token_ids), 2)) and len(answer.plans) == len(answer.starts)
        assert answer.ended == (answer.token_ids[-1] in ends)
    # Rows that have ended are not asked about again, and plans differ along an answer.
    assert all(len(said) == len(places) for places, said in seen)
    assert all(own[-1] not in ends for _, said in seen for own in said if own)
    assert len({plan for answer in spoken for plan in answer.plans}) > 1


def test_what_is_said_alike_is_decoded_once(make_tiny, monkeypatch):
    """Rows of one prompt, that differ in their plans from the first, the second or no segment on."""
    tiny = make_tiny("llava")
    model = PlanModel(tiny.model, PlanConfig(num_plans=3, depth=1, init_std=1.0, segment=2))
    encoder = PromptEncoder(tiny.processor)
    own = [encoder({"_row": i, **row}) for i, row in enumerate(picture_rows()[:2])]
    asked = [own[0], own[1], own[0], own[0], own[0]]
    plans = torch.tensor([[0, 1, 2], [0, 1, 2], [0, 1, 2], [0, 2, 2], [1, 1, 2]])
    decoded = []
    decode = model._decode
    monkeypatch.setattr(model, "_decode", lambda i, p, *a, **k: decoded.append(p.tolist()) or decode(i, p, *a, **k))

    def choose(rows, answers, inputs):
        return torch.stack([plans[row, len(answer.plans)] for row, answer in zip(rows, answers)])

    together = model.speak(encoder, asked, choose, 6, [], batch_size=5)
    assert decoded[:2] == [[0, 0, 1], [1, 1, 2, 1]] and [one.decoded for one in together[:3]] == [3, 3, 0]
    for row, answer in enumerate(together):
        alone = model.speak(encoder, [asked[row]], lambda rows, *rest, row=row: choose([row] * len(rows), *rest), 6, [])
        assert (answer.token_ids, answer.plans, answer.starts) == (alone[0].token_ids, alone[0].plans, alone[0].starts)


def test_sentences_end_where_their_tokens_do():
    class Words:
        all_special_ids = [0]
        texts = ["<end>.", "a", ".", " is.", "?\n", "\n", '!"', "3.5", "etc", "。", ", "]

        def __len__(self):
            return len(self.texts)

        def batch_decode(self, ids):
            return [self.texts[one[0]] for one in ids]

    words = Words()
    assert sentence_ends(words) == [2, 3, 4, 5, 6, 9]
    words.texts = ["<end>.", "a"]
    with pytest.raises(ValueError, match="a token that ends a sentence"):
        sentence_ends(words)


def test_a_sentence_is_a_segment(tiny_llama):
    model = plan_model(tiny_llama, segment="sentence")
    options = {"plan_ids": [[0, 1, 2]] * 3, "max_new_tokens": 12, "eos_token_id": []}
    with pytest.raises(ValueError, match="`segment_end_token_ids` of the PlanConfig must be given"):
        model.generate(**tiny_llama.text_inputs, **options)
    held = plan_model(tiny_llama).generate(**tiny_llama.text_inputs, **{**options, "plan_ids": 0})[:, -12:]
    model.plan_config.segment_end_token_ids = [int(held[0, 4])]
    found = model.generate(**tiny_llama.text_inputs, **options)[:, -12:]
    end = held[0].tolist().index(int(held[0, 4])) + 1
    assert torch.equal(found[0, :end], held[0, :end]) and not torch.equal(found[0], held[0])


def test_what_was_said_stands_behind_the_prompt():
    inputs = {
        "input_ids": torch.tensor([[0, 5, 6], [7, 8, 9]]),
        "attention_mask": torch.tensor([[0, 1, 1], [1, 1, 1]]),
        "token_type_ids": torch.tensor([[0, 3, 0], [0, 0, 0]]),
        "mm_token_type_ids": torch.tensor([[0, 1, 0], [1, 0, 0]]),
        "pixel_values": torch.ones(4, 3),
    }

    class View:
        completion_type = 2

    grown = continued_inputs(View(), inputs, [[11], [12, 13]])
    assert grown["input_ids"].tolist() == [[0, 0, 5, 6, 11], [7, 8, 9, 12, 13]]
    assert grown["attention_mask"].tolist() == [[0, 0, 1, 1, 1], [1, 1, 1, 1, 1]]
    assert grown["token_type_ids"].tolist() == [[0, 0, 3, 0, 2], [0, 0, 0, 2, 2]]
    assert grown["mm_token_type_ids"].tolist() == [[0, 0, 1, 0, 0], [1, 0, 0, 0, 0]]
    assert grown["pixel_values"] is inputs["pixel_values"]


def test_answers_end_at_the_longest_length():
    class Segments:
        token_ids = [[1, 2, 3], [1, 9]]

    answers = speak(
        2,
        lambda rows, said: {},
        lambda rows, own, inputs: torch.zeros(len(rows), dtype=torch.long),
        lambda inputs, plans, left, first: type("S", (), {"token_ids": Segments.token_ids[: len(plans)]}),
        max_new_tokens=5,
        ends=[9],
    )
    assert answers[0] == PlannedAnswer([1, 2, 3, 1, 2], [0, 0], [0, 3], False, decoded=2)
    assert answers[1] == PlannedAnswer([1, 9], [0], [0], True, decoded=1)


@pytest.mark.parametrize("segment", ["paragraph", 0, -1, True, 2.5])
def test_other_segments_are_named(segment):
    with pytest.raises(ValueError, match="`segment` must be 'answer', 'sentence', 'switch' or a number of tokens"):
        PlanConfig(segment=segment)


def test_plans_for_segments_that_there_are_not_are_refused(tiny_llama):
    with pytest.raises(ValueError, match="has 2 plans a row, and a plan is held for the whole answer"):
        plan_model(tiny_llama).generate(**tiny_llama.text_inputs, plan_ids=[[0, 1]] * 3)


def test_positions_are_counted_for_the_whole_answer(make_tiny):
    tiny = make_tiny("gpt2")
    model = plan_model(tiny, segment=2)
    limit = model.view.max_positions
    left = limit - int(tiny.inputs["attention_mask"].sum(dim=1).max()) + 1
    assert model.generate(**tiny.inputs, plan_ids=0, max_new_tokens=left, eos_token_id=[]).shape[1] == limit + 1
    with pytest.raises(ValueError, match=f"may take {limit + 1} positions, and the backbone has {limit}"):
        model.generate(**tiny.inputs, plan_ids=0, max_new_tokens=left + 1)


def test_segments_are_kept_in_a_folder(tiny_llama, make_tiny, tmp_path):
    model = plan_model(tiny_llama, segment="sentence", segment_end_token_ids=[5, 7])
    model.save_pretrained(tmp_path)
    again = PlanModel.from_pretrained(tmp_path, backbone=make_tiny("llama").model)
    assert (again.plan_config.segment, again.segment_ends, again.segment_length) == ("sentence", [5, 7], None)
