"""The policy is held where it was on conversations that no reward speaks of."""

import copy

import pytest
import torch
from learning_runs import paired_rows, text_rows
from rl_models import prompts
from tiny_models import latent, latent_config

from latent_trl import LatentActionGRPOConfig, LatentActionGRPOTrainer
from latent_trl.data.collator import LatentActionDataCollator, RowError
from latent_trl.trainer.rollout.anchor import PolicyAnchor

COMMON = {
    "use_cpu": True,
    "bf16": False,
    "per_device_train_batch_size": 8,
    "num_generations": 4,
    "max_completion_length": 4,
    "logging_steps": 1,
    "learning_rate": 1e-2,
    "beta": 0.0,
    "save_strategy": "no",
    "disable_tqdm": True,
    "max_steps": 12,
}


def many_letters(completions, **columns):
    return [float(len(set(completion))) for completion in completions]


def build(folder, rows=None, **options):
    model, tiny = latent("llama", latent_config(use_projector=False))
    args = LatentActionGRPOConfig(str(folder), **{**COMMON, **options})
    return LatentActionGRPOTrainer(
        model, many_letters, args, train_dataset=prompts(20), processing_class=tiny.processor, anchor_dataset=rows
    )


def anchor_of(rows, count, name="llava", seed=0):
    model, tiny = latent(name, latent_config())
    collate = LatentActionDataCollator(tiny.processor, vision_token_ids=model.config.vision_token_ids)
    return model, PolicyAnchor(copy.deepcopy(model.policy), rows, collate, count, seed)


def test_long_conversations_lose_turns(tmp_path):
    turn = [{"role": "user", "content": "what is it"}, {"role": "assistant", "content": "a red circle"}]
    rows = [{"messages": turn * 6}]
    whole = build(tmp_path / "whole", rows, anchor_coef=1.0).anchor.batch(0, 0)["input_ids"]
    limit = whole.shape[1] // 2
    cut = build(tmp_path / "cut", rows, anchor_coef=1.0, anchor_max_length=limit).anchor.batch(0, 0)["input_ids"]
    assert 0 < cut.shape[1] <= limit
    assert torch.equal(cut[0], whole[0, : cut.shape[1]])


def test_images_are_read_below_the_named_folder_alone(tmp_path):
    rows = paired_rows()[:1]
    rows[0]["images"][0].save(tmp_path / "picture.png")
    rows = [{**rows[0], "images": ["picture.png"]}]
    model, tiny = latent("llava", latent_config())

    def batch(**options):
        trainer = LatentActionGRPOTrainer(
            model,
            many_letters,
            LatentActionGRPOConfig(str(tmp_path / "run"), **{**COMMON, "anchor_coef": 1.0, **options}),
            train_dataset=prompts(20),
            processing_class=tiny.processor,
            anchor_dataset=rows,
        )
        return trainer.anchor.batch(0, 0)

    assert batch(anchor_image_root=str(tmp_path))["has_image"].tolist() == [True]
    with pytest.raises(RowError, match="`anchor_dataset`.*`anchor_image_root`: Row 0"):
        batch()


@torch.no_grad()
@pytest.mark.parametrize("rows", [paired_rows(), text_rows()], ids=["images", "text"])
def test_divergence_by_hand(rows):
    """A sum over codes at each token of an answer, whose states come from one row at a time."""
    model, anchor = anchor_of(rows, len(rows))
    batch = anchor.batch(0, 0)
    assert anchor.divergence(model, batch).item() == pytest.approx(0.0, abs=1e-6)
    torch.manual_seed(0)
    for parameter in model.policy.parameters():
        parameter.add_(0.1 * torch.randn_like(parameter))
    kls = []
    for row in rows:
        one = anchor.collate([row])
        states, positions = model.encode(one["input_ids"], one["attention_mask"], **one["vision"])
        before, now = (p(states, one["attention_mask"], positions)[0] for p in (anchor.reference, model.policy))
        for place in one["loss_mask"][0].nonzero()[:, 0].tolist():
            p, q = before[place - 1].softmax(-1), now[place - 1].softmax(-1)
            kls.append(sum(a * (a / b).log() for a, b in zip(p, q)).item())
    assert sum(kls) / len(kls) > 0.001
    assert anchor.divergence(model, batch).item() == pytest.approx(sum(kls) / len(kls), rel=1e-3)


