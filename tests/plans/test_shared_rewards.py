"""`share_rewards`: all plans answer, rollouts have different answers, and a reward counts for all plans that say it."""

import pytest
import torch
from test_plan_policy import trainer as policy_trainer
from test_plan_trainers import bandit_trainer, even_length, plan_model, prompts

from latent_trl.plans.segments import PlannedAnswer
from latent_trl.trainer.plans.bandit_trainer import answer_numbers, answers_first

BATCH = {"num_iterations": 4, "max_steps": 4, "rollout_prompts": 12, "share_rewards": True}


def with_twins():
    """Plans of which 0 and 2 are the same, and 1 and 3."""
    model = plan_model(init_std=2.0)
    with torch.no_grad():
        for parameter in model.plans.parameters():
            parameter[2:] = parameter[:2]
    return model


def test_answers_are_numbered_as_they_come():
    answers = [PlannedAnswer(token_ids=ids) for ids in ([5], [7, 2], [5], [7], [7, 2])]
    assert answer_numbers(answers).tolist() == [0, 1, 0, 2, 1]


@pytest.mark.parametrize("seed", range(5))
def test_the_best_plan_of_each_answer_comes_first(seed):
    generator = torch.Generator().manual_seed(seed)
    scores = 3 * torch.randn(40, 6, generator=generator)
    numbers = torch.stack(
        [
            answer_numbers([PlannedAnswer(token_ids=[int(one)]) for one in row])
            for row in torch.randint(4, (40, 6), generator=generator)
        ]
    )
    order = answers_first(scores, numbers).argsort(dim=1, descending=True)
    for own, of, found in zip(scores.tolist(), numbers.tolist(), order.tolist(), strict=True):
        ranked = sorted(range(6), key=lambda plan: -own[plan])
        leading = [plan for i, plan in enumerate(ranked) if of[plan] not in [of[other] for other in ranked[:i]]]
        assert found == leading + [plan for plan in ranked if plan not in leading]


def test_a_reward_counts_for_every_plan_that_says_the_same(tmp_path):
    asked = []

    def reward(completions, number, **columns):
        asked.extend(zip(number, completions, strict=True))
        return even_length(completions)

    found = bandit_trainer(tmp_path, with_twins(), reward, max_completion_length=4, num_generations=3, **BATCH)
    found.args.measure_ceiling = False
    found.eval_dataset = None
    found.train()
    replay = found.replay
    assert len(asked) == 12 * 3
    rewards, answers = {}, {}
    for number in range(12):
        encoded = found.encoder({"_row": number, **prompts()[number]})
        ids = found.model.answers(found.encoder, [encoded] * 4, [0, 1, 2, 3], 4, found.ends).token_ids
        answers[number] = [found.encoder.encoder.tokenizer.decode(one, skip_special_tokens=True).strip() for one in ids]
    for place in range(len(replay)):
        key = replay.prompts[place], replay.plans[place]
        assert rewards.setdefault(key, replay.rewards[place]) == replay.rewards[place]
        assert replay.rewards[place] == even_length([answers[key[0]][key[1]]])[0]
    for number in range(12):
        # Three rewards for at most two different answers: all plans have theirs.
        assert {plan for prompt, plan in rewards if prompt == number} == {0, 1, 2, 3}
        said = [text for one, text in asked if one == number]
        assert set(said) == set(answers[number])
    row = next(row for row in found.state.log_history if "plans/answers" in row)
    distinct = [len(set(texts)) for texts in answers.values()]
    assert row["plans/answers"] == pytest.approx(sum(distinct) / 12) and row["plans/answers"] > 1.2


def test_rollouts_are_what_the_chosen_plans_say(tmp_path):
    kept = []
    found = bandit_trainer(tmp_path, plan_model(init_std=2.0), measure_ceiling=False, **BATCH)
    learn_from = found.learn_from

    def watched(answers, rewards, made):
        kept.append((answers, rewards, made))
        learn_from(answers, rewards, made)

    found.learn_from = watched
    found.train()
    ((answers, rewards, made),) = kept
    for answer, reward, choice in zip(answers, rewards.tolist(), made, strict=True):
        encoded = found.encoder({"_row": choice["prompt"], **prompts()[choice["prompt"]]})
        ids = found.model.answers(found.encoder, [encoded], [choice["plan"]], 4, found.ends).token_ids[0]
        assert answer.token_ids == ids and answer.plans == [choice["plan"]]
        assert reward == even_length([found.encoder.encoder.tokenizer.decode(ids, skip_special_tokens=True).strip()])[0]


def test_a_resumed_run_is_the_same(tmp_path):
    options = {"save_strategy": "steps", "save_steps": 3, "max_steps": 10, "share_rewards": True}
    whole = bandit_trainer(tmp_path / "whole", **options)
    whole.train()
    rest = bandit_trainer(tmp_path / "rest", **options)
    rest.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-6"))
    assert rest.replay.plans == whole.replay.plans and rest.replay.rewards == whole.replay.rewards
    for name, parameter in whole.model.chooser.state_dict().items():
        assert torch.equal(rest.model.chooser.state_dict()[name], parameter)


def test_segments_are_refused(tmp_path):
    with pytest.raises(ValueError, match="`share_rewards` needs plans that are held for the answer"):
        policy_trainer("bandit", tmp_path, plan_model(segment=2), share_rewards=True)


def test_an_answer_that_is_asked_twice_counts_once(tmp_path):
    """Two different answers at most, three rollouts: no plan learns twice of one answer."""
    found = bandit_trainer(tmp_path, with_twins(), measure_ceiling=False, **{**BATCH, "num_generations": 3})
    found.train()
    pairs = list(zip(found.replay.prompts, found.replay.plans, strict=True))
    assert len(pairs) == len(set(pairs)) == 12 * 4


@pytest.mark.parametrize("exploration", ["softmax", "thompson"])
def test_rollouts_of_a_prompt_have_different_answers(tmp_path, exploration):
    """Of two pairs of plans that say the same, one of each is tried."""
    asked = []

    def reward(completions, number, **columns):
        asked.extend(zip(number, completions, strict=True))
        return even_length(completions)

    options = {**BATCH, "max_steps": 16, "measure_ceiling": False, "exploration": exploration}
    found = bandit_trainer(tmp_path, with_twins(), reward, **options)
    found.eval_dataset = None
    found.train()
    assert len(asked) == 4 * 24
    for first, second in zip(asked[::2], asked[1::2], strict=True):
        encoded = found.encoder({"_row": 0, **prompts()[first[0]]})
        ids = found.model.answers(found.encoder, [encoded] * 2, [0, 1], 4, found.ends).token_ids
        assert first[0] == second[0] and (first[1] != second[1]) == (ids[0] != ids[1])
