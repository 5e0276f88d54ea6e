"""Answers of RL over plans from vLLM: an engine beside the trainer, or rollout servers."""

from typing import Any

import torch

from ...api_key import read_key
from ...data.prompts import EncodedPrompt
from ...plans.engine_decoder import PlanEngine, PlanSource, check_decodable
from ...plans.plan_servers import PlanServers
from ...plans.prompt_cache import GreedyAnswers
from ..rollout.engine_options import server_urls
from ..rollout.engine_source import engine_options


class EngineSource:
    """
    [`~latent_trl.plans.engine_decoder.PlanEngine`] over an engine in the trainer's process (`vllm_mode="colocate"`),
    which starts with the first answer, or over servers (`vllm_mode="server"`), which must be there from the beginning.
    Both have room for the plans that `grow_plans` may add.

    Args:
        trainer (`PlanRLTrainer`): Whose plans answer.

    Raises:
        ValueError: For plans or a backbone that an engine cannot have.
        RolloutServersError: When a server does not answer, or is of another model.
    """

    def __init__(self, trainer: Any):
        has_servers = trainer.args.vllm_mode == "server"
        check_decodable(trainer.model, elsewhere=has_servers)
        self.trainer = trainer
        self.engine: PlanEngine | None = self._over(self._servers()) if has_servers else None

    def __call__(
        self, prompts: list[EncodedPrompt], said: list[list[int]], plan_ids: list[int] | None, *limits: Any
    ) -> GreedyAnswers:
        if self.engine is None:
            self.engine = self._over(self._started())
        return self.engine(prompts, said, plan_ids, *limits)

    def _over(self, source: PlanSource) -> PlanEngine:
        return PlanEngine(self.trainer.model, self.trainer.encoder, source)

    def _slots(self) -> int:
        plans, args = self.trainer.model.plan_config.num_plans, self.trainer.args
        return max(plans, args.max_plans) if args.grow_plans else plans

    def _servers(self) -> PlanServers:
        model, args = self.trainer.model, self.trainer.args
        urls, timeout, size = server_urls(args), args.vllm_server_timeout, args.rollout_batch_size
        return PlanServers(model, urls, timeout, read_key(), self._slots(), size)

    def _started(self) -> PlanSource:
        trainer, args = self.trainer, self.trainer.args
        options = engine_options(args, trainer.model.backbone)
        from ...plans.lora_engine import engine_of_model

        # vLLM seeds the generators of its process.
        with torch.random.fork_rng():
            sleeps = args.vllm_enable_sleep_mode
            return engine_of_model(trainer.model, trainer.encoder, self._slots(), enable_sleep_mode=sleeps, **options)
