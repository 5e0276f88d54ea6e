"""Rows of a batch for an engine: how each one's codes are drawn, and its answer."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from ..generation.arithmetic_sampling import even_points
from ..generation.settings import ACTION_DEFAULTS


@dataclass
class EngineText:
    """
    One answer of an engine, up to and including its end.

    Args:
        prompt_ids (`list[int]`): The prompt, with the placeholders of its pictures.
        token_ids (`list[int]`): C tokens.
    """

    prompt_ids: list[int]
    token_ids: list[int]


@dataclass
class EngineAnswer(EngineText):
    """
    One answer of an engine over codes.

    Args:
        prompt_ids (`list[int]`), token_ids (`list[int]`): As in [`EngineText`].
        action_ids (`list[int]`): The codes `[C]` that emitted its tokens.
        log_probs (`list[float]`): Of the codes, in nats, under the law that they were chosen by.
        support (`torch.Tensor`, *optional*): Boolean `[C, K]`, the codes that could be chosen, where asked for.
    """

    action_ids: list[int]
    log_probs: list[float]
    support: torch.Tensor | None = None


def row_settings(
    prompts: int,
    n: int = 1,
    seed: int | None = None,
    action_do_sample: bool = ACTION_DEFAULTS["action_do_sample"],
    action_temperature: float = ACTION_DEFAULTS["action_temperature"],
    action_top_k: int = ACTION_DEFAULTS["action_top_k"],
    action_top_p: float = ACTION_DEFAULTS["action_top_p"],
    action_sampling: str = ACTION_DEFAULTS["action_sampling"],
    action_bias: Any = None,
    forced_action_ids: Sequence[Sequence[int]] | None = None,
) -> list[dict[str, Any]]:
    """
    How the codes of each row are chosen: what is drawn for a row is a function of its settings, whichever rows and
    engines are beside it.

    Args:
        prompts (`int`): How many.
        n (`int`, defaults to `1`): Rows a prompt.
        seed (`int`, *optional*): Of the sampling; rows have seeds that are made of it. Drawn by default.
        action_do_sample, action_temperature, action_top_k, action_top_p, action_sampling, action_bias: As
            [`LatentActionModel.generate`] takes them.
        forced_action_ids (`Sequence[Sequence[int]]`, *optional*): One list a row, prompt by prompt.

    Returns:
        `list[dict[str, Any]]`: `extra_args` of a request, prompt by prompt.
    """
    settings: dict[str, Any] = {"action_do_sample": action_do_sample, "action_temperature": action_temperature}
    settings |= {"action_top_k": action_top_k, "action_top_p": action_top_p}
    if action_bias is not None:
        settings["action_bias"] = torch.as_tensor(action_bias).tolist()
    generator = torch.Generator()
    if seed is None:
        generator.seed()
    else:
        generator.manual_seed(seed)
    seeds = torch.randint(2**62, (prompts * n,), generator=generator).tolist()
    points = None
    if action_sampling == "arithmetic" and n > 1 and action_do_sample:
        points = even_points(prompts, n, generator, "cpu").T.flatten().tolist()
    rows = []
    for row, own_seed in enumerate(seeds):
        own = {**settings, "action_seed": own_seed}
        if points is not None:
            own["action_group"] = {"seed": seeds[row // n * n], "size": n, "point": points[row]}
        if forced_action_ids is not None:
            own["forced_action_ids"] = list(forced_action_ids[row])
        rows.append(own)
    return rows
