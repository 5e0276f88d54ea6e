"""What the trainers rely on in TRL and transformers: a change there fails here first, in words."""

import ast
import inspect
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
import torch
from rl_models import prompts, skip_without_token_scoring
from tiny_models import llama
from transformers import Trainer
from trl import GRPOConfig, GRPOTrainer
from trl.trainer.utils import RepeatSampler, use_adapter

import latent_trl.trainer
from latent_trl import LatentActionGRPOTrainer, LatentActionPPOTrainer, LatentActionRLOOTrainer
from latent_trl.trainer.rollout.rollout import Rollout

# The private methods of TRL's and transformers' trainers that an RL trainer overrides or calls, and what each depends
# on. One that is not here may not be used.
RL_METHODS = {
    "_generate_and_score_completions": "TRL calls it with the rows of a rollout batch, and buffers the dict it returns",
    "_compute_loss": "TRL's losses, from a batch of the keys that TRL's own rollouts have",
    "_get_per_token_logps_and_entropies": "`_compute_loss` asks it for log-probabilities, entropies and auxiliary loss",
    "_run_epoch": "Trainer runs an epoch through it; it is left out after the last step",
    "_save_checkpoint": "Trainer writes a checkpoint through it, into the folder that the step names",
    "_load_from_checkpoint": "Trainer loads the model of the checkpoint that it resumes through it",
    "_load_best_model": "Trainer loads `state.best_model_checkpoint` through it at the end",
    "_get_grad_norm": "Trainer asks it for the norm before each update, whose gradients may then be dropped",
}
# Those that the learning trainers use beside them.
LEARNING_METHODS = {
    "_prepare_inputs": "Trainer puts a batch on the device through it",
}
# The same in TRL 1.15 and 1.16.
SIGNATURES = {
    "_generate_and_score_completions": "self inputs",
    "_compute_loss": "self model inputs",
    "_get_per_token_logps_and_entropies": "self model input_ids attention_mask logits_to_keep batch_size "
    "compute_entropy compute_aux_loss pixel_values image_grid_thw num_images pixel_attention_mask spatial_shapes "
    "num_tiles image_sizes token_type_ids mm_token_type_ids image_position_ids",
    "_run_epoch": None,
    "_save_checkpoint": "self model trial",
    "_load_from_checkpoint": "self resume_from_checkpoint model",
    "_load_best_model": "self",
    "_get_grad_norm": "self model grad_norm",
    "_prepare_inputs": "self inputs",
    # Public ones that are extended.
    "train": "self resume_from_checkpoint trial ignore_keys_for_eval",
    "training_step": "self model inputs num_items_in_batch",
    "evaluation_loop": "self dataloader description prediction_loss_only ignore_keys metric_key_prefix",
    "log": "self logs start_time",
    "save_model": "self output_dir _internal_call",
    "create_optimizer": "self model",
    "add_callback": "self callback",
    "get_train_dataloader": "self",
    "get_eval_dataloader": "self eval_dataset",
}
ATTRIBUTES = [
    *("beta", "ref_model", "generation_config", "generation_kwargs", "reward_funcs", "reward_func_names"),
    *("reward_processing_classes", "reward_weights", "num_generations", "num_iterations", "pad_to_multiple_of"),
    *("max_completion_length", "epsilon_low", "epsilon_high", "eos_token_ids"),
    *("_step", "_buffered_inputs", "_metrics", "_logs", "_tokenizer"),
]
BATCH = {
    *("prompt_ids", "prompt_mask", "completion_ids", "completion_mask", "advantages", "num_items_in_batch"),
    "old_per_token_logps",
}


PACKAGE = Path(latent_trl.trainer.__file__).parent
RL_FOLDERS, LEARNING_FOLDERS = ("grpo", "ppo", "rloo", "rollout", "run"), ("distillation", "space", "sft", "plans")


def upstream_methods() -> dict[str, Any]:
    """The private methods of `GRPOTrainer` and what it derives from, by name."""
    found: dict[str, Any] = {}
    for cls in GRPOTrainer.__mro__:
        for name, value in vars(cls).items():
            method = inspect.isfunction(value) or isinstance(value, (staticmethod, classmethod, property))
            if method and name.startswith("_") and not name.startswith("__"):
                found.setdefault(name, value)
    return found


