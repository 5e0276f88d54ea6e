"""Answers of RL over plans from an engine of vLLM that runs beside the trainer."""

from typing import Any

import torch

from ...data.prompts import EncodedPrompt
from ...plans.engine_decoder import PlanEngine, check_decodable
from ...plans.prompt_cache import GreedyAnswers
from ..rollout.engine_source import engine_options


class EngineSource:
    """
    [`~latent_trl.plans.engine_decoder.PlanEngine`] in the trainer's process (`vllm_mode="colocate"`). It starts with
    the first answer, and has room for the plans that `grow_plans` may add.

    Args:
        trainer (`PlanRLTrainer`): Whose plans answer.

    Raises:
        ValueError: For plans or a backbone that an engine cannot have.
    """

    def __init__(self, trainer: Any):
        check_decodable(trainer.model)
        self.trainer = trainer
        self.engine: PlanEngine | None = None

    def __call__(
        self, prompts: list[EncodedPrompt], said: list[list[int]], plan_ids: list[int] | None, *limits: Any
    ) -> GreedyAnswers:
        if self.engine is None:
            self.engine = self._started()
        return self.engine(prompts, said, plan_ids, *limits)

    def _started(self) -> PlanEngine:
        trainer, args = self.trainer, self.trainer.args
        plans = trainer.model.plan_config.num_plans
        slots = max(plans, args.max_plans) if args.grow_plans else plans
        options = engine_options(args, trainer.model.backbone)
        # vLLM seeds the generators of its process.
        with torch.random.fork_rng():
            return PlanEngine(trainer.model, trainer.encoder, slots, args.vllm_enable_sleep_mode, **options)
