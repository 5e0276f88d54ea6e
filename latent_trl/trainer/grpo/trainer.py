"""GRPO and its variants over latent actions, on TRL's trainer."""

import copy
import inspect
from collections.abc import Sized
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from accelerate.utils import gather
from torch import nn
from transformers import GenerationConfig
from transformers.utils import logging
from trl import GRPOTrainer
from trl.trainer.utils import use_adapter

from ...data.collator import LatentActionDataCollator
from ...generation.action_law import ActionLaw
from ...models.latent_action_model import LatentActionModel
from ...rewards.calling import RewardErrors, check_model_rewards, checked_reward
from ...rewards.shaping import SoftOverlongPunishment
from ..rollout.anchor import PolicyAnchor
from ..rollout.dynamic_sampling import (
    Sample,
    all_prompts,
    draw_prompts,
    equal_groups,
    fresh_rows_needed,
    replacements_of,
)
from ..rollout.repeated_prompts import copies_of_each
from ..rollout.scoring import CodeScorer, CodeScores, Rollout
from ..run.completions_table import CompletionsTable, prompt_text
from ..run.component_training import ComponentTrainingMixin, train_only
from ..run.health import origin, what_is_kept
from ..run.loading import check_columns, load_model, load_processing_class
from ..run.output_folder import check_writable
from ..run.state import ExactResumeMixin
from .config import LatentActionGRPOConfig

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


