"""Settings of `generate`: whose count, which are left out, and which are refused."""

import copy
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from transformers import GenerationConfig, PreTrainedModel
from transformers.utils import logging

from .arithmetic_sampling import ACTION_SAMPLING

logger = logging.get_logger(__name__)

ACTION_DEFAULTS: dict[str, Any] = {
    "action_do_sample": True,
    "action_temperature": 1.0,
    "action_top_k": 0,
    "action_top_p": 1.0,
    "action_sampling": "independent",
}

_NO_SAMPLING = (
    "would choose among tokens, which are the most likely ones given their codes. Codes are sampled: use "
    "`action_do_sample`, `action_temperature`, `action_top_k` and `action_top_p`, and for several samples the argument "
    "`num_return_sequences`"
)
_NO_BEAMS = "is about beams, which cannot give back one code per token. For more candidates use `num_return_sequences`"
_NO_OTHER_DECODING = "is another way to decode, which cannot give back one code per token. Leave it out"
_NO_DRAFTS = "is about drafts of several tokens, which have no codes. Leave it out"

# What cannot be had over codes: the values that ask for nothing, and why any other is refused.
REFUSED_SETTINGS: dict[str, tuple[tuple[Any, ...], str]] = {
    **{
        name: (values, _NO_SAMPLING)
        for name, values in {
            "do_sample": (None, False),
            "temperature": (None, 1.0),
            "top_k": (None, 0),
            "top_p": (None, 1.0),
            "min_p": (None, 0.0),
            "top_h": (None,),
            "typical_p": (None, 1.0),
            "epsilon_cutoff": (None, 0.0),
            "eta_cutoff": (None, 0.0),
        }.items()
    },
    **{
        name: (values, _NO_BEAMS)
        for name, values in {
            "num_beams": (None, 1),
            "num_beam_groups": (None, 1),
            "diversity_penalty": (None, 0.0),
            "length_penalty": (None, 1.0),
            "early_stopping": (None, False),
            "constraints": (None,),
            "force_words_ids": (None,),
        }.items()
    },
    **{
        name: (values, _NO_OTHER_DECODING)
        for name, values in {
            "guidance_scale": (None, 1),
            "penalty_alpha": (None,),
            "low_memory": (None, False),
            "dola_layers": (None,),
            "token_healing": (None, False),
            # The states of a prompt must come in one piece.
            "prefill_chunk_size": (None,),
        }.items()
    },
    **{
        name: (values, _NO_DRAFTS)
        for name, values in {
            "use_mtp": (None, False),
            "is_assistant": (None, False),
            "num_assistant_tokens": (None, 20),
            "num_assistant_tokens_schedule": (None, "constant"),
            "assistant_confidence_threshold": (None, 0.4),
            "assistant_lookbehind": (None, 10),
            "target_lookbehind": (None, 10),
            "assistant_ensemble_weight": (None,),
            "assistant_early_exit": (None,),
            "prompt_lookup_num_tokens": (None,),
            "max_matching_ngram_size": (None,),
            "speculation_type": (None,),
        }.items()
    },
}

# What can be asked for, and is not taken from the defaults of a checkpoint: the values that ask for nothing. Learning,
# scoring and search read the most likely token of a code. These would give another one, or end a text elsewhere.
EXPLICIT_SETTINGS: dict[str, tuple[Any, ...]] = {
    "repetition_penalty": (None, 1.0),
    "encoder_repetition_penalty": (None, 1.0),
    "no_repeat_ngram_size": (None, 0),
    "encoder_no_repeat_ngram_size": (None, 0),
    "bad_words_ids": (None,),
    "sequence_bias": (None,),
    "suppress_tokens": (None, []),
    "begin_suppress_tokens": (None, []),
    "forced_bos_token_id": (None,),
    "forced_eos_token_id": (None,),
    "exponential_decay_length_penalty": (None,),
    "watermarking_config": (None,),
    # It would hide what is not finite.
    "remove_invalid_values": (None, False),
    # Both forbid the end of the text.
    "min_length": (None, 0),
    "min_new_tokens": (None, 0),
    # They need the tokenizer as an argument.
    "stop_strings": (None, []),
    # How many answers are wanted is for the caller to say.
    "num_return_sequences": (None, 1),
}


