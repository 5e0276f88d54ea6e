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
    parser.add_argument("--greedy", action="store_true", help="the most likely code at each step")
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
        model (`LatentActionModel`): The model.
        processor (`ProcessorMixin` or `PreTrainedTokenizerBase`): The backbone's.
        args (`Namespace`): Of [`add_sampling`].
    """

    def __init__(self, model: Any, processor: Any, args: argparse.Namespace):
        import torch

        from ..generation.choice import code_bias

        self.model, self.processor, self.args = model.eval(), processor, args
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
        from ..data.prompts import encode_prompts

        row = {"prompt": messages, **({"images": images} if images else {})}
        inputs = {k: v.to(self.model.device) for k, v in encode_prompts(self.processor, [row]).items()}
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
            output = self.model.generate(
                **inputs,
                max_new_tokens=self.args.max_new_tokens,
                num_return_sequences=samples,
                forced_action_ids=forced_ids,
                output_cache=False,
                return_dict_in_generate=True,
                streamer=streamer,
                **options,
            )
        return self._replies(output, inputs["input_ids"].shape[1])

    def _replies(self, output, prompt_length: int) -> list[Reply]:
        from ..data.pieces import text_pieces

        end = self.model.generation_config.eos_token_id
        ends = {self.tokenizer.eos_token_id, *(end if isinstance(end, list) else [end])}
        replies = []
        for ids, action_ids, log_probs in zip(
            output.sequences[:, prompt_length:].tolist(), output.action_ids.tolist(), output.action_log_probs.tolist()
        ):
            length = next((i + 1 for i, token in enumerate(ids) if token in ends), len(ids))
            replies.append(
                Reply(
                    text=self.tokenizer.decode(ids[:length], skip_special_tokens=True).strip(),
                    tokens=text_pieces(self.tokenizer, ids[:length]),
                    action_ids=action_ids[:length],
                    log_prob=sum(log_probs[:length]),
                )
            )
        return replies


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


def load_answerer(args: argparse.Namespace) -> Answerer:
    from transformers.utils import logging

    from .loading import load_model, load_processor

    logging.set_verbosity_error()
    model = load_model(args.model, args.backbone, dtype=args.dtype)
    return Answerer(model, load_processor(model, args.backbone), args)
