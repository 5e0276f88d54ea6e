"""
Tiny random models of many families, made in memory from their configurations, with example inputs.

`FAMILIES[name](**text_config_fields)` gives a [`TinyModel`]. Weights are drawn wide, so that greedy text varies.
"""

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedModel, PreTrainedTokenizerFast

SPECIAL = ["<pad>", "<bos>", "<eos>", "<image>", "<video>", "<vision_start>", "<vision_end>"]
PAD, BOS, EOS, IMAGE, VIDEO, VISION_START, VISION_END = range(7)
SPECIAL += ["<fake_token_around_image>", "<global-img>", "<end_of_utterance>"]
SPECIAL += [f"<unused{i}>" for i in range(16 - len(SPECIAL))]
VOCAB_SIZE = len(SPECIAL) + 256
HIDDEN = 32
CHAT_TEMPLATE = (
    "{% for m in messages %}{{ m['role'] + ': ' }}{% if m['content'] is string %}{{ m['content'] }}{% else %}"
    "{% for part in m['content'] %}{% if part['type'] == 'image' %}<image>{% elif part['type'] == 'text' %}"
    "{{ part['text'] }}{% endif %}{% endfor %}{% endif %}{{ eos_token if m['role'] == 'assistant' else '\n' }}"
    "{% endfor %}{% if add_generation_prompt %}assistant: {% endif %}"
)


@dataclass
class TinyModel:
    """
    Args:
        model (`PreTrainedModel`): In evaluation mode, float32.
        inputs (`dict`): A batch padded on the left; for a VLM with 1, 0 and 2 images a row.
        text_inputs (`dict`): A batch padded on the left, without images.
        processor: Processor of a VLM or tokenizer of a text model.
        later_type (`int`): What a completion token's entry is in `token_type_ids`, where the model takes them.
    """

    model: PreTrainedModel
    inputs: dict[str, torch.Tensor]
    text_inputs: dict[str, torch.Tensor]
    processor: Any = None
    later_type: int = 0

    def extended(self, inputs: dict[str, torch.Tensor], sequences: torch.Tensor) -> dict[str, torch.Tensor]:
        """`inputs` of prompts, for whole `sequences` `[B, P+C]`."""
        length = sequences.shape[1] - inputs["input_ids"].shape[1]
        rows = len(sequences)
        out = {**inputs, "input_ids": sequences}
        for name, later in (("attention_mask", 1), ("mm_token_type_ids", 0), ("token_type_ids", self.later_type)):
            if name in inputs:
                out[name] = torch.cat([inputs[name], inputs[name].new_full((rows, length), later)], dim=1)
        return out


def make_tokenizer() -> PreTrainedTokenizerFast:
    """Bytes and a few special tokens; padding on the left, a chat template with images."""
    vocab = {token: i for i, token in enumerate([*SPECIAL, *sorted(pre_tokenizers.ByteLevel.alphabet())])}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        bos_token="<bos>",
        eos_token="<eos>",
        padding_side="left",
        extra_special_tokens={
            "image_token": "<image>",
            "video_token": "<video>",
            "boi_token": "<vision_start>",
            "eoi_token": "<vision_end>",
            "fake_image_token": "<fake_token_around_image>",
            "global_image_token": "<global-img>",
            "end_of_utterance_token": "<end_of_utterance>",
        },
    )
    fast.chat_template = CHAT_TEMPLATE
    return fast


def batch(prefixes: list[list[int]], seed: int = 0) -> dict[str, torch.Tensor]:
    """Rows of different lengths, each a prefix and random text, padded on the left."""
    generator = torch.Generator().manual_seed(seed)
    rows = []
    for i, prefix in enumerate(prefixes):
        text = torch.randint(len(SPECIAL), VOCAB_SIZE, (4 + 3 * (i % 3),), generator=generator).tolist()
        rows.append([BOS, *text[:2], *prefix, *text[2:]])
    length = max(map(len, rows))
    ids = torch.tensor([[PAD] * (length - len(row)) + row for row in rows])
    mask = torch.tensor([[0] * (length - len(row)) + [1] * len(row) for row in rows])
    return {"input_ids": ids, "attention_mask": mask}


