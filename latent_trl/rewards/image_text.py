"""How well the answer fits the image, by a contrastive image-text model."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from transformers import AutoModel, AutoProcessor

from .conversation import completion_text, row_images
from .images import load_images


class ContrastiveScorer:
    """
    Embeds images and texts with a model of CLIP's kind: one with `get_image_features` and `get_text_features`.

    Args:
        model (`str` or `PreTrainedModel`):
            The model, or the folder or Hub id of one (CLIP, SigLIP, ...).
        processor (`ProcessorMixin`, *optional*):
            Its processor. Loaded with the model when that is a name; needed when it is a model.
        batch_size (`int`, *optional*, defaults to `32`):
            Images, or texts, in one forward pass.
        device (`str` or `torch.device`, *optional*):
            Where it runs. Defaults to the process's device, as accelerate has it at the first call.
    """

    def __init__(
        self,
        model: Any,
        processor: Any = None,
        batch_size: int = 32,
        device: str | torch.device | None = None,
    ):
        if isinstance(model, str):
            processor = processor or AutoProcessor.from_pretrained(model)
            model = AutoModel.from_pretrained(model)
        if processor is None:
            raise ValueError("`processor` is needed when `model` is not a name; got None.")
        self.model = model.eval()
        self.processor = processor
        self.batch_size = batch_size
        self.device = device

    def embed_images(self, images: list[Any]) -> torch.Tensor:
        """Unit vectors `[len(images), d]` of images in RGB, float32, on the CPU."""
        return self._embed(self.model.get_image_features, images, lambda batch: {"images": batch})

    def embed_texts(self, texts: list[str]) -> torch.Tensor:
        """Unit vectors `[len(texts), d]` of texts, cut at the model's longest input, float32, on the CPU."""
        length = self.model.config.text_config.max_position_embeddings
        settings = {"padding": "max_length", "truncation": True, "max_length": length}
        return self._embed(self.model.get_text_features, texts, lambda batch: {"text": batch, **settings})

    def __call__(self, images: list[Any], texts: list[str]) -> torch.Tensor:
        """Cosines `[len(images)]` of images with the texts beside them; equal ones are embedded once."""
        image_rows, text_rows = _Distinct(images, key=id), _Distinct(texts, key=str)
        image_vectors = self.embed_images([images[i] for i in image_rows.firsts])[image_rows.places]
        text_vectors = self.embed_texts([texts[i] for i in text_rows.firsts])[text_rows.places]
        return (image_vectors * text_vectors).sum(dim=-1)

    @torch.inference_mode()
    def _embed(self, features: Callable, items: list[Any], arguments: Callable[[list], dict]) -> torch.Tensor:
        device = self.device or PartialState().device
        self.model.to(device)
        vectors = []
        for start in range(0, len(items), self.batch_size):
            inputs = self.processor(**arguments(items[start : start + self.batch_size]), return_tensors="pt")
            output = features(**inputs.to(device))
            pooled = output if isinstance(output, torch.Tensor) else output.pooler_output
            vectors.append(torch.nn.functional.normalize(pooled.float(), dim=-1).cpu())
        return torch.cat(vectors)


class _Distinct:
    """`firsts`: where each distinct item stands first. `places`: for each item, its index among the distinct ones."""

    def __init__(self, items: list, key: Callable[[Any], Any]):
        index: dict[Any, int] = {}
        self.firsts: list[int] = []
        self.places: list[int] = []
        for position, item in enumerate(items):
            if key(item) not in index:
                index[key(item)] = len(index)
                self.firsts.append(position)
            self.places.append(index[key(item)])


class ImageTextReward:
    r"""
    Fit of the answer to the row's image: the cosine of their embeddings, averaged over the row's images.

    It needs no reference, and sees the image; but it rewards naming what is in the picture, not answering the question,
    so use it beside another reward.

    Args:
        scorer (`str` or `Callable[[list[PIL.Image.Image], list[str]], Sequence[float]]`):
            Folder or Hub id of a model with `get_image_features` and `get_text_features`, a [`ContrastiveScorer`], or
            any callable that gives a score for each pair of an image (RGB) and a text.
        name (`str`, *optional*, defaults to `"image_text"`):
            Name of the reward in the metrics.
        image_root (`str` or `Path`, *optional*):
            The only folder that paths of images may lead to. Trainers hand over pictures, which need none.

    Example:

    ```python
    reward = ImageTextReward("google/siglip-base-patch16-224")
    reward(prompts=["What is it?"], completions=["a boat"], images=[[picture]])
    ```
    """

    def __init__(
        self,
        scorer: str | Callable[[list[Any], list[str]], Any],
        name: str = "image_text",
        image_root: str | Path | None = None,
    ):
        self.__name__ = name
        self.image_root = image_root
        self.scorer = ContrastiveScorer(scorer) if isinstance(scorer, str) else scorer

    def __call__(self, prompts: list, completions: list, **columns) -> list[float | None]:
        """
        Args:
            prompts (`list`): Prompts; their image blocks are used where there is no image column.
            completions (`list`): Answers, plain or conversational.
            **columns: Further columns; `images` or `image` among them.

        Returns:
            `list[float | None]`: Scores; `None` for a row without an image.
        """
        rows = load_images(row_images(prompts, columns), self.image_root)
        images = [image for row in rows for image in row]
        texts = [completion_text(c) for c, row in zip(completions, rows, strict=True) for _ in row]
        scores = [float(score) for score in self.scorer(images, texts)] if images else []
        if len(scores) != len(images):
            raise ValueError(f"`scorer` must give a score for each pair; got {len(scores)} for {len(images)} pairs.")
        rewards, start = [], 0
        for row in rows:
            own = scores[start : start + len(row)]
            rewards.append(sum(own) / len(own) if own else None)
            start += len(row)
        return rewards
