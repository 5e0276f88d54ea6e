"""From a row to the text that its chat template renders, with the places of the assistant's answers in it."""

import json
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from PIL import Image
from transformers import PreTrainedTokenizerBase, ProcessorMixin

from .images import load_row_images
from .rows import (
    CONVERT,
    IMAGE_COLUMNS,
    OTHER_MEDIA,
    PLACEHOLDER,
    PLACES,
    RowError,
    checked_messages,
    parts_of,
    row_name,
    said,
    said_of,
    short,
    texts_of,
)

PROBE = "probe"
TRAINING_TEMPLATE = (
    "Set `processing_class.chat_template` to a template for training, such as the one that "
    "`trl.chat_template_utils.get_training_chat_template` gives."
)


@dataclass(frozen=True)
class Answer:
    """An assistant's answer, with the end that the template gives it: `text[start:end]`, after `images` images."""

    start: int
    end: int
    images: int


@dataclass(frozen=True)
class Rendering:
    """
    A conversation, or a prompt, as the backbone reads it.

    Args:
        text (`str`): With one placeholder an image.
        images (`list[PIL.Image.Image]`): In the order of their placeholders.
        row (`str`): The row's name in messages.
        is_plain (`bool`): Whether no template was applied, so that the tokenizer adds what begins a text.
        answers (`list[Answer]`): Empty for a prompt.
    """

    text: str
    images: list[Image.Image]
    row: str
    is_plain: bool = False
    answers: list[Answer] = field(default_factory=list)

    def head(self) -> "Rendering":
        """Up to the first answer that has seen all images: what the processor fills images into, as for generation."""
        ends = [answer.start for answer in self.answers if answer.images == len(self.images)]
        return replace(self, text=self.text[: min(ends, default=None)], answers=[])

    def until(self, count: int) -> "Rendering":
        """The conversation up to the end of its first `count` answers."""
        answers = self.answers[:count]
        return replace(
            self, text=self.text[: answers[-1].end], images=self.images[: answers[-1].images], answers=answers
        )


