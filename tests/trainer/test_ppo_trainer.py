"""The PPO trainer: its losses, groups of parameters, warm-up, KL, and any number of samples per prompt."""

import math

import pytest
import torch
from rl_models import prompts
from tiny_models import latent, latent_config

from latent_trl import LatentActionModel, LatentActionPPOConfig, LatentActionPPOTrainer
from latent_trl.trainer.rollout.rollout import Rollout
from latent_trl.trainer.run.defaults import rate_by_width

COMMON = {
    "use_cpu": True,
    "bf16": False,
    "per_device_train_batch_size": 4,
    "max_completion_length": 5,
    "logging_steps": 1,
    "learning_rate": 1e-2,
    "beta": 0.05,
    "save_strategy": "no",
    "disable_tqdm": True,
    "max_steps": 4,
    "num_iterations": 2,
}


def letters(completions, **columns):
    return [float(len(set(completion))) for completion in completions]


def build(folder, reward=letters, **options):
    model, tiny = latent("llama", latent_config(use_projector=False))
    return LatentActionPPOTrainer(
        model,
        reward,
        LatentActionPPOConfig(str(folder), **{**COMMON, **options}),
        train_dataset=prompts(12),
        eval_dataset=prompts(4),
        processing_class=tiny.processor,
    )


def rollout(trainer, rows: int = 4):
    trainer.model.train()
    trainer.current_gradient_accumulation_steps = 1
    torch.manual_seed(0)
    return trainer._generate_and_score_completions([trainer.train_dataset[i] for i in range(rows)])


@pytest.mark.parametrize("kl_in", ["reward", "loss"])
def test_loss_is_the_plain_sums(tmp_path, kl_in):
    """Clipped policy loss, clipped value loss and KL of a rollout batch, written out in float64."""
    trainer = build(tmp_path, kl_in=kl_in, whiten_advantages=False)
    batch = rollout(trainer)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in trainer.model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    loss = trainer._compute_loss(trainer.model, batch).item()
    scored = trainer.score(trainer.model, Rollout.from_batch(batch))
    log_probs, values = scored.log_probs.double(), scored.values.double()
    old, ref = batch["old_per_token_logps"].double(), batch["ref_per_token_logps"].double()
    total, count = 0.0, 0
    for row in range(len(values)):
        for t in range(int(batch["completion_mask"][row].sum())):
            advantage, target = batch["advantages"][row, t].item(), batch["returns"][row, t].item()
            ratio = (log_probs[row, t] - old[row, t]).exp().item()
            total -= min(ratio * advantage, min(max(ratio, 0.8), 1.2) * advantage)
            if kl_in == "loss":
                difference = (ref[row, t] - log_probs[row, t]).item()
                # TRL weighs the estimate by the ratio, which makes its gradient unbiased.
                total += 0.05 * ratio * (math.exp(difference) - difference - 1)
            v, v_old = values[row, t].item(), batch["old_values"][row, t].item()
            near = v_old + min(max(v - v_old, -0.2), 0.2)
            total += 0.5 * max((v - target) ** 2, (near - target) ** 2)
            count += 1
    assert loss == pytest.approx(total / count, rel=1e-6, abs=1e-6)


def test_kl_is_taken_off_each_codes_reward(tmp_path):
    trainer = build(tmp_path, whiten_advantages=False, gae_lambda=1.0)
    with torch.no_grad():
        trainer.model.policy.head.weight.mul_(1.5)
    batch = rollout(trainer)
    kl = (batch["old_per_token_logps"] - batch["ref_per_token_logps"]) * batch["completion_mask"]
    assert kl.abs().max() > 1e-3
    later = kl.flip(1).cumsum(1).flip(1)
    texts = trainer.processing_class.batch_decode(batch["completion_ids"], skip_special_tokens=True)
    rewards = torch.tensor(letters(texts))
    expected = (rewards[:, None] - 0.05 * later) * batch["completion_mask"]
    torch.testing.assert_close(batch["returns"], expected, atol=1e-5, rtol=1e-5)


def test_advantages_are_whitened_over_the_rollout_batch(tmp_path):
    batch = rollout(build(tmp_path), rows=8)
    kept = batch["advantages"][batch["completion_mask"].bool()]
    assert kept.mean().item() == pytest.approx(0, abs=1e-5)
    assert kept.std(correction=0).item() == pytest.approx(1, abs=1e-4)


def test_value_head_has_a_rate_of_its_own(tmp_path):
    trainer = build(tmp_path, learning_rate=3e-4, value_learning_rate=7e-4, weight_decay=0.1)
    trainer.create_optimizer()
    value = {id(p) for p in trainer.model.value_head.parameters()}
    rates = {id(p): group["lr"] for group in trainer.optimizer.param_groups for p in group["params"]}
    assert all(rate == (7e-4 if key in value else 3e-4) for key, rate in rates.items())
    trained = {id(p) for p in trainer.model.parameters() if p.requires_grad}
    assert rates.keys() == trained
    decays = {g["weight_decay"] for g in trainer.optimizer.param_groups if {id(p) for p in g["params"]} & value}
    assert decays == {0.0, 0.1}


