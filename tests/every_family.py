"""A tiny model of every family in transformers' mappings of causal and of image-text-to-text models."""

import inspect

import torch
import transformers
from tiny_configs import VOCAB_SIZE, tiny_config
from tiny_models import build
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES,
)

NAMES = {"text": MODEL_FOR_CAUSAL_LM_MAPPING_NAMES, "vision": MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES}
DECODER = {"is_decoder": True}
MAMBA = {"hidden_size": 32, "mamba_d_head": 8, "mamba_n_heads": 8, "mamba_expand": 2}
# What the general rule of `tiny_configs` cannot know: fields that must fit each other.
SPECIAL: dict[str, dict] = {
    "bamba": {"attn_layer_indices": [1]},
    "dory": {"n_input_layers": 1, "n_recurrent_layers": 1, "n_output_layers": 1, "num_hidden_layers": 3},
    "deepseek_v2": {"num_experts_per_tok": 2},
    "dots1": {"n_routed_experts": 4, "n_shared_experts": 1, "num_experts_per_tok": 2},
    "dots3_note": {"text_config": {"num_key_value_heads": 4}},
    "dots3_note_text": {"num_key_value_heads": 4},
    "fast_vlm": {},
    "glm5_next": {"text_config": {"qk_rope_head_dim": 0}},
    "hy_v4_vl": {"text_config": {"qk_rope_head_dim": 8}},
    "hrm_text": {},
    "falcon_h1": {"mamba_d_ssm": 64, "mamba_n_heads": 8, "mamba_d_head": 8},
    "gemma3n": {"text_config": {"activation_sparsity_pattern": [0.0, 0.0]}},
    "gemma3n_text": {"num_kv_shared_layers": 0, "activation_sparsity_pattern": [0.0, 0.0]},
    "gemma4_assistant": {"text_config": {"hidden_size_per_layer_input": 0}},
    "gpt_neo": {"attention_types": [[["global", "local"], 1]], "attention_layers": "<drop>", "num_layers": 2},
    "granitemoehybrid": {"layer_types": ["mamba", "attention"]},
    "jamba": {"attn_layer_offset": 1, "attn_layer_period": 2, "expert_layer_period": 2, "expert_layer_offset": 1},
    "laguna": {"num_attention_heads_per_layer": [4, 4]},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"]},
    "longcat_flash": {"head_dim": 4, "qk_head_dim": 12},
    "mamba2": {"num_heads": 8, "head_dim": 8},
    "recurrent_gemma": {"block_types": ["recurrent", "attention"]},
    "rembert": {**DECODER, "input_embedding_size": 32, "output_embedding_size": 32},
    "reformer": {**DECODER, "axial_pos_embds": False},
    "rwkv": {"num_hidden_layers": 2, "attention_hidden_size": 32},
    "xlnet": {"d_head": 8},
    "xlstm": {"num_blocks": 2, "num_hidden_layers": 2},
    "xmod": {**DECODER, "languages": ["en_XX"], "default_language": "en_XX"},
    "zaya": {"num_experts_per_tok": 1},
} | {
    name: DECODER
    for name in (
        *("bert", "bert-generation", "big_bird", "camembert", "data2vec-text", "electra", "ernie", "megatron-bert"),
        *("roberta", "roberta-prelayernorm", "roc_bert", "roformer", "xlm-roberta", "xlm-roberta-xl"),
    )
}


def build_family(kind: str, model_type: str):
    """A tiny model with wide random weights."""
    config = tiny_config(model_type, **SPECIAL.get(model_type, {}))
    return build(getattr(transformers, NAMES[kind][model_type]), config)


SIDE = 16


def image_inputs(model) -> dict[str, torch.Tensor] | None:
    """
    A batch of two rows with an image each, padded on the left; `None` when none of the usual layouts fits.

    Layouts of pixels and numbers of placeholders are tried in turn. One fits when the model takes it, and its logits
    depend on the pixels.
    """
    image = model.config.to_dict().get("image_token_id", model.config.to_dict().get("image_token_index"))
    if not isinstance(image, int):
        return None
    taken = inspect.signature(model.forward).parameters
    for pixels in _pixel_layouts():
        for count in (4, 1, 16, 6, 2, 9, 8, 3, 5, 10, 12, 18, 20, 24, 32, 36, 64):
            inputs = {**_rows(image, count), **{k: v for k, v in pixels.items() if k in taken}}
            for name in ("mm_token_type_ids", "token_type_ids"):
                if name in taken:
                    inputs[name] = (inputs["input_ids"] == image).long()
            try:
                with torch.no_grad():
                    logits = model(**inputs).logits
                    other = model(**{**inputs, "pixel_values": -inputs["pixel_values"]}).logits
            except Exception:
                continue
            if logits.shape[1] == inputs["input_ids"].shape[1] and not torch.equal(logits, other):
                return inputs
    return None


def _rows(image: int, count: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    text = torch.randint(32, VOCAB_SIZE, (2, 7), generator=generator)
    ids = torch.cat([text[:, :3], torch.full((2, count), image), text[:, 3:]], dim=1)
    mask = torch.ones_like(ids)
    ids[0, :2], mask[0, :2] = 0, 0
    return {"input_ids": ids, "attention_mask": mask}


def _pixel_layouts():
    """Of two images: whole, in tiles, by row, and as patches of a grid."""
    generator = torch.Generator().manual_seed(2)

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator)

    sizes = torch.tensor([[SIDE, SIDE]] * 2)
    yield {"pixel_values": draw(2, 3, SIDE, SIDE), "image_sizes": sizes}
    yield {"pixel_values": draw(2, 2, 3, SIDE, SIDE), "image_sizes": sizes}
    yield {"pixel_values": draw(2, 1, 3, SIDE, SIDE), "image_sizes": sizes}
    for patch in (4, 8, 14, 16):
        for frames in (2, 1):
            grid = torch.tensor([[1, 4, 4]] * 2)
            names = ("image_grid_thw", "image_grid_hws", "grid_thw")
            yield {"pixel_values": draw(32, 3 * frames * patch * patch), **{name: grid for name in names}}