def text_batch() -> dict[str, torch.Tensor]:
    return batch([[], [], []], seed=1)


def pixels(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(2))


def build(cls: type[PreTrainedModel], config, seed: int = 0) -> PreTrainedModel:
    """A model of `config` with wide random weights."""
    state = torch.get_rng_state()
    torch.manual_seed(seed)
    model = cls(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.normal_(std=parameter.shape[-1] ** -0.5)
    torch.set_rng_state(state)
    model.generation_config.pad_token_id = PAD
    return model


def text_fields(**options) -> dict[str, Any]:
    return {
        "vocab_size": VOCAB_SIZE,
        "hidden_size": HIDDEN,
        "intermediate_size": 48,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 256,
        "pad_token_id": PAD,
        "bos_token_id": BOS,
        "eos_token_id": EOS,
        "tie_word_embeddings": False,
        **options,
    }


# Text models


def causal(kind: str, head: str = "ForCausalLM", **fields) -> TinyModel:
    config = getattr(transformers, f"{kind}Config")(**fields)
    inputs = text_batch()
    return TinyModel(build(getattr(transformers, kind + head), config), inputs, inputs, make_tokenizer())


def llama(**options) -> TinyModel:
    return causal("Llama", **text_fields(**options))


def qwen2(**options) -> TinyModel:
    return causal("Qwen2", **text_fields(**options))


def qwen3(**options) -> TinyModel:
    return causal("Qwen3", **text_fields(**{"head_dim": 8, **options}))


def gemma(**options) -> TinyModel:
    return causal("Gemma", **text_fields(**{"head_dim": 8, **options}))


def gemma2(**options) -> TinyModel:
    """Soft-capped logits, and a sliding window in every other layer that is shorter than the prompts."""
    fields = {"head_dim": 8, "sliding_window": 6, "final_logit_softcapping": 3.0, "attn_logit_softcapping": 5.0}
    return causal("Gemma2", **text_fields(**{**fields, "query_pre_attn_scalar": 8, **options}))


def gpt2(**options) -> TinyModel:
    names = {"hidden_size": "n_embd", "num_hidden_layers": "n_layer", "num_attention_heads": "n_head"}
    names |= {"max_position_embeddings": "n_positions", "intermediate_size": "n_inner"}
    fields = text_fields(**options)
    fields.pop("num_key_value_heads")
    return causal("GPT2", "LMHeadModel", **{names.get(name, name): value for name, value in fields.items()})


def mistral(**options) -> TinyModel:
    """A sliding window that is shorter than the prompts."""
    return causal("Mistral", **text_fields(**{"sliding_window": 6, **options}))


def phi(**options) -> TinyModel:
    return causal("Phi", **text_fields(**options))


def cohere(**options) -> TinyModel:
    """Scaled logits."""
    return causal("Cohere", **text_fields(**{"logit_scale": 0.25, **options}))


def granite(**options) -> TinyModel:
    """Scaled logits, embeddings and residuals."""
    fields = {"logits_scaling": 3.0, "embedding_multiplier": 2.0, "residual_multiplier": 0.5}
    return causal("Granite", **text_fields(**{**fields, "attention_multiplier": 0.3, **options}))


# Vision-language models

IMAGES = (1, 0, 2)


def vlm(cls, config, image_ids: list[int], images, extra: Callable[[int], dict], processor=None, **kwargs) -> TinyModel:
    """`image_ids` stand for one image in a row; `extra(n)` gives the pixels of n images."""
    inputs = {**batch([image_ids * n for n in images]), **extra(sum(images))}
    return TinyModel(build(cls, config), inputs, text_batch(), processor, **kwargs)


def vision_fields(**options) -> dict[str, Any]:
    return {
        "hidden_size": 16,
        "intermediate_size": 24,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "image_size": 16,
        "patch_size": 8,
        **options,
    }


def mrope(**options) -> dict[str, Any]:
    rope = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 1, 1]}
    return text_fields(**{"rope_parameters": rope, **options})


