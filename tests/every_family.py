"""
A tiny model of every family in transformers' mappings of causal and of image-text-to-text models, and what holds on it.

`python tests/every_family.py` examines all of them, and writes the table `tests/models/every_family.json` and
the part of `docs/backbones.md` that is made from it. Names after it (`text/opt vision/llava`) examine these alone.
"""

import inspect
import json
import multiprocessing
import queue
import resource
import sys
from pathlib import Path
from typing import Any

import torch
import transformers
from tiny_configs import VOCAB_SIZE, tiny_config
from tiny_models import build
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES,
)

from latent_trl.commands.check_backbone import check_backbone

ROOT = Path(__file__).parents[1]
TABLE = Path(__file__).parent / "models" / "every_family.json"
PAGE = ROOT / "docs" / "backbones.md"
RELEASE = ".".join(transformers.__version__.split(".")[:2])
# Of processor time: a busy machine must not change the table.
CPU_SECONDS = 90
# Checks that may fail alone: the model then works without what they try.
PARTS = {
    "... with a static cache": "a static cache",
    "... without a cache": "generating without a cache",
    "several samples share a prompt": "several samples a prompt",
}
NAMES = {"text": MODEL_FOR_CAUSAL_LM_MAPPING_NAMES, "vision": MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES}
DECODER = {"is_decoder": True}
MAMBA = {"hidden_size": 32, "mamba_d_head": 8, "mamba_n_heads": 8, "mamba_expand": 2}
MROPE = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 1, 1], "partial_rotary_factor": 1.0}
COMPASS = {
    "layer_types": ["sliding_attention", "full_attention"],
    "rope_parameters": {
        kind: {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 1, 1]}
        for kind in ("sliding_attention", "full_attention")
    },
}
EMU3_TOKENS = {f"<|visual token {i:06d}|>": 24 + i for i in range(8)}
INDEXER = {
    **{"indexer_n_heads": 2, "indexer_kv_heads": 1, "indexer_head_dim": 8},
    **{"indexer_budget": 8, "indexer_compress_ratio": 2},
}
# What the general rule of `tiny_configs` cannot know: fields that must fit each other.
SPECIAL: dict[str, dict] = {
    "bailing_hybrid": {"num_expert_group": 1, "topk_group": 1},
    "bamba": {"attn_layer_indices": [1]},
    "chameleon": {"vocabulary_map": {"<image>": 3, "IMGIMGAZ": 20, "IMGIMGBZ": 21}},
    "cohere_compass": {"text_config": COMPASS},
    "cohere_compass_text": COMPASS,
    "dbrx": {"attn_config": {"rope_theta": 1e4, "clip_qkv": 8.0}},
    "dory": {
        **{"n_input_layers": 1, "n_recurrent_layers": 1, "n_output_layers": 1, "num_hidden_layers": 3},
        "layer_types": ["sliding_attention", "full_attention", "full_attention"],
    },
    "deepseek_v2": {"num_experts_per_tok": 2},
    "dots1": {"n_routed_experts": 4, "n_shared_experts": 1, "num_experts_per_tok": 2},
    "dots3_note": {"text_config": {"num_key_value_heads": 4}},
    "dots3_note_text": {"num_key_value_heads": 4},
    "glm5_next": {"text_config": {"qk_rope_head_dim": 0}},
    "hy_v4_vl": {"text_config": {"qk_rope_head_dim": 8}},
    "hrm_text": {"num_layers_per_stack": 1, "num_hidden_layers": 8},
    "emu3": {"vocabulary_map": {"<image>": 3, "<|extra_200|>": 22, **EMU3_TOKENS}},
    "ernie4_5_vl_moe": {"text_config": {"rope_parameters": {**MROPE, "mrope_section": [1, 1, 2]}}},
    "falcon_h1": {"mamba_d_ssm": 64, "mamba_n_heads": 8, "mamba_d_head": 8},
    "florence2": {"vision_config": {"num_heads": [2, 2], "num_groups": [2, 2]}},
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
    "molmo2": {"adapter_config": {"vision_feature_layer": [0, 1]}},
    "qwen4_exp": {"text_config": INDEXER},
    "qwen4_exp_text": INDEXER,
    "recurrent_gemma": {"block_types": ["recurrent", "attention"]},
    "rembert": {**DECODER, "input_embedding_size": 32, "output_embedding_size": 32},
    "reformer": {**DECODER, "axial_pos_embds": False},
    "rwkv": {"num_hidden_layers": 2, "attention_hidden_size": 32},
    "step3p7": {"text_config": {"sliding_window": 8}},
    "xlnet": {"d_head": 8},
    "xlstm": {"num_blocks": 2, "num_hidden_layers": 2},
    "xmod": {**DECODER, "languages": ["en_XX"], "default_language": "en_XX"},
    "zamba2": {"hybrid_layer_ids": [1]},
    "zaya": {"num_experts_per_tok": 1},
} | {
    name: DECODER
    for name in (
        *("bert", "bert-generation", "big_bird", "camembert", "data2vec-text", "electra", "ernie", "megatron-bert"),
        *("roberta", "roberta-prelayernorm", "roc_bert", "roformer", "xlm-roberta", "xlm-roberta-xl"),
    )
}