def used_in(folders: tuple[str, ...], known: Iterable[str]) -> dict[str, set[str]]:
    """Which of the `known` methods some code below the folders defines, calls or takes, and where."""
    known, used = set(known), {}
    for path in (path for folder in folders for path in sorted((PACKAGE / folder).rglob("*.py"))):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            name = (
                node.name if isinstance(node, ast.FunctionDef) else node.attr if isinstance(node, ast.Attribute) else ""
            )
            if name in known:
                used.setdefault(name, set()).add(f"{path.relative_to(PACKAGE)}:{node.lineno}")
    return used


def unlisted(folders: tuple[str, ...], listed: Iterable[str], known: Iterable[str]) -> dict[str, set[str]]:
    return {name: places for name, places in used_in(folders, known).items() if name not in listed}


def test_private_methods_of_upstream_are_all_in_the_list():
    """Every definition, call and `super()` call of one, wherever in the trainers."""
    upstream = upstream_methods()
    assert {"_compute_loss", "_inner_training_loop", "_save"} <= upstream.keys()
    found = unlisted(RL_FOLDERS, {**RL_METHODS, **LEARNING_METHODS}, upstream)
    assert not found, f"Private methods of TRL or transformers that no line of the contract speaks of: {found}"
    found = unlisted(LEARNING_FOLDERS, {**RL_METHODS, **LEARNING_METHODS}, upstream)
    assert not found, f"Private methods of transformers that no line of the contract speaks of: {found}"
    # What the RL trainers do not have among their classes' methods is of the learning trainers alone.
    in_use = used_in(RL_FOLDERS, RL_METHODS)
    assert in_use.keys() == RL_METHODS.keys(), f"No longer used: {sorted(RL_METHODS.keys() - in_use.keys())}"
    in_use = used_in(("run", *LEARNING_FOLDERS), LEARNING_METHODS)
    assert in_use.keys() == LEARNING_METHODS.keys(), "A line for a method that is no longer used."


def test_an_rl_trainer_has_no_method_that_only_learning_may_have():
    upstream = upstream_methods()
    for cls in (LatentActionGRPOTrainer, LatentActionPPOTrainer, LatentActionRLOOTrainer):
        own = [c for c in cls.__mro__ if c.__module__.startswith("latent_trl.")]
        overridden = {name for c in own for name in vars(c) if name in upstream}
        assert overridden <= RL_METHODS.keys(), f"{cls.__name__}: {sorted(overridden - RL_METHODS.keys())}"


def test_the_list_is_short():
    assert len(RL_METHODS) <= 8


def test_a_method_that_is_not_in_the_list_is_found():
    found = unlisted(RL_FOLDERS, set(RL_METHODS) - {"_get_grad_norm"}, upstream_methods())
    places = found.pop("_get_grad_norm")
    assert all(place.startswith("run/component_training.py:") for place in places) and len(places) == 2


def check_signature(cls: type, method: str, wanted: str | None) -> None:
    function = getattr(cls, method, None)
    if function is None:
        raise AssertionError(
            f"{cls.__name__}.{method} is gone. latent_trl extends it: find what took its place, and widen the tested "
            "range in setup.py when it works again."
        )
    found = " ".join(inspect.signature(inspect.unwrap(function)).parameters)
    if wanted is not None and found != wanted:
        raise AssertionError(
            f"{cls.__name__}.{method} takes ({found}), latent_trl was written for ({wanted}). Look at what changed, "
            "then at every override of it in latent_trl/trainer."
        )


@pytest.mark.parametrize("method", SIGNATURES)
def test_methods_that_we_extend_take_what_they_took(method):
    check_signature(Trainer if method in LEARNING_METHODS else GRPOTrainer, method, SIGNATURES[method])


def test_every_method_that_is_extended_has_its_signature_here():
    """Public methods too."""
    classes = (LatentActionGRPOTrainer, LatentActionPPOTrainer, LatentActionRLOOTrainer)
    own = {
        c
        for cls in classes
        for c in cls.__mro__
        if c.__module__.startswith("latent_trl.trainer.") and "hub" not in c.__module__
    }
    extended = {n for c in own for n, v in vars(c).items() if inspect.isfunction(v) and hasattr(GRPOTrainer, n)}
    known = SIGNATURES.keys() | {"__init__"}
    assert extended <= known, f"Add the signatures of {sorted(extended - known)} to SIGNATURES."


