"""Rollout servers over plans, in the place of an engine in a trainer's process. Imports no vLLM."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig

from .. import __version__
from ..vllm.identity import PLANS
from ..vllm.rows import EngineText
from ..vllm.servers import ServerPool
from ..vllm.wire import PolicyFile, unpacked_texts
from .configuration import PlanConfig
from .folder import check_plan_folder
from .model import PlanModel

# Segments follow on each other quickly: a lost server that hangs would hold up each of them.
PAUSE_SECONDS = 10.0


def policy_of_plans(tensors: dict[str, torch.Tensor]) -> PolicyFile:
    """Plans as they travel; `tensors` are those of [`PlanAdapters.tensors`]."""
    return PolicyFile.of_tensors({name: tensor.cpu().contiguous() for name, tensor in tensors.items()})


def identity_of_plans(folder: Path) -> dict[str, Any]:
    """
    What a server says of itself, in plain JSON values.

    Args:
        folder (`Path`): Of saved plans.

    Returns:
        `latent_trl`, the package's version; `kind`, plans; `backbone`, the fingerprint in their record; `rank` and
        `target_modules`, the names of the linear maps that they change.
    """
    config = PlanConfig.load(folder)
    targets = LoraConfig.from_pretrained(str(check_plan_folder(folder, 0))).target_modules
    return _identity([config.backbone_fingerprint], config.rank, targets)


def identity_of_plan_model(model: PlanModel) -> dict[str, Any]:
    """That of a model in memory, whose backbone may be loaded in a shorter precision than that of the record."""
    backbone = [model.view.fingerprint(through) for through in (torch.bfloat16, torch.float16)]
    return _identity(backbone, model.plan_config.rank, model.plans.targets)


def _identity(backbone: list[str | None], rank: int, targets: Any) -> dict[str, Any]:
    return {
        "latent_trl": __version__,
        "kind": PLANS,
        "backbone": backbone,
        "rank": rank,
        "target_modules": sorted(targets),
    }


class PlanServers(ServerPool):
    """
    Rollout servers over plans. Each process of a trainer has its own, and asks as often as its rows need it: the plans
    are the same in all of them.

    Args:
        model (`PlanModel`): Of the trainer. Servers must have its backbone, and plans of its rank on the same maps.
        urls, timeout, key: As in [`~latent_trl.vllm.servers.ServerPool`].
        slots (`int`): Plans that there may be.
        batch_size (`int`, defaults to `256`): Most rows that a server is asked for at once.

    Raises:
        RolloutServersError: When a server does not answer in time, is of another model or package, or has no room for
            so many plans.
    """

    read = staticmethod(unpacked_texts)
    remedy = "Start the servers with a longer `--max-model-len` if the backbone has positions for it"

    def __init__(
        self,
        model: PlanModel,
        urls: list[str],
        timeout: float,
        key: str | None,
        slots: int,
        batch_size: int = 256,
    ):
        self.slots, self.batch_size = slots, batch_size
        # Longest context, by server.
        self.contexts: dict[str, int] = {}
        super().__init__(lambda: identity_of_plan_model(model), urls, timeout, key, together=False, pause=PAUSE_SECONDS)

    def differences(self, url: str, described: dict[str, Any]) -> list[str]:
        found = super().differences(url, described)
        if not found and described["slots"] < self.slots:
            found.append(
                f"it has room for {described['slots']} plans, and the run may come to {self.slots} (`max_plans`). "
                f"Start it with `--engine-options '{{\"max_loras\": {self.slots}}}'`"
            )
        if not found:
            self.contexts[url] = described["max_model_len"]
        return found

    @property
    def longest(self) -> int:
        """Most tokens of a prompt and its answer, on all servers."""
        return min(self.contexts.values())

    def take(self, tensors: dict[str, torch.Tensor]) -> None:
        """Gives the servers other plans, as [`PlanAdapters.tensors`]."""
        self.give(policy_of_plans(tensors))

    def generate(
        self,
        prompts: Sequence[Any],
        rows: Sequence[tuple[int, dict[str, Any]]],
        max_new_tokens: int,
        stop_token_ids: Sequence[int],
    ) -> list[EngineText]:
        """Answers rows, as [`~latent_trl.plans.lora_engine.LoraEngine.generate`]."""
        found: list[EngineText] = []
        while len(found) < len(rows):
            size = self.batch_size * max(1, len(self.servers) - len(self.lost))
            some = rows[len(found) : len(found) + size]
            found += self.answers(prompts, some, max_new_tokens, stop_token_ids)
        return found
