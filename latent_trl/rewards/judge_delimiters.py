"""Material that is graded cannot look like what stands around it: tags of a template, or a judge's own scores."""

import re
import unicodedata

TAGS = ("conversation", "first_reply", "second_reply", "think")
# Letters of other scripts that look like those of the tags.
LOOKS_LIKE = str.maketrans(
    {
        **dict.fromkeys("аɑα", "a"),
        **dict.fromkeys("еєҽε", "e"),
        **dict.fromkeys("оοօ", "o"),
        **dict.fromkeys("рρ", "p"),
        **dict.fromkeys("сϲ", "c"),
        **dict.fromkeys("уүγ", "y"),
        **dict.fromkeys("іιıӏ|", "i"),
        **dict.fromkeys("ѕꜱ", "s"),
        **dict.fromkeys("νѵ", "v"),
        **dict.fromkeys("ԁ", "d"),
        **dict.fromkeys("տոпη", "n"),
        **dict.fromkeys("гᴦ", "r"),
        **dict.fromkeys("тτ", "t"),
        **dict.fromkeys("һ", "h"),
        **dict.fromkeys("кκ", "k"),
        **dict.fromkeys("ƒ", "f"),
        **dict.fromkeys("‹〈⟨❮❰ᐸ˂⧼≺«𐊜◁", "<"),
        **dict.fromkeys("⁄∕⧸╱\\", "/"),
        **dict.fromkeys("“”„‟″‘’‚′`'«»", '"'),
        **dict.fromkeys("❴⦃", "{"),
    }
)
# What chat templates put between turns, and tokenizers of judges may take for it: <|im_end|> (a line looks like an i),
# </s>, <start_of_turn>, <<SYS>>, [/INST] and the like.
CHAT_TAGS = "i[a-z0-9]{1,40}i>|(?:start|end)of[a-z]{1,20}>|(?:s|bos|eos|pad|unk)>|</*sys>|i?turni?>"
CHAT_BRACKETS = "inst|systemprompt|modelsettings|availabletools|toolcalls|toolresults|toolcontent|think|img|imgend|args"
OPENERS = re.compile(
    rf"(?:<|&lt;|&#0*60;|&#x0*3c;)/*(?:{'|'.join(tag.replace('_', '') for tag in TAGS)}|{CHAT_TAGS})"
    rf"|\[/*(?:{CHAT_BRACKETS})\]"
    r'|\{"*(?:first|second)"'
)
IN_PLACE = "("


def without_delimiters(text: str) -> str:
    """
    The text, in which a parenthesis stands for the first character of whatever a reader could take for a tag of a
    template, for what chat templates put between turns, for the mark of a judge's reasoning, or for the scores of a
    judge: however it is spaced, spelled with look-alikes, or filled with characters that are not seen.
    """
    folded, places = _folded(text)
    starts = {places[match.start()] for match in OPENERS.finditer(folded)}
    return "".join(IN_PLACE if i in starts else c for i, c in enumerate(text))


def _folded(text: str) -> tuple[str, list[int]]:
    """What a reader sees of the text, in small letters without spaces and joints, and where each of them stands."""
    seen, places = [], []
    for i, character in enumerate(text):
        for c in unicodedata.normalize("NFKD", character).casefold().translate(LOOKS_LIKE):
            if unicodedata.category(c)[0] not in "CMZ" and c not in "_-.·▁":
                seen.append(c)
                places.append(i)
    return "".join(seen), places
