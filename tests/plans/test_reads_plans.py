"""A chooser that reads the states under each plan: what it reads, what it learns, what is saved, and growth."""

import json

import pytest
import torch
from datasets import Dataset
from test_branching import picture_rows
from test_plan_policy import GROWING, segmented_model, space_args, trainer, whole_and_resumed
from test_plan_trainers import even_length, losses, plan_model, prompts, short_backbone, warnings_are_heard
from tiny_models import make_tokenizer

from latent_trl import PlanConfig, PlanModel
from latent_trl.checkpoint.files import CheckpointError
from latent_trl.data.prompts import PromptEncoder
from latent_trl.data.rows import RowError
from latent_trl.models.decoder_stack import decoder_layers
from latent_trl.plans.chooser import PlanChooser, PromptStates
from latent_trl.plans.engine_decoder import PlanEngine
from latent_trl.plans.reading import prompt_states, read_prompts
from latent_trl.trainer.plans.replay import padded_states, place_key, place_of, said_key

PICTURES = ("llava", "qwen2_5_vl")

assert warnings_are_heard


def reading_model(**options):
    return plan_model(chooser_reads_plans=True, **options)


def under_plan(model, inputs, plan):
    """By hand, for one prompt: what stands before the last token without a plan, and the last token under it."""
    found, stack = [], decoder_layers(model.view.decoder)
    with torch.no_grad():
        before = {k: v[:, :-1] if v.shape[:2] == inputs["input_ids"].shape else v for k, v in inputs.items()}
        past = model.backbone(**before, use_cache=True)
        for number in model.chooser_layers:
            stack[number].register_forward_hook(
                lambda module, args, output: found.append(output[0] if isinstance(output, tuple) else output)
            )
        positions = model.view.positions(**inputs)[..., -1:]
        with model.plans.active(torch.tensor([plan])):
            model.backbone(
                input_ids=inputs["input_ids"][:, -1:],
                attention_mask=inputs["attention_mask"],
                position_ids=positions,
                past_key_values=past.past_key_values,
            )
    for number in model.chooser_layers:
        stack[number]._forward_hooks.clear()
    return torch.cat([state[0, -1] / state[0, -1].pow(2).mean().sqrt() for state in found])


@pytest.mark.parametrize("family", ["llama", "gemma2", "gpt2", "llava", "qwen2_5_vl"])
@pytest.mark.parametrize("count", [2, 9])
def test_what_is_read_is_the_last_token_under_each_plan(make_tiny, family, count):
    """Padded prompts, more and fewer of them than plans, read one by one by hand."""
    tiny = make_tiny(family)
    config = PlanConfig(num_plans=4, depth=1, rank=2, init_std=2.0, chooser_layers=2, chooser_reads_plans=True)
    model = PlanModel(tiny.model, config)
    encoder = PromptEncoder(tiny.processor)
    rows = picture_rows() * 5 if family in PICTURES else list(prompts())
    encoded = [encoder({"_row": i, **row}) for i, row in enumerate(rows[:count])]
    inputs = encoder.collate(encoded)
    states, planned = read_prompts(model, inputs)
    mask = inputs["attention_mask"].bool()
    plain = prompt_states(model.view, model.chooser_layers, inputs)
    torch.testing.assert_close(states[mask], plain[mask], atol=2e-4, rtol=1e-3)
    assert planned.shape == (count, 4, states.shape[-1])
    assert (planned[:, 0] - planned[:, 1]).abs().max() > 0.1
    for i in range(0, count, 4):
        one = encoder.collate([encoded[i]])
        for plan in range(4):
            torch.testing.assert_close(planned[i, plan], under_plan(model, one, plan), atol=2e-4, rtol=1e-3)


def test_what_is_learned_of_a_plan_is_known_of_its_like():
    """The second term is the same for plans whose states are, whatever their numbers."""
    torch.manual_seed(0)
    chooser = PlanChooser(6, 3, 8, reads_plans=True)
    torch.nn.init.zeros_(chooser.output.weight)
    torch.nn.init.zeros_(chooser.output.bias)
    states, mask, planned = torch.randn(2, 4, 6), torch.ones(2, 4), torch.randn(2, 3, 6)
    planned[:, 2] = planned[:, 0]
    logits = chooser(states, mask, planned)
    assert torch.equal(logits[:, 0], logits[:, 2]) and (logits[:, 0] - logits[:, 1]).abs().min() > 1e-3
    torch.testing.assert_close(chooser(states, mask, planned[:, [1, 0, 2]]), logits[:, [1, 0, 2]])
    chooser.add(2)
    grown = chooser(states, mask, planned[:, [0, 1, 2, 0, 1]])
    torch.testing.assert_close(grown, logits[:, [0, 1, 2, 0, 1]])
    with pytest.raises(ValueError, match="`planned` must be given"):
        chooser(states, mask)


