"""Drawn shapes to talk about, and small talk: what the pocket VLM and the demo learn from.

The pictures are those of the `easy_vqa` package (one shape in one of eight colours on a pale background), the
text-only conversations those of `chitchat_dataset`. Only the truth about a picture is taken from `easy_vqa`: all
questions and descriptions are worded here.

# The annotator model

Descriptions, and verdicts on statements ("true or false: it is red."), are always right. Answers to questions
come from an annotator with the systematic failings of real VLM data, each one-directional and each with probability
`error_rate`:

- acquiescence: a true "no" is answered "yes";
- confusable colours: teal is called blue, brown red, gray black, yellow green;
- confusable shapes: a triangle is called a rectangle.

The failings depend on nothing but the truth, so a model of such data says the wrong word greedily on those classes,
keeps the right one at probability `1 - error_rate`, and has to see the picture to get either right. What it knows and
does not say is a gap that reinforcement learning can close.
"""

import importlib.util
import io
import json
import random
import re
from collections import defaultdict
from pathlib import Path

import numpy as np
from datasets import Dataset, Features, Image, List, Value
from PIL import Image as PILImage

COLOURS = ("black", "blue", "brown", "gray", "green", "red", "teal", "yellow")
SHAPES = ("circle", "rectangle", "triangle")
ANSWERS = (*COLOURS, *SHAPES, "yes", "no")
KINDS = ("colour", "shape", "yes_no")
SPLITS = ("base", "rl", "test")

CONFUSED_WITH = {
    "no": "yes",
    "teal": "blue",
    "brown": "red",
    "gray": "black",
    "yellow": "green",
    "triangle": "rectangle",
}
ERROR_RATE = 0.67

QUESTIONS = {
    "colour": ("what color is it?", "what color is the shape?", "which color do you see?"),
    "shape": ("what shape is it?", "which shape is this?", "what shape do you see?"),
    "yes_no": ("is it {}?", "is the shape {}?", "would you say it is {}?"),
}
# The first wording is the most frequent, so that a greedy model settles on one.
PHRASINGS = {
    "colour": ("it is {}.", "{}.", "the color is {}."),
    "shape": ("it is a {}.", "a {}.", "the shape is a {}."),
    "yes": ("yes.", "yes, it is.", "yes, i think so."),
    "no": ("no.", "no, it is not.", "no, i do not think so."),
}
PHRASING_WEIGHTS = (5, 3, 2)
DESCRIPTION_REQUESTS = (
    "describe the picture.",
    "what do you see?",
    "write a caption.",
    "tell me about the picture.",
    "what is in the picture?",
)
DESCRIPTIONS = (
    "a {size} {colour} {shape}.",
    "the picture shows a {size} {colour} {shape}.",
    "i see a {shape} that is {size} and {colour}.",
    "there is a {colour} {shape} on a pale background. it is {size}.",
    "a {shape}, drawn in {colour}. it looks {size}.",
    "this is a drawing of a {colour} {shape}, {size} and alone.",
)
# Pixels of 64 x 64 that the shape covers; a third of the pictures each is "small", "medium" and "big".
SMALL, LARGE = 220, 420

STATEMENTS = ("it is {}.", "the shape is {}.", "this is {}.")

CHAT_WORDS = (2, 18)
# Talk about the chat window, its bugs and the competition that the conversations were collected in.
CHAT_JUNK = re.compile(
    r"chat|convers|bubble|point|ipad|macbook|compet|prize|raffle|robot|bot\b|\beve\b|typing|program|refresh|anyone"
    r"|there\?|still here|prompt|rating|submit|button|http|www|@|\d"
)


def _package_folder(name: str) -> Path:
    spec = importlib.util.find_spec(name)
    if spec is None or spec.origin is None:
        raise ImportError(
            f"The `{name}` package, which ships the demo's data, is missing: "
            "`pip install easy-vqa==1.0 chitchat-dataset==0.9.0`."
        )
    return Path(spec.origin).parent


def _truths(questions: list) -> dict[int, tuple[str, str]]:
    """Maps an image id to its (colour, shape), for the images whose questions determine both.

    An answer that is a colour or a shape is true of the picture, and so is any such word in its question. A word in
    a yes/no question is true of it when the answer is "yes", or "no" to a negated question.
    """
    known: dict[int, set[str]] = defaultdict(set)
    for question, answer, image_id in questions:
        words = set(re.findall("[a-z]+", question))
        negated = not words.isdisjoint(("no", "not"))
        if answer not in ("yes", "no"):
            known[image_id] |= words | {answer}
        elif (answer == "yes") != negated:
            known[image_id] |= words
    truths = {}
    for image_id, words in known.items():
        colours, shapes = words.intersection(COLOURS), words.intersection(SHAPES)
        if len(colours) == len(shapes) == 1:
            truths[image_id] = (colours.pop(), shapes.pop())
    return truths


