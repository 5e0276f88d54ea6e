"""What is refused before a run over codes begins."""

from collections.abc import Sized
from typing import Any

from transformers.utils import logging

from ..run.loading import check_columns

logger = logging.get_logger(__name__)

INSTEAD = "Use reward functions, which see every column of the data set."


def check_arguments(**refused: Any) -> None:
    """Raises `ValueError` for what TRL's trainer takes and codes cannot have."""
    for name, value in refused.items():
        if value:
            raise ValueError(f"`{name}` cannot be used over latent actions. {INSTEAD}")


def check_train_dataset(dataset: Any, args: Any) -> None:
    """Raises `ValueError` for a training set from which no batch could be made as `args` ask for it."""
    sized = isinstance(dataset, Sized)
    if args.dynamic_sampling_rounds and not sized:
        raise ValueError(
            "`dynamic_sampling_rounds` draws prompts at random, which a streamed `train_dataset` cannot give. Load "
            "it without `streaming=True`, or set `dynamic_sampling_rounds=0`."
        )
    prompts = args.generation_batch_size // args.num_generations
    if sized and len(dataset) < prompts:
        raise ValueError(
            f"`train_dataset` has {len(dataset)} prompts, fewer than the {prompts} of one rollout batch "
            f"(`generation_batch_size={args.generation_batch_size}` over `num_generations={args.num_generations}`):"
            " no batch could be made. Lower the batch size, or raise `num_generations`."
        )


def evaluation_samples(args: Any, wanted: int) -> int:
    """Answers of a prompt in evaluation: `wanted`, or one where answers are the most likely, which are all the same."""
    if args.eval_action_do_sample:
        return wanted
    if args.num_generations_eval not in (None, 1):
        logger.warning(
            f"`num_generations_eval={args.num_generations_eval}`: the most likely answers of a prompt are "
            "all the same, and one is made. Set `eval_action_do_sample=True` to sample them."
        )
    return 1


def check_anchor(args: Any, dataset: Any) -> None:
    """Raises `ValueError` where weight and conversations of the anchor do not come together."""
    if args.anchor_coef:
        check_columns(dataset, "anchor_dataset")
    elif dataset is not None:
        raise ValueError(
            "`anchor_dataset` is not read while `anchor_coef` is 0. Set it, 0.1 say, or leave the data out."
        )
