"""Trainers and the Hub: the record of a run, the model card, and pushing at the end and on the way."""

import os
import shutil
import tempfile
from collections.abc import Sized
from dataclasses import MISSING, fields
from pathlib import Path
from typing import Any

from datasets import Dataset
from huggingface_hub import CommitInfo, HfApi
from huggingface_hub.utils import filter_repo_objects
from transformers import TrainingArguments
from transformers.trainer_utils import HubStrategy, SaveStrategy
from transformers.utils import PushInProgress, logging

from ...checkpoint.files import CONFIG_FILE, check_token
from ...data.mixing import MixedRows
from ...hub.card import CARD_FILE, PLOT_FILES, write_card
from ...hub.facts import CodebookReport, Evaluation, TrainingReport, TrainingRun
from ...hub.push import push_folder
from ...hub.secrets import check_no_secret
from ...models.latent_action_model import LatentActionModel
from ...plans.model import PlanModel
from .output_folder import PUSH_PREFIX
from .whole_checkpoints import WholeCheckpointMixin

logger = logging.get_logger(__name__)

ALWAYS_SHOWN = ("learning_rate", "per_device_train_batch_size", "gradient_accumulation_steps", "max_steps", "seed")
# Where and how it ran is nobody's business, and tokens least of all.
NEVER_SHOWN = ("_dir", "_token", "_root", "_path", "push_to_hub", "hub_", "report_to", "run_name", "tqdm", "use_cpu")
EVALUATED = ("eval_reward", "eval_loss")
# Of states in a checkpoint.
TENSOR_FILES = ("*.pt", "*.pth", "*.bin", "*.distcp")


def shown_settings(args: TrainingArguments) -> dict[str, Any]:
    """Settings that differ from the defaults, and a few that always count; no paths, no tokens."""
    shown = {}
    for part in fields(args):
        value = getattr(args, part.name)
        default = part.default_factory() if part.default_factory is not MISSING else part.default
        if any(word in part.name for word in NEVER_SHOWN) or not part.init:
            continue
        if isinstance(value, (bool, int, float, str, list, dict)) and (part.name in ALWAYS_SHOWN or value != default):
            shown[part.name] = str(value.value) if hasattr(value, "value") else value
    return shown


def describe_data(dataset: Any) -> dict[str, Any]:
    """Numbers of rows, and columns, of a training data set."""
    paired, text = (dataset.paired, dataset.text) if isinstance(dataset, MixedRows) else (dataset, None)
    described: dict[str, Any] = {}
    if isinstance(paired, Sized):
        described["rows"] = len(paired)
    if text is not None:
        described["text_rows"] = len(text)
    if isinstance(paired, Dataset):
        described["columns"] = paired.column_names
    return described


