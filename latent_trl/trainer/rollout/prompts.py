"""From the rows of a rollout batch to encoded prompts, each processed once, and from tokens to completions."""

import math
from typing import Any

from datasets import IterableDataset
from trl.data_utils import is_conversational, prepare_multimodal_messages

from ...data.bad_rows import BadRows
from ...data.images import load_row_images
from ...data.prompts import EncodedPrompt, PromptEncoder
from ...data.reading import StoredRows
from ...rewards.conversation import IMAGE_COLUMNS
from ..run.loading import check_one_set
from .rollout import Sample
from .source import RolloutSource

# What [`StoredRows`] adds to a row.
PLACE_KEYS = ("_row", "_index", "_source")


def groups_of(rows: list[dict[str, Any]], first: int, size: int) -> tuple[list[dict[str, Any]], int]:
    """
    One row for each call of the generator, where TRL repeats a row for every sample of its group.

    Args:
        rows (`list[dict]`): Of this process.
        first (`int`): The place of its first row in the batch of all processes.
        size (`int`): Samples of a group.

    Returns:
        The rows, and how often each is to be answered. A group that processes share is a part on each; parts of
        unlike sizes are cut to their common divisor, and then a row stands for several calls.
    """
    starts = [0, *(i for i in range(1, len(rows)) if (first + i) % size == 0), len(rows)]
    lengths = [end - start for start, end in zip(starts, starts[1:])]
    copies = math.gcd(*lengths)
    parts = [rows[start] for start, length in zip(starts, lengths) for _ in range(length // copies)]
    return parts, copies


class PromptReader:
    """
    Turns rows into encoded prompts, each once.

    Args:
        encoder (`PromptEncoder`): Of the prompts.
        image_root (`str`, *optional*): The only folder from which rows may name image files.
        bad_rows (`BadRows`): Decides what becomes of rows that cannot be used.
    """

    def __init__(self, encoder: PromptEncoder, image_root: str | None, bad_rows: BadRows):
        self.encoder = encoder
        self.image_root = image_root
        self.bad_rows = bad_rows

    @classmethod
    def of(cls, trainer: Any) -> "PromptReader":
        """The reader of a trainer's data sets."""
        args, model = trainer.args, trainer.accelerator.unwrap_model(trainer.model)
        most = model.backbone_view.max_positions
        if most is not None and args.max_completion_length >= most:
            raise ValueError(
                f"`max_completion_length={args.max_completion_length}` leaves no room for a prompt: the backbone has "
                f"positions for {most} tokens. Lower it."
            )
        encoder = PromptEncoder(
            trainer.processing_class,
            args.image_root,
            chat_template_kwargs=args.chat_template_kwargs,
            max_length=None if most is None else most - args.max_completion_length,
        )
        evaluated = stored(trainer.eval_dataset)
        evaluated = evaluated.values() if isinstance(evaluated, dict) else [evaluated]
        sources = [stored(trainer.train_dataset, "train_dataset"), *evaluated]
        sources = [rows for rows in sources if isinstance(rows, StoredRows)]
        return cls(encoder, args.image_root, BadRows(args.on_bad_row, args.output_dir, sources))

    def __call__(self, rows: list[dict[str, Any]]) -> list[tuple[dict[str, Any], EncodedPrompt]]:
        """
        Each row as reward functions see it, its pictures loaded, and its prompt. Neighbours that are the same object
        are read once.

        Raises:
            RowError: For a row that cannot be used, unless `bad_rows` puts another in its place.
        """
        return [read for _, read in self.bad_rows.usable(rows, self._read)]

    def load(self, row: dict[str, Any]) -> dict[str, Any]:
        """A row that can be used, its pictures loaded."""
        return self([row])[0][0]

    def preflight(self, seed: int) -> None:
        """Looks at some rows of each data set; raises [`RowError`] as `bad_rows` decides."""
        self.bad_rows.preflight(self._read, seed=seed)

    def usable(self, rows: Any) -> Any:
        """The rows of an evaluation set that can be used; a stream's bad ones are replaced when they are met."""
        if not isinstance(rows, StoredRows):
            return rows
        return rows.only(self.bad_rows.usable_places(rows, self._read))

    def _read(self, row: dict[str, Any]) -> tuple[dict[str, Any], EncodedPrompt]:
        loaded = load_row_images(row, self.image_root)
        encoded = self.encoder(loaded)
        return {name: value for name, value in loaded.items() if name not in PLACE_KEYS}, encoded


def answers(rows: list[dict[str, Any]], copies: int, reader: PromptReader, source: RolloutSource) -> list[Sample]:
    """
    Answers rows, each processed once.

    Args:
        rows (`list[dict]`): As [`groups_of`] gives them; the same object for calls of one prompt.
        copies (`int`): Samples of each.
        reader (`PromptReader`): Of the rows.
        source (`RolloutSource`): What generates.

    Returns:
        `list[Sample]`: Row by row.
    """
    read = reader(rows)
    samples = source([row for row, _ in read], [prompt for _, prompt in read], copies)
    processing_class = reader.encoder.processing_class
    texts = processing_class.batch_decode([s.completion_ids for s in samples], skip_special_tokens=True)
    for sample, text in zip(samples, texts, strict=True):
        conversation = is_conversational({"prompt": sample.row["prompt"]})
        sample.completion = [{"role": "assistant", "content": text}] if conversation else text
    return samples


def stored(dataset: Any, name: str = "eval_dataset") -> Any:
    """A data set, or a dict of several, as rows that are read one by one; streams and names of sets stay."""
    check_one_set(dataset, name)
    if isinstance(dataset, dict):
        return {key: stored(rows, f"{name}[{key!r}]") for key, rows in dataset.items()}
    if dataset is None or isinstance(dataset, (str, StoredRows, IterableDataset)):
        return dataset
    return StoredRows(dataset, name)


def reward_prompts(rows: list[dict[str, Any]]) -> list[Any]:
    """Prompts as reward functions see them, with the pictures in their places, as TRL gives them."""
    prompts = []
    for row in rows:
        prompt = row["prompt"]
        if any(name in row for name in IMAGE_COLUMNS) and not isinstance(prompt, str):
            images = row.get("images")
            if images is None:
                images = [row["image"]] if row.get("image") is not None else []
            prompt = prepare_multimodal_messages(prompt, images=list(images) or None)
        prompts.append(prompt)
    return prompts
