"""What commands are given by name: models, data sets and reward functions."""

import inspect
import sys
from importlib import import_module
from pathlib import Path
from typing import Any

DATA_FILES = {".json": "json", ".jsonl": "json", ".csv": "csv", ".parquet": "parquet"}
# Name on the command line: (module, class) in `latent_trl.rewards`.
REWARDS = {
    "exact_match": ("exact_match", "ExactMatchReward"),
    "embedding_similarity": ("embedding", "EmbeddingSimilarityReward"),
    "image_text": ("image_text", "ImageTextReward"),
    "judge": ("judge", "JudgeReward"),
    "length": ("shaping", "LengthReward"),
    "repetition_penalty": ("shaping", "RepetitionPenalty"),
    "soft_overlong_punishment": ("shaping", "SoftOverlongPunishment"),
}


def load_model(name: str, backbone: str | None = None, is_trainable: bool = False, **backbone_kwargs: Any):
    """A latent action model from a folder or the Hub; on a GPU where there is one."""
    from latent_trl import LatentActionModel

    from ..models.checkpoint import load_backbone

    quantized = backbone_kwargs.get("quantization_config") is not None
    backbone_kwargs = {key: value for key, value in backbone_kwargs.items() if value is not None}
    given = None if backbone is None else load_backbone(backbone, **backbone_kwargs)
    model = LatentActionModel.from_pretrained(
        name, backbone=given, is_trainable=is_trainable, **({} if given is not None else backbone_kwargs)
    )
    return model if quantized else _placed(model)


def load_learner(name: str, config: dict[str, Any], **backbone_kwargs: Any):
    """For `learn`: the latent action model of that name, or fresh components around the backbone of that name."""
    from latent_trl import LatentActionConfig, LatentActionModel

    from ..models.checkpoint import load_backbone

    if is_latent_action_model(name):
        return load_model(name, **backbone_kwargs)
    backbone = load_backbone(name, **{key: value for key, value in backbone_kwargs.items() if value is not None})
    return LatentActionModel.from_backbone(backbone, LatentActionConfig(**config))


def is_latent_action_model(name: str) -> bool:
    """Whether a folder or repository holds latent actions, and not a plain backbone."""
    from ..checkpoint.files import CONFIG_FILE

    if Path(name).is_dir():
        return (Path(name) / CONFIG_FILE).is_file()
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    try:
        hf_hub_download(name, CONFIG_FILE)
    except (HfHubHTTPError, LocalEntryNotFoundError):
        return False
    return True


def _placed(model):
    import torch

    return model.to("cuda") if torch.cuda.is_available() else model


def backbone_kwargs(model_args) -> dict[str, Any]:
    """What TRL's `ModelConfig` says of loading the backbone."""
    from trl import get_quantization_config

    return {
        "dtype": model_args.dtype,
        "attn_implementation": model_args.attn_implementation,
        "quantization_config": get_quantization_config(model_args),
    }


def load_processor(model, name: str | None = None):
    """The processor or tokenizer of a model's backbone."""
    if name is not None:
        from transformers import AutoProcessor

        return AutoProcessor.from_pretrained(name, padding_side="left")
    from ..trainer.run.loading import load_processing_class

    return load_processing_class(model)


def load_rows(name: str, split: str = "train", config: str | None = None, limit: int | None = None):
    """
    A data set by its name.

    Args:
        name (`str`): Hub id, folder, file, or `module:function`.
        split (`str`, defaults to `"train"`): Of it. Files have no splits but "train".
        config (`str`, *optional*): Of a data set of the Hub.
        limit (`int`, *optional*): The first so many rows.
    """
    rows = _load_rows(name, split, config)
    return rows if limit is None else rows.select(range(min(limit, len(rows))))


def _load_rows(name: str, split: str, config: str | None):
    path = Path(name)
    if ":" in name and not path.exists():
        function = load_attribute(name)
        return function(split) if "split" in inspect.signature(function).parameters else function()
    from datasets import DatasetDict, load_dataset, load_from_disk

    if path.suffix in DATA_FILES:
        if not path.is_file():
            raise FileNotFoundError(f"There is no data file {name!r}.")
        return load_dataset(DATA_FILES[path.suffix], data_files=str(path), split="train")
    if (path / "dataset_dict.json").is_file() or (path / "dataset_info.json").is_file():
        rows = load_from_disk(name)
    else:
        rows = load_dataset(name, config)
    if not isinstance(rows, DatasetDict):
        return rows
    if split not in rows:
        raise ValueError(f"{name!r} has the splits {sorted(rows)}, not {split!r}.")
    return rows[split]


def load_attribute(name: str) -> Any:
    """`module:attribute`, of a module that is installed or in the current directory."""
    module_name, _, attribute = name.partition(":")
    if "" not in sys.path and str(Path.cwd()) not in sys.path:
        sys.path.insert(0, str(Path.cwd()))
    try:
        module = import_module(module_name)
    except ModuleNotFoundError as error:
        raise ValueError(f"{name!r}: {error}. Write `module:attribute`, as Python imports the module.") from error
    if not hasattr(module, attribute):
        names = sorted(n for n in vars(module) if not n.startswith("_"))
        raise ValueError(f"{name!r}: {module_name} has no {attribute!r}; it has {names}.")
    return getattr(module, attribute)


def load_rewards(names: list[str], options: dict[str, Any] | None = None) -> list[Any]:
    """
    Reward functions by their names.

    Args:
        names (`list[str]`): A name in [`REWARDS`], `module:attribute`, or a reward model's folder or Hub id.
        options (`dict`, *optional*): Keyword arguments of those that are classes, by name.
    """
    options = dict(options or {})
    if not names:
        raise ValueError(f"`reward_funcs` is empty. Give `module:attribute`, or one of {sorted(REWARDS)}.")
    found = []
    for name in names:
        if name in REWARDS:
            module, attribute = REWARDS[name]
            reward = getattr(import_module(f"latent_trl.rewards.{module}"), attribute)
        elif ":" in name and not Path(name).exists():
            reward = load_attribute(name)
        elif "/" in name or Path(name).is_dir():
            reward = name
        else:
            raise ValueError(f"No reward {name!r}: give `module:attribute`, or one of {sorted(REWARDS)}.")
        found.append(_made(name, reward, options.pop(name, {})))
    if options:
        raise ValueError(f"`reward_kwargs` names {sorted(options)}, which are not among `reward_funcs` {names}.")
    return found


def _made(name: str, reward: Any, options: dict[str, Any]) -> Any:
    if not inspect.isclass(reward):
        if options:
            raise ValueError(f"`reward_kwargs` has options for {name!r}, which is not a class.")
        return reward
    try:
        return reward(**options)
    except TypeError as error:
        raise ValueError(
            f"{name!r} needs other options: {error}. Its signature: {inspect.signature(reward)}."
        ) from error
