"""RL over plans by policy gradient: gradients beside brute force, segments, ceiling, growth, exact resume."""

import copy
import itertools

import pytest
import torch
from test_plan_trainers import QUIET, even_length, losses, plan_model, prompts, short_backbone, warnings_are_heard
from tiny_models import llama, make_tokenizer

from latent_trl import (
    PlanBanditConfig,
    PlanBanditTrainer,
    PlanConfig,
    PlanGRPOConfig,
    PlanGRPOTrainer,
    PlanModel,
    PlanPPOConfig,
    PlanPPOTrainer,
    PlanSpaceConfig,
    PlanSpaceTrainer,
)
from latent_trl.data.prompts import PromptEncoder
from latent_trl.plans.branching import branch_answers
from latent_trl.trainer.plans import choosing
from latent_trl.trainer.plans.growth import widen_optimizer
from latent_trl.trainer.plans.grpo_trainer import advantages_without_replacement, drawn_with_weights
from latent_trl.trainer.plans.replay import Replay

assert warnings_are_heard
KINDS = {
    "bandit": (PlanBanditTrainer, PlanBanditConfig),
    "grpo": (PlanGRPOTrainer, PlanGRPOConfig),
    "ppo": (PlanPPOTrainer, PlanPPOConfig),
}


def trainer(kind, folder, model=None, reward=even_length, rows=None, space_args=None, **options):
    trainer_class, config_class = KINDS[kind]
    fields = {
        "max_steps": 8,
        "num_iterations": 4,
        "rollout_prompts": 5,
        "num_generations": 1 if kind == "ppo" else 2,
        "logging_steps": 1,
        "max_completion_length": 4,
        "save_strategy": "no",
    }
    return trainer_class(
        model or plan_model(),
        reward,
        config_class(str(folder), **{**QUIET, **fields, **options}),
        rows or prompts(),
        prompts(5),
        make_tokenizer(),
        space_args=space_args,
    )


def segmented_model(num_plans=3, segment=2, **options):
    """Plans for segments of a backbone that never ends an answer."""
    tiny = llama(num_hidden_layers=2)
    config = PlanConfig(num_plans=num_plans, depth=1, rank=2, init_std=2.0, segment=segment, **options)
    model = PlanModel(tiny.model, config)
    model.backbone.generation_config.eos_token_id = None
    torch.nn.init.normal_(model.chooser.output.weight, std=0.2, generator=torch.Generator().manual_seed(3))
    return model


def gradient(loss, chooser):
    return torch.cat([g.flatten() for g in torch.autograd.grad(loss, list(chooser.parameters()))])


def all_sequences(found, monkeypatch):
    """Rollouts of one prompt under every sequence of two plans: choices, rewards, and the choices' states."""
    plans = found.model.plan_config.num_plans
    pairs = torch.tensor(list(itertools.product(range(plans), repeat=2)))
    kept = {}
    found.ends = []
    found.args.num_generations = len(pairs)

    def keep(answers, rewards, made):
        kept.update(answers=answers, rewards=rewards, made=made)

    with monkeypatch.context() as patched:
        patched.setattr(found, "first_plans", lambda *_: (pairs[None, :, 0], torch.ones(1, len(pairs))))
        patched.setattr(choosing, "gumbel", lambda *_: 1e4 * torch.eye(plans)[pairs[:, 1]])
        patched.setattr(found, "learn_from", keep)
        found.roll_out(0)
    made = [kept["made"][2 * i : 2 * i + 2] for i in range(len(pairs))]
    assert [[one["plan"] for one in own] for own in made] == pairs.tolist()
    states = [[found.replay.states_at(one["prompt"], one["said"]).states for one in own] for own in made]
    return made, kept["rewards"], states


