"""Plans under vLLM: its own multi-LoRA serves them, without a plugin; here are its arguments and its requests."""

from pathlib import Path
from typing import Any

from ..checkpoint.files import resolve_folder
from ..checkpoint.plan_files import PLAN_PATTERNS, plan_folder
from .configuration import PlanConfig
from .folder import check_plan_folder

# What vLLM makes its buffers for; an adapter of a lower rank fits one of a higher.
RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)


def engine_arguments(name_or_path: str | Path, revision: str | None = None, **given: Any) -> dict[str, Any]:
    """
    Arguments of `vllm.LLM` for the backbone of a folder of plans, with a slot for each plan.

    Args:
        name_or_path (`str` or `Path`): The folder, or a Hub id.
        revision (`str`, *optional*): Of the Hub's repository.
        given: Further arguments of `vllm.LLM`, such as `dtype` or `max_model_len`; they are checked, and go before.

    Raises:
        CheckpointError: When it is no folder of plans.
        ValueError: For too few slots (`max_loras`, `max_cpu_loras`), a lower `max_lora_rank` than that of the plans,
            `enable_lora=False`, plans that were learned beside a LoRA, or on a backbone without a name.

    Example:

    ```python
    llm = LLM(**engine_arguments("outputs/plans/model", dtype="float32"))
    answers = llm.generate(prompts, SamplingParams(temperature=0), lora_request=plan_requests("outputs/plans/model"))
    ```
    """
    config = PlanConfig.load(resolve_folder(name_or_path, revision=revision, patterns=PLAN_PATTERNS))
    check_plans_alone(config, f"The plans of {str(name_or_path)!r}")
    if not (given.get("model") or config.base_model_name_or_path):
        raise ValueError("`model` must be given: the plans were learned on a backbone that has no name.")
    base = {"model": config.base_model_name_or_path, "revision": config.base_model_revision}
    return {**({} if given.get("model") else base), **adapter_arguments(config, config.num_plans, given), **given}


def check_plans_alone(config: PlanConfig, what: str) -> None:
    """Raises `ValueError` for plans that an engine cannot have: beside a LoRA, or of a higher rank than it takes."""
    if config.has_adapter:
        raise ValueError(
            f"{what} were learned beside a LoRA of the backbone, and an engine gives a request one adapter. Merge that "
            "LoRA into the backbone, and learn plans there."
        )
    if config.rank > RANKS[-1]:
        raise ValueError(f"{what} are of rank {config.rank}, and an engine takes at most {RANKS[-1]}.")


def check_no_switch(config: PlanConfig) -> None:
    """Raises `ValueError` for plans whose segments a learned switch ends: an engine cannot ask it behind each token."""
    if config.segment == "switch":
        raise ValueError(
            "These plans are held until a learned switch ends the segment (`segment='switch'`). It reads the states of "
            "each token, which vLLM does not give. Answer with transformers (without `use_vllm`, or with `--engine "
            "transformers`), or learn plans with `segment='sentence'`."
        )


def adapter_arguments(config: PlanConfig, count: int, given: dict[str, Any]) -> dict[str, Any]:
    """
    What tells vLLM of adapters.

    Args:
        config (`PlanConfig`): Of the plans.
        count (`int`): A slot for each of so many.
        given (`dict`): Arguments that were given, which are checked.

    Raises:
        ValueError: For fewer slots (`max_loras`, `max_cpu_loras`), a lower `max_lora_rank`, or `enable_lora=False`.
    """
    slots = {"max_loras": count, "max_lora_rank": next(rank for rank in RANKS if rank >= config.rank)}
    for name, least in (*slots.items(), ("max_cpu_loras", count)):
        if given.get(name) is not None and type(given[name]) is not int:
            raise ValueError(f"`{name}` must be an integer, got {given[name]!r}.")
        if given.get(name) is not None and given[name] < least:
            what = f"plans are of rank {config.rank}" if name == "max_lora_rank" else f"there are {least} plans"
            raise ValueError(f"`{name}` is {given[name]}, and {what}: it must be at least {least}.")
    if not given.get("enable_lora", True):
        raise ValueError("`enable_lora` is off, and plans are LoRAs to the engine. Leave it out.")
    return {"enable_lora": True, **slots}


def check_multi_lora(architectures: list[str]) -> None:
    """
    Raises `ValueError` for an architecture whose model in vLLM takes no adapters. Those that vLLM has no model of its
    own for run in transformers', and take them.
    """
    from vllm import ModelRegistry
    from vllm.model_executor.models import supports_lora

    for name in architectures:
        known = ModelRegistry.models.get(name)
        if known is not None and not supports_lora(known.load_model_cls()):
            raise ValueError(
                f"vLLM's {name!r} takes no LoRA, and plans are LoRAs to the engine. Answer with transformers."
            )


def plan_requests(name_or_path: str | Path, revision: str | None = None) -> list[Any]:
    """
    A `vllm.lora.request.LoRARequest` for each plan; entry k is that of plan k, named `plan_0k`.

    Args:
        name_or_path (`str` or `Path`): The folder, or a Hub id.
        revision (`str`, *optional*): Of the Hub's repository.

    Raises:
        CheckpointError: When it is no folder of plans.
        ImportError: Without vLLM.
    """
    folder = resolve_folder(name_or_path, revision=revision, patterns=PLAN_PATTERNS)
    count = PlanConfig.load(folder).num_plans
    from vllm.lora.request import LoRARequest

    # An id of 0 is no adapter.
    folders = [check_plan_folder(folder, k).resolve() for k in range(count)]
    return [LoRARequest(plan_folder(k), k + 1, str(path)) for k, path in enumerate(folders)]
