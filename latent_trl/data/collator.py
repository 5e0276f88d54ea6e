"""From conversations, with images or without, to one padded batch."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase, ProcessorMixin

from .images import ImageError, load_image


class RowError(ValueError):
    """A row of a data set that cannot be used. Says which, what was found, and what works."""


@dataclass
class Segment:
    """A stretch of a conversation: a prompt up to an assistant's answer, or that answer."""

    text: str
    images: list[Any]
    is_answer: bool
    row: str = "A row"
    # Text that no template was applied to, which the tokenizer begins as it does every text.
    is_plain: bool = False
    ids: list[int] | None = None
    fields: dict[str, list[int]] | None = None


@dataclass
class LatentActionDataCollator:
    """
    Makes batches of conversations in TRL's formats: `messages`, or `prompt` and `completion`; with `images`.

    Prompts and answers are tokenised apart, as they are when the model generates, and padded on the right to the
    longest of the batch. Too long conversations lose whole turns from their end, never a part of an image.

    Args:
        processing_class (`ProcessorMixin` or `PreTrainedTokenizerBase`): The backbone's.
        max_length (`int`, *optional*): Longest row, in tokens, visual ones included.
        assistant_only (`bool`, defaults to `True`): Count the loss on assistant tokens only; else on all tokens that
            are neither padding nor visual.
        image_root (`str` or `Path`, *optional*): Where rows may name image files.
        vision_token_ids (`list[int]`): Ids of visual tokens.

    Returns:
        `input_ids`, `attention_mask`, `loss_mask` (the targets that count), `token_mask` (neither padding nor visual),
        each `[B, L]`; `has_image` `[B]`; and `vision`, the backbone's further inputs.
    """

    processing_class: ProcessorMixin | PreTrainedTokenizerBase
    max_length: int | None = None
    assistant_only: bool = True
    image_root: str | Path | None = None
    vision_token_ids: tuple[int, ...] | list[int] = ()

    def __post_init__(self):
        self.is_vlm = isinstance(self.processing_class, ProcessorMixin)
        self.tokenizer = self.processing_class.tokenizer if self.is_vlm else self.processing_class
        if self.tokenizer.pad_token_id is None:
            self.tokenizer.pad_token = self.tokenizer.eos_token

    def __call__(self, rows: list[dict[str, Any]]) -> dict[str, Any]:
        conversations = [self._segments(row) for row in rows]
        vision = self.tokenize([s for segments in conversations for s in segments])
        if self.max_length is not None:
            kept = [self._fit(segments) for segments in conversations]
            dropped = [s for all, some in zip(conversations, kept, strict=True) for s in all[len(some) :]]
            if any(s.images for s in dropped):
                vision = self.tokenize([s for segments in kept for s in segments])
            conversations = kept
        return self._pad(conversations, vision)

    def _segments(self, row: dict[str, Any]) -> list[Segment]:
        name = _name(row)
        messages = self._messages(row)
        images = self._images(row)
        if messages is None:
            if images:
                raise RowError(f"{name}: images need conversational `prompt` and `completion`.")
            completion, end = row["completion"], self.tokenizer.eos_token or ""
            if not completion.endswith(end):
                completion += end
            return [Segment(row["prompt"], [], False, name, is_plain=True), Segment(completion, [], True, name)]
        messages = self._place_images(messages, images, row)
        segments, rendered, start = [], "", 0
        pending = list(images)
        for i, message in enumerate(messages):
            if message["role"] != "assistant":
                continue
            before = self._render(messages[:i], True, row)
            after = self._render(messages[: i + 1], False, row)
            if not before.startswith(rendered) or not after.startswith(before):
                raise RowError(
                    f"{name}: the chat template does not render a conversation as its beginning and the rest, so "
                    "the assistant's tokens cannot be told apart. Use a prefix-preserving template."
                )
            count = sum(part["type"] == "image" for m in messages[start:i] for part in _parts(m))
            segments.append(Segment(before[len(rendered) :], pending[:count], False, name))
            pending = pending[count:]
            if not _text_of(message).strip():
                raise RowError(f"{name}: the assistant's message {i} is empty.")
            segments.append(Segment(after[len(before) :], [], True, name))
            rendered, start = after, i
        if not segments:
            raise RowError(f"{name}: no assistant message, so there is nothing to learn from.")
        return segments

    def prompt(self, row: dict[str, Any]) -> Segment:
        """The whole of a row's `prompt`, up to where the assistant's answer begins."""
        if isinstance(row["prompt"], str):
            return Segment(row["prompt"], [], False, _name(row), is_plain=True)
        images = self._images(row)
        messages = self._place_images(_checked_messages(row["prompt"], "prompt", row), images, row)
        return Segment(self._render(messages, True, row), images, False, _name(row))

    def _messages(self, row: dict[str, Any]) -> list[dict[str, Any]] | None:
        name = _name(row)
        if row.get("messages") is not None:
            return _checked_messages(row["messages"], "messages", row)
        if row.get("prompt") is not None and row.get("completion") is not None:
            prompt, completion = row["prompt"], row["completion"]
            empty = not completion.strip() if isinstance(completion, str) else completion == []
            if empty:
                raise RowError(f"{name}: `completion` is empty.")
            if isinstance(prompt, str) and isinstance(completion, str):
                return None
            if isinstance(completion, str):
                completion = [{"role": "assistant", "content": completion}]
            return [*_checked_messages(prompt, "prompt", row), *_checked_messages(completion, "completion", row)]
        columns = sorted(k for k in row if not k.startswith("_"))
        raise RowError(f"{name}: needs `messages`, or `prompt` and `completion`; its columns are {columns}.")

    def _images(self, row: dict[str, Any]) -> list[Any]:
        images = row.get("images")
        if images is None and row.get("image") is not None:
            images = [row["image"]]
        if images is not None and not isinstance(images, (list, tuple)):
            images = [images]
        if images and not self.is_vlm:
            raise RowError(f"{_name(row)}: has images, but the processing class is a tokenizer. Pass the processor.")
        try:
            return [load_image(image, self.image_root) for image in images or []]
        except ImageError as error:
            raise RowError(f"{_name(row)}: {error}") from error

    def _place_images(self, messages: list[dict], images: list[Any], row: dict) -> list[dict]:
        """Content as typed parts for a processor; images without a place go before the first user message's text."""
        self._check_texts(messages, row)
        if not self.is_vlm:
            return [{**m, "content": _text_of(m)} for m in messages]
        messages = [{**m, "content": _parts(m)} for m in messages]
        placed = sum(part["type"] == "image" for m in messages for part in m["content"])
        if images and not placed:
            first = next((m for m in messages if m["role"] == "user"), None)
            if first is None:
                raise RowError(f"{_name(row)}: has images, but no user message to show them in.")
            first["content"] = [{"type": "image"}] * len(images) + first["content"]
        elif placed != len(images):
            raise RowError(
                f"{_name(row)}: {placed} image placeholders in the messages, but {len(images)} images. Give as many "
                "images as placeholders, or no placeholder at all."
            )
        return messages

    def _check_texts(self, messages: list[dict], row: dict) -> None:
        """Text must not hold visual tokens: the backbone would look for their images."""
        marks = [t for t in self.tokenizer.convert_ids_to_tokens(list(self.vision_token_ids)) if t]
        marks += [t for t in [getattr(self.processing_class, "image_token", None)] if t and t not in marks]
        for i, message in enumerate(messages):
            found = [mark for mark in marks if mark in _text_of(message)]
            if found:
                raise RowError(
                    f"{_name(row)}: the text of message {i} holds the visual token {found[0]!r}. Take it out; an image "
                    'is placed by a part {"type": "image"}.'
                )

    def _render(self, messages: list[dict], generation_prompt: bool, row: dict) -> str:
        try:
            return self.processing_class.apply_chat_template(
                messages, tokenize=False, add_generation_prompt=generation_prompt
            )
        except Exception as error:
            # Templates raise errors of Jinja, of Python, or their own.
            roles = [m["role"] for m in messages]
            raise RowError(f"{_name(row)}: the chat template refuses messages of the roles {roles}: {error}") from error

    def tokenize(self, segments: list[Segment]) -> dict[str, torch.Tensor]:
        """Fills in the segments' ids, and returns the visual inputs of all of them in order."""
        for is_plain in (False, True):
            some = [s for s in segments if not s.images and s.is_plain == is_plain]
            if some:
                ids = self.tokenizer([s.text for s in some], add_special_tokens=is_plain).input_ids
                for segment, own in zip(some, ids, strict=True):
                    segment.ids, segment.fields = own, {}
        shown = [s for s in segments if s.images]
        if not shown:
            return {}
        batch = self._process(shown)
        # Some processors add labels of their own, which no backbone reads.
        batch.pop("labels", None)
        shape, mask = batch["input_ids"].shape, batch["attention_mask"].bool()
        per_token = [k for k, v in batch.items() if isinstance(v, torch.Tensor) and v.shape == shape]
        for i, segment in enumerate(shown):
            segment.ids = batch["input_ids"][i][mask[i]].tolist()
            segment.fields = {
                k: batch[k][i][mask[i]].tolist() for k in per_token if k not in ("input_ids", "attention_mask")
            }
        return {k: v for k, v in batch.items() if k not in per_token}

    def _process(self, shown: list[Segment]) -> dict[str, torch.Tensor]:
        try:
            return self.processing_class(
                text=[s.text for s in shown],
                images=[s.images for s in shown],
                padding=True,
                return_tensors="pt",
                add_special_tokens=False,
            )
        except Exception as error:
            if len(shown) == 1:
                sizes = [image.size for image in shown[0].images]
                raise RowError(
                    f"{shown[0].row}: the processor cannot take its images of {sizes} pixels: {error}"
                ) from error
            for segment in shown:
                self._process([segment])
            raise

    def _fit(self, segments: list[Segment]) -> list[Segment]:
        """Whole turns from the front, as many as fit."""
        end, length = 0, 0
        for i, segment in enumerate(segments):
            length += len(segment.ids)
            if length > self.max_length:
                break
            if segment.is_answer:
                end = i + 1
        if not end:
            first = sum(len(s.ids) for s in segments[:2])
            raise RowError(
                f"{segments[0].row}: its first exchange has {first} tokens, more than `max_length` = "
                f"{self.max_length}. Raise the limit, shorten the prompt, or make images smaller."
            )
        return segments[:end]

    def _pad(self, conversations: list[list[Segment]], vision: dict[str, torch.Tensor]) -> dict[str, Any]:
        rows, length = len(conversations), max(sum(len(s.ids) for s in segments) for segments in conversations)
        input_ids = torch.full((rows, length), self.tokenizer.pad_token_id)
        attention_mask = torch.zeros(rows, length, dtype=torch.long)
        loss_mask = torch.zeros(rows, length, dtype=torch.bool)
        names = sorted({k for segments in conversations for s in segments for k in s.fields})
        fields = {k: torch.zeros(rows, length, dtype=torch.long) for k in names}
        for row, segments in enumerate(conversations):
            start = 0
            for segment in segments:
                end = start + len(segment.ids)
                input_ids[row, start:end] = torch.tensor(segment.ids, dtype=torch.long)
                attention_mask[row, start:end] = 1
                loss_mask[row, start:end] = segment.is_answer
                for name, values in segment.fields.items():
                    fields[name][row, start:end] = torch.tensor(values, dtype=torch.long)
                start = end
        if "token_type_ids" in fields:
            # A backbone may read a prompt both ways: what comes after it, and rows without an image, are not such.
            fields["completion_mask"] = torch.ones(rows, length, dtype=torch.long)
            for row, segments in enumerate(conversations):
                fields["completion_mask"][row, : len(segments[0].ids) if segments[0].images else 0] = 0
        visual = torch.isin(input_ids, torch.tensor(list(self.vision_token_ids), dtype=torch.long))
        token_mask = attention_mask.bool() & ~visual
        return {
            "input_ids": input_ids,
            "attention_mask": attention_mask,
            "loss_mask": (loss_mask & token_mask) if self.assistant_only else token_mask,
            "token_mask": token_mask,
            "has_image": torch.tensor([any(s.images for s in segments) for segments in conversations]),
            "vision": {**vision, **fields},
        }


