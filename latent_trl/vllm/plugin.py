"""Tells vLLM of latent actions: the entry point `vllm.general_plugins` calls [`register`] in each of its processes."""

from vllm import ModelRegistry
from vllm.model_executor.models.config import MODELS_CONFIG_MAP

from .sampler import rebind_sampler

# In front of the name of an architecture that vLLM knows.
PREFIX = "LatentAction"
# Where vLLM runs a model of transformers' own, whose layers cannot be had twice in an engine.
FOREIGN = "vllm.model_executor.models.transformers"

FIRST_RUNNER = (
    "Codes are sampled in vLLM's first model runner: leave `VLLM_USE_V2_MODEL_RUNNER` out, or set it to 0, and start "
    "the engine with `latent_trl.vllm.engine.engine_arguments`."
)


def check_architecture(name: str) -> None:
    """Raises `ValueError` for an architecture of a backbone that cannot have latent actions in an engine."""
    if PREFIX + name not in ModelRegistry.models:
        raise ValueError(
            f"vLLM has no {name!r} of its own, so that it cannot have latent actions in an engine. Generate with "
            "transformers."
        )


def register() -> None:
    """Registers every architecture of vLLM a second time, with latent actions; the classes are made when asked for."""
    for architecture in set(ModelRegistry.get_supported_archs()):
        name = PREFIX + architecture
        known = ModelRegistry.models[architecture]
        if architecture.startswith(PREFIX) or name in ModelRegistry.models or vars(known).get("module_name") == FOREIGN:
            continue
        ModelRegistry.register_model(name, f"latent_trl.vllm.model:{name}")
        if architecture in MODELS_CONFIG_MAP:
            MODELS_CONFIG_MAP[name] = MODELS_CONFIG_MAP[architecture]
    rebind_sampler()
