"""What an engine's workers can be told, through `collective_rpc`."""

from typing import Any

from safetensors.torch import load


class LatentActionWorkerExtension:
    """Mixed into vLLM's worker (`worker_extension_cls`)."""

    model_runner: Any

    def update_latent_action_policy(self, tensors: bytes) -> None:
        """Puts other values, what [`~latent_trl.vllm.names.policy_tensors`] gives as safetensors, into the policy."""
        self.model_runner.model.update_policy(load(tensors))
