"""A tiny configuration of any model that transformers knows: its own default one with every size made small."""

import copy
from typing import Any

from transformers import CONFIG_MAPPING, AutoConfig, PreTrainedConfig

VOCAB_SIZE = 272
# What a field is set to wherever it stands, in a text model or a vision tower.
SIZES: dict[int, str] = {
    32: """
        hidden_size d_model n_embd dim embed_dim hidden_dim output_dim projection_dim out_hidden_size
        encoder_hidden_size dim_model word_embed_proj_dim embedding_size output_hidden_size
        qformer_hidden_size mm_hidden_size n_embed d_embed text_hidden_size lm_hidden_size
        attention_hidden_size decoder_hidden_size vision_hidden_size intermediate_hidden_size
        projector_hidden_size
    """,
    48: """
        intermediate_size ffn_dim encoder_ffn_dim decoder_ffn_dim n_inner d_ff dim_ff d_inner
        ffn_hidden_size intermediate_dim feed_forward_size inner_hidden_size feed_forward_hidden_size
        dense_intermediate_size intermediate_size_mlp vision_output_dim text_intermediate_size block_ff_dim
        projector_intermediate_size
    """,
    16: """
        moe_intermediate_size expert_ffn_hidden_size shared_expert_intermediate_size
        moe_shared_expert_intermediate_size expert_intermediate_size shared_intermediate_size
    """,
    2: """
        depth n_layer num_layers num_hidden_layers n_layers encoder_layers decoder_layers num_encoder_layers
        num_decoder_layers num_key_value_heads num_experts_per_tok num_experts_per_token moe_topk moe_k
        n_kv_heads n_group_topk top_k_experts multi_query_group_num spatial_merge_size num_global_layers
        temporal_patch_size num_kv_heads linear_num_key_heads num_global_key_value_heads
    """,
    4: """
        num_attention_heads n_head num_heads n_heads encoder_attention_heads decoder_attention_heads
        num_local_experts num_experts n_routed_experts linear_num_value_heads image_seq_length
        mm_tokens_per_image linear_num_heads moe_num_experts num_linear_heads
    """,
    1: """
        n_group topk_group first_k_dense_replace n_shared_experts num_shared_experts
        num_nextn_predict_layers
    """,
    8: """
        head_dim rotary_dim qk_nope_head_dim v_head_dim kv_channels attention_head_dim attention_head_size
        global_head_dim linear_key_head_dim linear_value_head_dim q_lora_rank kv_lora_rank sliding_window
        attention_window_size mamba_d_head mamba_d_state ssm_state_size local_window_size swa_head_dim
        window_size sliding_window_size
    """,
}
FIELDS = {name: value for value, names in SIZES.items() for name in names.split()}
FIELDS |= {
    "vocab_size": VOCAB_SIZE,
    "text_vocab_size": VOCAB_SIZE,
    "vocab_size_per_layer_input": VOCAB_SIZE,
    "unpadded_vocab_size": VOCAB_SIZE,
    "hidden_size_per_layer_input": 8,
    "max_position_embeddings": 256,
    "n_positions": 256,
    "max_seq_len": 256,
    "image_size": 16,
    "patch_size": 4,
    "qk_rope_head_dim": 4,
    "mamba_n_heads": 8,
    "mamba_num_heads": 8,
    "mamba_expand": 2,
    "mamba_d_ssm": 64,
    "expand": 2,
    "decoder_layerdrop": 0.0,
    "lru_width": 32,
    "mamba_head_dim": 8,
    "projection_dim": 32,
    "torch_dtype": None,
}
NEVER_NONE = ("head_dim", "num_key_value_heads")
# What a class says of itself or of a file, and not of a size.
LEFT_OUT = ("transformers_version", "architectures", "model_type", "_name_or_path", "dtype", "torch_dtype")