def test_rows_are_a_function_of_step_and_process():
    rows = [{**row, "id": i} for i, row in enumerate(text_rows(40))]
    anchor = PolicyAnchor(None, rows, lambda drawn: [row["id"] for row in drawn], 8, seed=3)
    assert anchor.batch(5, 1) == anchor.batch(5, 1)
    drawn = [tuple(anchor.batch(step, process)) for step in range(10) for process in (0, 1)]
    assert len(set(drawn)) == 20 and all(len(set(ids)) == 8 for ids in drawn)
    # Of 160 draws from 40 rows hardly any row is left out.
    assert len({i for ids in drawn for i in ids}) > 36
    assert PolicyAnchor(None, rows[:3], len, 8, seed=3).batch(0, 0) == 3


def test_the_policy_moves_less_where_it_is_held(tmp_path):
    """The divergence after a run with the term, and after the same run with a weight that does nothing."""
    ends = {}
    for coef in (1e-9, 5.0):
        trainer = build(tmp_path / str(coef), text_rows(), anchor_coef=coef)
        trainer.train()
        logged = [log["anchor/kl"] for log in trainer.state.log_history if "anchor/kl" in log]
        assert len(logged) == 12 and logged[0] == pytest.approx(0.0, abs=1e-6)
        with torch.no_grad():
            ends[coef] = trainer.anchor.divergence(trainer.model, trainer.anchor.batch(99, 0)).item()
    assert ends[5.0] < 0.2 * ends[1e-9]


def test_accumulated_micro_batches_count_as_one(tmp_path, monkeypatch):
    """The term's gradient does not grow with the number of micro-batches of an update."""
    rows = text_rows()
    gradients = {}
    for micro in (1, 4):
        trainer = build(
            tmp_path / str(micro),
            rows,
            anchor_coef=1.0,
            anchor_batch_size=len(rows),
            max_steps=1,
            per_device_train_batch_size=8 // micro,
            gradient_accumulation_steps=micro,
            max_grad_norm=0.0,
        )
        # Nothing but the term, away from its minimum.
        monkeypatch.setattr(trainer, "reward_funcs", [lambda completions, **columns: [0.0] * len(completions)])
        torch.manual_seed(0)
        with torch.no_grad():
            for parameter in trainer.anchor.reference.parameters():
                parameter.add_(0.1 * torch.randn_like(parameter))
        seen = {}
        step = trainer.create_optimizer().step

        def record(*args, seen=seen, trainer=trainer, step=step, **kwargs):
            seen.update({n: p.grad.clone() for n, p in trainer.model.named_parameters() if p.grad is not None})
            return step(*args, **kwargs)

        trainer.optimizer.step = record
        trainer.train()
        gradients[micro] = seen
    assert gradients[1].keys() == gradients[4].keys() and len(gradients[1]) > 3
    assert any(gradient.abs().max() > 1e-4 for gradient in gradients[1].values())
    for name, gradient in gradients[1].items():
        torch.testing.assert_close(gradients[4][name], gradient, rtol=1e-3, atol=1e-6)


def test_what_does_not_come_together_is_refused(tmp_path):
    with pytest.raises(ValueError, match="`anchor_dataset` must be given"):
        build(tmp_path, anchor_coef=0.1)
    with pytest.raises(ValueError, match="`anchor_dataset` is not read while `anchor_coef` is 0"):
        build(tmp_path, text_rows())
    with pytest.raises(ValueError, match="it needs `messages`"):
        build(tmp_path, [{"text": "a"}], anchor_coef=0.1)
    with pytest.raises(ValueError, match="`anchor_coef` must not be negative"):
        build(tmp_path, text_rows(), anchor_coef=-1.0)
    with pytest.raises(ValueError, match="holds the policy alone"):
        build(tmp_path, text_rows(), anchor_coef=0.1, train_backbone=True)
