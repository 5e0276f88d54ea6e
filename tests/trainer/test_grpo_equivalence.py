"""Over codes that are tokens, the trainers give TRL's own token-level losses and gradients."""

import copy

import pytest
import torch
from rl_models import policy_of, prompts, skip_without_token_scoring, token_twins
from tiny_models import VOCAB_SIZE
from trl import GRPOConfig, GRPOTrainer

from latent_trl import (
    LatentActionGRPOConfig,
    LatentActionGRPOTrainer,
    LatentActionPPOConfig,
    LatentActionPPOTrainer,
)

LOSS_TYPES = ["grpo", "bnpo", "dr_grpo", "dapo", "cispo", "sapo", "luspo", "vespo"]
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


def reward(completion_ids, **columns):
    return [sum(ids) % 7 / 7 for ids in completion_ids]


@pytest.fixture(scope="module")
def setting(tmp_path_factory):
    """A rollout batch of the latent trainer, both trainers, and both policies moved in the same way since."""
    skip_without_token_scoring()
    folder = str(tmp_path_factory.mktemp("equivalence"))
    twin, model, tokenizer = token_twins()
    data = prompts()
    latent = LatentActionGRPOTrainer(
        model,
        reward,
        LatentActionGRPOConfig(folder, beta=0.3, **COMMON),
        train_dataset=data,
        processing_class=tokenizer,
    )
    token = GRPOTrainer(
        twin,
        reward,
        GRPOConfig(folder, beta=0.0, gradient_checkpointing=False, **COMMON),
        train_dataset=data,
        processing_class=tokenizer,
    )
    for trainer in (latent, token):
        trainer.model.train()
        trainer.current_gradient_accumulation_steps = 1
    torch.manual_seed(1)
    batch = latent._generate_and_score_completions([data[i] for i in (0, 0, 0, 0, 1, 1, 1, 1)])
    old_and_reference = score_tokens(token, batch)
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for theirs, ours in policy_of(twin, model).values():
            noise = 0.03 * torch.randn(theirs.shape, generator=generator)
            theirs.add_(noise)
            ours.add_(noise)
    return latent, token, batch, old_and_reference


def score_tokens(trainer, batch):
    with torch.no_grad():
        return trainer._get_per_token_logps_and_entropies(
            trainer.model,
            torch.cat([batch["prompt_ids"], batch["completion_ids"]], dim=1),
            torch.cat([batch["prompt_mask"], batch["completion_mask"]], dim=1),
            batch["completion_ids"].shape[1],
        )[0]


def loss_and_gradients(trainer, tensors, batch):
    trainer.model.zero_grad()
    loss = trainer._compute_loss(trainer.model, batch)
    loss.backward()
    return loss.detach(), [tensor.grad.clone() for tensor in tensors]


def compare(latent, token, batch):
    pairs = policy_of(token.model, latent.model)
    theirs = loss_and_gradients(token, [pair[0] for pair in pairs.values()], batch)
    ours = loss_and_gradients(latent, [pair[1] for pair in pairs.values()], batch)
    assert ours[0].item() == pytest.approx(theirs[0].item(), abs=1e-5)
    scale = max(grad.abs().max().item() for grad in theirs[1])
    assert scale > 1e-4
    for name, mine, other in zip(pairs, ours[1], theirs[1]):
        torch.testing.assert_close(mine, other, atol=1e-5, rtol=1e-5, msg=lambda text, name=name: f"{name}: {text}")


def test_every_code_is_read_as_its_token(setting):
    latent, _, batch, _ = setting
    model = latent.model
    states = torch.randn(3, VOCAB_SIZE, model.config.text_config.hidden_size)
    codes = torch.arange(VOCAB_SIZE).expand(3, -1)
    with torch.no_grad():
        assert (model.read(states, codes).argmax(dim=-1) == codes).all()
    mask = batch["completion_mask"].bool()
    assert (batch["action_ids"] == batch["completion_ids"])[mask].all()


def test_old_and_reference_log_probs_are_the_token_models(setting):
    _, _, batch, theirs = setting
    mask = batch["completion_mask"].bool()
    for name in ("old_per_token_logps", "ref_per_token_logps", "sampling_per_token_logps"):
        torch.testing.assert_close(batch[name][mask], theirs[mask], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("beta", [0.0, 0.3])
@pytest.mark.parametrize("level", ["token", "sequence"])
@pytest.mark.parametrize("loss_type", LOSS_TYPES)
def test_loss_and_gradients_are_the_token_models(setting, loss_type, level, beta):
    latent, token, batch, _ = setting
    for trainer in (latent, token):
        trainer.loss_type, trainer.importance_sampling_level, trainer.beta = loss_type, level, beta
    if loss_type == "cispo":
        latent.epsilon_high = token.epsilon_high = 5.0
    else:
        latent.epsilon_high = token.epsilon_high = 0.2
    compare(latent, token, batch)


@pytest.mark.parametrize("options", [{"top_entropy_quantile": 0.4}, {"entropy_coef": 0.05}], ids=["top", "bonus"])
def test_entropy_options_are_the_token_models(setting, options):
    latent, token, batch, _ = setting
    before = {name: getattr(latent, name) for name in ("top_entropy_quantile", "entropy_coef")}
    for trainer in (latent, token):
        trainer.loss_type, trainer.importance_sampling_level, trainer.beta = "grpo", "token", 0.3
        trainer.epsilon_high = 0.2
        for name, value in {**before, **options}.items():
            setattr(trainer, name, value)
        trainer._entropy_bonus_enabled = trainer.entropy_coef != 0.0
    compare(latent, token, batch)
    for trainer in (latent, token):
        for name, value in before.items():
            setattr(trainer, name, value)
        trainer._entropy_bonus_enabled = False


@pytest.mark.parametrize("loss_type", ["grpo", "bnpo", "dr_grpo", "dapo"])
def test_ppo_without_a_value_loss_is_the_token_models(setting, loss_type, tmp_path):
    latent, token, batch, _ = setting
    model = copy.deepcopy(latent.model)
    trainer = LatentActionPPOTrainer(
        model,
        reward,
        LatentActionPPOConfig(str(tmp_path), value_coef=0.0, kl_in="loss", beta=0.3, loss_type=loss_type, **COMMON),
        train_dataset=prompts(),
        processing_class=latent.processing_class,
    )
    trainer.model.train()
    trainer.current_gradient_accumulation_steps = 1
    token.loss_type, token.importance_sampling_level, token.beta, token.epsilon_high = loss_type, "token", 0.3, 0.2
    zeros = torch.zeros_like(batch["old_per_token_logps"])
    batch = {**batch, "old_values": zeros, "returns": zeros, "value_mask": batch["completion_mask"].float()}
    # Advantages of codes, as GAE gives them.
    generator = torch.Generator().manual_seed(3)
    batch["advantages"] = torch.randn(zeros.shape, generator=generator)
    compare(trainer, token, batch)
