"""What the trainers rely on in TRL and transformers: a change there fails here first, in words."""

import inspect

import pytest
import torch
from rl_models import prompts, skip_without_token_scoring
from tiny_models import llama
from transformers import Trainer
from trl import GRPOConfig, GRPOTrainer
from trl.trainer.utils import RepeatSampler, is_async_callable, use_adapter

from latent_trl.trainer.grpo import trainer as latent_action_grpo_trainer
from latent_trl.trainer.grpo.trainer import VISION_KEYS
from latent_trl.trainer.ppo import trainer as latent_action_ppo_trainer
from latent_trl.trainer.rollout.rollout import Rollout
from latent_trl.trainer.run import state as run_state

# The same in TRL 1.15 and 1.16.
SIGNATURES = {
    GRPOTrainer: {
        "train": "self resume_from_checkpoint trial ignore_keys_for_eval",
        "_tokenize_prompts": "self prompts",
        "_generate_single_turn": "self prompt_ids images multimodal_fields num_generations has_tool_images",
        "_generate": "self prompts",
        "_generate_and_score_completions": "self inputs",
        "_get_per_token_logps_and_entropies": "self model input_ids attention_mask logits_to_keep batch_size "
        "compute_entropy compute_aux_loss pixel_values image_grid_thw num_images pixel_attention_mask spatial_shapes "
        "num_tiles image_sizes token_type_ids mm_token_type_ids image_position_ids",
        "_compute_loss": "self model inputs",
        "_calculate_rewards": "self inputs prompts completions completion_ids_list",
        "_prepare_inputs": "self generation_batch",
        "_get_train_sampler": "self dataset",
        "_log_completion_extra": "self column values",
        "training_step": "self model inputs num_items_in_batch",
        "log": "self logs start_time",
    },
    Trainer: {
        "_get_grad_norm": "self model grad_norm",
        "_save_checkpoint": "self model trial",
        "save_model": "self output_dir _internal_call",
        "_save": "self output_dir state_dict",
        "_save_rng_state": "self output_dir",
        "_load_rng_state": "self checkpoint",
        "_load_optimizer_and_scheduler": "self checkpoint",
        "_load_from_checkpoint": "self resume_from_checkpoint model",
        "_load_best_model": "self",
        "create_optimizer": "self model",
    },
}
ATTRIBUTES = [
    *("beta", "ref_model", "generation_config", "generation_kwargs", "reward_funcs", "reward_func_names"),
    *("reward_processing_classes", "reward_weights", "num_generations", "num_iterations", "pad_to_multiple_of"),
    *("max_completion_length", "epsilon_low", "epsilon_high", "eos_token_ids"),
    *("_step", "_buffered_inputs", "_metrics", "_logs", "_pending_extra_logs", "_tokenizer", "_is_vlm"),
]
BATCH = {
    *("prompt_ids", "prompt_mask", "completion_ids", "completion_mask", "advantages", "num_items_in_batch"),
    "old_per_token_logps",
}


def check_signature(cls: type, method: str, wanted: str) -> None:
    function = getattr(cls, method, None)
    if function is None:
        raise AssertionError(
            f"{cls.__name__}.{method} is gone. latent_trl extends it: find what took its place, and widen the tested "
            "range in pyproject.toml when it works again."
        )
    found = " ".join(inspect.signature(inspect.unwrap(function)).parameters)
    if found != wanted:
        raise AssertionError(
            f"{cls.__name__}.{method} takes ({found}), latent_trl was written for ({wanted}). Look at what changed, "
            "then at every override of it in latent_trl/trainer."
        )


@pytest.mark.parametrize(
    "cls, method, wanted",
    [(cls, method, wanted) for cls, methods in SIGNATURES.items() for method, wanted in methods.items()],
    ids=lambda value: value.__name__ if isinstance(value, type) else value if " " not in str(value) else "",
)
def test_methods_that_we_extend_take_what_they_took(cls, method, wanted):
    check_signature(cls, method, wanted)


def test_every_override_is_in_the_contract():
    """No method of TRL or transformers is extended behind the contract's back."""
    known = {name for methods in SIGNATURES.values() for name in methods} | {"__init__"}
    classes = (
        latent_action_grpo_trainer.LatentActionGRPOTrainer,
        latent_action_ppo_trainer.LatentActionPPOTrainer,
        run_state.ExactResumeMixin,
    )
    extended = {
        name
        for cls in classes
        for name, value in vars(cls).items()
        if inspect.isfunction(value) and hasattr(GRPOTrainer, name)
    }
    assert extended <= known, f"Add the signatures of {sorted(extended - known)} to SIGNATURES."


def test_a_change_upstream_fails_in_words():
    class Changed(GRPOTrainer):
        def _compute_loss(self, model, inputs, extra):
            """Another signature."""

    with pytest.raises(AssertionError, match="_compute_loss takes .self model inputs extra., latent_trl was written"):
        check_signature(Changed, "_compute_loss", SIGNATURES[GRPOTrainer]["_compute_loss"])
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

    keep("_generate_single_turn")
    keep("_generate")
    keep("_calculate_rewards")
    keep("_get_per_token_logps_and_entropies")
    keep("_generate_and_score_completions")
    trainer.model.train()
    trainer.current_gradient_accumulation_steps = 1
    data = trainer.train_dataset
    returned["batch"] = trainer._generate_and_score_completions([data[i] for i in (0, 0, 1, 1)])
    return trainer, returned


def test_methods_return_what_they_returned(stock):
    trainer, returned = stock
    completion_ids, log_probs = returned["_generate_single_turn"]
    assert len(completion_ids) == 4 and isinstance(completion_ids[0], list) and log_probs is None
    generated = returned["_generate"]
    assert len(generated) == 8, f"GRPOTrainer._generate returns {len(generated)} values, latent_trl expects 8."
    assert generated[1] == completion_ids and generated[6] is None
    assert tuple(returned["_calculate_rewards"].shape) == (4, 1)
    log_probs, entropies, aux_loss = returned["_get_per_token_logps_and_entropies"]
    assert log_probs.shape == returned["batch"]["completion_ids"].shape and entropies is None and aux_loss is None
    keys = set(returned["batch"])
    assert keys == BATCH, (
        f"GRPOTrainer._generate_and_score_completions returns {sorted(keys)}, latent_trl was written for "
        f"{sorted(BATCH)}: new {sorted(keys - BATCH)}, gone {sorted(BATCH - keys)}."
    )


def test_no_key_of_a_rollout_is_one_of_trls():
    own = set(Rollout.__dataclass_fields__)
    assert not own & (BATCH | set(VISION_KEYS))


def test_vision_inputs_are_those_of_the_scoring_method():
    taken = inspect.signature(inspect.unwrap(GRPOTrainer._get_per_token_logps_and_entropies)).parameters
    first = "self model input_ids attention_mask logits_to_keep batch_size compute_entropy compute_aux_loss".split()
    assert set(taken) - set(first) == set(VISION_KEYS)


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
    async def coroutine():
        """Does nothing."""

    assert is_async_callable(coroutine) and not is_async_callable(print)
    assert list(inspect.signature(use_adapter).parameters) == ["model", "adapter_name"]
