"""Best-first search in the tree of answers."""

import heapq
from collections.abc import Callable
from itertools import count
from typing import Any

from transformers import PreTrainedTokenizerBase, ProcessorMixin

from ..generation.answers import evaluation_mode
from ..models.latent_action_model import LatentActionModel
from .branches import OWN_SETTINGS, Branch, BranchDecoder, NextToken
from .candidates import Candidate, Scorer, SearchResult, batches, check_budget, refuse


def tree_search(
    model: LatentActionModel,
    processing_class: ProcessorMixin | PreTrainedTokenizerBase,
    rows: Any,
    reward: Callable[..., Any],
    n: int = 8,
    max_new_tokens: int = 32,
    batch_size: int = 64,
    width: int = 32,
    reward_weight: float = 0.0,
    progress: Callable[[int], None] | None = None,
    **generate_kwargs: Any,
) -> list[SearchResult]:
    """
    Best-first search in the tree of answers.

    A token is a function of its code, and what follows depends on the tokens alone. So codes that emit the same token
    lead to the same node, whose probability is the sum of theirs. The search begins with the greedy answer.
    Each answer leaves branches: at every step of it, each other token that some code emits. The most probable branch of
    a prompt is taken next, and followed greedily to the end; no answer is decoded twice.

    Args:
        model (`LatentActionModel`): In any mode; it answers in evaluation mode.
        processing_class (`ProcessorMixin` or `PreTrainedTokenizerBase`): The backbone's.
        rows (`Dataset` or list): With `prompt`, `images` and the columns that the reward reads.
        reward (`Callable` or `RewardCaller`): As in [`best_of_n`].
        n (`int`, defaults to `8`): Answers a prompt; fewer where the tree has no more.
        max_new_tokens (`int`, defaults to `32`): Longest answer.
        batch_size (`int`, defaults to `64`): Prompts searched at once, one answer of each at a time.
        width (`int`, defaults to `32`): The most likely codes of a step that are looked at, and summed up; each costs
            one pass of the vocabulary head, and none of the backbone.
        reward_weight (`float`, defaults to `0.0`): Nats that a unit of reward is worth to the branches of an answer. 0
            takes branches by their probability alone; for rewards with degrees, more searches around good answers.
        progress (`Callable`, *optional*): Told the number of prompts that are done.
        generate_kwargs: Of [`LatentActionModel.generate`], such as `action_bias`.

    Returns:
        `list[SearchResult]`, one a prompt; the first candidate is the greedy answer.

    Raises:
        ValueError: For `n < 1`, `width < 1`, arguments about sampling, or a reward that is no finite number.
    """
    check_budget(n, batch_size)
    if not isinstance(model, LatentActionModel):
        raise ValueError(
            f"`tree_search` reads the states of a model, and a {type(model).__name__} gives none. Use `best_of_n`."
        )
    if width < 1:
        raise ValueError(f"`width` must be at least 1, got {width}.")
    refuse(generate_kwargs, *OWN_SETTINGS)
    scorer = Scorer(reward)
    decoder = BranchDecoder(model, processing_class, max_new_tokens, width, generate_kwargs)
    results: list[SearchResult] = []
    with evaluation_mode(model):
        for batch in batches(rows, batch_size):
            searches = [_Tree(row) for row in batch]
            while True:
                running = [tree for tree in searches if len(tree.candidates) < n and tree.take()]
                if not running:
                    break
                last = all(len(tree.candidates) == n - 1 for tree in running)
                found = decoder([tree.row for tree in running], [tree.taken for tree in running], not last)
                grown = [tree for tree, answer in zip(running, found, strict=True) if tree.keep(*answer)]
                for tree in grown:
                    scorer.add(tree.row, tree.candidates[-1:], tree.known)
                scorer.score()
                for tree in grown:
                    tree.open(reward_weight)
            results += [SearchResult(tree.candidates) for tree in searches]
            if progress is not None:
                progress(len(results))
    return results


class _Tree:
    """The answers to one prompt, and the branches that have not been taken."""

    def __init__(self, row: dict[str, Any]):
        self.row = row
        self.candidates: list[Candidate] = []
        # Rewards of the texts that were scored.
        self.known: dict[str, float | None] = {}
        self.taken = Branch([], 0.0)
        self._seen: set[tuple[int, ...]] = set()
        self._options: list[list[NextToken]] = []
        self._order = count()
        self._open = [(0.0, next(self._order), self.taken)]

    def take(self) -> bool:
        """Takes the best open branch. Returns whether there was one."""
        if self._open:
            self.taken = heapq.heappop(self._open)[2]
            return True
        return False

    def keep(self, candidate: Candidate, options: list[list[NextToken]]) -> bool:
        """
        Keeps the answer of the branch that was taken, with what can come next at each of its own steps. Returns whether
        it is new: rounding may give a code another token than was foreseen.
        """
        if tuple(candidate.token_ids) in self._seen:
            return False
        self._seen.add(tuple(candidate.token_ids))
        self.candidates.append(candidate)
        self._options = options
        return True

    def open(self, reward_weight: float) -> None:
        """Opens the branches of the last answer. At forced steps they were found before."""
        answer, log_prob = self.candidates[-1], self.taken.log_prob
        bonus = reward_weight * (answer.reward or 0.0)
        for step, options in enumerate(self._options, start=len(self.taken.action_ids)):
            own = answer.token_ids[step]
            for token, code, of_token in options:
                if token != own:
                    branch = Branch([*answer.action_ids[:step], code], log_prob + of_token)
                    heapq.heappush(self._open, (-branch.log_prob - bonus, next(self._order), branch))
            log_prob += next(of_token for token, _, of_token in options if token == own)
