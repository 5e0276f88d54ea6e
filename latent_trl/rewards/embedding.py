"""Similarity of the answer to a reference, measured by a sentence encoder."""

from collections.abc import Callable
from typing import Any

import torch
from accelerate import PartialState
from transformers import AutoModel, AutoTokenizer

from .conversation import completion_text, require_column


class TextEmbedder:
    """
    Sentence embeddings from a transformers encoder: mean over the tokens of the last layer, scaled to length 1.

    Args:
        model (`str` or `PreTrainedModel`):
            Encoder, or the folder or Hub id of one.
        tokenizer (`PreTrainedTokenizerBase`, *optional*):
            Its tokenizer. Loaded with the model when that is a name; needed when it is a model.
        batch_size (`int`, *optional*, defaults to `64`):
            Texts in one forward pass.
        max_length (`int`, *optional*, defaults to `256`):
            Longest text in tokens; the rest is cut off.
        device (`str` or `torch.device`, *optional*):
            Where it runs. Defaults to the process's device, as accelerate has it at the first call.

    Example:

    ```python
    embed = TextEmbedder("sentence-transformers/all-MiniLM-L6-v2")
    embed(["a red square", "a blue circle"])  # [2, 384], float32
    ```
    """

    def __init__(
        self,
        model: Any,
        tokenizer: Any = None,
        batch_size: int = 64,
        max_length: int = 256,
        device: str | torch.device | None = None,
    ):
        if isinstance(model, str):
            tokenizer = tokenizer or AutoTokenizer.from_pretrained(model)
            model = AutoModel.from_pretrained(model)
        if tokenizer is None:
            raise ValueError("`tokenizer` is needed when `model` is not a name; got None.")
        self.model = model.eval()
        self.tokenizer = tokenizer
        self.batch_size = batch_size
        self.max_length = max_length
        self.device = device

    @torch.inference_mode()
    def __call__(self, texts: list[str]) -> torch.Tensor:
        """
        Args:
            texts (`list[str]`): Texts to embed.

        Returns:
            `torch.Tensor` of shape `[len(texts), hidden]`: Unit vectors, float32, on the CPU.
        """
        device = self.device or PartialState().device
        self.model.to(device)
        order = sorted(range(len(texts)), key=lambda i: len(texts[i]))  # texts of like length share a batch
        embeddings = torch.empty(len(texts), self.model.config.hidden_size)
        for start in range(0, len(texts), self.batch_size):
            rows = order[start : start + self.batch_size]
            embeddings[rows] = self._embed([texts[i] for i in rows], device)
        return embeddings

    def _embed(self, texts: list[str], device: torch.device) -> torch.Tensor:
        inputs = self.tokenizer(
            texts, padding=True, truncation=True, max_length=self.max_length, return_tensors="pt"
        ).to(device)
        hidden = self.model(**inputs).last_hidden_state.float()
        mask = inputs["attention_mask"].unsqueeze(-1)
        mean = (hidden * mask).sum(dim=1) / mask.sum(dim=1).clamp(min=1)
        return torch.nn.functional.normalize(mean, dim=-1).cpu()


class EmbeddingSimilarityReward:
    r"""
    Cosine between the embeddings of the answer and of a reference, in [-1, 1]: \\( R = \cos(e(y), e(y^*)) \\).

    Args:
        embedder (`str` or `Callable[[list[str]], torch.Tensor]`):
            Folder or Hub id of a sentence encoder, a [`TextEmbedder`], or any callable from texts to `[N, d]`.
        reference_column (`str`, *optional*, defaults to `"reference"`):
            Column with the references: plain, conversational, or a list of plain ones, of which the nearest counts.
            Rows in which it is `None` get `None`.
        name (`str`, *optional*, defaults to `"embedding_similarity"`):
            Name of the reward in the metrics.

    Example:

    ```python
    reward = EmbeddingSimilarityReward("sentence-transformers/all-MiniLM-L6-v2")
    reward(prompts=["What is it?"], completions=["a boat"], reference=["a small ship"])  # [0.7]
    ```
    """

    def __init__(
        self,
        embedder: str | Callable[[list[str]], torch.Tensor],
        reference_column: str = "reference",
        name: str = "embedding_similarity",
    ):
        self.__name__ = name
        self.embedder = TextEmbedder(embedder) if isinstance(embedder, str) else embedder
        self.reference_column = reference_column

    def __call__(self, prompts: list, completions: list, **columns) -> list[float | None]:
        """
        Args:
            prompts (`list`): Not used.
            completions (`list`): Answers, plain or conversational.
            **columns: Further columns; `reference_column` must be among them.

        Returns:
            `list[float | None]`: Cosines; `None` for a row without a reference.
        """
        cells = require_column(columns, self.reference_column, "reference_column", type(self).__name__)
        references = [_reference_texts(cell) for cell in cells]
        answers = [completion_text(completion) for completion in completions]
        texts = sorted({*answers, *(text for row in references for text in row)})
        if not texts:
            return []
        embeddings = torch.nn.functional.normalize(torch.as_tensor(self.embedder(texts)).float(), dim=-1)
        row_of = {text: row for row, text in enumerate(texts)}
        rewards = []
        for answer, candidates in zip(answers, references, strict=True):
            similarity = embeddings[[row_of[text] for text in candidates]] @ embeddings[row_of[answer]]
            rewards.append(similarity.max().item() if candidates else None)
        return rewards


def _reference_texts(cell: Any) -> list[str]:
    if cell is None:
        return []
    if isinstance(cell, list) and all(isinstance(item, str) for item in cell):
        return cell
    return [completion_text(cell)]
