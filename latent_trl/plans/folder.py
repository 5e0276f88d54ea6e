"""What a folder of plans holds: read, and compared with a backbone, before anything is made for it or changed."""

from dataclasses import dataclass
from pathlib import Path

import torch

from ..checkpoint.files import ADAPTER_FOLDER, CheckpointError, check_range, check_weights, has_folder, read_weights
from ..checkpoint.plan_files import ADAPTER_WEIGHTS, CHOOSER_FILE, PLAN_CONFIG, plan_folder, plan_folders
from ..models.backbone import Backbone
from ..models.component import check_shapes
from .adapters import plan_shapes, read_plan
from .chooser import PlanChooser
from .configuration import PlanConfig
from .targets import features, plan_targets


@dataclass
class PlanTensors:
    """
    Args:
        plans (`list[dict[str, torch.Tensor]]`): Tensors of each plan, by their names in its file.
        chooser (`dict[str, torch.Tensor]`, *optional*): Of the chooser, where it was trained.
    """

    plans: list[dict[str, torch.Tensor]]
    chooser: dict[str, torch.Tensor] | None


def check_backbone(folder: Path, config: PlanConfig, view: Backbone) -> None:
    """Raises [`CheckpointError`] when the plans were learned on another backbone, as far as it can be told."""
    if not view.fits([config.backbone_fingerprint]):
        raise CheckpointError(
            f"The plans in {folder} were learned on another backbone ({config.base_model_name_or_path}): its "
            "tensors differ from this one's. Load that backbone, or learn plans on this one."
        )


def check_plan_folder(folder: Path, plan: int) -> Path:
    """The folder of a plan. Raises [`CheckpointError`] when it is missing, or a link out of the plans' folder."""
    if not has_folder(folder, plan_folder(plan)):
        raise CheckpointError(f"{plan_folder(plan)} is missing from {folder}.")
    return folder / plan_folder(plan)


def stacked_plans(folder: Path, config: PlanConfig) -> dict[str, torch.Tensor]:
    """
    The tensors of all plans of a folder `[K, ...]`, without a backbone to compare them with.

    Args:
        folder (`Path`): The folder.
        config (`PlanConfig`): Of it.

    Raises:
        CheckpointError: When a file is missing or damaged, or plans differ in their shapes.
    """
    folders = [check_plan_folder(folder, plan) for plan in range(config.num_plans)]
    shapes = check_weights(folders[0] / ADAPTER_WEIGHTS)
    plans = [read_plan(one, shapes, config.rank) for one in folders]
    return {name: torch.stack([plan[name] for plan in plans]) for name in shapes}


def read_plans(
    folder: Path, config: PlanConfig, view: Backbone, shapes: dict[str, tuple[int, ...]] | None = None
) -> PlanTensors:
    """
    The tensors of a folder.

    Args:
        folder (`Path`): The folder.
        config (`PlanConfig`): What they must fit.
        view (`Backbone`): The backbone.
        shapes (`dict`, *optional*): Of a plan's tensors; by default those of `config` on this backbone.

    Raises:
        CheckpointError: When a file is missing or damaged, or does not fit.
    """
    if shapes is None:
        depth = view.text_config.num_hidden_layers // 2 if config.depth is None else config.depth
        try:
            targets = plan_targets(view, depth, config.target_modules)
        except ValueError as error:
            raise CheckpointError(f"{folder} does not fit the backbone: {error}") from error
        sizes = [features(view.model.get_submodule(name)) for name in targets]
        shapes = plan_shapes(targets, sizes, config.rank)
    if not config.has_adapter and has_folder(folder, ADAPTER_FOLDER):
        raise CheckpointError(f"{folder} has a folder {ADAPTER_FOLDER!r} of which its record does not speak.")
    more = sorted(set(plan_folders(folder)) - {plan_folder(plan) for plan in range(config.num_plans)})
    if more:
        raise CheckpointError(
            f"{folder} has {config.num_plans} plans by its {PLAN_CONFIG}, and the folders {more} besides, which would "
            "be left out. Remove them, or restore the record that they belong to."
        )
    folders = [check_plan_folder(folder, plan) for plan in range(config.num_plans)]
    plans = [read_plan(one, shapes, config.rank) for one in folders]
    path = folder / CHOOSER_FILE
    # A pipe or a broken link in its place is no absence.
    if not (path.exists() or path.is_symlink()):
        return PlanTensors(plans, None)
    with torch.device("meta"):
        planned = PlanChooser.of(view, config)
    check_shapes(planned, check_weights(path), str(path))
    chooser = read_weights(path)
    check_range(chooser, dict.fromkeys(chooser, torch.float32), path)
    return PlanTensors(plans, chooser)
