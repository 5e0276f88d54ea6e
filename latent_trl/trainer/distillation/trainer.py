"""A plain model out: the backbone is taught to say by itself what the policy says through codes."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from peft import LoraConfig
from transformers import (
    GenerationConfig,
    PreTrainedTokenizerBase,
    ProcessorMixin,
    Trainer,
    TrainerCallback,
    set_seed,
)
from transformers.trainer_utils import EvalPrediction
from transformers.utils import logging

from ...data.prompts import check_prompts
from ...generation.answers import end_tokens, evaluation_mode
from ...models.cross_entropy import mean_part
from ...models.latent_action_model import LatentActionModel
from ..rollout.prompts import PromptReader, answers, stored
from ..rollout.rollout import Rollout
from ..rollout.source import GenerateSource
from ..run.component_training import train_only
from ..run.learning import LearningMixin, position_means, row_sums
from ..run.loading import load_model, load_processing_class, own_config
from ..run.output_folder import check_writable
from .config import LatentActionDistillationConfig
from .objective import DistillationLosses
from .plain_model import check_model, save_plain

logger = logging.get_logger(__name__)


class LatentActionDistillationTrainer(LearningMixin, Trainer):
    r"""
    Teaches a policy's law over tokens to an adapter on its backbone, so that the backbone alone, served by anything,
    says what the policy says. The policy answers the prompts; on its own samples, token by token, the loss is
    \\( \mathrm{KL}(\sum_a \pi(a \mid s) \, p(x \mid s, a) \,\|\, q(x)) \\) with the adapted backbone's \\( q \\), where
    by default all of \\( p(x \mid s, a) \\) is on the code's likeliest token, as `generate` says it
    (sequence-level and word-level distillation, [Kim & Rush, 2016](https://huggingface.co/papers/1606.07947)). Policy,
    codebook, world model and the backbone's own tensors stay as they are.

    Args:
        model (`LatentActionModel` or `str`): The model, a folder or a Hub id; its policy must have been trained. An
            adapter that it has, of SFT say, is merged into the backbone first.
        args (`LatentActionDistillationConfig`, *optional*): The configuration.
        train_dataset (`Dataset`): With `prompt`, and `images` where there are some.
        eval_dataset (`Dataset` or `dict[str, Dataset]`, *optional*): The same, held out.
        processing_class (`ProcessorMixin` or `PreTrainedTokenizerBase`, *optional*): The backbone's.
        peft_config (`PeftConfig`, *optional*): The adapter; LoRA of rank 16 on the text model by default.
        callbacks (`list[TrainerCallback]`, *optional*): As in `Trainer`.

    Raises:
        ValueError: For data without prompts, a policy that was not trained, and a tuned backbone without
            `merge_adapter`: an adapter alone would be put on the base model, which is another.
    """

    _tag_names = ["latent-trl", "distillation"]
    _name = "Latent-action distillation"

    def __init__(
        self,
        model: LatentActionModel | str,
        args: LatentActionDistillationConfig | None = None,
        train_dataset: Any = None,
        eval_dataset: Any = None,
        processing_class: ProcessorMixin | PreTrainedTokenizerBase | None = None,
        peft_config: Any = None,
        callbacks: list[TrainerCallback] | None = None,
    ):
        args = own_config(args, LatentActionDistillationConfig, "latent-action-distillation")
        check_writable(args)
        model = load_model(model)
        processing_class = processing_class or load_processing_class(model)
        check_prompts(train_dataset, "train_dataset")
        for name, rows in (eval_dataset if isinstance(eval_dataset, dict) else {"": eval_dataset}).items():
            if rows is not None:
                check_prompts(rows, f"eval_dataset[{name!r}]" if name else "eval_dataset")
        check_model(model, args)
        self.tokenizer = getattr(processing_class, "tokenizer", processing_class)
        if self.tokenizer.pad_token is None:
            # As TRL does.
            self.tokenizer.pad_token = self.tokenizer.eos_token
        if model.peft_backbone is not None:
            logger.warning("The adapter of the backbone is merged: the policy was trained on both.")
            model.peft_backbone.merge_and_unload()
        # Trainer seeds only later, and the adapter's start is drawn here.
        set_seed(args.seed)
        model.add_adapter(LoraConfig(r=16, lora_alpha=32) if peft_config is None else peft_config)
        line = train_only(model, (), model.adapter.trained)
        super().__init__(
            model=model,
            args=args,
            data_collator=as_rows,
            train_dataset=stored(train_dataset, "train_dataset"),
            eval_dataset=stored(eval_dataset),
            processing_class=processing_class,
            callbacks=callbacks,
        )
        logger.warning(line)
        if self.is_fsdp_enabled or self.is_deepspeed_enabled:
            raise ValueError("Distillation runs on one device or under DDP, and not under FSDP or DeepSpeed.")
        self.law = args.action_law()
        self.reader = PromptReader.of(self)
        self.bad_rows = self.reader.bad_rows
        self.ends = end_tokens(model, self.tokenizer, {}) or []
        self.generation_config = self._generation_config()
        self.losses = DistillationLosses(self.reader.encoder, self.law, args.teacher)

    def _on_collapse(self) -> str:
        # Codes are followed here, not learned.
        return "ignore"

    def usable_rows(self, dataset: Any, name: str) -> Any:
        return self.reader.usable(stored(dataset, name))

    @contextmanager
    def teacher(self) -> Iterator[LatentActionModel]:
        """The model as the policy was trained on it: without the adapter, in evaluation mode."""
        model = self._latent_model()
        with evaluation_mode(model), model.peft_backbone.disable_adapter():
            yield model

    def _generation_config(self) -> GenerationConfig:
        tokenizer, law = self.tokenizer, self.law
        config = GenerationConfig(
            max_new_tokens=self.args.max_completion_length,
            pad_token_id=tokenizer.pad_token_id,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=self.ends,
            disable_compile=True,
        )
        config.action_temperature, config.action_top_k, config.action_top_p = law.temperature, law.top_k, law.top_p
        return config

    def prepared(self, batch: dict[str, Any], place: int | None) -> dict[str, Any]:
        """The policy's own answers to a batch of prompts: a function of the seed, and in training of the step."""
        when = [0] if place is None else [1, self.state.global_step, place]
        seed = int(np.random.default_rng([*when, self.args.seed, self.args.process_index]).integers(2**31))
        source = GenerateSource(
            self.model_wrapped,
            self.accelerator,
            self.generation_config,
            self.reader.encoder,
            self.ends,
            keep_states=True,
        )
        with self.teacher(), torch.random.fork_rng():
            torch.manual_seed(seed)
            try:
                samples = answers(batch["rows"], 1, self.reader, source)
            except FloatingPointError as error:
                raise self._no_code(error) from error
        rollout = Rollout.of(samples, self.tokenizer.pad_token_id, self.args.device)
        # For the pass of the backbone with the adapter.
        rollout.prompts = [sample.prompt for sample in samples]
        return {"rollout": rollout}

    def whole_update(self, batches: list[dict[str, Any]]) -> torch.Tensor:
        """Tokens of the samples in the whole update, averaged over the processes."""
        count = sum(batch["rollout"].completion_mask.sum() for batch in batches).float()
        return self.accelerator.reduce(count, "mean")

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        losses, _, _ = model(objective=self.losses, batch=inputs["rollout"]).loss
        loss = mean_part(losses, num_items_in_batch)
        self._check_loss(loss, inputs["rollout"].to_batch())
        return (loss, {"loss": loss}) if return_outputs else loss

    def held_out_sums(self, model: LatentActionModel, batch: dict[str, Any]) -> torch.Tensor:
        losses, same, mask = self.losses(model, batch["rollout"])
        return torch.stack([row_sums(losses, mask), row_sums(same, mask)], dim=1)

    def held_out_metrics(self, prediction: EvalPrediction) -> dict[str, float]:
        return position_means(prediction, ("loss", "agreement"))

    def train(self, *args, **kwargs):
        self.reader.preflight(self.args.seed)
        return super().train(*args, **kwargs)

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """
        Saves the plain model: the adapter, or with `merge_adapter` the backbone with it merged, and the processing
        class. Checkpoints of the run hold the latent action model and the adapter that is being trained.
        """
        if _internal_call:
            super().save_model(output_dir, _internal_call)
            return
        output_dir = output_dir or self.args.output_dir
        if self.args.should_save:
            save_plain(self._latent_model(), output_dir, self.args.merge_adapter)
            self.processing_class.save_pretrained(output_dir)
        self.accelerator.wait_for_everyone()


def as_rows(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """A batch of prompts, which are encoded where they are answered."""
    return {"rows": rows}
