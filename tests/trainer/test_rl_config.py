"""Configurations of RL: presets keep what is given, and what would be ignored is refused by name."""

import logging
import warnings

import pytest
from rl_models import prompts
from tiny_models import latent, latent_config

from latent_trl import (
    LatentActionGRPOConfig,
    LatentActionGRPOTrainer,
    LatentActionPPOConfig,
    LatentActionRLOOConfig,
)

CONFIGS = (LatentActionGRPOConfig, LatentActionPPOConfig, LatentActionRLOOConfig)


def config(cls=LatentActionGRPOConfig, **options):
    return cls("unused", use_cpu=True, bf16=False, **options)


@pytest.fixture
def warned(caplog):
    logger = logging.getLogger("latent_trl")
    propagate, logger.propagate = logger.propagate, True
    yield caplog
    logger.propagate = propagate


@pytest.mark.parametrize(
    "name, given, of_preset",
    [("beta", 0.2, 0.0), ("epsilon_high", 0.4, 0.28), ("dynamic_sampling_rounds", 1, 3), ("loss_type", "grpo", "dapo")],
)
def test_a_preset_keeps_what_is_given_and_says_so(name, given, of_preset, warned):
    args = config(preset="dapo", **{name: given})
    assert getattr(args, name) == given
    assert f"`{name}={of_preset!r}`; yours, {given!r}, is kept" in warned.text
    warned.clear()
    assert getattr(config(preset="dapo"), name) == of_preset
    assert "is kept" not in warned.text


TOKENS = {"temperature": 0.5, "top_k": 3, "top_p": 0.5, "min_p": 0.1, "do_sample": True, "typical_p": 0.5}
CODES = {"action_temperature": 0.5, "action_top_k": 3, "action_top_p": 0.5, "action_sampling": "independent"}
CODES |= {"action_do_sample": False, "cuda_graphs": True, "num_return_sequences": 3, "max_new_tokens": 9}


@pytest.mark.parametrize("cls", CONFIGS)
@pytest.mark.parametrize("name", [*TOKENS, *CODES])
def test_generation_kwargs_that_would_be_ignored_are_refused(cls, name):
    with pytest.raises(ValueError, match=f"`{name}=.*` in `generation_kwargs`"):
        config(cls, generation_kwargs={name: {**TOKENS, **CODES}[name]})
    assert config(cls, generation_kwargs={"no_repeat_ngram_size": 2}).generation_kwargs == {"no_repeat_ngram_size": 2}


@pytest.mark.parametrize("cls", CONFIGS)
@pytest.mark.parametrize(
    "name", ["min_entropy", "min_perplexity", "anchor_batch_size", "anchor_max_length", "anchor_image_root"]
)
def test_fields_that_nobody_should_set_are_none(cls, name):
    with pytest.raises(TypeError, match=name):
        config(cls, **{name: 1})


@pytest.mark.parametrize(
    "options, words",
    [
        ({"advantage_estimator": "gae"}, "`advantage_estimator`"),
        (
            {"advantage_estimator": "rloo", "multi_objective_aggregation": "normalize_then_sum"},
            "about GRPO's advantages",
        ),
        ({"cast_lm_head_to_fp32": True}, "Codes are always scored in float32"),
        ({"sync_ref_model": True}, "`sync_ref_model=True`"),
    ],
)
def test_what_cannot_come_together_is_refused(options, words):
    with pytest.raises(ValueError, match=words):
        config(**options)


def test_estimators_have_scales_of_their_own():
    assert config(advantage_estimator="rloo").scale_rewards == "none"
    assert config(advantage_estimator="reinforce++").scale_rewards == "batch"
    assert config(advantage_estimator="rloo", scale_rewards="batch").scale_rewards == "batch"
    with pytest.raises(ValueError, match="`advantage_estimator='rloo'` is about groups"):
        config(LatentActionPPOConfig, advantage_estimator="rloo")


@pytest.mark.parametrize("options", [{"vllm_max_model_length": 64}, {"use_vllm": True, "train_backbone": True}])
def test_what_is_about_an_engine_or_cannot_be_had_with_one(tmp_path, options):
    with pytest.raises(ValueError, match=list(options)[-1]):
        LatentActionGRPOConfig(str(tmp_path), use_cpu=True, bf16=False, **options)


def test_without_vllm_one_is_told_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setattr("latent_trl.trainer.rollout.engine_source.find_spec", lambda name: None)
    args = LatentActionGRPOConfig(str(tmp_path), use_cpu=True, bf16=False, use_vllm=True)
    model, tiny = latent("llama", latent_config(use_projector=False))
    with pytest.raises(ImportError, match="pip install"):
        LatentActionGRPOTrainer(model, len, args, prompts(8), processing_class=tiny.processor)


def test_users_are_not_told_of_a_name_that_trl_asks_for(tmp_path, make_tiny):
    model = make_tiny("llama").model
    with warnings.catch_warnings(record=True) as caught:
        LatentActionGRPOConfig(str(tmp_path), use_cpu=True, bf16=False)
        assert not model.is_gradient_checkpointing
    assert not [one.message for one in caught if "gradient_checkpointing" in str(one.message)]
