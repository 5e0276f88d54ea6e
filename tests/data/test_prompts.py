"""Prompts for `generate` are what the processor's own chat template and padding on the left give."""

import pytest
import torch
from PIL import Image
from tiny_models import EOS, llava, make_tokenizer, qwen2_5_vl

from latent_trl.data.collator import RowError
from latent_trl.data.prompts import encode_prompts

PICTURES = [Image.effect_noise((16 + 8 * i, 16), 90).convert("RGB") for i in range(3)]


def user(text: str, images: int = 0):
    return {"role": "user", "content": [{"type": "image"}] * images + [{"type": "text", "text": text}]}


ROWS = [
    {"prompt": [user("what is it, and what is it not?", 1)], "images": PICTURES[:1]},
    {"prompt": [user("hello")]},
    {
        "prompt": [
            user("one", 1),
            {"role": "assistant", "content": [{"type": "text", "text": "two"}]},
            user("three", 1),
        ],
        "images": PICTURES[1:],
    },
]


@pytest.mark.parametrize("family", [llava, qwen2_5_vl])
def test_prompts_are_the_processors_own(family):
    processor = family().processor
    own = encode_prompts(processor, ROWS)
    texts = [processor.apply_chat_template(row["prompt"], tokenize=False, add_generation_prompt=True) for row in ROWS]
    images = [row.get("images", []) for row in ROWS]
    batch = processor(text=texts, images=images, padding=True, padding_side="left", return_tensors="pt")
    assert own.keys() == batch.keys()
    for name in batch:
        assert torch.equal(own[name], torch.as_tensor(batch[name])), name


def test_texts_are_the_tokenizers_own():
    tokenizer = make_tokenizer()
    chats = [[{"role": "user", "content": "a"}], [{"role": "user", "content": "a longer one"}]]
    own = encode_prompts(tokenizer, [{"prompt": chat} for chat in chats])
    batch = tokenizer.apply_chat_template(
        chats, add_generation_prompt=True, padding=True, return_tensors="pt", return_dict=True
    )
    assert all(torch.equal(own[name], batch[name]) for name in ("input_ids", "attention_mask"))
    plain = encode_prompts(tokenizer, [{"prompt": "a"}, {"prompt": "abc"}])
    batch = tokenizer(["a", "abc"], padding=True, return_tensors="pt")
    assert all(torch.equal(plain[name], batch[name]) for name in ("input_ids", "attention_mask"))


def test_an_earlier_answer_does_not_end_the_prompt():
    own = encode_prompts(llava().processor, [ROWS[2]])
    assert own["input_ids"][0].tolist().count(EOS) == 1 and own["input_ids"][0, -1] != EOS


def test_bad_prompts_are_named():
    with pytest.raises(RowError, match="Row 1: 0 image placeholders|Row 1: .*`prompt` must be a list"):
        encode_prompts(llava().processor, [ROWS[0], {"prompt": 3}])