def by_hand(found, states, made):
    """log π of each sequence, with a gradient: the sum over its segments."""
    laws = [[found.model.chooser(s[None], torch.ones(1, len(s))).log_softmax(dim=1)[0] for s in own] for own in states]
    return torch.stack([sum(law[one["plan"]] for law, one in zip(a, b)) for a, b in zip(laws, made)])


@pytest.mark.parametrize("estimator", ["rloo", "grpo"])
def test_the_gradient_is_that_of_brute_force_over_all_sequences(tmp_path, monkeypatch, estimator):
    """Over all pairs of sequences, each as likely as it is, RLOO's mean gradient is that of the mean reward."""
    options = {"rollout_prompts": 1, "advantage_estimator": estimator, "scale_rewards": "none"}
    found = trainer(
        "grpo",
        tmp_path,
        segmented_model(),
        lambda completion_ids, **_: [float(sum(ids) % 7) for ids in completion_ids],
        rows=prompts(1),
        **options,
    )
    made, rewards, states = all_sequences(found, monkeypatch)
    assert len(set(rewards.tolist())) > 3
    log_probs = by_hand(found, states, made)
    probs = log_probs.detach().exp()
    assert probs.sum().item() == pytest.approx(1.0, abs=1e-5) and probs.max() < 0.9
    exact = gradient((log_probs.exp() * rewards).sum(), found.model.chooser)
    found.args.num_generations = 2
    mean = torch.zeros_like(exact)
    for i, j in itertools.product(range(len(made)), repeat=2):
        pair = [{**one, "rollout": n, "weight": 0.5} for n, place in enumerate((i, j)) for one in made[place]]
        found.learn_from([None, None], rewards[[i, j]], pair)
        loss = found.policy_loss(found.model, list(range(len(found.replay))))
        mean -= probs[i] * probs[j] * gradient(loss, found.model.chooser)
    # A group's own mean takes a share of 1 / G from the gradient.
    share = 1.0 if estimator == "rloo" else 0.5
    torch.testing.assert_close(mean, share * exact, atol=2e-4, rtol=1e-3)
    assert exact.abs().max() > 0.01


def test_later_segments_follow_what_was_said(tmp_path, monkeypatch):
    found = trainer("grpo", tmp_path, segmented_model(), rows=prompts(1), rollout_prompts=1)
    made, _, states = all_sequences(found, monkeypatch)
    prompt = found.replay.states[0]
    for (first, second), (at_first, at_second) in zip(made, states):
        assert first["said"] == "" and torch.equal(at_first, prompt)
        said = [int(token) for token in second["said"].split(":")[1].split(",")]
        row = found.rows[0]
        inputs = found.encoder.collate([found.model.continued(found.encoder(row), said)])
        torch.testing.assert_close(at_second, found.states_of(inputs)[0].states, atol=1e-5, rtol=1e-4)
        assert len(at_second) == len(prompt) + 2


def test_draws_without_replacement_leave_the_gradient_unbiased():
    generator = torch.Generator().manual_seed(0)
    logits, rewards = torch.tensor([0.5, -0.3, 1.2, 0.0]), torch.tensor([1.0, 0.2, -0.5, 0.7])
    rows = 200_000
    plans, weights = drawn_with_weights(logits.expand(rows, -1), 2, 1.0, generator)
    probs = logits.softmax(0)
    assert (plans[:, 0] != plans[:, 1]).all()
    # The weighted sum of anything has the mean as expectation.
    sums = (weights * rewards[plans]).sum(dim=1)
    assert sums.mean().item() == pytest.approx((probs * rewards).sum().item(), abs=5 * sums.std().item() / rows**0.5)
    of_rows = rewards[plans].flatten(), probs[plans].flatten(), weights.flatten()
    first, later = (one.view(rows, 2) for one in advantages_without_replacement(*of_rows, 2))
    scores = torch.eye(4)[plans] - probs
    each = ((weights * first)[..., None] * scores).sum(dim=1)
    exact = probs * (rewards - (probs * rewards).sum())
    assert ((each.mean(dim=0) - exact).abs() < 5 * each.std(dim=0) / rows**0.5).all()
    # A later choice has its own reward, whatever the others of the group had.
    noise = torch.randn(rows, 2, generator=generator)
    own = (weights * noise * (rewards[plans] + 0.3 * noise)).sum(dim=1)
    based = (weights * noise * (later + 0.3 * noise)).sum(dim=1)
    assert based.mean().item() == pytest.approx(0.3, abs=5 * based.std().item() / rows**0.5)
    assert own.mean().item() == pytest.approx(0.3, abs=5 * own.std().item() / rows**0.5)


