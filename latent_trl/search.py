"""Search over codes at inference: the best of N samples, and a small tree search, with any reward function."""

import asyncio
import heapq
import inspect
import math
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from itertools import count
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase, ProcessorMixin

from .data.prompts import encode_prompts
from .generation.output import LatentActionGenerateOutput, trunk_positions
from .models.latent_action_model import LatentActionModel


@dataclass
class Candidate:
    """
    One answer that a search decoded.

    Args:
        text (`str`): The answer, special tokens left out.
        token_ids (`list[int]`): Its tokens, up to and including the end.
        action_ids (`list[int]`): The codes that emitted them; `forced_action_ids` of them gives the answer again.
        log_prob (`float`): Of all codes together, in nats, under the law that they were chosen by.
        reward (`float`, *optional*): What the reward function said; `None` where it could not say.
    """

    text: str
    token_ids: list[int]
    action_ids: list[int]
    log_prob: float
    reward: float | None = None


@dataclass
class SearchResult:
    """
    What was found for one prompt.

    Args:
        candidates (`list[Candidate]`): In the order in which they were decoded; at least one.
    """

    candidates: list[Candidate] = field(default_factory=list)

    @property
    def best(self) -> Candidate:
        """The candidate of the highest reward, and of those the most probable; one without a reward comes last."""
        return max(self.candidates, key=lambda c: (c.reward is not None, c.reward or 0.0, c.log_prob))

    @property
    def num_scored(self) -> int:
        """How many different texts the reward function saw."""
        return len({candidate.text for candidate in self.candidates})

    @property
    def decoded_tokens(self) -> int:
        """How many tokens were decoded, those that repeat a forced beginning included."""
        return sum(len(candidate.token_ids) for candidate in self.candidates)


