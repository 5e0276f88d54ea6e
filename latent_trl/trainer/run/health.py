"""Trouble in the numbers of a run: found, named with a remedy, and stopped or passed over as the configuration says."""

import math
from typing import Any

import torch
from torch import nn
from transformers.utils import logging

from .manifest import newest_whole_checkpoint

logger = logging.get_logger(__name__)

ON_NONFINITE = ("stop", "skip")
ON_COLLAPSE = ("warn", "stop", "ignore")
# More than the 16 that a gradient scaler may need to come down from its first scale to 1.
MOST_SKIPPED = 20
# Rollout batches in a row whose rewards do not differ.
MOST_CONSTANT = 5
# Below this mean entropy of a choice, in nats, a policy no longer explores.
MIN_ENTROPY = 0.01
# Below this perplexity of the codes that rollouts use, the policy has collapsed to one.
MIN_PERPLEXITY = 1.5
# Mean difference, in nats, between an engine's log-probability of a code and the trainer's; bfloat16 makes some 0.01.
MAX_ENGINE_DIFFERENCE = 0.1


class CollapseError(RuntimeError):
    """A run that no longer learns anything, stopped because of `on_collapse="stop"`."""


def check_choice(name: str, value: str, known: tuple[str, ...]) -> None:
    """Raises `ValueError` unless `value` is among `known`."""
    if value not in known:
        raise ValueError(f"`{name}` must be one of {list(known)}, got {value!r}.")


class RunHealth:
    """
    What has been noticed in a run.

    Args:
        on_nonfinite (`str`): `"stop"`, or `"skip"` the update.
        on_collapse (`str`): `"warn"` once for each kind, `"stop"`, or `"ignore"`.
        output_dir (`str`): Where the checkpoints are that messages speak of.
    """

    def __init__(self, on_nonfinite: str, on_collapse: str, output_dir: str):
        self.on_nonfinite = on_nonfinite
        self.on_collapse = on_collapse
        self.output_dir = output_dir
        self.alarmed: list[str] = []
        self.skipped = self.skipped_in_a_row = self.constant_rewards = 0

    def state(self) -> dict[str, Any]:
        """What changes during a run, as plain JSON values."""
        return {name: getattr(self, name) for name in ("alarmed", "skipped", "skipped_in_a_row", "constant_rewards")}

    def load_state(self, state: dict[str, Any]) -> None:
        """Puts back what [`state`] gave."""
        for name, value in state.items():
            setattr(self, name, value)

    def figures(self) -> dict[str, float]:
        """For the log: updates that were skipped since the last one, when there are any."""
        skipped, self.skipped = self.skipped, 0
        return {"skipped_updates": float(skipped)} if skipped else {}

    def nonfinite(self, what: str, remedy: str) -> None:
        """Stops the run with `FloatingPointError`, or says that the update is skipped."""
        if self.on_nonfinite == "stop":
            raise FloatingPointError(f"{what} Training stops here. {what_is_kept(self.output_dir)} {remedy}")
        logger.warning(f"{what} No parameter is changed by it. {remedy}")

    def skip_update(self, what: str, remedy: str) -> None:
        """Counts an update that is not made. Raises `FloatingPointError` when there are too many in a row."""
        self.skipped += 1
        self.skipped_in_a_row += 1
        if self.skipped_in_a_row >= MOST_SKIPPED:
            raise FloatingPointError(
                f"{what} {MOST_SKIPPED} updates in a row were skipped. {what_is_kept(self.output_dir)} {remedy}"
            )

    def collapse(self, name: str, text: str, step: int) -> None:
        """Warns once of a failure called `name`, or stops the run with [`CollapseError`], as configured."""
        if self.on_collapse == "ignore" or name in self.alarmed:
            return
        message = f"Codebook alarm, {name}: at step {step}, {text}."
        if self.on_collapse == "stop":
            raise CollapseError(f"{message} {what_is_kept(self.output_dir)} Stopped as `on_collapse='stop'` asks.")
        self.alarmed.append(name)
        logger.warning(message)

    def watch_exploration(self, metrics: dict[str, list[float]], step: int) -> None:
        """Names a policy that chooses always the same; `metrics` are the values since the last log, by name."""
        for name, least, kind, text in (
            ("entropy", MIN_ENTROPY, "no exploration", "the policy's choices have an entropy of {:.2g} nats"),
            ("codebook/perplexity", MIN_PERPLEXITY, "collapse", "the codes of rollouts have perplexity {:.2f}"),
        ):
            mean = torch.tensor(metrics.get(name, [])).nanmean().item()
            if mean < least:
                remedy = "Raise `action_temperature`, `entropy_coef` or `beta`, or lower the learning rate"
                self.collapse(kind, f"{text.format(mean)}. {remedy}", step)

    def watch_engine(self, difference: float, step: int) -> None:
        """Names an engine that disagrees with the trainer by `difference`, in nats a code on average."""
        if difference > MAX_ENGINE_DIFFERENCE:
            self.collapse(
                "engine",
                f"the engine's log-probabilities of codes differ from the trainer's by {difference:.2g} nats on "
                "average, so that importance weights carry the update. Use the same precision in both (`bf16`, "
                "float32), or leave `use_vllm` out",
                step,
            )

    def count_rewards(self, rewards: torch.Tensor, all_equal: bool, what: str, step: int) -> None:
        """
        Counts rollout batches that teach nothing.

        Args:
            rewards (`torch.Tensor`): `[N]` over all processes; NaN for completions that were not scored.
            all_equal (`bool`): Whether no two that are compared differ.
            what (`str`): What is compared, for the message.
            step (`int`): Of the optimizer.
        """
        self.constant_rewards = self.constant_rewards + 1 if all_equal else 0
        if self.constant_rewards >= MOST_CONSTANT:
            seen = rewards[~rewards.isnan()]
            value = f"{seen.mean().item():.4g} on average" if len(seen) else "None for all"
            self.collapse(
                "constant reward",
                f"the rewards of {what} have been equal for {self.constant_rewards} rollout batches ({value}), so that "
                "nothing is learned. Either the task is solved, or look at the reward function; raise "
                "`action_temperature`, or take prompts of which some answers are right",
                step,
            )