def test_ratios_are_clipped_and_clamped(tmp_path):
    found = trainer("grpo", tmp_path, rows=prompts(2), rollout_prompts=1)
    found.roll_out(0)
    assert len(found.replay) == 2
    found.replay.notes = {"log_prob": [-1e6, 1e6], "advantage": [1.0, -1.0], "weight": [0.5, 0.5]}
    loss = found.policy_loss(found.model, [0, 1])
    # Both have passed the range, on the side where it counts: 1.2 and 0.8.
    assert loss.item() == pytest.approx(-0.5 * (1.2 - 0.8), abs=1e-5)
    assert gradient(loss, found.model.chooser).abs().max() == 0


def test_plans_whose_probability_is_zero_leave_gradients(tmp_path):
    found = trainer("grpo", tmp_path, rows=prompts(2), rollout_prompts=1)
    with torch.no_grad():
        found.model.chooser.output.bias.copy_(torch.tensor([300.0, 0.0, -300.0, 0.0]))
    found.roll_out(0)
    found.replay.notes["advantage"] = [1.0, -1.0]
    assert gradient(found.policy_loss(found.model, [0, 1]), found.model.chooser).isfinite().all()


def test_ppo_discounts_a_segment_and_learns_a_value(tmp_path):
    options = {"gamma": 0.5, "gae_lambda": 1.0, "whiten_advantages": False, "rollout_prompts": 3}
    found = trainer(
        "ppo", tmp_path, segmented_model(), lambda completions, **_: [1.0, 3.0, None], rows=prompts(3), **options
    )
    torch.nn.init.normal_(found.model.value.output.weight, generator=torch.Generator().manual_seed(0))
    found.ends = []
    found.roll_out(0)
    notes = found.replay.notes
    assert len(found.replay) == 4 and found.replay.rewards == [1.0, 1.0, 3.0, 3.0]
    assert notes["return"] == pytest.approx([0.5, 1.0, 1.5, 3.0])
    values = torch.tensor(notes["value"])
    torch.testing.assert_close(torch.tensor(notes["advantage"]), torch.tensor(notes["return"]) - values)
    some = found.replay.choices([0, 1, 2, 3])
    torch.testing.assert_close(some.read(found.model.value(some.states, some.mask))[:, 0], values)
    loss = found.policy_loss(found.model, [0, 1, 2, 3])
    grads = torch.autograd.grad(loss, found.model.value.output.bias)
    expected = 0.5 * 2 * (values - torch.tensor(notes["return"])).sum() / 3
    torch.testing.assert_close(grads[0][0], expected)


