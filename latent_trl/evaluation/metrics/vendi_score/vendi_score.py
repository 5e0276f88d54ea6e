"""Effective number of different samples of a prompt, as a metric of `evaluate`."""

import datasets
import evaluate

from latent_trl.evaluation.diversity import vendi_score
from latent_trl.rewards.embedding import TextEmbedder

INPUTS = """
Args:
    predictions (`list[list[str]]`): For each prompt its samples.
    embedder (`str` or `Callable`): Folder or Hub id of a sentence encoder, or a function from texts to vectors
        `[len(texts), hidden]`.
    order (`float`, defaults to 1): Order of the entropy.

Returns:
    `vendi_score` (`float`): Mean over the prompts, from 1 (all samples the same) to their number.
"""


class VendiScore(evaluate.Metric):
    def _info(self):
        return evaluate.MetricInfo(
            description="Exponential of the entropy of the eigenvalues of the cosines of a prompt's samples.",
            citation="Friedman and Dieng, 2023, https://huggingface.co/papers/2210.02410",
            inputs_description=INPUTS,
            features=datasets.Features({"predictions": datasets.Sequence(datasets.Value("string"))}),
        )

    def _compute(self, predictions, embedder, order=1.0):
        embed = TextEmbedder(embedder) if isinstance(embedder, str) else embedder
        return {"vendi_score": sum(vendi_score(embed(s), order) for s in predictions) / len(predictions)}
