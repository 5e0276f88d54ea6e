"""Backbones and batches of the benchmarks: real layouts with random weights, made from configurations, no downloads."""

import argparse
import tempfile
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
import transformers
from datasets import Dataset
from measuring import CLOCKS
from PIL import Image
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedModel, PreTrainedTokenizerFast, ProcessorMixin, Qwen2VLImageProcessorPil
from transformers.models.qwen2_5_vl.processing_qwen2_5_vl import Qwen2_5_VLProcessor

SPECIAL = ["<pad>", "<bos>", "<eos>", "<image>", "<video>", "<vision_start>", "<vision_end>"]
PAD, BOS, EOS, IMAGE, VIDEO, VISION_START, VISION_END = range(7)
CHAT_TEMPLATE = (
    "{% for m in messages %}{{ m['role'] + ': ' }}{% if m['content'] is string %}{{ m['content'] }}{% else %}"
    "{% for part in m['content'] %}{% if part['type'] == 'image' %}<vision_start><image><vision_end>"
    "{% elif part['type'] == 'text' %}{{ part['text'] }}{% endif %}{% endfor %}{% endif %}"
    "{{ eos_token if m['role'] == 'assistant' else '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}assistant: {% endif %}"
)
QUESTION = "What can be seen in this picture, and where? "
ANSWER = "A garden behind a low wall, with two chairs under an old tree, and some children who play with a ball. "


@dataclass
class Preset:
    """
    A backbone's layout and a batch.

    Args:
        text (`dict`): Fields of the text configuration.
        vision (`dict`, *optional*): Fields of Qwen2.5-VL's vision configuration; `None` for a text model (Llama).
        prompts (`int`), generations (`int`): Prompts a batch, and completions a prompt (G).
        prompt_characters (`int`): Length of a prompt's text, one token a character.
        completion_length (`int`): Tokens of each completion.
        image_size (`int`): Side of the prompt's image in pixels.
        dtype (`torch.dtype`): Of the backbone.
        policy_layers (`int`): Depth of the policy; the paper's.
    """

    text: dict[str, Any]
    vision: dict[str, Any] | None
    prompts: int = 1
    generations: int = 8
    prompt_characters: int = 64
    completion_length: int = 64
    image_size: int = 224
    dtype: torch.dtype = torch.float32
    policy_layers: int = 8

    def of_text(self) -> "Preset":
        """The text model alone, with the usual positions."""
        text = {name: value for name, value in self.text.items() if name != "rope_parameters"}
        return replace(self, text=text, vision=None)

    def scaled_down(self) -> "Preset":
        """The same layout with tiny sizes, to see that a benchmark runs."""
        small = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "vocab_size": 512}
        small |= {"num_attention_heads": 4, "num_key_value_heads": 2}
        vision = self.vision and {**self.vision, "depth": 2, "hidden_size": 64, "intermediate_size": 64, "num_heads": 2}
        if vision:
            small["rope_parameters"] = {**self.text["rope_parameters"], "mrope_section": [2, 3, 3]}
            vision |= {"fullatt_block_indexes": [1]}
        return replace(
            self,
            text={**self.text, **small},
            vision=vision,
            generations=2,
            prompt_characters=8,
            completion_length=4,
            image_size=56,
            dtype=torch.float32,
            policy_layers=1,
        )


def qwen2_5_vl(hidden: int, intermediate: int, layers: int, heads: int, key_value_heads: int, **options) -> dict:
    half = hidden // heads // 2
    sections = [half // 4, 3 * half // 8, half - half // 4 - 3 * half // 8]
    return {
        "hidden_size": hidden,
        "intermediate_size": intermediate,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": key_value_heads,
        "vocab_size": 151_936,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e6, "mrope_section": sections},
        "max_position_embeddings": 32_768,
        "rms_norm_eps": 1e-6,
        "tie_word_embeddings": True,
        **options,
    }


def qwen_vision(depth: int, hidden: int, intermediate: int, heads: int, full_attention: list[int]) -> dict:
    fields = {"depth": depth, "hidden_size": hidden, "intermediate_size": intermediate, "num_heads": heads}
    return {**fields, "patch_size": 14, "window_size": 112, "fullatt_block_indexes": full_attention}


REAL_VISION = qwen_vision(32, 1280, 3420, 16, [7, 15, 23, 31])
GPU = {"completion_length": 256, "image_size": 448, "dtype": torch.bfloat16}
PRESETS = {
    # For rollouts of hundreds of rows on a CPU; the smallest heads that vLLM has kernels for.
    "micro": Preset(qwen2_5_vl(128, 384, 4, 4, 2, vocab_size=8192), qwen_vision(2, 64, 128, 2, [1]), policy_layers=2),
    # A small `small`, for curves over many sizes on a CPU.
    "mini": Preset(
        qwen2_5_vl(256, 768, 6, 4, 2, vocab_size=32_768),
        qwen_vision(2, 128, 256, 2, [1]),
        completion_length=32,
        policy_layers=4,
    ),
    "small": Preset(qwen2_5_vl(512, 1536, 12, 8, 2), qwen_vision(4, 256, 512, 4, [1, 3]), completion_length=32),
    "smollm": Preset(
        {
            "hidden_size": 576,
            "intermediate_size": 1536,
            "num_hidden_layers": 30,
            "num_attention_heads": 9,
            "num_key_value_heads": 3,
            "vocab_size": 49_152,
            "max_position_embeddings": 8192,
            "tie_word_embeddings": True,
        },
        None,
    ),
    "3b": Preset(qwen2_5_vl(2048, 11_008, 36, 16, 2), dict(REAL_VISION), **GPU),
    "7b": Preset(
        qwen2_5_vl(3584, 18_944, 28, 28, 4, vocab_size=152_064, tie_word_embeddings=False), dict(REAL_VISION), **GPU
    ),
}


