"""The rewards of a rollout: called once for all samples, with what they log, and shaped."""

from collections import defaultdict
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import gather, gather_object

from ...rewards.calling import RewardCaller, RewardError
from ...rewards.conversation import IMAGE_COLUMNS
from ...rewards.shaping import SoftOverlongPunishment
from ..run.hub import describe_data
from .prompts import reward_prompts
from .rollout import Sample


class RolloutRewards:
    """
    Rewards of samples over all processes.

    Args:
        caller (`RewardCaller`): The functions.
        accelerator (`Accelerator`): Of the trainer.
        shaping (`tuple[str]`): Names of functions that shape a reward, and alone do not make one.
        removed (`list[str]`): Columns of the data set that `remove_unused_columns` keeps from the functions.
    """

    def __init__(
        self,
        caller: RewardCaller,
        accelerator: Accelerator,
        shaping: tuple[str, ...] = (),
        removed: list[str] | tuple[str, ...] = (),
    ):
        self.caller = caller
        self.accelerator = accelerator
        self.shaping = shaping
        self.removed = removed
        self._metrics: dict[str, list[float]] = defaultdict(list)

    @classmethod
    def of(cls, trainer: Any) -> "RolloutRewards":
        """The reward functions of a `GRPOTrainer`, with DAPO's punishment of long answers as one more of weight 1."""
        args = trainer.args
        shaping: tuple[str, ...] = ()
        if args.overlong_buffer:
            punishment = SoftOverlongPunishment(trainer.max_completion_length, args.overlong_buffer)
            trainer.reward_funcs.append(punishment)
            trainer.reward_func_names.append(punishment.__name__)
            trainer.reward_processing_classes.append(None)
            trainer.reward_weights = torch.cat([trainer.reward_weights, torch.ones(1)])
            shaping = (punishment.__name__,)
        caller = RewardCaller(
            trainer.reward_funcs,
            trainer.reward_func_names,
            trainer.reward_processing_classes,
            args.chat_template_kwargs,
            args.on_nonfinite,
            trainer.accelerator.device,
            args.reward_timeout,
            "reward_timeout",
        )
        removed = set(describe_data(trainer.train_dataset).get("columns", ())) - {"prompt", *IMAGE_COLUMNS}
        return cls(caller, trainer.accelerator, shaping, sorted(removed) if args.remove_unused_columns else ())

    def __call__(self, samples: list[Sample], trainer_state: Any) -> torch.Tensor:
        """
        Calls the functions, and gives each sample what they logged of it.

        Returns:
            `[N, functions]` over all processes: NaN where a function could not score.
        """
        extra: dict[str, list[Any]] = {}
        local = self.caller(
            [sample.row for sample in samples],
            reward_prompts([sample.row for sample in samples]),
            [sample.completion for sample in samples],
            [sample.completion_ids for sample in samples],
            trainer_state=trainer_state,
            log_extra=lambda column, values: extra.setdefault(column, []).extend(values),
            log_metric=lambda name, value: self._metrics[name].append(value),
        )
        rewards = gather(local)
        try:
            self.caller.raise_any(rewards)
        except RewardError as error:
            if not self.removed:
                raise
            raise RewardError(
                f"{error} It could not see the columns {self.removed}: `remove_unused_columns=True` takes them away. "
                "Set it to `False`."
            ) from error
        for column, values in extra.items():
            if len(values) != len(samples):
                raise RewardError(
                    f"`log_extra({column!r}, ...)` was given {len(values)} values for {len(samples)} completions. Give "
                    "one for each."
                )
            for sample, value in zip(samples, values, strict=True):
                sample.extra[column] = value
        shapes = [name in self.shaping for name in self.caller.names]
        if any(shapes):
            shapes = torch.tensor(shapes, device=rewards.device)
            unscored = rewards[:, ~shapes].isnan().all(dim=1)
            rewards[unscored[:, None] & shapes] = torch.nan
        return rewards

    def logged_metrics(self) -> dict[str, float]:
        """Means of what the functions gave to `log_metric` since the last call, over all processes."""
        means = {}
        # Names in one order on all processes, which exchange them one after another.
        for name in sorted(set(gather_object(list(self._metrics)))):
            values = self._metrics.get(name, [])
            stats = torch.tensor([float(sum(values)), float(len(values))], device=self.accelerator.device)
            total, count = self.accelerator.reduce(stats, "sum").tolist()
            means[name] = total / count
        self._metrics.clear()
        return means
