"""What a request to an engine says of its codes, and what of vLLM's own settings is refused."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from vllm import SamplingParams

from ..generation.action_law import ActionLaw

_TOKENS = (
    "would choose among tokens, which are the most likely ones given their codes. Use `action_temperature`, "
    "`action_top_k`, `action_top_p` and `action_do_sample` in `extra_args`"
)
_ON_TOKENS = "would change which token a code says. Leave it out, or bias codes with `action_bias` in `extra_args`"
# Fields of vLLM's `SamplingParams` that cannot be had over codes: the values that ask for nothing, and why.
REFUSED_PARAMS: dict[str, tuple[tuple[Any, ...], str]] = {
    "temperature": ((1.0,), _TOKENS),
    "top_k": ((0, -1), _TOKENS),
    "top_p": ((1.0,), _TOKENS),
    "min_p": ((0.0,), _TOKENS),
    "seed": ((None,), "is of a generator of tokens. Use `action_seed` in `extra_args`"),
    "presence_penalty": ((0.0,), _ON_TOKENS),
    "frequency_penalty": ((0.0,), _ON_TOKENS),
    "repetition_penalty": ((1.0,), _ON_TOKENS),
    "bad_words": ((None, []), _ON_TOKENS),
    "logit_bias": ((None, {}), _ON_TOKENS),
    "allowed_token_ids": ((None,), _ON_TOKENS),
    "structured_outputs": ((None,), "constrains tokens, and codes know no grammar. Leave it out"),
    "prompt_logprobs": ((None,), "asks for codes of a prompt, for which none were chosen. Leave it out"),
    "thinking_token_budget": ((None,), "forces tokens that no code said. Leave it out"),
}
ARGUMENTS = (
    "action_do_sample",
    "action_temperature",
    "action_top_k",
    "action_top_p",
    "action_seed",
    "action_bias",
    "forced_action_ids",
    "action_group",
)


@dataclass(frozen=True)
class ActionGroup:
    """
    A row's place among the samples of a prompt that are drawn together, see
    [`~latent_trl.generation.arithmetic_sampling.ArithmeticSampler`].

    Args:
        seed (`int`): The same for all of the group, and for no other group at the time.
        size (`int`): Samples of the group.
        point (`float`): The row's own, in [0, 1).
    """

    seed: int
    size: int
    point: float


@dataclass(frozen=True)
class ActionSettings:
    """
    How a request's codes are chosen; the fields are arguments of [`LatentActionModel.generate`].

    Args:
        do_sample (`bool`, defaults to `True`): Sample, or take the most likely token.
        law (`ActionLaw`): To sample from; the policy's own where it takes the most likely.
        seed (`int`, *optional*): Of the sampling; what a step draws is a function of it and the step.
        bias (`tuple[float]` or `dict[int, float]`, *optional*): One a code, or of some codes; `-inf` bans one.
        forced (`tuple[int]`): Codes of the first steps; -1 leaves a step free.
        group (`ActionGroup`, *optional*): For `action_sampling="arithmetic"`.
    """

    do_sample: bool = True
    law: ActionLaw = field(default_factory=ActionLaw)
    seed: int | None = None
    bias: Any = None
    forced: tuple[int, ...] = ()
    group: ActionGroup | None = None

    @classmethod
    def of(cls, extra_args: Mapping[str, Any] | None) -> "ActionSettings":
        """
        Those in `extra_args` of a request's `SamplingParams`.

        Raises:
            ValueError: For an argument that is none, or a value that cannot be used.
        """
        given = dict(extra_args or {})
        unknown = sorted(set(given) - set(ARGUMENTS))
        if unknown:
            raise ValueError(f"`extra_args` has {unknown}, and over latent actions it takes {list(ARGUMENTS)}.")
        law = {
            name.removeprefix("action_"): _number(name, given[name], whole=name == "action_top_k")
            for name in ("action_temperature", "action_top_k", "action_top_p")
            if given.get(name) is not None
        }
        do_sample = given.get("action_do_sample")
        if do_sample not in (None, True, False):
            raise ValueError(f"`action_do_sample` must be true or false, got {do_sample!r}.")
        sampled_from, group = ActionLaw(**law), given.get("action_group")
        return cls(
            do_sample=do_sample is not False,
            law=ActionLaw() if do_sample is False else sampled_from,
            seed=None if given.get("action_seed") is None else _number("action_seed", given["action_seed"], whole=True),
            bias=_bias(given.get("action_bias")),
            forced=_forced(given.get("forced_action_ids")),
            group=None if group is None else _group(group),
        )

    def check_codes(self, num_codes: int) -> None:
        """Raises `ValueError` for codes that are none."""
        self.bias_tensor(num_codes)
        if self.forced and max(self.forced) >= num_codes:
            raise ValueError(f"`forced_action_ids` must be in -1 ... {num_codes - 1}, got {max(self.forced)}.")

    def bias_tensor(self, num_codes: int) -> torch.Tensor | None:
        """`[K]`, added to the logits."""
        if self.bias is None:
            return None
        if isinstance(self.bias, dict):
            wrong = [code for code in self.bias if not 0 <= code < num_codes]
            if wrong:
                raise ValueError(f"`action_bias` has the codes {wrong}; there are 0 ... {num_codes - 1}.")
            tensor = torch.zeros(num_codes)
            for code, value in self.bias.items():
                tensor[code] = value
        elif len(self.bias) != num_codes:
            raise ValueError(f"`action_bias` must have one number for each of {num_codes} codes, got {len(self.bias)}.")
        else:
            tensor = torch.tensor(self.bias, dtype=torch.float32)
        if tensor.isneginf().all():
            raise ValueError("`action_bias` must leave at least one code.")
        return tensor


def _number(name: str, value: Any, whole: bool = False) -> Any:
    if isinstance(value, bool) or not isinstance(value, int if whole else int | float):
        raise ValueError(f"`{name}` must be {'an integer' if whole else 'a number'}, got {value!r}.")
    return value


def _bias(given: Any) -> Any:
    if given is None:
        return None
    try:
        if isinstance(given, Mapping):
            bias: Any = {int(code): float(value) for code, value in given.items()}
        else:
            bias = tuple(float(value) for value in given)
    except (TypeError, ValueError) as error:
        raise ValueError(f"`action_bias` must be numbers, or numbers by code, got {given!r:.80}.") from error
    if any(math.isnan(v) or v == math.inf for v in (bias.values() if isinstance(bias, dict) else bias)):
        raise ValueError("`action_bias` must be finite or -inf.")
    return bias


def _forced(given: Any) -> tuple[int, ...]:
    if given is None:
        return ()
    if not isinstance(given, list | tuple) or not all(isinstance(v, int) and not isinstance(v, bool) for v in given):
        raise ValueError(f"`forced_action_ids` must be a list of integers, got {given!r:.80}.")
    if given and min(given) < -1:
        raise ValueError(f"`forced_action_ids` must be codes, or -1 for a free step, got {min(given)}.")
    return tuple(given)


def _group(given: Any) -> ActionGroup:
    if not isinstance(given, Mapping) or set(given) != {"seed", "size", "point"}:
        raise ValueError(f"`action_group` must have `seed`, `size` and `point`, got {given!r:.80}.")
    seed, size = (_number(f"action_group[{name!r}]", given[name], whole=True) for name in ("seed", "size"))
    point = float(_number("action_group['point']", given["point"]))
    if size < 1 or not 0 <= point < 1:
        raise ValueError(f"`action_group` must have a positive `size` and a `point` in [0, 1), got {size} and {point}.")
    return ActionGroup(seed, size, point)


def check_sampling_params(params: SamplingParams, num_codes: int) -> None:
    """
    Checks a request to an engine of `num_codes` codes.

    Raises:
        ValueError: For what cannot be had over codes, by its name.
    """
    for name, (values, why) in REFUSED_PARAMS.items():
        value = getattr(params, name)
        if value not in values:
            raise ValueError(f"`{name}={value!r}` {why}.")
    settings = ActionSettings.of(params.extra_args)
    settings.check_codes(num_codes)
