"""More plans in a run of RL: learned from alternatives of the plans that are chosen, while the others stay."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from .processes import process
from .replay import place_of
from .space_config import PlanSpaceConfig
from .space_trainer import PlanSpaceTrainer

# Prompts from which plans that are added are learned.
PROMPTS = 300


def check_growth(args: Any, plans: int, space_args: PlanSpaceConfig | None) -> None:
    """Raises `ValueError` for growth that a run of RL over so many plans cannot have."""
    if args.grow_plans and args.grow_plans + plans > args.max_plans:
        raise ValueError(
            f"`grow_plans={args.grow_plans}` could add nothing to {plans} plans with `max_plans={args.max_plans}`. "
            "Raise it."
        )
    if args.grow_plans and process()[1] > 1:
        raise ValueError(
            f"`grow_plans={args.grow_plans}` changes what is trained, which DDP cannot follow: grow plans in one "
            "process, or by hand between runs (`add_plans`, `PlanSpaceConfig(new_plans=...)`)."
        )
    if args.grow_plans and args.load_best_model_at_end:
        raise ValueError(
            "`load_best_model_at_end` could load a model from before plans were added. Leave one of them out."
        )
    if space_args is not None and not args.grow_plans:
        raise ValueError("`space_args` is not read without `grow_plans`. Set it, or leave `space_args` out.")


def add_learned_plans(trainer: Any, count: int) -> None:
    """
    Adds plans to the model of a `PlanRLTrainer`, learns them, and gives the chooser and its optimizer places for them.

    Args:
        trainer (`PlanRLTrainer`): Its `space_args` say how they are learned.
        count (`int`): How many.
    """
    model, args = trainer.model, trainer.args
    before = list(model.chooser.output.parameters())
    model.add_plans(count)
    given = trainer.space_args or PlanSpaceConfig(max_steps=100, max_completion_length=args.max_completion_length)
    own = replace(
        given,
        output_dir=str(Path(args.output_dir) / f"grown_to_{model.plan_config.num_plans}"),
        new_plans=count,
        eval_strategy="no",
        save_strategy="no",
        load_best_model_at_end=False,
        image_root=args.image_root,
        max_prompt_length=args.max_prompt_length,
        use_cpu=args.use_cpu,
        disable_tqdm=args.disable_tqdm,
    )
    order = torch.randperm(len(trainer.rows), generator=trainer.generator(model.plan_config.num_plans, 1))
    rows = [trainer.rows.rows[i] for i in order[:PROMPTS].tolist()]
    with torch.random.fork_rng():
        PlanSpaceTrainer(model, own, rows, processing_class=trainer.encoder.processing_class).train()
    model.requires_grad_(False)
    for module in trainer.learned:
        module.requires_grad_(True)
    model.train()
    widen_optimizer(trainer.optimizer, before, list(model.chooser.output.parameters()))
    if model.plan_config.chooser_reads_plans:
        read_under_plans(trainer)


def read_under_plans(trainer: Any) -> None:
    """Reads the places that a `PlanRLTrainer` keeps in its replay again, under all plans that there are."""
    replay, size = trainer.replay, trainer.args.rollout_batch_size
    names = list(replay.planned)
    for start in range(0, len(names), size):
        some, prompts = names[start : start + size], []
        for name in some:
            number, said = place_of(name)
            prompts.append(trainer.model.continued(trainer.encoder(trainer.rows[number]), said))
        found = trainer.states_of(trainer.encoder.collate(prompts))
        replay.planned |= {name: one.planned for name, one in zip(some, found, strict=True)}


def widen_optimizer(optimizer: torch.optim.Optimizer, before: list[nn.Parameter], after: list[nn.Parameter]) -> None:
    """Puts parameters that have more rows in the place of others; their moments are 0 in the new rows."""
    for old, new in zip(before, after, strict=True):
        for group in optimizer.param_groups:
            group["params"] = [new if parameter is old else parameter for parameter in group["params"]]
        state = optimizer.state.pop(old, {})
        if state:
            optimizer.state[new] = {name: _widened(value, old, new) for name, value in state.items()}


def _widened(value: Any, old: nn.Parameter, new: nn.Parameter) -> Any:
    if not isinstance(value, torch.Tensor) or value.shape != old.shape:
        return value
    return torch.cat([value, value.new_zeros(len(new) - len(old), *value.shape[1:])])
