"""
The whole way of every family: its space learned, its backbone tuned, its policy trained by GRPO and by PPO, saved,
loaded, and generating the same. Rows have 1, 0 and 2 images.
"""

import math

import pytest
import torch
from datasets import Dataset
from learning_runs import STAGES, build_sft, build_space, changed, paired_rows, picture, tensors, text_rows, turn
from tiny_models import FAMILIES, VLM_FAMILIES, latent, latent_config, perturb

from latent_trl import (
    LatentActionGRPOConfig,
    LatentActionGRPOTrainer,
    LatentActionModel,
    LatentActionPPOConfig,
    LatentActionPPOTrainer,
)
from latent_trl.trainer.rollout.rollout import Rollout

FEW = ("llama", "qwen2_5_vl")
IMAGES = (1, 0, 2)
TRAINERS = {
    "grpo": (LatentActionGRPOTrainer, LatentActionGRPOConfig, {"num_generations": 2}),
    "ppo": (LatentActionPPOTrainer, LatentActionPPOConfig, {"num_generations": 2}),
}


def rows_of(family: str) -> list[dict]:
    return paired_rows(6, IMAGES) if family in VLM_FAMILIES else text_rows(6)


def turns(completions, **columns) -> list[float]:
    """Different within each group, whatever was said."""
    return [float(i % 2) for i in range(len(completions))]


def build_rl(kind: str, folder, family: str, model, **options):
    trainer_class, config_class, own = TRAINERS[kind]
    rows = [{"prompt": [turn("user", "what " * (1 + i) + str(i))]} for i in range(3)]
    if family in VLM_FAMILIES:
        rows = [{**row, "images": [picture(7 * i + k) for k in range(IMAGES[i])]} for i, row in enumerate(rows)]
    args = config_class(
        str(folder),
        **{
            "use_cpu": True,
            "bf16": False,
            "per_device_train_batch_size": 6,
            "max_completion_length": 5,
            "logging_steps": 1,
            "learning_rate": 1e-2,
            "beta": 0.1,
            "max_steps": 1,
            "num_iterations": 2,
            "save_strategy": "no",
            "disable_tqdm": True,
            **own,
            **options,
        },
    )
    data = Dataset.from_list(rows)
    tiny = FAMILIES[family]()
    return trainer_class(model, turns, args, train_dataset=data, processing_class=tiny.processor)


def check_scores(trainer) -> None:
    """What was sampled is what is scored: by a pass of the backbone where states are not reused."""
    trainer.model.train()
    trainer.current_gradient_accumulation_steps = 1
    batch = trainer._generate_and_score_completions([row for row in trainer.train_dataset for _ in range(2)])
    mask = batch["completion_mask"].bool()
    sampled, scored = batch["sampling_per_token_logps"][mask], batch["old_per_token_logps"][mask]
    torch.testing.assert_close(scored, sampled, atol=1e-4, rtol=1e-4)
    assert sampled.unique().numel() > 3


def only_changed(before, after, *parts: str) -> None:
    names = changed(before, after)
    for part in parts:
        assert any(name.startswith(f"{part}.") for name in names), part
    assert all(name.startswith(tuple(f"{part}." for part in parts)) for name in names), names