def test_policy_waits_while_the_value_warms_up(tmp_path):
    trainer = build(tmp_path, value_warmup_steps=3, max_steps=3, weight_decay=0.1)
    before = {name: p.detach().clone() for name, p in trainer.model.named_parameters()}
    trainer.train()
    for name, parameter in trainer.model.named_parameters():
        assert torch.equal(parameter, before[name]) != name.startswith("value_head"), name
    # Nothing was remembered of the policy, so its first update is a first one.
    policy = {id(p) for p in trainer.model.policy.parameters()}
    assert not any(id(p) in policy for p in trainer.optimizer.state)
    trainer = build(tmp_path, value_warmup_steps=3, max_steps=4)
    before = {name: p.detach().clone() for name, p in trainer.model.policy.named_parameters()}
    trainer.train()
    assert not torch.equal(trainer.model.policy.head.weight, before["head.weight"])


@pytest.mark.parametrize("trains", [True, False])
def test_value_loss_moves_the_trunk_only_when_it_may(tmp_path, trains):
    trainer = build(tmp_path, value_trains_policy_trunk=trains, beta=0.0)
    with torch.no_grad():
        trainer.model.value_head.head.weight.normal_()
    batch = rollout(trainer)
    batch["advantages"] = torch.zeros_like(batch["advantages"])
    trainer._compute_loss(trainer.model, batch).backward()
    moved = max(
        p.grad.abs().max().item() for p in trainer.model.policy.decoder_stack.parameters() if p.grad is not None
    )
    assert (moved > 0) == trains
    assert trainer.model.value_head.head.weight.grad.abs().max() > 0


@pytest.mark.parametrize("samples, rows", [(1, 1), (1, 3), (2, 4), (3, 3)])
def test_any_number_of_samples_per_prompt(tmp_path, samples, rows):
    trainer = build(
        tmp_path, num_generations=samples, per_device_train_batch_size=rows, max_steps=2, beta=0.0, eval_strategy="no"
    )
    assert (trainer.args.num_generations, trainer.args.per_device_train_batch_size) == (samples, rows)
    assert trainer.args.generation_batch_size == rows
    trainer.train()
    assert trainer.state.global_step == 2


def test_single_samples_divide_batches_as_they_are(tmp_path):
    args = LatentActionPPOConfig(
        str(tmp_path), use_cpu=True, bf16=False, per_device_train_batch_size=3, gradient_accumulation_steps=5
    )
    assert (args.generation_batch_size, args.steps_per_generation, args.num_generations_eval) == (15, 5, 1)
    args = LatentActionPPOConfig(
        str(tmp_path), use_cpu=True, bf16=False, per_device_train_batch_size=3, generation_batch_size=9
    )
    assert (args.generation_batch_size, args.steps_per_generation) == (9, 3)


def test_minibatches_and_accumulation_give_the_loss_of_the_whole(tmp_path):
    """The value loss, as the policy loss, is a mean over all codes of an update, however it is split."""
    trainer = build(tmp_path, gradient_accumulation_steps=2, per_device_train_batch_size=2, steps_per_generation=2)
    batch = rollout(trainer)
    trainer.args.steps_per_generation = 1
    whole = trainer._compute_loss(trainer.model, batch).item()
    trainer.args.steps_per_generation = 2
    trainer.current_gradient_accumulation_steps = 2
    halves = []
    for part in (slice(0, 2), slice(2, 4)):
        rows = {k: v[part] if v.ndim else v for k, v in batch.items()}
        halves.append(trainer._compute_loss(trainer.model, rows).item())
    assert sum(halves) == pytest.approx(whole, rel=1e-5)


def test_evaluation_during_training(tmp_path):
    trainer = build(tmp_path, eval_strategy="steps", eval_steps=2, per_device_eval_batch_size=2)
    trainer.train()
    logs = [log for log in trainer.state.log_history if "eval_reward" in log]
    assert len(logs) == 2
    assert {"eval_ppo/value_loss", "eval_ppo/explained_variance", "eval_loss"} <= logs[0].keys()


