"""The learned switch of segments: where it ends them, what it reads, and what cannot have it."""

import pytest
import torch
from safetensors.torch import load_file
from test_branching import picture_rows, text_rows
from test_plan_trainers import prompts, space_trainer
from tiny_models import llama

from latent_trl import PlanConfig, PlanModel
from latent_trl.checkpoint.files import CheckpointError
from latent_trl.data.prompts import PromptEncoder
from latent_trl.plans.engine import check_no_switch
from latent_trl.plans.engine_decoder import check_decodable
from latent_trl.plans.prompt_cache import GreedyAnswers
from latent_trl.plans.segments import speak
from latent_trl.plans.switch import BEHIND_SENTENCE, ELSEWHERE, PlanSwitch, switch_log_probs

# A third of what a tiny model says.
ENDS = list(range(16, 272, 3))


def switched(backbone, segment="switch", **options):
    """Plans that differ, and a chooser that chooses different ones."""
    fields = {"num_plans": 3, "depth": 1, "rank": 2, "init_std": 0.5, "segment_end_token_ids": ENDS}
    model = PlanModel(backbone, PlanConfig(**{**fields, "segment": segment, **options}))
    torch.nn.init.normal_(model.chooser.output.weight, std=20.0, generator=torch.Generator().manual_seed(0))
    model.chooser_is_trained = True
    return model


def learned(model, std=1.0, seed=0):
    """The same with a switch that has learned something."""
    torch.nn.init.normal_(model.chooser.switch.weight, std=std, generator=torch.Generator().manual_seed(seed))
    return model


def encoded(tiny, rows):
    encoder = PromptEncoder(tiny.processor)
    return encoder, [encoder({"_row": i, **row}) for i, row in enumerate(rows)]


def test_an_unlearned_switch_follows_the_rule():
    switch, states = PlanSwitch(8), torch.randn(2, 8, generator=torch.Generator().manual_seed(0))
    chances = switch(states, torch.tensor([True, False])).sigmoid()
    assert chances.tolist() == pytest.approx([BEHIND_SENTENCE, ELSEWHERE])
    with torch.no_grad():
        switch.weight.normal_(generator=torch.Generator().manual_seed(1))
        switch.bias.fill_(0.5)
    logits = switch(states, torch.tensor([True, False]))
    rms = states.pow(2).mean(dim=1).sqrt()
    by_hand = torch.tensor([0.9 / 0.1, 0.02 / 0.98]).log() + (states * switch.weight).sum(dim=1) / rms + 0.5
    torch.testing.assert_close(logits, by_hand)
    assert switch(states.bfloat16(), torch.tensor([True, False])).dtype == torch.float32
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(switch(states, torch.tensor([True, False])), logits)
    found = switch_log_probs(logits, torch.tensor([True, False]))
    torch.testing.assert_close(found, torch.stack([logits[0].sigmoid(), 1 - logits[1].sigmoid()]).log())


@pytest.mark.parametrize("family", ["llama", "llava", "qwen2_5_vl"])
def test_greedy_segments_of_an_unlearned_switch_are_sentences(make_tiny, family):
    tiny, found = make_tiny(family), []
    encoder, some = encoded(tiny, text_rows() if family == "llama" else picture_rows())
    for segment in ("sentence", "switch"):
        model = switched(tiny.model, segment)
        spoken = model.speak(encoder, some, model.best_plans, 12, [20], batch_size=2)
        options = {"max_new_tokens": 12, "eos_token_id": [20]}
        chosen = model.generate(**tiny.inputs, **options)
        given = model.generate(**tiny.inputs, plan_ids=[[0, 1, 2, 0], [2, 1, 0, 1], [1, 1, 2, 0]], **options)
        found.append((spoken, chosen.tolist(), given.tolist()))
    assert found[0] == found[1]
    spoken = found[0][0]
    assert max(len(answer.plans) for answer in spoken) > 1
    assert any(later - start > 1 for answer in spoken for start, later in zip(answer.starts, answer.starts[1:]))