def vision_ids() -> dict[str, int]:
    return {
        "image_token_id": IMAGE,
        "video_token_id": VIDEO,
        "vision_start_token_id": VISION_START,
        "vision_end_token_id": VISION_END,
        "pad_token_id": PAD,
        "bos_token_id": BOS,
        "eos_token_id": EOS,
    }


def image_only(kind: str, image_processor, chat_template: str = CHAT_TEMPLATE, **fields):
    """The processor class `kind` without videos: the stock ones want a video processor, and so torchvision."""
    from transformers import ProcessorMixin

    fields |= {"image_token": "<image>", "image_token_id": IMAGE, "video_token": "<video>", "video_token_id": VIDEO}

    class ImageOnlyProcessor(getattr(transformers, kind)):
        attributes = ["image_processor", "tokenizer"]
        image_token_ids = image_ids = [IMAGE]
        video_ids = [VIDEO]

        def __init__(self, image_processor=None, tokenizer=None, chat_template=None, **kwargs):
            for name, value in fields.items():
                setattr(self, name, value)
            ProcessorMixin.__init__(self, image_processor, tokenizer, chat_template=chat_template)

        def apply_chat_template(self, *args, **kwargs):
            # Some classes ask the video processor for its settings here.
            return ProcessorMixin.apply_chat_template(self, *args, **kwargs)

    return ImageOnlyProcessor(image_processor, make_tokenizer(), chat_template=chat_template)


def _grid_vlm(kind: str, vision: dict[str, Any], patch: int, images, **options) -> TinyModel:
    """Images of 4 x 6 patches, merged 2 x 2 into 6 tokens."""
    text = mrope(**options)
    config = getattr(transformers, f"{kind}Config")(
        text_config=text, vision_config=vision, tie_word_embeddings=text["tie_word_embeddings"], **vision_ids()
    )

    def extra(count: int) -> dict[str, torch.Tensor]:
        grid = torch.tensor([[1, 4, 6]] * count)
        return {"pixel_values": pixels(24 * count, 3 * 2 * patch * patch), "image_grid_thw": grid}

    cls = getattr(transformers, f"{kind}ForConditionalGeneration")
    tiny = vlm(cls, config, [VISION_START, *[IMAGE] * 6, VISION_END], images, extra, grid_processor(kind))
    tiny.inputs["mm_token_type_ids"] = (tiny.inputs["input_ids"] == IMAGE).long()
    return tiny


def qwen2_vl(images=IMAGES, **options) -> TinyModel:
    vision = {"depth": 2, "embed_dim": 16, "hidden_size": HIDDEN, "num_heads": 2, "patch_size": 4, "mlp_ratio": 2}
    return _grid_vlm("Qwen2VL", vision, 4, images, **options)


def qwen2_5_vl(images=IMAGES, **options) -> TinyModel:
    vision = {"depth": 2, "hidden_size": 16, "intermediate_size": 24, "num_heads": 2, "patch_size": 4}
    vision |= {"out_hidden_size": HIDDEN, "window_size": 16, "fullatt_block_indexes": [1]}
    return _grid_vlm("Qwen2_5_VL", vision, 4, images, **options)


def qwen3_vl(images=IMAGES, **options) -> TinyModel:
    vision = {"depth": 2, "hidden_size": 16, "intermediate_size": 24, "num_heads": 2, "patch_size": 4}
    vision |= {"out_hidden_size": HIDDEN, "num_position_embeddings": 16, "deepstack_visual_indexes": [0, 1]}
    return _grid_vlm("Qwen3VL", vision, 4, images, **{"head_dim": 8, **options})