def best_of_n(
    model: LatentActionModel,
    processing_class: ProcessorMixin | PreTrainedTokenizerBase,
    rows: Any,
    reward: Callable[..., Any],
    n: int = 8,
    max_new_tokens: int = 32,
    batch_size: int = 64,
    progress: Callable[[int], None] | None = None,
    **generate_kwargs: Any,
) -> list[SearchResult]:
    """
    Samples `n` answers to each prompt and scores them.

    Args:
        model (`LatentActionModel`): In any mode; it answers in evaluation mode.
        processing_class (`ProcessorMixin` or `PreTrainedTokenizerBase`): The backbone's.
        rows (`Dataset` or list): With `prompt`, `images` and the columns that the reward reads.
        reward (`Callable`): A reward function of TRL's signature, sync or async. It sees each text of a prompt once.
        n (`int`, defaults to `8`): Answers a prompt.
        max_new_tokens (`int`, defaults to `32`): Longest answer.
        batch_size (`int`, defaults to `64`): Answers decoded at once.
        progress (`Callable`, *optional*): Told the number of prompts that are done.
        generate_kwargs: Of [`LatentActionModel.generate`], such as `action_temperature` or `action_generator`.

    Returns:
        `list[SearchResult]`, one a prompt, each with `n` candidates.

    Raises:
        ValueError: For `n < 1`, arguments that would make all samples the same, or a reward that is no finite number.
    """
    _check_budget(n, batch_size)
    _refuse(generate_kwargs, "num_return_sequences", "forced_action_ids")
    if generate_kwargs.get("action_do_sample") is False:
        raise ValueError(
            "`action_do_sample=False` gives the same answer each time. Leave it out, or use `tree_search`."
        )
    scorer = _Scorer(reward)
    results = []
    with _evaluating(model):
        for batch in _batches(rows, max(1, batch_size // n)):
            inputs = _encoded(model, processing_class, batch)
            output = model.generate(
                **inputs,
                max_new_tokens=max_new_tokens,
                **{**generate_kwargs, "action_do_sample": True},
                num_return_sequences=n,
                return_dict_in_generate=True,
            )
            found = _candidates(model, processing_class, output, inputs["input_ids"].shape[1])
            groups = [found[i : i + n] for i in range(0, len(found), n)]
            scorer(batch, groups)
            results += [SearchResult(group) for group in groups]
            if progress is not None:
                progress(len(results))
    return results


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
    lead to the same node, whose probability is the sum of theirs. The search begins with the most likely codes. Each
    answer leaves branches: at every step of it, each other token that some code emits. The most probable branch of a
    prompt is taken next, and followed with the most likely codes to the end; no answer is decoded twice.

    Args:
        model (`LatentActionModel`): In any mode; it answers in evaluation mode.
        processing_class (`ProcessorMixin` or `PreTrainedTokenizerBase`): The backbone's.
        rows (`Dataset` or list): With `prompt`, `images` and the columns that the reward reads.
        reward (`Callable`): A reward function of TRL's signature, sync or async. It sees each text of a prompt once.
        n (`int`, defaults to `8`): Answers a prompt; fewer where the tree has no more.
        max_new_tokens (`int`, defaults to `32`): Longest answer.
        batch_size (`int`, defaults to `64`): Prompts searched at once, one answer of each at a time.
        width (`int`, defaults to `32`): The most likely codes of a step that are looked at; each costs one pass of the
            vocabulary head, and none of the backbone.
        reward_weight (`float`, defaults to `0.0`): Nats that a unit of reward is worth to the branches of an answer. 0
            takes branches by their probability alone; for rewards with degrees, more searches around good answers.
        progress (`Callable`, *optional*): Told the number of prompts that are done.
        generate_kwargs: Of [`LatentActionModel.generate`], such as `action_bias`.

    Returns:
        `list[SearchResult]`, one a prompt; the first candidate is the answer of the most likely codes.

    Raises:
        ValueError: For `n < 1`, `width < 1`, arguments about sampling, or a reward that is no finite number.
    """
    _check_budget(n, batch_size)
    if width < 1:
        raise ValueError(f"`width` must be at least 1, got {width}.")
    sampling = ("action_do_sample", "action_temperature", "action_top_k", "action_top_p", "action_generator")
    _refuse(generate_kwargs, "num_return_sequences", "forced_action_ids", *sampling)
    scorer = _Scorer(reward)
    results: list[SearchResult] = []
    with _evaluating(model):
        for batch in _batches(rows, batch_size):
            searches = running = [_Tree(row) for row in batch]
            inputs = _encoded(model, processing_class, batch)
            for number in range(1, n + 1):
                taken = [tree for tree in running if tree.take()]
                if not taken:
                    break
                if len(taken) < len(running):
                    running, inputs = taken, _encoded(model, processing_class, [tree.row for tree in taken])
                output = model.generate(
                    **inputs,
                    max_new_tokens=max_new_tokens,
                    **{**generate_kwargs, "action_do_sample": False, "output_context_states": True},
                    forced_action_ids=_padded([tree.taken.action_ids for tree in running]),
                    return_dict_in_generate=True,
                )
                found = _candidates(model, processing_class, output, inputs["input_ids"].shape[1])
                scorer([tree.row for tree in running], [[candidate] for candidate in found])
                for tree, candidate in zip(running, found, strict=True):
                    tree.candidates.append(candidate)
                if number < n:
                    bias = generate_kwargs.get("action_bias")
                    log_probs, codes = _likely_codes(model, output, inputs["attention_mask"], width, bias)
                    for step in range(codes.shape[1]):
                        rows_open = [row for row, tree in enumerate(running) if tree.opens(step)]
                        options = _next_tokens(model, output, step, rows_open, log_probs, codes)
                        for row, row_options in zip(rows_open, options, strict=True):
                            running[row].open(step, row_options, reward_weight)
            results += [SearchResult(tree.candidates) for tree in searches]
            if progress is not None:
                progress(len(results))
    return results


@dataclass
class _Branch:
    """Codes of the first steps, and the log-probability of the tokens that they emit."""

    action_ids: list[int]
    log_prob: float


# What can come next at one step: the token, its most likely code, and the log-probability of all codes that emit it.
_NextToken = tuple[int, int, float]


class _Tree:
    """The answers to one prompt, and the branches that have not been taken."""

    def __init__(self, row: dict[str, Any]):
        self.row = row
        self.candidates: list[Candidate] = []
        self.taken = _Branch([], 0.0)
        self._order = count()
        self._open = [(0.0, next(self._order), self.taken)]
        # Of the tokens before the step that is opened next.
        self._log_prob = 0.0

    def take(self) -> bool:
        """Takes the best open branch. Returns whether there was one."""
        if self._open:
            self.taken = heapq.heappop(self._open)[2]
            self._log_prob = self.taken.log_prob
            return True
        return False

    def opens(self, step: int) -> bool:
        """Whether the last answer has branches of its own at `step`: at forced steps they were found before."""
        return len(self.taken.action_ids) <= step < len(self.candidates[-1].token_ids)

    def open(self, step: int, options: list[_NextToken], reward_weight: float) -> None:
        """Opens the branches of the last answer at `step`; steps come in order."""
        answer = self.candidates[-1]
        own, bonus = answer.token_ids[step], reward_weight * (answer.reward or 0.0)
        for token, code, log_prob in options:
            if token != own:
                branch = _Branch([*answer.action_ids[:step], code], self._log_prob + log_prob)
                heapq.heappush(self._open, (-branch.log_prob - bonus, next(self._order), branch))
        self._log_prob += next((log_prob for token, _, log_prob in options if token == own), 0.0)


@torch.no_grad()
def _likely_codes(
    model: LatentActionModel,
    output: LatentActionGenerateOutput,
    attention_mask: torch.Tensor,
    width: int,
    bias: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Log-probabilities and codes `[B, C, width]` of each step of one `generate` call, the most likely first."""
    rows, length = output.action_ids.shape
    logits = model(
        context_states=output.context_states,
        attention_mask=torch.cat([attention_mask, attention_mask.new_ones(rows, length - 1)], dim=1),
        position_ids=trunk_positions(output.position_ids, attention_mask.device),
        keep_last=length,
        return_logits=False,
    ).action_logits
    if bias is not None:
        logits = logits + bias.to(logits)
    return tuple(logits.float().log_softmax(dim=-1).topk(min(width, logits.shape[-1])))


@torch.no_grad()
def _next_tokens(
    model: LatentActionModel,
    output: LatentActionGenerateOutput,
    step: int,
    rows: list[int],
    log_probs: torch.Tensor,
    codes: torch.Tensor,
) -> list[list[_NextToken]]:
    """What can come next at `step` of each of `rows`, given their likely codes."""
    if not rows:
        return []
    context_states: Any = output.context_states
    place = context_states.shape[1] - codes.shape[1] + step
    states = context_states[rows, place, None].expand(-1, codes.shape[-1], -1)
    logits = model.read(states, codes[rows, step])
    logits[..., [i for i in model.config.vision_token_ids if i < logits.shape[-1]]] = -torch.inf
    options = zip(logits.argmax(dim=-1).tolist(), codes[rows, step].tolist(), log_probs[rows, step].tolist())
    return [_merged(*option) for option in options]


def _merged(tokens: list[int], codes: list[int], log_probs: list[float]) -> list[_NextToken]:
    """Codes, the most likely first, joined by the token that they emit."""
    joined: dict[int, tuple[int, float]] = {}
    for token, code, log_prob in zip(tokens, codes, log_probs, strict=True):
        if log_prob > -math.inf:
            first, total = joined.get(token, (code, 0.0))
            joined[token] = (first, total + math.exp(log_prob))
    return [(token, code, math.log(total)) for token, (code, total) in joined.items() if total > 0]


class _Scorer:
    """Calls the reward function for a batch, each text of a prompt once, and fills in the rewards."""

    def __init__(self, reward: Callable[..., Any]):
        self.reward = reward
        self.known: dict[tuple[int, str], float | None] = {}

    def __call__(self, rows: list[dict[str, Any]], groups: list[list[Candidate]]) -> None:
        new: dict[tuple[int, str], tuple[dict[str, Any], list[int]]] = {}
        for row, group in zip(rows, groups, strict=True):
            for candidate in group:
                if (id(row), candidate.text) not in self.known:
                    new.setdefault((id(row), candidate.text), (row, candidate.token_ids))
        if new:
            columns = {name: [row[name] for row, _ in new.values()] for name in rows[0] if name != "prompt"}
            rewards = self.reward(
                prompts=[row["prompt"] for row, _ in new.values()],
                completions=[_as_completion(row["prompt"], text) for (_, text), (row, _) in new.items()],
                completion_ids=[ids for _, ids in new.values()],
                **columns,
            )
            if inspect.iscoroutine(rewards):
                # In a thread of its own, so that it works where an event loop runs already.
                with ThreadPoolExecutor(1) as pool:
                    rewards = pool.submit(asyncio.run, rewards).result()
            self._keep(list(new), list(rewards))
        for row, group in zip(rows, groups, strict=True):
            for candidate in group:
                candidate.reward = self.known[id(row), candidate.text]

    def _keep(self, keys: list[tuple[int, str]], rewards: list[float | None]) -> None:
        if len(rewards) != len(keys):
            raise ValueError(f"`reward` returned {len(rewards)} rewards for {len(keys)} completions.")
        for (_, text), reward in zip(keys, rewards, strict=True):
            if reward is not None and not math.isfinite(reward):
                raise ValueError(f"`reward` returned {reward} for {text!r}. Return a finite number or `None`.")
        self.known.update(zip(keys, [None if reward is None else float(reward) for reward in rewards], strict=True))


def _as_completion(prompt: Any, text: str) -> Any:
    """As TRL gives it to reward functions: a text for a text, a message for a conversation."""
    return text if isinstance(prompt, str) else [{"role": "assistant", "content": text}]


def _candidates(
    model: LatentActionModel, processing_class: Any, output: LatentActionGenerateOutput, prompt_length: int
) -> list[Candidate]:
    """The answers of one `generate` call, cut after their ends."""
    tokenizer = getattr(processing_class, "tokenizer", processing_class)
    end = model.generation_config.eos_token_id
    ends = {tokenizer.eos_token_id, *(end if isinstance(end, list) else [end])}
    sequences: Any = output.sequences
    found = []
    for ids, codes, log_probs in zip(
        sequences[:, prompt_length:].tolist(), output.action_ids.tolist(), output.action_log_probs.tolist()
    ):
        length = next((i + 1 for i, token in enumerate(ids) if token in ends), len(ids))
        text = tokenizer.decode(ids[:length], skip_special_tokens=True).strip()
        found.append(Candidate(text, ids[:length], codes[:length], sum(log_probs[:length])))
    return found


def _encoded(model: LatentActionModel, processing_class: Any, rows: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
    return {name: tensor.to(model.device) for name, tensor in encode_prompts(processing_class, rows).items()}


def _padded(action_ids: list[list[int]]) -> torch.Tensor | None:
    """Forced codes `[B, n]`, free where a row has no more; `None` where none is forced."""
    length = max(map(len, action_ids))
    return torch.tensor([codes + [-1] * (length - len(codes)) for codes in action_ids]) if length else None


def _batches(rows: Any, size: int) -> Iterator[list[dict[str, Any]]]:
    for start in range(0, len(rows), size):
        yield [rows[i] for i in range(start, min(start + size, len(rows)))]


class _evaluating:
    """The model in evaluation mode, and afterwards in the mode that it was in."""

    def __init__(self, model: LatentActionModel):
        self.model, self.training = model, model.training

    def __enter__(self):
        self.model.eval()

    def __exit__(self, *error):
        self.model.train(self.training)


def _check_budget(n: int, batch_size: int) -> None:
    for name, value in (("n", n), ("batch_size", batch_size)):
        if value < 1:
            raise ValueError(f"`{name}` must be at least 1, got {value}.")


def _refuse(given: dict[str, Any], *names: str) -> None:
    wrong = [name for name in names if given.get(name) is not None]
    if wrong:
        raise ValueError(f"`{wrong[0]}` is what the search itself decides. Leave it out.")
