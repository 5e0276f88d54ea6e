"""A frozen backbone with a codebook of plans and the chooser among them."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from torch import nn
from transformers import PreTrainedModel

from ..checkpoint.download import cached_commit
from ..data.prompts import EncodedPrompt, PromptEncoder
from ..generation.exclusive import exclusive
from ..models.backbone import Backbone
from .adapters import PlanAdapters
from .base_adapter import BaseAdapter
from .checkpoint import PlanCheckpointMixin
from .chooser import PlanChooser, chosen_layers, prompt_states
from .configuration import PlanConfig
from .prompt_cache import GreedyAnswers, PromptCache, decode_greedily, next_logits
from .targets import plan_targets


class PlanModel(PlanCheckpointMixin, nn.Module):
    """
    A frozen causal or image-text-to-text model, K plans, and the chooser among them. A plan is held for a whole answer
    and is active at every position of the row, the prompt's included, as an adapter of PEFT or of an engine with
    multi-LoRA is. Below `depth` the states do not depend on it.

    Args:
        backbone (`PreTrainedModel` or `PeftModel`): It is frozen, and stays in evaluation mode. A `PeftModel` is a
            backbone with a LoRA, beside which plans are learned; it is saved with them.
        config (`PlanConfig`, *optional*): K, depth, rank. It is copied.

    Raises:
        ValueError: For a `depth` that leaves no layer, `target_modules` that name none, or a backbone that carries
            another adapter than one LoRA of a `PeftModel`.

    Example:

    ```python
    model = PlanModel(backbone, PlanConfig(num_plans=16))
    ids = model.generate(**inputs, plan_ids=3, max_new_tokens=12)
    ```
    """

    def __init__(self, backbone: PreTrainedModel | PeftModel, config: PlanConfig | None = None):
        super().__init__()
        config = replace(config or PlanConfig())
        self.base_adapter = BaseAdapter.of(backbone)
        backbone = backbone if self.base_adapter is None else self.base_adapter.backbone
        self.backbone = backbone.requires_grad_(False).eval()
        self.view = Backbone(backbone)
        if config.depth is None:
            config.depth = self.view.text_config.num_hidden_layers // 2
        targets = plan_targets(self.view, config.depth, config.target_modules)
        config.base_model_name_or_path = backbone.config._name_or_path or config.base_model_name_or_path
        config.base_model_revision = config.base_model_revision or cached_commit(config.base_model_name_or_path)
        # A quantised backbone has no fingerprint of its own.
        config.backbone_fingerprint = self.view.fingerprint() or config.backbone_fingerprint
        config.vision_token_ids = self.view.vision_token_ids
        config.has_adapter = self.base_adapter is not None
        self.plan_config = config
        self.plans = PlanAdapters(self.view, targets, config.num_plans, config.rank, config.init_std, config.seed)
        self.chooser_layers = chosen_layers(self.view, config.chooser_layers)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(config.seed)
            width = len(self.chooser_layers) * self.view.hidden_size
            self.chooser = PlanChooser(width, config.num_plans, config.chooser_size).to(backbone.device)
        self.chooser_is_trained = False
        # What is known of the runs that trained it: `latent_trl.hub.facts.TrainingReport` as plain data.
        self.training_report: dict[str, Any] = {}
        # Where a processing class was saved beside the plans.
        self.processor_folder: Path | None = None

    @property
    def device(self) -> torch.device:
        return self.backbone.device

    def train(self, mode: bool = True) -> "PlanModel":
        super().train(mode)
        self.backbone.eval()
        return self

    def forward(
        self,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor,
        completion_mask: torch.Tensor,
        plan_ids: torch.Tensor,
        **inputs: Any,
    ) -> torch.Tensor:
        """
        Log-probabilities of completions under plans, with a gradient to the plans.

        Args:
            input_ids (`torch.Tensor`), attention_mask (`torch.Tensor`), completion_mask (`torch.Tensor`): `[N, L]`.
            plan_ids (`torch.Tensor`): `[N]`.
            inputs: Further inputs of the backbone, such as `pixel_values`.

        Returns:
            `[N, L-1]` in float32: entry i is that of token i+1, and 0 outside the completion.
        """
        with self.plans.active(plan_ids):
            states = self.view.encode(input_ids, attention_mask, completion_mask, **inputs).states
        mask = completion_mask[:, 1:].bool()
        log_probs = next_logits(self.view, states[:, :-1][mask][None])[0].log_softmax(dim=-1)
        taken = log_probs.gather(-1, input_ids[:, 1:][mask][:, None])[:, 0]
        return torch.zeros(mask.shape, device=taken.device).masked_scatter(mask, taken)

    @torch.no_grad()
    def log_likelihoods(
        self,
        encoder: PromptEncoder,
        prompts: list[EncodedPrompt],
        answers: list[list[list[int]]],
        batch_size: int = 512,
    ) -> list[torch.Tensor]:
        """
        Log-likelihoods of some answers to each prompt under each plan. A prompt is read once under each plan.

        Args:
            encoder (`PromptEncoder`): Makes batches of prompts.
            prompts (`list[EncodedPrompt]`): B of them.
            answers (`list[list[list[int]]]`): Tokens of M answers to each; M may differ.
            batch_size (`int`, defaults to `512`): Rows of one pass.

        Returns:
            `list[torch.Tensor]`: `[M, K]` of each prompt, in nats, float32, on the CPU.
        """
        plans, found = self.plan_config.num_plans, []
        at_once = max(1, batch_size // plans)
        for start in range(0, len(prompts), at_once):
            some, own = prompts[start : start + at_once], answers[start : start + at_once]
            plan_ids = torch.arange(plans).repeat(len(some))
            cache = self._encode(encoder, [prompt for prompt in some for _ in range(plans)], plan_ids)
            scores = [torch.zeros(len(of_prompt), plans) for of_prompt in own]
            places = [(b, m, k) for b, of_prompt in enumerate(own) for m in range(len(of_prompt)) for k in range(plans)]
            # Answers of like length stand together, so that little is padding.
            places.sort(key=lambda place: len(own[place[0]][place[1]]))
            for first in range(0, len(places), batch_size):
                part = places[first : first + batch_size]
                rows = torch.tensor([b * plans + k for b, _, k in part])
                values = self._score(cache.rows(rows), plan_ids[rows], [own[b][m] for b, m, _ in part])
                for (b, m, k), value in zip(part, values.tolist(), strict=True):
                    scores[b][m, k] = value
            found += scores
        return found

    def _encode(self, encoder: PromptEncoder, prompts: list[EncodedPrompt], plan_ids: torch.Tensor) -> PromptCache:
        inputs = {name: value.to(self.device) for name, value in encoder.collate(prompts).items()}
        with self.plans.active(plan_ids):
            return PromptCache.encode(self.view, inputs)

    def _score(self, prompts: PromptCache, plan_ids: torch.Tensor, answers: list[list[int]]) -> torch.Tensor:
        longest = max(map(len, answers))
        ids = torch.tensor([[*answer, *[0] * (longest - len(answer))] for answer in answers], device=self.device)
        mask = torch.tensor([[1] * len(a) + [0] * (longest - len(a)) for a in answers], device=self.device).bool()
        states = prompts.states
        if longest > 1:
            with self.plans.active(plan_ids):
                states = torch.cat([states, prompts.extend(ids[:, :-1])], dim=1)
        log_probs = next_logits(self.view, states).log_softmax(dim=-1)
        return (log_probs.gather(-1, ids[..., None])[..., 0] * mask).nan_to_num(0.0, neginf=-torch.inf).sum(dim=1)

    @torch.no_grad()
    def answers(
        self,
        encoder: PromptEncoder,
        prompts: list[EncodedPrompt],
        plan_ids: list[int] | None,
        max_new_tokens: int,
        ends: list[int],
        batch_size: int = 256,
    ) -> GreedyAnswers:
        """
        The greedy answer to each prompt under its plan.

        Args:
            encoder (`PromptEncoder`): Makes batches of prompts.
            prompts (`list[EncodedPrompt]`): B of them.
            plan_ids (`list[int]`, *optional*): One a prompt; `None` for the backbone's own answers.
            max_new_tokens (`int`): Longest answer.
            ends (`list[int]`): Tokens that end an answer.
            batch_size (`int`, defaults to `256`): Answers decoded at once.
        """
        whole = GreedyAnswers([], [], [])
        for start in range(0, len(prompts), batch_size):
            places = slice(start, start + batch_size)
            inputs = {name: value.to(self.device) for name, value in encoder.collate(prompts[places]).items()}
            own = None if plan_ids is None else torch.tensor(plan_ids[places])
            part = self._decode(inputs, own, max_new_tokens, ends)
            whole.token_ids += part.token_ids
            whole.ended += part.ended
        return whole

    def _decode(
        self, inputs: dict[str, Any], plan_ids: torch.Tensor | None, max_new_tokens: int, ends: list[int]
    ) -> GreedyAnswers:
        if plan_ids is None:
            return decode_greedily(PromptCache.encode(self.view, inputs), max_new_tokens, ends)
        with self.plans.active(plan_ids):
            return decode_greedily(PromptCache.encode(self.view, inputs), max_new_tokens, ends)

    @torch.no_grad()
    def plan_logits(self, **inputs: Any) -> torch.Tensor:
        """What the chooser gives `[B, K]` for prompts, given as in [`~PlanModel.generate`]."""
        return self.chooser(prompt_states(self.view, self.chooser_layers, inputs), inputs["attention_mask"])

    @torch.no_grad()
    def generate(
        self,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        plan_ids: torch.Tensor | list[int] | int | None = None,
        max_new_tokens: int = 32,
        eos_token_id: int | list[int] | None = None,
        **inputs: Any,
    ) -> torch.Tensor:
        """
        Greedy answers under plans.

        Args:
            input_ids (`torch.Tensor`), attention_mask (`torch.Tensor`, *optional*): `[B, P]`, padded on the left.
            plan_ids (`torch.Tensor`, `list[int]` or `int`, *optional*): A plan for all rows, or one a row. By default
                the one that the chooser finds the best.
            max_new_tokens (`int`, defaults to `32`): Longest answer.
            eos_token_id (`int` or `list[int]`, *optional*): What ends an answer; the backbone's by default.
            inputs: Further inputs of the backbone, such as `pixel_values`.

        Returns:
            `[B, P+C]` ids; answers that end sooner are filled up with the backbone's padding.

        Raises:
            ValueError: For plans that there are not, or none where no chooser has been trained; for prompts that are
                padded on the right; for more tokens than the backbone has positions for.
        """
        attention_mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask
        if not attention_mask[:, -1].all():
            raise ValueError("`attention_mask` has padding at the end of a prompt; pad on the left.")
        inputs = {"input_ids": input_ids, "attention_mask": attention_mask, **inputs}
        own = self.backbone.generation_config.eos_token_id if eos_token_id is None else eos_token_id
        ends = [] if own is None else [own] if isinstance(own, int) else list(own)
        with exclusive(self.backbone):
            plan_ids = self._settled_plans(plan_ids, inputs)
            answers = self._decode(inputs, plan_ids, max_new_tokens, ends).token_ids
        pad = self.backbone.generation_config.pad_token_id
        pad = (ends or [0])[0] if pad is None else pad
        longest = max(map(len, answers))
        filled = [[*answer, *[pad] * (longest - len(answer))] for answer in answers]
        return torch.cat([input_ids, torch.tensor(filled, device=input_ids.device)], dim=1)

    def _settled_plans(self, plan_ids: Any, inputs: dict[str, Any]) -> torch.Tensor:
        rows = len(inputs["input_ids"])
        if plan_ids is None:
            if not self.chooser_is_trained:
                raise ValueError(
                    "`plan_ids` must be given: no chooser has been trained. Train one with `PlanBanditTrainer`."
                )
            return self.plan_logits(**inputs).argmax(dim=-1)
        plan_ids = torch.as_tensor(plan_ids, dtype=torch.long)
        plan_ids = plan_ids.expand(rows) if plan_ids.ndim == 0 else plan_ids
        if plan_ids.shape != (rows,) or plan_ids.min() < 0 or plan_ids.max() >= self.plan_config.num_plans:
            raise ValueError(
                f"`plan_ids` must be in 0 ... {self.plan_config.num_plans - 1}, one number or one for each of {rows} "
                f"rows; got {plan_ids.tolist()}."
            )
        return plan_ids