@pytest.mark.parametrize("kind", ["grpo", "ppo", "bandit", "without_replacement", "thompson"])
def test_the_plan_of_each_prompt_is_found(tmp_path, kind):
    """The reward is 1 under one plan, which depends on the prompt."""
    model = plan_model(init_std=2.0)
    rows = prompts(12)
    options = {
        "max_steps": 160,
        "rollout_prompts": 12,
        "learning_rate": 3e-3,
        "num_generations": 3,
        "logging_steps": 40,
    }
    if kind in ("bandit", "thompson"):
        options |= {"exploration": "thompson" if kind == "thompson" else "softmax", "exploration_temperature": 3.0}
    if kind == "without_replacement":
        options["exploration"] = kind
    name = {"without_replacement": "grpo", "thompson": "bandit"}.get(kind, kind)
    if name == "grpo":
        options |= {"learning_rate": 1e-3, "entropy_coef": 0.02, "max_steps": 320}
    if name == "ppo":
        options |= {"num_generations": 1, "rollout_prompts": 36}
    right = {}

    def reward(completions, number, **columns):
        return [float(text == right[n]) for text, n in zip(completions, number)]

    found = trainer(name, tmp_path, model, reward, rows, **options)
    for i, row in enumerate(rows):
        encoded = found.encoder({"_row": i, **row})
        ids = model.answers(found.encoder, [encoded], [i % 4], 4, found.ends).token_ids[0]
        right[i] = make_tokenizer().decode(ids, skip_special_tokens=True).strip()
    before = found.evaluate(rows)["eval_reward"]
    found.train()
    assert before < 0.7 and found.evaluate(rows)["eval_reward"] > 0.9
    row = next(row for row in reversed(found.state.log_history) if "reward_std" in row)
    assert {"reward", "rollouts", "plans/entropy", "completions/mean_length"} <= row.keys()


def whole_and_resumed(make, folder, step=3):
    """Trainers that `make` gives, after a whole run and after one that went on from `step`: the same to the bit."""
    whole, part = make(folder / "whole"), make(folder / "part")
    whole.train()
    part.args.max_steps = 6
    part.train()
    rest = make(folder / "part")
    rest.train(resume_from_checkpoint=str(folder / "part" / f"checkpoint-{step}"))
    assert losses(rest) == losses(whole)
    for name, tensor in whole.model.state_dict().items():
        assert torch.equal(tensor, rest.model.state_dict()[name]), name
    return whole, rest


@pytest.mark.parametrize("kind", ["grpo", "ppo", "bandit"])
def test_a_resumed_run_is_the_same(tmp_path, kind):
    options = {"save_strategy": "steps", "save_steps": 3, "max_steps": 10, "num_generations": 1 if kind == "ppo" else 2}

    whole, rest = whole_and_resumed(lambda folder: trainer(kind, folder, segmented_model(), **options), tmp_path)
    assert (rest.replay.said, rest.replay.notes) == (whole.replay.said, whole.replay.notes)
    assert any(rest.replay.said)


# Growth


def space_args(folder, **options):
    fields = {"max_steps": 6, "per_device_train_batch_size": 4, "max_completion_length": 4, "branch_min_prob": 0.005}
    return PlanSpaceConfig(str(folder), **{**QUIET, **fields, "answers_per_prompt": 3, **options})


def test_plans_are_added_and_nothing_else_changes():
    model = plan_model()
    inputs = llama().text_inputs
    torch.nn.init.normal_(model.chooser.output.bias)
    logits = model.plan_logits(**inputs)
    held = [model.generate(**inputs, plan_ids=plan) for plan in range(4)]
    model.add_plans(3)
    assert model.plan_config.num_plans == 7 and model.plans.num_plans == 7
    grown = model.plan_logits(**inputs)
    torch.testing.assert_close(grown[:, :4], logits)
    torch.testing.assert_close(grown[:, 4:], logits.mean(dim=1, keepdim=True).expand(-1, 3))
    for plan in range(4):
        assert torch.equal(model.generate(**inputs, plan_ids=plan), held[plan])
    distinct = {tuple(model.generate(**inputs, plan_ids=plan).flatten().tolist()) for plan in range(4, 7)}
    assert len(distinct) > 1
    with pytest.raises(ValueError, match="`count` must be at least 1, got 0"):
        model.add_plans(0)