def _pictures(split: str, generator: random.Random) -> list[dict]:
    """The pictures of a split in random order: `path`, `colour` and `shape` of each."""
    if split not in SPLITS:
        raise ValueError(f"`split` must be one of {SPLITS}, got {split!r}.")
    folder = _package_folder("easy_vqa") / "data" / ("test" if split == "test" else "train")
    truths = _truths(json.loads((folder / "questions.json").read_text(encoding="utf-8")))
    pictures = [
        {"path": folder / "images" / f"{image_id}.png", "colour": colour, "shape": shape}
        for image_id, (colour, shape) in sorted(truths.items())
        if split == "test" or (image_id % 3 == 0) == (split == "rl")
    ]
    generator.shuffle(pictures)
    return pictures


def _take(pictures: list[dict], count: int) -> list[dict]:
    """The first `count` pictures, starting over as often as needed."""
    return [pictures[i % len(pictures)] for i in range(count)]


def _size_word(data: bytes) -> str:
    # The background is pale in all three channels, no shape is.
    area = (np.asarray(PILImage.open(io.BytesIO(data))).min(axis=2) < 200).sum()
    return "small" if area < SMALL else "big" if area > LARGE else "medium"


def _describe(picture: dict, size: str, generator: random.Random) -> list[dict]:
    text = generator.choice(DESCRIPTIONS).format(colour=picture["colour"], shape=picture["shape"], size=size)
    return [
        {"role": "user", "content": generator.choice(DESCRIPTION_REQUESTS)},
        {"role": "assistant", "content": text},
    ]


def _claim(picture: dict, right: bool, generator: random.Random) -> str:
    """A colour ("red") or shape ("a circle") that the picture has or has not."""
    aspect, values = generator.choice((("colour", COLOURS), ("shape", SHAPES)))
    value = picture[aspect]
    if not right:
        value = generator.choice([other for other in values if other != value])
    return value if aspect == "colour" else f"a {value}"


def _judge(picture: dict, generator: random.Random) -> list[dict]:
    right = generator.random() < 0.5
    statement = generator.choice(STATEMENTS).format(_claim(picture, right, generator))
    return [
        {"role": "user", "content": f"true or false: {statement}"},
        {"role": "assistant", "content": "true." if right else "false."},
    ]


def _ask(picture: dict, kind: str, generator: random.Random, truth: str | None = None) -> tuple[str, str]:
    """A question about the picture and its true answer; `truth` fixes that of a yes/no question."""
    question = generator.choice(QUESTIONS[kind])
    if kind != "yes_no":
        return question, picture[kind]
    truth = truth or generator.choice(("yes", "no"))
    return question.format(_claim(picture, truth == "yes", generator)), truth


def _answer(kind: str, truth: str, error_rate: float, generator: random.Random) -> str:
    """The annotator's wording of an answer; see the annotator model at the top of the file."""
    said = truth
    if error_rate and truth in CONFUSED_WITH and generator.random() < error_rate:
        said = CONFUSED_WITH[truth]
    phrasings = PHRASINGS[said if kind == "yes_no" else kind]
    return generator.choices(phrasings, PHRASING_WEIGHTS)[0].format(said)


def shape_pairs(split: str, limit: int | None = None, seed: int = 0, error_rate: float = ERROR_RATE) -> Dataset:
    """
    Conversations about pictures of shapes: descriptions, verdicts on statements, and an annotator's answers.

    Args:
        split (`str`):
            `"base"` (pictures that the base model is trained on), `"rl"` (other pictures of the training set) or
            `"test"`.
        limit (`int`, *optional*):
            Number of rows; beyond the number of pictures they are used again with new words. Defaults to one row per
            picture.
        seed (`int`, *optional*, defaults to `0`):
            Seed of the order, the wordings and the annotator's errors.
        error_rate (`float`, *optional*, defaults to `ERROR_RATE`):
            Probability of each of the annotator's systematic errors in answers to questions; all else is right in any
            case. At 0.97 the right word is rare, and the model hardly ever says it.

    Returns:
        `datasets.Dataset`: columns `messages` (a request and a description, four statements with verdicts, or two
        questions with answers) and `images` (one picture of 64 x 64 pixels).

    Raises:
        `ImportError`: when the `easy_vqa` package is missing.
        `ValueError`: when `split` is unknown, or `error_rate` is no probability.
    """
    if not 0 <= error_rate <= 1:
        raise ValueError(f"`error_rate` must be between 0 and 1, got {error_rate}.")
    generator = random.Random(f"pairs {split} {seed}")
    pictures = _pictures(split, generator)
    data = [picture["path"].read_bytes() for picture in pictures]
    sizes = [_size_word(item) for item in data]
    rows: dict[str, list] = {"messages": [], "images": []}
    for i in range(len(pictures) if limit is None else limit):
        i %= len(pictures)
        messages = []
        form = generator.random()
        if form < 0.2:
            messages = _describe(pictures[i], sizes[i], generator)
        elif form < 0.6:
            for _ in range(4):
                messages.extend(_judge(pictures[i], generator))
        else:
            for kind in generator.sample(KINDS, 2):
                question, truth = _ask(pictures[i], kind, generator)
                messages.append({"role": "user", "content": question})
                messages.append({"role": "assistant", "content": _answer(kind, truth, error_rate, generator)})
        rows["messages"].append(messages)
        rows["images"].append([{"bytes": data[i], "path": None}])
    message = {"role": Value("string"), "content": Value("string")}
    return Dataset.from_dict(rows, features=Features({"messages": List(message), "images": List(Image())}))


