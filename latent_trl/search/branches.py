"""Decoding the branches of the tree, and the tokens that can come next at each step of an answer."""

import math
from dataclasses import dataclass
from typing import Any, cast

import torch

from ..generation.answers import end_tokens
from ..generation.output import LatentActionGenerateOutput, trunk_positions
from ..generation.settings import EXPLICIT_SETTINGS
from ..models.latent_action_model import LatentActionModel
from .candidates import Candidate, candidates_of, encoded, refuse

# What decides itself which answers there are, and is not passed on to `generate`.
OWN_SETTINGS = (
    *("num_return_sequences", "forced_action_ids", "action_do_sample", "action_temperature", "action_top_k"),
    *("action_top_p", "action_sampling", "action_generator"),
)
# What leaves each code the token that it has without it. The tree tells the tokens of its branches beforehand, and
# cannot know what processors of the logits or other ends of an answer make of them.
TREE_SETTINGS = (
    *("action_bias", "suppress_tokens", "eos_token_id", "pad_token_id", "bos_token_id", "generation_config"),
    *("cuda_graphs", "use_cache", "cache_implementation", "cache_config", "compile_config", "disable_compile"),
)


@dataclass
class Branch:
    """Codes of the first steps, and the log-probability of the tokens that they emit."""

    action_ids: list[int]
    log_prob: float


# What can come next at one step: the token, its most likely code, and the log-probability of all codes that emit it.
NextToken = tuple[int, int, float]