@pytest.mark.parametrize("family", [f if f in FEW else pytest.param(f, marks=pytest.mark.slow) for f in FAMILIES])
def test_a_family_goes_the_whole_way(family, tmp_path):
    rows, stages = rows_of(family), list(STAGES) if family in VLM_FAMILIES else ["inverse_dynamics", "policy"]
    # A code moves from the second step on: the world model starts at ignoring them.
    steps = {f"{stage}_max_steps": 2 for stage in stages}
    space = build_space(tmp_path / "space", family, stages=stages, paired=rows, text=None, logging_steps=1, **steps)
    model = space.model
    before = tensors(model)
    space.train()
    parts = ["codebook", "world_model", "inverse_dynamics", "policy"]
    only_changed(before, tensors(model), *parts, *(["projector"] if family in VLM_FAMILIES else []))
    losses = [row["loss"] for row in space.history if "loss" in row]
    assert len(losses) == 2 * len(stages) and all(map(math.isfinite, losses))

    tuned = build_sft(tmp_path / "sft", family, model=model, rows=rows, max_steps=2, logging_steps=1)
    before = tensors(model)
    tuned.train()
    only_changed(before, tensors(model), "backbone")
    assert all(".lora_" in name for name in changed(before, tensors(model)))

    perturb(model)
    for kind, reuse in (("grpo", False), ("ppo", True)):
        trainer = build_rl(kind, tmp_path / kind, family, model, reuse_context_states=reuse)
        before = tensors(model)
        trainer.train()
        only_changed(before, tensors(model), *trainer.trained_components)
        assert all(math.isfinite(row["loss"]) for row in trainer.state.log_history if "loss" in row)
        check_scores(trainer)

    trainer.save_model(str(tmp_path / "model"))
    tiny = FAMILIES[family]()
    loaded = LatentActionModel.from_pretrained(tmp_path / "model", backbone=tiny.model)
    options = {"max_new_tokens": 6, "min_new_tokens": 6, "action_do_sample": False}
    for inputs in (tiny.inputs, tiny.text_inputs):
        assert torch.equal(loaded.generate(**inputs, **options), model.eval().generate(**inputs, **options))


def build(kind: str, folder, dtype: torch.dtype = torch.float32, **options):
    """A trainer of any kind on a tiny LLaVA whose policy counts as trained, and whose backbone is of `dtype`."""
    model, _ = latent("llava", latent_config(stage="none" if kind == "space" else "policy"))
    model.backbone.to(dtype)
    if kind == "space":
        options = {f"{stage}_max_steps": 2 for stage in STAGES} | options
        return build_space(folder, model=model, **options)
    if kind == "sft":
        return build_sft(folder, model=model, max_steps=2, **options)
    return build_rl(kind, folder, "llava", model, max_steps=2, **options)


KINDS = ["space", "sft", "grpo", "ppo"]


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_gradient_checkpointing_changes_no_update(kind, tmp_path):
    results = []
    for checkpointing in (False, True):
        options = {"gradient_checkpointing": checkpointing}
        if kind in TRAINERS:
            # Whole passes, so that the backbone is run too.
            options["reuse_context_states"] = False
        trainer = build(kind, tmp_path / str(checkpointing), **options)
        before = tensors(trainer.model)
        trainer.train()
        results.append(tensors(trainer.model))
        assert changed(before, results[-1])
    plain, checkpointed = results
    for name, tensor in plain.items():
        torch.testing.assert_close(checkpointed[name], tensor, atol=2e-4, rtol=2e-4)


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["bf16", pytest.param("fp16", marks=pytest.mark.gpu)])
@pytest.mark.parametrize("kind", KINDS)
def test_half_precision_has_losses_and_trained_tensors_in_float32(kind, precision, tmp_path):
    """A backbone in half precision under autocast."""
    on_gpu = precision == "fp16"
    if on_gpu and not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    dtype = {"bf16": torch.bfloat16, "fp16": torch.float16}[precision]
    trainer = build(kind, tmp_path, dtype, **{"use_cpu": not on_gpu, "bf16": False, precision: True})
    losses, compute = [], trainer.compute_loss

    def keep(*args, **kwargs):
        losses.append(compute(*args, **kwargs))
        return losses[-1]

    trainer.compute_loss = keep
    trainer.train()
    assert losses and all(loss.dtype == torch.float32 and loss.isfinite() for loss in losses)
    assert {p.dtype for p in trainer.model.parameters() if p.requires_grad} == {torch.float32}
    if kind != "sft":
        assert {p.dtype for p in trainer.model.backbone.parameters()} == {dtype}
    if kind in TRAINERS:
        batch = trainer._generate_and_score_completions([row for row in trainer.train_dataset for _ in range(2)])
        with trainer.accelerator.autocast():
            scored = trainer.score(trainer.model, Rollout.from_batch(batch))
        assert scored.log_probs.dtype == scored.entropies.dtype == torch.float32
