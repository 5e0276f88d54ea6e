"""Answers of a latent action model, and at each of their tokens the codes that were likely there."""

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch

from ..data.code_streamer import code_streamer
from ..data.pieces import text_pieces
from ..data.prompts import encode_prompts
from ..generation.action_law import ActionLaw
from ..generation.answers import end_tokens, generated_answers
from ..generation.choice import code_bias
from ..generation.output import trunk_positions
from ..models.latent_action_model import LatentActionModel


@dataclass
class Answer:
    """
    Args:
        text (`str`): Without special tokens.
        tokens (`list[str]`): Token by token, up to and including the end.
        action_ids (`list[int]`): The codes that emitted them.
        log_probs (`list[float]`): Of the codes, under the law that they were sampled from.
        law (`ActionLaw`), bias (`torch.Tensor`, *optional*): That law, and the `[K]` that was added to the logits.
        context_states (`torch.Tensor`): `[1, P+C-1, d]`, what policy and world model read.
        position_ids (`torch.Tensor`, *optional*): Of the states.
        prompt_length (`int`): P.
    """

    text: str
    tokens: list[str]
    action_ids: list[int]
    log_probs: list[float]
    law: ActionLaw
    bias: torch.Tensor | None
    context_states: torch.Tensor = field(repr=False)
    position_ids: torch.Tensor | None = field(repr=False)
    prompt_length: int = 0


@dataclass
class Alternative:
    """A code that could be taken at a token: its probability, the token that it says, and whether it was taken."""

    action_id: int
    probability: float
    token: str
    taken: bool


class Explorer:
    """
    A model whose answers are looked into.

    Args:
        model (`LatentActionModel`): The model.
        processing_class (`ProcessorMixin` or `PreTrainedTokenizerBase`): The backbone's.
        max_new_tokens (`int`, defaults to `128`): The longest answer.
    """

    def __init__(self, model: LatentActionModel, processing_class: Any, max_new_tokens: int = 128):
        self.model, self.processing_class, self.max_new_tokens = model.eval(), processing_class, max_new_tokens
        self.tokenizer = getattr(processing_class, "tokenizer", processing_class)

    @torch.no_grad()
    def answer(
        self,
        question: str,
        image: Any = None,
        temperature: float = 0.0,
        banned: Sequence[int] = (),
        forced: Sequence[int] = (),
        seed: int = 0,
        on_token: Callable[[str, int], None] | None = None,
    ) -> Answer:
        """
        Answers a question.

        Args:
            question (`str`), image (`PIL.Image.Image`, *optional*): What is asked, and the picture.
            temperature (`float`, defaults to `0.0`): Of the codes; 0 takes the most likely tokens.
            banned (`Sequence[int]`), forced (`Sequence[int]`): Codes never to take; codes of the first steps.
            seed (`int`, defaults to `0`): Of the sampling.
            on_token (`Callable[[str, int], None]`, *optional*): Told each token's text and its code as they come.

        Raises:
            ValueError: For an empty question, a negative temperature, codes that there are not, or all codes banned.
        """
        if not question.strip():
            raise ValueError("Ask something: `question` is empty.")
        if not temperature >= 0:
            raise ValueError(f"`temperature` must be 0 or more, got {temperature}.")
        row = {"prompt": [{"role": "user", "content": question}], **({} if image is None else {"images": [image]})}
        device = self.model.device
        inputs = {name: value.to(device) for name, value in encode_prompts(self.processing_class, [row]).items()}
        bias, law = code_bias(self.model.config.num_codes, banned, device=device), ActionLaw(temperature or 1.0)
        options: dict[str, Any] = {"action_do_sample": temperature > 0, "action_bias": bias}
        if temperature > 0:
            generator = torch.Generator(device=device).manual_seed(seed)
            options |= {"action_temperature": temperature, "action_generator": generator}
        if forced:
            self._check(forced)
            options["forced_action_ids"] = torch.tensor([list(forced)], device=device)
        streaming = nullcontext() if on_token is None else code_streamer(self.model, self.tokenizer, on_token)
        with streaming as streamer:
            output = self.model.generate(
                **inputs,
                max_new_tokens=self.max_new_tokens,
                return_dict_in_generate=True,
                output_context_states=True,
                output_cache=False,
                streamer=streamer,
                **options,
            )
        return self._answer(output, inputs["input_ids"].shape[1], law, bias)

    def _answer(self, output, prompt_length: int, law: ActionLaw, bias: torch.Tensor | None) -> Answer:
        (said,) = generated_answers(output, prompt_length, self.tokenizer, end_tokens(self.model, self.tokenizer, {}))
        return Answer(
            text=said.text,
            tokens=text_pieces(self.tokenizer, said.token_ids),
            action_ids=said.action_ids,
            log_probs=said.log_probs,
            law=law,
            bias=bias,
            context_states=output.context_states,
            position_ids=output.position_ids,
            prompt_length=prompt_length,
        )

    @torch.no_grad()
    def alternatives(self, answer: Answer, step: int, count: int = 8) -> list[Alternative]:
        """
        The likeliest codes at a token of an answer, the one that was taken among them, and what each would have said.

        Args:
            answer (`Answer`): Of this explorer.
            step (`int`): The token, from 0.
            count (`int`, defaults to `8`): How many.

        Raises:
            IndexError: For a step that the answer does not have.
        """
        probs = self.probabilities(answer, step)
        likely = probs.topk(min(count, int((probs > 0).sum()))).indices.tolist()
        taken = answer.action_ids[step]
        if taken not in likely:
            likely = [*likely[:-1], taken]
        tokens = self.said(answer, step, likely)
        return [
            Alternative(code, float(probs[code]), token, code == taken)
            for code, token in zip(likely, tokens, strict=True)
        ]

    @torch.no_grad()
    def said(self, answer: Answer, step: int, codes: Sequence[int]) -> list[str]:
        """The text of the token that each of `codes` would have said at a token of an answer."""
        state = answer.context_states[:, answer.prompt_length + step - 1, None].expand(1, len(codes), -1)
        read = self.model.read(state, torch.tensor([list(codes)], device=state.device))[0].float()
        # Never said: they stand for pictures.
        read[:, self.model.config.vision_token_ids] = -torch.inf
        return [text_pieces(self.tokenizer, [token])[0] for token in read.argmax(dim=-1).tolist()]

    @torch.no_grad()
    def probabilities(self, answer: Answer, step: int) -> torch.Tensor:
        """
        Probabilities `[K]` of all codes at a token of an answer, under the law that it was sampled from.

        Args:
            answer (`Answer`): Of this explorer.
            step (`int`): The token, from 0.

        Raises:
            IndexError: For a step that the answer does not have.
        """
        if not 0 <= step < len(answer.action_ids):
            raise IndexError(f"`step` must be 0 to {len(answer.action_ids) - 1}, got {step}.")
        end = answer.prompt_length + step
        states = answer.context_states[:, :end]
        positions = trunk_positions(answer.position_ids, states.device)
        positions = None if positions is None else positions[..., :end]
        logits = self.model.policy(states, position_ids=positions, keep_last=1)[0, -1]
        if answer.bias is not None:
            logits = logits + answer.bias
        return answer.law.log_probs(logits[None], None)[0].exp()

    def _check(self, codes: Sequence[int]) -> None:
        count = self.model.config.num_codes
        wrong = [code for code in codes if not 0 <= code < count]
        if wrong:
            raise ValueError(f"Codes are 0 to {count - 1}, got {wrong}.")
