"""A prompt is encoded and scored once for its whole group, and nothing but the cost depends on it."""

from functools import partial

import numpy as np
import pytest
import torch
from latent_trl.trainer.rollout.repeated_prompts import copies_of_each, same_prompt
from test_grpo_rollouts import build, image, rollout, rows
from transformers import FalconConfig

from latent_trl.models.policy import LatentActionPolicy
from latent_trl.trainer.grpo import trainer as latent_action_grpo_trainer
from latent_trl.trainer.rollout import scoring as code_scoring


def record_rows(trainer) -> list[int]:
    """Rows of each call of the backbone's base model from now on."""
    seen = []
    trainer.model.backbone_view.base.get_decoder().register_forward_pre_hook(
        lambda module, args, kwargs: seen.append(len(kwargs["inputs_embeds"])), with_kwargs=True
    )
    return seen


def both_ways(tmp_path, monkeypatch, training: bool, picks, **options):
    """Batches of one trainer with prompts encoded once, and of its twin with each row encoded; forced codes."""
    results = []
    codes = torch.randint(16, (len(picks), 5), generator=torch.Generator().manual_seed(5))
    codes[0, 3] = -1  # free: the most likely code in evaluation
    for once in (True, False):
        if not once:
            monkeypatch.setattr(latent_action_grpo_trainer, "copies_of_each", lambda prompts: 1)
        trainer = build(tmp_path, **options)
        trainer.model.train(training)
        forced = codes.clamp(min=0) if training else codes
        trainer.model.generate = partial(trainer.model.generate, forced_action_ids=forced)
        seen = record_rows(trainer)
        batch = rollout(trainer, picks)
        results.append((trainer, batch, seen[0]))
    return results


def check_equal(one: dict, other: dict) -> None:
    one = {name: value for name, value in one.items() if name != "prompt_index"}
    assert one.keys() == other.keys()
    for name, value in one.items():
        if isinstance(value, torch.Tensor) and value.is_floating_point():
            torch.testing.assert_close(value, other[name], atol=2e-5, rtol=2e-5)
        elif isinstance(value, torch.Tensor):
            assert torch.equal(value, other[name]), name
        else:
            assert value == other[name], name


def check_gradients(model, other, losses) -> None:
    for loss in losses:
        loss.backward()
    for parameter, wanted in zip(model.parameters(), other.parameters()):
        assert (parameter.grad is None) == (wanted.grad is None)
        if wanted.grad is not None:
            torch.testing.assert_close(parameter.grad, wanted.grad, atol=1e-4, rtol=1e-4)


FAMILIES = ["llava", "qwen2_5_vl", "idefics3", "gemma3"]


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("kind, reuse", [("grpo", True), ("ppo", True), ("ppo", False)])
@pytest.mark.parametrize("family", FAMILIES)
def test_groups_encoded_once_are_as_rows_encoded_alone(tmp_path, monkeypatch, family, kind, reuse, training):
    """0, 1 and 2 images a prompt, prompts of different lengths; codes, states, scores, loss and gradient."""
    # Idefics 3 takes no batch in which some rows have no image.
    data = rows((1, 1, 2, 1)) if family == "idefics3" else rows()
    picks = (0, 0, 1, 1, 2, 2, 3, 3)
    (trainer, one, seen), (plain, other, plain_seen) = both_ways(
        tmp_path, monkeypatch, training, picks, kind=kind, family=family, data=data, reuse_context_states=reuse
    )
    assert (seen, plain_seen) == (4, 8)
    check_equal(one, other)
    if training:
        losses = [t._compute_loss(t.model, batch) for t, batch in ((trainer, one), (plain, other))]
        torch.testing.assert_close(*losses, atol=2e-5, rtol=2e-5)
        check_gradients(trainer.model, plain.model, losses)


