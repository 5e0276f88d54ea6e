"""Making and loading models whole, where transformers would shard them at once because ZeRO-3 is configured."""

from collections.abc import Iterator
from contextlib import contextmanager

from transformers.integrations import deepspeed


@contextmanager
def loaded_whole() -> Iterator[None]:
    """
    Inside the block models are made with whole tensors. With a trainer's arguments transformers knows of ZeRO-3, and
    shards every model from then on, a component that one process makes to compare shapes too. A backbone is looked at
    when it is wrapped, and components are small: DeepSpeed shards them when training begins.
    """
    # The only hold of the configuration is weak, and the one way to ask for it.
    reference = deepspeed._hf_deepspeed_config_weak_ref
    config = None if reference is None else reference()
    deepspeed.unset_hf_deepspeed_config()
    try:
        yield
    finally:
        if config is not None:
            deepspeed.set_hf_deepspeed_config(config)
