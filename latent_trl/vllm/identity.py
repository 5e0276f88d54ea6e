"""What an engine and a trainer must have in common: the backbone, and the components that do not change in RL."""

import hashlib
import tempfile
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open

from .. import __version__
from ..checkpoint.files import ADAPTER_FOLDER, TUNED_FOLDER, read_config
from ..models.latent_action_model import LatentActionModel

FROZEN = ("codebook", "world_model", "projector", ADAPTER_FOLDER, TUNED_FOLDER)
# Numbers of a tensor that are compared.
COMPARED = 64
# What is said of entries of an identity that differ, in their order.
DIFFERENCES = {
    "latent_trl": "it runs latent_trl {theirs!r}, and the trainer {own!r}",
    "kind": "it serves {theirs}, and the trainer learns over {own}",
    "num_codes": "its model has {theirs!r} codes, and the trainer's {own}",
    "backbone": "its backbone is another one, by its fingerprint",
    "rank": "its plans are of rank {theirs!r}, and the trainer's of {own}",
    "target_modules": "its plans change other linear maps than the trainer's (`depth`, `target_modules`)",
    "frozen": "its codebook, world model or projector, or what was tuned of its backbone, is another one",
}
# Entries that are lists of what may be: one in common is enough.
ALTERNATIVES = ("backbone", "frozen")
CODES, PLANS = "codes", "plans"


def identity_of_checkpoint(folder: str | Path) -> dict[str, Any]:
    """
    What a server says of itself, in plain JSON values.

    Args:
        folder (`str` or `Path`): Of a saved model.

    Returns:
        `latent_trl`, the package's version; `kind`, codes; `num_codes`; `backbone`, the fingerprint in the
        checkpoint's record; and `frozen`, digests of the components that RL does not train and of what was tuned of the
        backbone, their values rounded through bfloat16 and through float16, so that a model loaded in that precision
        has one of them.
    """
    config, _ = read_config(Path(folder))
    return {
        "latent_trl": __version__,
        "kind": CODES,
        "num_codes": config.num_codes,
        "backbone": [config.backbone_fingerprint],
        "frozen": [_digest(Path(folder), dtype) for dtype in (torch.bfloat16, torch.float16)],
    }


def identity_of_model(model: LatentActionModel) -> dict[str, Any]:
    """That of a model in memory: of the checkpoint that it would be saved as."""
    components = [name for name in FROZEN if name in model.component_classes and getattr(model, name) is not None]
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder, components=components)
        return identity_of_checkpoint(folder)


def differences(own: dict[str, Any], theirs: dict[str, Any]) -> list[str]:
    """In words, where two identities are not of the same model and package."""
    found = []
    for name, what in DIFFERENCES.items():
        if name not in own:
            continue
        mine, other = own[name], theirs.get(name)
        same = not set(mine).isdisjoint(other or ()) if name in ALTERNATIVES else mine == other
        if not same:
            found.append(what.format(own=mine, theirs=other))
            if name in ("latent_trl", "kind"):
                # The rest is of another kind.
                return found
    return found


def _digest(folder: Path, through: torch.dtype) -> str:
    """SHA-256 over names, shapes and some values of the tensors that RL does not change."""
    digest = hashlib.sha256()
    for path in sorted(path for name in FROZEN for path in (folder / name).glob("*.safetensors")):
        with safe_open(path, "pt") as file:
            for name in sorted(file.keys()):
                tensor = file.get_tensor(name)
                digest.update(f"{path.parent.name}.{name}{tuple(tensor.shape)}".encode())
                step = max(1, tensor.numel() // COMPARED)
                sample = tensor.reshape(-1)[::step][:COMPARED].float()
                digest.update(sample.to(through).to(torch.bfloat16).view(torch.int16).numpy().tobytes())
    return digest.hexdigest()
