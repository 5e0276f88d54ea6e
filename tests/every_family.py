"""A tiny model of every family in transformers' mappings of causal and of image-text-to-text models."""

import transformers
from tiny_configs import tiny_config
from tiny_models import build
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES,
)

NAMES = {"text": MODEL_FOR_CAUSAL_LM_MAPPING_NAMES, "vision": MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES}
SPECIAL: dict = {}


def build_family(kind: str, model_type: str):
    config = tiny_config(model_type, **SPECIAL.get(model_type, {}))
    return build(getattr(transformers, NAMES[kind][model_type]), config)


def image_inputs(): ...
