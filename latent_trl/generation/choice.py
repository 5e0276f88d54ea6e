"""How a code is chosen from the policy's logits: the law, forced codes, bans, and how samples are drawn."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

from .action_law import ActionLaw
from .arithmetic_sampling import ArithmeticSampler, even_points, random_orders
from .likeliest_token import Says, codes_of_likeliest_tokens, of_some


def masked_law(
    law: ActionLaw, logits: torch.Tensor, allowed: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Log-probabilities `[B, K]` of the law over `logits` `[B, K]` with the bias added, float32, and its support less
    what is not `allowed` `[B, K]`; `None` where that is all codes."""
    support = law.support(logits)
    if allowed is not None:
        support = allowed if support is None else support & allowed
    return law.log_probs(logits, support), support


def draw(probs: torch.Tensor, noise: torch.Tensor) -> torch.Tensor:
    """
    Codes `[B]` of `probs` `[B, K]`, by exponential `noise` `[B, K]`: what `torch.multinomial` draws, without its look
    at the values, for which the host would wait.
    """
    return (probs / noise).argmax(dim=-1)


def code_bias(
    count: int, banned: Iterable[int] = (), added: Mapping[int, float] | None = None, device: Any = None
) -> torch.Tensor | None:
    """
    What bans and additions make of the logits of K codes: `[K]`, `-inf` for a ban; `None` for neither.

    Args:
        count (`int`): K.
        banned (`Iterable[int]`), added (`Mapping[int, float]`, *optional*): Codes never to take; what is added to some.
        device (`torch.device`, *optional*): Of the tensor.

    Raises:
        ValueError: For codes that there are not, or where none is left.
    """
    banned, added = list(banned), dict(added or {})
    wrong = [code for code in (*banned, *added) if not 0 <= code < count]
    if wrong:
        raise ValueError(f"Codes are 0 to {count - 1}, got {wrong}.")
    if not banned and not added:
        return None
    bias = torch.zeros(count)
    for code, value in added.items():
        bias[code] = value
    bias[banned] = -torch.inf
    if bias.isneginf().all():
        raise ValueError("All codes are banned: leave at least one.")
    return bias.to(device)


@dataclass
class ActionChoice:
    """
    How codes are chosen while generating.

    Args:
        law (`ActionLaw`): The law to sample from. What is the most likely is so under the policy's own, at temperature
            1 over all codes.
        do_sample (`bool`): Sample, or take the most likely token, see [`codes_of_likeliest_tokens`].
        forced (`torch.Tensor`, *optional*): `[B, n]` codes of the first n steps; -1 leaves a step free.
        bias (`torch.Tensor`, *optional*): `[K]`, added to the logits; `-inf` bans a code.
        generator (`torch.Generator`, *optional*): Source of the sampling.
        copies (`int`, defaults to `1`): Samples a prompt; rows are the whole batch so many times.
        arithmetic (`bool`, defaults to `False`): Draw the samples of a prompt together, see [`ArithmeticSampler`].
    """

    law: ActionLaw = field(default_factory=ActionLaw)
    do_sample: bool = True
    forced: torch.Tensor | None = None
    bias: torch.Tensor | None = None
    generator: torch.Generator | None = None
    copies: int = 1
    arithmetic: bool = False
    allowed: torch.Tensor | None = field(init=False, default=None)
    sampler: ArithmeticSampler | None = field(init=False, default=None)

    def __post_init__(self):
        if not self.do_sample:
            self.law = ActionLaw()
        # Looked at once: to read a tensor's value at each token would make the device wait for the host.
        if self.bias is not None and torch.isneginf(self.bias).any():
            self.allowed = ~torch.isneginf(self.bias)

    @property
    def greedy(self) -> bool:
        """Whether it asks what codes say."""
        return not self.do_sample

    def choose(
        self, logits: torch.Tensor, step: int, says: Says | None = None
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
        """
        Args:
            logits (`torch.Tensor`): `[B, K]` of the policy.
            step (`int`): Which of the answer's.
            says (`Says`, *optional*): What codes say. Without it, as for plans, each one says something of its own.

        Returns:
            Codes `[B]`, their log-probabilities `[B]` and the support `[B, K]`.
        """
        if self.bias is not None:
            logits = logits + self.bias.to(logits)
        allowed = None if self.allowed is None else self.allowed.to(logits.device).expand_as(logits)
        log_probs, support = masked_law(self.law, logits, allowed)
        wanted = None
        if self.forced is not None and step < self.forced.shape[1]:
            wanted = self.forced[:, step].to(log_probs.device)
        if not self.do_sample:
            action_ids = self._greedy(log_probs, wanted, says)
        elif self.arithmetic and self.copies > 1:
            action_ids = self._draw_together(log_probs.exp(), wanted)
        else:
            action_ids = self._draw(log_probs.exp())
        if wanted is not None:
            action_ids = torch.where(wanted >= 0, wanted, action_ids)
        chosen = log_probs.gather(-1, action_ids.unsqueeze(-1)).squeeze(-1)
        return action_ids, chosen.masked_fill(torch.isneginf(chosen), 0.0), support

    def _greedy(self, log_probs: torch.Tensor, wanted: torch.Tensor | None, says: Says | None) -> torch.Tensor:
        action_ids = log_probs.argmax(dim=-1)
        if says is None:
            return action_ids
        if wanted is None:
            return codes_of_likeliest_tokens(log_probs, says)
        free = (wanted < 0).nonzero().squeeze(-1)
        action_ids[free] = codes_of_likeliest_tokens(log_probs[free], of_some(says, free))
        return action_ids

    def _draw(self, probs: torch.Tensor) -> torch.Tensor:
        """Codes `[B]`, drawn prompt by prompt though rows come in tiles: a seed gives the same samples either way."""
        by_prompt = probs.unflatten(0, (self.copies, -1)).transpose(0, 1).flatten(0, 1)
        drawn = draw(by_prompt, torch.empty_like(by_prompt).exponential_(generator=self.generator))
        return drawn.unflatten(0, (-1, self.copies)).transpose(0, 1).flatten()

    def _draw_together(self, probs: torch.Tensor, wanted: torch.Tensor | None) -> torch.Tensor:
        """Codes `[B]` of an arithmetic code, as long as samples of a prompt can still say the same. Rows come in tiles:
        the whole batch of prompts for the first sample of each, then for the second."""
        prompts = len(probs) // self.copies
        if self.sampler is None:
            points = even_points(prompts, self.copies, self.generator, probs.device)
            self.sampler = ArithmeticSampler(points.flatten(), self.copies)
        order = random_orders(prompts, probs.shape[-1], self.generator, probs.device).repeat(self.copies, 1)
        return self.sampler.draw(probs, order, self._draw(probs), None if wanted is None else wanted < 0)
