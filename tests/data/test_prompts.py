"""Prompts for `generate` are what the processor's own chat template and padding on the left give."""

import pytest
import torch
from PIL import Image
from tiny_models import BOS, EOS, VLM_FAMILIES, llava, make_tokenizer, qwen2_5_vl
from tokenizers.processors import TemplateProcessing

from latent_trl.data.prompts import PromptEncoder, encode_prompts
from latent_trl.data.rows import RowError

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


@pytest.mark.parametrize("family", list(VLM_FAMILIES.values()))
def test_prompts_are_the_processors_own(family):
    processor = family().processor
    own = encode_prompts(processor, ROWS)
    texts = [processor.apply_chat_template(row["prompt"], tokenize=False, add_generation_prompt=True) for row in ROWS]
    images = [row.get("images", []) for row in ROWS]
    batch = processor(text=texts, images=images, padding=True, padding_side="left", return_tensors="pt")
    batch.pop("labels", None)
    assert own.keys() == batch.keys()
    for name in batch:
        whole = torch.as_tensor(batch[name])
        if whole.ndim >= 4 and len(whole) == len(ROWS) and len(own[name]) < len(ROWS):
            # Such processors give rows without images empty ones, which the models leave out.
            whole = whole[[0, 2]]
        assert torch.equal(own[name], whole), name


@pytest.mark.parametrize("family", list(VLM_FAMILIES.values()))
@pytest.mark.parametrize("order", [[0, 1, 2], [2, 0], [1], [0, 0, 2, 2], [1, 1, 0]])
def test_any_rows_once_encoded_make_the_batch_that_they_make_together(family, order):
    encoder = PromptEncoder(family().processor)
    encoded = [encoder(row) for row in ROWS]
    together = encoder.encoder([encoder.renderer.prompt(ROWS[i]) for i in order])[1]
    batch = encoder.collate([encoded[i] for i in order])
    fields = {name for prompt in encoded for name in prompt.fields}
    assert batch.keys() - {"input_ids", "attention_mask"} - fields == together.keys()
    for name, tensor in together.items():
        assert torch.equal(batch[name], tensor), name
    for row, i in enumerate(order):
        mask = batch["attention_mask"][row].bool()
        assert batch["input_ids"][row][mask].tolist() == encoded[i].ids


@pytest.mark.parametrize("writes_bos", [False, True])
@pytest.mark.parametrize("family", [llava, qwen2_5_vl])
def test_what_begins_a_text_is_there_once_as_the_processors_own_method_puts_it(family, writes_bos):
    processor = family().processor
    processor.tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="<bos> $A <eos>", pair="<bos> $A $B", special_tokens=[("<bos>", BOS), ("<eos>", EOS)]
    )
    if writes_bos:
        processor.chat_template = "{{ bos_token }}" + processor.chat_template
    for row in ROWS[:2]:
        ids = encode_prompts(processor, [row])["input_ids"][0].tolist()
        shown = [
            {**m, "content": [{**p, "image": PICTURES[0]} if p["type"] == "image" else p for p in m["content"]]}
            for m in row["prompt"]
        ]
        own = processor.apply_chat_template(shown, tokenize=True, add_generation_prompt=True, return_dict=True)
        own = torch.as_tensor(own["input_ids"]).flatten().tolist()
        # That method lets a tokenizer end the prompt too, where the answer would come.
        assert own == (ids if writes_bos else [*ids, EOS]) and ids.count(BOS) == 1 and ids[0] == BOS
    # A tokenizer leaves it to the template.
    ids = encode_prompts(processor.tokenizer, [{"prompt": [{"role": "user", "content": "a"}]}])["input_ids"][0]
    assert BOS not in ids
    assert encode_prompts(processor.tokenizer, [{"prompt": "a"}])["input_ids"][0].tolist()[0] == BOS


def test_longer_prompts_than_the_limit_are_named():
    length = len(encode_prompts(llava().processor, [ROWS[0]])["input_ids"][0])
    assert encode_prompts(llava().processor, [ROWS[0]], max_length=length)["input_ids"].shape == (1, length)
    with pytest.raises(RowError, match=f"Row 0: its prompt has {length} tokens, more than the limit of {length - 1}"):
        encode_prompts(llava().processor, [ROWS[0]], max_length=length - 1)


def test_variables_and_a_template_of_ones_own():
    tokenizer = make_tokenizer()
    template = "{{ mood }}{% for m in messages %}{{ m['content'] }}{% endfor %}"
    rows = [{"prompt": [{"role": "user", "content": "a"}]}]
    ids = encode_prompts(tokenizer, rows, chat_template=template, chat_template_kwargs={"mood": "x"})["input_ids"]
    assert tokenizer.decode(ids[0]) == "xa"
    rows[0]["chat_template_kwargs"] = {"mood": "y", "other": None}
    ids = encode_prompts(tokenizer, rows, chat_template=template, chat_template_kwargs={"mood": "x"})["input_ids"]
    assert tokenizer.decode(ids[0]) == "ya"


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