def test_a_change_upstream_fails_in_words():
    class Changed(GRPOTrainer):
        def _compute_loss(self, model, inputs, extra):
            """Another signature."""

    with pytest.raises(AssertionError, match="_compute_loss takes .self model inputs extra., latent_trl was written"):
        check_signature(Changed, "_compute_loss", SIGNATURES["_compute_loss"])
    with pytest.raises(AssertionError, match="Changed._gone is gone"):
        check_signature(Changed, "_gone", "self")


@pytest.fixture(scope="module")
def stock(tmp_path_factory):
    """TRL's own trainer on a tiny model, one rollout batch, and what its methods returned on the way."""
    skip_without_token_scoring()
    tiny = llama()
    returned = {}

    def reward(completions, **columns):
        return [float(len(c)) for c in completions]

    trainer = GRPOTrainer(
        tiny.model,
        reward,
        GRPOConfig(
            str(tmp_path_factory.mktemp("contract")),
            use_cpu=True,
            bf16=False,
            per_device_train_batch_size=4,
            num_generations=2,
            num_iterations=2,
            max_completion_length=4,
            gradient_checkpointing=False,
            report_to="none",
        ),
        train_dataset=prompts(8),
        processing_class=tiny.processor,
    )

    def keep(name):
        method = getattr(trainer, name)

        def call(*args, **kwargs):
            returned[name] = method(*args, **kwargs)
            return returned[name]

        setattr(trainer, name, call)

    keep("_get_per_token_logps_and_entropies")
    keep("_generate_and_score_completions")
    trainer.model.train()
    trainer.current_gradient_accumulation_steps = 1
    data = trainer.train_dataset
    returned["batch"] = trainer._generate_and_score_completions([data[i] for i in (0, 0, 1, 1)])
    return trainer, returned


def test_methods_return_what_they_returned(stock):
    _, returned = stock
    log_probs, entropies, aux_loss = returned["_get_per_token_logps_and_entropies"]
    assert log_probs.shape == returned["batch"]["completion_ids"].shape and entropies is None and aux_loss is None
    keys = set(returned["batch"])
    assert keys == BATCH, (
        f"GRPOTrainer._generate_and_score_completions returns {sorted(keys)}, latent_trl was written for "
        f"{sorted(BATCH)}: new {sorted(keys - BATCH)}, gone {sorted(BATCH - keys)}."
    )


def test_a_rollout_has_what_the_loss_reads():
    """TRL's keys, and the codes beside them."""
    assert BATCH <= set(Rollout.__dataclass_fields__)


def test_advantages_of_codes_are_taken(stock):
    """PPO hands over advantages `[B, C]`: equal ones along a completion give the loss of one for each."""
    trainer, returned = stock
    batch = returned["batch"]
    one = trainer._compute_loss(trainer.model, batch).item()
    expanded = batch["advantages"].unsqueeze(1).expand_as(batch["completion_ids"])
    assert trainer._compute_loss(trainer.model, {**batch, "advantages": expanded}).item() == pytest.approx(one)


def test_attributes_are_there(stock):
    trainer, _ = stock
    missing = [name for name in ATTRIBUTES if name not in vars(trainer)]
    assert not missing, f"GRPOTrainer has no {missing} any more; latent_trl reads or sets them."
    assert set(trainer._logs) == {"images", "prompt", "completion", "rewards", "advantages", "extra"}
    assert set(trainer._metrics) == {"train", "eval"}


def test_sampler_shuffles_with_a_generator_of_its_own():
    """What resuming in a later epoch replays: one permutation of all rows an epoch."""
    sampler = RepeatSampler(list(range(5)), mini_repeat_count=1, seed=3)
    generator = torch.Generator().manual_seed(3)
    for _ in range(2):
        assert list(sampler) == torch.randperm(sampler.num_samples, generator=generator).tolist()


def test_helpers_of_trl_are_there():
    assert list(inspect.signature(use_adapter).parameters) == ["model", "adapter_name"]
