"""Checkpoints that are whole or are not there: listed last, and older ones go only after that."""

import json
from pathlib import Path

from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR
from transformers.utils import logging

from .engines import ENGINE_FILE, check_same_engine, engine_record
from .manifest import (
    MANIFEST_FILE,
    checkpoint_fault,
    newest_whole_checkpoint,
    rotate,
    write_json,
    write_manifest,
)
from .output_folder import written_whole

logger = logging.get_logger(__name__)


class WholeCheckpointMixin:
    """For a Trainer: a process that is killed while it writes a checkpoint leaves the one before it to go on from."""

    # Whether a checkpoint is being written: TRL makes a card before each.
    writing_checkpoint = False

    def save_run(self, folder: str | Path) -> None:
        """Called by every process while a checkpoint is written: what a trainer needs to go on exactly."""

    def checkpoint_folder(self) -> Path:
        """Of the checkpoint of this step."""
        return Path(self.args.output_dir) / f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}"

    def push_checkpoint(self, folder: Path) -> None:
        """Called with a checkpoint that is whole, where `push_to_hub` is set."""

    def save_arguments(self, folder: str | Path) -> None:
        """Writes the trainer's arguments."""
        # Not the pickle that Trainer writes: it would hold the token.
        write_json(Path(folder) / "training_args.json", json.loads(self.args.to_json_string()))

    def _save_checkpoint(self, model, trial) -> None:
        run_folder, folder = self.args.output_dir, self.checkpoint_folder()
        if self.args.should_save:
            (folder / MANIFEST_FILE).unlink(missing_ok=True)
        with written_whole(folder, run_folder, remove=self.args.should_save):
            # Older checkpoints go, and this one is pushed, when it is known to be whole, and not before.
            limit, self.args.save_total_limit = self.args.save_total_limit, None
            push, self.args.push_to_hub = self.args.push_to_hub, False
            self.writing_checkpoint = True
            try:
                super()._save_checkpoint(model, trial)
            finally:
                self.args.save_total_limit, self.args.push_to_hub = limit, push
                self.writing_checkpoint = False
            self.save_run(folder)
            self.accelerator.wait_for_everyone()
            if self.args.should_save:
                self.save_arguments(folder)
                write_json(folder / ENGINE_FILE, engine_record(self))
                write_manifest(folder)
        if push:
            self.push_checkpoint(folder)
        if self.args.should_save:
            rotate(run_folder, limit, folder, self.state.best_model_checkpoint)

    def checkpoint_to_resume(self, resume_from_checkpoint: str | bool | None) -> str | None:
        """
        The folder to go on from; `True` is the newest checkpoint of `output_dir` that is whole.

        Raises:
            ValueError: When there is none, or it is of an engine whose optimizer this run cannot read.
        """
        if resume_from_checkpoint is True:
            newest = newest_whole_checkpoint(self.args.output_dir)
            if newest is None:
                raise ValueError(
                    f"`resume_from_checkpoint=True`, but {self.args.output_dir!r} holds no whole checkpoint. Leave it "
                    "out to start anew."
                )
            resume_from_checkpoint = newest
        elif resume_from_checkpoint and (fault := checkpoint_fault(resume_from_checkpoint)):
            logger.warning(f"Checkpoint {resume_from_checkpoint} may be damaged: {fault}.")
        if resume_from_checkpoint:
            check_same_engine(self, resume_from_checkpoint)
        return resume_from_checkpoint or None