def test_recorded_scores_are_those_of_a_full_pass_of_each_row(tmp_path):
    """Sampled, with nothing forced: each row's log-probabilities belong to its own prompt, states and codes."""
    trainer = build(tmp_path, family="qwen2_5_vl", reuse_context_states=False)
    batch = rollout(trainer, (0, 0, 1, 1, 2, 2, 3, 3))
    mask = batch["completion_mask"].bool()
    assert len({tuple(row) for row in batch["action_ids"].tolist()}) > 4
    torch.testing.assert_close(
        batch["old_per_token_logps"][mask], batch["sampling_per_token_logps"][mask], atol=2e-5, rtol=2e-5
    )


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("packed", [False, True], ids=["two passes", "packed"])
@pytest.mark.parametrize("family", ["llava", "qwen2_5_vl", "mistral", "gpt2", "gemma2"])
@pytest.mark.parametrize("kind", ["grpo", "ppo"])
def test_shuffled_and_broken_groups_are_scored_as_rows_alone(tmp_path, monkeypatch, kind, family, packed, attention):
    """Micro-batches hold parts of groups in any order; sliding windows and padding included."""
    monkeypatch.setattr(code_scoring, "launches_dominate", lambda device, length: packed)
    data = rows() if family in ("llava", "qwen2_5_vl") else rows(())
    trainer = build(tmp_path, kind, family, data=data)
    batch = rollout(trainer, (0, 0, 1, 1, 2, 2, 3, 3))
    assert batch["prompt_index"].tolist() == [0, 0, 1, 1, 2, 2, 3, 3]
    picks = torch.tensor([5, 0, 3, 4, 1])
    part = {k: v[picks] if isinstance(v, torch.Tensor) and v.ndim else v for k, v in batch.items()}
    decoder = trainer.model.policy.decoder_stack.decoder
    if attention == "sdpa" and not decoder._supports_sdpa:
        pytest.skip("this family has no sdpa")
    decoder.set_attn_implementation(attention)
    with torch.no_grad():
        trainer.model.policy.head.weight.mul_(1.2)
    results = []
    seen = []
    trainer.model.policy.decoder_stack.register_forward_pre_hook(lambda module, args: seen.append(args[0].shape[:2]))
    for inputs in (part, {k: v for k, v in part.items() if k != "prompt_index"}):
        seen.clear()
        trainer.model.zero_grad()
        loss = trainer._compute_loss(trainer.model, inputs)
        loss.backward()
        gradients = [p.grad.clone() for p in trainer.model.parameters() if p.grad is not None]
        results.append((loss, trainer._scored.log_probs, trainer._scored.entropy, gradients, [x[0] for x in seen]))
    (*one, rows_of_prompts), (*other, all_rows) = results
    # Windows slide over what stands together: they are not packed.
    assert rows_of_prompts == ([3] if packed and family not in ("mistral", "gemma2") else [3, 5])
    assert all_rows == [5]
    for value, wanted in zip(one, other):
        torch.testing.assert_close(value, wanted, atol=5e-5, rtol=5e-5)


@pytest.mark.parametrize("alibi", [False, True])
def test_positions_by_place_are_not_packed(monkeypatch, alibi):
    monkeypatch.setattr(code_scoring, "launches_dominate", lambda device, length: True)
    torch.manual_seed(0)
    config = FalconConfig(vocab_size=8, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, alibi=alibi)
    policy = LatentActionPolicy(config, hidden_size=32, num_codes=8)
    policy.head.weight.data.mul_(50)
    states = torch.cat([torch.randn(1, 5, 32).expand(3, -1, -1), torch.randn(3, 4, 32)], dim=1)
    mask = torch.ones(3, 9, dtype=torch.long)
    logits, _ = code_scoring.policy_over_groups(policy, states, mask, None, torch.tensor([4, 4, 4]), length=5)
    torch.testing.assert_close(logits, policy(states, mask, keep_last=5), atol=1e-5, rtol=1e-5)
    assert logits.std() > 0.5


def test_packing_is_for_accelerators_and_short_texts():
    assert not code_scoring.launches_dominate(torch.device("cpu"), 10)
    assert code_scoring.launches_dominate(torch.device("cuda"), code_scoring.PACKED_STATES)
    assert not code_scoring.launches_dominate(torch.device("cuda"), code_scoring.PACKED_STATES + 1)


def test_gradient_checkpointing_scores_rows_alone(tmp_path):
    trainer = build(tmp_path)
    batch = rollout(trainer)
    loss = trainer._compute_loss(trainer.model, batch)
    trainer.model.policy.decoder_stack.decoder.gradient_checkpointing_enable()
    torch.testing.assert_close(trainer._compute_loss(trainer.model, batch), loss, atol=2e-5, rtol=2e-5)


def test_evaluation_has_group_sizes_of_its_own(tmp_path, monkeypatch):
    for picks, rows_seen in (((0, 0, 0, 2, 2, 2), 2), ((0, 0, 1, 1, 1, 1), 3), ((0, 1, 2, 3), 4), ((0, 0, 0, 1), 4)):
        size = {2: 3, 3: 2, 4: 1}[rows_seen]
        options = {"num_generations_eval": size, "per_device_eval_batch_size": len(picks)}
        with monkeypatch.context() as patch:
            (_, one, seen), (_, other, _) = both_ways(tmp_path, patch, False, picks, **options)
        assert seen == rows_seen
        check_equal(one, other)


def test_copies_of_each():
    first, second = [[{"role": "user", "content": text}] for text in ("one", "two")]
    assert copies_of_each([first] * 3 + [second] * 3) == 3
    assert copies_of_each([first] * 4 + [second] * 2) == 2
    assert copies_of_each([first, second, first, second]) == 1
    assert copies_of_each([first] * 2 + [second]) == 1
    assert copies_of_each([first]) == 1


def test_prompts_are_told_apart_by_their_images():
    def prompt(picture):
        return [{"role": "user", "content": [{"type": "image", "image": picture}, {"type": "text", "text": "what"}]}]

    assert same_prompt(prompt(image(1)), prompt(image(1)))
    assert not same_prompt(prompt(image(1)), prompt(image(2)))
    assert not same_prompt(prompt(image(1)), prompt(image(1).resize((8, 8))))
    assert not same_prompt(prompt(image(1)), prompt("path.png"))
    # Arrays are not compared: such prompts are encoded row by row.
    pixels = np.zeros((2, 2, 3))
    assert same_prompt(prompt(pixels), prompt(pixels)) and not same_prompt(prompt(pixels), prompt(pixels.copy()))
