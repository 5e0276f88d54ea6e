"""Conversations to batches: masks, padding and images against brute force, and errors that name the row."""

import pytest
import torch
from datasets import Dataset
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from tiny_models import EOS, IMAGE, PAD, VISION_END, VISION_START, llava, make_tokenizer, qwen2_5_vl

from latent_trl.data.collator import LatentActionDataCollator
from latent_trl.data.rows import RowError

TOKENIZER = make_tokenizer()
PROCESSORS = {"llava": (llava().processor, [IMAGE], 4)}
GRID = qwen2_5_vl().processor
PICTURE = Image.new("RGB", (16, 16), "red")


def user(text, *images):
    return {"role": "user", "content": [*({"type": "image"} for _ in images), {"type": "text", "text": text}]}


def says(role, text):
    return {"role": role, "content": text}


def collator(**options):
    processor, visual, _ = PROCESSORS["llava"]
    return LatentActionDataCollator(processor, vision_token_ids=visual, **options)


def ids(text: str) -> list[int]:
    return TOKENIZER(text, add_special_tokens=False).input_ids


def expected(messages, images_per_message):
    """Ids and answer mask of a conversation, written out by hand for the template of the tiny models."""
    tokens, mask = [], []
    for message, count in zip(messages, images_per_message, strict=True):
        answer = message["role"] == "assistant"
        head, body = ids(f"{message['role']}: "), [IMAGE] * 4 * count + ids(message["content"])
        tail = [EOS] if answer else ids("\n")
        tokens += head + body + tail
        mask += [False] * len(head) + [answer] * (len(body) + len(tail))
    return tokens, mask


TEXTS = st.text(alphabet="abc \né漢🙂{%<", min_size=1, max_size=12).filter(lambda t: t.strip())


@st.composite
def conversations(draw):
    messages, counts = [], []
    if draw(st.booleans()):
        messages.append(says("system", draw(TEXTS)))
        counts.append(0)
    for _ in range(draw(st.integers(1, 3))):
        messages.append(says("user", draw(TEXTS)))
        counts.append(draw(st.integers(0, 2)))
        messages.append(says("assistant", draw(TEXTS)))
        counts.append(0)
    return messages, counts


@settings(max_examples=150, deadline=None)
@given(st.lists(conversations(), min_size=1, max_size=4), st.booleans())
def test_ids_and_masks_are_those_written_out_by_hand(rows, assistant_only):
    data = []
    for messages, counts in rows:
        placed = [
            {**m, "content": [{"type": "image"}] * n + [{"type": "text", "text": m["content"]}]}
            for m, n in zip(messages, counts)
        ]
        data.append({"messages": placed, "images": [PICTURE] * sum(counts)})
    batch = collator(assistant_only=assistant_only)(data)
    lengths = []
    for i, (messages, counts) in enumerate(rows):
        tokens, answer = expected(messages, counts)
        n = len(tokens)
        lengths.append(n)
        assert batch["input_ids"][i, :n].tolist() == tokens
        assert batch["input_ids"][i, n:].eq(PAD).all()
        assert batch["attention_mask"][i].tolist() == [1] * n + [0] * (len(batch["attention_mask"][i]) - n)
        seen = [t != IMAGE for t in tokens]
        wanted = [a and s for a, s in zip(answer, seen)] if assistant_only else seen
        assert batch["loss_mask"][i, :n].tolist() == wanted and not batch["loss_mask"][i, n:].any()
        assert batch["token_mask"][i, :n].tolist() == seen and not batch["token_mask"][i, n:].any()
        assert bool(batch["has_image"][i]) == (sum(counts) > 0)
    assert batch["input_ids"].shape[1] == max(lengths)
    pictures = sum(sum(counts) for _, counts in rows)
    assert len(batch["vision"].get("pixel_values", [])) == pictures


