"""What an RL run needs, beside the files of Trainer, to go on exactly where a checkpoint was written."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets import IterableDataset
from PIL import Image
from safetensors.torch import save_file
from torch.utils.data import DataLoader, Sampler
from transformers.trainer import TRAINER_STATE_NAME
from transformers.utils import logging

from ...checkpoint.files import read_json, read_tensors
from ...data.prompts import EncodedPrompt
from ...data.rendering import Rendering
from .manifest import write_json

logger = logging.get_logger(__name__)

# One pair of files a process: each holds its own part of the rollout batch.
STATE_FILE = "rollout_state_{rank}.json"
BUFFER_FILE = "rollout_buffer_{rank}.safetensors"
PROMPTS = "prompts"


def save_run_state(folder: str | Path, rank: int, state: dict[str, Any], batches: list[dict[str, Any]] | None) -> None:
    """
    Writes one process's state.

    Args:
        folder (`str` or `Path`): The checkpoint.
        rank (`int`): The process.
        state (`dict`): Plain JSON values.
        batches (`list[dict]`, *optional*): The rest of a rollout batch that is in use: tensors, plain lists, prompts.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    tensors: dict[str, torch.Tensor] = {}
    plain: list[dict[str, Any]] | None = None
    prompts: dict[int, tuple[int, EncodedPrompt]] = {}
    if batches is not None:
        plain = []
        for i, batch in enumerate(batches):
            plain.append({k: v for k, v in batch.items() if not isinstance(v, torch.Tensor)})
            if PROMPTS in batch:
                numbers = [prompts.setdefault(id(prompt), (len(prompts), prompt))[0] for prompt in batch[PROMPTS]]
                plain[-1][PROMPTS] = numbers
            for name, value in batch.items():
                if isinstance(value, torch.Tensor):
                    tensors[f"{i}.{name}"] = value.detach().cpu().clone(memory_format=torch.contiguous_format)
        described = [_described(number, prompt, tensors) for number, prompt in prompts.values()]
        state = {**state, PROMPTS: described}
        save_file(tensors, folder / BUFFER_FILE.format(rank=rank))
    write_json(folder / STATE_FILE.format(rank=rank), {**state, "batches": plain})


def _described(number: int, prompt: EncodedPrompt, tensors: dict[str, torch.Tensor]) -> dict[str, Any]:
    """Plain values of a prompt; its pictures and visual inputs are added to `tensors`."""
    rendering = prompt.rendering
    for name, value in prompt.vision.items():
        tensors[f"{PROMPTS}.{number}.vision.{name}"] = value.detach().cpu().contiguous()
    for place, image in enumerate(rendering.images):
        tensors[f"{PROMPTS}.{number}.image.{place}"] = torch.from_numpy(np.asarray(image).copy())
    return {
        "ids": prompt.ids,
        "fields": prompt.fields,
        "text": rendering.text,
        "images": len(rendering.images),
        "row": rendering.row,
        "is_plain": rendering.is_plain,
    }


def _prompt(number: int, described: dict[str, Any], tensors: dict[str, torch.Tensor]) -> EncodedPrompt:
    """Undoes [`_described`]."""
    own = f"{PROMPTS}.{number}."
    images = [Image.fromarray(tensors[f"{own}image.{i}"].numpy()) for i in range(described["images"])]
    vision = {k.removeprefix(f"{own}vision."): v for k, v in tensors.items() if k.startswith(f"{own}vision.")}
    rendering = Rendering(described["text"], images, described["row"], described["is_plain"])
    return EncodedPrompt(described["ids"], described["fields"], vision, rendering)


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
    batches, described = state.pop("batches"), state.pop(PROMPTS, [])
    if batches is not None:
        tensors = read_tensors(folder / BUFFER_FILE.format(rank=rank))
        prompts = [_prompt(number, one, tensors) for number, one in enumerate(described)]
        for batch in batches:
            if PROMPTS in batch:
                batch[PROMPTS] = [prompts[number] for number in batch[PROMPTS]]
        for name, tensor in tensors.items():
            index, name = name.split(".", 1)
            if index != PROMPTS:
                batches[int(index)][name] = tensor.to(device)
    return state, batches


class ExactResumeMixin:
    """
    For a `GRPOTrainer`: with `resume_from_checkpoint` a run goes on bit by bit as if it had not been interrupted, in
    the middle of a rollout batch and of a logging interval too.
    """

    reference: Any = None

    def run_state(self) -> dict[str, Any]:
        """What changes during a run, as plain JSON values; a subclass adds its own."""
        return {
            "world_size": self.accelerator.num_processes,
            "micro_batches": self._step,
            "metrics": {name: list(values) for name, values in self._metrics["train"].items()},
            "loss": self._tr_loss.item(),
            "last_logged_step": self._globalstep_last_logged,
            "health": self.health.state(),
            "reference": None if self.reference is None else self.reference.digest,
        }

    def load_run_state(self, state: dict[str, Any]) -> None:
        """Puts back what [`run_state`] gave."""
        self.health.load_state(state["health"])
        self._step = state["micro_batches"]
        self._metrics["train"].clear()
        self._metrics["train"].update(state["metrics"])
        self._tr_loss.fill_(state["loss"])
        self._globalstep_last_logged = state["last_logged_step"]

    def save_run(self, folder: str | Path) -> None:
        in_use = self._step % (self.args.steps_per_generation * self.num_iterations) != 0
        batches = self._buffered_inputs if in_use else None
        save_run_state(folder, self.accelerator.process_index, self.run_state(), batches)
        if self.reference is not None and self.args.should_save:
            self.reference.save(self.args.output_dir)

    def restore_run(self) -> None:
        folder, accelerator = self.resumed_from, self.accelerator
        if folder is None:
            return
        loaded = load_run_state(folder, accelerator.process_index, accelerator.num_processes, accelerator.device)
        if loaded is None:
            return
        state, self._buffered_inputs = loaded
        if self.reference is not None and state.get("reference") is not None:
            self.reference.resume(Path(folder).parent, state["reference"])
        self.load_run_state(state)

    def get_train_dataloader(self) -> DataLoader:
        loader = super().get_train_dataloader()
        if self.resumed_from is not None and not isinstance(self.train_dataset, IterableDataset):
            sampler = innermost_sampler(loader)
            path = Path(self.resumed_from) / TRAINER_STATE_NAME
            if sampler.shuffle and path.is_file():
                # Its generator has shuffled once an epoch, of which the state counts fractions too.
                epochs = json.loads(path.read_text(encoding="utf-8"))["epoch"] or 0.0
                for _ in range(int(epochs + 1e-6)):
                    torch.randperm(sampler.num_samples, generator=sampler.generator)
        return loader


def innermost_sampler(loader: DataLoader) -> Sampler:
    """The sampler of rows under the batch samplers that accelerate may have put around it."""
    batches = loader.batch_sampler
    while not hasattr(batches, "sampler"):
        batches = batches.batch_sampler
    return batches.sampler
