"""The law that codes are sampled from, and the same law when they are scored."""

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F

# Logits divided by less may leave the range of float32, and 1 / temperature does in the end.
LEAST_TEMPERATURE = 1e-6


@dataclass(frozen=True)
class ActionLaw:
    """
    Distribution over codes given the policy's logits: temperature, then top-k, then top-p.

    Truncation fixes a *support* at sampling time. Old, new and reference log-probabilities of a rollout are taken over
    that same support, so ratios and KL are finite and speak of the law that was sampled from.

    Args:
        temperature (`float`, defaults to `1.0`): At least 1e-6; logits are divided by it.
        top_k (`int`, defaults to `0`): Keep the k most likely codes; 0 keeps all.
        top_p (`float`, defaults to `1.0`): Keep the smallest set of codes whose probability reaches p; 1 keeps all.
    """

    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0

    def __post_init__(self):
        if not (math.isfinite(self.temperature) and self.temperature >= LEAST_TEMPERATURE):
            raise ValueError(
                f"`action_temperature` must be positive, between {LEAST_TEMPERATURE} and the largest float, got "
                f"{self.temperature}. For what is the most likely pass `action_do_sample=False`."
            )
        if self.top_k < 0:
            raise ValueError(f"`action_top_k` must be 0 (keep all codes) or positive, got {self.top_k}.")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"`action_top_p` must be in (0, 1], got {self.top_p}.")

    @property
    def truncates(self) -> bool:
        """Whether some codes can be left out."""
        return self.top_k > 0 or self.top_p < 1

    def support(self, logits: torch.Tensor) -> torch.Tensor | None:
        """Codes that can be sampled, boolean `[..., K]`, or `None` when all can. The most likely code always can."""
        if not self.truncates:
            return None
        logits = logits.float()
        order = logits.argsort(dim=-1, descending=True, stable=True)
        keep = torch.ones_like(order, dtype=torch.bool)
        if self.top_k:
            keep[..., self.top_k :] = False
        if self.top_p < 1:
            sorted_logits = logits.gather(-1, order).masked_fill(~keep, -torch.inf)
            probs = self._scaled(sorted_logits).softmax(dim=-1)
            keep &= probs.cumsum(dim=-1) - probs < self.top_p
        return torch.zeros_like(keep).scatter(-1, order, keep)

    def log_probs(self, logits: torch.Tensor, support: torch.Tensor | None = None) -> torch.Tensor:
        """Log-probabilities `[..., K]` in float32 over `support`; `-inf` outside it."""
        logits = logits.float()
        if support is not None:
            logits = logits.masked_fill(~support, -torch.inf)
        return F.log_softmax(self._scaled(logits), dim=-1)

    def _scaled(self, logits: torch.Tensor) -> torch.Tensor:
        # Measured from the largest, they overflow to -inf alone, which is a probability of 0.
        return (logits - logits.detach().amax(dim=-1, keepdim=True)) / self.temperature

    def score(
        self, logits: torch.Tensor, action_ids: torch.Tensor, support: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Log-probabilities of `action_ids` `[...]` and entropies `[...]` of the law, in float32."""
        log_probs = self.log_probs(logits, support)
        chosen = log_probs.gather(-1, action_ids.unsqueeze(-1)).squeeze(-1)
        finite = log_probs.masked_fill(log_probs.isneginf(), 0.0)
        entropy = -(log_probs.exp() * finite).sum(dim=-1)
        return chosen, entropy