@settings(max_examples=100, deadline=None)
@given(conversations(), st.integers(1, 120))
def test_too_long_conversations_lose_whole_turns(conversation, limit):
    messages, counts = conversation
    placed = [
        {**m, "content": [{"type": "image"}] * n + [{"type": "text", "text": m["content"]}]}
        for m, n in zip(messages, counts)
    ]
    row = {"messages": placed, "images": [PICTURE] * sum(counts), "_row": 5}
    ends = [i + 1 for i, m in enumerate(messages) if m["role"] == "assistant"]
    fitting = [e for e in ends if len(expected(messages[:e], counts[:e])[0]) <= limit]
    if not fitting:
        with pytest.raises(RowError, match="Row 5: its first exchange has .* tokens, more than `max_length` = "):
            collator(max_length=limit)([row])
        return
    batch = collator(max_length=limit)([row])
    tokens, _ = expected(messages[: fitting[-1]], counts[: fitting[-1]])
    assert batch["input_ids"][0].tolist() == tokens
    assert len(batch["vision"].get("pixel_values", [])) == sum(counts[: fitting[-1]])


def test_images_stay_with_their_rows():
    """A row with 2 images, one with none, one with 1; each picture of one colour."""
    colours = [(250, 0, 0), (0, 250, 0), (0, 0, 250)]
    pictures = [Image.new("RGB", (16, 16), c) for c in colours]
    rows = [
        {"messages": [user("a", 1, 2), says("assistant", "x")], "images": pictures[:2]},
        {"messages": [user("b"), says("assistant", "y")], "images": []},
        {"prompt": [says("user", "c")], "completion": [says("assistant", "z")], "images": pictures[2:]},
    ]
    batch = collator()(rows)
    assert batch["has_image"].tolist() == [True, False, True]
    assert batch["input_ids"].eq(IMAGE).sum(dim=1).tolist() == [8, 0, 4]
    assert batch["vision"]["pixel_values"].mean(dim=(2, 3)).argmax(dim=1).tolist() == [0, 1, 2]


def test_fields_of_each_token_are_padded_with_the_ids():
    pictures = [Image.new("RGB", (16, 16)), Image.new("RGB", (24, 16))]
    rows = [
        {"messages": [user("long words", 1), says("assistant", "x")], "images": pictures[:1]},
        {"messages": [user("b"), says("assistant", "y")]},
        {"messages": [user("c", 1), says("assistant", "z")], "images": pictures[1:]},
    ]
    batch = LatentActionDataCollator(GRID, vision_token_ids=[IMAGE, VISION_START, VISION_END])(rows)
    types = batch["vision"]["mm_token_type_ids"]
    assert types.shape == batch["input_ids"].shape
    assert torch.equal(types == 1, batch["input_ids"] == IMAGE)
    assert batch["vision"]["image_grid_thw"].shape == (2, 3)
    assert not batch["token_mask"][batch["input_ids"] == VISION_START].any()


def test_rows_of_arrow_with_absurd_columns():
    rows = Dataset.from_list(
        [
            {
                "messages": [user("a", 1), says_parts("x")],
                "images": [{"bytes": png(), "path": None}],
                "_row": 9,
                "é ": 1.5,
            },
            {"messages": [user("b"), says_parts("y")], "images": None, "_row": None, "é ": None},
        ]
    )
    batch = collator()(list(rows))
    assert batch["has_image"].tolist() == [True, False]


def says_parts(text):
    return {"role": "assistant", "content": [{"type": "text", "text": text}]}


def png() -> bytes:
    import io

    buffer = io.BytesIO()
    PICTURE.save(buffer, "PNG")
    return buffer.getvalue()


def test_plain_prompts_and_completions_end():
    tokenizer = LatentActionDataCollator(make_tokenizer())
    batch = tokenizer([{"prompt": "ab", "completion": "c"}, {"prompt": "a", "completion": "b<eos>"}])
    assert batch["input_ids"].tolist() == [[*ids("abc"), EOS], [*ids("ab"), EOS, PAD]]
    assert batch["loss_mask"].tolist() == [[False, False, True, True], [False, True, True, False]]