def grid_processor(kind: str):
    images = transformers.Qwen2VLImageProcessorPil(patch_size=4, merge_size=2, min_pixels=64, max_pixels=384)
    template = CHAT_TEMPLATE.replace("<image>", "<vision_start><image><vision_end>")
    return image_only(f"{kind}Processor", images, template)


def _tile_vlm(kind: str, images, processor=None, **options) -> TinyModel:
    """One tile an image, 16 patches shuffled into 4 tokens; rows padded with empty images, as the processor does."""
    text = text_fields(**options)
    config = getattr(transformers, f"{kind}Config")(
        text_config={"model_type": "llama", **text},
        vision_config=vision_fields(patch_size=4),
        scale_factor=2,
        image_token_id=IMAGE,
        pad_token_id=PAD,
        tie_word_embeddings=text["tie_word_embeddings"],
    )
    cls = getattr(transformers, f"{kind}ForConditionalGeneration")
    tiny = vlm(cls, config, [IMAGE] * 4, images, lambda n: {}, processor)
    values = torch.zeros(len(images), max(images), 3, 16, 16)
    mask = torch.zeros(len(images), max(images), 16, 16, dtype=torch.long)
    for row, count in enumerate(images):
        values[row, :count], mask[row, :count] = pixels(count, 3, 16, 16), 1
    tiny.inputs |= {"pixel_values": values, "pixel_attention_mask": mask}
    return tiny


def idefics3(images=IMAGES, **options) -> TinyModel:
    processor = transformers.Idefics3Processor(
        transformers.Idefics3ImageProcessorPil(
            do_image_splitting=False, size={"longest_edge": 16}, max_image_size={"longest_edge": 16}
        ),
        make_tokenizer(),
        image_seq_len=4,
        chat_template=CHAT_TEMPLATE,
    )
    return _tile_vlm("Idefics3", images, processor, **options)


def smolvlm(images=IMAGES, **options) -> TinyModel:
    processor = image_only(
        "SmolVLMProcessor",
        transformers.SmolVLMImageProcessorPil(
            do_image_splitting=False, size={"longest_edge": 16}, max_image_size={"longest_edge": 16}
        ),
        image_seq_len=4,
        fake_image_token="<fake_token_around_image>",
        global_image_token="<global-img>",
    )
    return _tile_vlm("SmolVLM", images, processor, **options)


def llava(images=IMAGES, **options) -> TinyModel:
    text = text_fields(**options)
    config = transformers.LlavaConfig(
        text_config={"model_type": "llama", **text},
        vision_config={"model_type": "clip_vision_model", **vision_fields(projection_dim=16)},
        image_token_index=IMAGE,
        image_seq_length=4,
        vision_feature_layer=-1,
        tie_word_embeddings=text["tie_word_embeddings"],
    )
    processor = transformers.LlavaProcessor(
        transformers.CLIPImageProcessorPil(
            size={"height": 16, "width": 16}, crop_size={"height": 16, "width": 16}, do_center_crop=False
        ),
        make_tokenizer(),
        patch_size=8,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=CHAT_TEMPLATE,
    )
    cls = transformers.LlavaForConditionalGeneration
    return vlm(cls, config, [IMAGE] * 4, images, lambda n: {"pixel_values": pixels(n, 3, 16, 16)}, processor)


