"""The folders that an engine reads: a backbone as transformers saves it, and a checkpoint of latent actions."""

import copy
import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from huggingface_hub.constants import HF_HOME
from transformers import AutoConfig, AutoProcessor, GenerationConfig, PreTrainedConfig

from ..checkpoint.atomic_folder import atomic_folder
from ..checkpoint.configuration import LatentActionConfig
from ..checkpoint.files import ADAPTER_FOLDER, PROCESSOR_RECORDS, TUNED_FOLDER, has_folder, read_config, resolve_folder
from ..models.latent_action_model import LatentActionModel

COMPONENTS = ("codebook", "world_model", "policy", "projector")


@dataclass
class EngineFolders:
    """
    Args:
        backbone (`str`): A folder, or an id of the Hub.
        revision (`str`, *optional*): Of the id.
        checkpoint (`str`): A folder with `COMPONENTS`.
        processor (`str`, *optional*): Where tokenizer and processor are; with the backbone by default.
        config (`LatentActionConfig`): Of the checkpoint.
    """

    backbone: str
    revision: str | None
    checkpoint: str
    processor: str | None
    config: LatentActionConfig

    def backbone_config(self) -> PreTrainedConfig:
        return AutoConfig.from_pretrained(self.backbone, revision=self.revision)

    @property
    def dtype(self) -> str:
        """That of the backbone's checkpoint, in which transformers loads it."""
        return dtype_of(self.backbone, self.revision)

    def generation_config(self) -> GenerationConfig:
        """The backbone's, which names the tokens that end a text."""
        return load_generation_config(self.backbone, self.revision)

    def load_processor(self) -> Any:
        """The processor or tokenizer that was saved with the model, or the backbone's."""
        if self.processor is not None:
            return load_processor(self.processor)
        return load_processor(self.backbone, self.revision)


def dtype_of(backbone: str, revision: str | None) -> str:
    """The dtype of a checkpoint; an engine would take a shorter one in the place of float32."""
    return str(AutoConfig.from_pretrained(backbone, revision=revision).dtype or "float32").removeprefix("torch.")


def load_generation_config(backbone: str, revision: str | None) -> GenerationConfig:
    """The defaults of a backbone: those saved with it, or those of its configuration."""
    try:
        return GenerationConfig.from_pretrained(backbone, revision=revision)
    except OSError:
        # A folder without one.
        return GenerationConfig.from_model_config(AutoConfig.from_pretrained(backbone, revision=revision))


def load_processor(name_or_path: str | Path, revision: str | None = None) -> Any:
    """A processor or tokenizer, which pads and cuts on the left."""
    options: dict[str, Any] = {"padding_side": "left", "truncation_side": "left"}
    return AutoProcessor.from_pretrained(name_or_path, revision=revision, **options)


def folders_of_checkpoint(repo_or_folder: str, **hub: Any) -> EngineFolders:
    """
    Those of a saved model. Where its backbone was tuned, an adapter is merged and the whole backbone is written to the
    cache of the Hub once.

    Args:
        repo_or_folder (`str`): Folder or Hub id of latent actions.
        hub: `revision`, `token`, `cache_dir`, `local_files_only`, as in `huggingface_hub`.

    Raises:
        CheckpointError: When the checkpoint cannot be read.
    """
    folder = resolve_folder(repo_or_folder, **hub)
    config, _ = read_config(folder)
    own_processor = any((folder / name).is_file() for name in PROCESSOR_RECORDS)
    processor = str(folder) if own_processor else None
    tuned = [name for name in (ADAPTER_FOLDER, TUNED_FOLDER) if has_folder(folder, name)]
    if not tuned and config.base_model_name_or_path:
        return EngineFolders(config.base_model_name_or_path, config.base_model_revision, str(folder), processor, config)
    merged = Path(HF_HOME) / "latent_trl" / "merged" / _digest(folder, tuned, config)
    if not (merged / "config.json").is_file():
        model = LatentActionModel.from_pretrained(folder, **{k: v for k, v in hub.items() if k != "revision"})
        with atomic_folder(merged) as new:
            _save_backbone(model, new)
    return EngineFolders(str(merged), None, str(folder), processor, config)


def check_not_quantized(
    config: PreTrainedConfig, why: str = "vLLM would build the policy's layers as it builds the backbone's"
) -> None:
    """Raises `ValueError` for the configuration of a quantised backbone, and says `why`."""
    if not hasattr(config, "quantization_config"):
        return
    given = config.quantization_config
    method = given["quant_method"] if isinstance(given, dict) else given.quant_method
    raise ValueError(
        f"The backbone is quantised ({getattr(method, 'value', method)}), and {why}. Use one that is not quantised, "
        "such as in bfloat16, or answer without an engine (`use_vllm=False`, `--engine transformers`)."
    )


def folders_of_model(model: LatentActionModel, work: Path) -> EngineFolders:
    """
    Those of a model in memory, as far as they must be written: its components, and a backbone that is in no folder.

    Args:
        model (`LatentActionModel`): It is not changed.
        work (`Path`): A folder to write in, which the engine needs while it starts.

    Raises:
        ValueError: For a quantised backbone.
    """
    check_not_quantized(model.backbone.config)
    components = [name for name in COMPONENTS if getattr(model, name) is not None]
    for name in components:
        getattr(model, name).save_pretrained(work / "components" / name)
    config, processor = model.config, model.processor_folder
    source, revision = config.base_model_name_or_path, config.base_model_revision
    if source is None or model.peft_backbone is not None or model.tuned_backbone_tensors:
        _save_backbone(model, work / "backbone")
        source, revision = str(work / "backbone"), None
    return EngineFolders(
        source, revision, str(work / "components"), None if processor is None else str(processor), config
    )


def _digest(folder: Path, tuned: list[str], config: LatentActionConfig) -> str:
    """Of what decides the merged backbone's tensors."""
    digest = hashlib.sha256(str((config.base_model_name_or_path, config.backbone_fingerprint)).encode())
    for name in tuned:
        for path in sorted((folder / name).iterdir()):
            digest.update(path.name.encode() + path.read_bytes())
    return digest.hexdigest()[:32]


def _save_backbone(model: LatentActionModel, folder: Path) -> None:
    """The backbone with its adapter merged, and the processor of the base model."""
    backbone = model.backbone
    if model.peft_backbone is not None:
        backbone = copy.deepcopy(model.peft_backbone).merge_and_unload()
    backbone.save_pretrained(folder)
    base = model.config.base_model_name_or_path
    if base:
        options = {} if Path(base).is_dir() else {"revision": model.config.base_model_revision}
        AutoProcessor.from_pretrained(base, **options).save_pretrained(folder)
