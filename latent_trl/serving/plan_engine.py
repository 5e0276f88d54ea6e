"""The embedded engine of plans: greedy answers of a `PlanModel`, a plan chosen for each segment."""

import copy
from dataclasses import replace
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase, ProcessorMixin

from ..data.prompts import PromptEncoder
from ..generation.action_law import ActionLaw
from ..generation.answers import end_tokens
from ..plans.configuration import PlanConfig
from ..plans.model import PlanModel
from ..plans.segments import PlannedAnswer
from .batched_engine import BatchedEngine
from .batches import Job
from .engine import PLANS, GenerationRequest, RequestError

# The plan that the chooser finds the best, where a request is silent.
DEFAULT_LAW = (False, ActionLaw())


def check_plans(request: GenerationRequest, config: PlanConfig, has_chooser: bool) -> None:
    """
    Raises:
        RequestError: For several plans of an answer that holds one, or a segment that nothing chooses a plan for.
    """
    if len(request.forced) > 1 and config.segment == "answer":
        raise RequestError(
            f"`plans.forced` has {len(request.forced)} plans, and a plan is held for the whole answer. Give one.",
            "plans.forced",
        )
    if not has_chooser and (not request.forced or -1 in request.forced):
        raise RequestError(
            "No chooser has been trained here, so `plans.forced` must name the plan: a number, or one a segment.",
            "plans.forced",
        )


def held(forced: list[int], max_tokens: int) -> list[int]:
    """Forced plans of so many segments as an answer may have: the last one is held."""
    return [*forced, *forced[-1:] * (max_tokens - len(forced))]


def about_plans(config: PlanConfig, has_chooser: bool, special_tokens: list[str]) -> dict[str, Any]:
    """What `/v1/models` says of plans."""
    about = {"num_plans": config.num_plans, "segment": config.segment, "has_chooser": has_chooser}
    return {**about, "special_tokens": special_tokens}


class TransformersPlanEngine(BatchedEngine):
    """
    Answers with [`PlanModel.speak`].

    Args:
        model (`PlanModel`): It is put in evaluation mode.
        processing_class, max_batch_size, max_completion_length, max_model_len: As in
            [`~latent_trl.serving.transformers_engine.TransformersEngine`].

    Raises:
        ValueError: For a `max_model_len` that the backbone has no positions for.
    """

    kind, default_law = PLANS, DEFAULT_LAW

    def __init__(
        self,
        model: PlanModel,
        processing_class: ProcessorMixin | PreTrainedTokenizerBase,
        max_batch_size: int = 32,
        max_completion_length: int = 1024,
        max_model_len: int | None = None,
    ):
        sizes = (max_batch_size, max_completion_length, max_model_len)
        super().__init__(model.view, processing_class, model.plan_config.num_plans, *sizes)
        self.model = model.eval()
        # Of its own, for the thread that answers.
        self.collator = PromptEncoder(copy.deepcopy(processing_class))
        self.ends = end_tokens(model.backbone, self.tokenizer, {}) or []

    def about(self) -> dict[str, Any]:
        return about_plans(self.model.plan_config, self.model.chooser_is_trained, self.special_tokens)

    def _check(self, request: GenerationRequest) -> None:
        check_plans(request, self.model.plan_config, self.model.chooser_is_trained)

    def _generate(self, jobs: list[Job]) -> None:
        model, count = self.model, len(jobs)
        requests = [replace(job.request, forced=held(job.request.forced, job.max_tokens)) for job in jobs]
        choices = self._choices(requests, "cpu")
        prompts = [job.prompt for job in jobs] * requests[0].n
        logits = torch.zeros(len(prompts), self.num_actions)

        def choose(rows: list[int], answers: list[PlannedAnswer], inputs: dict[str, Any]) -> torch.Tensor:
            if model.chooser_is_trained:
                logits[rows] = model.plan_logits(**inputs).float().cpu()
            plans, _, _ = choices.choose(logits, len(answers[0].plans))
            for row in rows:
                log_prob = choices.log_probs[row].item() if model.chooser_is_trained else 0.0
                jobs[row % count].choose(row // count, int(plans[row]), log_prob)
            return plans[rows]

        def tell(row: int, token: int) -> bool:
            return jobs[row % count].add(row // count, token)

        model.speak(
            self.collator,
            prompts,
            choose,
            max(job.max_tokens for job in jobs),
            ends=[],
            batch_size=len(prompts),
            tell=tell,
        )
