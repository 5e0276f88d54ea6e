"""Where a rollout's samples come from: the seam between a trainer and what generates for it."""

from typing import Any, Protocol

from accelerate import Accelerator
from transformers import GenerationConfig
from trl.models import unwrap_model_for_generation

from ...data.prompts import EncodedPrompt, PromptEncoder
from .rollout import Sample


class RolloutSource(Protocol):
    """Draws samples of prompts. What comes after does not know which source they are from."""

    def __call__(self, rows: list[dict[str, Any]], prompts: list[EncodedPrompt], copies: int) -> list[Sample]:
        """
        Args:
            rows (`list[dict]`): The data set's row of each prompt.
            prompts (`list[EncodedPrompt]`): One a prompt.
            copies (`int`): Samples a prompt.

        Returns:
            `list[Sample]`: Prompt by prompt, without their completions' text.
        """
        ...


class GenerateSource:
    """
    [`LatentActionModel.generate`], transformers' own loop.

    Args:
        model (`nn.Module`): The wrapped model.
        accelerator (`Accelerator`): Of the trainer.
        generation_config (`GenerationConfig`): Of the rollouts.
        encoder (`PromptEncoder`): Makes a batch of prompts.
        end_token_ids (`list[int]`): What ends a completion.
        keep_states (`bool`): Whether samples carry their context states.
        gather (`bool`): Whether ZeRO-3 gathers all parameters for the time of the call (`ds3_gather_for_generation`).
        synced (`bool`): Whether processes gather layers together, so that those that are done go on with the others.
    """

    def __init__(
        self,
        model: Any,
        accelerator: Accelerator,
        generation_config: GenerationConfig,
        encoder: PromptEncoder,
        end_token_ids: list[int],
        keep_states: bool,
        gather: bool = True,
        synced: bool = False,
    ):
        self.model = model
        self.accelerator = accelerator
        self.generation_config = generation_config
        self.encoder = encoder
        self.end_token_ids = end_token_ids
        self.keep_states = keep_states
        self.gather = gather
        self.synced = synced

    @classmethod
    def of(cls, trainer: Any) -> "GenerateSource":
        """That of a `GRPOTrainer`."""
        return cls(
            trainer.model_wrapped,
            trainer.accelerator,
            trainer.generation_config,
            trainer.encoder,
            trainer.eos_token_ids,
            trainer.args.reuse_context_states,
            trainer.args.ds3_gather_for_generation,
            # transformers sees to it under ZeRO-3, and does not know of accelerate's FSDP2.
            synced=trainer.is_fsdp_enabled,
        )

    def __call__(self, rows: list[dict[str, Any]], prompts: list[EncodedPrompt], copies: int) -> list[Sample]:
        inputs = self.encoder.collate(prompts)
        inputs = {name: value.to(self.accelerator.device) for name, value in inputs.items()}
        synced = {"synced_gpus": True} if self.synced else {}
        with (
            unwrap_model_for_generation(self.model, self.accelerator, gather_deepspeed3_params=self.gather) as model,
            self.accelerator.autocast(),
        ):
            output = model.generate(
                **inputs,
                **synced,
                generation_config=self.generation_config,
                num_return_sequences=copies,
                output_context_states=self.keep_states,
                output_cache=False,
                return_dict_in_generate=True,
            )
        width = inputs["input_ids"].shape[1]
        samples = []
        for i, ids in enumerate(output.sequences[:, width:].tolist()):
            prompt = prompts[i // copies]
            length = next((at + 1 for at, token in enumerate(ids) if token in self.end_token_ids), len(ids))
            states = slice(width - len(prompt.ids), width + length - 1)
            support, context, positions = output.action_support, output.context_states, output.position_ids
            samples.append(
                Sample(
                    row=rows[i // copies],
                    prompt=prompt,
                    completion_ids=ids[:length],
                    action_ids=output.action_ids[i, :length],
                    action_log_probs=output.action_log_probs[i, :length],
                    action_support=None if support is None else support[i, :length],
                    context_states=None if context is None else context[i, states],
                    position_ids=None if positions is None else positions[i, ..., states],
                )
            )
        return samples