def test_only_new_plans_are_learned(tmp_path):
    model = plan_model()
    model.chooser_is_trained = True
    model.add_plans(2)
    before = copy.deepcopy(model.plans.state_dict())
    options = {"new_plans": 2, "eval_strategy": "no", "save_strategy": "no"}
    PlanSpaceTrainer(model, space_args(tmp_path, **options), prompts(), processing_class=make_tokenizer()).train()
    for name, tensor in model.plans.state_dict().items():
        assert torch.equal(tensor[:4], before[name][:4])
        assert not torch.equal(tensor[4:], before[name][4:])


@pytest.mark.parametrize(
    "options, message",
    [
        ({"new_plans": 4}, "`new_plans` is 4, and there are 4 plans"),
        ({"new_plans": 2, "weight_decay": 0.1}, "`weight_decay` .* would change the plans that are not learned"),
        ({"segment_starts": 0}, "`segment_starts` must be at least 1"),
    ],
)
def test_growth_that_cannot_be_is_refused(tmp_path, options, message):
    with pytest.raises(ValueError, match=message):
        args = space_args(tmp_path, eval_strategy="no", **options)
        PlanSpaceTrainer(plan_model(), args, prompts(), processing_class=make_tokenizer())


GROWING = {
    "reward": lambda completions, **_: [0.5] * len(completions),
    "ceiling_prompts": 4,
    "ceiling_steps": 4,
    "grow_plans": 2,
    "max_plans": 8,
    "measure_ceiling": False,
}


def test_a_chooser_at_the_ceiling_gets_more_plans(tmp_path):
    found = trainer("bandit", tmp_path, space_args=space_args(tmp_path / "space"), **GROWING)
    old = copy.deepcopy(found.model.plans.state_dict())
    found.train()
    # All rewards are the same, so that more plans are of no use, and no more are added.
    assert found.model.plan_config.num_plans == 6 and found.growth_is_over
    rows = [row for row in found.state.log_history if "ceiling" in row]
    assert [(row["ceiling"], row["ceiling/reward"]) for row in rows] == [(0.5, 0.5)] * 2
    assert rows[0]["plans/total"] == 6 and found.ceiling.rewards.shape == (4, 6)
    for name, tensor in found.model.plans.state_dict().items():
        assert torch.equal(tensor[:4], old[name])
    assert not any(parameter.requires_grad for parameter in found.model.plans.parameters())


def test_what_no_plan_said_is_found_by_plans_that_are_added(tmp_path):
    model = PlanModel(short_backbone(), PlanConfig(num_plans=2, depth=0, rank=8))
    rows = prompts(6)
    encoder = PromptEncoder(make_tokenizer())
    encoded = [encoder({"_row": i, **row}) for i, row in enumerate(rows)]
    ends = model.backbone.generation_config.eos_token_id
    found = branch_answers(model.view, encoder, encoded, 4, ends, min_prob=0.005)
    said = [model.answers(encoder, encoded, [plan] * 6, 4, ends).token_ids for plan in range(2)]
    wanted = [
        next(one.text for one in own if one.ended and all(one.token_ids != of_plan[i] for of_plan in said))
        for i, own in enumerate(found)
    ]

    def reward(completions, number, **columns):
        return [float(text == wanted[n]) for text, n in zip(completions, number)]

    options = {**GROWING, "reward": reward, "ceiling_prompts": 6, "grow_plans": 4, "max_steps": 4, "max_plans": 6}
    learned = space_args(tmp_path / "space", max_steps=40, learning_rate=2e-2, per_device_train_batch_size=6)
    grown = trainer("bandit", tmp_path, model, rows=rows, space_args=learned, **options)
    grown.train()
    before = grown.ceiling.rewards[:, :2].amax(dim=1).mean().item()
    assert before == 0 and grown.ceiling.best > 0.3 and not grown.growth_is_over


def test_a_chooser_below_the_ceiling_gets_none(tmp_path):
    found = trainer("bandit", tmp_path, **{**GROWING, "reward": even_length, "num_iterations": 8})
    found.train()
    row = next(row for row in found.state.log_history if "ceiling" in row)
    grown = row["ceiling/reward"] > row["ceiling"] - 0.01
    assert (found.model.plan_config.num_plans == 6) == grown


