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
    "a video": ({"messages": GOOD, "videos": ["a.mp4"]}, r"has \['videos'\], and images alone are read"),
    "a sound": ({"prompt": "a", "completion": "b", "audio": b"x"}, r"has \['audio'\], and images alone"),
    "a message of weight 0": (
        {"messages": [*GOOD, GOOD[0], {**GOOD[1], "weight": 0}]},
        r"message 3 is not to be learned, by its \['weight'\], .*`completion`",
    ),
    "a message without loss": ({"messages": [GOOD[0], {**GOOD[1], "loss": False}]}, r"by its \['loss'\]"),
    "a call that the template leaves out": (
        {"messages": [GOOD[0], {**GOOD[1], "tool_calls": [{"type": "function", "function": {"name": "look"}}]}]},
        "leaves out text of the role 'assistant', which begins 'look'",
    ),
    "reasoning that the template leaves out": (
        {"messages": [GOOD[0], {**GOOD[1], "reasoning_content": "since it is so"}]},
        "leaves out text of the role 'assistant', which begins 'since it is so'",
    ),
    "an image's place of another model": (
        {"messages": [says("user", "<|image_pad|>a"), GOOD[1]], "images": [PICTURE]},
        "holds '<|image_pad|>', which this backbone would read as a word".replace("|", r"\|"),
    ),
    "a numbered place": ({"messages": [says("user", "a <|image_1|>"), GOOD[1]], "images": [PICTURE]}, "image_1"),
    "Pixtral's place": ({"messages": [says("user", "[IMG]a"), GOOD[1]], "images": [PICTURE]}, r"holds '\[IMG\]'"),
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


SAID = [says("user", "a"), says("assistant", "<think>why</think>b")]


@pytest.mark.parametrize(
    "template, role",
    [
        ("{% for m in messages %}{{ m['content'].split('</think>')[-1] }}{% endfor %}", "assistant"),
        ("{% for m in messages %}{{ m['role'] }}{% endfor %}", "user"),
        ("{% for m in messages %}{% if m['role'] == 'assistant' %}{{ m['content'] }}{% endif %}{% endfor %}", "user"),
    ],
)
def test_templates_that_leave_out_text(template, role):
    tokenizer = make_tokenizer()
    tokenizer.chat_template = template
    with pytest.raises(RowError, match=f"Row 5: the chat template leaves out text of the role '{role}'.*training"):
        LatentActionDataCollator(tokenizer)([{"messages": SAID, "_row": 5}])


def test_templates_that_trim_are_right():
    tokenizer = make_tokenizer()
    tokenizer.chat_template = tokenizer.chat_template.replace("{{ m['content'] }}", "{{ m['content'] | trim }}")
    batch = LatentActionDataCollator(tokenizer)([{"messages": [says("user", " a \n"), says("assistant", " b\n\nc ")]}])
    assert tokenizer.decode(batch["input_ids"][0]) == "user: a\nassistant: b\n\nc<eos>"


def test_templates_take_content_in_their_own_form():
    """A text model's template that wants parts, and a processor's that wants text."""
    parts = "{% for m in messages %}{% for p in m['content'] %}{{ p['text'] }}{% endfor %}{{ eos_token }}{% endfor %}"
    texts = "{% for m in messages %}{{ m['content'] + eos_token }}{% endfor %}"
    tokenizer, processor = make_tokenizer(), llava().processor
    tokenizer.chat_template, processor.chat_template = parts, texts
    for processing in (tokenizer, processor):
        batch = LatentActionDataCollator(processing)([{"messages": GOOD}])
        assert TOKENIZER.decode(batch["input_ids"][0]) == "a<eos>b<eos>"
        assert TOKENIZER.decode(batch["input_ids"][0][batch["loss_mask"][0]]) == "b<eos>"


def endless():
    tokenizer = make_tokenizer()
    tokenizer.chat_template = (
        "{% for m in messages %}{{ m['role'].upper() + ': ' + m['content'] + ' ' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ 'ASSISTANT:' }}{% endif %}"
    )
    return tokenizer


