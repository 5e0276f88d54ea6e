"""A run that was interrupted goes on bit by bit as if it had not been, for each trainer."""

import copy
import shutil
from pathlib import Path

import pytest
import torch
from learning_runs import text_rows
from peft import LoraConfig
from rl_models import prompts
from safetensors.torch import load_file
from test_grpo_rollouts import build as build_with_pictures
from tiny_models import latent, latent_config
from transformers import TrainerCallback

from latent_trl import (
    LatentActionGRPOConfig,
    LatentActionGRPOTrainer,
    LatentActionModel,
    LatentActionPPOConfig,
    LatentActionPPOTrainer,
    LatentActionRLOOConfig,
    LatentActionRLOOTrainer,
)
from latent_trl.models.component import CheckpointError

# What tells the time, not the run.
CLOCKS = (
    "step_time",
    "train_runtime",
    "train_samples_per_second",
    "train_steps_per_second",
    "total_flos",
    "train_loss",
)
COMMON = {
    "use_cpu": True,
    "bf16": False,
    "per_device_train_batch_size": 4,
    "max_completion_length": 5,
    "logging_steps": 1,
    "learning_rate": 1e-2,
    "beta": 0.05,
    "save_strategy": "steps",
    "save_steps": 100,
    "disable_tqdm": True,
    "max_steps": 9,
    "lr_scheduler_type": "linear",
}


def letters(completions, **columns):
    return [float(len(set(completion))) for completion in completions]


class SaveAt(TrainerCallback):
    def __init__(self, step: int, stop: bool = False):
        self.step, self.stop = step, stop

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == self.step:
            control.should_save, control.should_training_stop = True, self.stop
        return control


def build(kind: str, folder: Path, callback: TrainerCallback | None, model=None, **options):
    fresh, tiny = latent("llama", latent_config(use_projector=False))
    model = model or fresh
    options = {**COMMON, **options}
    if kind == "ppo":
        trainer_class, args = LatentActionPPOTrainer, LatentActionPPOConfig(str(folder), **options)
    elif kind == "rloo":
        trainer_class = LatentActionRLOOTrainer
        args = LatentActionRLOOConfig(str(folder), **{"num_generations": 2, **options})
    else:
        trainer_class = LatentActionGRPOTrainer
        args = LatentActionGRPOConfig(str(folder), **{"num_generations": 2, **options})
    return trainer_class(
        model,
        letters,
        args,
        train_dataset=prompts(20),
        processing_class=tiny.processor,
        callbacks=[callback] if callback else [],
        anchor_dataset=text_rows() if args.anchor_coef else None,
    )


def logs(trainer) -> list[dict]:
    kept = [{k: v for k, v in log.items() if k not in CLOCKS} for log in trainer.state.log_history]
    return [log for log in kept if len(log) > 2]


def states(trainer):
    weights = {name: p.detach().clone() for name, p in trainer.model.named_parameters() if p.requires_grad}
    return weights, copy.deepcopy(trainer.optimizer.state_dict())


def assert_identical(one, other):
    assert type(one) is type(other)
    if isinstance(one, torch.Tensor):
        assert torch.equal(one, other)
    elif isinstance(one, dict):
        assert one.keys() == other.keys()
        for name in one:
            assert_identical(one[name], other[name])
    elif isinstance(one, (list, tuple)):
        assert len(one) == len(other)
        for a, b in zip(one, other):
            assert_identical(a, b)
    else:
        assert one == other or (one != one and other != other)


CASES = {
    "start of a rollout batch": (4, {"num_iterations": 2}),
    "second epoch over a rollout batch": (3, {"num_iterations": 2}),
    "between minibatches": (5, {"num_iterations": 1, "steps_per_generation": 4}),
    "between minibatches of the second epoch": (7, {"num_iterations": 2, "steps_per_generation": 4}),
    "accumulating": (3, {"num_iterations": 2, "gradient_accumulation_steps": 2, "steps_per_generation": 4}),
    "between logs": (5, {"num_iterations": 2, "logging_steps": 3}),
    "in a second pass over the data": (7, {"num_iterations": 1, "per_device_train_batch_size": 8}),
    "top-k": (3, {"num_iterations": 2, "action_top_k": 5}),
    "anchored": (3, {"num_iterations": 2, "anchor_coef": 0.5}),
}


@pytest.mark.parametrize(
    "kind, case",
    [
        *((kind, case) for kind in ("grpo", "ppo") for case in CASES),
        ("rloo", "between minibatches of the second epoch"),
    ],
)
def test_interrupted_run_is_the_uninterrupted_one(kind, case, tmp_path):
    step, options = CASES[case]
    if kind == "ppo":
        options = {**options, "kl_target": 0.02, "kl_horizon": 20, "value_warmup_steps": 2}
    whole = build(kind, tmp_path / "whole", SaveAt(step), **options)
    whole.train()
    cut = build(kind, tmp_path / "cut", SaveAt(step, stop=True), **options)
    cut.train()
    assert cut.state.global_step == step
    resumed = build(kind, tmp_path / "cut", None, **options)
    resumed.train(resume_from_checkpoint=str(tmp_path / "cut" / f"checkpoint-{step}"))
    assert resumed.state.global_step == whole.state.global_step == COMMON["max_steps"]
    assert_identical(states(resumed), states(whole))
    assert logs(resumed) == logs(whole)
    if kind == "ppo":
        assert resumed.beta == whole.beta != COMMON["beta"]