SPECIAL |= {
    name: {"text_config": {"rope_parameters": MROPE}}
    for name in (
        *("hunyuan_vl", "qwen2_vl", "qwen2_5_vl", "qwen2_5_omni_thinker", "paddleocr_vl"),
        *("glm46v", "glmga", "glm4v", "glm_ocr", "glm4v_moe"),
    )
}

# Wide weights magnify roundings: their recurrence over a chunk and over single steps then differs by .0002.
NARROW = ("nemotron_h",)
# The automatic classes find none for a configuration that has two names in their mapping.
BY_CLASS = ("evolla",)
# Families that cannot be built here, where the error would not say why.
NOT_BUILT: dict[str, str] = {
    name: "its vision tower is timm's, which needs torchvision" for name in ("fast_vlm", "gemma3n", "perception_lm")
}


def build_family(kind: str, model_type: str):
    """A tiny model with wide random weights."""
    auto = {"text": AutoModelForCausalLM, "vision": AutoModelForImageTextToText}[kind].from_config
    if model_type in BY_CLASS:
        auto = getattr(transformers, NAMES[kind][model_type])
    model = build(auto, tiny_config(model_type, **SPECIAL.get(model_type, {})))
    if model_type in NARROW:
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.ndim > 1:
                    parameter.mul_(0.5)
    return model


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
    yield {"pixel_values": draw(2, 3, SIDE, SIDE)}
    yield {"pixel_values": draw(2, 3, SIDE, SIDE), "image_sizes": sizes}
    yield {"pixel_values": draw(2, 2, 3, SIDE, SIDE), "image_sizes": sizes}
    yield {"pixel_values": draw(2, 1, 3, SIDE, SIDE), "image_sizes": sizes}
    for patch in (4, 8, 14, 16):
        for frames in (2, 1):
            grid = torch.tensor([[1, 4, 4]] * 2)
            names = ("image_grid_thw", "image_grid_hws", "grid_thw")
            yield {"pixel_values": draw(32, 3 * frames * patch * patch), **{name: grid for name in names}}


def examine(kind: str, model_type: str) -> dict[str, Any]:
    """
    What holds on a tiny model of a family.

    Returns:
        `status`: `works`, `refused` or `not built`; `reason` for the latter two; else `without`, what it works without,
        `images`, whether a batch with images was tried, and `decoder`, the kind of the components' layers.
    """
    if model_type in NOT_BUILT:
        return {"status": "not built", "reason": NOT_BUILT[model_type]}
    try:
        model = build_family(kind, model_type)
    except Exception as error:
        return {"status": "not built", "reason": _one_line(error)}
    try:
        with torch.no_grad():
            model(input_ids=torch.full((1, 4), 40))
    except Exception as error:
        # Text alone must be taken; what else is wrong lies in the tiny configuration, or in transformers.
        if not model.config.is_encoder_decoder:
            status = "refused" if "pixel" in str(error) else "not built"
            return {"status": status, "reason": f"its own forward of text alone fails: {_one_line(error)}"[:200]}
    inputs = image_inputs(model) if kind == "vision" else None
    results = check_backbone(model, inputs)
    failed = {check: detail for check, ok, detail in results if not ok}
    serious = [check for check in failed if check not in PARTS]
    if serious:
        detail = f"{serious[0]}: {failed[serious[0]]}"
        if serious[0] in ("its parts are found", "components are made"):
            detail = failed[serious[0]]
        return {"status": "refused", "reason": detail[:200]}
    made = next(detail for check, _, detail in results if check == "components are made")
    record: dict[str, Any] = {"status": "works", "decoder": "plain" if "plain" in made else "backbone"}
    record["without"] = [PARTS[check] for check in failed]
    return {**record, "images": inputs is not None} if kind == "vision" else record


