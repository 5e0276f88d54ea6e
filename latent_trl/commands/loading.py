"""What commands are given by name: models and reward functions."""

import inspect
from importlib import import_module
from pathlib import Path
from typing import Any

from .rows import check_exists, load_attribute

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

# Those of TRL by their names in it: a function, or what makes one from `reward_kwargs`.
TRL_REWARDS = ("accuracy_reward", "reasoning_accuracy_reward", "think_format_reward")
TRL_REWARD_MAKERS = ("get_cosine_scaled_reward", "get_repetition_penalty_reward", "get_soft_overlong_punishment")


def load_model(name: str, backbone: str | None = None, is_trainable: bool = False, **backbone_kwargs: Any):
    """A latent action model from a folder or the Hub; on a GPU where there is one."""
    from latent_trl import LatentActionModel

    from ..models.checkpoint import load_backbone

    check_latent_actions(name, backbone)
    quantized = backbone_kwargs.get("quantization_config") is not None
    backbone_kwargs = {key: value for key, value in backbone_kwargs.items() if value is not None}
    given = None if backbone is None else load_backbone(backbone, **backbone_kwargs)
    model = LatentActionModel.from_pretrained(
        name, backbone=given, is_trainable=is_trainable, **({} if given is not None else backbone_kwargs)
    )
    return model if quantized else placed(model)


def load_learner(name: str, config: dict[str, Any], **backbone_kwargs: Any):
    """For `learn`: the latent action model of that name, or fresh components around the backbone of that name."""
    from latent_trl import LatentActionConfig, LatentActionModel

    from ..models.checkpoint import load_backbone

    if is_latent_action_model(name):
        return load_model(name, **backbone_kwargs)
    check_is_backbone(name)
    backbone = load_backbone(name, **{key: value for key, value in backbone_kwargs.items() if value is not None})
    # Without one, the commit is looked up in the cache.
    revision = backbone_kwargs.get("revision")
    return LatentActionModel.from_backbone(backbone, LatentActionConfig(**config, base_model_revision=revision))


def check_latent_actions(name: str, backbone: str | None = None) -> None:
    """
    Says what is wrong with a folder of latent actions before anything is loaded, or asked of the Hub.

    Raises:
        FileNotFoundError: When it, or the folder of the backbone that it names, is not there.
        ValueError: When it holds something else.
    """
    from ..checkpoint.files import CONFIG_FILE
    from ..checkpoint.plan_files import PLAN_CONFIG

    check_exists(name, "model")
    folder = Path(name).expanduser()
    if not folder.is_dir():
        return
    if not (folder / CONFIG_FILE).is_file():
        if (folder / PLAN_CONFIG).is_file():
            raise ValueError(
                f"{name!r} holds plans, and this command is for codes a token. For plans there are `bandit`, `grpo`, "
                "`rloo` and `ppo`, `generate`, `chat`, `serve`, `vllm-serve`, `evaluate`, `atlas`, `inspect` and "
                "`push`."
            )
        inside = sorted(child.name for child in folder.iterdir() if (child / CONFIG_FILE).is_file())
        if inside:
            raise ValueError(f"{name!r} holds the models {inside}: name one of them, such as '{folder / inside[-1]}'.")
        what = "a backbone without latent actions" if (folder / "config.json").is_file() else "no model"
        raise ValueError(f"{name!r} is {what}. `latent-trl learn` makes latent actions on a backbone.")
    check_base(folder / CONFIG_FILE, name, backbone)


def check_is_backbone(name: str) -> None:
    """
    Says what is wrong with the folder of a backbone before its configuration is read.

    Raises:
        FileNotFoundError: When it is not there.
        ValueError: When it holds latent actions, or no model.
    """
    from ..checkpoint.files import CONFIG_FILE, read_json
    from ..checkpoint.plan_files import PLAN_CONFIG

    check_exists(name, "model")
    folder = Path(name).expanduser()
    if not folder.is_dir():
        return
    for file, what in ((CONFIG_FILE, "codes a token"), (PLAN_CONFIG, "plans")):
        if (folder / file).is_file():
            base = read_json(folder / file).get("base_model_name_or_path")
            named = f", {base!r}" if base else ""
            raise ValueError(f"{name!r} holds {what}, and a backbone is asked for: name that{named}.")
    if not (folder / "config.json").is_file():
        raise ValueError(f"{name!r} is no model: there is no config.json in it.")