def test_order_of_prompts_goes_on_in_a_later_pass_over_the_data(tmp_path):
    """The sampler's own generator, which Trainer does not restore."""
    seen = {}

    def build_recording(name, callback):
        trainer = build("grpo", tmp_path / name.split()[0], callback, num_iterations=1, max_steps=16)
        seen[name] = []
        original = trainer.reward_funcs[0]

        def record(prompts, completions, **columns):
            seen[name].append(list(prompts))
            return original(prompts=prompts, completions=completions, **columns)

        trainer.reward_funcs[0] = record
        return trainer

    build_recording("whole", None).train()
    build_recording("cut", SaveAt(13, stop=True)).train()
    resumed = build_recording("cut again", None)
    resumed.train(resume_from_checkpoint=str(tmp_path / "cut" / "checkpoint-13"))
    assert seen["cut"] + seen["cut again"] == seen["whole"]


def test_checkpoint_holds_the_rest_of_a_rollout_batch_only_while_it_is_in_use(tmp_path):
    build("ppo", tmp_path, SaveAt(3), num_iterations=2).train()
    used, fresh = tmp_path / "checkpoint-3", tmp_path / "checkpoint-9"
    assert "0.old_values" in load_file(used / "rollout_buffer_0.safetensors")
    assert (used / "value_head" / "model.safetensors").is_file()
    build("ppo", tmp_path / "other", SaveAt(4), num_iterations=2).train()
    assert not (tmp_path / "other" / "checkpoint-4" / "rollout_buffer_0.safetensors").exists()
    assert fresh.is_dir()


def test_checkpoint_without_a_run_state_starts_a_new_rollout_batch(tmp_path):
    build("grpo", tmp_path, SaveAt(3, stop=True), num_iterations=2).train()
    (tmp_path / "checkpoint-3" / "rollout_state_0.json").unlink()
    resumed = build("grpo", tmp_path, None, num_iterations=2)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
    assert resumed.state.global_step == 9


def later_policy(folder: Path):
    """The model that a checkpoint holds, loaded as a user would."""
    model, _ = latent("llama", latent_config(use_projector=False))
    return LatentActionModel.from_pretrained(folder, backbone=model.backbone)


@pytest.mark.parametrize("kind", ["grpo", "ppo"])
def test_divergence_goes_on_when_the_model_given_is_that_of_the_checkpoint(kind, tmp_path):
    """The reference is the policy before RL, also where the policy that is given to the trainer is a later one."""
    options = {"num_iterations": 2}
    whole = build(kind, tmp_path / "whole", None, **options)
    whole.train()
    build(kind, tmp_path / "cut", SaveAt(4, stop=True), **options).train()
    checkpoint = tmp_path / "cut" / "checkpoint-4"
    model = later_policy(checkpoint)
    resumed = build(kind, tmp_path / "cut", None, model=model, **options)
    resumed.train(resume_from_checkpoint=str(checkpoint))
    assert logs(resumed) == logs(whole)
    assert_identical(states(resumed), states(whole))
    divergences = [log["kl"] for log in logs(whole) if log["step"] == 5]
    assert divergences and divergences[0] > 1e-4


def test_a_reference_that_cannot_be_had_is_refused_by_name(tmp_path):
    build("grpo", tmp_path, SaveAt(4, stop=True)).train()
    checkpoint = tmp_path / "checkpoint-4"
    shutil.rmtree(tmp_path / "reference")
    model = later_policy(checkpoint)
    with pytest.raises(CheckpointError, match=f"another policy .*{tmp_path / 'reference'}.*that the run began with"):
        build("grpo", tmp_path, None, model=model).train(resume_from_checkpoint=str(checkpoint))
    # With the model that the run began with, nothing is missing.
    again = build("grpo", tmp_path, None)
    again.train(resume_from_checkpoint=str(checkpoint))
    assert again.state.global_step == COMMON["max_steps"]


@pytest.mark.parametrize("family", ["llava", "qwen2_5_vl"])
@pytest.mark.parametrize("kind", ["grpo", "ppo"])
def test_prompts_with_pictures_survive_a_checkpoint_in_the_middle_of_a_rollout(kind, family, tmp_path):
    """With an adapter every pass runs the backbone, pictures included: they are part of the rollout."""

    def run(folder, callback, resume=None):
        options = {**COMMON, "num_iterations": 2, "steps_per_generation": 2, "max_steps": 5}
        lora = LoraConfig(r=2, lora_alpha=8)
        trainer = build_with_pictures(folder, kind, family, peft_config=lora, train_backbone=True, **options)
        trainer.add_callback(callback)
        trainer.train(resume_from_checkpoint=resume)
        return trainer

    whole = run(tmp_path / "whole", SaveAt(3))
    run(tmp_path / "cut", SaveAt(3, stop=True))
    checkpoint = tmp_path / "cut" / "checkpoint-3"
    kept = load_file(checkpoint / "rollout_buffer_0.safetensors")
    assert any(name.startswith("prompts.") and ".vision." in name for name in kept)
    resumed = run(tmp_path / "cut", SaveAt(99), resume=str(checkpoint))
    assert_identical(states(resumed), states(whole))
    assert logs(resumed) == logs(whole)
