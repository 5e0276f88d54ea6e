"""Several rewards as one, undefined wherever one of them is."""

import asyncio
import inspect
from collections.abc import Callable, Sequence
from typing import Any

from .calling import reward_name


class WeightedSumReward:
    r"""
    Weighted sum of rewards that is `None` wherever one of them is: \\( R = \sum_i w_i R_i \\).

    Where TRL adds up several reward functions, one that returned `None` counts as 0 as long as another returned a
    number: a failed judge beside a length penalty would look like the worst of answers. Added up here, the row is left
    out instead.

    Args:
        reward_funcs (`Sequence[Callable]`):
            Reward functions, sync or async; the async ones run side by side.
        weights (`Sequence[float]`, *optional*):
            A weight for each. Defaults to 1 each.
        name (`str`, *optional*, defaults to `"weighted_sum"`):
            Name of the reward in the metrics. The mean of each part is logged as `{name}/{part}`.

    Example:

    ```python
    reward = WeightedSumReward([JudgeReward("a-judge"), RepetitionPenalty()], weights=[1.0, 0.1])
    ```
    """

    def __init__(
        self,
        reward_funcs: Sequence[Callable],
        weights: Sequence[float] | None = None,
        name: str = "weighted_sum",
    ):
        if not reward_funcs:
            raise ValueError("`reward_funcs` is empty: give at least one reward function.")
        if weights is not None and len(weights) != len(reward_funcs):
            raise ValueError(f"`weights` must be as many as `reward_funcs`, {len(reward_funcs)}; got {len(weights)}.")
        self.__name__ = name
        self.reward_funcs = list(reward_funcs)
        self.weights = [1.0] * len(reward_funcs) if weights is None else list(weights)

    async def __call__(
        self, prompts: list, completions: list, log_metric: Callable | None = None, **columns
    ) -> list[float | None]:
        """
        Args:
            prompts (`list`): Prompts of the batch.
            completions (`list`): Completions of the batch.
            log_metric (`Callable`, *optional*): TRL's; also handed on to the parts.
            **columns: Further columns, handed on.

        Returns:
            `list[float | None]`: Weighted sums.
        """
        arguments = {"prompts": prompts, "completions": completions, "log_metric": log_metric, **columns}
        parts = await asyncio.gather(*(_call(func, arguments) for func in self.reward_funcs))
        for func, part in zip(self.reward_funcs, parts, strict=True):
            if len(part) != len(completions):
                raise ValueError(
                    f"{reward_name(func)!r} returned {len(part)} rewards for {len(completions)} completions."
                )
            scored = [reward for reward in part if reward is not None]
            if log_metric is not None and scored:
                log_metric(f"{self.__name__}/{reward_name(func)}", sum(scored) / len(scored))
        return [self._sum(row) for row in zip(*parts, strict=True)]

    def _sum(self, rewards: tuple[float | None, ...]) -> float | None:
        said = [reward for reward in rewards if reward is not None]
        if len(said) < len(rewards):
            return None
        return sum(weight * reward for weight, reward in zip(self.weights, said, strict=True))


async def _call(func: Callable, arguments: dict[str, Any]) -> list[float | None]:
    rewards = func(**arguments)
    return await rewards if inspect.isawaitable(rewards) else rewards
