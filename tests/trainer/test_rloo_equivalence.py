"""Over codes that are tokens, RLOO gives the advantages, losses and gradients of TRL's `RLOOTrainer`."""

import copy

import pytest
import torch
from rl_models import policy_of, prompts, skip_without_token_scoring, token_twins
from trl import RLOOConfig, RLOOTrainer

from latent_trl import LatentActionRLOOConfig, LatentActionRLOOTrainer

COMMON = {
    "use_cpu": True,
    "bf16": False,
    "per_device_train_batch_size": 8,
    "num_generations": 4,
    "num_iterations": 2,
    "max_completion_length": 6,
    "report_to": "none",
    "save_strategy": "no",
}
PICKS = (0, 0, 0, 0, 1, 1, 1, 1)


def reward(completion_ids, **columns):
    return [sum(ids) % 7 / 7 for ids in completion_ids]


def partly_silent(completion_ids, **columns):
    """Nothing on one completion of the first group, and on all but one of the second."""
    return [None if i in (1, 4, 5, 6) else value for i, value in enumerate(reward(completion_ids))]


def shift(twin, model, seed: int, scale: float) -> None:
    """Moves both policies alike."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for theirs, ours in policy_of(twin, model).values():
            noise = scale * torch.randn(theirs.shape, generator=generator)
            theirs.add_(noise)
            ours.add_(noise)


@pytest.fixture(scope="module")
def twins():
    skip_without_token_scoring()
    return token_twins()


def both(twins, folder, function=reward, beta: float = 0.0, **options):
    """Both trainers, and the batches that they make of one rollout: the policy has moved from its reference."""
    twin, model, tokenizer = (copy.deepcopy(part) for part in twins)
    data = prompts()
    shared = {"train_dataset": data, "processing_class": tokenizer}
    args = LatentActionRLOOConfig(str(folder), beta=beta, **COMMON, **options)
    latent = LatentActionRLOOTrainer(model, function, args, **shared)
    args = RLOOConfig(str(folder), beta=0.0, gradient_checkpointing=False, **COMMON, **options)
    token = RLOOTrainer(twin, function, args, **shared)
    token.beta, token.ref_model = beta, copy.deepcopy(twin)
    shift(twin, model, 2, 0.05)
    for trainer in (latent, token):
        trainer.model.train()
        trainer.current_gradient_accumulation_steps = 1
    rows = [data[i] for i in PICKS]
    torch.manual_seed(1)
    batch = latent._generate_and_score_completions(rows)

    def unpadded(name: str) -> list[list[int]]:
        pairs = zip(batch[f"{name}_ids"], batch[f"{name}_mask"].bool(), strict=True)
        return [ids[mask].tolist() for ids, mask in pairs]

    token._generate = lambda given: (unpadded("prompt"), unpadded("completion"), ["" for _ in given])
    theirs = token._generate_and_score_completions(rows)
    return latent, token, batch, theirs


CASES = {
    "plain": {},
    "kl": {"beta": 0.3},
    "whitened": {"beta": 0.3, "normalize_advantages": True},
    "clipped rewards": {"beta": 0.1, "reward_clip_range": (0.2, 0.6)},
    "clip higher": {"epsilon": 0.01, "epsilon_high": 0.05},
    "partly silent": {"beta": 0.3, "function": partly_silent},
    "partly silent, whitened": {"normalize_advantages": True, "function": partly_silent},
}


@pytest.mark.parametrize("case", CASES)
def test_advantages_loss_and_gradients_are_the_token_models(twins, case, tmp_path):
    latent, token, ours, theirs = both(twins, tmp_path, **CASES[case])
    torch.testing.assert_close(ours["advantages"], theirs["advantages"], atol=1e-5, rtol=1e-5)
    assert ours["advantages"].abs().max() > 1e-2
    mask = ours["completion_mask"]
    old = (ours["old_per_token_logps"] * mask).sum(dim=1)
    torch.testing.assert_close(old, theirs["old_logps"], atol=1e-5, rtol=1e-5)
    shift(token.model, latent.model, 3, 0.03)
    pairs = policy_of(token.model, latent.model)
    results = []
    for trainer, batch, tensors in (
        (token, theirs, [pair[0] for pair in pairs.values()]),
        (latent, ours, [pair[1] for pair in pairs.values()]),
    ):
        trainer.model.zero_grad()
        loss = trainer._compute_loss(trainer.model, batch)
        loss.backward()
        results.append((loss.item(), [tensor.grad.clone() for tensor in tensors]))
    (their_loss, their_grads), (our_loss, our_grads) = results
    assert our_loss == pytest.approx(their_loss, abs=1e-5)
    assert max(grad.abs().max().item() for grad in their_grads) > 1e-4
    for name, mine, other in zip(pairs, our_grads, their_grads, strict=True):
        torch.testing.assert_close(mine, other, atol=1e-5, rtol=1e-5, msg=lambda text, name=name: f"{name}: {text}")
    for name in ("clip_ratio/low_mean", "clip_ratio/high_mean", "clip_ratio/region_mean"):
        mine, other = latent._metrics["train"][name][-1], token._metrics["train"][name][-1]
        assert mine == pytest.approx(other, abs=1e-6), name
    if CASES[case].get("beta"):
        assert latent._metrics["train"]["kl"][-1] == pytest.approx(token._metrics["train"]["kl"][-1], abs=1e-5)