def shape_questions(split: str, limit: int | None = None, seed: int = 0) -> Dataset:
    """
    Questions about pictures of shapes with their true answers, for RL and evaluation.

    A third each ask for the colour, the shape, and yes or no; exactly half of the latter are true.

    Args:
        split (`str`):
            `"base"`, `"rl"` or `"test"`, as in [`shape_pairs`].
        limit (`int`, *optional*):
            Number of rows, rounded down to a multiple of 6 to keep the kinds balanced; beyond the number of pictures
            they are used again with new questions. Defaults to one row per picture.
        seed (`int`, *optional*, defaults to `0`):
            Seed of the order and the wordings.

    Returns:
        `datasets.Dataset`: columns `prompt` (one user message), `images` (one picture), `answer` (a colour, a shape,
        `"yes"` or `"no"`) and `kind` (`"colour"`, `"shape"` or `"yes_no"`).

    Raises:
        `ImportError`: when the `easy_vqa` package is missing.
        `ValueError`: when `split` is unknown, or `limit` is below 6.
    """
    generator = random.Random(f"questions {split} {seed}")
    pictures = _pictures(split, generator)
    count = (len(pictures) if limit is None else limit) // 6 * 6
    if not count:
        raise ValueError(f"`limit` must be at least 6, which keeps the kinds of questions balanced; got {limit}.")
    asked = [("colour", None), ("shape", None), ("yes_no", "yes"), ("colour", None), ("shape", None), ("yes_no", "no")]
    asked *= count // 6
    generator.shuffle(asked)
    rows: dict[str, list] = {"prompt": [], "images": [], "answer": [], "kind": []}
    for picture, (kind, truth) in zip(_take(pictures, count), asked, strict=True):
        question, answer = _ask(picture, kind, generator, truth)
        rows["prompt"].append([{"role": "user", "content": question}])
        rows["images"].append([{"bytes": picture["path"].read_bytes(), "path": None}])
        rows["answer"].append(answer)
        rows["kind"].append(kind)
    features = Features(
        {
            "prompt": List({"role": Value("string"), "content": Value("string")}),
            "images": List(Image()),
            "answer": Value("string"),
            "kind": Value("string"),
        }
    )
    return Dataset.from_dict(rows, features=features)


def _chat_turn(utterances: list[dict]) -> str | None:
    """One speaker's turn in lower case, or `None` when it is too long, too short or junk."""
    text = " ".join(" ".join(utterance["text"] for utterance in utterances).lower().split())
    shortest, longest = CHAT_WORDS
    if not text.isascii() or CHAT_JUNK.search(text) or not shortest <= len(text.split()) <= longest:
        return None
    return text


def chitchat(limit: int | None = None, seed: int = 0) -> Dataset:
    """
    Text-only small talk: one or two exchanges of short, clean turns.

    Args:
        limit (`int`, *optional*):
            Number of conversations; all when not given.
        seed (`int`, *optional*, defaults to `0`):
            Seed of the order.

    Returns:
        `datasets.Dataset`: column `messages`, alternating between `"user"` and `"assistant"`.

    Raises:
        `ImportError`: when the `chitchat_dataset` package is missing.
    """
    text = (_package_folder("chitchat_dataset") / "dataset.json").read_text(encoding="utf-8")
    rows = []
    for conversation in json.loads(text).values():
        turns = []
        for turn in [*map(_chat_turn, conversation["messages"]), None]:
            if turn is not None:
                turns.append(turn)
            if len(turns) == 4 or turn is None:
                turns = turns[: len(turns) // 2 * 2]
                if turns:
                    roles = ("user", "assistant") * (len(turns) // 2)
                    rows.append([{"role": role, "content": said} for role, said in zip(roles, turns, strict=True)])
                turns = []
    random.Random(f"chitchat {seed}").shuffle(rows)
    features = Features({"messages": List({"role": Value("string"), "content": Value("string")})})
    return Dataset.from_dict({"messages": rows[:limit]}, features=features)
