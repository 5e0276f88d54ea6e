"""RL of a learned switch: its log-probabilities and gradients beside brute force, what it learns, exact resume."""

import copy
import itertools
from types import SimpleNamespace

import pytest
import torch
from test_plan_policy import trainer, whole_and_resumed
from test_plan_trainers import losses, prompts, warnings_are_heard
from tiny_models import llama, make_tokenizer

from latent_trl import PlanConfig, PlanModel
from latent_trl.plans.segments import PlannedAnswer
from latent_trl.plans.switch import switch_log_probs
from latent_trl.trainer.plans import choosing, grpo_trainer
from latent_trl.trainer.plans.switching import RolloutSwitch, SwitchDecisions

assert warnings_are_heard
# Tokens that end a sentence: a third of what the tiny model says.
ENDS = list(range(16, 272, 3))


def switched_model(num_plans=3, ends=ENDS, std=1.0):
    """Plans under a switch, of a backbone that never ends an answer; chooser and switch as if they had learned."""
    tiny = llama(num_hidden_layers=2)
    config = PlanConfig(
        num_plans=num_plans, depth=1, rank=2, init_std=2.0, segment="switch", segment_end_token_ids=ends
    )
    model = PlanModel(tiny.model, config)
    model.backbone.generation_config.eos_token_id = None
    generator = torch.Generator().manual_seed(3)
    torch.nn.init.normal_(model.chooser.output.weight, std=0.2, generator=generator)
    torch.nn.init.normal_(model.chooser.switch.weight, std=std, generator=generator)
    return model


def by_sum(completion_ids, **columns):
    return [float(sum(ids) % 7) for ids in completion_ids]


def switch_trainer(kind, folder, model=None, reward=by_sum, **options):
    found = trainer(kind, folder, model or switched_model(), reward, **{"max_completion_length": 6, **options})
    found.ends = []
    return found


def kept_rollouts(found, monkeypatch):
    """The answers, rewards and choices of a batch of rollouts."""
    kept, learn = {}, found.learn_from

    def keep(answers, rewards, made):
        kept.update(answers=answers, rewards=rewards, made=made)
        learn(answers, rewards, made)

    with monkeypatch.context() as patched:
        patched.setattr(found, "learn_from", keep)
        found.roll_out(0)
    return kept["answers"], kept["rewards"], kept["made"]


def brute_force(found, prompt, answer):
    """log π(τ) of a rollout with a gradient: the backbone is asked for states anew at each token, without a plan."""
    model, total = found.model, 0.0
    for place in range(len(answer.token_ids)):
        said = answer.token_ids[:place]
        inputs = found.encoder.collate([model.continued(prompt, said)])
        if place:
            with torch.no_grad():
                state = model.backbone(**inputs, output_hidden_states=True).hidden_states[model.depth][:, -1]
            logit = model.chooser.switch(state, torch.tensor([said[-1] in model.plan_config.segment_end_token_ids]))
            total = total + switch_log_probs(logit, torch.tensor([place in answer.starts]))[0]
        if place in answer.starts:
            states = found.states_of(inputs)[0].states[None]
            law = model.chooser(states, torch.ones(states.shape[:2])).log_softmax(dim=1)[0]
            total = total + law[answer.plans[answer.starts.index(place)]]
    return total