def is_anywhere(wrong: torch.Tensor) -> bool:
    """Whether the boolean scalar `wrong` is true on any process."""
    flag = wrong.detach().float()
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        # All processes stop together: the others would wait for this one.
        torch.distributed.all_reduce(flag)
    return bool(flag.item())


def loss_trouble(loss: torch.Tensor, model: nn.Module, inputs: dict[str, Any], where: str) -> str | None:
    """What is wrong with a loss on any process, and where it may come from; `None` when it is finite on all."""
    value = loss.detach().float()
    if not is_anywhere(~value.isfinite()):
        return None
    if value.isfinite():
        return f"The loss became infinite or NaN on another process {where}."
    return f"The loss became {value.item()} {where}. {origin(model, inputs)}"


def origin(model: nn.Module, inputs: dict[str, Any]) -> str:
    """The first thing that is not finite: a parameter, a tensor of the batch with its rows, or what is made of them."""
    for name, parameter in model.named_parameters():
        if not parameter.isfinite().all():
            return f"The parameter {name!r} is not finite."
    tensors = {**inputs, **inputs.get("vision", {})}
    for name, tensor in tensors.items():
        if isinstance(tensor, torch.Tensor) and tensor.is_floating_point() and not tensor.isfinite().all():
            rows = (~tensor.flatten(1).isfinite()).any(dim=1).nonzero().flatten().tolist() if tensor.ndim > 1 else []
            return f"In the batch, {name.replace('_', ' ')} are not finite" + (f" in rows {rows[:8]}." if rows else ".")
    return "The parameters and the batch are finite, so a value in between overflowed."


def remedy(model: nn.Module, half: bool) -> str:
    """What to try when numbers are not finite."""
    if half or any(p.dtype == torch.float16 for p in model.parameters()):
        return "float16 overflows beyond 65504: use `bf16=True`, or load the backbone in bfloat16 or float32."
    return "Lower the learning rate, set `max_grad_norm`, or look at the batch named."


def is_finite(norm: Any) -> bool:
    """Whether a gradient's norm is finite; one that nobody measured counts as such."""
    return norm is None or math.isfinite(float(norm))


def what_is_kept(output_dir: str) -> str:
    """A sentence on the last whole checkpoint."""
    last = newest_whole_checkpoint(output_dir)
    if last is None:
        return f"No checkpoint was written to {output_dir!r} before it."
    return f"The last checkpoint, {last!r}, is whole."
