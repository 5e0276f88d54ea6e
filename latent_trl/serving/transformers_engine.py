"""The embedded engine of codes: `generate` of the model itself."""

from typing import Any

import torch
from transformers import PreTrainedTokenizerBase, ProcessorMixin, StoppingCriteria, StoppingCriteriaList

from ..generation.answers import end_tokens
from ..generation.row_choices import RowChoices
from ..models.latent_action_model import LatentActionModel
from .batched_engine import BatchedEngine
from .batches import Job
from .engine import CODES, default_law


class TransformersEngine(BatchedEngine):
    """
    Answers with [`LatentActionModel.generate`].

    Args:
        model (`LatentActionModel`): It is put in evaluation mode.
        processing_class (`ProcessorMixin` or `PreTrainedTokenizerBase`): The backbone's.
        max_batch_size (`int`, defaults to `32`): Most answers in one batch.
        max_completion_length (`int`, defaults to `1024`): Longest answer, and where a request names no length the one
            that it gets, as far as there is room.
        max_model_len (`int`, *optional*): Most tokens of a conversation and its answer; by default what the backbone
            was trained for.

    Raises:
        ValueError: For a `max_model_len` that the backbone has no positions for.
    """

    kind = CODES

    def __init__(
        self,
        model: LatentActionModel,
        processing_class: ProcessorMixin | PreTrainedTokenizerBase,
        max_batch_size: int = 32,
        max_completion_length: int = 1024,
        max_model_len: int | None = None,
    ):
        model.require("policy", "codebook", "world_model")
        sizes = (max_batch_size, max_completion_length, max_model_len)
        super().__init__(model.backbone_view, processing_class, model.config.num_codes, *sizes)
        self.model = model.eval()
        self.ends = end_tokens(model, self.tokenizer, {}) or []
        self.default_law = default_law(model.generation_config)

    def about(self) -> dict[str, Any]:
        return {"num_codes": self.num_actions, "special_tokens": self.special_tokens}

    def _generate(self, jobs: list[Job]) -> None:
        device = self.model.device
        choices = self._choices([job.request for job in jobs], device)
        with self._encoding:
            inputs = self.encoder.collate([job.prompt for job in jobs])
        self.model.generate(
            **{name: value.to(device) for name, value in inputs.items()},
            action_choice=choices,
            max_new_tokens=max(job.max_tokens for job in jobs),
            num_return_sequences=jobs[0].request.n,
            eos_token_id=self.model.backbone_view.text_config.vocab_size,
            pad_token_id=self.encoder.encoder.tokenizer.pad_token_id or 0,
            stopping_criteria=StoppingCriteriaList([_Watch(jobs, choices)]),
        )


class _Watch(StoppingCriteria):
    """Hands each token with its code to its job, and ends the rows whose answers have ended."""

    def __init__(self, jobs: list[Job], choices: RowChoices):
        self.jobs, self.choices = jobs, choices

    def __call__(self, input_ids: torch.Tensor, scores: Any, **kwargs: Any) -> torch.Tensor:
        rows = zip(
            input_ids[:, -1].tolist(), self.choices.action_ids.tolist(), self.choices.log_probs.tolist(), strict=True
        )
        count, done = len(self.jobs), []
        for row, (token, code, log_prob) in enumerate(rows):
            job, index = self.jobs[row % count], row // count
            job.choose(index, code, log_prob)
            done.append(job.add(index, token))
        return torch.tensor(done, device=input_ids.device)