@pytest.mark.parametrize("kind", ["grpo", "ppo"])
def test_log_probs_of_rollouts_are_those_of_brute_force(tmp_path, monkeypatch, kind):
    found = switch_trainer(kind, tmp_path, rollout_prompts=4)
    answers, _, made = kept_rollouts(found, monkeypatch)
    decisions, switch = found.decisions, found.rollout_switch
    assert len(decisions.states) == int(decisions.total) == sum(len(answer.token_ids) - 1 for answer in answers)
    assert int(decisions.ended.sum()) == sum(len(answer.plans) - 1 for answer in answers)
    assert {True, False} == set(decisions.ended.tolist()) == set(decisions.behind_sentence.tolist())
    assert len({len(answer.plans) for answer in answers}) > 1
    per_prompt = found.args.num_generations
    numbers = found.drawn(0)
    for rollout, answer in enumerate(answers):
        prompt = found.encoder(found.rows[numbers[rollout // per_prompt]])
        own = torch.tensor(switch.rollouts) == rollout
        total = sum(one["log_prob"] for one in made if one["rollout"] == rollout) + decisions.log_probs[own].sum()
        assert total.item() == pytest.approx(brute_force(found, prompt, answer).item(), abs=1e-4)
        # Each decision is of the segment in which its token stands.
        places = [i for i, mine in enumerate(own.tolist()) if mine]
        spans = zip(answer.starts, [*answer.starts[1:], len(answer.token_ids) - 1])
        expected = [number for number, (start, end) in enumerate(spans) for _ in range(end - start)]
        assert [switch.segments[i] for i in places] == expected
    # As at the rollouts, the ratio is 1: the loss is that of REINFORCE with a baseline.
    loss = found.update_loss(found.model, 0)
    advantages = torch.tensor(found.replay.notes["advantage"])
    weights = torch.tensor(found.replay.notes["weight"])
    gains = (weights * advantages).sum() + (decisions.weights * decisions.advantages).sum()
    values = 0.0
    if kind == "ppo":
        errors = torch.tensor(found.replay.notes["value"]) - torch.tensor(found.replay.notes["return"])
        values = 0.5 * (weights * errors.pow(2)).sum() / 4
    assert loss.item() == pytest.approx((values - gains / 4).item(), abs=1e-4)


def trajectories(plans=2, length=3):
    """All that can happen in an answer of three tokens: where its segments end, and their plans."""
    return [
        (ended, chosen)
        for ended in itertools.product((True, False), repeat=length - 1)
        for chosen in itertools.product(range(plans), repeat=1 + sum(ended))
    ]


def all_trajectories(found, monkeypatch):
    """Rollouts of one prompt, one for each trajectory."""
    every = trajectories()
    found.args.num_generations = len(every)
    segment = itertools.count(1)

    def next_plans(shape, generator):
        number = next(segment)
        wanted = [chosen[number] if number < len(chosen) else 0 for _, chosen in every]
        return 1e4 * torch.eye(2)[wanted]

    class Wanted(RolloutSwitch):
        def __init__(self, *given):
            super().__init__(*given)
            self.draws = torch.tensor([[0.0 if over else 1.0 for over in ended] + [1.0] for ended, _ in every])

    first = torch.tensor([[chosen[0] for _, chosen in every]])
    with monkeypatch.context() as patched:
        patched.setattr(found, "first_plans", lambda *_: (first, torch.ones(first.shape)))
        patched.setattr(choosing, "gumbel", next_plans)
        patched.setattr(grpo_trainer, "RolloutSwitch", Wanted)
        answers, rewards, made = kept_rollouts(found, monkeypatch)
    for answer, (ended, chosen) in zip(answers, every, strict=True):
        assert answer.plans == list(chosen) and answer.starts == [0, *(i + 1 for i, over in enumerate(ended) if over)]
    return answers, rewards, made


def of_pair(switch, pair):
    """The switch of two rollouts, as if they had been a batch."""
    both = copy.copy(switch)
    rollouts = torch.tensor(switch.rollouts)
    parts = [torch.cat(part) for part in zip(*switch._made)]
    own = [(rollouts == place).nonzero()[:, 0] for place in pair]
    both.rollouts = [number for number, some in enumerate(own) for _ in some]
    both.segments = [switch.segments[i] for some in own for i in some.tolist()]
    both._made = [tuple(part[torch.cat(own)] for part in parts)]
    return both


@pytest.mark.parametrize("estimator", ["rloo", "grpo"])
def test_the_gradient_is_that_of_brute_force_over_all_trajectories(tmp_path, monkeypatch, estimator):
    """Over all pairs of trajectories, each as likely as it is, RLOO's mean gradient is that of the mean reward."""
    options = {"rollout_prompts": 1, "advantage_estimator": estimator, "max_completion_length": 3}
    found = switch_trainer("grpo", tmp_path, switched_model(num_plans=2, std=0.3), rows=prompts(1), **options)
    answers, rewards, made = all_trajectories(found, monkeypatch)
    assert len(answers) == 18 and len(set(rewards.tolist())) > 2
    switch, prompt = found.rollout_switch, found.encoder(found.rows[0])
    parameters = list(found.model.chooser.parameters())

    def gradient(loss):
        return torch.cat([g.flatten() for g in torch.autograd.grad(loss, parameters)])

    log_probs = torch.stack([brute_force(found, prompt, answer) for answer in answers])
    probs = log_probs.detach().exp()
    assert probs.sum().item() == pytest.approx(1.0, abs=1e-5) and probs.max() < 0.9
    exact = gradient((log_probs.exp() * rewards).sum())
    found.args.num_generations = 2
    mean = torch.zeros_like(exact)
    by_rollout = [[one for one in made if one["rollout"] == place] for place in range(len(answers))]
    for pair in itertools.product(range(len(answers)), repeat=2):
        own = [{**one, "rollout": n, "weight": 0.5} for n, place in enumerate(pair) for one in by_rollout[place]]
        found.rollout_switch = of_pair(switch, pair)
        found.learn_from([answers[place] for place in pair], rewards[list(pair)], own)
        loss = found.policy_loss(found.model, list(range(len(found.replay))))
        mean -= probs[pair[0]] * probs[pair[1]] * gradient(loss)
    # A group's own mean takes a share of 1 / G from the gradient.
    share = 1.0 if estimator == "rloo" else 0.5
    torch.testing.assert_close(mean, share * exact, atol=2e-4, rtol=1e-3)
    of_switch = dict(zip((name for name, _ in found.model.chooser.named_parameters()), parameters))
    sizes = {name: p.numel() for name, p in of_switch.items()}
    start = sum(size for name, size in itertools.takewhile(lambda kv: kv[0] != "switch.weight", sizes.items()))
    assert exact[start : start + sizes["switch.weight"]].abs().max() > 0.01


def test_decisions_have_the_advantage_of_their_segment(tmp_path, monkeypatch):
    options = {"gamma": 0.5, "gae_lambda": 1.0, "whiten_advantages": False, "rollout_prompts": 6}
    found = switch_trainer("ppo", tmp_path, **options)
    torch.nn.init.normal_(found.model.value.output.weight, generator=torch.Generator().manual_seed(0))
    _, _, made = kept_rollouts(found, monkeypatch)
    of_segments = {
        (one["rollout"], one["segment"]): a for one, a in zip(made, found.replay.notes["advantage"], strict=True)
    }
    keys = zip(found.rollout_switch.rollouts, found.rollout_switch.segments, strict=True)
    assert found.decisions.advantages.tolist() == pytest.approx([of_segments[key] for key in keys])
    assert len(set(found.decisions.advantages.tolist())) > 6


def test_decisions_are_compared_with_the_other_rollouts_where_plans_are_drawn_without_replacement(tmp_path):
    """They are drawn independently, as later plans are, those in first segments too."""
    found = switch_trainer("grpo", tmp_path, rollout_prompts=2, exploration="without_replacement")
    found.roll_out(0)
    rewards = torch.tensor([1.0, 2.0, 0.0, 5.0])
    made = [
        {"rollout": i, "segment": j, "log_prob": -1.0 - i / 4, "weight": 0.5 + i / 8} for i in range(4) for j in (0, 1)
    ]
    of_choices, of_decisions = found.advantages(rewards, made)
    assert of_decisions[::2] == of_decisions[1::2] == of_choices[1::2]
    assert of_choices[::2] != of_decisions[::2]


def test_rollouts_that_cannot_be_scored_are_not_learned_from(tmp_path, monkeypatch):
    found = switch_trainer("grpo", tmp_path, reward=lambda completions, **_: [1.0, 3.0, None, None], rollout_prompts=2)
    answers, _, _ = kept_rollouts(found, monkeypatch)
    kept = sum(len(answer.token_ids) - 1 for answer in answers[:2])
    assert len(found.decisions.states) == int(found.decisions.total) == kept > 0


@pytest.mark.parametrize("kind", ["grpo", "ppo"])
def test_a_switch_where_no_sentence_ends_is_learned(tmp_path, kind):
    """The reward is for what one plan says first and another behind it; no token of either ends a sentence."""
    rows = prompts(1)
    options = {"max_steps": 100, "learning_rate": 3e-3, "entropy_coef": 0.02, "logging_steps": 10}
    options |= {"rollout_prompts": 1, "num_generations": 48}
    if kind == "ppo":
        options |= {"rollout_prompts": 48, "num_generations": 1}
    for seed in range(3):
        model, wanted = switched_model(num_plans=2, ends=[271], std=0.0), []
        torch.nn.init.zeros_(model.chooser.output.weight)

        def reward(completion_ids, wanted=wanted, **columns):
            return [float(ids == wanted) for ids in completion_ids]

        found = switch_trainer(kind, tmp_path / str(seed), model, reward, rows=rows, seed=seed, **options)
        prompt = found.encoder(found.rows[0])
        (first,) = model.answers(found.encoder, [prompt], [0], 3, []).token_ids
        (behind,) = model.answers(found.encoder, [model.continued(prompt, first)], [1], 3, []).token_ids
        wanted += [*first, *behind]
        assert wanted not in model.answers(found.encoder, [prompt] * 2, [0, 1], 6, []).token_ids
        assert 271 not in wanted and found.evaluate(rows)["eval_reward"] == 0
        found.train()
        (answer,) = found.spoken([prompt], found.best_plans)
        assert answer.token_ids == wanted and 3 in answer.starts
        row = next(row for row in reversed(found.state.log_history) if "switch/rate" in row)
        assert 0 < row["switch/rate"] < 1 and row["switch/entropy"] > 0
        assert row["plans/segment_length"] > 1


@pytest.mark.parametrize("kind", ["grpo", "ppo"])
def test_a_resumed_run_is_the_same(tmp_path, kind):
    """From a checkpoint between two updates on the same rollouts."""
    options = {"save_strategy": "steps", "save_steps": 3, "max_steps": 10}
    whole, rest = whole_and_resumed(lambda folder: switch_trainer(kind, folder, **options), tmp_path)
    assert len(losses(whole)) == 10
    assert torch.equal(rest.decisions.states, whole.decisions.states)
    before = switched_model().chooser.switch.weight
    assert (whole.model.chooser.switch.weight - before).abs().max() > 1e-4
    saved = SwitchDecisions.load(tmp_path / "part" / "checkpoint-3")
    assert len(saved.states) == int(saved.total) > 0
    assert PlanModel.from_pretrained(
        tmp_path / "part" / "checkpoint-3", backbone=llama(num_hidden_layers=2).model
    ).has_switch


def test_what_is_drawn_depends_on_the_place_among_all_processes(tmp_path):
    found = switch_trainer("grpo", tmp_path)
    said, states = [[ENDS[0]]] * 40, torch.zeros(40, found.model.view.hidden_size)

    def drawn(first, rows):
        switch = RolloutSwitch(found, SimpleNamespace(first=first, count=80, batch=0))
        return switch(list(rows), [PlannedAnswer()] * 40, said, states), switch.rollouts

    there, numbers = drawn(40, range(40))
    alone, same_numbers = drawn(0, range(40, 80))
    assert torch.equal(there, alone) and numbers == same_numbers == list(range(40, 80))
    assert not torch.equal(there, drawn(0, range(40))[0])


def test_a_bandit_has_no_credit_for_a_switch(tmp_path):
    with pytest.raises(ValueError, match="`segment='switch'`: a bandit .* `PlanGRPOTrainer` or `PlanPPOTrainer`"):
        switch_trainer("bandit", tmp_path)


def test_an_engine_is_refused_before_the_run(tmp_path, monkeypatch):
    monkeypatch.setattr("latent_trl.trainer.plans.rl_trainer.check_engine", lambda *_, **__: None)
    with pytest.raises(ValueError, match="learned switch ends the segment .* Answer with transformers"):
        switch_trainer("grpo", tmp_path, use_vllm=True)


def test_ends_of_sentences_are_filled_in(tmp_path):
    model = switched_model(ends=None)
    switch_trainer("grpo", tmp_path, model)
    tokenizer = make_tokenizer()
    ends = model.plan_config.segment_end_token_ids
    assert tokenizer.convert_tokens_to_ids(".") in ends and tokenizer.convert_tokens_to_ids("a") not in ends
