"""From prompts of a data set to the inputs of `generate`."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase, ProcessorMixin

from .encoding import Encoder
from .padding import joined_vision, padded
from .rendering import Renderer, Rendering
from .rows import RowError


def check_prompts(dataset: Any, name: str) -> None:
    """Raises `ValueError` unless a data set, given as the argument `name`, has a length, rows, and `prompt`."""
    if dataset is None:
        raise ValueError(f"`{name}` must be given.")
    if not hasattr(dataset, "__len__") or not hasattr(dataset, "__getitem__"):
        raise ValueError(f"`{name}` is a {type(dataset).__name__}, which has no length. Give a `datasets.Dataset`.")
    if len(dataset) == 0:
        raise ValueError(f"`{name}` is empty.")
    columns = getattr(dataset, "column_names", None) or list(dataset[0])
    if "prompt" not in columns:
        raise ValueError(f"`{name}` has the columns {sorted(columns)}; it needs `prompt`.")


@dataclass
class EncodedPrompt:
    """
    One prompt, ready to be put into a batch with others.

    Args:
        ids (`list[int]`): Its tokens, without padding.
        fields (`dict[str, list[int]]`): What else the processor says of each token.
        vision (`dict[str, torch.Tensor]`): The visual inputs of its images; empty without an image.
        rendering (`Rendering`): Its text and images.
    """

    ids: list[int]
    fields: dict[str, list[int]]
    vision: dict[str, torch.Tensor]
    rendering: Rendering


class PromptEncoder:
    """
    Turns prompts into tokens and visual inputs, each once, and makes batches of them.

    Args:
        processing_class (`ProcessorMixin` or `PreTrainedTokenizerBase`): The backbone's.
        image_root (`str` or `Path`, *optional*): The only folder from which rows may name image files.
        chat_template (`str`, *optional*): In the place of the processing class's own.
        chat_template_kwargs (`dict`, *optional*): Variables of the template.
        max_length (`int`, *optional*): Most tokens of a prompt, visual ones included.
        min_length (`int`, defaults to `1`): Least tokens of a prompt.
    """

    def __init__(
        self,
        processing_class: ProcessorMixin | PreTrainedTokenizerBase,
        image_root: str | Path | None = None,
        chat_template: str | None = None,
        chat_template_kwargs: dict[str, Any] | None = None,
        max_length: int | None = None,
        min_length: int = 1,
    ):
        self.processing_class = processing_class
        self.max_length, self.min_length = max_length, min_length
        self.encoder = Encoder(processing_class)
        self.renderer = Renderer(
            processing_class, image_root, chat_template=chat_template, chat_template_kwargs=chat_template_kwargs
        )

    def __call__(self, row: dict[str, Any]) -> EncodedPrompt:
        """
        One prompt.

        Args:
            row (`dict`): With `prompt`, a list of messages or a text, and `images`, a list, where it has some.

        Raises:
            RowError: For a row that cannot be used, an empty prompt or a longer one; it names the row by its `_row`.
        """
        rendering = self.renderer.prompt(row)
        (encoding,), vision = self.encoder([rendering])
        if not encoding.ids:
            raise RowError(f"{rendering.row}: its prompt has no tokens. Say something in it.")
        if len(encoding.ids) < self.min_length:
            raise RowError(
                f"{rendering.row}: its prompt has {len(encoding.ids)} tokens, and needs at least "
                f"{self.min_length}. Say more in it."
            )
        if self.max_length is not None and len(encoding.ids) > self.max_length:
            raise RowError(
                f"{rendering.row}: its prompt has {len(encoding.ids)} tokens, more than the limit of "
                f"{self.max_length}. Raise the limit, shorten the prompt, or make images smaller."
            )
        return EncodedPrompt(encoding.ids, encoding.fields, vision, rendering)

    def collate(self, prompts: list[EncodedPrompt]) -> dict[str, torch.Tensor]:
        """
        A batch of prompts, padded on the left, exactly as the processor makes it of all of them together.

        Returns:
            `input_ids`, `attention_mask` and the fields of tokens `[B, P]`, and the visual inputs, on the CPU.
        """
        batch = padded(self.encoder.tokenizer, [(prompt.ids, prompt.fields) for prompt in prompts], left=True)
        shown = [prompt for prompt in prompts if prompt.vision]
        vision = joined_vision([prompt.vision for prompt in shown])
        if vision is None:
            vision = self.encoder.vision([prompt.rendering for prompt in shown])
        return {**batch, **vision}


def encode_prompts(
    processing_class: ProcessorMixin | PreTrainedTokenizerBase,
    rows: list[dict[str, Any]],
    image_root: str | Path | None = None,
    chat_template: str | None = None,
    chat_template_kwargs: dict[str, Any] | None = None,
    max_length: int | None = None,
) -> dict[str, torch.Tensor]:
    """
    Prompts of several rows, padded on the left: one batch of a [`PromptEncoder`], whose arguments and errors these are.

    Returns:
        `input_ids`, `attention_mask` `[B, P]`, further fields of tokens, and the visual inputs, on the CPU.
    """
    encoder = PromptEncoder(processing_class, image_root, chat_template, chat_template_kwargs, max_length)
    return encoder.collate([encoder({"_row": i, **row}) for i, row in enumerate(rows)])
