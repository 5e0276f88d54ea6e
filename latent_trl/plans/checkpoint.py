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
    resolve_folder,
)
from ..checkpoint.plan_files import CHOOSER_FILE, PLAN_PATTERNS, plan_folder, plan_folders
from ..hub.push import push_model
from ..models.backbone import Backbone
from ..models.checkpoint import load_backbone
from .base_adapter import BaseAdapter, check_adapter, with_saved_adapter
from .configuration import PlanConfig
from .folder import PlanTensors, check_backbone, read_plans


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
        record, own = PlanConfig.load(folder), self.plan_config
        check_backbone(folder, record, self.view)
        if record.num_plans != own.num_plans:
            raise CheckpointError(f"{folder} has {record.num_plans} plans, this model {own.num_plans}.")
        check_adapter(folder, record, self.base_adapter)
        self._take(read_plans(folder, own, self.view, self.plans.shapes))

    @torch.no_grad()
    def _take(self, content: PlanTensors) -> None:
        for plan, tensors in enumerate(content.plans):
            self.plans.load_plan(plan, tensors)
        if content.chooser is not None:
            self.chooser.load_state_dict(content.chooser)
            self.chooser_is_trained = True

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
        # All of it is read and compared before anything is made for it, or put on the backbone.
        carried = BaseAdapter.of(backbone)
        view = Backbone(backbone if carried is None else carried.backbone)
        check_backbone(folder, config, view)
        content = read_plans(folder, config, view)
        if config.has_adapter and carried is None:
            backbone = with_saved_adapter(backbone, folder)
        else:
            check_adapter(folder, config, carried)
        model: Any = cls(backbone, config)
        model._take(content)
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
