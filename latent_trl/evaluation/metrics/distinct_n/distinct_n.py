"""Distinct n-grams among the samples of a prompt, as a metric of `evaluate`."""

import datasets
import evaluate
import numpy as np

from latent_trl.evaluation.diversity import distinct_n

INPUTS = """
Args:
    predictions (`list[list[str]]`): For each prompt its samples.
    n (`int`, defaults to 2): Size of the n-grams.

Returns:
    `distinct_n` (`float`): Mean over the prompts of different over all n-grams of its samples, between 0 and 1. Prompts
    without a sample long enough are left out.
"""


class DistinctN(evaluate.Metric):
    def _info(self):
        return evaluate.MetricInfo(
            description="Different n-grams over all n-grams of a prompt's samples, words split at white space.",
            citation="Li et al., 2016, https://huggingface.co/papers/1510.03055",
            inputs_description=INPUTS,
            features=datasets.Features({"predictions": datasets.Sequence(datasets.Value("string"))}),
        )

    def _compute(self, predictions, n=2):
        return {"distinct_n": float(np.nanmean([distinct_n(samples, n) for samples in predictions]))}
