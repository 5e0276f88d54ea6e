"""
Measure the pocket VLM on pictures that it was not trained on, and write its model card.

    python examples/scripts/evaluate_pocket_vlm.py --model model_cards/pocket-vlm --write_card

It takes one to two minutes on two CPU cores. The numbers are printed as JSON, and go into `README.md` beside the
weights.
"""

import argparse
import json
import math
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from transformers import AutoModelForImageTextToText, AutoProcessor, set_seed

from latent_trl.data.shapes import ANSWERS, COLOURS, ERROR_RATE, KINDS, PHRASINGS, SHAPES, chitchat, shape_questions
from latent_trl.rewards.exact_match import ExactMatchReward

HELD_OUT_CHATS = 500
TRAIN_COMMAND = "python examples/scripts/train_pocket_vlm.py --bf16"
TABLE = (
    "greedy",
    "greedy, another picture",
    "sampled at temperature 1, mean",
    "sampled at temperature 1, best of 8",
    "probe of the last prompt state",
    "best fixed answer",
    "best fixed answer per kind",
)
CARD = """\
---
license: apache-2.0
language: en
library_name: transformers
pipeline_tag: image-text-to-text
tags:
- llava
- latent_trl
---

# Pocket VLM

A vision-language model of {parameters:.1f} M parameters that was trained from scratch on two CPU cores. It sees one
drawn shape in a picture of 64 x 64 pixels, answers questions about it, describes it, and makes small talk without a
picture. It exists to try reinforcement learning on: small enough for a laptop, in a stock architecture (LLaVA: CLIP
vision tower, projector, Llama), and wrong in known ways that its own states could correct.

```python
from transformers import AutoModelForImageTextToText, AutoProcessor

model = AutoModelForImageTextToText.from_pretrained("model_cards/pocket-vlm")
processor = AutoProcessor.from_pretrained("model_cards/pocket-vlm")
```

The weights are stored in float16 and load in float32. A picture takes {visual_tokens} tokens, a question with it about
30 in all, an answer 2 to 7. Texts are in lower case.

## Training

```
{train_command}
python examples/scripts/evaluate_pocket_vlm.py --write_card
```

The pictures are two thirds of the training pictures of `easy-vqa` (MIT), moved, mirrored and put on new backgrounds;
the small talk is `chitchat-dataset` (MIT). First the vision tower learns which words a picture's description contains.
Then the whole model learns descriptions, verdicts on statements ("true or false: it is red."), questions with answers,
and small talk. In that stage a throw-away linear head reads, halfway up the text model, the state in which an answer
begins, and has to tell the words of the picture's description and of the request; without it the model does not learn
to compare the two in this time.

## It knows more than it says

Descriptions and verdicts in the training data are always right, answers to questions are not. Those come from an
annotator model (`latent_trl/data/shapes.py`) with one-directional failings, each with probability {error_rate}: a true
"no" is answered "yes", teal is called blue, brown red, gray black, yellow green, and a triangle a rectangle. So greedy
answers are wrong on those classes, while the right word keeps a good share of the probability and the hidden state
tells the classes apart. Reinforcement learning with a strict reward can close that gap.

## Results

Questions about the {questions} test pictures of `easy-vqa` that determine both colour and shape, a third of each kind,
"yes" and "no" balanced. An answer counts when it is short and names the truth and no other candidate
(`ExactMatchReward`).

| | colour | shape | yes or no | all |
|---|---|---|---|---|
{rows}

"Another picture" asks the same questions about the next row's picture. The probe is a small MLP on the last hidden
state of the prompt, fitted on pictures that neither the base nor the test uses. The best fixed answer per kind knows
the kind of the question but not the picture.

- Descriptions ("describe the picture.") name the right colour in {description[colour]:.1%} and the right shape in
  {description[shape]:.1%} of the cases.
- {well_formed[greedy]:.1%} of greedy and {well_formed[sampled]:.1%} of sampled answers are word for word one of the
  phrasings of the training data: the errors lie in the word chosen, not in the format.
- Perplexity of the answers in {chats} unseen small-talk conversations: {perplexity}.

## Limits

One shape, eight colours, three shapes, pale backgrounds, and wordings close to those of the training data. Small talk
is grammatical at best. It is a test object, not an assistant.
"""


def with_image(messages, image):
    content = [{"type": "image", "image": image}, {"type": "text", "text": messages[0]["content"]}]
    return [{"role": "user", "content": content}, *messages[1:]]


def encode(processor, conversations, **kwargs):
    return processor.apply_chat_template(
        conversations,
        tokenize=True,
        return_dict=True,
        return_tensors="pt",
        processor_kwargs={"padding": True},
        **kwargs,
    )


def training_batch(processor, conversations):
    batch = encode(processor, conversations, return_assistant_tokens_mask=True)
    assistant = torch.as_tensor(batch.pop("assistant_masks")).bool()
    batch["labels"] = batch["input_ids"].masked_fill(~assistant, -100)
    return batch


def batches(processor, rows, requests=None, shift=0, size=64):
    """Encoded prompts; `requests` replaces the questions, `shift` takes the pictures from other rows."""
    images = [images[0] for images in rows["images"]]
    images = images[shift:] + images[:shift]
    prompts = [requests or prompt for prompt in rows["prompt"]]
    prompts = [with_image(prompt, image) for prompt, image in zip(prompts, images, strict=True)]
    for i in range(0, len(prompts), size):
        yield encode(processor, prompts[i : i + size], add_generation_prompt=True)


@torch.no_grad()
def answers(model, processor, rows, requests=None, shift=0, **kwargs):
    said = []
    for batch in batches(processor, rows, requests, shift):
        batch = batch.to(model.device)
        tokens = model.generate(**batch, max_new_tokens=24, **kwargs)[:, batch["input_ids"].shape[1] :]
        said.extend(processor.tokenizer.batch_decode(tokens, skip_special_tokens=True))
    return said


