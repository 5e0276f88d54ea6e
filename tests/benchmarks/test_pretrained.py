"""The benchmark on a language model that others trained; a tiny model stands in for it, and drawn text for MMRole's."""

import json
import random
from pathlib import Path

import pretrained
import pretrained_arms
import pytest
import role_play
import torch
from tiny_models import FAMILIES

from latent_trl import LatentActionConfig, LatentActionModel

WORDS = {"Anna": "sails waves harbour boat wind", "Boris": "bread oven flour kneads crust"}
TINY = pretrained.Size(
    learn=4,
    talk=2,
    rl=6,
    validation=3,
    test=4,
    rollouts=8,
    step_rollouts=4,
    generations=2,
    bandit_prompts=2,
    rates=(1e-3, 1e-2),
    space_steps=1,
    cloning_steps=1,
    plans=4,
    plan_rows=8,
    branches=4,
    plan_steps=1,
    plan_prompts=2,
    sampled=3,
    samples=2,
    held_out_talk=2,
)


TALK = [{"prompt": [{"role": "user", "content": f"hi {i}"}], "reference": f"hello {i}."} for i in range(4)]


def replies(name: str, rng: random.Random) -> str:
    return " ".join(rng.choices(WORDS[name].split() + ["the", "old", "day", "good"], k=18)).capitalize() + "."


@pytest.fixture
def folder(tmp_path) -> Path:
    """MMRole's layout: dialogues of two characters, some of which do not fit."""
    rng = random.Random(0)
    profiles = tmp_path / "data" / "profiles" / "in-distribution"
    profiles.mkdir(parents=True)
    text = "### Introduction\n{0} lives by the sea. {0} is old.\n### Personality\nQuiet."
    (profiles / "profiles.json").write_text(json.dumps({name: text.format(name) for name in WORDS}))
    for kind in ("human-role", "inter-role", "comment"):
        place = tmp_path / "data" / "dialogues" / "in-distribution" / kind
        place.mkdir(parents=True)
        for name in WORDS:
            rows = []
            for i in range(24):
                question = f"What do you think of the number {i} that is painted on this wall?"
                turns = [{"role": "human", "value": question}, {"role": name, "value": replies(name, rng)}]
                rows.append({"id": f"{name}_{i}", "image": "x.png", "conversations": turns})
            rows.append({"id": "empty", "image": "x.png", "conversations": []})
            rows.append({"id": "other", "image": "x.png", "conversations": [*rows[0]["conversations"][:1]] * 2})
            rows[-1]["conversations"] = [{"role": "human", "value": "你好"}, {"role": name, "value": "你好"}]
            (place / f"{name}_COCO.json").write_text(json.dumps(rows))
    return tmp_path / "data"


def test_splits_are_apart_and_what_learns_without_a_reward_has_no_reference(folder):
    task = role_play.RolePlay.load(folder, learn=8, rl=12, validation=6, test=10)
    parts = (task.learn, task.rl, task.validation, task.test)
    questions = [{(row["prompt"][0]["content"], row["prompt"][-1]["content"]) for row in part} for part in parts]
    assert [len(part) for part in questions] == [8, 12, 6, 10]
    assert len(set().union(*questions)) == 36
    assert all(row.keys() == {"prompt"} for row in task.learn)
    first = task.test[0]["prompt"]
    assert [message["role"] for message in first] == ["system", "user"]
    assert f"You are {task.test[0]['character']}." in first[0]["content"] and "###" not in first[0]["content"]
    with pytest.raises(SystemExit, match="48 dialogues of this form, and 100 are asked for"):
        role_play.RolePlay.load(folder, learn=25, rl=25, validation=25, test=25)


def test_a_prompt_of_two_questions_has_what_was_said_before(folder):
    path = folder / "dialogues" / "in-distribution" / "human-role" / "Anna_COCO.json"
    rows = json.loads(path.read_text())[:2]
    rows[0]["conversations"] = rows[0]["conversations"] + rows[1]["conversations"]
    path.write_text(json.dumps(rows))
    (found,) = role_play.dialogues(folder, turns=2)
    assert [message["role"] for message in found["prompt"]] == ["system", "user", "assistant", "user"]
    assert found["reference"] == rows[1]["conversations"][1]["value"]


def test_gold_tells_the_character_and_the_reference_from_others(folder):
    task = role_play.RolePlay.load(folder, learn=8, rl=12, validation=6, test=10)
    own = role_play.gold(task, task.test, [row["reference"] for row in task.test])
    torch.testing.assert_close(torch.tensor(own["similar"]), torch.ones(10))
    assert own["recognised"] == [1.0] * 10
    swapped = ["bread oven flour" if row["character"] == "Anna" else "boat wind waves" for row in task.test]
    other = role_play.gold(task, task.test, swapped)
    assert other["recognised"] == [0.5] * 10 and max(other["similar"]) < 0.6
    assert role_play.gold(task, task.test, [""] * 10) == {"similar": [0.0] * 10, "recognised": [0.0] * 10}


