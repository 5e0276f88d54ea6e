"""1 over the mean cosine between the samples of a prompt, as a metric of `evaluate`."""

import datasets
import evaluate

from latent_trl.evaluation.diversity import semantic_diversity
from latent_trl.rewards.embedding import TextEmbedder

INPUTS = """
Args:
    predictions (`list[list[str]]`): For each prompt its samples, at least two.
    embedder (`str` or `Callable`): Folder or Hub id of a sentence encoder, or a function from texts to vectors
        `[len(texts), hidden]`.

Returns:
    `semantic_diversity` (`float`): At least 1, where all samples of a prompt mean the same. The cosines of the prompts
    are averaged first and inverted after.
"""


class SemanticDiversity(evaluate.Metric):
    def _info(self):
        return evaluate.MetricInfo(
            description="1 over the mean pairwise cosine of the embeddings of a prompt's samples.",
            citation="Jia et al., 2025, https://huggingface.co/papers/2503.21383",
            inputs_description=INPUTS,
            features=datasets.Features({"predictions": datasets.Sequence(datasets.Value("string"))}),
        )

    def _compute(self, predictions, embedder):
        embed = TextEmbedder(embedder) if isinstance(embedder, str) else embedder
        return {"semantic_diversity": semantic_diversity([embed(samples) for samples in predictions])}
