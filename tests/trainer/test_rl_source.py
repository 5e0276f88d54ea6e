"""The seam between a trainer and what generates: any source of samples drives it, and groups stay groups."""

from dataclasses import replace
from functools import partial
from types import SimpleNamespace

import pytest
import torch
from datasets import Dataset
from rl_models import prompts, target_problem
from test_grpo_rollouts import build, letters, rows
from tiny_models import latent, latent_config

from latent_trl import LatentActionGRPOConfig, LatentActionGRPOTrainer
from latent_trl.trainer.rollout.rollout import Rollout, Sample


class Replayed:
    """A source of one's own: a plain function that gives samples that were made elsewhere, without their states."""

    def __init__(self, samples: list[Sample]):
        self.samples, self.calls = samples, []

    def __call__(self, rows, prompts, copies):
        self.calls.append((len(rows), copies))
        made = []
        for i, sample in enumerate(self.samples):
            own = prompts[i // copies]
            assert own.ids == sample.prompt.ids
            made.append(replace(sample, row=rows[i // copies], prompt=own, context_states=None, position_ids=None))
        return made


def update(trainer, batch):
    trainer.model.zero_grad()
    loss = trainer._compute_loss(trainer.model, batch)
    loss.backward()
    return loss.detach(), {n: p.grad.clone() for n, p in trainer.model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("kind", ["grpo", "ppo"])
@pytest.mark.parametrize("family", ["llama", "llava", "qwen2_5_vl"])
def test_another_source_gives_the_same_update(tmp_path, family, kind):
    """Samples with states, of the policy's own loop, and the same samples without, of a made-up source."""
    data = rows(()) if family == "llama" else rows((1, 2, 1, 1))
    picks = (0, 0, 1, 1)
    own = build(tmp_path / "own", kind, family, data=data, num_generations=2)
    torch.manual_seed(3)
    source = own.rollout_source()
    kept = []
    own.rollout_source = lambda: lambda *args: kept.extend(source(*args)) or list(kept)
    expected = own._generate_and_score_completions([data[i] for i in picks])
    assert "context_states" in expected
    other = build(tmp_path / "other", kind, family, data=data, num_generations=2)
    replayed = Replayed(kept)
    other.rollout_source = lambda: replayed
    found = other._generate_and_score_completions([data[i] for i in picks])
    assert replayed.calls == [(2, 2)]
    assert "context_states" not in found and "prompts" in found
    mask = expected["completion_mask"].bool()
    for name in ("old_per_token_logps", "ref_per_token_logps"):
        torch.testing.assert_close(found[name][mask], expected[name][mask], atol=5e-5, rtol=5e-5)
    torch.testing.assert_close(found["advantages"], expected["advantages"], atol=5e-5, rtol=5e-5)
    (loss, gradients), (wanted, wanted_gradients) = update(other, found), update(own, expected)
    torch.testing.assert_close(loss, wanted, atol=5e-5, rtol=5e-5)
    assert gradients.keys() == wanted_gradients.keys()
    assert max(gradient.abs().max() for gradient in wanted_gradients.values()) > 1e-4
    for name, gradient in wanted_gradients.items():
        torch.testing.assert_close(gradients[name], gradient, atol=2e-4, rtol=1e-3)


def test_a_made_up_source_trains(tmp_path):
    """Codes that no model drew, with the log-probabilities that the source claims."""
    trainer = build(tmp_path, "grpo", "llama", data=rows(()), reward=letters, max_steps=3, num_iterations=1)

    def made_up(rows, prompts, copies):
        return [
            Sample(
                row=rows[i // copies],
                prompt=prompts[i // copies],
                completion_ids=[70 + i, 71, 72 + i][: 1 + i % 3],
                action_ids=torch.tensor([1, 2, 3][: 1 + i % 3]),
                action_log_probs=torch.full((1 + i % 3,), -2.0),
            )
            for i in range(len(rows) * copies)
        ]

    trainer.rollout_source = lambda: made_up
    before = trainer.model.policy.head.weight.detach().clone()
    trainer.train()
    assert trainer.state.global_step == 3
    assert not torch.equal(trainer.model.policy.head.weight, before)
    logged = [log for log in trainer.state.log_history if "loss" in log]
    assert all(log["completions/mean_length"] == pytest.approx(7 / 4) for log in logged)


def test_a_rollout_is_what_its_samples_are():
    """Prompts on the left, completions on the right, each value at its token."""

    class Prompt:
        def __init__(self, ids):
            self.ids = ids

    one, two = Prompt([5, 6, 7]), Prompt([8])
    samples = [
        Sample({}, one, [10, 11], torch.tensor([1, 2]), torch.tensor([-0.1, -0.2])),
        Sample({}, two, [12], torch.tensor([3]), torch.tensor([-0.3])),
        Sample({}, one, [13], torch.tensor([4]), torch.tensor([-0.4])),
    ]
    rollout = Rollout.of(samples, 0, torch.device("cpu"))
    assert rollout.prompt_ids.tolist() == [[5, 6, 7], [0, 0, 8], [5, 6, 7]]
    assert rollout.prompt_mask.tolist() == [[1, 1, 1], [0, 0, 1], [1, 1, 1]]
    assert rollout.completion_ids.tolist() == [[10, 11], [12, 0], [13, 0]]
    assert rollout.action_ids.tolist() == [[1, 2], [3, 0], [4, 0]]
    assert rollout.prompt_index.tolist() == [0, 1, 0]
    assert rollout.prompts == [one, two, one]
    part = Rollout.from_batch(rollout.to_batch()).rows(1, 3)
    assert part.action_ids.tolist() == [[3, 0], [4, 0]] and part.prompts == [two, one]


def share_within(folder, distinct: bool, size: int = 8) -> float:
    """The variance within groups over that of all samples, of the first codes of a flat policy's samples."""
    model, tokenizer, letters = target_problem()
    data = Dataset.from_list([{"prompt": f"{i} a" if distinct else "1 a"} for i in range(64)])
    seen = []

    def first_code(completion_ids, **columns):
        seen.append(torch.tensor([float(letters.index(ids[0])) for ids in completion_ids]))
        return seen[-1].tolist()

    args = LatentActionGRPOConfig(
        str(folder),
        use_cpu=True,
        bf16=False,
        per_device_train_batch_size=32,
        num_generations=size,
        max_completion_length=1,
        max_steps=12,
        learning_rate=0.0,
        beta=0.0,
        disable_tqdm=True,
        save_strategy="no",
    )
    LatentActionGRPOTrainer(model, first_code, args, train_dataset=data, processing_class=tokenizer).train()
    groups = torch.cat([rewards.view(-1, size) for rewards in seen])
    return (groups.var(dim=1).mean() / groups.flatten().var()).item()


def test_adjacent_groups_of_one_prompt_are_groups(tmp_path):
    """Drawn as one run of points, neighbours would fall into one group, whose samples then hardly differ."""
    apart, alike = share_within(tmp_path / "apart", True), share_within(tmp_path / "alike", False)
    assert alike > 0.9 * min(apart, 1.0)


def repetitive(folder, penalty: float, of_checkpoint: float) -> torch.Tensor:
    """Completions of one code said again and again."""
    model, tiny = latent("llama", latent_config(use_projector=False))
    model.generation_config.repetition_penalty = of_checkpoint
    model.generate = partial(model.generate, forced_action_ids=torch.full((4, 12), 3))
    args = LatentActionGRPOConfig(
        str(folder),
        use_cpu=True,
        bf16=False,
        per_device_train_batch_size=4,
        num_generations=2,
        max_completion_length=12,
        repetition_penalty=penalty,
    )
    reward = [lambda completions, **columns: [0.0] * len(completions)]
    trainer = LatentActionGRPOTrainer(model, reward, args, train_dataset=prompts(8), processing_class=tiny.processor)
    trainer.model.train()
    return trainer._generate_and_score_completions([trainer.train_dataset[i] for i in (0, 0, 1, 1)])["completion_ids"]


def test_a_repetition_penalty_is_honoured_where_it_is_asked_for(tmp_path):
    """The trainer's own reaches rollouts; that of the checkpoint does not, since codes were learned without it."""
    plain = repetitive(tmp_path, 1.0, of_checkpoint=1.0)
    assert torch.equal(repetitive(tmp_path, 1.0, of_checkpoint=5.0), plain)
    penalised = repetitive(tmp_path, 5.0, of_checkpoint=1.0)
    kinds = [sum(len(set(row)) for row in ids.tolist()) for ids in (plain, penalised)]
    assert kinds[1] > kinds[0]


def test_an_engine_gets_the_best_checkpoint(tmp_path):
    """Other weights at the same step, which an engine cannot tell where layers are sharded."""
    trainer = build(tmp_path / "run")
    trainer.save_model(str(tmp_path / "best"))
    trainer.state.best_model_checkpoint = str(tmp_path / "best")
    trainer.engine_source = SimpleNamespace(policy_state=(3,))
    trainer._load_best_model()
    assert trainer.engine_source.policy_state == ()