def _checked_messages(value: Any, column: str, row: dict[str, Any]) -> list[dict[str, Any]]:
    """`value` as a list of messages with a role, and with text or parts that are text or images."""
    name = f"{_name(row)}: `{column}`"
    if not isinstance(value, (list, tuple)) or not all(isinstance(message, dict) for message in value):
        raise RowError(f'{name} must be a list of {{"role": ..., "content": ...}}, got {_short(value)}.')
    for i, message in enumerate(value):
        role, content = message.get("role"), message.get("content")
        if not isinstance(role, str) or not role:
            raise RowError(f"{name}: message {i} has the role {_short(role)}; a name such as 'user' is needed.")
        if isinstance(content, str):
            continue
        if not isinstance(content, (list, tuple)) or not all(isinstance(part, dict) for part in content):
            raise RowError(
                f"{name}: the content of message {i} must be text or a list of parts, got {_short(content)}."
            )
        for part in content:
            kind = part.get("type")
            if kind not in ("text", "image") or (kind == "text" and not isinstance(part.get("text"), str)):
                raise RowError(f"{name}: message {i} has the part {_short(part)}; parts are text or images.")
            if kind == "image" and role == "assistant":
                raise RowError(f"{name}: message {i}, the assistant's, holds an image. Images belong to other roles.")
    return list(value)


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."


def _parts(message: dict[str, Any]) -> list[dict[str, Any]]:
    content = message["content"]
    if isinstance(content, str):
        return [{"type": "text", "text": content}]
    # Arrow fills the fields that a part does not have with None.
    return [{k: v for k, v in part.items() if v is not None} for part in content]


def _text_of(message: dict[str, Any]) -> str:
    return "".join(part.get("text", "") for part in _parts(message) if part["type"] == "text")


def _name(row: dict[str, Any]) -> str:
    return f"Row {row['_row']}" if "_row" in row else "A row"
