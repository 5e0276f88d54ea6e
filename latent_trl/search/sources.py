"""What answers rows of a data set: a model's own `generate`, or an engine in its place."""

from typing import Any, Protocol

from torch import nn
from transformers import PreTrainedTokenizerBase, ProcessorMixin

from ..data.prompts import encode_prompts
from ..generation.answers import GeneratedAnswer, end_tokens, evaluation_mode, generated_answers
from ..models.latent_action_model import LatentActionModel


class AnswerSource(Protocol):
    """Answers rows. What measures or searches the answers does not know where they are from."""

    def __call__(
        self, rows: list[dict[str, Any]], max_new_tokens: int, copies: int = 1, **settings: Any
    ) -> list[GeneratedAnswer]:
        """
        Args:
            rows (`list[dict]`): With `prompt`, and `images` where there are some.
            max_new_tokens (`int`): Of an answer.
            copies (`int`, defaults to `1`): Answers a row.
            settings: Of [`LatentActionModel.generate`].

        Returns:
            `list[GeneratedAnswer]`: Row by row.
        """
        ...


class GenerateAnswers:
    """
    [`LatentActionModel.generate`], in evaluation mode.

    Args:
        model (`LatentActionModel`), processing_class: The model and its backbone's processor.
    """

    def __init__(self, model: LatentActionModel, processing_class: ProcessorMixin | PreTrainedTokenizerBase):
        self.model, self.processing_class = model, processing_class

    def __call__(
        self, rows: list[dict[str, Any]], max_new_tokens: int, copies: int = 1, **settings: Any
    ) -> list[GeneratedAnswer]:
        tokenizer = getattr(self.processing_class, "tokenizer", self.processing_class)
        ends = end_tokens(self.model, tokenizer, settings)
        encoded = encode_prompts(self.processing_class, rows)
        inputs = {name: tensor.to(self.model.device) for name, tensor in encoded.items()}
        with evaluation_mode(self.model):
            output = self.model.generate(
                **inputs,
                **{**settings, "eos_token_id": ends},
                max_new_tokens=max_new_tokens,
                num_return_sequences=copies,
                output_cache=False,
                return_dict_in_generate=True,
            )
        return generated_answers(output, inputs["input_ids"].shape[1], tokenizer, ends)


def source_of(model: Any, processing_class: ProcessorMixin | PreTrainedTokenizerBase) -> AnswerSource:
    """What answers for `model`: itself where it is an [`AnswerSource`], such as
    [`~latent_trl.vllm.answers.EngineAnswers`]."""
    return GenerateAnswers(model, processing_class) if isinstance(model, nn.Module) else model
