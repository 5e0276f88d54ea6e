"""BLEU of each sample of a prompt against the others, as a metric of `evaluate`."""

import datasets
import evaluate

from latent_trl.evaluation.diversity import self_bleu

INPUTS = """
Args:
    predictions (`list[list[str]]`): For each prompt its samples, at least two.
    max_n (`int`, defaults to 4): Largest n-gram.

Returns:
    `self_bleu` (`float`): Mean over the prompts, between 0 (nothing in common) and 1 (all the same).
"""


class SelfBleu(evaluate.Metric):
    def _info(self):
        return evaluate.MetricInfo(
            description="Mean BLEU of each sample of a prompt against its other samples, words split at white space.",
            citation="Zhu et al., 2018, https://huggingface.co/papers/1802.01886",
            inputs_description=INPUTS,
            features=datasets.Features({"predictions": datasets.Sequence(datasets.Value("string"))}),
        )

    def _compute(self, predictions, max_n=4):
        return {"self_bleu": sum(self_bleu(samples, max_n) for samples in predictions) / len(predictions)}