def _one_line(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())}"[:200]


def _examine_apart(kind: str, model_type: str) -> dict[str, Any]:
    """In a process of its own, which may crash or take too long."""
    context = multiprocessing.get_context("fork")
    answers = context.Queue()

    def answer() -> None:
        resource.setrlimit(resource.RLIMIT_CPU, (CPU_SECONDS, CPU_SECONDS))
        answers.put(examine(kind, model_type))

    process = context.Process(target=answer)
    process.start()
    while answers.empty() and process.is_alive():
        process.join(timeout=0.2)
    try:
        return answers.get(timeout=1)
    except queue.Empty:
        return {"status": "not built", "reason": f"its process crashed, or took more than {CPU_SECONDS} s of one core"}
    finally:
        process.join()


def page_of(table: dict[str, Any]) -> str:
    """The part of the page that is made from the table."""
    lines = [f"Made by `python tests/every_family.py` with transformers {table['transformers']}.", ""]
    lines += ["| | works | of these without something | with images | plain layers | refused | not built |"]
    lines += ["|---|---|---|---|---|---|---|"]
    for kind in ("text", "vision"):
        records = table[kind].values()
        works = [r for r in records if r["status"] == "works"]
        counts = [len(works), sum(bool(r["without"]) for r in works)]
        counts.append(sum(r["images"] for r in works) if kind == "vision" else "")
        counts.append(sum(r["decoder"] == "plain" for r in works))
        counts += [sum(r["status"] == status for r in records) for status in ("refused", "not built")]
        lines.append(f"| {kind} | " + " | ".join(map(str, counts)) + " |")
    for kind in ("text", "vision"):
        lines += ["", f"**{kind.capitalize()}: works.** " + _names(table[kind])]
        lines += ["", f"| {kind} | | |", "|---|---|---|"]
        for name, record in table[kind].items():
            if record["status"] == "works" and record["without"]:
                lines.append(f"| {name} | works without {' and '.join(record['without'])} | |")
            elif record["status"] != "works":
                reason = record["reason"].replace("|", "/").replace("<", "").replace(">", "")
                lines.append(f"| {name} | {record['status']} | {reason} |")
    return "\n".join(lines) + "\n"


def _names(records: dict[str, Any]) -> str:
    names = []
    for name, record in records.items():
        if record["status"] == "works":
            marks = ("*" if record["decoder"] == "plain" else "") + ("†" if record.get("images") is False else "")
            names.append(name + marks.replace("*", "\\*"))
    return ", ".join(names) + "."


MARKS = ("<!-- every family -->\n", "<!-- end of every family -->\n")


def made_part() -> str:
    """What stands in the page."""
    return PAGE.read_text(encoding="utf-8").split(MARKS[0])[1].split(MARKS[1])[0]


def main(wanted: list[str]) -> None:
    table = json.loads(TABLE.read_text(encoding="utf-8")) if TABLE.exists() and wanted else {}
    table["transformers"] = RELEASE
    for kind, names in NAMES.items():
        records = table.setdefault(kind, {})
        for name in names:
            if not wanted or f"{kind}/{name}" in wanted:
                records[name] = _examine_apart(kind, name)
                print(kind, name, records[name], flush=True)
        table[kind] = dict(sorted(records.items()))
        TABLE.write_text(json.dumps(table, indent=1) + "\n", encoding="utf-8")
    before, _, rest = PAGE.read_text(encoding="utf-8").partition(MARKS[0])
    after = rest.partition(MARKS[1])[2]
    PAGE.write_text(before + MARKS[0] + page_of(table) + MARKS[1] + after, encoding="utf-8")


if __name__ == "__main__":
    main(sys.argv[1:])
