"""Making and loading models whole on each process, where transformers would shard them or leave them out."""

from collections.abc import Iterator
from contextlib import contextmanager

from accelerate.utils import patch_environment
from transformers.integrations import deepspeed


@contextmanager
def loaded_whole() -> Iterator[None]:
    """
    Inside the block models are made with whole tensors. With a trainer's arguments transformers knows of ZeRO-3, and
    shards every model from then on, a component that one process makes to compare shapes too; and where FSDP is to
    load on one process alone (`fsdp_cpu_ram_efficient_loading`) the others get no values. A backbone is run when it is
    wrapped, on each process, and components are small: DeepSpeed and FSDP shard them when training begins.
    """
    # The only hold of the configuration is weak, and the one way to ask for it.
    reference = deepspeed._hf_deepspeed_config_weak_ref
    config = None if reference is None else reference()
    deepspeed.unset_hf_deepspeed_config()
    try:
        with patch_environment(FSDP_CPU_RAM_EFFICIENT_LOADING="false"):
            yield
    finally:
        if config is not None:
            deepspeed.set_hf_deepspeed_config(config)
