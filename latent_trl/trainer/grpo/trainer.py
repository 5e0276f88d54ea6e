"""GRPO and its variants over latent actions: one rollout, on TRL's buffering, loss and logging."""

from collections.abc import Sized
from typing import Any

import torch
from accelerate import PartialState
from accelerate.utils import gather
from torch import nn
from transformers.utils import logging
from trl import GRPOTrainer

from ...generation.action_law import ActionLaw
from ...models.latent_action_model import LatentActionModel
from ..rollout.adapter import attach_adapter, backbone_of_reference
from ..rollout.advantages import GROUP_ADVANTAGES, normalize_then_sum, weighted_rewards
from ..rollout.anchor import PolicyAnchor
from ..rollout.checks import check_anchor, check_arguments, check_train_dataset, evaluation_samples
from ..rollout.dynamic_sampling import DynamicSampling, equal_groups
from ..rollout.engine_source import EngineSource, check_engine
from ..rollout.generation_config import rollout_config
from ..rollout.importance import difference_figures, importance_ratio
from ..rollout.language_guard import LanguageGuard, least_where
from ..rollout.log import RolloutLog
from ..rollout.prompts import PromptReader, answers, groups_of, stored
from ..rollout.reference import Reference
from ..rollout.rewards import RolloutRewards
from ..rollout.rollout import Rollout, Sample, ended_by_itself
from ..rollout.scoring import CodeScores, score, score_in_parts
from ..rollout.source import GenerateSource, RolloutSource
from ..run.completions_table import CompletionsTable
from ..run.component_training import ComponentTrainingMixin, train_only
from ..run.defaults import settle_rate
from ..run.engines import shards_layers
from ..run.loading import load_named_model, load_processing_class, own_config
from ..run.output_folder import check_writable
from ..run.state import ExactResumeMixin
from .config import LatentActionGRPOConfig

logger = logging.get_logger(__name__)

# How the rate grows for narrower policies.
RATE_EXPONENT = 1.65


