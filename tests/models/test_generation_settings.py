"""Whose settings count: what is passed does or is refused, what a checkpoint brings does where it changes no token."""

import logging

import pytest
import torch
from tiny_models import EOS, latent, latent_config
from transformers import GenerationConfig

from latent_trl.generation.settings import (
    EXPLICIT_SETTINGS,
    REFUSED_SETTINGS,
    check_generation_kwargs,
    settled_config,
)

# Of a checkpoint, and what would change the text or be refused, did it count.
DROPPED = {
    "repetition_penalty": 3.0,
    "encoder_repetition_penalty": 3.0,
    "no_repeat_ngram_size": 1,
    "encoder_no_repeat_ngram_size": 1,
    "bad_words_ids": [[token] for token in range(40, 250)],
    "sequence_bias": [[[41], 50.0]],
    "suppress_tokens": list(range(40, 250)),
    "begin_suppress_tokens": list(range(40, 250)),
    "forced_bos_token_id": 40,
    "forced_eos_token_id": EOS,
    "exponential_decay_length_penalty": (2, 50.0),
    "remove_invalid_values": True,
    "min_length": 40,
    "min_new_tokens": 12,
    "stop_strings": ["a"],
    "num_return_sequences": 3,
    "do_sample": True,
    "temperature": 0.1,
    "top_k": 20,
    "top_p": 0.001,
    "num_beams": 4,
    "length_penalty": 0.5,
    "early_stopping": True,
    "penalty_alpha": 0.6,
    "guidance_scale": 1.5,
    "dola_layers": "low",
    "prompt_lookup_num_tokens": 3,
    "prefill_chunk_size": 4,
}
LENGTH = 12


@pytest.fixture(scope="module")
def perturbed():
    return latent("llama", latent_config(use_projector=False))


@pytest.fixture
def warnings_of_settings(caplog):
    """The warnings about settings. transformers' loggers do not pass on what they are told, and tell it once."""
    logger = logging.getLogger("latent_trl.generation.settings")
    logging.getLogger("latent_trl").propagate = True
    type(logger).warning_once.cache_clear()
    return lambda: [r.getMessage() for r in caplog.records if r.name == logger.name]


@pytest.mark.parametrize("name", DROPPED)
def test_defaults_of_the_checkpoint_that_change_a_token_are_left_out_and_named(perturbed, name, warnings_of_settings):
    model, tiny = perturbed
    own = {"max_new_tokens": LENGTH, "action_do_sample": False}
    wanted = model.generate(**tiny.text_inputs, **own)
    before = [config.to_dict() for config in (model.generation_config, model.backbone.generation_config)]
    try:
        for config in (model.generation_config, model.backbone.generation_config):
            setattr(config, name, DROPPED[name])
        # Twice: a second call does not warn again.
        for _ in range(2):
            assert torch.equal(model.generate(**tiny.text_inputs, **own), wanted)
        assert getattr(model.backbone.generation_config, name) == DROPPED[name], "put back after the call"
        # A passed configuration does not bring them back.
        config = GenerationConfig(**own)
        assert torch.equal(model.generate(**tiny.text_inputs, generation_config=config), wanted)
    finally:
        for config, values in zip((model.generation_config, model.backbone.generation_config), before, strict=True):
            setattr(config, name, values[name])
    assert len(warnings_of_settings()) == 1 and f"{name}=" in warnings_of_settings()[0]


def test_every_setting_that_is_left_out_asks_for_nothing_by_default():
    defaults = GenerationConfig().to_dict()
    for name, values in {**{n: v for n, (v, _) in REFUSED_SETTINGS.items()}, **EXPLICIT_SETTINGS}.items():
        assert name in defaults, f"{name} is no setting of transformers"
        assert defaults[name] in values
        assert GenerationConfig._get_default_generation_params().get(name) in (*values, 50 if name == "top_k" else None)


def test_what_is_passed_counts_beside_a_checkpoint_that_says_otherwise(perturbed):
    model, tiny = perturbed
    model.generation_config.repetition_penalty = 3.0
    options = {"max_new_tokens": LENGTH, "action_do_sample": False}
    try:
        plain = model.generate(**tiny.text_inputs, **options)
        passed = model.generate(**tiny.text_inputs, **options, repetition_penalty=3.0)
        config = GenerationConfig(**options, repetition_penalty=3.0)
        in_config = model.generate(**tiny.text_inputs, generation_config=config)
        assert not torch.equal(plain, passed)
        assert torch.equal(passed, in_config)
    finally:
        model.generation_config.repetition_penalty = None


def test_lengths_tokens_and_own_settings_of_the_checkpoint_count():
    checkpoint = GenerationConfig(
        max_new_tokens=7,
        eos_token_id=[2, 3],
        pad_token_id=1,
        cache_implementation="static",
        action_top_k=5,
        num_beams=4,
    )
    config, others, copies = settled_config(None, checkpoint, {"pixel_values": 1, "num_return_sequences": 2})
    assert (config.max_new_tokens, config.eos_token_id, config.pad_token_id) == (7, [2, 3], 1)
    assert (config.cache_implementation, config.action_top_k, config.num_beams) == ("static", 5, None)
    assert (others, copies) == ({"pixel_values": 1}, 2)
    # A passed limit is not overruled by the checkpoint's other one.
    config, _, _ = settled_config(None, checkpoint, {"max_length": 9})
    assert (config.max_length, config.max_new_tokens) == (9, None)
    config, _, _ = settled_config(None, GenerationConfig(max_length=9), {"max_new_tokens": 7})
    assert (config.max_length, config.max_new_tokens) == (None, 7)


@pytest.mark.parametrize(
    "settings, match",
    [
        ({"temperature": 0.7}, "`temperature=0.7` in `generation_kwargs`.*action_temperature"),
        ({"num_beams": 2}, "`num_beams=2` in `generation_kwargs`"),
        ({"action_top_k": 3}, "`action_top_k=3` in `generation_kwargs`: set the trainer's own field"),
        ({"action_temperature": 0.5}, "`action_temperature=0.5`"),
        ({"cuda_graphs": True}, "`cuda_graphs=True`"),
        ({"num_return_sequences": 2}, "`num_generations`"),
        ({"repetition_penality": 2.0}, "`repetition_penality=2.0`.*no setting"),
    ],
)
def test_what_a_trainer_passes_on_is_honoured_or_refused(settings, match):
    with pytest.raises(ValueError, match=match):
        check_generation_kwargs(settings)
    check_generation_kwargs(None)
    check_generation_kwargs({"repetition_penalty": 1.2, "bad_words_ids": [[3]], "top_k": 0, "temperature": 1.0})
