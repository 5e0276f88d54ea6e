"""
Train the pocket VLM from scratch: a LLaVA model of 3.4 M parameters that sees drawn shapes and makes small talk.

The data come with the packages of `pip install -e ".[demo]"`; no download is needed.

    python examples/scripts/train_pocket_vlm.py --output_dir model_cards/pocket-vlm

It takes 15 to 20 minutes on two CPU cores, and ends with `evaluate_pocket_vlm.py`, which writes the card.
"""

import argparse
import json
import math
import random
import re
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from evaluate_pocket_vlm import HELD_OUT_CHATS, evaluate, training_batch, with_image, write_card
from PIL import Image
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from tqdm import tqdm
from transformers import (
    CLIPImageProcessorPil,
    CLIPVisionConfig,
    GenerationConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    PreTrainedTokenizerFast,
    set_seed,
)

from latent_trl.data.shapes import COLOURS, SHAPES, chitchat, shape_pairs

IMAGE_SIZE, PATCH_SIZE = 64, 16
WORDS = COLOURS + SHAPES
SPECIAL_TOKENS = ["<|pad|>", "<|end|>", "<|system|>", "<|user|>", "<|assistant|>", "<image>"]
# An assistant turn is marked as generated together with the token that ends it.
CHAT_TEMPLATE = """\
{%- for message in messages -%}
{{- '<|' + message['role'] + '|>' -}}
{%- set said -%}
{%- if message['content'] is string -%}
{{- message['content'] -}}
{%- else -%}
{%- for part in message['content'] -%}
{{- '<image>' if part['type'] == 'image' else part['text'] -}}
{%- endfor -%}
{%- endif -%}
{%- endset -%}
{%- if message['role'] == 'assistant' -%}
{%- generation -%}{{- said + '<|end|>' -}}{%- endgeneration -%}
{%- else -%}
{{- said + '<|end|>' -}}
{%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- '<|assistant|>' -}}{%- endif -%}"""


def build_processor(texts):
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=2000, special_tokens=SPECIAL_TOKENS, initial_alphabet=alphabet)
    bpe.train_from_iterator(texts, trainer)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=bpe,
        pad_token="<|pad|>",
        eos_token="<|end|>",
        extra_special_tokens=SPECIAL_TOKENS[2:],
        padding_side="left",
        model_max_length=512,
        chat_template=CHAT_TEMPLATE,
    )
    side = {"height": IMAGE_SIZE, "width": IMAGE_SIZE}
    image_processor = CLIPImageProcessorPil(size=side, crop_size=side, image_mean=[0.5] * 3, image_std=[0.5] * 3)
    return LlavaProcessor(
        image_processor,
        tokenizer,
        patch_size=PATCH_SIZE,
        vision_feature_select_strategy="default",  # drops the class token: 16 visual tokens
        num_additional_image_tokens=1,
        chat_template=CHAT_TEMPLATE,
    )


