"""Plans by name: whether a name is that of plans, loading them, and what is wrong with another."""

from pathlib import Path
from typing import Any

from ..checkpoint.plan_files import PLAN_CONFIG
from .loading import check_base, check_is_backbone, holds, is_latent_action_model, placed
from .rows import check_exists

LEARN = "`latent-trl learn --kind plans` makes plans on a backbone."


def is_plan_model(name: str) -> bool:
    """Whether a folder or repository holds plans."""
    return holds(name, PLAN_CONFIG)


def load_plans(name: str, backbone: str | None = None, **backbone_kwargs: Any):
    """
    A model of plans from a folder or the Hub; on a GPU where there is one.

    Args:
        name (`str`): The folder or id.
        backbone (`str`, *optional*): Of the backbone, where the one that is named with the plans is not right.
        backbone_kwargs: For loading the backbone; those that are `None` are left out.

    Raises:
        FileNotFoundError: When it, or the backbone's folder, is not there.
        ValueError: When it holds no plans.
    """
    from latent_trl import PlanModel

    from ..models.checkpoint import load_backbone

    check_plans(name, backbone)
    quantized = backbone_kwargs.get("quantization_config") is not None
    options = {key: value for key, value in backbone_kwargs.items() if value is not None}
    if backbone is None:
        model = PlanModel.from_pretrained(name, **options)
    else:
        model = PlanModel.from_pretrained(name, backbone=load_backbone(backbone, **options))
    return model if quantized else placed(model)


def load_plan_learner(name: str, config: dict[str, Any], **backbone_kwargs: Any):
    """For `learn --kind plans`: the plans of that name, or fresh ones on the backbone of that name."""
    from latent_trl import PlanConfig, PlanModel

    from ..models.checkpoint import load_backbone

    if is_plan_model(name):
        model = load_plans(name, **backbone_kwargs)
        own = vars(model.plan_config)
        other = {key: value for key, value in config.items() if value not in (own[key], getattr(PlanConfig(), key))}
        if other:
            raise ValueError(f"{name!r} holds plans, with settings of their own: {other} cannot be changed.")
        return model
    if is_latent_action_model(name):
        raise ValueError(f"{name!r} holds codes a token. Plans are learned on a backbone: name that.")
    check_is_backbone(name)
    options = {key: value for key, value in backbone_kwargs.items() if value is not None}
    revision = options.get("revision")
    model = PlanModel(load_backbone(name, **options), PlanConfig(**config, base_model_revision=revision))
    return model if "quantization_config" in options else placed(model)


def check_plans(name: str, backbone: str | None = None) -> None:
    """
    Says what is wrong with a folder of plans before anything is loaded.

    Raises:
        FileNotFoundError: When it, or the backbone's folder, is not there.
        ValueError: When it holds something else.
    """
    from ..checkpoint.files import CONFIG_FILE

    check_exists(name, "model")
    folder = Path(name).expanduser()
    if not folder.is_dir():
        return
    if not (folder / PLAN_CONFIG).is_file():
        what = "no model"
        if (folder / CONFIG_FILE).is_file():
            what = "a model of codes a token, not of plans"
        elif (folder / "config.json").is_file():
            what = "a backbone without plans"
        elif (folder / "adapter_config.json").is_file():
            what = "one plan, or another adapter of PEFT: name the folder of all plans"
        raise ValueError(f"{name!r} is {what}. {LEARN}")
    check_base(folder / PLAN_CONFIG, name, backbone)
