"""What is refused before a run over codes begins."""

from collections.abc import Sized
from typing import Any

from ..run.loading import check_columns

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


def check_anchor(args: Any, dataset: Any) -> None:
    """Raises `ValueError` where weight and conversations of the anchor do not come together."""
    if args.anchor_coef:
        check_columns(dataset, "anchor_dataset")
    elif dataset is not None:
        raise ValueError(
            "`anchor_dataset` is not read while `anchor_coef` is 0. Set it, 0.1 say, or leave the data out."
        )