@pytest.mark.parametrize("reads_plans", [False, True])
def test_logits_are_linear_in_the_features(reads_plans):
    torch.manual_seed(0)
    chooser = PlanChooser(6, 3, 8, reads_plans=reads_plans)
    given = torch.randn(2, 4, 6), torch.ones(2, 4), torch.randn(2, 3, 6)
    features = chooser.features(*given)
    assert features.shape == (2, 3, chooser.features_size)
    weights = chooser.output.weight
    if reads_plans:
        weights = torch.cat([weights, chooser.under_plans.score.weight.expand(3, -1)], dim=1)
    torch.testing.assert_close((features * weights).sum(-1) + chooser.output.bias, chooser(*given))


@pytest.mark.parametrize("kind", ["bandit", "grpo", "ppo"])
@pytest.mark.parametrize("segments", [False, True])
def test_a_resumed_run_is_the_same(tmp_path, kind, segments):
    options = {"save_strategy": "steps", "save_steps": 6, "max_steps": 12, "measure_ceiling": False}

    def make(folder):
        model = segmented_model(chooser_reads_plans=True) if segments else reading_model()
        return trainer(
            kind, folder, model, lambda completion_ids, **_: [sum(c) % 7 / 7 for c in completion_ids], **options
        )

    whole, rest = whole_and_resumed(make, tmp_path, step=6)
    replay = rest.replay
    assert set(replay.planned) >= {place_key(*key) for key in zip(replay.prompts, replay.said)}
    assert any(":" in name for name in replay.planned) == segments
    # What was kept is what is read anew.
    for name in list(replay.planned)[:6]:
        number, said = place_of(name)
        prompt = rest.model.continued(rest.encoder(rest.rows[number]), said)
        again = rest.states_of(rest.encoder.collate([prompt]))[0]
        torch.testing.assert_close(replay.planned[name], again.planned, atol=1e-4, rtol=1e-3)


@pytest.mark.parametrize("kind", ["bandit", "grpo", "ppo"])
def test_what_an_update_learns_is_read_under_plans(tmp_path, kind):
    """The gradient of an update's loss, beside one that is written out choice by choice."""
    options = {"replay_batch_size": 100} if kind == "bandit" else {}
    found = trainer(kind, tmp_path, reading_model(), **options)
    found.model.chooser.requires_grad_(True)
    found.before_training()
    found.roll_out(0)
    chooser, replay, args = found.model.chooser, found.replay, found.args
    loss = found.update_loss(found.model, 0)
    total = torch.zeros(())
    for place, plan in enumerate(replay.plans):
        logits = chooser(*padded_states([replay.states_at(replay.prompts[place], replay.said[place])]))[0]
        if kind == "bandit":
            target = torch.tensor(replay.rewards[place])
            total = total + torch.nn.functional.binary_cross_entropy_with_logits(logits[plan], target) / len(replay)
            continue
        log_prob = (logits / args.exploration_temperature).log_softmax(dim=0)[plan]
        old, advantage, weight = (replay.noted(name, [place])[0] for name in ("log_prob", "advantage", "weight"))
        assert log_prob.item() == pytest.approx(old.item(), abs=1e-4)
        # Where the ratio is 1, its gradient is that of the log-probability.
        total = total - weight * advantage * log_prob / args.rollout_prompts
    read = list(chooser.under_plans.parameters())
    got = torch.autograd.grad(loss, read)
    for own, by_hand in zip(got, torch.autograd.grad(total, read), strict=True):
        torch.testing.assert_close(own, by_hand, atol=1e-5, rtol=1e-3)
    assert got[0].abs().max() > 1e-4


def test_places_are_named():
    assert place_key(3, said_key(3, [])) == "3" and place_of("3") == (3, [])
    assert place_of(place_key(3, said_key(3, [7, 8]))) == (3, [7, 8])


