"""From renderings to tokens and visual inputs: ids are those of the whole text, in which answers are told apart."""

from dataclasses import dataclass

import torch
from transformers import PreTrainedTokenizerBase, ProcessorMixin

from .rendering import Answer, Rendering
from .rows import RowError, said, short


@dataclass
class Encoding:
    """
    Args:
        ids (`list[int]`): Tokens, without padding.
        fields (`dict[str, list[int]]`): What else the processor says of each token; missing entries are 0.
        answers (`list[tuple[int, int]]`): First token of each answer, and the one after its last.
        rendering (`Rendering`): What was encoded.
    """

    ids: list[int]
    fields: dict[str, list[int]]
    answers: list[tuple[int, int]]
    rendering: Rendering


class Encoder:
    """
    Tokenises renderings with the backbone's processing class.

    What begins a text (BOS) comes where the processing class's own `apply_chat_template(tokenize=True)` puts it: a
    tokenizer leaves it to the template; a processor adds it unless the template has written it. Nothing is added at
    the end.

    Args:
        processing_class (`ProcessorMixin` or `PreTrainedTokenizerBase`): The backbone's.
    """

    def __init__(self, processing_class: ProcessorMixin | PreTrainedTokenizerBase):
        self.processing_class = processing_class
        self.is_vlm = isinstance(processing_class, ProcessorMixin)
        self.tokenizer = processing_class.tokenizer if self.is_vlm else processing_class
        self.beginning = _beginning(self.tokenizer)

    def __call__(self, renderings: list[Rendering]) -> tuple[list[Encoding], dict[str, torch.Tensor]]:
        """
        The encoding of each, and the visual inputs of all of them in order.

        Raises:
            RowError: For images that the processor refuses, and for answers that cannot be told apart in the tokens.
        """
        texts = self._texts(renderings)
        shown = [r for r in renderings if r.images]
        heads, vision = self._process([r.head() for r in shown]) if shown else ([], {})
        supply = iter(heads)
        encodings = []
        for rendering in renderings:
            ids = texts[rendering.text]
            fields: dict[str, list[int]] = {}
            if rendering.images:
                ids, fields = self._with_images(rendering, *next(supply), texts)
            answers = [self._answer_tokens(rendering, answer, ids, texts) for answer in rendering.answers]
            begin = self.beginning if self._begins(rendering) else []
            encodings.append(
                Encoding(
                    ids=[*begin, *ids],
                    fields={name: [0] * len(begin) + values for name, values in fields.items()},
                    answers=[(start + len(begin), end + len(begin)) for start, end in answers],
                    rendering=rendering,
                )
            )
        return encodings, vision

    def unfilled(self, rendering: Rendering) -> list[int]:
        """Tokens of a prompt in which an image is its one placeholder, as engines take it beside the pictures."""
        begin = self.beginning if self._begins(rendering) else []
        return [*begin, *self._texts([rendering])[rendering.text]]

    def vision(self, renderings: list[Rendering]) -> dict[str, torch.Tensor]:
        """The visual inputs of renderings with images, made together."""
        return self._process([r.head() for r in renderings])[1]

    def _begins(self, rendering: Rendering) -> bool:
        if rendering.is_plain:
            return True
        bos = self.tokenizer.bos_token
        return self.is_vlm and not (bos is not None and rendering.text.startswith(bos))

    def _texts(self, renderings: list[Rendering]) -> dict[str, list[int]]:
        """Tokens of each text and of its beginnings up to the answers, in which an image is its placeholder."""
        wanted = {text for r in renderings for text in (r.text, r.head().text)}
        wanted |= {r.text[:place] for r in renderings for a in r.answers for place in (a.start, a.end)}
        ordered = sorted(wanted)
        return dict(zip(ordered, self.tokenizer(ordered, add_special_tokens=False).input_ids, strict=True))

    def _with_images(
        self, rendering: Rendering, head_ids: list[int], fields: dict[str, list[int]], texts: dict[str, list[int]]
    ) -> tuple[list[int], dict[str, list[int]]]:
        """The processor's tokens up to the first answer that has seen all images, and the tokenizer's after it."""
        place = len(rendering.head().text)
        whole, head = texts[rendering.text], texts[rendering.text[:place]]
        start = self._tokens_before(rendering, place, texts)
        # Tokens of the head that in the whole are part of one that reaches over its end.
        open_end = head[start:] if head[:start] == whole[:start] else None
        keep = len(head_ids) - len(open_end or [])
        if open_end is None or head_ids[keep:] != open_end:
            raise self._cannot_tell(rendering, rendering.text[place:])
        rest = whole[start:]
        return [*head_ids[:keep], *rest], {k: [*v[:keep], *[0] * len(rest)] for k, v in fields.items()}

    def _answer_tokens(
        self, rendering: Rendering, answer: Answer, ids: list[int], texts: dict[str, list[int]]
    ) -> tuple[int, int]:
        """Where an answer begins and ends in `ids`, the tokens of the whole with images filled in."""
        whole = texts[rendering.text]
        start, end = (self._tokens_before(rendering, place, texts) for place in (answer.start, answer.end))
        shift = 0
        if answer.images == len(rendering.images):
            shift = len(ids) - len(whole)
        elif answer.images:
            # Images that come later fill in more: count what those before the answer do.
            before = Rendering(rendering.text[: answer.start], rendering.images[: answer.images], rendering.row)
            shift = len(self._process([before])[0][0][0]) - len(texts[before.text])
        if ids[start + shift : end + shift] != whole[start:end]:
            raise self._cannot_tell(rendering, rendering.text[answer.start : answer.end])
        return start + shift, end + shift

    @staticmethod
    def _cannot_tell(rendering: Rendering, text: str) -> RowError:
        return RowError(
            f"{rendering.row}: the processor writes {short(text)} otherwise than its tokenizer, so the assistant's "
            "tokens cannot be told apart."
        )

    def _tokens_before(self, rendering: Rendering, place: int, texts: dict[str, list[int]]) -> int:
        """Number of tokens that end at or before `place`: one that begins before an answer and ends in it is its."""
        whole, before = texts[rendering.text], texts[rendering.text[:place]]
        if whole[: len(before)] == before:
            return len(before)
        if not self.tokenizer.is_fast:
            raise RowError(
                f"{rendering.row}: a token reaches over the beginning or the end of "
                f"{short(rendering.text[place : place + 40])}, and only a fast tokenizer says which. Pass one."
            )
        offsets = self.tokenizer(rendering.text, add_special_tokens=False, return_offsets_mapping=True).offset_mapping
        return sum(end <= place for _, end in offsets)

    def _process(
        self, shown: list[Rendering]
    ) -> tuple[list[tuple[list[int], dict[str, list[int]]]], dict[str, torch.Tensor]]:
        """Tokens and their fields of each rendering, and the visual inputs of all."""
        batch = self._call(shown)
        # Some processors add labels of their own, which no backbone reads.
        batch.pop("labels", None)
        shape, mask = batch["input_ids"].shape, batch["attention_mask"].bool()
        per_token = [k for k, v in batch.items() if isinstance(v, torch.Tensor) and v.shape == shape]
        names = [k for k in per_token if k not in ("input_ids", "attention_mask")]
        rows = [
            (batch["input_ids"][i][mask[i]].tolist(), {k: batch[k][i][mask[i]].tolist() for k in names})
            for i in range(len(shown))
        ]
        return rows, {k: v for k, v in batch.items() if k not in per_token}

    def _call(self, shown: list[Rendering]) -> dict[str, torch.Tensor]:
        try:
            return self.processing_class(
                text=[r.text for r in shown],
                images=[r.images for r in shown],
                padding=True,
                return_tensors="pt",
                add_special_tokens=False,
            )
        except Exception as error:
            if len(shown) == 1:
                sizes = [image.size for image in shown[0].images]
                raise RowError(
                    f"{shown[0].row}: the processor cannot take its images of {sizes} pixels: {said(error)}"
                ) from error
            for rendering in shown:
                self._call([rendering])
            raise


def _beginning(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """The special tokens that a tokenizer puts before a text."""
    bare, whole = (tokenizer("a", add_special_tokens=special).input_ids for special in (False, True))
    places = [i for i in range(len(whole) - len(bare) + 1) if whole[i : i + len(bare)] == bare]
    return list(whole[: places[0]]) if places else []