def test_an_end_that_the_template_does_not_write(caplog):
    tokenizer = endless()
    tokenizer.chat_template += "{# once #}"
    collate = LatentActionDataCollator(tokenizer)
    with caplog.at_level("WARNING", "latent_trl"):
        batch = collate([{"messages": [*GOOD, *GOOD]}])
    learned = TOKENIZER.decode(batch["input_ids"][0][batch["loss_mask"][0]])
    assert learned == " b  b <eos>" and batch["input_ids"][0].tolist().count(EOS) == 1
    length = batch["input_ids"].shape[1]
    assert collate([{"messages": [*GOOD, *GOOD]}])["input_ids"].shape[1] == length
    # The end counts, and a conversation that loses turns ends too.
    shorter = LatentActionDataCollator(tokenizer, max_length=length - 1)([{"messages": [*GOOD, *GOOD]}])
    assert TOKENIZER.decode(shorter["input_ids"][0]) == "USER: a ASSISTANT: b <eos>"
    tokenizer.eos_token = None
    with pytest.raises(RowError, match="has no end, and the tokenizer no EOS token"):
        LatentActionDataCollator(tokenizer)([{"messages": GOOD}])


def test_an_end_that_generation_does_not_know_is_named(monkeypatch):
    from latent_trl.data import collator as module

    said = []
    monkeypatch.setattr(module.logger, "warning_once", said.append)
    tokenizer = endless()
    tokenizer.chat_template = tokenizer.chat_template.replace("+ ' '", "+ '<end_of_utterance>'")
    end = tokenizer.convert_tokens_to_ids("<end_of_utterance>")
    batch = LatentActionDataCollator(tokenizer)([{"messages": GOOD}])
    assert batch["input_ids"][0, -1] == end and "generation does not stop" in said.pop()
    LatentActionDataCollator(tokenizer, end_token_ids=[7, end])([{"messages": GOOD}])
    LatentActionDataCollator(tokenizer, end_token_ids=end)([{"messages": GOOD}])
    assert not said


def merging(pieces: list[str], scheme: str | None):
    """A tokenizer of whole words: of a space before them (`scheme` of Metaspace), or of bytes that merge."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    vocab = [("<pad>", 0.0), ("<eos>", 0.0), ("<unk>", 0.0), *((p, -1.0 / len(p)) for p in pieces)]
    backend = Tokenizer(models.Unigram(vocab, unk_id=2))
    if scheme:
        backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=scheme, split=False)
        backend.decoder = decoders.Metaspace(prepend_scheme=scheme)
    return PreTrainedTokenizerFast(tokenizer_object=backend, pad_token="<pad>", eos_token="<eos>", unk_token="<unk>")


@settings(max_examples=80, deadline=None)
@given(
    st.sampled_from(["first", "always", "never", None]),
    st.text("ab c", min_size=1, max_size=6),
    st.text("ab c", min_size=1, max_size=6).filter(lambda t: t.strip()),
)
def test_tokens_are_those_of_the_whole_text(scheme, prompt, completion):
    space = "▁" if scheme else " "
    tokenizer = merging(["a", "b", "c", space, "ab", f"{space}a", f"b{space}", "ca", f"{space}b"], scheme)
    batch = LatentActionDataCollator(tokenizer)([{"prompt": prompt, "completion": completion}])
    whole = tokenizer(prompt + completion, return_offsets_mapping=True)
    assert batch["input_ids"][0].tolist() == [*whole.input_ids, tokenizer.eos_token_id]
    learned = batch["loss_mask"][0].tolist()
    first = learned.index(True)
    assert all(learned[first:]) and not any(learned[:first])
    for (start, end), mine in zip(whole.offset_mapping, learned):
        if start < end:
            # A token is the answer's when a character of the answer is in it.
            assert mine == (end > len(prompt))
