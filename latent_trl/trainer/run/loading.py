"""What every trainer is given: a model, its processing class, and data sets with the columns that are read."""

import os
from typing import Any

from peft import PeftModel
from transformers import AutoProcessor, PreTrainedModel
from transformers.training_args import ParallelMode

from ...models.latent_action_model import LatentActionModel
from ...plans.model import PlanModel

INSTEAD = (
    "Make latent actions on a backbone with `LatentActionModel.from_backbone(backbone)` and `LatentActionSpaceTrainer`,"
    " or with `latent-trl learn`."
)


def load_model(model: LatentActionModel | str | os.PathLike, **kwargs: Any) -> LatentActionModel:
    """
    A latent action model, from itself, a folder or a Hub id.

    Args:
        model (`LatentActionModel` or `str`): The model, or the name of its checkpoint.
        kwargs: Of [`LatentActionModel.from_pretrained`], which a model that is loaded already cannot use.

    Raises:
        TypeError: For another model, a plain one or one of PEFT's.
        CheckpointError: For a folder or repository without latent actions.
    """
    if isinstance(model, (str, os.PathLike)):
        return LatentActionModel.from_pretrained(os.fspath(model), **kwargs)
    if isinstance(model, PeftModel):
        inner = model.get_base_model()
        advice = INSTEAD
        if isinstance(inner, LatentActionModel):
            advice = "Pass the latent action model itself."
        raise TypeError(
            f"`model` is a {type(model).__name__}, and the adapter of a latent action model is put on its backbone "
            f"alone. {advice} Give the adapter's configuration as `peft_config`, or to `model.add_adapter`."
        )
    if not isinstance(model, LatentActionModel):
        advice = f" {INSTEAD}" if isinstance(model, PreTrainedModel) else ""
        raise TypeError(
            f"`model` must be a LatentActionModel, a folder or a Hub id, got {type(model).__name__}.{advice}"
        )
    return model


def load_named_model(
    model: LatentActionModel | str | os.PathLike, args: Any, quantization_config: Any = None, **kwargs: Any
) -> LatentActionModel:
    """
    [`load_model`] with what TRL's arguments say of loading: `model_init_kwargs`, `trust_remote_code` and
    `quantization_config`, which are about the backbone, but for a `revision`, which is the checkpoint's.

    Raises:
        ValueError: When they are given for a model that is loaded already, or twice.
    """
    init = dict(args.model_init_kwargs or {})
    if quantization_config is not None:
        if "quantization_config" in init:
            raise ValueError("`quantization_config` is given twice, once in `model_init_kwargs`. Leave one out.")
        init["quantization_config"] = quantization_config
    if isinstance(model, (str, os.PathLike)):
        if args.trust_remote_code:
            init.setdefault("trust_remote_code", True)
        if args.parallel_mode == ParallelMode.DISTRIBUTED:
            # Each process has its own device, and the whole model on it.
            init["device_map"] = None
        return load_model(model, **init, **kwargs)
    if init:
        raise ValueError(
            f"{sorted(init)} are about loading, and `model` is loaded already. Give its name, or load it with them: "
            "`LatentActionModel.from_pretrained(..., quantization_config=...)`."
        )
    return load_model(model)


def load_processing_class(model: LatentActionModel | PlanModel, trust_remote_code: bool = False):
    """
    The processor or tokenizer saved beside the model, with its chat template; else that of the backbone, at the
    revision that the model was made on. Texts are padded and cut on the left.

    Raises:
        ValueError: When there is neither.
    """
    options: dict[str, Any] = {"padding_side": "left", "truncation_side": "left"}
    if model.processor_folder is not None:
        return AutoProcessor.from_pretrained(model.processor_folder, trust_remote_code=trust_remote_code, **options)
    config = model.plan_config if isinstance(model, PlanModel) else model.config
    name = config.base_model_name_or_path
    if not name:
        raise ValueError("`processing_class` must be given: the backbone was not loaded from a name.")
    if not os.path.isdir(name):
        options["revision"] = config.base_model_revision
    return AutoProcessor.from_pretrained(name, trust_remote_code=trust_remote_code, **options)


def own_config(args: Any, config_class: type, output_dir: str) -> Any:
    """
    A trainer's arguments, or its defaults with `output_dir`. Raises `TypeError` for those of another trainer, which are
    of a subclass at times, with settings that would not be read.
    """
    if args is None:
        return config_class(output_dir)
    own = next((kind for kind in type(args).__mro__ if kind.__module__.startswith("latent_trl.")), None)
    if own is config_class:
        return args
    advice = "whose fields have TRL's names"
    if own is not None:
        advice = f"or give these arguments to `{own.__name__.replace('Config', 'Trainer')}`"
    raise TypeError(
        f"`args` is a {type(args).__name__}, and this trainer takes a `{config_class.__name__}`: use that, {advice}."
    )


def check_one_set(dataset: Any, name: str) -> None:
    """Raises `TypeError` for a list of data sets: several evaluation sets are given under names."""
    if isinstance(dataset, (list, tuple)) and dataset and not isinstance(dataset[0], dict):
        raise TypeError(
            f"`{name}` is a {type(dataset).__name__} of {type(dataset[0]).__name__}s, and no data set. Give several "
            f"evaluation sets as a dict, `{{'questions': ..., 'captions': ...}}`."
        )
    if isinstance(dataset, dict) and not all(isinstance(key, str) for key in dataset):
        raise TypeError(
            f"The names in `{name}` must be texts, got {[key for key in dataset if not isinstance(key, str)]}."
        )


def check_columns(dataset: Any, name: str) -> None:
    """Raises `ValueError` unless `dataset` has `messages`, or `prompt` and `completion`."""
    if dataset is None:
        raise ValueError(f"`{name}` must be given. (There is no `data_collator` before it here, as TRL has one.)")
    if callable(dataset):
        raise ValueError(
            f"`{name}` is a {type(dataset).__name__}, and no data set. There is no `data_collator` before it here, as "
            f"TRL has one: pass `{name}=` by name."
        )
    if not hasattr(dataset, "__len__") or not hasattr(dataset, "__getitem__"):
        raise ValueError(
            f"`{name}` is a {type(dataset).__name__}, which has no length. Rows are read in random order: give a "
            "`datasets.Dataset`, not a stream."
        )
    columns = getattr(dataset, "column_names", None) or (list(dataset[0]) if len(dataset) else [])
    if "messages" not in columns and not {"prompt", "completion"} <= set(columns):
        raise ValueError(
            f"`{name}` has the columns {sorted(columns)}; it needs `messages`, or `prompt` and `completion`, in TRL's "
            "conversational format. ShareGPT's, Alpaca's and other formats are converted by "
            "`latent_trl.data.formats.convert_row`."
        )