def test_what_is_read_of_several_prompts_is_stacked():
    rows = [PromptStates(torch.ones(2, 1), torch.zeros(3, 1)), PromptStates(torch.ones(1, 1), torch.ones(3, 1))]
    states, mask, planned = padded_states(rows)
    assert states.shape == (2, 2, 1) and mask.tolist() == [[1, 1], [0, 1]]
    assert planned[..., 0].tolist() == [[0.0] * 3, [1.0] * 3]


def test_the_trainer_and_the_model_choose_alike(tmp_path):
    found = trainer("bandit", tmp_path / "run", reading_model())
    found.train()
    encoded = [found.encoder({"_row": i, **row}) for i, row in enumerate(prompts(5))]
    inputs = found.encoder.collate(encoded)
    torch.testing.assert_close(found.model.plan_logits(**inputs), found.logits(found.states_of(inputs)))
    found.model.save_pretrained(tmp_path / "model")
    again = PlanModel.from_pretrained(tmp_path / "model", backbone=short_backbone())
    assert again.plan_config.chooser_reads_plans
    assert torch.equal(again.plan_logits(**inputs), found.model.plan_logits(**inputs))
    out = again.generate(**inputs, max_new_tokens=4)
    assert torch.equal(out, found.model.generate(**inputs, max_new_tokens=4))


def test_deviations_of_thompson_are_those_of_each_plan(tmp_path):
    found = trainer("bandit", tmp_path, reading_model(), exploration="thompson", exploration_temperature=0.7)
    found.train()
    numbers = [0, 3]
    chooser, replay = found.model.chooser, found.replay
    got = torch.stack(found._deviations(numbers, found._precision_roots()))
    asked = padded_states([replay.states_at(number) for number in numbers])
    for plan in range(4):
        precision = torch.eye(chooser.features_size)
        for place, chosen in enumerate(replay.plans):
            if chosen == plan:
                own = padded_states([replay.states_at(replay.prompts[place], replay.said[place])])
                chance = chooser(*own)[0, plan].sigmoid().item()
                feature = chooser.features(*own)[0, plan].detach()
                precision += chance * (1 - chance) * torch.outer(feature, feature)
        features = chooser.features(*asked)[:, plan].detach()
        expected = torch.einsum("bi,ij,bj->b", features, torch.linalg.inv(precision), features).sqrt()
        torch.testing.assert_close(got[:, plan], expected, atol=1e-4, rtol=1e-3)


def test_plans_that_are_added_are_read(tmp_path):
    found = trainer("bandit", tmp_path, reading_model(), space_args=space_args(tmp_path / "space"), **GROWING)
    found.train()
    assert found.model.plan_config.num_plans == 6
    for name, planned in found.replay.planned.items():
        number, said = place_of(name)
        prompt = found.model.continued(found.encoder(found.rows[number]), said)
        again = found.states_of(found.encoder.collate([prompt]))[0].planned
        assert planned.shape[0] == 6
        torch.testing.assert_close(planned, again, atol=1e-4, rtol=1e-3)
    assert all(loss == loss for loss in losses(found))


def test_a_grown_run_is_resumed(tmp_path):
    options = {**GROWING, "max_steps": 10, "save_strategy": "steps", "save_steps": 6}

    def make(folder):
        return trainer("bandit", folder, reading_model(), space_args=space_args(tmp_path / "space"), **options)

    whole, rest = whole_and_resumed(make, tmp_path, step=6)
    assert rest.model.plan_config.num_plans == 6


def test_prompts_that_cannot_be_read_are_named(make_tiny):
    model = reading_model()
    one = {"input_ids": torch.tensor([[0, 5], [4, 5]]), "attention_mask": torch.tensor([[0, 1], [1, 1]])}
    with pytest.raises(ValueError, match="Prompt 0 of the batch has one token.*chooser_reads_plans"):
        model.plan_logits(**one)
    tiny = make_tiny("llava")
    model = PlanModel(tiny.model, PlanConfig(num_plans=2, depth=1, chooser_reads_plans=True))
    picture = model.view.vision_token_ids[0]
    ids = torch.tensor([[5, 6], [5, picture]])
    with pytest.raises(ValueError, match="Prompt 1 of the batch ends with a picture.*Let text follow"):
        model.plan_logits(input_ids=ids, attention_mask=torch.ones_like(ids))


