"""Text that comes token by token is the decoded whole, and ends before a stop text however it is cut."""

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tiny_models import make_tokenizer

from latent_trl.data.pieces import text_pieces
from latent_trl.serving.text_stream import StopText, TextStream

TOKENIZER = make_tokenizer()


@pytest.mark.parametrize("skip_special", [False, True])
@given(text=st.text(max_size=20), cut=st.integers(0, 3), junk=st.lists(st.integers(0, 271), max_size=6))
def test_pieces_are_those_of_the_whole(skip_special, text, cut, junk):
    ids = TOKENIZER(text, add_special_tokens=False).input_ids
    # It may end within a character, or go on with tokens that are none.
    ids = [*ids[: len(ids) - cut], *junk]
    stream = TextStream(TOKENIZER, skip_special)
    pieces = [stream.add(token, last=i == len(ids) - 1) for i, token in enumerate(ids)]
    assert "".join(pieces) == TOKENIZER.decode(ids, skip_special_tokens=skip_special)
    if not skip_special:
        assert pieces == text_pieces(TOKENIZER, ids)


def test_spaces_that_a_decoder_makes_are_kept():
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = ["▁a", "▁b", "c", "<0xE2>", "<0x82>", "<0xAC>", "<unk>", "▁"]
    vocab = {word: i for i, word in enumerate(words)}
    inner = Tokenizer(models.BPE(vocab=vocab, merges=[], unk_token="<unk>", byte_fallback=True))
    inner.pre_tokenizer = pre_tokenizers.Metaspace()
    inner.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=inner)
    for ids in ([0, 1, 2], [0, 3, 4, 5, 1], [1, 7, 0, 3], [3, 4, 5, 3, 4, 5]):
        stream = TextStream(tokenizer)
        told = "".join(stream.add(token, last=i == len(ids) - 1) for i, token in enumerate(ids))
        assert told == tokenizer.decode(ids)


def test_a_long_text_is_not_decoded_again_and_again(monkeypatch):
    lengths, stream = [], TextStream(TOKENIZER)
    decode = TOKENIZER.decode
    monkeypatch.setattr(TOKENIZER, "decode", lambda ids, **options: lengths.append(len(ids)) or decode(ids, **options))
    for token in TOKENIZER("ab€" * 100, add_special_tokens=False).input_ids:
        stream.add(token)
    assert max(lengths) <= 8


@given(
    text=st.text("ab", max_size=12),
    stops=st.lists(st.text("ab", min_size=1, max_size=4), max_size=3),
    cuts=st.lists(st.integers(0, 12), max_size=6),
)
def test_a_text_ends_before_the_first_stop_text(text, stops, cuts):
    places = sorted({0, len(text), *(cut for cut in cuts if cut <= len(text))})
    parts = [text[a:b] for a, b in zip(places, places[1:], strict=False)] or [""]
    stop, told = StopText(stops), ""
    for i, part in enumerate(parts):
        told += stop.add(part, last=i == len(parts) - 1)
        assert not any(each in told for each in stops)
        if stop.reached:
            break
    # Texts are looked for as they come: a longer one that begins sooner may not be there yet when a shorter one is.
    read = "".join(parts[: i + 1])
    found = [read.index(each) for each in stops if each in read]
    assert stop.reached == bool(found)
    assert told == (read[: min(found)] if found else text)


def test_what_cannot_begin_a_stop_text_is_told_at_once():
    stop = StopText(["END", "\n\n"])
    assert [stop.add(part) for part in ("a", "E", "N", "x", "\n", "b\n")] == ["a", "", "", "ENx", "", "\nb"]
    assert stop.add("", last=True) == "\n" and not stop.reached