@pytest.mark.parametrize("kind", ["bandit", "ppo"])
def test_a_run_that_grew_is_resumed_as_it_was(tmp_path, kind):
    options = {**GROWING, "max_steps": 10, "save_strategy": "steps", "save_steps": 6}

    def make(folder):
        return trainer(kind, folder, plan_model(), space_args=space_args(tmp_path / "space"), **options)

    whole, rest = whole_and_resumed(make, tmp_path, step=6)
    assert rest.model.plan_config.num_plans == whole.model.plan_config.num_plans == 6
    assert rest.growth_is_over
    again = PlanModel.from_pretrained(rest.checkpoint_folder(), backbone=short_backbone())
    assert again.plan_config.num_plans == 6


def test_an_optimizer_keeps_what_it_knows_of_rows_that_stay():
    old, other = torch.nn.Parameter(torch.zeros(2, 3)), torch.nn.Parameter(torch.zeros(1))
    optimizer = torch.optim.AdamW([old, other], lr=0.1)
    (old.sum() + other.sum()).backward()
    optimizer.step()
    moments = {name: value.clone() for name, value in optimizer.state[old].items()}
    new = torch.nn.Parameter(torch.cat([old.detach(), torch.ones(2, 3)]))
    widen_optimizer(optimizer, [old], [new])
    assert [id(p) for p in optimizer.param_groups[0]["params"]] == [id(new), id(other)] and old not in optimizer.state
    for name in ("exp_avg", "exp_avg_sq"):
        assert torch.equal(optimizer.state[new][name][:2], moments[name])
        assert not optimizer.state[new][name][2:].any()
    assert optimizer.state[new]["step"] == 1


def test_segments_have_a_ceiling_of_sequences(tmp_path):
    found = trainer("grpo", tmp_path, segmented_model(), ceiling_prompts=3, measure_ceiling=False)
    found.train()
    assert found.ceiling.rewards.shape == (3, 6)
    row = next(row for row in found.state.log_history if "ceiling" in row)
    assert row["ceiling/reward"] <= 1 and row["ceiling"] == found.ceiling.best


def test_a_space_is_learned_where_segments_start(tmp_path):
    model = segmented_model(num_plans=4)
    options = {"eval_strategy": "steps", "eval_steps": 3, "segment_starts": 2, "branch_min_prob": 0.002}
    found = PlanSpaceTrainer(
        model, space_args(tmp_path, **options), prompts(), prompts(3), make_tokenizer(), reward_funcs=even_length
    )
    found.train()
    starts = [start for own in found.starts.values() for start in own]
    assert {len(start.said) for start in starts} == {0, 2}
    assert all(len(one.token_ids) <= 2 for start in starts for one in start.answers)
    for own in found.starts.values():
        assert own[1].said in [one.token_ids for one in own[0].answers]
    assert 0 <= found.report.metrics()["coverage"] <= 1