class Renderer:
    """
    Applies a chat template to rows, and checks that what it renders is what the row says.

    Args:
        processing_class (`ProcessorMixin` or `PreTrainedTokenizerBase`): The backbone's.
        image_root (`str` or `Path`, *optional*): The only folder from which rows may name image files.
        vision_token_ids (`list[int]`, *optional*): Ids of visual tokens, which texts may not hold.
        chat_template (`str`, *optional*): In the place of the processing class's own.
        chat_template_kwargs (`dict`, *optional*): Variables of the template; a row's column of that name goes before.
    """

    def __init__(
        self,
        processing_class: ProcessorMixin | PreTrainedTokenizerBase,
        image_root: str | Path | None = None,
        vision_token_ids: tuple[int, ...] | list[int] = (),
        chat_template: str | None = None,
        chat_template_kwargs: dict[str, Any] | None = None,
    ):
        self.processing_class = processing_class
        self.is_vlm = isinstance(processing_class, ProcessorMixin)
        self.image_root = image_root
        self.chat_template = chat_template
        self.chat_template_kwargs = chat_template_kwargs or {}
        tokenizer = processing_class.tokenizer if self.is_vlm else processing_class
        marks = tokenizer.convert_ids_to_tokens(list(vision_token_ids))
        if self.is_vlm:
            marks.append(getattr(processing_class, "image_token", None))
        self.visual_tokens = sorted({mark for mark in marks if mark})
        self._takes_parts: bool | None = None

    def prompt(self, row: dict[str, Any]) -> Rendering:
        """The whole of a row's `prompt`, up to where the assistant's answer begins."""
        row = self._loaded(row)
        if row.get("prompt") is None:
            columns = sorted(k for k in row if not k.startswith("_"))
            raise RowError(f"{row_name(row)}: needs `prompt`; its columns are {columns}.")
        if isinstance(row["prompt"], str):
            self._refuse_images(row)
            return Rendering(row["prompt"], [], row_name(row), is_plain=True)
        messages, images = self._messages(row, checked_messages(row, "prompt"))
        text = self._render(messages, True, row)
        asked = [m for m in messages if m["role"] != "assistant"]
        self._check_rendered(asked, text, row)
        return Rendering(text, images, row_name(row))

    def conversation(self, row: dict[str, Any]) -> Rendering:
        """A row's `messages`, or its `prompt` and `completion`, up to the end of the last answer."""
        row = self._loaded(row)
        messages = _conversation(row)
        if messages is None:
            self._refuse_images(row)
            start, end = len(row["prompt"]), len(row["prompt"] + row["completion"])
            text = row["prompt"] + row["completion"]
            return Rendering(text, [], row_name(row), is_plain=True, answers=[Answer(start, end, 0)])
        messages, images = self._messages(row, messages)
        answers, rendered, last = [], "", 0
        for i, message in enumerate(messages):
            if message["role"] != "assistant":
                continue
            before = self._render(messages[:i], True, row)
            after = self._render(messages[: i + 1], False, row)
            if not before.startswith(rendered) or not after.startswith(before):
                raise RowError(
                    f"{row_name(row)}: the chat template does not render a conversation as its beginning and the rest, "
                    f"so the assistant's tokens cannot be told apart. Use a prefix-preserving template. "
                    f"{TRAINING_TEMPLATE}"
                )
            if not "".join(texts_of(message)).strip():
                raise RowError(f"{row_name(row)}: the assistant's message {i} is empty.")
            self._check_rendered(messages[last:i], before[len(rendered) :], row)
            self._check_rendered([message], after[len(before) :], row)
            shown = sum(part["type"] == "image" for m in messages[:i] for part in parts_of(m))
            answers.append(Answer(len(before), len(after), shown))
            rendered, last = after, i + 1
        if not answers:
            raise RowError(f"{row_name(row)}: no assistant message, so there is nothing to learn from.")
        return Rendering(rendered, images[: answers[-1].images], row_name(row), answers=answers)

    def _loaded(self, row: dict[str, Any]) -> dict[str, Any]:
        row = load_row_images(row, self.image_root)
        held = [column for column in OTHER_MEDIA if row.get(column) is not None and row[column] not in ("", [])]
        if held:
            raise RowError(f"{row_name(row)}: has {held}, and images alone are read. Leave such rows out.")
        return row

    def _refuse_images(self, row: dict[str, Any]) -> None:
        if _column_images(row):
            raise RowError(f"{row_name(row)}: images need conversational `prompt` and `completion`.")

    def _messages(self, row: dict, messages: list[dict]) -> tuple[list[dict], list[Image.Image]]:
        """Messages whose images are placeholders, and those images; without a place they go before the first text."""
        given = _column_images(row)
        messages = [{**m, "content": parts_of(m)} for m in messages]
        places = [part for m in messages for part in m["content"] if part["type"] == "image"]
        if (given or places) and not self.is_vlm:
            raise RowError(f"{row_name(row)}: has images, but the processing class is a tokenizer. Pass the processor.")
        self._check_texts(messages, bool(given), row)
        if given and not places:
            first = next((m for m in messages if m["role"] == "user"), None)
            if first is None:
                raise RowError(f"{row_name(row)}: has images, but no user message to show them in.")
            places = [{"type": "image"} for _ in given]
            first["content"] = [*places, *first["content"]]
        waiting = sum("image" not in part for part in places)
        if waiting != len(given):
            raise RowError(
                f"{row_name(row)}: {waiting} image placeholders in the messages, but {len(given)} images. Give as many "
                "images as placeholders, or no placeholder at all."
            )
        supply = iter(given)
        images = [part["image"] if "image" in part else next(supply) for part in places]
        for message in messages:
            message["content"] = [p if p["type"] == "text" else {"type": "image"} for p in message["content"]]
        return messages, images

    def _check_texts(self, messages: list[dict], has_images: bool, row: dict) -> None:
        """Text must not hold visual tokens: the backbone would look for their images, or read a mark as a word."""
        for i, message in enumerate(messages):
            texts = texts_of(message)
            for mark in self.visual_tokens:
                if any(mark in text for text in texts):
                    raise RowError(
                        f"{row_name(row)}: the text of message {i} holds the visual token {mark!r}. Take it out; an "
                        f'image is placed by a part {{"type": "image"}}, as {CONVERT} does.'
                    )
            place = next(filter(None, map(PLACES.search, texts)), None)
            if has_images and place is not None:
                raise RowError(
                    f"{row_name(row)}: the text of message {i} holds {place.group()!r}, which this backbone would read "
                    f'as a word. An image is placed by a part {{"type": "image"}}; {CONVERT} makes {PLACEHOLDER!r} one.'
                )

    def _render(self, messages: list[dict], generation_prompt: bool, row: dict) -> str:
        if self._takes_parts is None:
            self._takes_parts = self._content_form()
        if not self._takes_parts:
            messages = [{**m, "content": "".join(texts_of(m))} for m in messages]
        own = row.get("chat_template_kwargs") or {}
        tools = row.get("tools") or None
        try:
            return self._apply(
                messages,
                generation_prompt,
                tools=json.loads(tools) if isinstance(tools, str) else tools,
                **{**self.chat_template_kwargs, **{k: v for k, v in own.items() if v is not None}},
            )
        except Exception as error:
            # Templates raise errors of Jinja, of Python, or their own.
            roles = [m["role"] for m in messages]
            hint = "" if roles else " The conversation begins with the assistant: put what it answers before."
            raise RowError(
                f"{row_name(row)}: the chat template refuses messages of the roles {roles}: {said(error)}{hint}"
            ) from error

    def _apply(self, messages: list[dict], generation_prompt: bool, **variables: Any) -> str:
        options = {"tokenize": False, "add_generation_prompt": generation_prompt, **variables}
        if self.chat_template is not None:
            options["chat_template"] = self.chat_template
        return self.processing_class.apply_chat_template(messages, **options)

    def _content_form(self) -> bool:
        """Whether the template takes content as parts, as most of processors do, or as text, as most of tokenizers."""
        for as_parts in (self.is_vlm, not self.is_vlm):
            content = [{"type": "text", "text": PROBE}] if as_parts else PROBE
            try:
                text = self._apply([{"role": "user", "content": content}], True, **self.chat_template_kwargs)
            except Exception:
                # A template that refuses this one message refuses it in either form, and says so of the row's own.
                continue
            if PROBE in text and "'type'" not in text:
                return as_parts
        return self.is_vlm

    def _check_rendered(self, messages: list[dict], rendered: str, row: dict) -> None:
        """What a message says must be in its rendering, but for white space, which templates trim."""
        rendered = "".join(rendered.split())
        for message in messages:
            for text in said_of(message):
                if "".join(text.split()) not in rendered:
                    raise RowError(
                        f"{row_name(row)}: the chat template leaves out text of the role {message['role']!r}, which "
                        f"begins {short(text, 40)}. {TRAINING_TEMPLATE}"
                    )