def add_options(parser: argparse.ArgumentParser, preset: str, repeats: int) -> None:
    """What the benchmarks of steps and rollouts are told alike; `preset` and `repeats` are defaults."""
    parser.add_argument("--preset", choices=sorted(PRESETS), default=preset)
    parser.add_argument("--json", help="file to write")
    parser.add_argument("--repeats", type=int, default=repeats)
    parser.add_argument("--warmup", type=int, default=1)
    parser.add_argument("--device", help="cuda where there is one, else cpu")
    parser.add_argument("--clock", choices=sorted(CLOCKS), default="wall", help="cpu: processor time, for one thread")
    parser.add_argument("--quick", action="store_true", help="the preset's layout with tiny sizes")


def tokenizer() -> PreTrainedTokenizerFast:
    """One token a byte, padded on the left."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = Tokenizer(models.BPE(vocab={token: i for i, token in enumerate([*SPECIAL, *alphabet])}, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    fast = PreTrainedTokenizerFast(
        tokenizer_object=backend,
        pad_token="<pad>",
        bos_token="<bos>",
        eos_token="<eos>",
        padding_side="left",
        extra_special_tokens={"image_token": "<image>", "video_token": "<video>"},
    )
    fast.chat_template = CHAT_TEMPLATE
    return fast


class ImageOnlyProcessor(Qwen2_5_VLProcessor):
    """Qwen2.5-VL's processor without its video processor, which needs torchvision."""

    attributes = ["image_processor", "tokenizer"]

    def __init__(self, image_processor=None, tokenizer=None, chat_template=None, **kwargs):
        self.image_token, self.video_token = "<image>", "<video>"
        self.image_token_id, self.video_token_id = IMAGE, VIDEO
        self.image_ids, self.video_ids = [IMAGE], [VIDEO]
        ProcessorMixin.__init__(self, image_processor, tokenizer, chat_template=chat_template)


def processing_class(preset: Preset):
    if preset.vision is None:
        fast = tokenizer()
        fast.chat_template = CHAT_TEMPLATE.replace("<vision_start><image><vision_end>", "")
        return fast
    return ImageOnlyProcessor(Qwen2VLImageProcessorPil(), tokenizer(), chat_template=CHAT_TEMPLATE)


def build_backbone(preset: Preset, device: torch.device | str = "cpu", seed: int = 0) -> PreTrainedModel:
    """The preset's backbone with random weights, made on `device` in its dtype."""
    ids = {"pad_token_id": PAD, "bos_token_id": BOS, "eos_token_id": EOS}
    if preset.vision is None:
        config, cls = transformers.LlamaConfig(**preset.text, **ids), transformers.LlamaForCausalLM
    else:
        config = transformers.Qwen2_5_VLConfig(
            text_config={**preset.text, **ids},
            vision_config={**preset.vision, "out_hidden_size": preset.text["hidden_size"]},
            image_token_id=IMAGE,
            video_token_id=VIDEO,
            vision_start_token_id=VISION_START,
            vision_end_token_id=VISION_END,
            tie_word_embeddings=preset.text["tie_word_embeddings"],
            **ids,
        )
        cls = transformers.Qwen2_5_VLForConditionalGeneration
    torch.manual_seed(seed)
    default = torch.get_default_dtype()
    torch.set_default_dtype(preset.dtype)
    try:
        with torch.device(device):
            model = cls(config)
    finally:
        torch.set_default_dtype(default)
    model.generation_config = transformers.GenerationConfig(pad_token_id=PAD, bos_token_id=BOS, eos_token_id=EOS)
    return model.eval()


def in_four_bits(model: PreTrainedModel) -> PreTrainedModel:
    """The model with its linear maps in 4 bits (NF4). By way of a folder: transformers quantises while it loads."""
    quantization = transformers.BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=model.dtype,
    )
    kind, dtype, device, generation = type(model), model.dtype, model.device, model.generation_config
    with tempfile.TemporaryDirectory() as folder:
        model.to("cpu").save_pretrained(folder)
        model = kind.from_pretrained(
            folder, quantization_config=quantization, dtype=dtype, device_map={"": device}
        ).eval()
    model.generation_config = generation
    # The folder is gone: nobody is to look for it.
    model.config._name_or_path = ""
    return model


def picture(size: int, seed: int) -> Image.Image:
    pixels = np.random.default_rng(seed).integers(0, 255, (size, size, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


def prompt_rows(preset: Preset, count: int) -> Dataset:
    """Prompts of equal length, each with an image of its own where the preset has vision."""
    text = (QUESTION * (preset.prompt_characters // len(QUESTION) + 1))[: max(preset.prompt_characters - 4, 1)]
    rows = [{"prompt": [{"role": "user", "content": f"{i:04d}{text}"}]} for i in range(count)]
    if preset.vision is not None:
        rows = [{**row, "images": [picture(preset.image_size, i)]} for i, row in enumerate(rows)]
    return Dataset.from_list(rows)


def answered_rows(preset: Preset, count: int) -> list[dict[str, Any]]:
    """The same prompts with an answer of the preset's completion length, for learning."""
    answer = (ANSWER * (preset.completion_length // len(ANSWER) + 1))[: preset.completion_length]
    rows = prompt_rows(preset, count)
    return [{**row, "messages": [*row["prompt"], {"role": "assistant", "content": answer}]} for row in rows]
