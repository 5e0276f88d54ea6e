"""GRPO and its variants over latent actions, on TRL's trainer."""

import copy
import os
from typing import Any

import torch
from transformers import GenerationConfig
from transformers.utils import logging
from trl import GRPOTrainer

from ..models.action_law import ActionLaw
from ..models.latent_action_model import LatentActionModel
from .code_scoring import CodeScorer, CodeScores, Rollout
from .component_training import ComponentTrainingMixin, check_finite, train_only
from .latent_action_grpo_config import LatentActionGRPOConfig
from .latent_action_space_trainer import load_processing_class

logger = logging.get_logger(__name__)

VISION_KEYS = (
    "pixel_values",
    "image_grid_thw",
    "pixel_attention_mask",
    "spatial_shapes",
    "image_sizes",
    "image_position_ids",
    "token_type_ids",
    "mm_token_type_ids",
    "num_images",
    "num_tiles",
)


class LatentActionGRPOTrainer(ComponentTrainingMixin, GRPOTrainer):
    """
    TRL's `GRPOTrainer` over codes: the policy of a [`LatentActionModel`] is trained; ratios, KL and entropy are over
    its choices, aligned with the completion's tokens. Data sets, reward functions, logging, evaluation and callbacks
    are TRL's.

    Args:
        model (`LatentActionModel` or `str`): The model, a folder or a Hub id. Its policy must have been trained.
        reward_funcs: As in `GRPOTrainer`.
        args (`LatentActionGRPOConfig`, *optional*): The configuration.
        peft_config (`PeftConfig`, *optional*): An adapter for the backbone, with `train_backbone=True`.
        kwargs: Data sets, processing classes, callbacks and optimizers of `GRPOTrainer`.

    Raises:
        ValueError: For what cannot give back codes (tools, environments, own rollout functions).
    """

    _tag_names = ["trl", "latent-trl", "grpo"]
    _name = "Latent-action GRPO"
    trained_components: tuple[str, ...] = ("policy",)

    def __init__(
        self,
        model: LatentActionModel | str,
        reward_funcs: Any = None,
        args: LatentActionGRPOConfig | None = None,
        processing_class: Any = None,
        peft_config: Any = None,
        **kwargs,
    ):
        for name in ("tools", "rollout_func", "environment_factory", "quantization_config"):
            if kwargs.get(name):
                raise ValueError(
                    f"`{name}` cannot be used over latent actions. "
                    + (
                        "Load the model with `LatentActionModel.from_pretrained(..., quantization_config=...)`."
                        if name == "quantization_config"
                        else "Use reward functions, which see every column of the data set."
                    )
                )
        args = args or LatentActionGRPOConfig("latent-action-grpo")
        model = load_model(model)
        model.require("codebook", "world_model", *self.trained_components)
        self._attach_adapter(model, args, peft_config)
        adapter = [n for n, p in model.backbone.named_parameters() if p.requires_grad] if args.train_backbone else []
        line = train_only(model, self.trained_components, adapter)
        beta, args.beta = args.beta, 0.0
        try:
            super().__init__(
                model,
                reward_funcs=reward_funcs,
                args=args,
                processing_class=processing_class or load_processing_class(model),
                **kwargs,
            )
        finally:
            args.beta = beta
        logger.warning(line)
        self.beta = beta
        # The reference is the policy before RL, never a second model.
        self.ref_model = None
        if beta != 0.0:
            self.ref_model = copy.deepcopy(self._latent_model().policy).requires_grad_(False).eval()
        self.law = ActionLaw(args.action_temperature, args.action_top_k, args.action_top_p)
        self.generation_config = self._rollout_config()
        self._rollout: Rollout | None = None
        # What the trained policy said of the codes last scored.
        self._scored: CodeScores | None = None

    def _latent_model(self) -> LatentActionModel:
        return self.accelerator.unwrap_model(self.model)

    def _attach_adapter(self, model: LatentActionModel, args: LatentActionGRPOConfig, peft_config: Any) -> None:
        if peft_config is not None and not args.train_backbone:
            raise ValueError("`peft_config` adapts the backbone, which is frozen. Set `train_backbone=True`.")
        if peft_config is not None:
            model.add_adapter(peft_config)
        if args.train_backbone:
            if model.peft_backbone is None:
                raise ValueError("`train_backbone=True` needs an adapter: pass `peft_config`.")
            for name, parameter in model.backbone.named_parameters():
                parameter.requires_grad_("lora_" in name)

    def _rollout_config(self) -> GenerationConfig:
        """TRL's generation configuration, with the choice moved from tokens to codes."""
        config = copy.deepcopy(self.generation_config)
        config.do_sample = False
        config.temperature = config.top_p = config.top_k = config.min_p = None
        config.action_temperature = self.law.temperature
        config.action_top_k = self.law.top_k
        config.action_top_p = self.law.top_p
        return config

    def _generate_single_turn(self, prompt_ids, images, multimodal_fields, num_generations, *args, **kwargs):
        training = self.model.training
        self.generation_config.action_do_sample = training or self.args.eval_action_do_sample
        with self._latent_model().recording() as records, self.accelerator.autocast():
            completion_ids, _ = super()._generate_single_turn(
                prompt_ids, images, multimodal_fields, num_generations, *args, **kwargs
            )
        length = max(len(ids) for ids in completion_ids)
        multiple = self.pad_to_multiple_of or 1
        length = -(-length // multiple) * multiple
        self._rollout = Rollout.of(records[-1], length, keep_states=self.args.reuse_context_states)
        if self.args.offload_context_states and self._rollout.context_states is not None:
            self._rollout.context_states = self._rollout.context_states.cpu()
        codes, log_probs = self._rollout.action_ids.tolist(), self._rollout.action_log_probs.tolist()
        self._log_completion_extra("action_ids", [c[: len(ids)] for c, ids in zip(codes, completion_ids)])
        self._log_usage(codes, completion_ids)
        return completion_ids, [p[: len(ids)] for p, ids in zip(log_probs, completion_ids)]

    def _log_usage(self, codes: list[list[int]], completion_ids: list[list[int]]) -> None:
        """How many codes the rollouts chose, over all processes."""
        counts = torch.zeros(self._latent_model().config.num_codes, device=self.accelerator.device)
        for row, ids in zip(codes, completion_ids):
            counts += torch.bincount(torch.tensor(row[: len(ids)]), minlength=len(counts)).to(counts)
        counts = self.accelerator.reduce(counts, "sum")
        share = counts / counts.sum()
        mode = "train" if self.model.training else "eval"
        self._metrics[mode]["codebook/used"].append((counts > 0).sum().item())
        self._metrics[mode]["codebook/perplexity"].append(torch.special.entr(share).sum().exp().item())

    def _calculate_rewards(self, inputs, prompts, completions, completion_ids_list):
        rewards = super()._calculate_rewards(inputs, prompts, completions, completion_ids_list)
        weighted = (rewards * self.reward_weights.to(rewards.device)).nansum(dim=1)
        self._rewards = weighted.masked_fill(rewards.isnan().all(dim=1), torch.nan)
        return rewards

    def _local_rewards(self, rows: int) -> torch.Tensor:
        """This process's rows of the weighted rewards; NaN where no function could score."""
        start = self.accelerator.process_index * rows
        return self._rewards[start : start + rows]

    def _finish_rollout(self, output: dict[str, Any]) -> None:
        """Adds what was recorded to a scored rollout batch, while its states can still be scored."""
        output.update(self._rollout.tensors())

    def _score_rows(self, model, batch: dict[str, Any], **options):
        """Log-probabilities, entropies and auxiliary loss of a rollout batch under `model`."""
        return self._get_per_token_logps_and_entropies(
            model,
            torch.cat([batch["prompt_ids"], batch["completion_ids"]], dim=1),
            torch.cat([batch["prompt_mask"], batch["completion_mask"]], dim=1),
            batch["completion_ids"].shape[1],
            **{name: batch.get(name) for name in VISION_KEYS},
            **options,
        )

    def _generate_and_score_completions(self, inputs):
        self._scored = None
        output = super()._generate_and_score_completions(inputs)
        self._finish_rollout(output)
        self._rollout = None
        if self.args.reuse_context_states:
            # Nothing reads pixels again.
            output = {k: v for k, v in output.items() if k not in VISION_KEYS}
        return output

    def _get_per_token_logps_and_entropies(self, model, *args, **kwargs):
        scorer = CodeScorer(model, self._rollout, self.law, encode_with=self._latent_model())
        result = super()._get_per_token_logps_and_entropies(scorer, *args, **kwargs)
        if model is not self.ref_model:
            values = torch.cat(scorer.state_values) if scorer.state_values else None
            self._scored = CodeScores(result[0], result[1], values)
        return result

    def _compute_loss(self, model, inputs):
        self._rollout = Rollout.from_tensors(inputs)
        self._scored = None
        try:
            loss = super()._compute_loss(model, inputs)
        finally:
            self._rollout = None
        check_finite(loss, f"at step {self.state.global_step}", self.args.output_dir)
        return loss

    def _save(self, output_dir: str | None = None, state_dict=None):
        model = self._latent_model()
        model.config.stage = "rl"
        super()._save(output_dir, state_dict)


def load_model(model: LatentActionModel | str | os.PathLike) -> LatentActionModel:
    """A latent action model, from itself, a folder or a Hub id."""
    if isinstance(model, (str, os.PathLike)):
        return LatentActionModel.from_pretrained(model)
    if not isinstance(model, LatentActionModel):
        raise TypeError(f"`model` must be a LatentActionModel, a folder or a Hub id, got {type(model).__name__}.")
    return model
