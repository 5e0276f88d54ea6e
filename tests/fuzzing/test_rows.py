"""Rows of any content at all: a batch that keeps its promises, or an error that names the row."""

import torch
from cases import cases
from hypothesis import example, given
from hypothesis import strategies as st
from PIL import Image
from tiny_models import IMAGE, PAD, llava, make_tokenizer

from latent_trl.data.collator import LatentActionDataCollator
from latent_trl.data.mixing import MixedRows, flatten
from latent_trl.data.rows import RowError

PROCESSOR = llava().processor
ANYTHING = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=6) | st.binary(max_size=4),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=6), inner, max_size=3),
    max_leaves=6,
)
TEXT = st.text(max_size=12) | st.sampled_from(["hello", "a b", " ", "<image>", "{{ 1 }}", "\x00", "\ud7ff"])
PARTS = st.lists(
    st.fixed_dictionaries({"type": st.just("text"), "text": TEXT})
    | st.just({"type": "image"})
    | st.fixed_dictionaries({"type": st.sampled_from(["text", "image", "video", "", 3])}, optional={"text": ANYTHING}),
    max_size=3,
)
MESSAGES = st.lists(
    st.fixed_dictionaries(
        {"role": st.sampled_from(["user", "assistant", "system", "tool", ""]), "content": TEXT | PARTS | ANYTHING}
    )
    | ANYTHING,
    max_size=4,
)
PICTURES = st.lists(st.just(Image.new("RGB", (16, 16), "red")) | ANYTHING, max_size=2) | ANYTHING
ROWS = st.fixed_dictionaries(
    {},
    optional={
        "messages": MESSAGES | ANYTHING,
        "prompt": MESSAGES | TEXT | ANYTHING,
        "completion": MESSAGES | TEXT | ANYTHING,
        "images": PICTURES,
        "image": PICTURES,
    },
)


@cases(150)
@given(st.lists(ROWS, min_size=1, max_size=3), st.booleans(), st.none() | st.integers(1, 40), st.booleans())
@example([{"messages": [{"role": "user", "content": None}, {"role": "assistant", "content": "a"}]}], True, None, True)
def test_a_batch_or_an_error_that_names_the_row(rows, assistant_only, max_length, vlm):
    processing = PROCESSOR if vlm else make_tokenizer()
    collate = LatentActionDataCollator(
        processing, max_length=max_length, assistant_only=assistant_only, vision_token_ids=[IMAGE]
    )
    items = [MixedRows(rows)[i] for i in range(len(rows))]
    try:
        batch = collate(flatten(items))
    except RowError as error:
        assert str(error).startswith("Row ")
        return
    ids, mask = batch["input_ids"], batch["attention_mask"].bool()
    assert ids.shape == mask.shape == batch["loss_mask"].shape == batch["token_mask"].shape
    assert len(ids) == len(rows) and (max_length is None or ids.shape[1] <= max_length)
    # Padded on the right, and every row has something to learn from, which is never padding nor an image.
    assert torch.equal(mask, torch.arange(ids.shape[1]) < mask.sum(1, keepdim=True))
    assert ids[~mask].eq(PAD).all()
    assert batch["loss_mask"].any(dim=1).all()
    assert not (batch["loss_mask"] & ~batch["token_mask"]).any()
    assert torch.equal(batch["token_mask"], mask & (ids != IMAGE))
    if vlm:
        # A text model's tokenizer may know the placeholder as a word.
        assert batch["has_image"].tolist() == (ids == IMAGE).any(dim=1).tolist()
