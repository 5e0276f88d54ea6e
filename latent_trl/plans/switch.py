"""The learned switch: at each token of an answer, whether the segment ends behind it."""

import math

import torch
from torch import nn

# Chance that a segment ends behind a token that ends a sentence, and behind any other, before anything is learned.
BEHIND_SENTENCE, ELSEWHERE = 0.9, 0.02


class PlanSwitch(nn.Module):
    r"""
    The termination function of a plan, as of an option ([Bacon et al., 2017](https://huggingface.co/papers/1609.05140)):
    a segment ends behind token t with probability \\(\sigma(g_t)\\), where

    \\[ g_t = \mathrm{logit}(p_t) + w^\top h_t / \mathrm{rms}(h_t) + b, \\]

    \\(p_t\\) is `BEHIND_SENTENCE` or `ELSEWHERE`, and \\(h_t\\) the state of the token below all plans. \\(w\\) and
    \\(b\\) start at 0. Float32.

    Args:
        size (`int`): Width of the states.
    """

    def __init__(self, size: int):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(size))
        self.bias = nn.Parameter(torch.zeros(1))

    def forward(self, states: torch.Tensor, behind_sentence: torch.Tensor) -> torch.Tensor:
        """
        Args:
            states (`torch.Tensor`): `[N, d]`, of tokens, below all plans.
            behind_sentence (`torch.Tensor`): `[N]`, whether each token ends a sentence.

        Returns:
            Logits `[N]` in float32 that the segment ends behind each token.
        """
        with torch.autocast(states.device.type, enabled=False):
            states = states.float()
            scaled = states * states.pow(2).mean(dim=-1, keepdim=True).clamp(min=1e-12).rsqrt()
            learned = scaled @ self.weight + self.bias
        behind, elsewhere = (math.log(chance / (1 - chance)) for chance in (BEHIND_SENTENCE, ELSEWHERE))
        return learned + torch.where(behind_sentence, behind, elsewhere)


def switch_log_probs(logits: torch.Tensor, ended: torch.Tensor) -> torch.Tensor:
    """Log-probabilities `[N]` of decisions: whether segments `ended` `[N]`, under the logits that they end."""
    return nn.functional.logsigmoid(torch.where(ended, logits, -logits))