GOOD = [says("user", "a"), says("assistant", "b")]
BAD_ROWS = {
    "nothing": ({"text": "a"}, r"needs `messages`, or `prompt` and `completion`; its columns are \['text'\]"),
    "all none": ({"messages": None, "prompt": None, "completion": None}, "needs `messages`"),
    "no assistant": ({"messages": [says("user", "a")]}, "no assistant message"),
    "no message": ({"messages": []}, "no assistant message"),
    "text for messages": ({"messages": "hello"}, r"`messages` must be a list of .* got 'hello'"),
    "numbers for messages": ({"messages": [1, 2]}, r"`messages` must be a list"),
    "no role": ({"messages": [{"content": "a"}]}, "message 0 has the role None"),
    "no content": ({"messages": [{"role": "user", "content": None}, GOOD[1]]}, "content of message 0 must be text"),
    "a part of another kind": (
        {"messages": [{"role": "user", "content": [{"type": "video", "video": "x"}]}, GOOD[1]]},
        "has a part of type 'video' .*parts are text or images",
    ),
    "an assistant's image": (
        {"messages": [GOOD[0], {"role": "assistant", "content": [{"type": "image"}]}], "images": [PICTURE]},
        "Images belong to other roles",
    ),
    "an empty answer": ({"messages": [GOOD[0], says("assistant", " \n")]}, "the assistant's message 1 is empty"),
    "an empty completion": ({"prompt": "a", "completion": " "}, "`completion` is empty"),
    "no completion": ({"prompt": [GOOD[0]], "completion": []}, "`completion` is empty"),
    "completion of a number": ({"prompt": [GOOD[0]], "completion": 3}, "`completion` must be a list of .* got 3"),
    "an image too many": (
        {"messages": [user("a", 1), GOOD[1]], "images": [PICTURE] * 2},
        "1 image placeholders in the messages, but 2 images. Give as many",
    ),
    "an image too few": ({"messages": [user("a", 1), GOOD[1]]}, "1 image placeholders in the messages, but 0 images"),
    "an image for nobody": ({"messages": [GOOD[1]], "images": [PICTURE]}, "no user message to show them in"),
    "a plain prompt with an image": (
        {"prompt": "a", "completion": "b", "images": [PICTURE]},
        "images need conversational",
    ),
    "an unreadable image": ({"messages": GOOD, "images": [b"xyz"]}, "3 bytes cannot be read as an image"),
    "a path and no root": ({"messages": GOOD, "image": "x.png"}, "no `image_root` says where"),
    "a URL": ({"messages": GOOD, "images": ["https://example.com/x.png"]}, "is a URL"),
    "a visual token as text": (
        {"messages": [says("user", "see <image>"), GOOD[1]]},
        "message 0 holds the visual token",
    ),
}


@pytest.mark.parametrize("case", BAD_ROWS)
def test_bad_rows_are_named(case):
    row, message = BAD_ROWS[case]
    with pytest.raises(RowError, match=f"(?s)^Row 7: .*{message}"):
        collator()([{"messages": GOOD}, {**row, "_row": 7}])


def test_a_tokenizer_takes_no_images():
    with pytest.raises(RowError, match="Pass the processor"):
        LatentActionDataCollator(make_tokenizer())([{"messages": GOOD, "images": [PICTURE]}])


def test_pictures_that_the_processor_refuses_are_named():
    wide = Image.new("RGB", (4000, 2))
    rows = [
        {"messages": [user("a", 1), GOOD[1]], "images": [PICTURE], "_row": 0},
        {"messages": [user("a", 1), GOOD[1]], "images": [wide], "_row": 1},
    ]
    with pytest.raises(RowError, match=r"Row 1: the processor cannot take its images of \[\(4000, 2\)\] pixels"):
        LatentActionDataCollator(GRID, vision_token_ids=[IMAGE])(rows)


def test_templates_that_refuse_or_rewrite():
    strict = make_tokenizer()
    strict.chat_template = "{{ raise_exception('roles must alternate') }}"
    with pytest.raises(RowError, match=r"Row 2: the chat template refuses .*\['user'\].*roles must alternate"):
        LatentActionDataCollator(strict)([{"messages": GOOD, "_row": 2}])
    rewriting = make_tokenizer()
    rewriting.chat_template = "{{ messages | length }}{% for m in messages %}{{ m['content'] }}{% endfor %}"
    with pytest.raises(RowError, match="Row 3: .*Use a prefix-preserving template"):
        LatentActionDataCollator(rewriting)([{"messages": GOOD, "_row": 3}])