def llava_onevision(images=IMAGES, **options) -> TinyModel:
    """The whole image and one tile: 4 tokens, and 4 tokens with a line break after each of 2 rows."""
    text = text_fields(**options)
    config = transformers.LlavaOnevisionConfig(
        text_config={"model_type": "qwen2", **text},
        vision_config={"model_type": "siglip_vision_model", **vision_fields(vision_use_head=False)},
        image_token_index=IMAGE,
        video_token_index=VIDEO,
        image_grid_pinpoints=[[16, 16]],
        tie_word_embeddings=text["tie_word_embeddings"],
    )

    def extra(count: int) -> dict[str, torch.Tensor]:
        return {"pixel_values": pixels(count, 2, 3, 16, 16), "image_sizes": torch.tensor([[16, 16]] * count)}

    processor = image_only(
        "LlavaOnevisionProcessor",
        transformers.LlavaOnevisionImageProcessorPil(size={"height": 16, "width": 16}, image_grid_pinpoints=[[16, 16]]),
        num_image_tokens=4,
        vision_feature_select_strategy="full",
        vision_aspect_ratio="anyres_max_9",
    )
    cls = transformers.LlavaOnevisionForConditionalGeneration
    return vlm(cls, config, [IMAGE] * 10, images, extra, processor)


def gemma3(images=IMAGES, **options) -> TinyModel:
    """Image tokens see each other both ways; a sliding window in some layers."""
    text = text_fields(
        **{"head_dim": 8, "query_pre_attn_scalar": 8, "sliding_window": 8, "tie_word_embeddings": True, **options}
    )
    text.setdefault("layer_types", ["sliding_attention"] * (text["num_hidden_layers"] - 1) + ["full_attention"])
    config = transformers.Gemma3Config(
        text_config=text,
        vision_config=vision_fields(patch_size=4, vision_use_head=False),
        mm_tokens_per_image=4,
        image_token_index=IMAGE,
        boi_token_index=VISION_START,
        eoi_token_index=VISION_END,
        pad_token_id=PAD,
        eos_token_id=EOS,
        tie_word_embeddings=text["tie_word_embeddings"],
    )
    processor = transformers.Gemma3Processor(
        transformers.Gemma3ImageProcessorPil(size={"height": 16, "width": 16}),
        make_tokenizer(),
        image_seq_length=4,
        chat_template=CHAT_TEMPLATE.replace("<image>", "<vision_start>"),
    )
    cls = transformers.Gemma3ForConditionalGeneration
    ids = [VISION_START, *[IMAGE] * 4, VISION_END]
    tiny = vlm(cls, config, ids, images, lambda n: {"pixel_values": pixels(n, 3, 16, 16)}, processor)
    tiny.inputs["token_type_ids"] = (tiny.inputs["input_ids"] == IMAGE).long()
    return tiny


def internvl(images=IMAGES, **options) -> TinyModel:
    text = text_fields(**options)
    config = transformers.InternVLConfig(
        text_config={"model_type": "qwen2", **text},
        vision_config=vision_fields(image_size=[16, 16], patch_size=[4, 4]),
        image_token_id=IMAGE,
        image_seq_length=4,
        tie_word_embeddings=text["tie_word_embeddings"],
    )
    processor = image_only(
        "InternVLProcessor",
        transformers.GotOcr2ImageProcessorPil(size={"height": 16, "width": 16}, min_patches=1, max_patches=1),
        image_seq_length=4,
        start_image_token="<vision_start>",
        end_image_token="<vision_end>",
        multimodal_pattern=re.compile("(?P<image><image>)|(?P<video><video>)"),
    )
    cls = transformers.InternVLForConditionalGeneration
    return vlm(cls, config, [IMAGE] * 4, images, lambda n: {"pixel_values": pixels(n, 3, 16, 16)}, processor)


