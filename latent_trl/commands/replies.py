"""Answers to one conversation, and how they look in a terminal: each token on the colour of its code."""

import argparse
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any


@dataclass
class Reply:
    """
    Args:
        text (`str`): The answer, special tokens left out.
        tokens (`list[str]`): The same token by token, up to and including the end.
        action_ids (`list[int]`): The codes that emitted them.
        log_prob (`float`): Of all codes together.
        reward (`float`, *optional*): What a search's reward function said.
    """

    text: str
    tokens: list[str]
    action_ids: list[int]
    log_prob: float
    reward: float | None = None


def add_sampling(parser: argparse.ArgumentParser) -> None:
    """Options of how codes are chosen, and of loading."""
    from .arguments import at_least

    parser.add_argument("--backbone", help="folder or Hub id of the backbone, where the checkpoint's own is not right")
    parser.add_argument("--dtype", help="of the backbone, such as bfloat16")
    parser.add_argument("--max-new-tokens", type=at_least(1), default=128, help="(%(default)s)")
    parser.add_argument("--temperature", type=float, default=1.0, help="of the codes (%(default)s)")
    parser.add_argument("--top-k", type=at_least(0), default=0, help="of the codes; 0 keeps all")
    parser.add_argument("--top-p", type=float, default=1.0, help="of the codes")
    parser.add_argument("--greedy", action="store_true", help="the most likely token at each step")
    parser.add_argument("--seed", type=int, default=0, help="(%(default)s)")
    parser.add_argument("--ban", type=codes, default=[], metavar="CODES", help="codes never to take: 3,17")
    parser.add_argument("--bias", type=biases, default={}, metavar="CODE=X,...", help="added to logits: 5=2.0,9=-1")
    parser.add_argument("--plan", type=at_least(0), metavar="N", help="the plan to hold, where the model has plans")


# Options that a model of plans cannot follow, and those for plans alone.
OF_CODES = ("temperature", "top_k", "top_p", "greedy", "seed", "ban", "bias", "samples", "force", "tree")
OF_PLANS = ("plan", "all_plans")


def codes(text: str) -> list[int]:
    """`3,17,-1` as numbers."""
    return [int(part) for part in text.split(",") if part.strip()]


def biases(text: str) -> dict[int, float]:
    """`5=2.0,9=-1` as numbers."""
    return {int(code): float(value) for code, value in (part.split("=") for part in text.split(","))}


class Answerer:
    """
    A model that answers conversations.

    Args:
        model (`LatentActionModel` or `AnswerSource`): The model, or an engine in its place.
        processor (`ProcessorMixin` or `PreTrainedTokenizerBase`): The backbone's.
        args (`Namespace`): Of [`add_sampling`].
    """

    def __init__(self, model: Any, processor: Any, args: argparse.Namespace):
        import torch

        from ..generation.choice import code_bias
        from ..search.sources import source_of

        self.model, self.processor, self.args = model, processor, args
        self.source = source_of(model, processor)
        self.tokenizer = getattr(processor, "tokenizer", processor)
        self.num_codes = model.config.num_codes
        self.special_tokens = set(self.tokenizer.all_special_tokens)
        self.generator = torch.Generator(device=model.device).manual_seed(args.seed)
        self.bias = code_bias(model.config.num_codes, args.ban, args.bias, model.device)

    def __call__(
        self,
        messages: list[dict[str, Any]],
        images: list[Any],
        samples: int = 1,
        forced: list[int] | None = None,
        on_token: Callable[[str, int], None] | None = None,
    ) -> list[Reply]:
        """
        Answers to a conversation that ends with the user's turn; `forced` are the codes of the first steps. `on_token`
        is told each token of a single answer and its code as they come.
        """
        import torch

        from ..data.code_streamer import code_streamer
        from ..data.pieces import text_pieces

        row = {"prompt": messages, **({"images": images} if images else {})}
        forced_ids = None
        if forced:
            forced_ids = torch.tensor([forced] * samples, device=self.model.device)
        options: dict[str, Any] = {"action_do_sample": not self.args.greedy, "action_bias": self.bias}
        if not self.args.greedy:
            options |= {
                "action_temperature": self.args.temperature,
                "action_top_k": self.args.top_k,
                "action_top_p": self.args.top_p,
                "action_generator": self.generator,
            }
        streaming = nullcontext() if on_token is None else code_streamer(self.model, self.tokenizer, on_token)
        with streaming as streamer:
            answers = self.source(
                [row],
                self.args.max_new_tokens,
                samples,
                forced_action_ids=forced_ids,
                streamer=streamer,
                **options,
            )
        return [
            Reply(a.text, text_pieces(self.tokenizer, a.token_ids), a.action_ids, sum(a.log_probs)) for a in answers
        ]


def coloured(reply: Reply, numbers: bool = True):
    """The answer as rich text, each token on the colour of its code, with the code's number after it."""
    from rich.text import Text

    from ..evaluation.report import code_colour

    text = Text()
    for token, code in zip(reply.tokens, reply.action_ids, strict=True):
        text.append(visible(token), style=f"black on {code_colour(code)}")
        if numbers:
            text.append(f" {code} ", style="dim")
    return text


def visible(token: str) -> str:
    """A token without what would move a terminal's cursor, but for new lines."""
    return "".join(c if c.isprintable() or c == "\n" else "�" for c in token)


def load_answerer(args: argparse.Namespace, with_engine: bool = False) -> Answerer:
    """What answers: the model that `args` names, or an engine of it."""
    from transformers.utils import logging

    from .engines import load_engine_answers
    from .loading import load_model, load_processor

    logging.set_verbosity_error()
    if with_engine:
        source = load_engine_answers(args)
        return Answerer(source, source.encoder.processing_class, args)
    model = load_model(args.model, args.backbone, dtype=args.dtype)
    return Answerer(model, load_processor(model, args.backbone), args)
