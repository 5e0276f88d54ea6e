"""What every trainer is given: a model, its processing class, and data sets with the columns that are read."""

import os
from typing import Any

from ...models.latent_action_model import LatentActionModel


def load_model(model: LatentActionModel | str | os.PathLike, **kwargs: Any) -> LatentActionModel:
    """A latent action model, from itself, a folder or a Hub id."""
    if isinstance(model, (str, os.PathLike)):
        return LatentActionModel.from_pretrained(model, **kwargs)
    if not isinstance(model, LatentActionModel):
        raise TypeError(f"`model` must be a LatentActionModel, a folder or a Hub id, got {type(model).__name__}.")
    return model


def load_processing_class(model: LatentActionModel):
    """The processor or tokenizer of the model's backbone, by the name that it was loaded from."""
    from transformers import AutoProcessor

    name = model.config.base_model_name_or_path
    if not name:
        raise ValueError("`processing_class` must be given: the backbone was not loaded from a name.")
    return AutoProcessor.from_pretrained(name, padding_side="left")


def check_columns(dataset: Any, name: str) -> None:
    """Raises `ValueError` unless `dataset` has `messages`, or `prompt` and `completion`."""
    if dataset is None:
        raise ValueError(f"`{name}` must be given.")
    if not hasattr(dataset, "__len__") or not hasattr(dataset, "__getitem__"):
        raise ValueError(
            f"`{name}` is a {type(dataset).__name__}, which has no length. Rows are read in random order: give a "
            "`datasets.Dataset`, not a stream."
        )
    columns = getattr(dataset, "column_names", None) or (list(dataset[0]) if len(dataset) else [])
    if "messages" not in columns and not {"prompt", "completion"} <= set(columns):
        raise ValueError(
            f"`{name}` has the columns {sorted(columns)}; it needs `messages`, or `prompt` and `completion`, in TRL's "
            "conversational format. LLaVA's, Alpaca's and other formats are converted by "
            "`latent_trl.data.formats.convert_row`."
        )