def settled_config(
    explicit: GenerationConfig | None, checkpoint: GenerationConfig, kwargs: Mapping[str, Any]
) -> tuple[GenerationConfig, dict[str, Any], int]:
    """
    The settings in force, what of `kwargs` is none, and the number of samples a prompt.

    What is passed counts or is refused. Of the checkpoint's own defaults those of lengths, special tokens, caches and
    outputs count; the others are left out with one warning.

    Args:
        explicit (`GenerationConfig`, *optional*): What was passed to `generate`; it is not changed.
        checkpoint (`GenerationConfig`): The model's own.
        kwargs (`Mapping[str, Any]`): Passed to `generate`; they count before `explicit`.

    Raises:
        ValueError: For passed settings of `REFUSED_SETTINGS`.
    """
    config = GenerationConfig() if explicit is None else copy.deepcopy(explicit)
    # transformers refuses several greedy texts, to which they would all be the same.
    copies = kwargs.get("num_return_sequences") or config.num_return_sequences
    config.num_return_sequences = None
    others = config.update(**{name: value for name, value in kwargs.items() if name != "num_return_sequences"})
    _refuse(config.to_dict())
    defaults, dropped = checkpoint.to_dict(), {}
    neutral = {name: values for name, (values, _) in REFUSED_SETTINGS.items()} | EXPLICIT_SETTINGS
    for name, values in neutral.items():
        value = defaults.pop(name, None)
        given = copies if name == "num_return_sequences" else getattr(config, name, None)
        if value not in values and given is None:
            dropped[name] = value
    # transformers would let a default of the one limit count before, or complain of it beside, a passed other one.
    for passed, other in (("max_length", "max_new_tokens"), ("max_new_tokens", "max_length")):
        if getattr(config, passed) is not None:
            defaults.pop(other, None)
    if dropped:
        listed = ", ".join(f"{name}={value!r}" for name, value in dropped.items())
        logger.warning_once(
            f"Of the generation config of the backbone's checkpoint these are not used: {listed}. Over latent actions "
            "the token of a code is the most likely one, as it was in learning. What you pass to `generate` counts."
        )
    config.update(**defaults, defaults_only=True, allow_custom_entries=True)
    config.do_sample = False
    return config, others, copies or 1


@contextmanager
def without_own_defaults(backbone: PreTrainedModel) -> Iterator[None]:
    """Inside the block `backbone.generate` fills in nothing of its own `generation_config`: all has been settled."""
    own, backbone.generation_config = backbone.generation_config, GenerationConfig()
    try:
        yield
    finally:
        backbone.generation_config = own


# Settings that a trainer counts by, and its own names for them.
TRAINER_FIELDS = {
    "num_return_sequences": "num_generations",
    "max_new_tokens": "max_completion_length",
    "max_length": "max_completion_length",
}


def _refuse(settings: Mapping[str, Any], argument: str | None = None) -> None:
    for name, (values, why) in REFUSED_SETTINGS.items():
        value = settings.get(name)
        if value not in values:
            place = f" in `{argument}`" if argument else ""
            raise ValueError(f"`{name}={value!r}`{place} {why}.")


def check_generation_kwargs(settings: Mapping[str, Any] | None, argument: str = "generation_kwargs") -> None:
    """
    Checks what a user passes on to the `generate` of a rollout: each setting is honoured there, or refused here.

    Args:
        settings (`Mapping[str, Any]`, *optional*): Fields of `GenerationConfig`.
        argument (`str`, defaults to `"generation_kwargs"`): What they were passed as, for the message.

    Raises:
        ValueError: For what cannot be had over codes, what a trainer's configuration has a field for, and what
            `GenerationConfig` does not know.
    """
    settings = settings or {}
    _refuse(settings, argument)
    known = vars(GenerationConfig())
    for name, value in settings.items():
        if name in ACTION_DEFAULTS or name == "cuda_graphs":
            raise ValueError(f"`{name}={value!r}` in `{argument}`: set the trainer's own field instead.")
        if name in TRAINER_FIELDS:
            raise ValueError(f"`{name}={value!r}` in `{argument}`: set `{TRAINER_FIELDS[name]}` instead.")
        if name not in known:
            raise ValueError(f"`{name}={value!r}` in `{argument}` is no setting of transformers' `GenerationConfig`.")


def settled_choice(config: GenerationConfig, given: Mapping[str, Any]) -> dict[str, Any]:
    """
    The settings of `ACTION_DEFAULTS`: what is given, else what `config` has, else the default.

    Raises:
        ValueError: For a way of sampling that is none.
    """
    settings: dict[str, Any] = {}
    for name, default in ACTION_DEFAULTS.items():
        value = getattr(config, name, None) if given[name] is None else given[name]
        settings[name] = default if value is None else value
    if settings["action_sampling"] not in ACTION_SAMPLING:
        raise ValueError(
            f"`action_sampling` must be one of {list(ACTION_SAMPLING)}, got {settings['action_sampling']!r}."
        )
    return settings
