"""Rows of other projects' formats: what a batch of them says is what the same row says in TRL's format."""

import base64
import io
import json

import pytest
import torch
from datasets import Dataset
from PIL import Image
from tiny_models import IMAGE, llava, make_tokenizer, qwen2_5_vl

from latent_trl.data.collator import LatentActionDataCollator
from latent_trl.data.formats import convert_row, read_json_lines
from latent_trl.data.prompts import encode_prompts
from latent_trl.data.rows import RowError

RED, BLUE = (Image.new("RGB", (16, 16), colour) for colour in ("red", "blue"))


def data_url(picture: Image.Image) -> str:
    buffer = io.BytesIO()
    picture.save(buffer, "PNG")
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()


def text(words: str) -> dict:
    return {"type": "text", "text": words}


def turns(content, answer: str = "it is red") -> list[dict]:
    return [{"role": "user", "content": content}, {"role": "assistant", "content": answer}]


ONE = {"messages": turns([{"type": "image"}, text("color?")]), "images": [RED]}
TWO = {
    "messages": turns([text("is "), {"type": "image"}, text(" as "), {"type": "image"}, text("?")]),
    "images": [RED, BLUE],
}
PLAIN = {"messages": turns("color of\n\na sky?")}
# name: (row, the same in TRL's format)
ROWS = {
    "openai": ({"messages": turns([{"type": "image_url", "image_url": {"url": data_url(RED)}}, text("color?")])}, ONE),
    "openai, short": ({"messages": turns([{"type": "image_url", "image_url": data_url(RED)}, text("color?")])}, ONE),
    "responses": (
        {
            "messages": turns(
                [{"type": "input_image", "image_url": data_url(RED)}, {"type": "input_text", "text": "color?"}]
            )
        },
        ONE,
    ),
    "transformers url": ({"messages": turns([{"type": "image", "url": data_url(RED)}, text("color?")])}, ONE),
    "transformers base64": (
        {"messages": turns([{"type": "image", "base64": data_url(RED).split(",")[1]}, text("color?")])},
        ONE,
    ),
    "picture in the part": ({"messages": turns([{"type": "image", "image": RED}, text("color?")])}, ONE),
    "llava": (
        {
            "id": "1",
            "image": RED,
            "conversations": [{"from": "human", "value": "<image>\ncolor?"}, {"from": "gpt", "value": "it is red"}],
        },
        ONE,
    ),
    "llava, image last": (
        {
            "image": [RED],
            "conversations": [{"from": "human", "value": "color?\n<image>"}, {"from": "gpt", "value": "it is red"}],
        },
        {"messages": turns([text("color?"), {"type": "image"}]), "images": [RED]},
    ),
    "sharegpt": (
        {
            "system": "be brief",
            "conversations": [
                {"from": "human", "value": PLAIN["messages"][0]["content"]},
                {"from": "gpt", "value": "it is red"},
            ],
        },
        {"messages": [{"role": "system", "content": "be brief"}, *PLAIN["messages"]]},
    ),
    "ms-swift": ({"messages": turns("<image>color?"), "images": [RED]}, ONE),
    "ms-swift, two": ({"messages": turns("is <image> as <image>?"), "images": [RED, BLUE]}, TWO),
    "alpaca": ({"instruction": "color of", "input": "a sky?", "output": "it is red"}, PLAIN),
    "alpaca without input": (
        {"instruction": "color of\n\na sky?", "input": "", "output": "it is red"},
        PLAIN,
    ),
    "trl": (TWO, TWO),
    "trl, no place": ({"messages": turns("color?"), "images": [RED]}, ONE),
    "trl, prompt and completion": ({"prompt": turns("color?")[:1], "completion": turns("")[1:], "image": RED}, ONE),
}


@pytest.mark.parametrize("name", ROWS)
@pytest.mark.parametrize("family", [llava, qwen2_5_vl])
def test_a_converted_row_is_the_row_in_trls_format(name, family):
    collate = LatentActionDataCollator(family().processor, vision_token_ids=[IMAGE])
    row, same = ROWS[name]
    batch, wanted = collate([convert_row(row)]), collate([same])
    assert batch["input_ids"].tolist() == wanted["input_ids"].tolist()
    assert batch["loss_mask"].tolist() == wanted["loss_mask"].tolist()
    assert batch["vision"].keys() == wanted["vision"].keys()
    for key, tensor in wanted["vision"].items():
        assert torch.equal(batch["vision"][key], tensor), key


@pytest.mark.parametrize("name", ROWS)
def test_what_is_not_converted_is_read_rightly_or_refused_in_few_words(name):
    collate = LatentActionDataCollator(qwen2_5_vl().processor, vision_token_ids=[IMAGE])
    row, same = ROWS[name]
    try:
        batch = collate([row])
    except RowError as error:
        assert "convert_row" in str(error) and len(str(error)) < 400
    else:
        assert batch["input_ids"].tolist() == collate([same])["input_ids"].tolist()


