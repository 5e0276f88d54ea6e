"""A prompt is processed, encoded and scored once for its whole group, and nothing but the cost depends on it."""

import warnings
from functools import partial

import pytest
import torch
from test_grpo_rollouts import build, rollout, rows
from transformers import FalconConfig

from latent_trl.models.policy import LatentActionPolicy
from latent_trl.trainer.grpo import trainer as grpo_trainer_module
from latent_trl.trainer.rollout import groups as groups_module
from latent_trl.trainer.rollout.prompts import groups_of
from latent_trl.trainer.rollout.rollout import Rollout


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
    for once in (True, False):
        if not once:
            monkeypatch.setattr(grpo_trainer_module, "groups_of", lambda rows, first, size: (rows, 1))
        trainer = build(tmp_path, **options)
        trainer.model.train(training)
        trainer.model.generate = partial(trainer.model.generate, forced_action_ids=codes)
        seen = record_rows(trainer)
        batch = rollout(trainer, picks)
        results.append((trainer, batch, seen[0]))
    return results


def check_equal(one: dict, other: dict) -> None:
    # Which rows share a prompt, and the prompts as they were encoded, differ by design.
    assert one.keys() == other.keys()
    for name in one.keys() - {"prompt_index", "prompts"}:
        value = one[name]
        if isinstance(value, torch.Tensor) and value.is_floating_point():
            torch.testing.assert_close(value, other[name], atol=2e-5, rtol=2e-5)
        else:
            assert torch.equal(value, other[name]), name


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
    options = {"kind": kind, "family": family, "data": data, "reuse_context_states": reuse}
    options |= {"num_generations": 2, "num_generations_eval": 2, "eval_action_do_sample": True}
    (trainer, one, seen), (plain, other, plain_seen) = both_ways(tmp_path, monkeypatch, training, picks, **options)
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
    monkeypatch.setattr(groups_module, "launches_dominate", lambda device, length: packed)
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
    results, seen = [], []
    trainer.model.policy.decoder_stack.register_forward_pre_hook(lambda module, args: seen.append(args[0].shape[:2]))
    for inputs in (part, {**part, "prompt_index": torch.arange(len(picks))}):
        seen.clear()
        trainer.model.zero_grad()
        loss = trainer._compute_loss(trainer.model, inputs)
        loss.backward()
        gradients = [p.grad.clone() for p in trainer.model.parameters() if p.grad is not None]
        passes = [shape[0] for shape in seen]
        with torch.no_grad():
            scored = trainer.score(trainer.model, Rollout.from_batch(inputs))
        results.append((loss, scored.log_probs, scored.entropies, gradients, passes))
    (*one, rows_of_prompts), (*other, all_rows) = results
    # Windows slide over what stands together: they are not packed.
    assert rows_of_prompts == ([3] if packed and family not in ("mistral", "gemma2") else [3, 5])
    assert all_rows == [5]
    for value, wanted in zip(one, other):
        torch.testing.assert_close(value, wanted, atol=5e-5, rtol=5e-5)


@pytest.mark.parametrize("alibi", [False, True])
def test_positions_by_place_are_not_packed(monkeypatch, alibi):
    monkeypatch.setattr(groups_module, "launches_dominate", lambda device, length: True)
    torch.manual_seed(0)
    config = FalconConfig(vocab_size=8, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, alibi=alibi)
    policy = LatentActionPolicy(config, hidden_size=32, num_codes=8)
    policy.head.weight.data.mul_(50)
    states = torch.cat([torch.randn(1, 5, 32).expand(3, -1, -1), torch.randn(3, 4, 32)], dim=1)
    mask = torch.ones(3, 9, dtype=torch.long)
    logits, _ = groups_module.policy_over_groups(policy, states, mask, None, torch.tensor([4, 4, 4]), length=5)
    torch.testing.assert_close(logits, policy(states, mask, keep_last=5), atol=1e-5, rtol=1e-5)
    assert logits.std() > 0.5


def test_packing_is_for_accelerators_and_short_texts():
    assert not groups_module.launches_dominate(torch.device("cpu"), 10)
    assert groups_module.launches_dominate(torch.device("cuda"), groups_module.PACKED_STATES)
    assert not groups_module.launches_dominate(torch.device("cuda"), groups_module.PACKED_STATES + 1)


