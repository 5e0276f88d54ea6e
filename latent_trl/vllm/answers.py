"""Answers of an engine to rows of a data set, in the place of a model's own `generate`."""

from typing import TYPE_CHECKING, Any

import torch

from ..generation.answers import GeneratedAnswer, end_tokens
from ..generation.settings import ACTION_DEFAULTS, settled_choice
from .prompts import check_prompt, request_of

if TYPE_CHECKING:
    from transformers import GenerationConfig

    from ..data.prompts import PromptEncoder
    from .engine import LatentActionEngine

# Settings of `generate` that an engine has too, under the same names.
SHARED = (*ACTION_DEFAULTS, "action_bias")
OWN = ("forced_action_ids", "action_generator", "eos_token_id")


class EngineAnswers:
    """
    A [`LatentActionEngine`] as what answers rows, see [`~latent_trl.search.sources.AnswerSource`]. Codes are chosen by
    the law of [`LatentActionModel.generate`], and greedy ones are the same. One seed gives other samples.

    Args:
        engine (`LatentActionEngine`): Whose answers they are.
        encoder (`PromptEncoder`): Of the rows' prompts.
        generation_config (`GenerationConfig`, *optional*): Whose `eos_token_id` ends answers, beside the tokenizer's,
            and whose law of codes holds where none is given; by default that of the engine's checkpoint.
    """

    # Of the generators that settings may have.
    device = torch.device("cpu")

    def __init__(
        self,
        engine: "LatentActionEngine",
        encoder: "PromptEncoder",
        generation_config: "GenerationConfig | None" = None,
    ):
        self.engine, self.encoder, self.config = engine, encoder, engine.config
        self.generation_config = generation_config or engine.folders.generation_config()

    def __call__(
        self, rows: list[dict[str, Any]], max_new_tokens: int, copies: int = 1, **settings: Any
    ) -> list[GeneratedAnswer]:
        """
        Raises:
            ValueError: For a setting that an engine has not, or a prompt that vLLM reads as other tokens.
        """
        wrong = [name for name, value in settings.items() if value is not None and name not in (*SHARED, *OWN)]
        if wrong:
            raise ValueError(f"`{wrong[0]}` cannot be had of an engine. Leave it out, or answer without one.")
        tokenizer = self.encoder.encoder.tokenizer
        prompts = [self.encoder({"_row": i, **row}) for i, row in enumerate(rows)]
        options = settled_choice(self.generation_config, {name: settings.get(name) for name in ACTION_DEFAULTS})
        if settings.get("action_bias") is not None:
            options["action_bias"] = settings["action_bias"]
        forced, generator = settings.get("forced_action_ids"), settings.get("action_generator")
        answers = self.engine.generate(
            [request_of(self.encoder, prompt) for prompt in prompts],
            n=copies,
            seed=None if generator is None else int(torch.randint(2**62, (), generator=generator)),
            max_new_tokens=max_new_tokens,
            forced_action_ids=None if forced is None else torch.as_tensor(forced).tolist(),
            stop_token_ids=end_tokens(self, tokenizer, settings) or [],
            **options,
        )
        for i, answer in enumerate(answers):
            check_prompt(prompts[i // copies], answer.prompt_ids)
        return [
            GeneratedAnswer(
                tokenizer.decode(answer.token_ids, skip_special_tokens=True).strip(),
                answer.token_ids,
                answer.action_ids,
                answer.log_probs,
            )
            for answer in answers
        ]