def test_a_converted_row_stays_as_it_is():
    for row, _ in ROWS.values():
        once = convert_row(row)
        assert convert_row(once) == once


def test_alpacas_history_comes_before():
    row = convert_row({"instruction": "c", "output": "d", "history": [["a", "b"]], "system": "s"})
    said = [(message["role"], message["content"][0]["text"]) for message in row["prompt"]]
    assert said == [("system", "s"), ("user", "a"), ("assistant", "b"), ("user", "c")]


def test_arrow_takes_converted_rows_of_unlike_kinds():
    rows = Dataset.from_list([convert_row({**ROWS[name][0], "images": None}) for name in ("openai", "alpaca")])
    assert len(rows) == 2
    mixed = [convert_row({"messages": m}) for m in (turns("a"), turns([text("b")]))]
    data = Dataset.from_list(mixed)
    tokenizer = make_tokenizer()
    ids = LatentActionDataCollator(tokenizer)(list(data))["input_ids"]
    assert ["a" in tokenizer.decode(ids[0]), "user: b" in tokenizer.decode(ids[1])] == [True, True]


WRONG = {
    "neither": ({"text": "a"}, r"has the columns \['text'\]. Formats that are read: TRL's, OpenAI's"),
    "another speaker": ({"conversations": [{"from": "bing", "value": "a"}]}, "speaker 'bing'"),
    "no text": ({"conversations": [{"from": "human", "value": None}]}, "turn 0 of `conversations`"),
    "no turns": ({"conversations": "a"}, "must be a list of turns"),
    "a turn of text": ({"conversations": ["a"]}, "turn 0 of `conversations` is 'a'"),
    "a mark too many": (
        {"messages": turns("<image><image>?"), "images": [RED]},
        r"2 places for images \(<image>\), but 1 images",
    ),
    "a lost picture": (
        {"conversations": [{"from": "human", "value": "<image>\na"}, {"from": "gpt", "value": "b"}]},
        "1 places for images .* but 0 images",
    ),
    "two pictures in a part": (
        {"messages": turns([{"type": "image", "image": RED, "url": "a.png"}])},
        r"has an image part with \['image', 'url'\]",
    ),
    "a history of no pairs": ({"instruction": "a", "output": "b", "history": ["c"]}, "`history` must hold pairs"),
    "two conversations": (
        {"messages": turns("a"), "conversations": [{"from": "human", "value": "b"}, {"from": "gpt", "value": "c"}]},
        "has both `conversations` and `messages`",
    ),
    "marks of objects": (
        {"messages": turns("find <ref-object>", "<bbox>"), "objects": {"ref": ["a"], "bbox": [[1, 2, 3, 4]]}},
        "has marks of `objects`",
    ),
    "numbers in alpaca": ({"instruction": 1, "output": "a"}, "must be texts"),
}


@pytest.mark.parametrize("name", WRONG)
def test_what_cannot_be_converted_is_named(name):
    row, message = WRONG[name]
    with pytest.raises(RowError, match=f"^Row 3: .*{message}"):
        convert_row({**row, "_row": 3})


def test_a_payload_is_never_printed():
    url = data_url(Image.effect_noise((64, 64), 90))
    for row in (
        {"messages": turns([{"type": "image_url", "image_url": {"url": url[:-9] + "?" * 9}}])},
        {"messages": turns("a"), "images": [url.replace("image/png", "text/plain")[: len(url) // 2]]},
        {"messages": turns("a"), "images": [url.split(",")[1]]},
        {"messages": turns([{"type": "image_url", "image_url": {"url": url}}])},
    ):
        for use in (
            lambda r: LatentActionDataCollator(llava().processor)([convert_row(r)]),
            lambda r: encode_prompts(llava().processor, [{"prompt": r["messages"][:1], **r}]),
        ):
            try:
                use(row)
            except RowError as error:
                assert len(str(error)) < 400 and url[100:140] not in str(error)


def test_json_lines_of_unlike_rows(tmp_path):
    path = tmp_path / "rows.jsonl"
    rows = [
        {"messages": turns("a")},
        {"messages": turns([text("b")]), "images": None},
        ROWS["alpaca"][0],
        {"conversations": [{"from": "human", "value": "<image>\nc"}, {"from": "gpt", "value": "d"}], "image": "e.png"},
    ]
    path.write_text("\n".join(map(json.dumps, rows)) + "\n\n", encoding="utf-8")
    RED.save(tmp_path / "e.png")
    data = read_json_lines(path)
    assert len(data) == 4 and data[3]["image"] == "e.png"
    collate = LatentActionDataCollator(llava().processor, vision_token_ids=[IMAGE], image_root=tmp_path)
    assert collate(list(data))["has_image"].tolist() == [False, False, False, True]
    for line, message in (("[1]", "must hold an object"), ("{", "is not JSON"), ('{"a": 1}', "Formats that are read")):
        path.write_text(json.dumps(rows[0]) + "\n" + line, encoding="utf-8")
        with pytest.raises(RowError, match=f"Line 2 of .*{message}"):
            read_json_lines(path)
