"""The reference: the policy before RL, that of a run that goes on included."""

import copy
import functools
import hashlib
from pathlib import Path
from typing import Any

import torch

from ...checkpoint.files import WEIGHTS_NAME, CheckpointError, read_tensors
from ...models.component import load_state
from ...models.latent_action_model import LatentActionModel
from ...models.policy import LatentActionPolicy

REFERENCE_FOLDER = "reference"


def frozen_copy(policy: LatentActionPolicy) -> LatentActionPolicy:
    """A copy of `policy` that is not trained."""
    return copy.deepcopy(policy).requires_grad_(False).eval()


def digest_of(tensors: dict[str, torch.Tensor]) -> str:
    """SHA-256 over names and values."""
    digest = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        digest.update(f"{name}{tuple(tensor.shape)}{tensor.dtype}".encode())
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def copy_adapter(peft_backbone: Any, name: str) -> None:
    """A frozen copy of the active adapter under `name`."""
    from peft import get_peft_model_state_dict, set_peft_model_state_dict

    active = peft_backbone.active_adapter
    peft_backbone.add_adapter(name, peft_backbone.peft_config[active])
    set_peft_model_state_dict(peft_backbone, get_peft_model_state_dict(peft_backbone, adapter_name=active), name)
    peft_backbone.set_adapter(active)


class Reference:
    """
    The policy before RL, and what the backbone was for it.

    Args:
        model (`LatentActionModel`): Before RL.
        adapter (`str`, *optional*): The copy of the backbone's adapter that the reference is scored with; `None` is the
            backbone without an adapter.
    """

    def __init__(self, model: LatentActionModel, adapter: str | None = None):
        self.policy = frozen_copy(model.policy)
        self.adapter = adapter
        self.model = model
        self._saved_in: str | None = None

    @functools.cached_property
    def digest(self) -> str:
        """Of all tensors that make the reference."""
        tensors = dict(self.policy.state_dict())
        if self.adapter is not None:
            from peft import get_peft_model_state_dict

            adapter = get_peft_model_state_dict(self.model.peft_backbone, adapter_name=self.adapter)
            tensors |= {f"adapter.{name}": tensor for name, tensor in adapter.items()}
        return digest_of(tensors)

    def save(self, run_folder: str | Path) -> None:
        """Writes the policy into the run's folder, once a run."""
        if self._saved_in != str(run_folder):
            self.policy.save_pretrained(Path(run_folder) / REFERENCE_FOLDER)
            self._saved_in = str(run_folder)

    def resume(self, run_folder: str | Path, digest: str) -> None:
        """
        Makes the reference that of an earlier run, where the model that was given is not as it was before RL.

        Args:
            run_folder (`str` or `Path`): With what [`~Reference.save`] wrote.
            digest (`str`): Of the earlier run's reference.

        Raises:
            CheckpointError: When it cannot be had: divergences would be measured from another policy.
        """
        if self.digest == digest:
            return
        path = Path(run_folder) / REFERENCE_FOLDER / WEIGHTS_NAME
        if path.is_file() and self.adapter is None:
            tensors = read_tensors(path)
            if digest_of(tensors) == digest:
                load_state(self.policy, tensors, str(path))
                del self.digest
                return
        raise CheckpointError(
            f"The run that is resumed measured its divergence from another policy than `model`'s, and {path.parent} "
            "does not hold that one. Give the model that the run began with."
        )
