"""What a run needs, beside the files of Trainer, to go on exactly where a checkpoint was written."""

from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from transformers.utils import logging

from ...checkpoint.files import read_json, read_tensors
from .component_training import write_json

logger = logging.get_logger(__name__)

# One pair of files a process: each holds its own part of the rollout batch.
STATE_FILE = "rollout_state_{rank}.json"
BUFFER_FILE = "rollout_buffer_{rank}.safetensors"


def save_run_state(folder: str | Path, rank: int, state: dict[str, Any], batches: list[dict[str, Any]] | None) -> None:
    """
    Writes one process's state.

    Args:
        folder (`str` or `Path`): The checkpoint.
        rank (`int`): The process.
        state (`dict`): Plain JSON values.
        batches (`list[dict]`, *optional*): The rest of a rollout batch that is in use: tensors and plain lists.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    tensors: dict[str, torch.Tensor] = {}
    plain: list[dict[str, Any]] | None = None
    if batches is not None:
        plain = []
        for i, batch in enumerate(batches):
            plain.append({k: v for k, v in batch.items() if not isinstance(v, torch.Tensor)})
            for name, value in batch.items():
                if isinstance(value, torch.Tensor):
                    tensors[f"{i}.{name}"] = value.detach().cpu().clone(memory_format=torch.contiguous_format)
        save_file(tensors, folder / BUFFER_FILE.format(rank=rank))
    write_json(folder / STATE_FILE.format(rank=rank), {**state, "batches": plain})


def load_run_state(
    folder: str | Path, rank: int, world_size: int, device: torch.device
) -> tuple[dict[str, Any], list[dict[str, Any]] | None] | None:
    """
    Reads what [`save_run_state`] wrote.

    Returns:
        The state and the batches, or `None` when the checkpoint has none for this number of processes.
    """
    folder = Path(folder)
    path = folder / STATE_FILE.format(rank=rank)
    if not path.is_file():
        logger.warning(f"{folder} has no {path.name}: the run goes on with a new rollout batch, not exactly.")
        return None
    state = read_json(path)
    if state["world_size"] != world_size:
        logger.warning(
            f"{folder} was written by {state['world_size']} processes, this run has {world_size}: it goes on with a "
            "new rollout batch, not exactly."
        )
        return None
    batches = state.pop("batches")
    if batches is not None:
        for name, tensor in read_tensors(folder / BUFFER_FILE.format(rank=rank)).items():
            index, name = name.split(".", 1)
            batches[int(index)][name] = tensor.to(device)
    return state, batches


class ExactResumeMixin:
    """
    For a `GRPOTrainer`: with `resume_from_checkpoint` a run goes on bit by bit as if it had not been interrupted, in
    the middle of a rollout batch and of a logging interval too.
    """

    _train_sampler = None

    def _run_state(self) -> dict[str, Any]:
        """What changes during a run, as plain JSON values; a subclass adds its own."""
        return {
            "world_size": self.accelerator.num_processes,
            "micro_batches": self._step,
            "metrics": {name: list(values) for name, values in self._metrics["train"].items()},
            "loss": self._tr_loss.item(),
            "last_logged_step": self._globalstep_last_logged,
            "health": self.health.state(),
        }

    def _restore_run_state(self, state: dict[str, Any]) -> None:
        self.health.load_state(state["health"])
        self._step = state["micro_batches"]
        self._metrics["train"].clear()
        self._metrics["train"].update(state["metrics"])
        self._tr_loss.fill_(state["loss"])
        self._globalstep_last_logged = state["last_logged_step"]

    def _save_rng_state(self, output_dir: str) -> None:
        super()._save_rng_state(output_dir)
        in_use = self._step % (self.args.steps_per_generation * self.num_iterations) != 0
        batches = self._buffered_inputs if in_use else None
        save_run_state(output_dir, self.accelerator.process_index, self._run_state(), batches)

    def _load_rng_state(self, checkpoint: str | None) -> None:
        super()._load_rng_state(checkpoint)
        if checkpoint is None:
            return
        accelerator = self.accelerator
        loaded = load_run_state(checkpoint, accelerator.process_index, accelerator.num_processes, accelerator.device)
        if loaded is not None:
            state, self._buffered_inputs = loaded
            self._restore_run_state(state)

    def _get_train_sampler(self, dataset=None):
        self._train_sampler = super()._get_train_sampler(dataset)
        return self._train_sampler

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        super()._load_optimizer_and_scheduler(checkpoint)
        sampler = self._train_sampler
        if checkpoint is not None and sampler is not None and sampler.shuffle:
            # Its generator has shuffled once an epoch; state.epoch counts epochs with a fraction.
            for _ in range(int((self.state.epoch or 0.0) + 1e-6)):
                torch.randperm(sampler.num_samples, generator=sampler.generator)
