"""Tokens that the settings of `generate` forbid at a step."""

from transformers import GenerationConfig


def forbidden_tokens(config: GenerationConfig, prompt_length: int, step: int) -> list[int]:
    """
    Those that no code says: of `suppress_tokens`, `begin_suppress_tokens`, `bad_words_ids` of one token, and the ends
    of a text that has to go on (`min_new_tokens`, `min_length`).

    Args:
        config (`GenerationConfig`): In force.
        prompt_length (`int`): P, padding included.
        step (`int`): Which token of the completion.
    """
    found = {*(config.suppress_tokens or ()), *(word[0] for word in config.bad_words_ids or () if len(word) == 1)}
    if step == 0:
        found |= {*(config.begin_suppress_tokens or ())}
    if step < max(config.min_new_tokens or 0, (config.min_length or 0) - prompt_length):
        found |= {*end_token_ids(config)}
    return sorted(found)


def end_token_ids(config: GenerationConfig) -> list[int]:
    """The tokens that end a text."""
    ends = config.eos_token_id
    return [] if ends is None else [ends] if isinstance(ends, int) else list(ends)
