"""What an engine's workers can be told, through `collective_rpc`."""

from typing import Any

from safetensors.torch import load


class LatentActionWorkerExtension:
    """Mixed into vLLM's worker (`worker_extension_cls`)."""

    model_runner: Any

    def update_latent_action_policy(self, weights: bytes, others: bytes) -> None:
        """Puts other values, as safetensors, into the policy, see
        [`~latent_trl.vllm.model.LatentActionEngineMixin.update_policy`]."""
        self.model_runner.model.update_policy(load(weights), load(others))