class BranchDecoder:
    """
    Decodes branches to the end, and tells what can come next at each step of the answers.

    Args:
        model (`LatentActionModel`), processing_class: The model and its backbone's processor.
        max_new_tokens (`int`), width (`int`), generate_kwargs (`dict`): As in [`tree_search`].
    """

    def __init__(
        self,
        model: LatentActionModel,
        processing_class: Any,
        max_new_tokens: int,
        width: int,
        generate_kwargs: dict[str, Any],
    ):
        self.model, self.processing_class, self.width = model, processing_class, width
        self.tokenizer = getattr(processing_class, "tokenizer", processing_class)
        self.settings = _tree_settings(generate_kwargs)
        self.ends = end_tokens(model, self.tokenizer, self.settings)
        self.settings |= {
            "max_new_tokens": max_new_tokens,
            "eos_token_id": self.ends,
            "action_do_sample": False,
            "action_temperature": 1.0,
            "action_top_k": 0,
            "action_top_p": 1.0,
        }
        never = {*model.config.vision_token_ids, *(self.settings.get("suppress_tokens") or ())}
        self.never = sorted(never)
        self._rows: list[dict[str, Any]] = []
        self._inputs: dict[str, torch.Tensor] = {}

    def __call__(
        self, rows: list[dict[str, Any]], branches: list[Branch], with_options: bool
    ) -> list[tuple[Candidate, list[list[NextToken]]]]:
        """The answer of each row's branch, and what can come next at its steps behind the branch's codes."""
        if [id(row) for row in rows] != [id(row) for row in self._rows]:
            # Pictures are processed again only where prompts have dropped out.
            self._rows, self._inputs = rows, encoded(self.model, self.processing_class, rows)
        inputs = self._inputs
        forced = [branch.action_ids for branch in branches]
        output = self.model.generate(
            **inputs,
            **self.settings,
            forced_action_ids=padded(forced),
            output_context_states=True,
            output_cache=False,
            return_dict_in_generate=True,
        )
        found = candidates_of(output, inputs["input_ids"].shape[1], self.tokenizer, self.ends)
        if not with_options:
            return [(candidate, []) for candidate in found]
        log_probs, codes = self._likely_codes(output, inputs["attention_mask"])
        options: list[list[list[NextToken]]] = [[] for _ in found]
        for step in range(codes.shape[1]):
            going = [i for i, answer in enumerate(found) if len(forced[i]) <= step < len(answer.token_ids)]
            for i, of_row in zip(going, self._next_tokens(output, step, going, log_probs, codes), strict=True):
                options[i].append(of_row)
        return list(zip(found, options, strict=True))

    @torch.no_grad()
    def _likely_codes(
        self, output: LatentActionGenerateOutput, attention_mask: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Log-probabilities and codes `[B, C, width + 1]` of each step of one `generate` call: the most likely first,
        and then the one that was taken, `-inf` where it is among them."""
        rows, length = output.action_ids.shape
        logits = self.model(
            context_states=output.context_states,
            attention_mask=torch.cat([attention_mask, attention_mask.new_ones(rows, length - 1)], dim=1),
            position_ids=trunk_positions(output.position_ids, attention_mask.device),
            keep_last=length,
            return_logits=False,
        ).action_logits
        bias = self.settings.get("action_bias")
        if bias is not None:
            logits = logits + bias.to(logits)
        law = logits.float().log_softmax(dim=-1)
        log_probs, codes = law.topk(min(self.width, law.shape[-1]))
        # The code that was taken may be none of them: many unlikely codes can say the most likely token.
        taken = cast(torch.Tensor, output.action_ids)[..., None]
        known = (codes == taken).any(dim=-1, keepdim=True)
        of_taken = law.gather(-1, taken).masked_fill(known, -torch.inf)
        log_probs, codes = torch.cat([log_probs, of_taken], dim=-1), torch.cat([codes, taken], dim=-1)
        return log_probs, codes

    @torch.no_grad()
    def _next_tokens(
        self,
        output: LatentActionGenerateOutput,
        step: int,
        rows: list[int],
        log_probs: torch.Tensor,
        codes: torch.Tensor,
    ) -> list[list[NextToken]]:
        """What can come next at `step` of each of `rows`, given their likely codes."""
        if not rows:
            return []
        context_states, sequences = cast(torch.Tensor, output.context_states), cast(torch.Tensor, output.sequences)
        action_ids = cast(torch.Tensor, output.action_ids)
        place = context_states.shape[1] - codes.shape[1] + step
        said = self.model.said_tokens(context_states[rows, place], codes[rows, step], self.never)
        # Of the code that was taken the token is the one that was emitted, for the same reason.
        emitted, taken = sequences[rows, place + 1, None], action_ids[rows, step, None]
        tokens = torch.where(codes[rows, step] == taken, emitted, said)
        options = zip(tokens.tolist(), codes[rows, step].tolist(), log_probs[rows, step].tolist(), strict=True)
        return [_merged(*option) for option in options]


def _tree_settings(generate_kwargs: dict[str, Any]) -> dict[str, Any]:
    """What is passed on to `generate`. Raises `ValueError` for what would change the tokens of codes."""
    config = generate_kwargs.get("generation_config")
    within = {} if config is None else {**config.to_diff_dict(), "transformers_version": None}
    refuse(within, *OWN_SETTINGS)
    for name, value in [*within.items(), *generate_kwargs.items()]:
        if name not in TREE_SETTINGS and not _asks_for_nothing(name, value):
            raise ValueError(
                f"`{name}={value!r}` may change which token a code emits or where an answer ends, so the tree cannot "
                "tell its branches. Leave it out, or use `best_of_n`."
            )
    return {"suppress_tokens": within.get("suppress_tokens"), **generate_kwargs}


def _asks_for_nothing(name: str, value: Any) -> bool:
    return value is None or value in EXPLICIT_SETTINGS.get(name, ())


def _merged(tokens: list[int], codes: list[int], log_probs: list[float]) -> list[NextToken]:
    """Codes, the most likely first, joined by the token that they emit."""
    joined: dict[int, tuple[int, float]] = {}
    for token, code, log_prob in zip(tokens, codes, log_probs, strict=True):
        if log_prob > -math.inf:
            first, total = joined.get(token, (code, 0.0))
            joined[token] = (first, total + math.exp(log_prob))
    return [(token, code, math.log(total)) for token, (code, total) in joined.items() if total > 0]


def padded(action_ids: list[list[int]]) -> torch.Tensor | None:
    """Forced codes `[B, n]`, free where a row has no more; `None` where none is forced."""
    length = max(map(len, action_ids))
    return torch.tensor([codes + [-1] * (length - len(codes)) for codes in action_ids]) if length else None