@pytest.mark.parametrize("family", ["llama", "llava", "gpt2", "qwen3_vl"])
def test_the_switch_reads_the_backbones_own_states(make_tiny, family):
    """Segments end where brute force ends them: one row, no cache, no plan, all states of the backbone."""
    tiny = make_tiny(family)
    model = learned(switched(tiny.model))
    encoder, some = encoded(tiny, picture_rows() if model.view.vision_token_ids else text_rows())
    spoken = model.speak(encoder, some, model.best_plans, 12, [], batch_size=2)
    sentences = switched(tiny.model, "sentence").speak(encoder, some, model.best_plans, 12, [])
    assert [answer.starts for answer in spoken] != [answer.starts for answer in sentences]
    for prompt, answer in zip(some, spoken):
        expected = [0]
        for place in range(1, 12):
            inputs = encoder.collate([model.continued(prompt, answer.token_ids[:place])])
            with torch.no_grad():
                states = model.backbone(**inputs, output_hidden_states=True).hidden_states[1][:, -1]
            behind = torch.tensor([answer.token_ids[place - 1] in ENDS])
            if model.chooser.switch(states, behind) > 0:
                expected.append(place)
        assert answer.starts == expected and len(answer.plans) == len(expected)
    inputs = encoder.collate(some)
    found = model.generate(**inputs, max_new_tokens=12, eos_token_id=[])[:, -12:]
    assert found.tolist() == [answer.token_ids for answer in spoken]


def test_rows_that_say_the_same_end_their_segments_apart(make_tiny, monkeypatch):
    """They are decoded together until the last of them has ended its segment."""
    tiny = make_tiny("llama")
    model = switched(tiny.model, init_std=1.0)
    encoder, (prompt, *_) = encoded(tiny, text_rows())
    lengths = [[2, 3, 1], [4, 1, 1], [2, 1, 3], [6], [1, 5]]
    decoded = []
    decode = model._decode
    monkeypatch.setattr(model, "_decode", lambda i, p, *a, **k: decoded.append(len(p)) or decode(i, p, *a, **k))

    def choose(rows, answers, inputs):
        return torch.tensor([len(answer.plans) % 3 for answer in answers])

    def switch(rows, answers, said, states):
        assert states.shape == (len(rows), model.view.hidden_size)
        # Nothing is decided behind the longest answer, nor twice.
        assert all(len(answer.token_ids) + len(own) < 6 for answer, own in zip(answers, said))
        ends = [lengths[row][len(answer.plans)] == len(own) for row, answer, own in zip(rows, answers, said)]
        return torch.tensor(ends)

    together = model.speak(encoder, [prompt] * 5, choose, 6, [], switch=switch)
    assert decoded[0] == 1
    for row, answer in enumerate(together):
        assert answer.starts == [sum(lengths[row][:i]) for i in range(len(lengths[row]))]
        (alone,) = model.speak(encoder, [prompt], choose, 6, [], switch=lambda rows, *x, row=row: switch([row], *x))
        assert (answer.token_ids, answer.plans, answer.starts) == (alone.token_ids, alone.plans, alone.starts)
    assert sum(answer.decoded for answer in together) < sum(len(answer.plans) for answer in together)


