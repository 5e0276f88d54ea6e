"""Folders of plans: writing and reading them, and the Hub."""

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from transformers import PreTrainedModel

from ..checkpoint.atomic_folder import atomic_folder
from ..checkpoint.files import (
    ADAPTER_FOLDER,
    PROCESSOR_RECORDS,
    REPORT_FILE,
    CheckpointError,
    read_json,
    read_weights,
    resolve_folder,
)
from ..checkpoint.plan_files import CHOOSER_FILE, PLAN_CONFIG, PLAN_PATTERNS, plan_folder, plan_folders
from ..hub.push import push_model
from ..models.checkpoint import load_backbone
from ..models.component import load_state
from .base_adapter import with_saved_adapter
from .configuration import PlanConfig


class PlanCheckpointMixin:
    """`save_pretrained`, `from_pretrained` and `push_to_hub` of a model of plans."""

    plan_config: PlanConfig

    def save_pretrained(self, folder: str | Path, is_main_process: bool = True) -> None:
        """
        Writes the record, one folder in PEFT's format for each plan, the chooser if it has been trained, and the LoRA
        that the backbone carries, if it carries one. The backbone is named, not copied.

        Args:
            folder (`str` or `Path`): What is in it is replaced in one step, other files stay.
            is_main_process (`bool`, defaults to `True`): Only this process writes.
        """
        if not is_main_process:
            return
        folder, config = Path(folder), self.plan_config
        earlier = plan_folders(folder) if folder.is_dir() else []
        with atomic_folder(folder, {CHOOSER_FILE, REPORT_FILE, ADAPTER_FOLDER, *earlier}) as staging:
            config.save(staging)
            for plan in range(config.num_plans):
                self.plans.save_plan(plan, staging / plan_folder(plan), config.base_model_name_or_path)
            if self.chooser_is_trained:
                tensors = {name: tensor.cpu().contiguous() for name, tensor in self.chooser.state_dict().items()}
                save_file(tensors, staging / CHOOSER_FILE, metadata={"format": "pt"})
            if self.base_adapter is not None:
                self.base_adapter.save(staging, config.base_model_name_or_path)
            if self.training_report:
                report = json.dumps(self.training_report, indent=1) + "\n"
                (staging / REPORT_FILE).write_text(report, encoding="utf-8")

    def load_folder(self, folder: str | Path) -> None:
        """
        Copies plans and chooser of a folder into this model.

        Raises:
            CheckpointError: When they do not fit it, or were made for another backbone. It is then as it was.
        """
        folder = Path(folder)
        record = PlanConfig.load(folder)
        if not self.view.fits([record.backbone_fingerprint]):
            raise CheckpointError(
                f"The plans in {folder} were learned on another backbone ({record.base_model_name_or_path}): its "
                "tensors differ from this one's. Load that backbone, or learn plans on this one."
            )
        if record.num_plans != self.plan_config.num_plans:
            raise CheckpointError(f"{folder} has {record.num_plans} plans, this model {self.plan_config.num_plans}.")
        more = sorted(set(plan_folders(folder)) - {plan_folder(plan) for plan in range(record.num_plans)})
        if more:
            raise CheckpointError(
                f"{folder} has {record.num_plans} plans by its {PLAN_CONFIG}, and the folders {more} besides, which "
                "would be left out. Remove them, or restore the record that they belong to."
            )
        if record.has_adapter != (self.base_adapter is not None):
            own, other = ("with", "without") if record.has_adapter else ("without", "with")
            raise CheckpointError(f"{folder} has plans of a backbone {own} a LoRA, and this model is {other} one.")
        if self.base_adapter is not None:
            self.base_adapter.check_same(folder)
        numbers = range(self.plan_config.num_plans)
        plans = [self.plans.read_plan(plan, folder / plan_folder(plan)) for plan in numbers]
        chooser = read_weights(folder / CHOOSER_FILE) if (folder / CHOOSER_FILE).is_file() else None
        if chooser is not None:
            load_state(self.chooser, chooser, str(folder / CHOOSER_FILE))
            self.chooser_is_trained = True
        with torch.no_grad():
            for plan, tensors in zip(numbers, plans, strict=True):
                for parameter, tensor in tensors:
                    parameter[plan].copy_(tensor)

    @classmethod
    def from_pretrained(
        cls, name_or_path: str | Path, backbone: PreTrainedModel | None = None, revision: str | None = None, **kwargs
    ):
        """
        A model from a folder or a Hub id.

        Args:
            name_or_path (`str` or `Path`): Where [`~PlanModel.save_pretrained`] wrote.
            backbone (`PreTrainedModel`, *optional*): The backbone; by default the one that is named there is loaded.
            revision (`str`, *optional*): Of the Hub's repository.
            kwargs: For loading the backbone, such as `dtype`.

        Raises:
            CheckpointError: When files are missing or damaged, or the plans are of another backbone.
        """
        folder = resolve_folder(name_or_path, revision=revision, patterns=PLAN_PATTERNS)
        config = PlanConfig.load(folder)
        report = read_json(folder / REPORT_FILE) if (folder / REPORT_FILE).is_file() else {}
        if backbone is None:
            if not config.base_model_name_or_path:
                raise ValueError("`backbone` must be given: the plans were learned on one that has no name.")
            options = {"revision": config.base_model_revision, **kwargs}
            backbone = load_backbone(config.base_model_name_or_path, **options)
        elif kwargs:
            raise ValueError(f"`backbone` is given, so {sorted(kwargs)} have nothing to apply to.")
        model: Any = cls(with_saved_adapter(backbone, folder) if config.has_adapter else backbone, config)
        model.load_folder(folder)
        model.training_report = report
        if any((folder / name).is_file() for name in PROCESSOR_RECORDS):
            model.processor_folder = folder
        return model

    def push_to_hub(self, repo_id: str, **kwargs: Any):
        """
        Uploads plans and chooser with a card, in one commit.

        Args:
            repo_id (`str`): `"user/name"`.
            kwargs: `private`, `revision`, `create_pr`, `commit_message`, `token`, and `license`, `tags` and `title` of
                the card, as in [`~latent_trl.hub.push.push_model`].

        Returns:
            `huggingface_hub.CommitInfo`.
        """
        return push_model(self, repo_id, **kwargs)
