"""The generation configuration of rollouts: how codes are drawn, and what ends a completion."""

from typing import Any

from transformers import GenerationConfig

from ...generation.action_law import ActionLaw


def rollout_config(
    args: Any, law: ActionLaw, tokenizer: Any, end_token_ids: list[int], sharded: bool
) -> GenerationConfig:
    """
    What rollouts give to [`LatentActionModel.generate`]: only what the arguments set, so that nothing overrules the one
    law of sampling.

    Args:
        args (`LatentActionGRPOConfig`): The trainer's arguments.
        law (`ActionLaw`): The law that codes are sampled from and scored under.
        tokenizer (`PreTrainedTokenizerBase`): For its special tokens.
        end_token_ids (`list[int]`): What ends a completion.
        sharded (`bool`): Whether FSDP or DeepSpeed gathers weights on the way, which a CUDA graph cannot do.

    Raises:
        ValueError: For CUDA graphs that cannot be had.
    """
    if sharded and args.cuda_graphs:
        raise ValueError("`cuda_graphs=True` cannot be had under FSDP or DeepSpeed. Leave it out.")
    fields = {
        "max_new_tokens": args.max_completion_length,
        "pad_token_id": tokenizer.pad_token_id,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": end_token_ids,
        "cache_implementation": args.cache_implementation,
        **(args.generation_kwargs or {}),
    }
    if args.repetition_penalty != 1.0:
        fields["repetition_penalty"] = args.repetition_penalty
    config = GenerationConfig(**fields, disable_compile=True)
    config.action_temperature = law.temperature
    config.action_top_k = law.top_k
    config.action_top_p = law.top_p
    config.action_sampling = args.action_sampling
    config.cuda_graphs = False if sharded else args.cuda_graphs
    return config