class HubTrainingMixin(WholeCheckpointMixin):
    """
    `push_to_hub`, `hub_strategy`, `hub_model_id` and the rest, as users of TRL know them, for a trainer whose model is
    a [`LatentActionModel`] or a [`PlanModel`]. What is pushed is the checkpoint format, never a pickle of the training
    arguments.
    """

    _name = "Latent-action training"
    # What trainers of some kinds keep; see `LatentActionSpaceTrainer.history` and `GRPOTrainer._logs`.
    history: list[dict[str, Any]] = []
    reward_func_names: list[str] = []
    _logs: dict[str, Any] = {}
    _earlier_runs: int | None = None
    _data: dict[str, Any] = {}
    _trained: tuple[str, ...] = ()
    # The record without which a folder is no checkpoint, and the metrics that are told of the last evaluation.
    _config_file = CONFIG_FILE
    _evaluated: tuple[str, ...] = EVALUATED

    def train(self, *args, **kwargs):
        output = super().train(*args, **kwargs)
        self.record_run()
        return output

    def record_run(self, evaluation: list[Evaluation] | None = None, codebook: CodebookReport | None = None) -> None:
        """Puts what is known of this run into the model's `training_report`, which its checkpoints carry along."""
        model: LatentActionModel | PlanModel = self.accelerator.unwrap_model(self.model)
        report = TrainingReport.from_dict(model.training_report)
        if self._earlier_runs is None:
            self._earlier_runs = len(report.runs)
        self._trained = tuple(dict.fromkeys([*self._trained, *self._trained_parts(model)]))
        self._data = {**self._data, **describe_data(self.train_dataset)}
        self._keep_data(model)
        run = TrainingRun(
            method=self._name,
            trained=list(self._trained),
            data=self._data,
            hyperparameters=shown_settings(self.args),
            history=list(self.history or self.state.log_history),
            reward_functions=list(self.reward_func_names),
        )
        report.runs = [*report.runs[: self._earlier_runs], run]
        report.codebook = codebook or self._rollout_usage(model) or report.codebook
        for one in [*self._last_evaluation(), *(evaluation or [])]:
            same = (one.dataset, one.split, one.metric)
            report.evaluation = [e for e in report.evaluation if (e.dataset, e.split, e.metric) != same] + [one]
        model.training_report = report.to_dict()

    def _trained_parts(self, model: Any) -> list[str]:
        names = [name for name in model.component_classes if _is_trained(getattr(model, name))]
        if _is_trained(model.backbone):
            names.append("backbone" if model.peft_backbone is None else "adapter")
        return names

    def _keep_data(self, model: Any) -> None:
        model.config.data_description = self._data

    def _rollout_usage(self, model: Any) -> CodebookReport | None:
        codes = [row for row in self._logs.get("extra", {}).get("action_ids", []) if row]
        if not codes:
            return None
        return CodebookReport.from_choices(
            codes, model.config.num_codes, over=f"the last {len(codes)} rollouts", most_used=0
        )

    def _last_evaluation(self) -> list[Evaluation]:
        row = next((row for row in reversed(self.state.log_history) if set(self._evaluated) & set(row)), {})
        name = (self._data.get("datasets") or ["held-out rows"])[0]
        return [
            Evaluation(name, metric, row[metric], split="evaluation") for metric in self._evaluated if metric in row
        ]

    def create_model_card(
        self,
        model_name: str | None = None,
        dataset_name: str | list[str] | None = None,
        tags: str | list[str] | None = None,
        license: str | None = None,
        language: str | None = None,
        evaluation: list[Evaluation] | None = None,
        codebook: CodebookReport | None = None,
    ) -> None:
        """
        Writes the card of the model in `output_dir`, with plots; the model is saved there first, if none is there. All
        processes call it.

        Args:
            model_name (`str`, *optional*): Title.
            dataset_name (`str` or `list[str]`, *optional*): Hub ids or names of the training data.
            tags (`str` or `list[str]`, *optional*), license (`str`, *optional*), language (`str`, *optional*): Of the
                metadata.
            evaluation (`list[Evaluation]`, *optional*): Measured figures.
            codebook (`CodebookReport`, *optional*): Usage of codes; that of the last rollouts by default.
        """
        missing = not (Path(self.args.output_dir) / self._config_file).is_file()
        if missing and not self.writing_checkpoint:
            self.save_model(_internal_call=True)
        if not self.is_world_process_zero():
            return
        if dataset_name is not None:
            self._data = {**self._data, "datasets": [dataset_name] if isinstance(dataset_name, str) else dataset_name}
        self.record_run(evaluation, codebook)
        if (Path(self.args.output_dir) / self._config_file).is_file():
            self._write_card(self.args.output_dir, title=model_name, tags=tags, license=license, language=language)

    def _write_card(self, folder: str | Path, tags: str | list[str] | None = None, **metadata: Any) -> None:
        model = self.accelerator.unwrap_model(self.model)
        TrainingReport.from_dict(model.training_report).write(folder)
        own = [tag for tag in self._tag_names if tag not in ("trl", "latent-trl")]
        tags = [tags] if isinstance(tags, str) else list(tags or [])
        try:
            write_card(folder, repo_id=self.hub_model_id or self.args.hub_model_id, tags=[*own, *tags], **metadata)
        except Exception as error:
            # A picture that a library cannot draw must not cost the run.
            logger.warning(f"The card of {folder} was not written, training goes on: {type(error).__name__}: {error}")

    def init_hf_repo(self, token: str | None = None, **kwargs: Any) -> None:
        check_token(token if token is not None else self.args.hub_token)
        super().init_hf_repo(token=token, **kwargs)

    def push_to_hub(
        self,
        commit_message: str | None = "End of training",
        blocking: bool = True,
        token: str | None = None,
        revision: str | None = None,
        private: bool | None = None,
        create_pr: bool = False,
        **kwargs,
    ) -> CommitInfo | None:
        """
        Saves the model into `output_dir` and uploads it, with a card, in one commit.

        Args:
            commit_message (`str`, *optional*): Of the commit.
            blocking (`bool`, defaults to `True`): `False` returns a future.
            token (`str`, *optional*), revision (`str`, *optional*), private (`bool`, *optional*): Default to
                `hub_token`, `hub_revision` and `hub_private_repo` of the arguments.
            create_pr (`bool`, defaults to `False`): Open a pull request instead.
            kwargs: Of [`create_model_card`].
        """
        self.callback_handler.on_push_begin(self.args, self.state, self.control)
        token = token if token is not None else self.args.hub_token
        if self.hub_model_id is None:
            self.init_hf_repo(token=token, private=private)
        self.save_model(_internal_call=True)
        if not self.is_world_process_zero():
            return None
        self.create_model_card(**kwargs)
        if self.push_in_progress is not None and not self.push_in_progress.is_done():
            logger.info("Waiting for the checkpoint's push to be finished, this might take a couple of minutes.")
            self.push_in_progress.wait_until_done()
        return push_folder(
            self.args.output_dir,
            self.hub_model_id,
            token=token,
            revision=revision if revision is not None else self.args.hub_revision,
            create_pr=create_pr,
            commit_message=commit_message,
            run_as_future=not blocking,
        )

    def push_checkpoint(self, checkpoint_folder: str | Path) -> None:
        """Pushes a checkpoint in the background, as `hub_strategy` says."""
        strategy = self.args.hub_strategy
        if not self.is_world_process_zero() or strategy == HubStrategy.END:
            return
        pending = self.push_in_progress is not None and not self.push_in_progress.is_done()
        if pending and not self.args.hub_always_push:
            return
        self.callback_handler.on_push_begin(self.args, self.state, self.control)
        self.record_run()
        self._write_card(checkpoint_folder)
        step = f"epoch {int(self.state.epoch)}" if self.args.save_strategy == SaveStrategy.EPOCH else None
        message = f"Training in progress, {step or f'step {self.state.global_step}'}"
        places = {HubStrategy.CHECKPOINT: "last-checkpoint", HubStrategy.ALL_CHECKPOINTS: Path(checkpoint_folder).name}
        job = HfApi().run_as_future(
            self._push_copy, _linked_copy(checkpoint_folder, self.args.output_dir), message, places.get(strategy)
        )
        if pending:
            self.push_in_progress.jobs.append(job)
        else:
            self.push_in_progress = PushInProgress([job])

    def _push_copy(self, folder: str, message: str, path_in_repo: str | None) -> None:
        """In the background: the checkpoint itself may be rotated away meanwhile."""
        shared = {"token": self.args.hub_token, "revision": self.args.hub_revision}
        try:
            push_folder(folder, self.hub_model_id, commit_message=message, **shared)
            if path_in_repo is not None:
                # States too, which `push_folder` leaves out. Tensors in PyTorch's own files hold no text.
                ignored = ["training_args.*", CARD_FILE, *PLOT_FILES]
                found = [path for path in Path(folder).rglob("*") if path.is_file() and not path.is_symlink()]
                names = [str(path.relative_to(folder)) for path in found]
                for name in filter_repo_objects(names, ignore_patterns=[*ignored, *TENSOR_FILES]):
                    check_no_secret(Path(folder) / name)
                HfApi(library_name="latent-trl").upload_folder(
                    repo_id=self.hub_model_id,
                    folder_path=folder,
                    path_in_repo=path_in_repo,
                    commit_message=f"{message}, checkpoint",
                    ignore_patterns=ignored,
                    **shared,
                )
        except Exception as error:
            logger.warning(f"A push during training failed, training goes on: {type(error).__name__}: {error}")
            raise
        finally:
            shutil.rmtree(folder, ignore_errors=True)


def _is_trained(module: Any) -> bool:
    return module is not None and any(parameter.requires_grad for parameter in module.parameters())


def _linked_copy(folder: str, beside: str) -> str:
    """A copy of a folder that shares its files' contents where the file system can."""

    def link(source, target):
        try:
            os.link(source, target)
        except OSError:
            shutil.copy2(source, target)

    copy = tempfile.mkdtemp(prefix=PUSH_PREFIX, dir=beside)
    shutil.copytree(folder, copy, dirs_exist_ok=True, copy_function=link)
    return copy
