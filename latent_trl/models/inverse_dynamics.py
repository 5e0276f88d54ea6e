"""The inverse dynamics model: which code explains the next token."""

import torch

from .code_predictor import CodePredictor


class InverseDynamicsModel(CodePredictor):
    """
    Decoder layers over the states, then K logits, shifted left by one: the code at t sees the states up to t + 1, the
    token that it must explain among them, and nothing later. Needed for learning only.

    Args:
        text_config (`PreTrainedConfig` or `dict`): Configuration of its decoder layers.
        hidden_size (`int`): d, the width of the states.
        num_codes (`int`): K.
    """

    folder_name = "inverse_dynamics"

    def forward(
        self,
        states: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        token_embeddings: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """
        Args:
            states (`torch.Tensor`): `[B, L, d]`.
            attention_mask, position_ids (`torch.Tensor`, *optional*): As [`DecoderStack`] takes them.
            token_embeddings (`torch.Tensor`, *optional*): `[B, L, d]` of the tokens themselves, added to the states at
                their scale. A last state speaks of what comes next, and hardly of the token that was read.

        Returns:
            Logits `[B, L-1, K]` in float32; entry t is for the step from token t to t + 1.
        """
        if token_embeddings is not None:
            scale = rms(states) / rms(token_embeddings).clamp(min=1e-6)
            states = states + token_embeddings.to(states.dtype) * scale.to(states.dtype)
        return self.head(self.features(states, attention_mask, position_ids)[:, 1:])


def rms(x: torch.Tensor) -> torch.Tensor:
    """Root mean square over the last dimension, which is kept, in float32."""
    return x.float().pow(2).mean(dim=-1, keepdim=True).sqrt()