def paligemma(images=IMAGES, **options) -> TinyModel:
    """The whole prompt is seen both ways."""
    text = text_fields(**{"head_dim": 8, "tie_word_embeddings": True, **options})
    config = transformers.PaliGemmaConfig(
        text_config={"model_type": "gemma", **text},
        vision_config={"model_type": "siglip_vision_model", **vision_fields(vision_use_head=False)},
        image_token_index=IMAGE,
        projection_dim=HIDDEN,
        hidden_size=HIDDEN,
        pad_token_id=PAD,
        tie_word_embeddings=text["tie_word_embeddings"],
    )
    cls = transformers.PaliGemmaForConditionalGeneration
    extra = {"pixel_values": pixels(sum(images), 3, 16, 16)} if sum(images) else {}
    # The stock class takes no batch of prompts of different lengths without padding, which TRL asks for.
    processor = image_only(
        "ProcessorMixin",
        transformers.SiglipImageProcessorPil(size={"height": 16, "width": 16}),
        replace_image_token=lambda *_, **__: "<image>" * 4,
    )
    processor.tokenizer.model_input_names = ["input_ids", "token_type_ids", "attention_mask"]
    tiny = vlm(cls, config, [IMAGE] * 4, images, lambda n: extra, processor, later_type=1)
    tiny.inputs["token_type_ids"] = torch.zeros_like(tiny.inputs["input_ids"])
    return tiny


def mistral3(images=IMAGES, **options) -> TinyModel:
    text = text_fields(**{"head_dim": 8, "sliding_window": None, **options})
    config = transformers.Mistral3Config(
        text_config={"model_type": "mistral", **text},
        vision_config={"model_type": "pixtral", **vision_fields(patch_size=4, head_dim=8)},
        image_token_index=IMAGE,
        spatial_merge_size=2,
        tie_word_embeddings=text["tie_word_embeddings"],
    )

    def extra(count: int) -> dict[str, torch.Tensor]:
        return {"pixel_values": pixels(count, 3, 16, 16), "image_sizes": torch.tensor([[16, 16]] * count)}

    processor = image_only(
        "ProcessorMixin",
        transformers.PixtralImageProcessorPil(size={"longest_edge": 16}, patch_size={"height": 8, "width": 8}),
        replace_image_token=lambda *_, **__: "<image><image><vision_start><image><image><vision_end>",
    )
    return vlm(transformers.Mistral3ForConditionalGeneration, config, [IMAGE] * 4, images, extra, processor)


TEXT_FAMILIES = {f.__name__: f for f in (llama, qwen2, qwen3, gemma, gemma2, gpt2, mistral, phi, cohere, granite)}
VLM_FAMILIES = {
    f.__name__: f
    for f in (
        qwen2_vl,
        qwen2_5_vl,
        qwen3_vl,
        idefics3,
        smolvlm,
        llava,
        llava_onevision,
        gemma3,
        internvl,
        paligemma,
        mistral3,
    )
}
FAMILIES: dict[str, Callable[..., TinyModel]] = {**TEXT_FAMILIES, **VLM_FAMILIES}


# Latent action models


def latent_config(**options):
    """Small components: 16 codes, 1 and 2 decoder layers."""
    from latent_trl import LatentActionConfig

    fields = {"num_codes": 16, "world_model_intermediate_size": 24}
    fields |= {"inverse_dynamics_decoder": {"num_hidden_layers": 1}, "policy_decoder": {"num_hidden_layers": 2}}
    return LatentActionConfig(**{**fields, **options})


def perturb(model, std: float = 0.15, seed: int = 3) -> None:
    """Adds noise to every component, so that none is at its neutral start."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name in model.component_classes:
            component = getattr(model, name)
            if component is None or name == "codebook":
                continue
            for parameter in component.parameters():
                noise = torch.randn(parameter.shape, generator=generator) * std
                parameter.add_(noise.to(parameter))


def latent(family: str = "llava", config=None, perturbed: bool = True, **options):
    """A latent action model on a tiny backbone of its own, and the [`TinyModel`] that holds its example inputs."""
    from latent_trl import LatentActionModel

    tiny = FAMILIES[family](**options)
    state = torch.get_rng_state()
    torch.manual_seed(4)
    model = LatentActionModel.from_backbone(tiny.model, config or latent_config()).eval()
    torch.set_rng_state(state)
    if perturbed:
        perturb(model)
    return model, tiny