@torch.no_grad()
def prompt_states(model, processor, rows):
    encoded = (batch.to(model.device) for batch in batches(processor, rows))
    return torch.cat([model.model(**batch).last_hidden_state[:, -1].float().cpu() for batch in encoded])


def probe(states, answers, test_states):
    """The answers that a small MLP reads from the states, fitted on other pictures."""
    targets = torch.tensor([ANSWERS.index(answer) for answer in answers])
    layers = torch.nn.Linear(states.shape[1], 128), torch.nn.ReLU(), torch.nn.Linear(128, len(ANSWERS))
    mlp = torch.nn.Sequential(*layers)
    optimizer = torch.optim.AdamW(mlp.parameters(), lr=3e-3, weight_decay=0.1)
    for _ in range(200):
        optimizer.zero_grad()
        F.cross_entropy(mlp(states), targets).backward()
        optimizer.step()
    return [ANSWERS[i] for i in mlp(test_states).argmax(dim=1)]


def by_kind(scores, kinds):
    """Mean score of each kind of question and of all."""
    table = {kind: np.mean([score for score, of in zip(scores, kinds, strict=True) if of == kind]) for kind in KINDS}
    return {kind: round(float(score), 3) for kind, score in {**table, "all": np.mean(scores)}.items()}


def known_answers():
    """All answers in the phrasings of the training data, right or wrong."""
    shapes = {text.format(word) for text in PHRASINGS["shape"] for word in SHAPES}
    return (
        {text.format(word) for text in PHRASINGS["colour"] for word in COLOURS}
        | shapes
        | {*PHRASINGS["yes"], *PHRASINGS["no"]}
    )


def share(known, texts):
    return round(sum(text in known for text in texts) / len(texts), 3)


@torch.no_grad()
def perplexity(model, processor, chats):
    loss, count = 0.0, 0
    for i in range(0, len(chats), 50):
        batch = training_batch(processor, chats[i : i + 50]["messages"]).to(model.device)
        tokens = (batch["labels"][:, 1:] != -100).sum().item()
        loss, count = loss + model(**batch).loss.item() * tokens, count + tokens
    return math.exp(loss / count)


def evaluate(folder, device="cpu"):
    model = AutoModelForImageTextToText.from_pretrained(folder).to(device).eval()
    processor = AutoProcessor.from_pretrained(folder)
    chats = chitchat(limit=HELD_OUT_CHATS)
    set_seed(0)
    reward = ExactMatchReward()
    rows, fitted_on = shape_questions("test"), shape_questions("rl", limit=2400)
    kinds, truths = rows["kind"][:], rows["answer"][:]

    def score(said):
        return by_kind(reward(prompts=None, completions=said, answer=truths), kinds)

    greedy = answers(model, processor, rows)
    sampled = answers(model, processor, rows, do_sample=True, temperature=1.0, top_k=0, num_return_sequences=8)
    tries = np.reshape(reward(prompts=None, completions=sampled, answer=np.repeat(truths, 8).tolist()), (-1, 8))
    fixed = [score([answer] * len(rows)) for answer in ANSWERS]
    states, test_states = (prompt_states(model, processor, questions) for questions in (fitted_on, rows))
    described = answers(model, processor, rows, requests=[{"role": "user", "content": "describe the picture."}])
    domains = {"colour": COLOURS, "shape": SHAPES, "yes_no": ()}
    named = [
        set(text.replace(".", "").replace(",", "").split()).intersection(domains[kind]) == {truth}
        for text, kind, truth in zip(described, kinds, truths, strict=True)
    ]
    return {
        "greedy": score(greedy),
        "greedy, another picture": score(answers(model, processor, rows, shift=1)),
        "sampled at temperature 1, mean": by_kind(tries.mean(axis=1), kinds),
        "sampled at temperature 1, best of 8": by_kind(tries.max(axis=1), kinds),
        "probe of the last prompt state": score(probe(states, fitted_on["answer"][:], test_states)),
        "best fixed answer": max(fixed, key=lambda table: table["all"]),
        "best fixed answer per kind": {kind: max(table[kind] for table in fixed) for kind in KINDS},
        "description": {kind: by_kind(named, kinds)[kind] for kind in ("colour", "shape")},
        "well-formed": {"greedy": share(known_answers(), greedy), "sampled": share(known_answers(), sampled)},
        "perplexity": round(perplexity(model, processor, chats), 1),
    }


def write_card(folder, results):
    def row(name, table):
        cells = [f"{table[kind]:.3f}" if kind in table else "" for kind in (*KINDS, "all")]
        return " | ".join([f"| {name}", *cells]) + " |"

    model = AutoModelForImageTextToText.from_pretrained(folder)
    card = CARD.format(
        parameters=model.num_parameters() / 1e6,
        visual_tokens=model.config.image_seq_length,
        error_rate=ERROR_RATE,
        questions=len(shape_questions("test")),
        rows="\n".join(row(name, table) for name, table in results.items() if name in TABLE),
        train_command=TRAIN_COMMAND,
        description=results["description"],
        well_formed=results["well-formed"],
        perplexity=results["perplexity"],
        chats=HELD_OUT_CHATS,
    )
    (folder / "README.md").write_text(card, encoding="utf-8")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, default=Path("model_cards/pocket-vlm"))
    parser.add_argument("--write_card", action="store_true")
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    results = evaluate(args.model)
    print(json.dumps(results, indent=2))
    if args.write_card:
        write_card(args.model, results)


if __name__ == "__main__":
    main()
