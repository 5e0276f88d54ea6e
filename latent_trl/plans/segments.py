"""Segments of an answer: a plan is held for one, and the next is chosen from the prompt and what has been said."""

import re
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase

from ..data.prompts import EncodedPrompt
from ..models.backbone import Backbone
from .configuration import PlanConfig
from .prompt_cache import GreedyAnswers

# Whether segments end, a decision `[N]` a row: given the rows, their answers before the segment, what they have said of
# it, and the states `[N, d]` below all plans of the last token.
Switch = Callable[[list[int], list["PlannedAnswer"], list[list[int]], torch.Tensor], torch.Tensor]

SENTENCE_END = re.compile(r"([.!?…。！？]|\n)[\"'”’)\]]*\s*$")


def sentence_ends(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """
    Tokens whose text ends a sentence: a full stop, question or exclamation mark, ellipsis or line break, and closing
    quotes or brackets behind it. An engine takes them as `stop_token_ids`.

    Raises:
        ValueError: For a tokenizer without such a token.
    """
    special = set(tokenizer.all_special_ids)
    texts = tokenizer.batch_decode([[token] for token in range(len(tokenizer))])
    found = [token for token, text in enumerate(texts) if token not in special and SENTENCE_END.search(text)]
    if not found:
        raise ValueError(
            "`segment='sentence'` and `segment='switch'` need a tokenizer with a token that ends a sentence, such as "
            "'.'."
        )
    return found


def continued(view: Backbone, prompt: EncodedPrompt, said: list[int]) -> EncodedPrompt:
    """A prompt with the tokens `said` of its answer behind it: text, of the type that `generate` gives to it."""
    if not said:
        return prompt
    fields = {name: [*values, *[_type(view, name)] * len(said)] for name, values in prompt.fields.items()}
    return replace(prompt, ids=[*prompt.ids, *said], fields=fields)


def _type(view: Backbone, name: str) -> int:
    return view.completion_type if name == "token_type_ids" else 0


def continued_inputs(view: Backbone, inputs: dict[str, Any], said: list[list[int]]) -> dict[str, Any]:
    """The same for a batch that is padded on the left: what has the shape of `input_ids` `[B, P]` grows."""
    longest = max(map(len, said))
    if not longest:
        return inputs
    shape = inputs["input_ids"].shape
    later = {"input_ids": said, "attention_mask": [[1] * len(own) for own in said]}
    grown = dict(inputs)
    for name, value in inputs.items():
        if not isinstance(value, torch.Tensor) or value.shape != shape:
            continue
        # Where pads stand nothing is read.
        wide = torch.nn.functional.pad(value, (longest, 0))
        behind = later.get(name) or [[_type(view, name)] * len(own) for own in said]
        grown[name] = torch.stack(
            [torch.cat([row[len(own) :], row.new_tensor(own)]) for row, own in zip(wide, behind, strict=True)]
        )
    return grown


@dataclass
class PlannedAnswer:
    """
    An answer, and the plans that made it.

    Args:
        token_ids (`list[int]`): Up to and including the end.
        plans (`list[int]`): Of its segments.
        starts (`list[int]`): How many tokens stand before each segment.
        ended (`bool`): Whether it ended by itself, and was not cut at the longest length.
        decoded (`int`): How many of its segments were decoded for it, and not for another answer that says the same.
    """

    token_ids: list[int] = field(default_factory=list)
    plans: list[int] = field(default_factory=list)
    starts: list[int] = field(default_factory=list)
    ended: bool = False
    decoded: int = 0


def speak(
    rows: int,
    begin: Callable[[list[int], list[list[int]]], dict[str, Any]],
    choose: Callable[[list[int], list[PlannedAnswer], dict[str, Any]], torch.Tensor],
    decode: Callable[..., GreedyAnswers],
    max_new_tokens: int,
    ends: list[int],
    all_rows: bool = False,
    prompt_of: list[int] | None = None,
    tell: Callable[[int, int], bool] | None = None,
    switch: Switch | None = None,
) -> list[PlannedAnswer]:
    """
    Answers segment by segment. Each segment is a request of its own: the prompt and what has been said are read anew
    under the segment's plan.

    Args:
        rows (`int`): How many answers.
        begin (`Callable`): Inputs of the backbone for rows of these numbers, with what they have said behind them.
        choose (`Callable`): Plans `[N]` of the segments that begin, given the rows, their answers so far and inputs.
        decode (`Callable`): The segments, given inputs, plans, how many tokens an answer may yet take, and whether they
            are the first; and `tell` and `stop`, where there are such, with the places of rows in the batch.
        max_new_tokens (`int`): Longest answer.
        ends (`list[int]`): Tokens that end an answer.
        all_rows (`bool`, defaults to `False`): Whether rows that have ended stay in the batch.
        prompt_of (`list[int]`, *optional*): A number for each row's prompt. Rows that have the same prompt, have said
            the same and have the same plan say the same next, which is decoded once. By default all prompts differ.
        tell (`Callable`, *optional*): Told each row and token as they come; returns whether the answer ends with it.
        switch (`Callable`, *optional*): Ends segments, beside what `decode` ends them by. Rows that are decoded
            together may end theirs at different tokens.
    """
    prompt_of = list(range(rows)) if prompt_of is None else prompt_of
    answers = [PlannedAnswer() for _ in range(rows)]
    told_end: set[int] = set()
    active, first = list(range(rows)), True
    while active:
        batch = list(range(rows)) if all_rows else active
        inputs = begin(batch, [answers[row].token_ids for row in batch])
        plans = choose(batch, [answers[row] for row in batch], inputs)
        left = max_new_tokens - min(len(answers[row].token_ids) for row in active)
        keys = [
            (prompt_of[r], tuple(answers[r].token_ids), plan) for r, plan in zip(batch, plans.tolist(), strict=True)
        ]
        firsts = {key: place for place, key in reversed(list(enumerate(keys)))}
        places = sorted(firsts.values())
        if len(places) < len(batch):
            some = [batch[place] for place in places]
            inputs, plans = begin(some, [answers[row].token_ids for row in some]), plans[places]
        options: dict[str, Any] = {}
        # Of each place, the rows that it answers for.
        alike: dict[int, list[int]] = {place: [] for place in places}
        for row, key in zip(batch, keys, strict=True):
            alike[firsts[key]].append(row)
        if tell is not None:
            options["tell"] = _told_of_all(tell, list(alike.values()), told_end)
        lengths: dict[int, int] = {}
        if switch is not None:
            going = set(active)
            going_on = [[row for row in rows_of_one if row in going] for rows_of_one in alike.values()]
            options["stop"] = _Stops(switch, going_on, answers, max_new_tokens, lengths)
        segments = dict(zip(places, decode(inputs, plans, left, first, **options).token_ids, strict=True))
        first = False
        for place, (row, key) in enumerate(zip(batch, keys, strict=True)):
            answer, segment = answers[row], segments[firsts[key]]
            if row not in active:
                continue
            answer.decoded += firsts[key] == place
            answer.plans.append(key[-1])
            answer.starts.append(len(answer.token_ids))
            answer.token_ids = [*answer.token_ids, *segment[: lengths.get(row)]][:max_new_tokens]
            answer.ended = answer.token_ids[-1] in ends or row in told_end
        active = [r for r in active if not answers[r].ended and len(answers[r].token_ids) < max_new_tokens]
    return answers


def _told_of_all(
    tell: Callable[[int, int], bool], rows: list[list[int]], ended: set[int]
) -> Callable[[int, int], bool]:
    """Tells a token of a place to all rows that say the same there, and keeps those that end with it in `ended`."""

    def told(place: int, token: int) -> bool:
        done = [row for row in rows[place] if tell(row, token)]
        ended.update(done)
        return len(done) == len(rows[place])

    return told


@dataclass
class _Stops:
    """
    Where a switch ends the segments of rows, those that say the same being decoded in one place.

    Args:
        switch (`Callable`): Decides.
        rows (`list[list[int]]`): Of each place, those that go on.
        answers (`list[PlannedAnswer]`): Of all rows, before the segment.
        max_new_tokens (`int`): Longest answer, behind which nothing is to be decided.
        lengths (`dict`): Filled with the lengths of the segments that have ended, by row.
    """

    switch: Switch
    rows: list[list[int]]
    answers: list[PlannedAnswer]
    max_new_tokens: int
    lengths: dict[int, int]

    def __call__(self, places: list[int], said: list[list[int]], states: torch.Tensor) -> list[bool]:
        """Which places are done, given what they have said of the segment and the states `[N, d]` of its last token."""
        asked = []
        for i, place in enumerate(places):
            for row in self.rows[place]:
                if len(self.answers[row].token_ids) + len(said[i]) >= self.max_new_tokens:
                    self.lengths.setdefault(row, len(said[i]))
                if row not in self.lengths:
                    asked.append((row, i))
        if asked:
            rows, numbers = [row for row, _ in asked], [i for _, i in asked]
            before = [self.answers[row] for row in rows]
            ends = self.switch(rows, before, [said[i] for i in numbers], states[numbers])
            self.lengths |= {row: len(said[i]) for (row, i), over in zip(asked, ends.tolist(), strict=True) if over}
        return [all(row in self.lengths for row in self.rows[place]) for place in places]


def given_plans(plan_ids: Any, rows: int, config: PlanConfig) -> Callable[..., torch.Tensor]:
    """
    A choice of plans that were given, as [`speak`] takes it.

    Args:
        plan_ids (`torch.Tensor`, `list` or `int`): A plan for all rows, one a row `[B]`, or one for each segment of
            each row `[B, S]`, the last of them for all later segments.
        rows (`int`): B.
        config (`PlanConfig`): Of the plans.

    Raises:
        ValueError: For plans that there are not, or several of an answer that holds one.
    """
    plan_ids = torch.as_tensor(plan_ids, dtype=torch.long)
    plan_ids = plan_ids.expand(rows) if plan_ids.ndim == 0 else plan_ids
    if (
        plan_ids.ndim > 2
        or len(plan_ids) != rows
        or not plan_ids.numel()
        or plan_ids.min() < 0
        or plan_ids.max() >= config.num_plans
    ):
        raise ValueError(
            f"`plan_ids` must be in 0 ... {config.num_plans - 1}, one number, one for each of {rows} "
            f"rows, or a row of them, one a segment; got {plan_ids.tolist()}."
        )
    if plan_ids.ndim == 2 and plan_ids.shape[1] > 1 and config.segment == "answer":
        raise ValueError(
            f"`plan_ids` has {plan_ids.shape[1]} plans a row, and a plan is held for the whole answer "
            "(`segment='answer'`). Give one a row."
        )
    plan_ids = plan_ids.view(rows, -1)
    last = plan_ids.shape[1] - 1
    return lambda places, answers, _: torch.stack(
        [plan_ids[row, min(len(answer.plans), last)] for row, answer in zip(places, answers, strict=True)]
    )