def is_latent_action_model(name: str) -> bool:
    """Whether a folder or repository holds latent actions, and not a plain backbone."""
    from ..checkpoint.files import CONFIG_FILE

    return holds(name, CONFIG_FILE)


def holds(name: str, file: str) -> bool:
    """
    Whether a folder or repository has a file. Asks the Hub for names that are no folder.

    Raises:
        FileNotFoundError: For a path that is not there.
    """
    check_exists(name, "model")
    folder = Path(name).expanduser()
    if folder.is_dir():
        return (folder / file).is_file()
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        hf_hub_download(name, file)
    except (HfHubHTTPError, LocalEntryNotFoundError, HFValidationError):
        return False
    return True


def check_base(record: Path, name: str, backbone: str | None) -> None:
    """Raises `FileNotFoundError` when the folder of `backbone`, or of the one that `record` names, is not there."""
    if backbone is not None:
        check_exists(backbone, "backbone")
        return
    from ..checkpoint.files import CheckpointError, read_json

    base = read_json(record).get("base_model_name_or_path")
    if base is not None and not isinstance(base, str):
        raise CheckpointError(f"{record}: `base_model_name_or_path` must be a text, got {base!r:.200}.")
    if base:
        hint = f"{name!r} was made on it. Run the command where that folder is, or pass `--backbone`."
        check_exists(base, "backbone", hint)


def placed(model):
    """The model, on a GPU where there is one."""
    import torch

    return model.to("cuda") if torch.cuda.is_available() else model


def backbone_kwargs(model_args) -> dict[str, Any]:
    """What TRL's `ModelConfig` says of loading the backbone."""
    from trl import get_quantization_config

    return {
        "revision": None if model_args.model_revision == "main" else model_args.model_revision,
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


def load_rewards(names: list[str] | str, options: dict[str, Any] | None = None) -> list[Any]:
    """
    Reward functions by their names.

    Args:
        names (`list[str]` or `str`): A name in [`REWARDS`] or of TRL's rewards, `module:attribute` or, as in TRL,
            `module.attribute`, or a reward model's folder or Hub id.
        options (`dict`, *optional*): Keyword arguments of those that are classes or make a function, by name.
    """
    options = dict(options or {})
    # One name may stand alone.
    names = [names] if isinstance(names, str) else names
    if not names:
        raise ValueError(f"`reward_funcs` is empty. Give `module:attribute`, or one of {sorted(REWARDS)}.")
    found = []
    for name in names:
        if name in REWARDS:
            module, attribute = REWARDS[name]
            reward = getattr(import_module(f"latent_trl.rewards.{module}"), attribute)
        elif name in TRL_REWARDS or name in TRL_REWARD_MAKERS:
            reward = getattr(import_module("trl.rewards"), name)
        elif ":" in name and not Path(name).exists():
            reward = load_attribute(name)
        elif "/" in name or Path(name).is_dir():
            reward = name
        elif "." in name:
            reward = load_attribute(":".join(name.rsplit(".", 1)))
        else:
            known = sorted([*REWARDS, *TRL_REWARDS, *TRL_REWARD_MAKERS])
            raise ValueError(f"No reward {name!r}: give `module:attribute`, or one of {known}.")
        found.append(_made(name, reward, options.pop(name, {})))
    if options:
        raise ValueError(f"`reward_kwargs` names {sorted(options)}, which are not among `reward_funcs` {names}.")
    return found


def _made(name: str, reward: Any, options: dict[str, Any]) -> Any:
    if not inspect.isclass(reward) and name not in TRL_REWARD_MAKERS:
        if options:
            raise ValueError(f"`reward_kwargs` has options for {name!r}, which is not a class.")
        return reward
    try:
        return reward(**options)
    except TypeError as error:
        raise ValueError(
            f"{name!r} needs other options: {error}. Its signature: {inspect.signature(reward)}."
        ) from error