def test_the_rate_is_chosen_on_validation_prompts(tmp_path):
    (tmp_path / "runs").mkdir()
    for rate, validation, reward in ((1e-3, 0.3, 0.2), (3e-4, 0.2, 0.9)):
        run = {"validation": [validation], "reward": [reward]}
        (tmp_path / "runs" / f"tokens {rate:g}.json").write_text(json.dumps(run))
    assert pretrained.chosen(tmp_path, "tokens", (1e-3, 3e-4, 1e-4))["rate"] == 1e-3
    assert pretrained.chosen(tmp_path, "codes", (1e-3,)) is None


@pytest.fixture
def tiny(monkeypatch):
    """The tiny model in the place of the language model, its own codebook in that of the published one."""
    narrow = {"num_hidden_layers": 1}

    def backbone(self):
        made = FAMILIES["llama"]()
        # Answers end now and then.
        made.model.generation_config.eos_token_id = list(range(20, 150))
        return made.model, made.processor

    def codebook(backbone):
        config = LatentActionConfig(num_codes=8, inverse_dynamics_decoder=narrow, policy_decoder=narrow)
        return LatentActionModel.from_backbone(backbone, config)

    monkeypatch.setattr(pretrained.Bench, "backbone", backbone)
    monkeypatch.setattr(pretrained_arms, "published_codebook", codebook)
    monkeypatch.setattr(pretrained_arms, "ANSWER_TOKENS", 6)
    said = [{"messages": [*row["prompt"], {"role": "assistant", "content": "yes."}]} for row in TALK]
    monkeypatch.setattr(pretrained, "own_answers", lambda *_: said)
    monkeypatch.setattr(
        pretrained, "embedder", lambda: lambda texts: torch.tensor([[len(t) + 1.0, 3.0] for t in texts])
    )


def test_a_plain_text_model_has_the_same_nats_in_every_arm_that_changes_nothing(folder, tiny, tmp_path):
    """A LoRA at its start, and plans whose up-projections are zero, are the backbone."""
    task = role_play.RolePlay.load(folder, 4, 6, 3, 4)
    bench = pretrained.Bench(TINY, 0, task, ([], []), tmp_path, tmp_path, "cpu")
    rows, texts = task.test, [row["reference"] for row in task.test]
    plain = pretrained_arms.TokenSpeaker(*bench.backbone()).nats(rows, texts)
    backbone, tokenizer = bench.backbone()
    model = pretrained_arms.PlanModel(backbone, pretrained_arms.PlanConfig(num_plans=3))
    changed = pretrained_arms.PlanSpeaker(model, tokenizer).nats(rows, texts)
    for up in model.plans.lora_B:
        torch.nn.init.zeros_(up)
    plans = pretrained_arms.PlanSpeaker(model, tokenizer).nats(rows, texts)
    torch.testing.assert_close(torch.tensor(plans), torch.tensor(plain), atol=1e-3, rtol=1e-4)
    assert not torch.allclose(torch.tensor(changed), torch.tensor(plain), atol=1e-2)


@pytest.mark.slow
def test_every_arm_gives_every_figure_and_is_not_done_again(folder, tiny, tmp_path, monkeypatch):
    monkeypatch.setitem(pretrained.SIZES, "reduced", TINY)
    monkeypatch.setattr(pretrained, "small_talk", lambda size: (TALK[:2], TALK[2:]))
    words = ["--data", str(folder), "--output_dir", str(tmp_path / "out"), "--device", "cpu"]
    found = pretrained.main(words)
    assert set(found) == {"backbone", "codes before RL", "plans before RL", "tokens", "codes", "plans"}
    assert len(list((tmp_path / "out" / "seed-0" / "runs").glob("*.json"))) == 9
    for arm in pretrained.ARMS:
        assert found[arm]["figures"]["rates"][0] in TINY.rates
        assert len(found[arm]["runs"][0]["reward"]) == TINY.test
    assert set(found["plans"]["over_tokens"]) == {"reward", "similar", "recognised"}
    for name in ("train_tokens", "train_codes", "train_plans", "learned_codes", "learned_plans"):
        monkeypatch.setattr(pretrained, name, None)
    assert pretrained.main(words) == found


def test_what_codes_learn_from_are_whole_sentences():
    class Speaker:
        def samples(self, rows, count, seed):
            return [["It is old. It is re", "It is", "It is old. It was"], ["Yes!", "Yes!", ""]]

    found = pretrained_arms.own_answers(Speaker(), TALK[:2], 3, 0)
    assert [row["messages"][-1]["content"] for row in found] == ["It is old.", "It is old.", "Yes!"]
    assert found[2]["messages"][:-1] == TALK[1]["prompt"]


def test_all_arms_have_as_many_rollouts():
    for size in pretrained.SIZES.values():
        assert size.rollouts % size.step_rollouts == 0 and size.rollouts % (2 * size.bandit_prompts) == 0
