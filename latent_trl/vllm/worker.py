"""What an engine's workers can be told, through `collective_rpc`."""

from typing import Any

import torch


class LatentActionWorkerExtension:
    """Mixed into vLLM's worker (`worker_extension_cls`)."""

    model_runner: Any

    def update_latent_action_policy(self, weights: dict[str, torch.Tensor], others: dict[str, torch.Tensor]) -> None:
        """Puts other values into the policy, see [`~latent_trl.vllm.model.LatentActionEngineMixin.update_policy`]."""
        self.model_runner.model.update_policy(weights, others)
