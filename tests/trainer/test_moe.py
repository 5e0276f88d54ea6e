"""A mixture of experts: RL updates run, and a trained one is balanced as in TRL."""

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig
from tiny_models import causal, latent_config, text_fields

from latent_trl import (
    LatentActionGRPOConfig,
    LatentActionGRPOTrainer,
    LatentActionModel,
    LatentActionPPOConfig,
    LatentActionPPOTrainer,
)

EXPERTS = {"router_aux_loss_coef": 0.1, "num_experts_per_tok": 2}
KINDS = {
    "Qwen3Moe": {"num_experts": 4, "moe_intermediate_size": 16, "head_dim": 8, "decoder_sparse_step": 1},
    "Mixtral": {"num_local_experts": 4},
    "Olmoe": {"num_experts": 4},
    "GptOss": {"num_local_experts": 4, "head_dim": 8},
}
TRAINERS = {
    "grpo": (LatentActionGRPOTrainer, LatentActionGRPOConfig),
    "ppo": (LatentActionPPOTrainer, LatentActionPPOConfig),
}


def build(folder, family, kind="grpo", **options):
    tiny = causal(family, **text_fields(num_hidden_layers=2, **EXPERTS, **KINDS[family]))
    model = LatentActionModel.from_backbone(tiny.model, latent_config())
    trainer_class, config_class = TRAINERS[kind]
    fields = {"use_cpu": True, "bf16": False, "max_steps": 1, "logging_steps": 1, "save_strategy": "no"}
    fields |= {"per_device_train_batch_size": 4, "num_generations": 2, "num_iterations": 1, "disable_tqdm": True}
    args = config_class(str(folder), max_completion_length=4, **{**fields, **options})
    adapter = LoraConfig(r=2, target_modules=["q_proj"]) if args.train_backbone else None
    return trainer_class(
        model,
        lambda completions, **columns: [float(i % 2) for i in range(len(completions))],
        args,
        # Equal lengths: no padding, so that the model's own loss is of the same tokens.
        train_dataset=Dataset.from_list([{"prompt": f"what {i}"} for i in range(8)]),
        processing_class=tiny.processor,
        peft_config=adapter,
    )


def logged(trainer, name):
    return [row[name] for row in trainer.state.log_history if name in row]


@pytest.mark.parametrize("train_backbone", [False, True], ids=["frozen", "adapter"])
@pytest.mark.parametrize("kind", TRAINERS)
@pytest.mark.parametrize("family", KINDS)
def test_updates_run_and_a_trained_backbone_is_balanced(family, kind, train_backbone, tmp_path, caplog):
    trainer = build(tmp_path, family, kind, train_backbone=train_backbone)
    before = {name: p.detach().clone() for name, p in trainer.model.named_parameters() if p.requires_grad}
    trainer.train()
    assert any(not torch.equal(p, before[n]) for n, p in trainer.model.named_parameters() if n in before)
    values = logged(trainer, "aux_loss")
    if not train_backbone:
        assert not values and "aux" not in caplog.text
        return
    # At most as many as the experts, where all tokens go to the same ones; the least is what a token chooses.
    assert len(values) == 1 and 1.0 <= values[0] <= 4.0


@pytest.mark.parametrize("family", KINDS)
def test_the_auxiliary_loss_is_the_models_own_and_weighs_what_trl_says(family, tmp_path):
    trainer = build(tmp_path, family, train_backbone=True, beta=0.0)
    trainer.model.train()
    trainer.current_gradient_accumulation_steps = 1
    rows = [trainer.train_dataset[i // 2] for i in range(4)]
    batch = trainer._generate_and_score_completions(rows)
    loss = trainer._compute_loss(trainer.model, batch)
    ids = torch.cat([batch["prompt_ids"], batch["completion_ids"]], dim=1)[:, :-1]
    mask = torch.cat([batch["prompt_mask"], batch["completion_mask"]], dim=1)[:, :-1]
    backbone = trainer.model.backbone
    own = backbone(input_ids=ids, attention_mask=mask, output_router_logits=True).aux_loss
    torch.testing.assert_close(trainer._metrics["train"]["aux_loss"][-1], own.item(), atol=1e-5, rtol=1e-5)
    trainer.router_aux_loss_coef = 0.0
    trainer.aux_loss_enabled = False
    without = trainer._compute_loss(trainer.model, batch)
    torch.testing.assert_close(loss - without, 0.1 * own, atol=1e-5, rtol=1e-4)


def test_a_coefficient_of_zero_computes_nothing(tmp_path):
    trainer = build(tmp_path, "Qwen3Moe", train_backbone=True, router_aux_loss_coef=0.0)
    trainer.train()
    assert not logged(trainer, "aux_loss")


def test_a_coefficient_for_a_dense_model_is_refused_as_in_trl(tmp_path):
    from tiny_models import latent

    model, tiny = latent("llama", latent_config(use_projector=False))
    args = LatentActionGRPOConfig(str(tmp_path), use_cpu=True, bf16=False, router_aux_loss_coef=0.1)
    with pytest.raises(ValueError, match="`router_aux_loss_coef` is set to 0.1"):
        LatentActionGRPOTrainer(
            model, len, args, Dataset.from_list([{"prompt": "a"}] * 8), processing_class=tiny.processor
        )
