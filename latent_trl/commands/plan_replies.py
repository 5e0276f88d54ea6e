"""Answers to one conversation under plans."""

import argparse
from dataclasses import dataclass, replace
from typing import Any

from .arguments import refuse_given
from .replies import OF_CODES


@dataclass
class PlanReply:
    """
    Args:
        text (`str`): The answer, special tokens left out.
        tokens (`list[str]`): The same token by token, up to and including the end.
        token_ids (`list[int]`): Those tokens.
        plan (`int`): The plan that was held, or the first of several.
        value (`float`, *optional*): What the chooser takes the plan to be worth, in [0, 1]; `None` without a chooser.
        reward (`float`, *optional*): What the reward functions said.
        plans (`list[int]`, *optional*), segments (`list[str]`, *optional*): Where each segment has a plan of its own,
            those, and the segments' texts.
    """

    text: str
    tokens: list[str]
    token_ids: list[int]
    plan: int
    value: float | None = None
    reward: float | None = None
    plans: list[int] | None = None
    segments: list[str] | None = None


def segment_texts(tokens: list[str], starts: list[int], special: set[str]) -> list[str]:
    """The text of each segment, given how many tokens stand before it; special tokens are left out."""
    ends = [*starts[1:], len(tokens)]
    return ["".join(t for t in tokens[a:b] if t not in special) for a, b in zip(starts, ends, strict=True)]


class PlanAnswerer:
    """
    A model of plans that answers conversations, greedily.

    Args:
        model (`PlanModel`): The model.
        processor (`ProcessorMixin` or `PreTrainedTokenizerBase`): The backbone's.
        max_new_tokens (`int`): Longest answer.
    """

    def __init__(self, model: Any, processor: Any, max_new_tokens: int):
        from ..data.prompts import PromptEncoder
        from ..generation.answers import end_tokens

        self.model, self.max_new_tokens = model.eval(), max_new_tokens
        self.encoder = PromptEncoder(processor)
        self.tokenizer = self.encoder.encoder.tokenizer
        self.ends = end_tokens(model.backbone, self.tokenizer, {}) or []

    @property
    def plans(self) -> range:
        return range(self.model.plan_config.num_plans)

    @property
    def has_chooser(self) -> bool:
        return self.model.chooser_is_trained

    def __call__(
        self, messages: list[dict[str, Any]], images: list[Any], plans: list[int] | None = None
    ) -> list[PlanReply]:
        """
        An answer under each of `plans`; by default under the ones that the chooser finds the best where segments start.

        Raises:
            ValueError: For plans that there are not, or none where no chooser has been trained.
        """
        wrong = [plan for plan in plans or [] if plan not in self.plans]
        if wrong:
            raise ValueError(f"Plans are 0 to {len(self.plans) - 1}, got {wrong[0]}.")
        prompt = self.encoder({"_row": 0, "prompt": messages, **({"images": images} if images else {})})
        values = self._values(prompt)
        if plans is None:
            plans = [self.best_plans(values)[0]]
            if self.model.plan_config.segment != "answer":
                longest = self.max_new_tokens
                (own,) = self.model.speak(self.encoder, [prompt], self.model.best_plans, longest, self.ends)
                reply = self._reply(own.plans[0], own.token_ids, values)
                texts = segment_texts(reply.tokens, own.starts, set(self.tokenizer.all_special_tokens))
                return [replace(reply, plans=own.plans, segments=texts)]
        ids = self.model.answers(self.encoder, [prompt] * len(plans), plans, self.max_new_tokens, self.ends).token_ids
        return [self._reply(plan, one, values) for plan, one in zip(plans, ids, strict=True)]

    def ranked(self, messages: list[dict[str, Any]], images: list[Any]) -> list[int]:
        """All plans, the one that the chooser finds the best first."""
        row = {"_row": 0, "prompt": messages, **({"images": images} if images else {})}
        return self.best_plans(self._values(self.encoder(row)))

    def best_plans(self, values: list[float] | None) -> list[int]:
        if values is None:
            raise ValueError(
                "No chooser has been trained, so a plan must be named: `--plan N`, or `--all-plans`. `latent-trl "
                "bandit` and `latent-trl grpo` train one."
            )
        return sorted(self.plans, key=lambda plan: -values[plan])

    def _values(self, prompt: Any) -> list[float] | None:
        if not self.model.chooser_is_trained:
            return None
        inputs = {name: value.to(self.model.device) for name, value in self.encoder.collate([prompt]).items()}
        return self.model.plan_logits(**inputs)[0].sigmoid().tolist()

    def _reply(self, plan: int, ids: list[int], values: list[float] | None) -> PlanReply:
        from ..data.pieces import text_pieces

        text = self.tokenizer.decode(ids, skip_special_tokens=True).strip()
        return PlanReply(text, text_pieces(self.tokenizer, ids), ids, plan, None if values is None else values[plan])


def load_plan_answerer(args: argparse.Namespace, prog: str) -> PlanAnswerer:
    """For `generate` and `chat`; options of codes are refused."""
    from transformers.utils import logging

    from .loading import load_processor
    from .plan_loading import load_plans

    refuse_given(prog, args, OF_CODES, f"is for codes a token, and {args.model!r} holds plans.")
    logging.set_verbosity_error()
    model = load_plans(args.model, args.backbone, dtype=args.dtype)
    return PlanAnswerer(model, load_processor(model, args.backbone), args.max_new_tokens)


def coloured(reply: PlanReply):
    """The answer as rich text, each segment on the colour of its plan, with the plan's number before it."""
    from rich.text import Text

    from ..evaluation.report import code_colour
    from .replies import visible

    text = Text()
    plans, texts = reply.plans or [reply.plan], reply.segments or [reply.text]
    for number, (plan, said) in enumerate(zip(plans, texts, strict=True)):
        text.append(f"plan {plan}", style="dim")
        if reply.value is not None and not number:
            text.append(f" (value {reply.value:.2f})")
        text.append(" ").append(visible(said.strip()), style=f"black on {code_colour(plan)}")
        text.append(" " if number < len(plans) - 1 else "")
    return text