class LatentActionGRPOTrainer(ExactResumeMixin, ComponentTrainingMixin, GRPOTrainer):
    """
    TRL's `GRPOTrainer` over codes: the policy of a [`LatentActionModel`] is trained; ratios, KL and entropy are over
    its choices, aligned with the completion's tokens. Data sets, reward functions, logging, evaluation and callbacks
    are TRL's.

    It differs from TRL's GRPO in this: the action is a code, and the token is the likeliest one given it; scores come
    from the states that the rollout computed; the reference is a copy of the policy stack; a greedy evaluation answers
    each prompt once, and its figures are means over rows; samples of a prompt are drawn together (`action_sampling`).

    Args:
        model (`LatentActionModel` or `str`): The model, a folder or a Hub id. Its policy must have been trained.
        reward_funcs, args, train_dataset, eval_dataset, processing_class: As in `GRPOTrainer`; `args` is a
            [`LatentActionGRPOConfig`].
        reward_processing_classes, callbacks, optimizers, quantization_config: As in `GRPOTrainer`.
        peft_config (`PeftConfig`, *optional*): An adapter for the backbone, with `train_backbone=True`.
        anchor_dataset (`Dataset`, *optional*): Conversations on which the policy is held in place, with `anchor_coef`:
            `messages`, or `prompt` and `completion`, with `images` or without.

    Raises:
        ValueError: For `tools`, `rollout_func` and `environment_factory`, which cannot give back codes.
        TypeError: For another trainer's configuration.
    """

    _tag_names = ["trl", "latent-trl", "grpo"]
    _name = "Latent-action GRPO"
    trained_components: tuple[str, ...] = ("policy",)
    config_class = LatentActionGRPOConfig
    large_rate = 1e-5

    def __init__(
        self,
        model: LatentActionModel | str,
        reward_funcs: Any = None,
        args: LatentActionGRPOConfig | None = None,
        train_dataset: Any = None,
        eval_dataset: Any = None,
        processing_class: Any = None,
        reward_processing_classes: Any = None,
        callbacks: list[Any] | None = None,
        optimizers: tuple[Any, Any] = (None, None),
        quantization_config: Any = None,
        peft_config: Any = None,
        tools: Any = None,
        rollout_func: Any = None,
        environment_factory: Any = None,
        anchor_dataset: Any = None,
    ):
        check_arguments(tools=tools, rollout_func=rollout_func, environment_factory=environment_factory)
        args = own_config(args, self.config_class, f"latent-action-{self._tag_names[-1]}")
        check_anchor(args, anchor_dataset)
        check_writable(args)
        if args.use_vllm:
            check_engine(args, PartialState().num_processes)
        model = load_named_model(model, args, quantization_config)
        model.require("codebook", "world_model", "policy")
        if "value_head" in self.trained_components and model.value_head is None:
            model.new_component("value_head")
        adapter, reference_adapter = attach_adapter(model, args, peft_config)
        logger.warning(train_only(model, self.trained_components, adapter))
        settle_rate(args, "learning_rate", self.large_rate, model.policy.decoder_stack.hidden_size, RATE_EXPONENT)
        # The reference is the policy before RL, never a second model.
        beta, args.beta = args.beta, 0.0
        # And TRL's engine would choose among tokens.
        use_vllm, args.use_vllm = args.use_vllm, False
        try:
            super().__init__(
                model,
                reward_funcs=reward_funcs,
                args=args,
                train_dataset=train_dataset,
                eval_dataset=eval_dataset,
                processing_class=processing_class or load_processing_class(model, args.trust_remote_code),
                reward_processing_classes=reward_processing_classes,
                callbacks=callbacks,
                optimizers=optimizers,
            )
        finally:
            args.beta, args.use_vllm = beta, use_vllm
        self.use_vllm = use_vllm
        # TRL's forward for the scores of tokens.
        vars(model).pop("forward", None)
        self.beta = beta
        # A frozen backbone's experts are not balanced.
        self.aux_loss_enabled = self.aux_loss_enabled and args.train_backbone
        self.reference = Reference(model, reference_adapter) if beta != 0.0 or args.anchor_coef else None
        self.ref_model = self.reference.policy if beta != 0.0 else None
        self.anchor = PolicyAnchor.of(self, anchor_dataset) if args.anchor_coef else None
        self.num_generations_eval = evaluation_samples(args, self.num_generations_eval)
        check_train_dataset(self.train_dataset, args)
        self.rollout_law = ActionLaw(args.action_temperature, args.action_top_k, args.action_top_p)
        self.reader = PromptReader.of(self)
        self.encoder, self.bad_rows = self.reader.encoder, self.reader.bad_rows
        sharded = self.is_deepspeed_enabled or self.is_fsdp_enabled
        self.generation_config = rollout_config(args, self.rollout_law, self._tokenizer, self.eos_token_ids, sharded)
        self.rewards = RolloutRewards.of(self)
        self.guard = LanguageGuard.of(self) if args.language_guard else None
        self.engine_source = EngineSource(self) if use_vllm else None
        self.rollout_log = RolloutLog(self._metrics, self._logs, args.log_multimodal)
        if args.log_completions:
            self.add_callback(CompletionsTable(self))

    def get_train_dataloader(self):
        given, self.train_dataset = self.train_dataset, stored(self.train_dataset, "train_dataset")
        try:
            return super().get_train_dataloader()
        finally:
            self.train_dataset = given

    def usable_rows(self, dataset: Any, name: str) -> Any:
        return self.reader.usable(stored(dataset, name))

    def _generate_and_score_completions(self, inputs: list[dict[str, Any]]) -> dict[str, Any]:
        """From the rows of a batch, each as often as it is to be answered, to the scored batch that TRL buffers."""
        samples = self.draw_samples(inputs)
        rewards = self.rewards(samples, self.state)
        training = self.model.training
        if training and self.args.dynamic_sampling_rounds:
            self.rollout_log.figures(training, self._replace_equal_groups(samples, rewards))
        rollout = Rollout.of(
            samples,
            self._tokenizer.pad_token_id,
            self.accelerator.device,
            self.pad_to_multiple_of or 1,
            self.args.offload_context_states,
        )
        if shards_layers(self):
            # Processes would pass prompts and completions in other numbers of calls, as their completions end.
            rollout.prompt_index = torch.arange(len(samples))
        ends = {*self.eos_token_ids, self._tokenizer.pad_token_id}
        ended = ended_by_itself(samples, ends).to(rollout.completion_mask.device)
        if self.mask_truncated_completions:
            rollout.completion_mask *= ended[:, None]
        counted = len(samples) if training else self.rollout_log.counted(self.accelerator.process_index, len(samples))
        rollout.completion_mask[counted:] = 0
        rollout.num_items_in_batch = gather(rollout.completion_mask.sum()).sum()
        self.score_rollout(rollout)
        total = weighted_rewards(rewards, self.reward_weights)
        advantages = self.set_advantages(rollout, rewards, self.guarded(total, rollout, samples))
        self.rollout_log.rollout(self, samples, ended, rewards, total, advantages)
        if training:
            self.watch_rewards(total)
        if not training:
            # TRL gathers a figure for each row, so processes keep as many; and it wants one where none counts too.
            counted = max(int(gather(torch.tensor(counted, device=self.accelerator.device)).max()), 1)
        return rollout.rows(0, counted).to_batch()

    def draw_samples(self, inputs: list[dict[str, Any]]) -> list[Sample]:
        """Answers the rows, processing each prompt once."""
        training = self.model.training
        size = self.num_generations if training else self.num_generations_eval
        rows, copies = groups_of(inputs, self.accelerator.process_index * len(inputs), size)
        self.generation_config.action_do_sample = training or self.args.eval_action_do_sample
        try:
            samples = answers(rows, copies, self.reader, self.rollout_source())
        except FloatingPointError as error:
            raise self._no_code(error) from error
        if training:
            tokens = sum(len(sample.prompt.ids) + len(sample.completion_ids) for sample in samples)
            tokens = torch.tensor(tokens, device=self.accelerator.device)
            self.state.num_input_tokens_seen += gather(tokens).sum().item()
        return samples

    @property
    def law(self) -> ActionLaw:
        """That codes are chosen by, and scored under: of a greedy evaluation the policy's own."""
        sampled = self.model.training or self.args.eval_action_do_sample
        return self.rollout_law if sampled else ActionLaw()

    def rollout_source(self) -> RolloutSource:
        """What answers prompts: the policy as it is now."""
        return GenerateSource.of(self) if self.engine_source is None else self.engine_source

    def _replace_equal_groups(self, samples: list[Sample], rewards: torch.Tensor) -> dict[str, Any]:
        def draw(rows):
            fresh = self.draw_samples(rows)
            return fresh, self.rewards(fresh, self.state)

        return DynamicSampling.of(self).replace(samples, rewards, draw, self.args.seed + 1_000_003 * (self._step + 1))

    @property
    def needs_old_scores(self) -> bool:
        """Whether an update may read a rollout that an earlier policy made."""
        corrected = self.use_vllm and self.vllm_importance_sampling_correction
        steps = self.args.steps_per_generation * self.num_iterations
        return corrected or self.args.gradient_accumulation_steps % steps != 0

    def score_rollout(self, rollout: Rollout) -> None:
        """Scores the rollout under the policy that made it, and under the reference, where they are needed."""
        training = self.model.training
        rows = self.args.per_device_train_batch_size if training else self.args.per_device_eval_batch_size
        shared = (rollout, self.law, self.encoder, rows)
        with self.accelerator.autocast():
            if self.needs_old_scores:
                scores = score_in_parts(self.model, *shared)
                rollout.old_per_token_logps, rollout.old_values = scores.log_probs, scores.values
                if self.use_vllm and self.vllm_importance_sampling_correction:
                    self._correct_for_engine(rollout)
            if self.beta != 0.0:
                model = self._latent_model()
                with backbone_of_reference(model, self.args.train_backbone, self.reference.adapter):
                    scores = score_in_parts(model, *shared, reference=self.reference.policy)
                rollout.ref_per_token_logps = scores.log_probs

    def _correct_for_engine(self, rollout: Rollout) -> None:
        """Gives a rollout of an engine its importance weights."""
        args, old = self.args, rollout.old_per_token_logps
        sampled, mask = rollout.sampling_per_token_logps, rollout.completion_mask
        bounds = (args.vllm_importance_sampling_clip_min, args.vllm_importance_sampling_clip_max)
        ratio = importance_ratio(old, sampled, mask, args.vllm_importance_sampling_mode, *bounds)
        rollout.importance_sampling_ratio = ratio
        figures = difference_figures(old, sampled, ratio, mask)
        self.rollout_log.figures(self.model.training, figures)
        if figures:
            self.health.watch_engine(figures["sampling/log_prob_difference"][0], self.state.global_step)

    def guarded(self, total: torch.Tensor, rollout: Rollout, samples: list[Sample]) -> torch.Tensor:
        """The rewards `[N]` of all processes that advantages are made of: answers in broken language have the least."""
        if self.guard is None or not self.model.training:
            return total
        with self.accelerator.autocast():
            surprises = gather(self.guard.surprises(self.model, rollout, samples))
        broken = self.guard.broken(surprises)
        figures = {"surprise": surprises.mean().item(), "broken": broken.float().mean().item()}
        self.rollout_log.figures(True, {f"language/{name}": (value, len(total)) for name, value in figures.items()})
        return least_where(total, broken)

    def set_advantages(self, rollout: Rollout, rewards: torch.Tensor, total: torch.Tensor) -> torch.Tensor:
        """
        Gives the rollout its advantages.

        Args:
            rollout (`Rollout`): Of this process, scored.
            rewards (`torch.Tensor`): `[N, functions]` over all processes.
            total (`torch.Tensor`): `[N]`, the weighted rewards.

        Returns:
            `[N]`, one a completion of all processes, for the logs.
        """
        size = self.num_generations if self.model.training else self.num_generations_eval
        if self.multi_objective_aggregation == "normalize_then_sum":
            advantages = normalize_then_sum(rewards, self.reward_weights, size)
        else:
            advantages = GROUP_ADVANTAGES[self.args.advantage_estimator](total, size, self.scale_rewards)
        # A completion that no function could score teaches nothing.
        advantages = advantages.nan_to_num(0.0)
        rollout.advantages = self.local(advantages, len(rollout.action_ids))
        return advantages

    def local(self, values: torch.Tensor, rows: int) -> torch.Tensor:
        """This process's rows of `values` `[N]`."""
        start = self.accelerator.process_index * rows
        return values[start : start + rows]

    def watch_rewards(self, total: torch.Tensor) -> None:
        """Names a reward that teaches nothing."""
        equal = bool(equal_groups(total, self.num_generations).all())
        self.health.count_rewards(total, equal, "each group", self.state.global_step)

    def _compute_loss(self, model: nn.Module, inputs: dict[str, Any]) -> torch.Tensor:
        rollout = Rollout.from_batch(inputs)
        loss = self.rollout_loss(self.score(model, rollout), rollout, inputs)
        if not self.model.training:
            self.rollout_log.evaluated(self, loss, rollout.completion_mask)
        elif self.anchor is not None:
            loss = loss + self.anchor.loss(self, model, self._step)
        self._check_loss(loss, inputs)
        return loss

    def score(self, model: nn.Module, rollout: Rollout) -> CodeScores:
        """The scores that an update is made from."""
        return score(model, rollout, self.law, self.encoder, aux_loss=self.aux_loss_enabled)

    def rollout_loss(self, scores: CodeScores, rollout: Rollout, inputs: dict[str, Any]) -> torch.Tensor:
        """TRL's loss of a micro-batch, from the scores of its codes."""
        return super()._compute_loss(scores, inputs)

    def _get_per_token_logps_and_entropies(self, model: CodeScores, *args: Any, **kwargs: Any):
        # TRL's loss asks for the scores of what it was given for a model: the scores themselves.
        return model.log_probs, model.entropies, model.aux_loss

    def run_state(self) -> dict[str, Any]:
        guard = {} if self.guard is None else {"language_guard": self.guard.seen}
        return {**super().run_state(), **guard}

    def load_run_state(self, state: dict[str, Any]) -> None:
        super().load_run_state(state)
        if self.guard is not None:
            # Of a checkpoint without the guard there are none: the fence is set by the answers that follow.
            self.guard.seen = state.get("language_guard", [])

    def _load_best_model(self) -> None:
        super()._load_best_model()
        if self.engine_source is not None:
            # Other weights at the same step.
            self.engine_source.policy_state = ()

    def evaluation_loop(self, dataloader: Any, *args: Any, metric_key_prefix: str = "eval", **kwargs: Any):
        rows = len(dataloader.dataset) * self.num_generations_eval if isinstance(dataloader.dataset, Sized) else None
        self.rollout_log.start_evaluation(rows)
        output = super().evaluation_loop(dataloader, *args, metric_key_prefix=metric_key_prefix, **kwargs)
        # Trainer's is a mean over batches.
        output.metrics.update(self.rollout_log.end_evaluation(metric_key_prefix))
        return output

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        if "loss" in logs:
            self.health.watch_exploration(self._metrics["train"], self.state.global_step)
        super().log(logs, start_time)

    def train(self, *args: Any, **kwargs: Any):
        self.reader.preflight(self.args.seed)
        if self.anchor is not None:
            self.anchor.preflight()
        self._latent_model().config.stage = "rl"
        return super().train(*args, **kwargs)
