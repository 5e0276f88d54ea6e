"""Supervised fine-tuning under action guidance: codes are followed, and the language model is tuned."""

import functools
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase, ProcessorMixin, Trainer, TrainerCallback, set_seed
from transformers.trainer_utils import EvalPrediction
from transformers.utils import logging

from ...checkpoint.configuration import STAGES
from ...data.mixing import MixedRows, MixedRowsCollator
from ...models.adapter import plain_names
from ...models.cross_entropy import mean_part, token_cross_entropy
from ...models.latent_action_model import LatentActionModel
from ..run.component_training import train_only
from ..run.learning import LearningMixin, bad_rows_of, conversation_collator, evaluation_rows, position_means, row_sums
from ..run.loading import check_columns, load_model, load_processing_class, own_config
from ..run.output_folder import check_writable
from .config import LatentActionSFTConfig

logger = logging.get_logger(__name__)


class LatentActionSFTTrainer(LearningMixin, Trainer):
    """
    Tunes the backbone on a task while it follows codes (the paper's stage 5): by default those that the inverse
    dynamics model infers from the data, or the policy's arg-max. Policy, codebook and world model stay as they are.

    Args:
        model (`LatentActionModel` or `str`): The model, a folder or a Hub id; its policy must have been trained.
        args (`LatentActionSFTConfig`, *optional*): The configuration.
        train_dataset (`Dataset`): Conversations, as [`LatentActionSpaceTrainer`] takes them.
        eval_dataset (`Dataset` or `dict[str, Dataset]`, *optional*): The same, or several under their names.
        processing_class (`ProcessorMixin` or `PreTrainedTokenizerBase`, *optional*): The backbone's.
        peft_config (`PeftConfig`, *optional*): The adapter to train; LoRA of rank 16 on the text model by default.
            Neither is used with `trained_layers`.
        callbacks (`list[TrainerCallback]`, *optional*): As in `Trainer`.
    """

    _tag_names = ["latent-trl", "sft"]
    _name = "Latent-action SFT"

    def __init__(
        self,
        model: LatentActionModel | str,
        args: LatentActionSFTConfig | None = None,
        train_dataset: Any = None,
        eval_dataset: Any = None,
        processing_class: ProcessorMixin | PreTrainedTokenizerBase | None = None,
        peft_config: Any = None,
        callbacks: list[TrainerCallback] | None = None,
    ):
        args = own_config(args, LatentActionSFTConfig, "latent-action-sft")
        check_writable(args)
        model = load_model(model, is_trainable=True)
        processing_class = processing_class or load_processing_class(model)
        check_columns(train_dataset, "train_dataset")
        model.require("policy", "codebook", "world_model")
        if args.guidance == "inferred" and model.inverse_dynamics is None:
            raise ValueError(
                "`guidance='inferred'` needs the inverse dynamics model, which this model has not. Load a checkpoint "
                "that holds it, or follow the policy's codes with `guidance='policy'`."
            )
        if STAGES.index(model.config.stage) < STAGES.index("policy"):
            raise ValueError(
                f"SFT comes after the policy, and the model has only reached stage {model.config.stage!r}. Run "
                "`LatentActionSpaceTrainer` up to its stage 'policy' first."
            )
        line = train_only(model, (), self._backbone_parameters(model, args, peft_config))
        train_dataset, eval_dataset = MixedRows(train_dataset), evaluation_rows(eval_dataset)
        collate = conversation_collator(args, model, processing_class)
        super().__init__(
            model=model,
            args=args,
            data_collator=MixedRowsCollator(collate, bad_rows_of(args, train_dataset, eval_dataset)),
            train_dataset=train_dataset,
            eval_dataset=eval_dataset,
            processing_class=processing_class,
            callbacks=callbacks,
        )
        logger.warning(line)

    def _on_collapse(self) -> str:
        # Codes are followed here, not learned.
        return "ignore"

    @staticmethod
    def _backbone_parameters(model: LatentActionModel, args: LatentActionSFTConfig, peft_config: Any) -> list[str]:
        """Names of the tensors to train: those of the layers asked for, or of an adapter."""
        if args.trained_layers:
            if peft_config is not None:
                raise ValueError("`peft_config` and `trained_layers` are two ways to tune the backbone. Choose one.")
            every = dict(model.backbone.named_parameters(remove_duplicate=False))
            wanted = {p.data_ptr() for n, p in every.items() if n.startswith(tuple(args.trained_layers))}
            names = [n for n, p in model.backbone.named_parameters() if p.data_ptr() in wanted]
            if not names:
                known = sorted({".".join(n.split(".")[:4]) for n in every})
                raise ValueError(
                    f"`trained_layers={args.trained_layers}` names no tensor of the backbone. Names begin with {known}."
                )
            plain = plain_names(model.backbone)
            tuned = {plain[name] for name in names if name in plain}
            model.tuned_backbone_tensors = sorted({*model.tuned_backbone_tensors, *tuned})
            return names
        if model.peft_backbone is None:
            if peft_config is None:
                from peft import LoraConfig

                peft_config = LoraConfig(r=16, lora_alpha=32)
            # Trainer seeds only later, and the adapter's start is drawn here.
            set_seed(args.seed)
            model.add_adapter(peft_config)
        elif peft_config is not None:
            raise ValueError("The model has an adapter already, which is trained further. Leave `peft_config` out.")
        return model.adapter.trained

    def whole_update(self, batches: list[dict[str, Any]]) -> torch.Tensor:
        """Positions of the loss in the whole update, averaged over the processes."""
        count = sum(batch["loss_mask"][:, 1:].sum() for batch in batches).float()
        return self.accelerator.reduce(count, "mean")

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        objective = functools.partial(guided_loss, guidance=self.args.guidance, count=num_items_in_batch)
        loss = model(objective=objective, batch=inputs).loss
        self._check_loss(loss, inputs)
        return (loss, {"loss": loss}) if return_outputs else loss

    def held_out_sums(self, model: LatentActionModel, batch: dict[str, Any]) -> torch.Tensor:
        losses, mask = guided_losses(model, batch, self.args.guidance)
        return row_sums(losses, mask)[:, None]

    def held_out_metrics(self, prediction: EvalPrediction) -> dict[str, float]:
        return position_means(prediction, ("loss",))

    def train(self, *args, **kwargs):
        self.data_collator.preflight(self.args.seed)
        output = super().train(*args, **kwargs)
        self.model.config.stage = STAGES[max(STAGES.index("sft"), STAGES.index(self.model.config.stage))]
        return output


