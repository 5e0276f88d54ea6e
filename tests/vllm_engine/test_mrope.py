"""Backbones with several coordinates a position (M-RoPE): prompts with two pictures, one, and none in one batch."""

import numpy as np
import pytest
import tiny_models
import torch
import transformers
from exact import LENGTH, SIZES, measured, register_classes, same_rows, with_codes
from PIL import Image

pytest.importorskip("torchvision", reason="vLLM reads pictures with torchvision")


# Of the 16 pairs of a head's numbers, those that turn with time, height and width.
ROPE = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [8, 4, 4]}


def processor(kind: str):
    from transformers.models.qwen2_vl.video_processing_qwen2_vl import Qwen2VLVideoProcessor

    sizes = {"patch_size": 4, "merge_size": 2, "min_pixels": 64, "max_pixels": 384}
    tokenizer = tiny_models.make_tokenizer()
    tokenizer.image_token, tokenizer.video_token = "<image>", "<video>"
    template = tiny_models.CHAT_TEMPLATE.replace("<image>", "<vision_start><image><vision_end>")
    parts = transformers.Qwen2VLImageProcessorPil(**sizes), tokenizer, Qwen2VLVideoProcessor(**sizes)
    return getattr(transformers, f"{kind}Processor")(*parts, chat_template=template)


@pytest.fixture
def build(monkeypatch, tmp_path):
    """A tiny model of a family in a folder, and its processor."""
    monkeypatch.setattr(tiny_models, "HIDDEN", SIZES["hidden_size"])

    def make(family: str, **config):
        kind = {"qwen2_vl": "Qwen2VL", "qwen2_5_vl": "Qwen2_5_VL"}[family]
        backbone = tiny_models.FAMILIES[family](**SIZES, rope_parameters=ROPE).model
        made = processor(kind)
        for part in (backbone, made):
            part.save_pretrained(tmp_path / "backbone")
        model = with_codes(type(backbone).from_pretrained(tmp_path / "backbone", dtype="float32"), **config)
        model.save_pretrained(tmp_path / "model")
        register_classes(f"{kind}ForConditionalGeneration", "LlamaForCausalLM")
        return model, made, str(tmp_path / "model")

    return make


def chats(made, rows: int = 12):
    random = np.random.default_rng(0)
    requests, inputs = [], []
    for i in range(rows):
        images = [Image.fromarray(random.integers(0, 255, (16, 24, 3), dtype=np.uint8)) for _ in range(i % 3)]
        content = [{"type": "image"}] * len(images) + [{"type": "text", "text": f"What is in picture {i}?"}]
        text = made.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)
        requests.append({"prompt": text} | ({"multi_modal_data": {"image": images}} if images else {}))
        inputs.append(made(text=[text], images=images or None, return_tensors="pt"))
    return requests, inputs


@pytest.mark.parametrize(
    "family, config",
    [
        ("qwen2_5_vl", {}),
        pytest.param("qwen2_vl", {}, marks=pytest.mark.slow),
        pytest.param("qwen2_5_vl", {"decoder_kind": "plain"}, marks=pytest.mark.slow),
    ],
)
def test_codes_are_those_of_generate(build, family, config):
    from latent_trl.vllm.engine import LatentActionEngine

    model, made, folder = build(family, **config)
    requests, inputs = chats(made)
    # Prompts in parts.
    limits = {"max_model_len": 256, "max_num_batched_tokens": 64, "max_num_seqs": 16}
    engine = LatentActionEngine(folder, **limits, limit_mm_per_prompt={"image": 2, "video": 0})
    try:
        settings = {"max_new_tokens": LENGTH, "stop_token_ids": [tiny_models.EOS]}
        answers = engine.generate(requests, action_do_sample=False, **settings)
        assert [answer.prompt_ids for answer in answers] == [one["input_ids"][0].tolist() for one in inputs]
        pictures = {name: [one.get(name) for one in inputs] for name in ("pixel_values", "image_grid_thw")}
        kinds = [one["mm_token_type_ids"] for one in inputs]
        assert same_rows(model, answers, ends=[tiny_models.EOS], mm_token_type_ids=kinds, **pictures) >= 0.99
        check(model, answers, pictures, kinds)
        with torch.no_grad():
            for parameter in model.policy.parameters():
                parameter.mul_(1.1)
        engine.update(model)
        drawn = engine.generate(requests, n=4, seed=1, action_sampling="arithmetic", **settings)
    finally:
        engine.close()
    pictures = {name: [value for value in values for _ in range(4)] for name, values in pictures.items()}
    check(model, drawn, pictures, [one for one in kinds for _ in range(4)])


def check(model, answers, pictures, kinds) -> None:
    later = [torch.zeros(1, len(answer.token_ids) - 1, dtype=torch.long) for answer in answers]
    whole = [torch.cat(parts, dim=1) for parts in zip(kinds, later, strict=True)]
    found = measured(model, answers, mm_token_type_ids=whole, **pictures)
    assert found.log_prob < 1e-3 and found.token < 1e-3 and found.outside == 0, found