def test_metrics_and_adaptive_kl(tmp_path):
    trainer = build(tmp_path, kl_target=0.01, kl_horizon=10, max_steps=4)
    trainer.train()
    logs = [log for log in trainer.state.log_history if "ppo/value_loss" in log]
    names = {"value_loss", "value_clip_fraction", "approx_kl", "clip_fraction"}
    assert {f"ppo/{name}" for name in names} <= logs[0].keys()
    names = {"explained_variance", "value_mean", "return_mean", "advantage_std", "kl_coef", "kl_per_completion"}
    assert {f"ppo/{name}" for name in names} <= logs[0].keys() and "kl" in logs[0]
    assert "frac_reward_zero_std" not in logs[0]
    assert logs[0]["ppo/approx_kl"] == pytest.approx(0, abs=1e-6) and logs[1]["ppo/approx_kl"] > 0
    # The first rollout has no divergence, so the coefficient falls by the fifth at most: 4 completions of 10.
    assert logs[2]["ppo/kl_coef"] == pytest.approx(0.05 * (1 - 0.2 * 0.4))


def test_unscorable_completion_teaches_nothing(tmp_path):
    def some(completions, **columns):
        return [None, *letters(completions)[1:]]

    trainer = build(tmp_path, some)
    batch = rollout(trainer)
    assert (batch["advantages"][0] == 0).all() and (batch["value_mask"][0] == 0).all()
    assert (batch["value_mask"][1:] == batch["completion_mask"][1:]).all()
    assert torch.isfinite(trainer._compute_loss(trainer.model, batch))


def test_all_unscorable_or_truncated_batch_is_finite(tmp_path):
    trainer = build(tmp_path, lambda completions, **columns: [None] * len(completions))
    assert torch.isfinite(trainer._compute_loss(trainer.model, rollout(trainer)))
    trainer = build(tmp_path, mask_truncated_completions=True)
    batch = rollout(trainer)
    assert (batch["completion_mask"].sum(dim=1) == 0).any()
    assert torch.isfinite(trainer._compute_loss(trainer.model, batch))
    assert torch.isfinite(batch["advantages"]).all() and torch.isfinite(batch["returns"]).all()


def test_value_head_is_saved_and_loaded(tmp_path):
    trainer = build(tmp_path)
    trainer.train()
    trainer.save_model(str(tmp_path / "final"))
    backbone = trainer.model.backbone
    loaded = LatentActionModel.from_pretrained(tmp_path / "final", backbone=backbone)
    assert torch.equal(loaded.value_head.head.weight, trainer.model.value_head.head.weight)
    again = LatentActionPPOTrainer(
        loaded,
        letters,
        LatentActionPPOConfig(str(tmp_path), **COMMON),
        train_dataset=prompts(12),
        processing_class=trainer.processing_class,
    )
    assert again.model.value_head.head.weight.abs().max() > 0


def test_half_precision_components_get_float32_masters(tmp_path):
    model, tiny = latent("llama", latent_config(use_projector=False))
    model = model.to(torch.bfloat16)
    trainer = LatentActionPPOTrainer(
        model,
        letters,
        LatentActionPPOConfig(str(tmp_path), **{**COMMON, "bf16": True}),
        train_dataset=prompts(12),
        processing_class=tiny.processor,
    )
    trained = {p.dtype for p in trainer.model.parameters() if p.requires_grad}
    frozen = {p.dtype for p in trainer.model.parameters() if not p.requires_grad}
    assert trained == {torch.float32} and frozen == {torch.bfloat16}
    trainer.train()
    assert trainer.state.global_step == 4


@pytest.mark.parametrize(
    "options, words",
    [
        ({"preset": "dapo"}, "`preset='dapo'`"),
        ({"loss_type": "cispo"}, "`loss_type`"),
        ({"kl_in": "both"}, "`kl_in`"),
        ({"num_generations": 0}, "`num_generations`"),
        ({"gae_lambda": 1.5}, "`gae_lambda`"),
        ({"value_clip_range": 0.0}, "`value_clip_range`"),
        ({"kl_target": 1.0, "beta": 0.0}, "`kl_target`"),
        ({"dynamic_sampling_rounds": 2}, "`dynamic_sampling_rounds`"),
        ({"multi_objective_aggregation": "normalize_then_sum"}, "`multi_objective_aggregation="),
        ({"use_vllm": True, "vllm_mode": "alone"}, "`vllm_mode` must be one of"),
    ],
)
def test_wrong_options_are_refused_in_one_sentence(tmp_path, options, words):
    with pytest.raises(ValueError, match=words):
        LatentActionPPOConfig(str(tmp_path), use_cpu=True, bf16=False, **options)


def test_defaults_are_colas():
    args = LatentActionPPOConfig("unused", use_cpu=True, bf16=False)
    assert (args.learning_rate, args.value_learning_rate, args.beta) == (None, None, 0.01)
    assert rate_by_width(LatentActionPPOTrainer.large_rate, 2048, 1.65) == 5e-6
    assert (args.gamma, args.gae_lambda, args.value_coef, args.whiten_advantages) == (1.0, 0.95, 0.5, True)
