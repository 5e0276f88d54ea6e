"""From conversations, with images or without, to one padded batch."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase, ProcessorMixin
from transformers.utils import logging

from .encoding import Encoder, Encoding
from .padding import padded
from .rendering import Renderer
from .rows import RowError

logger = logging.get_logger(__name__)


@dataclass
class LatentActionDataCollator:
    """
    Makes batches of conversations in TRL's formats: `messages`, or `prompt` and `completion`; with `images`.

    A conversation's tokens are those of its whole rendering, padded on the right to the longest of the batch. Too long
    conversations lose whole turns from their end, never a part of an image. An answer that the template does not end
    is ended by the tokenizer's EOS where it is the conversation's last.

    Args:
        processing_class (`ProcessorMixin` or `PreTrainedTokenizerBase`): The backbone's.
        max_length (`int`, *optional*): Longest row, in tokens, visual ones included.
        assistant_only (`bool`, defaults to `True`): Count the loss on assistant tokens only; else on all tokens that
            are neither padding nor visual.
        image_root (`str` or `Path`, *optional*): Where rows may name image files.
        vision_token_ids (`list[int]`): Ids of visual tokens.
        max_positions (`int`, *optional*): Tokens that the backbone has positions for; a longer row is an error.
        end_token_ids (`int` or `list[int]`, *optional*): What ends an answer beside the tokenizer's EOS: the
            `eos_token_id` of the model's generation configuration.

    Returns:
        `input_ids`, `attention_mask`, `loss_mask` (the targets that count), `token_mask` (neither padding nor visual),
        each `[B, L]`; `has_image` `[B]`; and `vision`, the backbone's further inputs.

    Raises:
        RowError: For a row that cannot be used, with its number (`_row`), what was found and what works.
    """

    processing_class: ProcessorMixin | PreTrainedTokenizerBase
    max_length: int | None = None
    assistant_only: bool = True
    image_root: str | Path | None = None
    vision_token_ids: tuple[int, ...] | list[int] = ()
    end_token_ids: int | list[int] | None = None
    max_positions: int | None = None

    def __post_init__(self):
        self.renderer = Renderer(self.processing_class, self.image_root, self.vision_token_ids)
        self.encoder = Encoder(self.processing_class)
        self.tokenizer = self.encoder.tokenizer
        ends = self.end_token_ids if isinstance(self.end_token_ids, list) else [self.end_token_ids]
        self.ends = {*ends, self.tokenizer.eos_token_id} - {None}
        special = {i for i, token in self.tokenizer.added_tokens_decoder.items() if token.special}
        self.special = special | set(self.tokenizer.all_special_ids)

    @classmethod
    def of(cls, model: Any, processing_class: Any, **options: Any) -> "LatentActionDataCollator":
        """One for a [`LatentActionModel`], whose visual tokens, ends of texts and positions it knows."""
        return cls(
            processing_class,
            vision_token_ids=model.config.vision_token_ids,
            end_token_ids=model.generation_config.eos_token_id,
            max_positions=model.backbone_view.max_positions,
            **options,
        )

    def __call__(self, rows: list[dict[str, Any]]) -> dict[str, Any]:
        encodings, vision = self.encoder([self.renderer.conversation(row) for row in rows])
        if self.max_length is not None:
            counts = [self._fitting(encoding) for encoding in encodings]
            kept = [e.rendering.until(count) for e, count in zip(encodings, counts, strict=True)]
            if any(len(k.images) < len(e.rendering.images) for k, e in zip(kept, encodings, strict=True)):
                encodings, vision = self.encoder(kept)
            else:
                encodings = [_first_answers(e, count) for e, count in zip(encodings, counts, strict=True)]
        for encoding in encodings:
            self._end(encoding)
            if self.max_positions is not None and len(encoding.ids) > self.max_positions:
                raise RowError(
                    f"{encoding.rendering.row}: it has {len(encoding.ids)} tokens, and the backbone has positions for "
                    f"{self.max_positions}. Set `max_length` to that, or shorten it."
                )
        return self._batch(encodings, vision)

    def _fitting(self, encoding: Encoding) -> int:
        """Number of answers that `max_length` has room for, with all that is before them."""
        ends = [end + (self._end_of(encoding, i) is None) for i, (_, end) in enumerate(encoding.answers)]
        count = sum(end <= self.max_length for end in ends)
        if not count:
            raise RowError(
                f"{encoding.rendering.row}: its first exchange has {ends[0]} tokens, more than `max_length` = "
                f"{self.max_length}. Raise the limit, shorten the prompt, or make images smaller."
            )
        return count

    def _end_of(self, encoding: Encoding, answer: int) -> int | None:
        """The special token that an answer ends with, but for white space after it."""
        start, end = encoding.answers[answer]
        ids = encoding.ids[start:end]
        last = max((i for i, token in enumerate(ids) if token in self.special or token in self.ends), default=None)
        return None if last is None or self.tokenizer.decode(ids[last + 1 :]).strip() else ids[last]

    def _end(self, encoding: Encoding) -> None:
        """Ends the last answer, so that a model that learns from it learns to stop."""
        found = self._end_of(encoding, -1)
        if found is not None:
            if found not in self.ends:
                logger.warning_once(
                    f"Answers end with {self.tokenizer.convert_ids_to_tokens(found)!r}, at which generation does not "
                    "stop. Add its id to `model.generation_config.eos_token_id`."
                )
            return
        if not encoding.rendering.is_plain:
            logger.warning_once(
                "The chat template writes no end-of-text token after an answer, so that a model would not learn to "
                f"stop: {self.tokenizer.eos_token or 'none'} is put at the end of each conversation. To learn it after "
                "every answer, use a template that writes it."
            )
        if self.tokenizer.eos_token_id is None:
            raise RowError(
                f"{encoding.rendering.row}: its answer has no end, and the tokenizer no EOS token. Set "
                "`tokenizer.eos_token`, or use a chat template that ends answers."
            )
        encoding.ids.append(self.tokenizer.eos_token_id)
        for values in encoding.fields.values():
            values.append(0)
        start, end = encoding.answers[-1]
        encoding.answers[-1] = (start, end + 1)

    def _batch(self, encodings: list[Encoding], vision: dict[str, torch.Tensor]) -> dict[str, Any]:
        fields = padded(self.tokenizer, [(e.ids, e.fields) for e in encodings], left=False)
        input_ids, attention_mask = fields.pop("input_ids"), fields.pop("attention_mask")
        loss_mask = torch.zeros_like(attention_mask, dtype=torch.bool)
        for row, encoding in enumerate(encodings):
            for start, end in encoding.answers:
                loss_mask[row, start:end] = True
        if "token_type_ids" in fields:
            # A backbone may read a prompt both ways: what comes after it, and rows without an image, are not such.
            fields["completion_mask"] = torch.ones_like(input_ids)
            for row, encoding in enumerate(encodings):
                if encoding.rendering.answers[0].images:
                    fields["completion_mask"][row, : encoding.answers[0][0]] = 0
        visual = torch.isin(input_ids, torch.tensor(list(self.vision_token_ids), dtype=torch.long))
        token_mask = attention_mask.bool() & ~visual
        return {
            "input_ids": input_ids,
            "attention_mask": attention_mask,
            "loss_mask": (loss_mask & token_mask) if self.assistant_only else token_mask,
            "token_mask": token_mask,
            "has_image": torch.tensor([bool(e.rendering.images) for e in encodings]),
            "vision": {**vision, **fields},
        }


def _first_answers(encoding: Encoding, count: int) -> Encoding:
    """An encoding cut after its first `count` answers."""
    end = encoding.answers[count - 1][1]
    return Encoding(
        ids=encoding.ids[:end],
        fields={name: values[:end] for name, values in encoding.fields.items()},
        answers=encoding.answers[:count],
        rendering=encoding.rendering.until(count),
    )