def guided_losses(
    model: LatentActionModel, batch: dict[str, Any], guidance: str = "inferred"
) -> tuple[torch.Tensor, torch.Tensor]:
    """
    Cross-entropies of the next tokens under the codes of `guidance`, through the read-out that serves them.

    Returns:
        `[M]`, and the boolean mask `[B, L-1]` of their positions.
    """
    ids, attention_mask = batch["input_ids"], batch["attention_mask"]
    states, position_ids = model.encode(ids, attention_mask, **batch["vision"])
    with torch.no_grad():
        if guidance == "inferred":
            logits = model.infer(states.detach(), ids, attention_mask, position_ids)
        else:
            logits = model.policy(states.detach(), attention_mask, position_ids)[:, :-1]
        action_ids = logits.argmax(dim=-1)
    mask = batch["loss_mask"][:, 1:]
    merged = model.merge(states[:, :-1][mask], model.codebook(action_ids[mask]))
    return token_cross_entropy(model, merged, ids[:, 1:][mask]), mask


def guided_loss(
    model: LatentActionModel, batch: dict[str, Any], guidance: str = "inferred", count: torch.Tensor | None = None
) -> torch.Tensor:
    """The sum of [`guided_losses`] divided by `count` positions; by their own number unless given."""
    losses, _ = guided_losses(model, batch, guidance)
    return mean_part(losses, count)
