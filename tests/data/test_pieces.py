"""What each token adds to a text, for byte-level tokenizers and for those whose words begin with a mark."""

import pytest
from tiny_models import EOS, make_tokenizer
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from latent_trl.data.pieces import text_pieces


def marked_tokenizer():
    """As SentencePiece's: a word begins with ▁, and a text is decoded without its first space."""
    vocab = {"<unk>": 0, "▁it": 1, "▁is": 2, "▁re": 3, "d": 4}
    tokenizer = Tokenizer(models.WordPiece(vocab, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.Fuse(), decoders.Strip(content=" ", left=1)]
    )
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>")


def test_spaces_of_marked_words_are_kept():
    tokenizer = marked_tokenizer()
    assert [tokenizer.decode([i]) for i in (1, 2, 3, 4)] == ["it", "is", "re", "d"]
    assert text_pieces(tokenizer, [1, 2, 3, 4]) == ["it", " is", " re", "d"]


@pytest.mark.parametrize("text", ["it is red", "é", "aé日b", ""])
def test_pieces_make_up_the_text_though_a_character_has_several_tokens(text):
    tokenizer = make_tokenizer()
    ids = tokenizer(text, add_special_tokens=False).input_ids
    pieces = text_pieces(tokenizer, ids)
    assert len(pieces) == len(ids) == len(text.encode()) and "".join(pieces) == text


def test_a_text_that_breaks_off_within_a_character_says_so():
    tokenizer = make_tokenizer()
    ids = tokenizer("aé", add_special_tokens=False).input_ids
    assert text_pieces(tokenizer, ids[:-1]) == ["a", "\ufffd"]


def test_special_tokens_are_shown_or_left_out():
    tokenizer = make_tokenizer()
    ids = [*tokenizer("a", add_special_tokens=False).input_ids, EOS]
    assert text_pieces(tokenizer, ids) == ["a", "<eos>"]
    assert text_pieces(tokenizer, ids, skip_special=True) == ["a", ""]
