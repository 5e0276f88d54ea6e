"""Scores from a trained reward model."""

from typing import Any

import torch
from accelerate import PartialState
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from .conversation import completion_text, prompt_text, text_messages


class RewardModelReward:
    r"""
    Score of the whole conversation by a transformers sequence classifier.

    The prompt and the completion are read as text, with the classifier's own chat template where it has one; images are
    left out. Conversations that are too long lose their beginning, never the answer.

    Args:
        model (`str` or `PreTrainedModel`):
            The classifier, or the folder or Hub id of one.
        tokenizer (`PreTrainedTokenizerBase`, *optional*):
            Its tokenizer. Loaded with the model when that is a name; needed when it is a model.
        label (`int`, *optional*, defaults to `0`):
            Which of the classifier's outputs is the score.
        activation (`str`, *optional*, defaults to `"none"`):
            `"none"` for the logit, `"sigmoid"`, or `"softmax"` for the probability of `label`.
        batch_size (`int`, *optional*, defaults to `16`):
            Conversations in one forward pass.
        max_length (`int`, *optional*, defaults to `2048`):
            Longest conversation in tokens. `None` for no limit.
        device (`str` or `torch.device`, *optional*):
            Where it runs. Defaults to the process's device, as accelerate has it at the first call.
        name (`str`, *optional*, defaults to `"reward_model"`):
            Name of the reward in the metrics.
        add_special_tokens (`bool`, *optional*, defaults to `True`):
            Whether the tokenizer adds its special tokens to a text that no chat template made.
        chat_template_kwargs (`dict`, *optional*):
            Further arguments of the chat template.

    Example:

    ```python
    reward = RewardModelReward("Skywork/Skywork-Reward-V2-Qwen3-0.6B", name="skywork")
    ```
    """

    def __init__(
        self,
        model: Any,
        tokenizer: Any = None,
        label: int = 0,
        activation: str = "none",
        batch_size: int = 16,
        max_length: int | None = 2048,
        device: str | torch.device | None = None,
        name: str = "reward_model",
        add_special_tokens: bool = True,
        chat_template_kwargs: dict[str, Any] | None = None,
    ):
        if activation not in ("none", "sigmoid", "softmax"):
            raise ValueError(f"`activation` must be 'none', 'sigmoid' or 'softmax'; got {activation!r}.")
        if isinstance(model, str):
            tokenizer = tokenizer or AutoTokenizer.from_pretrained(model)
            model = AutoModelForSequenceClassification.from_pretrained(model)
        if tokenizer is None:
            raise ValueError("`tokenizer` is needed when `model` is not a name; got None.")
        if not 0 <= label < model.config.num_labels:
            raise ValueError(
                f"`label` must be between 0 and {model.config.num_labels - 1} for this model; got {label}."
            )
        self.__name__ = name
        self.model = model.eval()
        self.tokenizer = tokenizer
        self.label = label
        self.activation = activation
        self.batch_size = batch_size
        self.max_length = max_length
        self.device = device
        self.add_special_tokens = add_special_tokens
        self.chat_template_kwargs = chat_template_kwargs or {}

    @torch.inference_mode()
    def __call__(self, prompts: list, completions: list, **columns) -> list[float]:
        """
        Args:
            prompts (`list`): Prompts, plain or conversational.
            completions (`list`): Completions, plain or conversational.
            **columns: Not used.

        Returns:
            `list[float]`: Scores.
        """
        device = self.device or PartialState().device
        if next(self.model.parameters()).device != torch.device(device):
            self.model.to(device)  # which a quantized model refuses
        ids = [self._token_ids(p, c) for p, c in zip(prompts, completions, strict=True)]
        rewards: list[float] = []
        for start in range(0, len(ids), self.batch_size):
            batch = {"input_ids": ids[start : start + self.batch_size]}
            inputs = self.tokenizer.pad(batch, padding_side="right", return_tensors="pt").to(device)
            rewards += self._scores(self.model(**inputs).logits.float()).tolist()
        return rewards

    def _token_ids(self, prompt: str | list[dict], completion: str | list[dict]) -> list[int]:
        if isinstance(prompt, list) and isinstance(completion, list) and self.tokenizer.chat_template:
            messages = text_messages(prompt + completion)
            text = self.tokenizer.apply_chat_template(messages, tokenize=False, **self.chat_template_kwargs)
            ids = self.tokenizer(text, add_special_tokens=False)["input_ids"]
        else:
            separator = "" if isinstance(prompt, str) else "\n\nassistant: "
            text = prompt_text(prompt) + separator + completion_text(completion)
            ids = self.tokenizer(text, add_special_tokens=self.add_special_tokens)["input_ids"]
        return ids if self.max_length is None else ids[-self.max_length :]

    def _scores(self, logits: torch.Tensor) -> torch.Tensor:
        if self.activation == "sigmoid":
            logits = logits.sigmoid()
        elif self.activation == "softmax":
            logits = logits.softmax(dim=-1)
        return logits[:, self.label]