class LatentActionGRPOTrainer(ExactResumeMixin, ComponentTrainingMixin, GRPOTrainer):
    """
    TRL's `GRPOTrainer` over codes: the policy of a [`LatentActionModel`] is trained; ratios, KL and entropy are over
    its choices, aligned with the completion's tokens. Data sets, reward functions, logging, evaluation and callbacks
    are TRL's.

    Args:
        model (`LatentActionModel` or `str`): The model, a folder or a Hub id. Its policy must have been trained.
        reward_funcs: As in `GRPOTrainer`.
        args (`LatentActionGRPOConfig`, *optional*): The configuration.
        peft_config (`PeftConfig`, *optional*): An adapter for the backbone, with `train_backbone=True`.
        anchor_dataset (`Dataset`, *optional*): Conversations on which the policy is held in place, with `anchor_coef`:
            `messages`, or `prompt` and `completion`, with `images` or without.
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
        anchor_dataset: Any = None,
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
        check_anchor(args, anchor_dataset)
        check_writable(args)
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
        self.anchor: PolicyAnchor | None = None
        if beta != 0.0 or args.anchor_coef:
            reference = copy.deepcopy(self._latent_model().policy).requires_grad_(False).eval()
            self.ref_model = reference if beta != 0.0 else None
            if args.anchor_coef:
                self.anchor = self._anchor(reference, anchor_dataset)
        self.law = ActionLaw(args.action_temperature, args.action_top_k, args.action_top_p)
        self.generation_config = self._rollout_config()
        self._check_dataset()
        self._add_reward_checks()
        self._rollout: Rollout | None = None
        # How often each prompt stands in the batch last tokenized.
        self._copies = 1
        # The samples of the batch last scored, and those that take the place of a new rollout.
        self._samples: list[Sample] = []
        self._replayed: list[Sample] | None = None
        # What the trained policy said of the codes last scored.
        self._scored: CodeScores | None = None
        if args.log_completions:
            self.add_callback(CompletionsTable(self))

    def _latent_model(self) -> LatentActionModel:
        return self.accelerator.unwrap_model(self.model)

    def _anchor(self, reference: nn.Module, dataset: Any) -> PolicyAnchor:
        ids = self._latent_model().config.vision_token_ids
        collate = LatentActionDataCollator(
            self.processing_class,
            max_length=self.args.anchor_max_length,
            image_root=self.args.anchor_image_root,
            vision_token_ids=ids,
        )
        return PolicyAnchor(reference, dataset, collate, self.args.anchor_batch_size, self.args.seed)

    def _attach_adapter(self, model: LatentActionModel, args: LatentActionGRPOConfig, peft_config: Any) -> None:
        # The adapter that the reference is scored with; `None` is the backbone without one.
        self._reference_adapter: str | None = None
        if peft_config is not None and not args.train_backbone:
            raise ValueError("`peft_config` adapts the backbone, which is frozen. Set `train_backbone=True`.")
        if not args.train_backbone:
            return
        if peft_config is not None:
            model.add_adapter(peft_config)
        elif model.peft_backbone is None:
            raise ValueError("`train_backbone=True` needs an adapter: pass `peft_config`.")
        elif args.beta != 0.0:
            self._reference_adapter = "reference"
            copy_adapter(model.peft_backbone, self._reference_adapter)
        active = f".{model.peft_backbone.active_adapter}."
        for name, parameter in model.backbone.named_parameters():
            parameter.requires_grad_("lora_" in name and active in name)

    def _check_dataset(self) -> None:
        args, sized = self.args, isinstance(self.train_dataset, Sized)
        if args.dynamic_sampling_rounds and not sized:
            raise ValueError(
                "`dynamic_sampling_rounds` draws prompts at random, which a streamed `train_dataset` cannot give. Load "
                "it without `streaming=True`, or set `dynamic_sampling_rounds=0`."
            )
        prompts = args.generation_batch_size // args.num_generations
        if sized and len(self.train_dataset) < prompts:
            raise ValueError(
                f"`train_dataset` has {len(self.train_dataset)} prompts, fewer than the {prompts} of one rollout batch "
                f"(`generation_batch_size={args.generation_batch_size}` over `num_generations={args.num_generations}`):"
                " no batch could be made. Lower the batch size, or raise `num_generations`."
            )

    def _add_reward_checks(self) -> None:
        self._reward_models = [isinstance(function, nn.Module) for function in self.reward_funcs]
        self._reward_errors = RewardErrors(skip_nonfinite=self.args.on_nonfinite == "skip")
        self.reward_funcs = [
            function if isinstance(function, nn.Module) else checked_reward(function, name, self._reward_errors)
            for function, name in zip(self.reward_funcs, self.reward_func_names, strict=True)
        ]
        if self.args.overlong_buffer:
            # One more reward function, of weight 1, as TRL adds an environment's.
            punishment = SoftOverlongPunishment(self.max_completion_length, self.args.overlong_buffer)
            self.reward_funcs.append(punishment)
            self.reward_func_names.append(punishment.__name__)
            self.reward_processing_classes.append(None)
            self.reward_weights = torch.cat([self.reward_weights, torch.ones(1)])
            self._reward_models.append(False)

    def _rollout_config(self) -> GenerationConfig:
        """TRL's generation configuration, with the choice moved from tokens to codes."""
        config = copy.deepcopy(self.generation_config)
        config.do_sample = False
        config.temperature = config.top_p = config.top_k = config.min_p = None
        config.action_temperature = self.law.temperature
        config.action_top_k = self.law.top_k
        config.action_top_p = self.law.top_p
        config.action_sampling = self.args.action_sampling
        config.cuda_graphs = self.args.cuda_graphs
        if self.is_deepspeed_enabled or self.is_fsdp_enabled:
            # Weights are gathered on the way, which a CUDA graph cannot do.
            if self.args.cuda_graphs:
                raise ValueError("`cuda_graphs=True` cannot be had under FSDP or DeepSpeed. Leave it out.")
            config.cuda_graphs = False
        return config

    def _generate(self, prompts):
        *first, images, tool_images = super()._generate(prompts)
        if images is not None:
            # Processors take an empty list for a prompt without an image, not TRL's `None`.
            images = [of_prompt or [] for of_prompt in images]
        return (*first, images, tool_images)

    def _tokenize_prompts(self, prompts):
        """Processes each prompt of a group once. Fields of images stay single: `generate` copies what it needs."""
        self._copies = copies = copies_of_each(prompts)
        prompt_ids, images, multimodal_fields = super()._tokenize_prompts(prompts[::copies])
        if images is not None:
            images = [of_prompt for of_prompt in images for _ in range(copies)]
        return [ids for ids in prompt_ids for _ in range(copies)], images, multimodal_fields

    def _generate_single_turn(self, prompt_ids, images, multimodal_fields, num_generations, *args, **kwargs):
        prompt_lengths = [len(ids) for ids in prompt_ids]
        if self._replayed is not None:
            completion_ids = [sample.completion_ids for sample in self._replayed]
            rollouts = [sample.rollout for sample in self._replayed]
        else:
            self.generation_config.action_do_sample = self.model.training or self.args.eval_action_do_sample
            self.generation_config.num_return_sequences = self._copies
            single = slice(None, None, self._copies)
            with self._latent_model().recording() as records, self.accelerator.autocast(), self._sampling():
                completion_ids, _ = super()._generate_single_turn(
                    prompt_ids[single], images and images[single], multimodal_fields, num_generations, *args, **kwargs
                )
            record = records[-1]
            if not self.args.reuse_context_states:
                record.context_states = record.position_ids = None
            rollouts = Rollout.of(record, prompt_lengths, [len(ids) for ids in completion_ids])
        self._samples = [Sample(ids, rollout) for ids, rollout in zip(completion_ids, rollouts, strict=True)]
        self._rollout = Rollout.padded(rollouts, prompt_lengths, self.pad_to_multiple_of or 1)
        if self._copies > 1 and self._replayed is None and self.args.reuse_context_states:
            self._rollout.prompt_index = torch.arange(len(rollouts)) // self._copies
        if self.args.offload_context_states and self._rollout.context_states is not None:
            self._rollout.context_states = self._rollout.context_states.cpu()
        codes = [rollout.action_ids[0].tolist() for rollout in rollouts]
        self._log_completion_extra("action_ids", codes)
        self._log_completion_extra("completion_ids", [list(ids) for ids in completion_ids])
        self._log_usage(codes)
        return completion_ids, [rollout.action_log_probs[0].tolist() for rollout in rollouts]

    @contextmanager
    def _sampling(self):
        """Names the cause when codes cannot be drawn, because their probabilities are not finite."""
        try:
            yield
        except FloatingPointError as error:
            raise FloatingPointError(
                f"No code could be drawn {self._where()}: the policy's probabilities are not finite. "
                f"{origin(self._latent_model(), {})} {what_is_kept(self.args.output_dir)} {self._remedy()}"
            ) from error

    def _log_usage(self, codes: list[list[int]]) -> None:
        """How many codes the rollouts chose, over all processes."""
        chosen = torch.tensor([code for row in codes for code in row])
        counts = torch.bincount(chosen, minlength=self._latent_model().config.num_codes)
        counts = counts.to(self.accelerator.device, torch.float32)
        counts = self.accelerator.reduce(counts, "sum")
        share = counts / counts.sum()
        mode = "train" if self.model.training else "eval"
        self._metrics[mode]["codebook/used"].append((counts > 0).sum().item())
        self._metrics[mode]["codebook/perplexity"].append(torch.special.entr(share).sum().exp().item())

    def _calculate_rewards(self, inputs, prompts, completions, completion_ids_list):
        if self._replayed is not None:
            rewards = gather(torch.stack([sample.rewards for sample in self._replayed]))
            for column in sorted({column for sample in self._replayed for column in sample.extra}):
                self._log_completion_extra(column, [sample.extra.get(column) for sample in self._replayed])
        else:
            rewards = super()._calculate_rewards(inputs, prompts, completions, completion_ids_list)
            self._reward_errors.raise_any(rewards)
            skip = self.args.on_nonfinite == "skip"
            check_model_rewards(rewards, self.reward_func_names, self._reward_models, skip)
            if self.args.overlong_buffer:
                # The punishment shapes a reward; alone it does not make one.
                rewards[rewards[:, :-1].isnan().all(dim=1), -1] = torch.nan
        weighted = (rewards * self.reward_weights.to(rewards.device)).nansum(dim=1)
        self._rewards = weighted.masked_fill(rewards.isnan().all(dim=1), torch.nan)
        start = self.accelerator.process_index * len(inputs)
        own = ("action_ids", "completion_ids")
        columns = {k: v for k, v in self._pending_extra_logs.items() if k not in own and len(v) == len(inputs)}
        for i, sample in enumerate(self._samples):
            sample.row, sample.rewards = inputs[i], rewards[start + i]
            sample.extra = {column: values[i] for column, values in columns.items()}
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
        waiting = {name: list(values) for name, values in self._metrics["train"].items()}
        output = super()._generate_and_score_completions(inputs)
        if self.model.training and self.args.dynamic_sampling_rounds:
            output = self._replace_equal_groups(inputs, output, waiting)
        if self.model.training:
            self._watch_rewards()
        self._finish_rollout(output)
        self._rollout, self._samples = None, []
        # One form for the tables of completions, whether or not a batch had images, which every tracker takes.
        prompts = self._logs["prompt"]
        prompts.extend([prompt_text(prompts.popleft()) for _ in range(len(prompts))])
        if self.args.reuse_context_states:
            # Nothing reads pixels again.
            output = {k: v for k, v in output.items() if k not in VISION_KEYS}
        return output

    def _watch_rewards(self) -> None:
        equal = bool(equal_groups(self._rewards, self.num_generations).all())
        self.health.count_rewards(self._rewards, equal, "each group", self.state.global_step)

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        if "loss" in logs:
            self._watch_policy()
        super().log(logs, start_time)

    def _watch_policy(self) -> None:
        """Names a policy that chooses always the same, from what was measured since the last log."""
        args = self.args
        for name, least, kind, text in (
            ("entropy", args.min_entropy, "no exploration", "the policy's choices have an entropy of {:.2g} nats"),
            ("codebook/perplexity", args.min_perplexity, "collapse", "the codes of rollouts have perplexity {:.2f}"),
        ):
            mean = torch.tensor(self._metrics["train"].get(name, [])).nanmean().item()
            if mean < least:
                remedy = "Raise `action_temperature`, `entropy_coef` or `beta`, or lower the learning rate"
                self.health.collapse(kind, f"{text.format(mean)}. {remedy}", self.state.global_step)

    def _replace_equal_groups(self, inputs, output: dict[str, Any], waiting: dict[str, list[float]]) -> dict[str, Any]:
        """Dynamic sampling: `output`, or that of a batch in which other prompts' groups replace equal ones."""
        size, rank, rows = self.num_generations, self.accelerator.process_index, len(inputs)
        samples, equal = self._samples, equal_groups(self._rewards, size)
        first = {"equal_groups_before": equal.float().mean().item(), "reward_before": self._rewards.nanmean().item()}
        prompts, rounds, replaced = all_prompts(inputs), 0, 0
        while equal.any() and rounds < self.args.dynamic_sampling_rounds:
            rounds += 1
            fresh_rows = fresh_rows_needed(equal, rows, size)
            count = fresh_rows * self.accelerator.num_processes // size
            seed = self.args.seed + 1_000_003 * (self._step + 1) + rounds
            drawn = draw_prompts(self.train_dataset, count, prompts, seed)
            prompts += [row["prompt"] for row in drawn]
            drawn = [row for row in drawn for _ in range(size)][rank * fresh_rows : (rank + 1) * fresh_rows]
            super()._generate_and_score_completions(drawn)
            pairs = replacements_of(equal, equal_groups(self._rewards, size), rows, fresh_rows, size)
            for old, new in pairs:
                equal[old] = False
                for i in range(size):
                    place, source = old * size + i - rank * rows, new * size + i - rank * fresh_rows
                    if 0 <= place < rows:
                        samples[place] = self._samples[source]
            replaced += len(pairs)
        if rounds:
            output = self._replay(samples, waiting)
        first |= {"equal_groups_left": equal.float().mean().item(), "rounds": rounds, "replaced_groups": replaced}
        for name, value in first.items():
            self._metrics["train"][f"dynamic_sampling/{name}"].append(value)
        return output

    def _replay(self, samples: list[Sample], waiting: dict[str, list[float]]) -> dict[str, Any]:
        """Scores recorded samples as one batch; metrics speak of it alone, token counts of all that was generated."""
        tokens, metrics = self.state.num_input_tokens_seen, self._metrics["train"]
        metrics.clear()
        metrics.update(waiting)
        self._scored, self._replayed = None, samples
        try:
            output = super()._generate_and_score_completions([sample.row for sample in samples])
        finally:
            self._replayed = None
        self.state.num_input_tokens_seen = tokens
        metrics["num_tokens"] = [tokens]
        return output

    def _reference_backbone(self):
        """The backbone as it was before RL, where an adapter of it is trained."""
        if not self.args.train_backbone:
            return nullcontext()
        return use_adapter(self._latent_model().peft_backbone, self._reference_adapter)

    def _get_per_token_logps_and_entropies(self, model, *args, **kwargs):
        latent_model = self._latent_model()
        # TRL's method does not take the processor's count of images, and drops it before the update.
        kwargs.pop("batch_num_images", None)
        counted = "batch_num_images" in inspect.signature(latent_model.backbone.forward).parameters
        counts = kwargs.get("num_images") if counted else None
        scorer = CodeScorer(model, self._rollout, self.law, encode_with=latent_model, image_counts=counts)
        with self._reference_backbone() if model is self.ref_model else nullcontext():
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
        if self.anchor is not None and self.model.training:
            loss = loss + self._anchor_loss(model)
        self._check_loss(loss, inputs)
        return loss

    def _anchor_loss(self, model) -> torch.Tensor:
        batch = self._prepare_input(self.anchor.batch(self._step, self.accelerator.process_index))
        # DDP counts the gradients of the pass that it saw last: what this one leaves out it would take for unused.
        model = model.module if isinstance(model, nn.parallel.DistributedDataParallel) else model
        kl = model(objective=self.anchor.divergence, batch=batch).loss
        self._metrics["train"]["anchor/kl"].append(self.accelerator.reduce(kl.detach(), "mean").item())
        return self.args.anchor_coef * kl / self.current_gradient_accumulation_steps

    def train(self, *args, **kwargs):
        self._latent_model().config.stage = "rl"
        return super().train(*args, **kwargs)


def check_anchor(args: LatentActionGRPOConfig, dataset: Any) -> None:
    """Raises `ValueError` where weight and conversations of the anchor do not come together."""
    if args.anchor_coef:
        check_columns(dataset, "anchor_dataset")
    elif dataset is not None:
        raise ValueError(
            "`anchor_dataset` is not read while `anchor_coef` is 0. Set it, 0.1 say, or leave the data out."
        )


def copy_adapter(peft_backbone, name: str) -> None:
    """A frozen copy of the active adapter under `name`."""
    from peft import get_peft_model_state_dict, set_peft_model_state_dict

    active = peft_backbone.active_adapter
    peft_backbone.add_adapter(name, peft_backbone.peft_config[active])
    set_peft_model_state_dict(peft_backbone, get_peft_model_state_dict(peft_backbone, adapter_name=active), name)
    peft_backbone.set_adapter(active)