def tiny_config(model_type: str, **overrides: Any) -> PreTrainedConfig:
    """
    The default configuration of `model_type`, made small.

    Args:
        model_type (`str`): A key of transformers' `CONFIG_MAPPING`.
        overrides: Fields to set afterwards; a dict for a part (`text_config`) is merged into it.
    """
    config_class = CONFIG_MAPPING[model_type]
    return _tiny(config_class, config_class().to_dict(), overrides)


def _tiny(config_class: type[PreTrainedConfig], values: dict[str, Any], overrides: dict[str, Any]) -> PreTrainedConfig:
    values = {k: v for k, v in values.items() if k not in LEFT_OUT and not k.startswith("_")}
    overrides = copy.deepcopy(overrides)
    kept = _kept_layers(values)
    out: dict[str, Any] = {}
    for name, value in values.items():
        if name in config_class.sub_configs and (isinstance(value, dict) or isinstance(overrides.get(name), dict)):
            out[name] = _tiny_part(config_class, name, value or {}, overrides.pop(name, {}))
        elif isinstance(value, list) and len(value) == values.get("num_hidden_layers"):
            out[name] = [_tiny_value(name, value[layer]) for layer in kept]
        elif name == "per_layer_config" and isinstance(value, dict):
            fields = {int(layer): value[layer] for layer in value}
            out[name] = {
                place: {k: _tiny_value(k, v) for k, v in fields[layer].items()}
                for place, layer in enumerate(kept)
                if layer in fields
            }
        else:
            out[name] = _tiny_value(name, value)
    if "num_hidden_layers" in out:
        out["num_hidden_layers"] = len(kept)
    if "qk_rope_head_dim" in out and "head_dim" in out:
        out["head_dim"] = out["qk_rope_head_dim"]
    if "kv_lora_rank" in out and "num_key_value_heads" in out:
        out["num_key_value_heads"] = out["num_attention_heads"]
    out |= overrides
    return config_class(**{k: v for k, v in out.items() if v != DROP})


def _kept_layers(values: dict[str, Any]) -> list[int]:
    """The last layer of each kind, two at least, in their order."""
    count = values.get("num_hidden_layers") or 2
    kinds = [
        tuple(
            value[layer]
            for name, value in values.items()
            if name.endswith(("layer_types", "block_type")) and isinstance(value, list) and len(value) == count
        )
        for layer in range(count)
    ]
    last = sorted({kind: layer for layer, kind in enumerate(kinds)}.values())
    return last if len(last) > 1 else [*range(max(count - 2, 0), count)]


DROP = "<drop>"


def _tiny_part(config_class, name: str, value: dict[str, Any], overrides: dict[str, Any]) -> PreTrainedConfig:
    part = config_class.sub_configs[name]
    model_type = overrides.pop("model_type", None)
    if model_type or part is AutoConfig:
        part = CONFIG_MAPPING[model_type or value["model_type"]]
        value = {**part().to_dict(), **({} if model_type else value)}
    return _tiny(part, value or part().to_dict(), overrides)


def _tiny_value(name: str, value: Any) -> Any:
    if name in FIELDS and not isinstance(value, bool | list | dict | str):
        return FIELDS[name] if value is not None or name in NEVER_NONE else None
    if name in FIELDS and isinstance(value, list) and value and all(isinstance(v, int) for v in value):
        return [FIELDS[name]] * min(len(value), 2)
    if name.endswith(("token_id", "token_index")) and isinstance(value, int | list):
        return _special_id(name, value)
    if isinstance(value, dict) and "mrope_section" in value:
        whole = {"partial_rotary_factor": 1.0} if "partial_rotary_factor" in value else {}
        return {**value, "mrope_section": [2, 1, 1], **whole}
    return value


def _special_id(name: str, value: Any) -> int:
    known = {"pad": 0, "bos": 1, "eos": 2, "image": 3, "video": 4}
    first = name.split("_")[0]
    return known.get(first, 5 + sum(map(ord, name)) % 10)