@pytest.mark.parametrize(
    "kind, options, message",
    [
        ("grpo", {"num_generations": 1}, "`num_generations` must be at least 2 for `advantage_estimator='grpo'`"),
        ("grpo", {"advantage_estimator": "gae"}, "`advantage_estimator` must be one of 'grpo', 'rloo'"),
        ("grpo", {"scale_rewards": "all"}, "`scale_rewards` must be one of"),
        ("grpo", {"epsilon": 0.0}, "`epsilon` must be between 0 and 1"),
        ("grpo", {"exploration": "greedy"}, "`exploration` must be one of 'independent', 'without_replacement'"),
        ("grpo", {"exploration": "without_replacement", "num_generations": 4}, "must be below the 4 plans"),
        ("grpo", {"exploration": "without_replacement", "scale_rewards": "group"}, "leave `scale_rewards` out"),
        (
            "grpo",
            {"exploration": "without_replacement", "advantage_estimator": "rloo"},
            "leave `advantage_estimator` out",
        ),
        ("ppo", {"exploration": "without_replacement"}, "PPO has a value in their place"),
        ("ppo", {"gamma": 1.5}, r"`gamma` must be in \[0, 1\]"),
        ("bandit", {"exploration": "greedy"}, "`exploration` must be 'softmax' or 'thompson'"),
        ("bandit", {"ceiling_prompts": -1}, "`ceiling_prompts` must be at least 0"),
        ("bandit", {"grow_plans": 2}, "`grow_plans=2` needs `ceiling_prompts`"),
        ("bandit", {"grow_plans": 2, "ceiling_prompts": 2, "max_plans": 5}, "could add nothing to 4 plans"),
        ("bandit", {"grow_plans": 2, "ceiling_prompts": 2, "load_best_model_at_end": True}, "from before plans"),
        ("bandit", {"space_args": True}, "`space_args` is not read without `grow_plans`"),
    ],
)
def test_a_run_that_cannot_be_is_refused(tmp_path, kind, options, message):
    if "space_args" in options:
        options = {"space_args": space_args(tmp_path)}
    with pytest.raises(ValueError, match=message):
        trainer(kind, tmp_path, **options)


def test_a_segment_as_long_as_an_answer_is_refused(tmp_path):
    with pytest.raises(ValueError, match="held for 4 tokens .* at most `max_completion_length=4`"):
        trainer("grpo", tmp_path, segmented_model(segment=4))


def test_segments_of_which_an_answer_has_one_are_named(tmp_path, caplog):
    model = PlanModel(short_backbone(), PlanConfig(num_plans=4, depth=1, rank=2, segment="sentence"))
    args = space_args(tmp_path, eval_strategy="no", save_strategy="no", max_steps=1)
    PlanSpaceTrainer(model, args, prompts(), processing_class=make_tokenizer()).train()
    assert "No answer goes on behind its first segment (`segment='sentence'`)" in caplog.text


def test_a_run_of_another_trainer_is_not_resumed(tmp_path):
    """What a value or notes would be missing from is named."""
    trainer("grpo", tmp_path, save_strategy="steps", save_steps=4).train()
    with pytest.raises(Exception, match="plan_value.safetensors"):
        trainer("ppo", tmp_path).train(resume_from_checkpoint=True)


def test_states_of_several_choices_are_read_once():
    replay = Replay()
    replay.states = {3: torch.full((2, 1), 3.0), 5: torch.full((1, 1), 5.0)}
    replay.said_states = {"3:7": torch.full((1, 1), 7.0)}
    for prompt, plan, said in ((3, 0, ""), (5, 1, ""), (3, 2, ""), (3, 3, "3:7")):
        replay.add(prompt, plan, 1.0, said)
    some = replay.choices([3, 2, 1, 0])
    assert some.states[..., 0].tolist() == [[3.0, 3.0, 7.0], [0.0, 3.0, 3.0], [0.0, 0.0, 5.0]]
    assert some.mask.tolist() == [[1, 1, 1], [0, 1, 1], [0, 0, 1]]
    assert some.plans.tolist() == [3, 2, 1, 0] and some.rows.tolist() == [0, 1, 2, 1]
    assert some.read(some.states[:, -1, 0]).tolist() == [7.0, 3.0, 5.0, 3.0]


def test_what_had_been_said_is_kept_as_long_as_choices_are():
    replay = Replay()
    replay.said_states = {"0:1": torch.ones(1, 2), "0:2": torch.ones(1, 2)}
    replay.add(0, 1, 0.5, "0:1", log_prob=-1.0)
    replay.start_batch()
    assert list(replay.said_states) == ["0:1"]
    replay.clear_choices()
    assert list(replay.said_states) == ["0:1"] and not len(replay)
    replay.start_batch()
    assert not replay.said_states
