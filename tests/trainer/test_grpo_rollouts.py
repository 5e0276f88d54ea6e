"""Rollouts and their scores: the law, the reuse of states, images or none, short, endless and equal completions."""

import copy

import numpy as np
import pytest
import torch
from datasets import Dataset
from peft import LoraConfig
from PIL import Image
from tiny_models import latent, latent_config

from latent_trl import (
    LatentActionGRPOConfig,
    LatentActionGRPOTrainer,
    LatentActionPPOConfig,
    LatentActionPPOTrainer,
)
from latent_trl.generation.action_law import ActionLaw
from latent_trl.trainer.rollout.rollout import Rollout

COMMON = {
    "use_cpu": True,
    "bf16": False,
    "per_device_train_batch_size": 4,
    "max_completion_length": 5,
    "logging_steps": 1,
    "learning_rate": 1e-2,
    "beta": 0.1,
    "save_strategy": "no",
    "disable_tqdm": True,
    "max_steps": 2,
    "num_iterations": 2,
}


def image(seed: int) -> Image.Image:
    pixels = np.random.default_rng(seed).integers(0, 255, (16, 16, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


def rows(images: tuple[int, ...] = (1, 0, 2, 1)) -> list[dict]:
    """Conversations of different lengths with so many images each."""
    return [
        {
            "prompt": [{"role": "user", "content": "what " * (1 + i % 3) + str(i)}],
            **({"images": [image(7 * i + j) for j in range(count)]} if images else {}),
        }
        for i, count in enumerate(images or (0, 0, 0, 0))
    ]


def letters(completions, **columns):
    return [float(len(set(completion[0]["content"]))) for completion in completions]


def build(folder, kind="grpo", family="llava", data=None, reward=letters, model=None, peft_config=None, **options):
    fresh, tiny = latent(family)
    options = {**COMMON, **options}
    if kind == "ppo":
        trainer_class, args = LatentActionPPOTrainer, LatentActionPPOConfig(str(folder), **options)
    else:
        trainer_class = LatentActionGRPOTrainer
        args = LatentActionGRPOConfig(str(folder), **{"num_generations": 2, **options})
    data = data or rows()
    trainer = trainer_class(
        model or fresh,
        reward,
        args,
        train_dataset=Dataset.from_list(data),
        eval_dataset=Dataset.from_list(data),
        processing_class=tiny.processor,
        peft_config=peft_config,
    )
    trainer.model.train()
    trainer.current_gradient_accumulation_steps = 1
    trainer.data = data
    return trainer


def rollout(trainer, picks=(0, 0, 1, 1), seed: int = 0):
    torch.manual_seed(seed)
    return trainer._generate_and_score_completions([trainer.data[i] for i in picks])


LAWS = [{}, {"action_top_k": 4}, {"action_top_p": 0.6}, {"action_temperature": 0.5}]
LAWS.append({"action_top_k": 6, "action_top_p": 0.8, "action_temperature": 1.5})
LAWS.append({"action_sampling": "arithmetic"})


@pytest.mark.parametrize("law", LAWS, ids=lambda law: "-".join(f"{k[7:]}={v}" for k, v in law.items()) or "all")
@pytest.mark.parametrize("kind", ["grpo", "ppo"])
def test_sampling_law_is_the_scored_law(tmp_path, kind, law):
    trainer = build(tmp_path, kind, **law)
    batch = rollout(trainer)
    mask = batch["completion_mask"].bool()
    sampled, old = batch["sampling_per_token_logps"], batch["old_per_token_logps"]
    torch.testing.assert_close(old[mask], sampled[mask], atol=2e-5, rtol=2e-5)
    # Ratios are 1, the reference is the policy itself, and the entropy is of the truncated law.
    scored = trainer.score(trainer.model, Rollout.from_batch(batch))
    torch.testing.assert_close(scored.log_probs[mask], sampled[mask], atol=2e-5, rtol=2e-5)
    torch.testing.assert_close(batch["ref_per_token_logps"][mask], sampled[mask], atol=2e-5, rtol=2e-5)
    logits = trainer.model(
        attention_mask=torch.cat([batch["prompt_mask"], batch["completion_mask"]], dim=1)[:, :-1],
        context_states=batch["context_states"],
        position_ids=batch.get("position_ids"),
        keep_last=mask.shape[1],
        return_logits=False,
    ).action_logits
    scaled = logits.double() / law.get("action_temperature", 1.0)
    allowed = ActionLaw(law.get("action_temperature", 1.0), law.get("action_top_k", 0), law.get("action_top_p", 1.0))
    support = allowed.support(logits)
    if support is not None:
        assert (batch["action_support"][mask] == support[mask]).all()
        scaled = scaled.masked_fill(~support, -torch.inf)
    probabilities = scaled.softmax(dim=-1)
    entropy = torch.special.entr(probabilities).sum(dim=-1)
    torch.testing.assert_close(scored.entropies[mask].double(), entropy[mask], atol=1e-5, rtol=1e-5)
    if law.get("action_top_k"):
        assert entropy[mask].max() <= np.log(law["action_top_k"]) + 1e-6


@pytest.mark.parametrize("sampling", ["arithmetic", "independent"])
def test_the_samples_of_a_prompt_are_drawn_together_unless_told(tmp_path, sampling):
    own = {} if sampling == "arithmetic" else {"action_sampling": sampling}
    trainer = build(tmp_path, "grpo", num_generations=8, per_device_train_batch_size=8, **own)
    even = []
    for seed in range(5):
        batch = rollout(trainer, (0,) * 8, seed)
        with torch.no_grad():
            logits = trainer.model(
                attention_mask=batch["prompt_mask"],
                context_states=batch["context_states"][:, : batch["prompt_mask"].shape[1]],
                position_ids=None,
                keep_last=1,
                return_logits=False,
            ).action_logits
        wanted = logits[0, -1].softmax(dim=-1) * 8
        found = torch.bincount(batch["action_ids"][:, 0], minlength=len(wanted))
        even.append(bool(((found >= (wanted - 1e-3).floor()) & (found <= (wanted + 1e-3).ceil())).all()))
    assert all(even) == (sampling == "arithmetic")


@pytest.mark.parametrize("family", ["llava", "qwen2_5_vl", "idefics3", "gemma3"])
@pytest.mark.parametrize("kind", ["grpo", "ppo"])
def test_reused_states_give_what_full_passes_give(tmp_path, kind, family):
    # Idefics 3 takes no batch in which some rows have no image.
    data = rows((1, 1, 2, 1)) if family == "idefics3" else rows()
    results = []
    for reuse in (True, False):
        trainer = build(tmp_path, kind, family, data=data, reuse_context_states=reuse)
        batch = rollout(trainer, (0, 0, 1, 1))
        assert ("context_states" in batch) == reuse and ("prompts" in batch) == (not reuse)
        with torch.no_grad():
            trainer.model.policy.head.weight.mul_(1.2)
        trainer.model.zero_grad()
        loss = trainer._compute_loss(trainer.model, batch)
        loss.backward()
        results.append((batch, loss, trainer.model.policy.head.weight.grad))
    (kept, loss, grad), (full, full_loss, full_grad) = results
    assert torch.equal(kept["action_ids"], full["action_ids"])
    mask = kept["completion_mask"].bool()
    names = ["old_per_token_logps", "ref_per_token_logps", "advantages"]
    names += ["old_values", "returns"] if kind == "ppo" else []
    for name in names:
        one, other = kept[name], full[name]
        if one.ndim == 2:
            one, other = one[mask], other[mask]
        torch.testing.assert_close(one, other, atol=5e-5, rtol=5e-5)
    torch.testing.assert_close(loss, full_loss, atol=5e-5, rtol=5e-5)
    torch.testing.assert_close(grad, full_grad, atol=1e-4, rtol=1e-4)


def test_backbone_is_not_run_while_states_are_reused(tmp_path):
    trainer = build(tmp_path)
    batch = rollout(trainer)

    def refuse(*args):
        raise AssertionError("the backbone was run")

    handle = trainer.model.backbone.register_forward_pre_hook(refuse)
    inner = trainer.model.get_decoder().register_forward_pre_hook(refuse)
    trainer._compute_loss(trainer.model, batch).backward()
    handle.remove()
    inner.remove()


def test_states_can_wait_in_host_memory(tmp_path):
    trainer = build(tmp_path, offload_context_states=True)
    batch = rollout(trainer)
    assert batch["context_states"].device.type == "cpu"
    assert torch.isfinite(trainer._compute_loss(trainer.model, batch))


@pytest.mark.parametrize("kind", ["grpo", "ppo"])
def test_reference_is_a_copy_of_the_policy_only_with_kl(tmp_path, kind):
    trainer = build(tmp_path, kind, beta=0.0)
    assert trainer.ref_model is None
    trainer = build(tmp_path, kind, beta=0.1)
    assert type(trainer.ref_model) is type(trainer.model.policy)
    count = sum(p.numel() for p in trainer.ref_model.parameters())
    assert count == sum(p.numel() for p in trainer.model.policy.parameters())
    assert not any(p.requires_grad for p in trainer.ref_model.parameters())


@pytest.mark.parametrize("kind", ["grpo", "ppo"])
@pytest.mark.parametrize("images", [(), (0, 0, 0, 0), (1, 0, 2, 1)], ids=["no column", "no image", "some"])
def test_batches_with_and_without_images(tmp_path, kind, images):
    trainer = build(tmp_path, kind, data=rows(images))
    for picks in ((0, 0, 1, 1), (1, 1, 1, 1)):
        if images == (1, 0, 2, 1) and picks[0] == 1:
            continue
        batch = rollout(trainer, picks)
        loss = trainer._compute_loss(trainer.model, batch)
        assert torch.isfinite(loss) and batch["completion_mask"].any()


def test_batch_without_images_from_a_data_set_with_images(tmp_path):
    trainer = build(tmp_path)
    batch = rollout(trainer, (1, 1, 1, 1))
    assert torch.isfinite(trainer._compute_loss(trainer.model, batch))


@pytest.mark.parametrize("kind", ["grpo", "ppo"])
@pytest.mark.parametrize("loss_type", ["grpo", "bnpo", "dr_grpo", "dapo"])
@pytest.mark.parametrize("length", [1, 5])
def test_equal_rewards_give_no_policy_gradient_and_no_nan(tmp_path, kind, loss_type, length):
    def same(completions, **columns):
        return [1.0] * len(completions)

    trainer = build(tmp_path, kind, reward=same, beta=0.0, loss_type=loss_type, max_completion_length=length)
    batch = rollout(trainer)
    assert batch["completion_ids"].shape[1] <= length
    trainer.model.zero_grad()
    loss = trainer._compute_loss(trainer.model, batch)
    loss.backward()
    gradients = torch.cat([p.grad.flatten() for p in trainer.model.policy.parameters() if p.grad is not None])
    assert torch.isfinite(loss) and torch.isfinite(gradients).all()
    if kind == "grpo":
        assert loss.item() == pytest.approx(0, abs=1e-6) and gradients.abs().max() < 1e-6


@pytest.mark.parametrize("kind", ["grpo", "ppo"])
def test_completions_of_one_token_and_endless_ones(tmp_path, kind):
    """The end of text as the first token of some rows, and never in others."""
    trainer = build(tmp_path, kind, data=rows(()), action_sampling="independent")
    batch = rollout(trainer, (0, 0, 1, 1))
    first = batch["completion_ids"][:, 0].unique().tolist()
    trainer.eos_token_ids = trainer.generation_config.eos_token_id = [trainer._tokenizer.eos_token_id, first[0]]
    batch = rollout(trainer, (0, 0, 1, 1))
    lengths = batch["completion_mask"].sum(dim=1)
    assert lengths.min() == 1 and lengths.max() == 5
    assert (batch["action_ids"][lengths == 1][:, 1:] == 0).all()
    loss = trainer._compute_loss(trainer.model, batch)
    loss.backward()
    assert torch.isfinite(loss)
    # What stands behind the end counts for nothing.
    changed = {**batch, "action_ids": batch["action_ids"].clone()}
    changed["action_ids"][~batch["completion_mask"].bool()] = 3
    assert trainer._compute_loss(trainer.model, changed).item() == pytest.approx(loss.item(), abs=1e-6)


@pytest.mark.parametrize("kind", ["grpo", "ppo"])
def test_truncated_completions_can_be_left_out(tmp_path, kind):
    trainer = build(tmp_path, kind, mask_truncated_completions=True, max_completion_length=2, beta=0.0)
    batch = rollout(trainer)
    assert (batch["completion_mask"] == 0).all()
    assert trainer._compute_loss(trainer.model, batch).item() == 0.0


@pytest.mark.parametrize("kind", ["grpo", "ppo"])
def test_adapter_is_trained_with_the_policy(tmp_path, kind):
    lora = LoraConfig(r=2, lora_alpha=8, init_lora_weights=True)
    trainer = build(tmp_path, kind, peft_config=lora, train_backbone=True, max_steps=3)
    assert not trainer.args.reuse_context_states
    before = {n: p.detach().clone() for n, p in trainer.model.named_parameters() if p.requires_grad}
    assert any("lora_" in name for name in before) and any(name.startswith("policy") for name in before)
    trainer.train()
    moved = {n for n, p in trainer.model.named_parameters() if n in before and not torch.equal(p, before[n])}
    assert any("lora_A" in name for name in moved) and any(name.startswith("policy") for name in moved)


@pytest.mark.parametrize("existing", [False, True])
def test_reference_with_an_adapter_is_the_model_before_rl(tmp_path, existing):
    model, _ = latent("llava")
    lora = LoraConfig(r=2, lora_alpha=8)
    if existing:
        model.add_adapter(lora)
        with torch.no_grad():
            for name, parameter in model.backbone.named_parameters():
                if "lora_" in name:
                    parameter.normal_(std=0.1)
        lora = None
    trainer = build(tmp_path, model=model, peft_config=lora, train_backbone=True)
    first = rollout(trainer)
    mask = first["completion_mask"].bool()
    torch.testing.assert_close(first["ref_per_token_logps"][mask], first["old_per_token_logps"][mask])
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.3 * torch.randn_like(parameter))
    assert not any("reference" in name for name, p in model.named_parameters() if p.requires_grad)
    # The same tokens and codes, scored again: the reference has not moved, the policy has.
    again = Rollout.from_batch(first)
    trainer.score_rollout(again)
    reference, policy = again.ref_per_token_logps, again.old_per_token_logps
    torch.testing.assert_close(reference[mask], first["ref_per_token_logps"][mask], atol=1e-5, rtol=1e-5)
    assert (policy - reference)[mask].abs().max() > 1e-3
    trained = {name for name, p in model.named_parameters() if p.requires_grad and "lora_" in name}
    assert trained


def test_adapter_path_gives_what_reused_states_give(tmp_path):
    """A fresh adapter adds nothing, so both paths must agree on the same codes."""
    plain = build(tmp_path)
    adapted = build(tmp_path, peft_config=LoraConfig(r=2), train_backbone=True)
    one, other = rollout(plain), rollout(adapted)
    assert torch.equal(one["action_ids"], other["action_ids"])
    losses = [t._compute_loss(t.model, b).item() for t, b in ((plain, one), (adapted, other))]
    assert losses[0] == pytest.approx(losses[1], abs=1e-5)


@pytest.mark.parametrize("kind", ["grpo", "ppo"])
def test_evaluation_and_logged_completions_with_images_and_codes(tmp_path, kind):
    import pandas as pd

    trainer = build(
        tmp_path,
        kind,
        log_completions=True,
        eval_strategy="steps",
        eval_steps=1,
        per_device_eval_batch_size=2,
        top_entropy_quantile=0.5,
        entropy_coef=0.01,
    )
    trainer.train()
    table = pd.read_parquet(sorted((tmp_path / "completions").glob("*.parquet"))[0])
    assert {"prompt", "completion", "letters", "action_ids", "advantage"} <= set(table.columns)
    assert all(0 < len(codes) <= 5 for codes in table["action_ids"])
    assert len(trainer._logs["images"]) > 0
    assert sum("eval_reward" in log for log in trainer.state.log_history) == 2


def test_evaluation_takes_the_most_likely_codes_unless_told(tmp_path):
    results = []
    for sample in (False, False, True):
        trainer = build(tmp_path, eval_action_do_sample=sample)
        trainer.model.eval()
        results.append([rollout(trainer, seed=seed)["action_ids"] for seed in (0, 1)])
    assert torch.equal(*results[0]) and torch.equal(results[0][0], results[1][0])
    assert results[2][0].shape != results[2][1].shape or not torch.equal(*results[2])


def test_presets_are_what_their_papers_say(tmp_path):
    def args(preset):
        return LatentActionGRPOConfig(str(tmp_path), use_cpu=True, bf16=False, preset=preset, max_completion_length=50)

    dr_grpo, dapo = args("dr_grpo"), args("dapo")
    assert (dr_grpo.loss_type, dr_grpo.scale_rewards) == ("dr_grpo", "none")
    assert (dapo.loss_type, dapo.epsilon, dapo.epsilon_high, dapo.beta) == ("dapo", 0.2, 0.28, 0.0)
    assert dapo.dynamic_sampling_rounds > 0 and dapo.overlong_buffer == 10


def test_dr_grpo_does_not_divide_by_the_deviation(tmp_path):
    seen = []

    def record(completions, **columns):
        seen.append(letters(completions))
        return seen[-1]

    trainer = build(tmp_path, preset="dr_grpo", beta=0.0, reward=record)
    batch = rollout(trainer)
    rewards = torch.tensor(seen[-1]).view(-1, 2)
    torch.testing.assert_close(batch["advantages"].view(-1, 2), rewards - rewards.mean(dim=1, keepdim=True))


def test_copy_of_the_config_survives(tmp_path):
    args = LatentActionGRPOConfig(str(tmp_path), use_cpu=True, bf16=False, preset="dapo")
    assert copy.deepcopy(args).overlong_buffer == args.overlong_buffer
    assert latent_config().num_codes == 16