def build_model(tokenizer):
    vision = CLIPVisionConfig(
        hidden_size=128,
        intermediate_size=512,
        num_hidden_layers=4,
        num_attention_heads=4,
        image_size=IMAGE_SIZE,
        patch_size=PATCH_SIZE,
        projection_dim=128,
    )
    text = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=192,
        intermediate_size=512,
        num_hidden_layers=4,
        num_attention_heads=6,
        max_position_embeddings=512,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    config = LlavaConfig(
        vision_config=vision,
        text_config=text,
        image_token_id=tokenizer.convert_tokens_to_ids("<image>"),
        vision_feature_layer=-1,
        vision_feature_select_strategy="default",
        image_seq_length=(IMAGE_SIZE // PATCH_SIZE) ** 2,
        tie_word_embeddings=False,
    )
    model = LlavaForConditionalGeneration(config)
    model.generation_config = GenerationConfig(
        do_sample=False, eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id
    )
    return model


def augment(image, generator):
    """Moves, mirrors and re-grounds the shape: colour, shape and size stay true."""
    pixels = np.array(image)
    drawn = pixels.min(axis=2) < 200
    background = np.median(pixels[~drawn], axis=0)
    if generator.random() < 0.5:
        background = [generator.randint(228, 255) for _ in range(3)]
    rows, columns = np.flatnonzero(drawn.any(axis=1)), np.flatnonzero(drawn.any(axis=0))
    top, bottom, left, right = rows[0], rows[-1] + 1, columns[0], columns[-1] + 1
    y, x = top, left
    # A shape that the border cuts stays there: elsewhere it would be another shape.
    if min(top, left) > 0 and max(bottom, right) < IMAGE_SIZE:
        y = generator.randint(0, IMAGE_SIZE - bottom + top)
        x = generator.randint(0, IMAGE_SIZE - right + left)
    moved = np.empty_like(pixels)
    moved[:] = background
    moved[y : y + bottom - top, x : x + right - left][drawn[top:bottom, left:right]] = pixels[drawn]
    return Image.fromarray(moved[:, ::-1].copy() if generator.random() < 0.5 else moved)


def steps(parameters, lr, count, description):
    """Yields `count` times; after each the gradients are applied (AdamW, warm-up and cosine)."""
    optimizer = torch.optim.AdamW(parameters, lr=lr, betas=(0.9, 0.98), weight_decay=0.05)
    bar = tqdm(range(count), desc=description, mininterval=10)
    for step in bar:
        rate = lr * min(1, (step + 1) / 50) * (0.02 + 0.98 * (1 + math.cos(math.pi * step / count)) / 2)
        for group in optimizer.param_groups:
            group["lr"] = rate
        yield bar
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad()


def indicators(texts):
    """Which of `WORDS` each text contains, as `[texts, words]` of zeros and ones."""
    found = [re.findall("[a-z]+", text) for text in texts]
    return torch.tensor([[float(word in words) for word in WORDS] for words in found])


def warm_up_vision(model, processor, pairs, args, generator):
    """Teaches the vision tower which words its picture's description contains, which costs little beside the LM."""
    rows, tower = [i for i, messages in enumerate(pairs["messages"]) if len(messages) == 2], model.model.vision_tower
    head = torch.nn.Linear(tower.config.hidden_size, len(WORDS))
    for bar in steps([*tower.parameters(), *head.parameters()], 1e-3, args.vision_steps, "vision"):
        batch = pairs[generator.sample(rows, 64)]
        images = [augment(images[0], generator) for images in batch["images"]]
        targets = indicators([messages[1]["content"] for messages in batch["messages"]])
        pixels = processor.image_processor(images, return_tensors="pt")["pixel_values"]
        logits = head(tower(pixels).last_hidden_state[:, 1:].mean(dim=1))
        loss = F.binary_cross_entropy_with_logits(logits, targets)
        loss.backward()
        right = ((logits > 0) == targets.bool()).all(dim=1).float().mean()
        bar.set_postfix(loss=f"{loss:.3f}", right=f"{right:.2f}", refresh=False)


def train(model, processor, pairs, chats, args, generator):
    """
    Learns both kinds of conversation, with one help: halfway up, the state in which each answer begins has to tell the
    words of the picture's description and of the request. Without it, comparing the two is not found in this time.
    """
    described = {}
    for row in pairs.filter(lambda messages: len(messages) == 2, input_columns="messages"):
        described[row["images"][0].tobytes()] = row["messages"][1]["content"]
    begin = processor.tokenizer.convert_tokens_to_ids("<|assistant|>")
    halfway, width = model.config.text_config.num_hidden_layers // 2, model.config.text_config.hidden_size
    head = torch.nn.Sequential(torch.nn.RMSNorm(width), torch.nn.Linear(width, 2 * len(WORDS))).to(model.device)
    trained = [p for p in (*model.parameters(), *head.parameters()) if p.requires_grad]
    for bar in steps(trained, args.learning_rate, args.steps, "model"):
        rows = pairs[generator.sample(range(len(pairs)), args.batch_size)]
        pairings = [(said, images[0]) for said, images in zip(rows["messages"], rows["images"], strict=True)]
        batch = training_batch(processor, [with_image(said, augment(image, generator)) for said, image in pairings])
        turns = [
            (described.get(image.tobytes(), ""), request["content"])
            for said, image in pairings
            for request in said[::2]
        ]
        batch = batch.to(model.device)
        targets = torch.cat([indicators(texts) for texts in zip(*turns, strict=True)], dim=1).to(model.device)
        with torch.autocast(model.device.type, dtype=torch.bfloat16, enabled=args.bf16):
            output = model(**batch, output_hidden_states=True)
        states = output.hidden_states[halfway][batch["input_ids"] == begin].float()
        told = F.binary_cross_entropy_with_logits(head(states), targets)
        (output.loss + 10 * told).backward()
        batch = training_batch(processor, chats[generator.sample(range(len(chats)), args.batch_size // 3)]["messages"])
        batch["labels"] = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
        batch = batch.to(model.device)
        with torch.autocast(model.device.type, dtype=torch.bfloat16, enabled=args.bf16):
            talk = model(**batch).loss
        talk.backward()
        bar.set_postfix(pictures=f"{output.loss:.3f}", told=f"{told:.3f}", talk=f"{talk:.3f}", refresh=False)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output_dir", type=Path, default=Path("model_cards/pocket-vlm"))
    parser.add_argument("--vision_steps", type=int, default=1000)
    parser.add_argument("--steps", type=int, default=650)
    parser.add_argument("--batch_size", type=int, default=40)
    parser.add_argument("--learning_rate", type=float, default=1e-3)
    parser.add_argument("--bf16", action="store_true", help="bfloat16 autocast, faster on recent CPUs")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    set_seed(args.seed)
    pairs, chats = shape_pairs("base", limit=40_000, seed=args.seed), chitchat()
    chats = chats.select(range(HELD_OUT_CHATS, len(chats)))
    # The few words of the pictures are repeated until each is one token.
    texts = [turn["content"] for rows in (pairs, pairs, chats) for said in rows["messages"] for turn in said]
    processor = build_processor(texts)
    model = build_model(processor.tokenizer)
    generator = random.Random(args.seed)
    warm_up_vision(model, processor, pairs, args, generator)
    train(model, processor, pairs, chats, args, generator)
    # Half precision on disk; the configuration still says float32, in which the model is loaded.
    model.save_pretrained(args.output_dir, state_dict={name: w.half() for name, w in model.state_dict().items()})
    processor.save_pretrained(args.output_dir)
    results = evaluate(args.output_dir)
    print(json.dumps(results, indent=2))
    write_card(args.output_dir, results)


if __name__ == "__main__":
    main()