def test_a_switch_is_kept_in_a_folder(make_tiny, tmp_path):
    tiny = make_tiny("llama")
    model = learned(switched(tiny.model))
    model.save_pretrained(tmp_path)
    assert {"switch.weight", "switch.bias"} < load_file(tmp_path / "chooser.safetensors").keys()
    state = torch.get_rng_state()
    again = PlanModel.from_pretrained(tmp_path, backbone=make_tiny("llama").model)
    assert torch.equal(torch.get_rng_state(), state) and again.has_switch
    for name, tensor in model.chooser.state_dict().items():
        assert torch.equal(again.chooser.state_dict()[name], tensor)
    options = {"max_new_tokens": 10, "eos_token_id": []}
    assert torch.equal(again.generate(**tiny.inputs, **options), model.generate(**tiny.inputs, **options))
    for segment in ("sentence", "switch"):
        other = tmp_path / segment
        switched(tiny.model, segment).save_pretrained(other)
        unlike = switched(make_tiny("llama").model, "sentence" if segment == "switch" else "switch")
        before = {name: tensor.clone() for name, tensor in unlike.state_dict().items()}
        with pytest.raises(CheckpointError, match="switch"):
            unlike.load_folder(other)
        assert all(torch.equal(tensor, before[name]) for name, tensor in unlike.state_dict().items())


def test_an_unlearned_switch_comes_back_as_one(make_tiny, tmp_path):
    model = switched(make_tiny("llama").model)
    model.chooser_is_trained = False
    model.save_pretrained(tmp_path)
    again = PlanModel.from_pretrained(tmp_path, backbone=make_tiny("llama").model)
    assert not again.chooser.switch.weight.any() and not again.chooser.switch.bias.any()


def test_the_space_of_a_switch_is_that_of_sentences(tmp_path):
    found = []
    for segment in ("sentence", "switch"):
        tiny = llama(num_hidden_layers=2)
        model = switched(tiny.model, segment, num_plans=4)
        options = {"eval_strategy": "no", "save_strategy": "no", "branch_min_prob": 0.002, "max_completion_length": 8}
        trainer = space_trainer(tmp_path / segment, model, prompts(6), **options)
        trainer.train()
        found.append(trainer)
    sentence, switch = found
    assert sentence.starts == switch.starts and max(len(own) for own in switch.starts.values()) > 1
    for name, tensor in sentence.model.plans.state_dict().items():
        assert torch.equal(switch.model.plans.state_dict()[name], tensor)


def test_a_switch_needs_layers_below_the_plans():
    message = "`segment='switch'` reads the states below the plans, and `depth` is 0"
    with pytest.raises(ValueError, match=message):
        PlanConfig(segment="switch", depth=0)
    with pytest.raises(ValueError, match=message):
        PlanModel(llama(num_hidden_layers=1).model, PlanConfig(segment="switch"))


def test_a_switch_needs_ends_of_sentences(tiny_llama):
    model = switched(tiny_llama.model, segment_end_token_ids=None)
    with pytest.raises(ValueError, match="must be given for `segment='switch'`"):
        model.generate(**tiny_llama.text_inputs, plan_ids=0)


def test_engines_are_refused(tiny_llama):
    model = switched(tiny_llama.model)
    encoder, some = encoded(tiny_llama, text_rows())
    for refused in (
        lambda: check_no_switch(model.plan_config),
        lambda: check_decodable(model),
        lambda: model.speak(encoder, some, model.best_plans, 4, [], engine=lambda *_: None),
    ):
        with pytest.raises(ValueError, match="learned switch ends the segment .* Answer with transformers"):
            refused()
    check_no_switch(PlanConfig(segment="sentence"))


def test_rows_that_have_ended_are_not_asked_though_they_stay_in_the_batch():
    asked = []

    def decode(inputs, plans, left, first, stop):
        if first:
            return GreedyAnswers([[9], [5]], [True, False], [])
        over = stop([0, 1], [[6], [6]], torch.zeros(2, 3))
        return GreedyAnswers([[6], [6]], over, [])

    def switch(rows, answers, said, states):
        asked.append((rows, len(states)))
        return torch.ones(len(rows), dtype=torch.bool)

    answers = speak(
        2, lambda *_: {}, lambda rows, *_: torch.zeros(len(rows), dtype=torch.long), decode, 3, [9], True, switch=switch
    )
    assert [answer.token_ids for answer in answers] == [[9], [5, 6, 6]]
    assert asked == [([1], 1)]
