"""The policy is held where it was on conversations that no reward speaks of."""

import copy
from pathlib import Path

import pytest
import torch
from accelerate import debug_launcher
from learning_runs import paired_rows, text_rows
from rl_models import prompts
from tiny_models import latent, latent_config

from latent_trl import LatentActionGRPOConfig, LatentActionGRPOTrainer
from latent_trl.data.collator import LatentActionDataCollator
from latent_trl.data.rows import RowError
from latent_trl.trainer.rollout import anchor as anchor_module
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


def build(folder, rows=None, count=20, **options):
    model, tiny = latent("llama", latent_config(use_projector=False))
    args = LatentActionGRPOConfig(str(folder), **{**COMMON, **options})
    return LatentActionGRPOTrainer(
        model, many_letters, args, train_dataset=prompts(count), processing_class=tiny.processor, anchor_dataset=rows
    )


def anchor_of(rows, count, name="llava", seed=0):
    model, tiny = latent(name, latent_config())
    collate = LatentActionDataCollator(tiny.processor, vision_token_ids=model.config.vision_token_ids)
    return model, PolicyAnchor(copy.deepcopy(model.policy), rows, collate, count, seed)


def test_long_conversations_lose_turns(tmp_path, monkeypatch):
    turn = [{"role": "user", "content": "what is it"}, {"role": "assistant", "content": "a red circle"}]
    rows = [{"messages": turn * 6}]
    whole = build(tmp_path / "whole", rows, anchor_coef=1.0).anchor.batch(0, 0)["input_ids"]
    limit = whole.shape[1] // 2
    monkeypatch.setattr(anchor_module, "MAX_LENGTH", limit)
    cut = build(tmp_path / "cut", rows, anchor_coef=1.0).anchor.batch(0, 0)["input_ids"]
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

    assert batch(image_root=str(tmp_path))["has_image"].tolist() == [True]
    with pytest.raises(RowError, match="`anchor_dataset`.*`image_root`"):
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
    assert anchor.count(batch) == len(kls)
    assert anchor.divergence(model, batch).item() == pytest.approx(sum(kls), rel=1e-3)


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


def unlike_rows(count: int) -> list[dict]:
    """Conversations whose answers have very different lengths, so that means of means are not the mean."""

    def turns(i: int) -> list[dict]:
        return [{"role": "user", "content": f"say {i}"}, {"role": "assistant", "content": "ab " * (1 + 7 * (i % 3))}]

    return [{"messages": turns(i)} for i in range(count)]


def update_of(folder, rows, steps: int = 1, **options):
    """The gradients that the anchor alone gives in each update, away from its minimum, and the rows that it drew."""
    trainer = build(folder, rows, anchor_coef=1.0, max_steps=steps, max_grad_norm=0.0, learning_rate=0.0, **options)
    # Nothing but the term.
    trainer.rewards.caller._functions = [lambda completions, **columns: [0.0] * len(completions)]
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in trainer.anchor.reference.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    updates, drawn = [], []
    step, batch = trainer.create_optimizer().step, trainer.anchor.batch

    def record(*args, **kwargs):
        updates.append({n: p.grad.clone() for n, p in trainer.model.named_parameters() if p.grad is not None})
        return step(*args, **kwargs)

    def record_batch(*args):
        drawn.append(batch(*args))
        return drawn[-1]

    trainer.optimizer.step = record
    trainer.anchor.batch = record_batch
    trainer.train()
    return trainer, updates, drawn


def exact_gradient(trainer, batches) -> dict[str, torch.Tensor]:
    """Of the mean over the tokens of all batches, each row by itself."""
    trainer.model.zero_grad()
    anchor, total, tokens = trainer.anchor, 0.0, 0
    for batch in batches:
        total = total + anchor.divergence(trainer.model, batch)
        tokens += anchor.count(batch)
    (total / tokens).backward()
    return {n: p.grad.clone() for n, p in trainer.model.named_parameters() if p.grad is not None}


def assert_same_gradients(found, wanted):
    assert found.keys() == wanted.keys() and len(wanted) > 3
    assert any(gradient.abs().max() > 1e-4 for gradient in wanted.values())
    for name, gradient in wanted.items():
        torch.testing.assert_close(found[name], gradient, rtol=1e-3, atol=1e-6, msg=lambda m, name=name: f"{name}: {m}")


@pytest.mark.parametrize("micro", [1, 4])
def test_the_term_is_the_mean_over_the_tokens_of_an_update(tmp_path, monkeypatch, micro):
    """However many micro-batches it has, and however unlike their answers are."""
    monkeypatch.setattr(anchor_module, "BATCH_SIZE", 3)
    options = {"per_device_train_batch_size": 8 // micro, "gradient_accumulation_steps": micro}
    trainer, (update,), drawn = update_of(tmp_path, unlike_rows(24), **options)
    assert len(drawn) == micro
    if micro > 1:
        assert len({trainer.anchor.count(batch) for batch in drawn}) > 1
    assert_same_gradients(update, exact_gradient(trainer, drawn))


def test_an_incomplete_last_window_is_a_mean_too(tmp_path, monkeypatch):
    """Six micro-batches an epoch in windows of four: the last update of an epoch has two."""
    monkeypatch.setattr(anchor_module, "BATCH_SIZE", 3)
    trainer, updates, drawn = update_of(
        tmp_path,
        unlike_rows(24),
        steps=2,
        per_device_train_batch_size=8,
        num_generations=4,
        gradient_accumulation_steps=4,
        generation_batch_size=8,
        count=12,
    )
    assert len(updates) == 2 and len(drawn) == 6
    assert_same_gradients(updates[0], exact_gradient(trainer, drawn[:4]))
    assert_same_gradients(updates[1], exact_gradient(trainer, drawn[4:]))


def one_process_of_two(folder: str) -> None:
    torch.set_num_threads(1)
    anchor_module.BATCH_SIZE = 3
    options = {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 2}
    trainer, (update,), drawn = update_of(folder, unlike_rows(24), **options)
    assert len(drawn) == 2
    torch.save(update, Path(folder) / f"{trainer.accelerator.process_index}.pt")


@pytest.mark.distributed
def test_two_processes_are_one_with_all_their_rows(tmp_path, monkeypatch):
    """Two micro-batches on each of two processes: the mean over the tokens of all four batches."""
    debug_launcher(one_process_of_two, (str(tmp_path),), num_processes=2)
    monkeypatch.setattr(anchor_module, "BATCH_SIZE", 3)
    trainer, _, _ = update_of(tmp_path / "one", unlike_rows(24))
    batches = [trainer.anchor.batch(step, process) for step in (0, 1) for process in (0, 1)]
    assert len({trainer.anchor.count(batch) for batch in batches}) > 1
    wanted = exact_gradient(trainer, batches)
    for rank in (0, 1):
        found = torch.load(tmp_path / f"{rank}.pt", weights_only=True)
        assert_same_gradients({name.removeprefix("module."): g for name, g in found.items()}, wanted)


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