def _conversation(row: dict[str, Any]) -> list[dict[str, Any]] | None:
    """The row's messages, or `None` for a plain prompt and completion."""
    name = row_name(row)
    if row.get("messages") is not None:
        return checked_messages(row, "messages")
    if row.get("prompt") is not None and row.get("completion") is not None:
        prompt, completion = row["prompt"], row["completion"]
        if not completion.strip() if isinstance(completion, str) else completion == []:
            raise RowError(f"{name}: `completion` is empty.")
        if isinstance(prompt, str) and isinstance(completion, str):
            return None
        if isinstance(completion, str):
            row = {**row, "completion": [{"role": "assistant", "content": completion}]}
        return [*checked_messages(row, "prompt"), *checked_messages(row, "completion")]
    columns = sorted(k for k in row if not k.startswith("_"))
    raise RowError(
        f"{name}: needs `messages`, or `prompt` and `completion`; its columns are {columns}. Other formats are "
        f"converted by {CONVERT}."
    )


def _column_images(row: dict[str, Any]) -> list[Image.Image]:
    """Pictures of a row's image columns, of which one may hold some."""
    held = {c: row[c] for c in IMAGE_COLUMNS if row.get(c) is not None and row.get(c) != []}
    if len(held) > 1:
        raise RowError(f"{row_name(row)}: has pictures under `images` and under `image`. Keep one of the columns.")
    cell: Any = next(iter(held.values()), [])
    return list(cell) if isinstance(cell, (list, tuple)) else [cell]
