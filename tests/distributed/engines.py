"""accelerate's FSDP2 and DeepSpeed on two gloo processes of the CPU, set up by the committed configurations."""

import importlib.util
import os
import signal
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from accelerate import debug_launcher
from accelerate.commands.launch import _validate_launch_command, launch_command_parser
from accelerate.state import AcceleratorState, PartialState
from accelerate.utils import DistributedType, patch_environment
from accelerate.utils.launch import prepare_deepspeed_cmd_env, prepare_multi_gpu_env

CONFIGS = Path(__file__).parents[2] / "examples" / "accelerate_configs"
ENGINES = ("ddp", "fsdp2", "zero2", "zero3")
# Seconds that a run may take on a busy machine.
LONGEST = 900
DEEPSPEED = ("zero2", "zero3")
CONFIG_OF = {
    "ddp": CONFIGS / "cpu" / "multi_gpu.yaml",
    "fsdp2": CONFIGS / "cpu" / "fsdp2.yaml",
    "zero2": CONFIGS / "cpu" / "deepspeed_zero2.yaml",
    "zero3": CONFIGS / "cpu" / "deepspeed_zero3.yaml",
}
# What accelerate makes of a configuration, for the processes it starts.
PASSED_ON = ("ACCELERATE_USE_", "ACCELERATE_DEEPSPEED_", "ACCELERATE_CONFIG_", "ACCELERATE_GRADIENT_", "FSDP_")


def has_deepspeed() -> bool:
    return importlib.util.find_spec("deepspeed") is not None


def environment(engine: str) -> dict[str, str]:
    """The variables that `accelerate launch` would give to the processes of an engine."""
    arguments = launch_command_parser().parse_args(["--config_file", str(CONFIG_OF[engine]), "script.py"])
    arguments, defaults, _ = _validate_launch_command(arguments)
    if arguments.use_deepspeed:
        arguments.deepspeed_fields_from_accelerate_config = ",".join(defaults.deepspeed_config)
        _, given = prepare_deepspeed_cmd_env(arguments)
    else:
        given = prepare_multi_gpu_env(arguments)
    own = {name: value for name, value in given.items() if name.startswith(PASSED_ON)}
    return {**own, "DS_ACCELERATOR": "cpu", "DS_BUILD_OPS": "0", "DS_SKIP_CUDA_CHECK": "1"}


def let_engines_run_on_the_cpu() -> None:
    """
    accelerate makes DDP of FSDP2, and nothing of DeepSpeed, where there are only CPUs. With this it takes them: its
    own code runs, and PyTorch's and DeepSpeed's.
    """
    original = AcceleratorState.__init__
    if getattr(original, "for_the_cpu", False):
        return

    def init(state, *args, deepspeed_plugin=None, fsdp_plugin=None, **kwargs):
        fresh = "_mixed_precision" not in AcceleratorState._shared_state
        original(state, *args, deepspeed_plugin=deepspeed_plugin, fsdp_plugin=fsdp_plugin, **kwargs)
        if not fresh or state.num_processes < 2:
            return
        if os.environ.get("ACCELERATE_USE_DEEPSPEED") == "true":
            state.distributed_type = DistributedType.DEEPSPEED
            deepspeed_plugin.set_mixed_precision("no")
            deepspeed_plugin.select(_from_accelerator_state=True)
            # The default keeps small tensors whole on every process: here that would be all of them.
            deepspeed_plugin.deepspeed_config["zero_optimization"]["stage3_param_persistence_threshold"] = 0
            state.deepspeed_plugins = deepspeed_plugin
        elif os.environ.get("ACCELERATE_USE_FSDP") == "true":
            state.distributed_type = DistributedType.FSDP
            state.fsdp_plugin = fsdp_plugin
        PartialState._shared_state["distributed_type"] = state.distributed_type

    init.for_the_cpu = True
    AcceleratorState.__init__ = init


def _start(function: Callable[..., Any], on_the_cpu: bool, *args: Any) -> None:
    # Processes that wait for each other for ever are ended.
    signal.alarm(LONGEST)
    torch.set_num_threads(1)
    os.environ["LOCAL_RANK"] = str(torch.distributed.get_rank())
    os.environ["RANK"] = os.environ["LOCAL_RANK"]
    if on_the_cpu:
        let_engines_run_on_the_cpu()
    function(*args)


def launch(
    engine: str | None, function: Callable[..., Any], *args: Any, processes: int = 2, on_the_cpu: bool = True
) -> None:
    """
    Calls `function(*args)` in processes of an engine; without one, in a single plain process.

    Args:
        on_the_cpu (`bool`, defaults to `True`): Whether the engine is let run there.
    """
    if engine is None:
        debug_launcher(partial(_start, function, on_the_cpu), args, num_processes=1)
        return
    with patch_environment(**environment(engine)):
        if engine in DEEPSPEED:
            # Here, and not in each process: it takes seconds.
            import deepspeed  # noqa: F401
        debug_launcher(partial(_start, function, on_the_cpu), args, num_processes=processes)