def test_rows_of_one_token_are_found_before_the_first_step(tmp_path):
    rows = Dataset.from_list([{"prompt": "what is this", "number": 0}, {"prompt": "a", "number": 1}] * 4)
    with pytest.raises(RowError, match="Row 1.*has 1 tokens, and needs at least 2"):
        trainer("bandit", tmp_path / "raise", reading_model(), rows=rows).train()
    found = trainer("bandit", tmp_path / "skip", reading_model(), rows=rows, on_bad_row="skip")
    found.train()
    assert {row["number"] for row in (found.rows[i] for i in range(len(found.rows)))} == {0}


@pytest.mark.parametrize("family", ["qwen2_vl", "qwen2_5_vl"])
def test_a_last_token_behind_a_picture_stands_where_it_does(make_tiny, family):
    """Behind a picture of several rows positions go on from the largest of its coordinates."""
    tiny = make_tiny(family)
    model = PlanModel(tiny.model, PlanConfig(num_plans=2, depth=1, chooser_layers=2, chooser_reads_plans=True))
    encoder = PromptEncoder(tiny.processor)
    inputs = encoder.collate([encoder({"_row": 0, **picture_rows()[0]})])
    last = int((inputs["input_ids"][0] == model.view.vision_token_ids[0]).nonzero()[-1])
    length = inputs["input_ids"].shape
    inputs = {k: v[:, : last + 2] if v.shape[:2] == length else v for k, v in inputs.items()}
    states, planned = read_prompts(model, inputs)
    torch.testing.assert_close(states, prompt_states(model.view, model.chooser_layers, inputs), atol=2e-4, rtol=1e-3)
    torch.nn.init.zeros_(model.plans.lora_B[0])
    for up in model.plans.lora_B:
        torch.nn.init.zeros_(up)
    torch.testing.assert_close(read_prompts(model, inputs)[1][:, 0], states[:, -1], atol=2e-4, rtol=1e-3)


def test_prompts_that_attend_in_both_directions_are_refused(make_tiny):
    tiny = make_tiny("paligemma")
    model = PlanModel(tiny.model, PlanConfig(num_plans=2, depth=1, chooser_reads_plans=True))
    encoder = PromptEncoder(tiny.processor)
    inputs = encoder.collate([encoder({"_row": 0, **picture_rows()[0]})])
    with pytest.raises(ValueError, match="reads a prompt otherwise without its last token"):
        model.plan_logits(**inputs)


def test_inputs_that_are_not_there():
    model = reading_model()
    ids = torch.tensor([[5, 6, 7]])
    given = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    assert torch.equal(model.plan_logits(**given, inputs_embeds=None), model.plan_logits(**given))


def test_an_engine_asked_for_nothing_says_nothing():
    engine = PlanEngine(reading_model(), None, None)
    assert engine([], [], [], 4, [1]).token_ids == []


def test_a_folder_says_what_its_chooser_reads(tmp_path):
    found = trainer("bandit", tmp_path / "run", reading_model(), reward=even_length)
    found.train()
    folder = tmp_path / "model"
    found.model.save_pretrained(folder)
    record = json.loads((folder / "plan_config.json").read_text())
    (folder / "plan_config.json").write_text(json.dumps({**record, "chooser_reads_plans": False}))
    with pytest.raises(CheckpointError, match="under_plans"):
        PlanModel.from_pretrained(folder, backbone=short_backbone())
    # Folders without the field have a chooser that reads prompts alone.
    plain = trainer("bandit", tmp_path / "plain")
    plain.train()
    plain.model.save_pretrained(tmp_path / "old")
    record = json.loads((tmp_path / "old" / "plan_config.json").read_text())
    del record["chooser_reads_plans"]
    (tmp_path / "old" / "plan_config.json").write_text(json.dumps(record))
    old = PlanModel.from_pretrained(tmp_path / "old", backbone=short_backbone())
    assert not old.plan_config.chooser_reads_plans
    encoder = PromptEncoder(make_tokenizer())
    inputs = encoder.collate([encoder({"_row": 0, **prompts(1)[0]})])
    assert torch.equal(old.plan_logits(**inputs), plain.model.plan_logits(**inputs))


@pytest.mark.parametrize("value", ["yes", 1, None])
def test_values_that_are_no_truth_values(value):
    with pytest.raises(ValueError, match="`chooser_reads_plans` must be True or False"):
        PlanConfig(chooser_reads_plans=value)
