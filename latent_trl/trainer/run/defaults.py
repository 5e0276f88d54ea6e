"""Defaults that depend on the size of what is trained, on the machine, or on the release of transformers."""

import warnings
from dataclasses import fields
from typing import Any

import torch
from transformers.utils import logging

logger = logging.get_logger(__name__)

# The width at which rates are the sources', and the least that the rule was measured at.
LARGE, SMALL = 2048, 192


def rate_by_width(large: float, width: int, exponent: float) -> float:
    """
    A learning rate, to two digits: `large` at a width of 2048 and above, and larger for a narrower decoder, as a power
    of the ratio, down to a width of 192.

    Args:
        large (`float`): The rate at a width of 2048 and above.
        width (`int`): `hidden_size` of what is trained.
        exponent (`float`): Of the ratio.
    """
    return float(f"{large * (LARGE / min(max(width, SMALL), LARGE)) ** exponent:.1e}")


def settle_rate(args: Any, name: str, large: float, width: int, exponent: float) -> None:
    """Sets the field `name` of `args`, where it is `None`, to [`rate_by_width`], and says so."""
    if getattr(args, name) is None:
        setattr(args, name, rate_by_width(large, width, exponent))
        logger.warning(f"`{name}={getattr(args, name):g}`, by the width of what is trained, {width}.")


def settle_arguments(args: Any) -> None:
    """Called by configurations before `TrainingArguments` looks at them: spares users its warnings of our defaults."""
    if not torch.accelerator.is_available():
        # There is nothing to copy pinned memory to.
        args.dataloader_pin_memory = False
    if "activation_checkpointing" in {field.name for field in fields(args)} and args.activation_checkpointing is None:
        # The name since transformers 5.23.
        args.activation_checkpointing = args.gradient_checkpointing
    # TRL asks for it by its old name at each rollout, and PEFT at each adapter.
    warnings.filterwarnings("ignore", "`is_gradient_checkpointing` is deprecated", FutureWarning)