def test_gradient_checkpointing_scores_rows_alone(tmp_path):
    trainer = build(tmp_path)
    batch = rollout(trainer)
    with warnings.catch_warnings():
        warnings.simplefilter("error", FutureWarning)
        loss = trainer._compute_loss(trainer.model, batch)
    trainer.model.policy.decoder_stack.decoder.gradient_checkpointing_enable()
    torch.testing.assert_close(trainer._compute_loss(trainer.model, batch), loss, atol=2e-5, rtol=2e-5)


def test_evaluation_has_group_sizes_of_its_own(tmp_path, monkeypatch):
    for picks, size, rows_seen in (((0, 0, 0, 2, 2, 2), 3, 2), ((0, 0, 1, 1, 1, 1), 2, 3), ((0, 1, 2, 3), 1, 4)):
        options = {"num_generations_eval": size, "per_device_eval_batch_size": len(picks)}
        with monkeypatch.context() as patch:
            (_, one, seen), (_, other, _) = both_ways(
                tmp_path, patch, False, picks, eval_action_do_sample=True, **options
            )
        assert seen == rows_seen
        check_equal(one, other)


def test_rows_of_a_batch_are_groups_by_their_places():
    first, second, third = ({"prompt": text} for text in "abc")
    assert groups_of([first] * 3 + [second] * 3, 0, 3) == ([first, second], 3)
    assert groups_of([first, second, third], 0, 1) == ([first, second, third], 1)
    # Two groups of one prompt are two groups.
    parts, copies = groups_of([first] * 4, 0, 2)
    assert (len(parts), copies) == (2, 2)
    # The second of two processes of 3 rows, with groups of 2: the first row is the end of a group that began on the
    # first process; parts of 1 and 2 rows are answered one at a time.
    parts, copies = groups_of([second, third, third], 3, 2)
    assert parts == [second, third, third] and copies == 1
    # A group of 4 over two processes of 2 rows.
    assert groups_of([first] * 2, 2, 4) == ([first], 2)


def count_calls(trainer) -> dict[str, list]:
    """What the processor makes from now on: images of each call of the image processor, texts of the tokenizer."""
    processor = trainer.processing_class
    seen = {"pictures": [], "texts": []}
    image_type, tokenizer_type = type(processor.image_processor), type(processor.tokenizer)

    class CountingImages(image_type):
        def __call__(self, images, *args, **kwargs):
            seen["pictures"].append(_count(images))
            return super().__call__(images, *args, **kwargs)

    class CountingTexts(tokenizer_type):
        def __call__(self, text, *args, **kwargs):
            seen["texts"].append(1 if isinstance(text, str) else len(text))
            return super().__call__(text, *args, **kwargs)

    processor.image_processor.__class__ = CountingImages
    processor.tokenizer.__class__ = CountingTexts
    return seen


def _count(images) -> int:
    return sum(map(_count, images)) if isinstance(images, (list, tuple)) else 1


@pytest.mark.parametrize("reuse", [True, False], ids=["states", "full passes"])
@pytest.mark.parametrize("family", ["llava", "qwen2_5_vl"])
def test_pictures_and_texts_are_processed_once_for_all_copies(tmp_path, family, reuse):
    """Over rollouts, updates and evaluations of a run: G copies cost the processor what one does."""
    data = rows((1, 2, 1, 2))
    trainer = build(
        tmp_path,
        family=family,
        data=data,
        num_generations=4,
        per_device_train_batch_size=8,
        per_device_eval_batch_size=4,
        reuse_context_states=reuse,
        max_steps=2,
        num_iterations=1,
        eval_strategy="steps",
        eval_steps=2,
    )
    # Some rows are looked at before the first step; that is no rollout.
    trainer.reader.preflight = lambda seed: None
    seen = count_calls(trainer)
    trainer.train()
    # Two rollouts of two prompts each see every row once, and so does the evaluation: 6 pictures each. A text is
    # tokenized by itself, and with its pictures.
    assert sum(seen["pictures"]) == 12
    assert sum(seen["texts"]) == 16
