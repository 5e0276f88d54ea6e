"""What the distributed engines must be told of a latent action model, and what is not to be had with them."""

import os
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType
from PIL import Image
from torch import nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from transformers import ProcessorMixin

from ...checkpoint.files import read_json
from ...data.prompts import PromptEncoder
from ...models.blank_picture import BlankPicture
from ...models.latent_action_model import LatentActionModel

# What a checkpoint says of the run that wrote it.
ENGINE_FILE = "engine.json"
# Pixels of a side: more than any image processor's patch.
BLANK_SIZE = 64


def asked_for(name: str) -> bool:
    """Whether the launcher's configuration asks for an engine."""
    return os.environ.get(f"ACCELERATE_USE_{name}", "false").lower() == "true"


def check_engine(accelerator: Accelerator) -> None:
    """
    Raises `ValueError` when what was launched is not what runs: accelerate makes DDP of FSDP2, and single processes of
    DeepSpeed, where it finds only CPUs, and says nothing of it.
    """
    kind, processes = accelerator.distributed_type, accelerator.num_processes
    for name, wanted in (("FSDP", DistributedType.FSDP), ("DEEPSPEED", DistributedType.DEEPSPEED)):
        if asked_for(name) and kind != wanted:
            raise ValueError(
                f"The launcher's configuration asks for {wanted.value}, and accelerate made {kind.value} of it on "
                f"{accelerator.device.type!r} with {processes} process(es). It has FSDP and DeepSpeed on GPUs alone: "
                "leave `use_cpu`, `--cpu` and `ACCELERATE_USE_CPU` out, or launch with `multi_gpu.yaml` or "
                "`cpu/multi_gpu.yaml`."
            )
    launched = int(os.environ.get("WORLD_SIZE", "1"))
    if "LOCAL_RANK" in os.environ and launched != processes:
        raise ValueError(
            f"{launched} processes were launched, and each takes itself for one of {processes}: they would all train "
            "the same in one folder. On the CPU set `ACCELERATE_USE_CPU=true`."
        )


def is_zero3(trainer: Any) -> bool:
    """Whether DeepSpeed shards the parameters of a trainer's model."""
    return trainer.is_deepspeed_enabled and trainer.accelerator.state.deepspeed_plugin.zero_stage == 3


def engine_record(trainer: Any) -> dict[str, Any]:
    """Which engine a trainer runs under, as plain JSON values."""
    state = trainer.accelerator.state
    record = {"engine": "one process or DDP", "processes": state.num_processes}
    if trainer.is_deepspeed_enabled:
        record["engine"] = f"DeepSpeed ZeRO-{state.deepspeed_plugin.zero_stage}"
    elif trainer.is_fsdp_enabled:
        record["engine"] = f"FSDP{state.fsdp_plugin.fsdp_version}"
    return record


def check_same_engine(trainer: Any, checkpoint: str | Path) -> None:
    """
    Raises `ValueError` for a checkpoint of another engine, whose optimizer this run cannot read: Trainer would go on
    without its moments, and not say so. DeepSpeed's is read by as many processes as wrote it.
    """
    path = Path(checkpoint) / ENGINE_FILE
    if not path.is_file():
        return
    written, own = read_json(path), engine_record(trainer)
    same = written["engine"] == own["engine"]
    if same and (written["processes"] == own["processes"] or not trainer.is_deepspeed_enabled):
        return
    raise ValueError(
        f"{checkpoint} was written under {written['engine']} by {written['processes']} process(es), and this run is "
        f"{own['processes']} under {own['engine']}, which cannot read the optimizer of the other. Go on as the run "
        "began, or start a new one from its model: `LatentActionModel.from_pretrained`."
    )


def elements(parameter: torch.nn.Parameter) -> int:
    """Of the whole tensor: ZeRO-3 leaves a process one without any, and says here how many there are."""
    return vars(parameter).get("ds_numel", parameter.numel())


def shards_layers(trainer: Any) -> bool:
    """Whether processes gather the layers together, so that each must run them as often as the others."""
    return trainer.is_fsdp_enabled or is_zero3(trainer)


def whole_tensors(trainer: Any, part: nn.Module) -> dict[str, torch.Tensor]:
    """The tensors of a part of a trainer's model that FSDP or ZeRO-3 shards, by its own names, on the CPU. All
    processes take part, and the first has them."""
    if trainer.is_fsdp_enabled:
        return get_model_state_dict(part, options=StateDictOptions(full_state_dict=True, cpu_offload=True))
    import deepspeed

    with deepspeed.zero.GatheredParameters(list(part.parameters())):
        main = trainer.accelerator.is_main_process
        return {name: tensor.detach().cpu().clone() for name, tensor in part.state_dict().items()} if main else {}


def prepare_model(trainer: Any) -> None:
    """Makes the passes of a trainer's model alike on all processes, whatever their rows are, where tensors or gradients
    are sharded; called before the engine has the model."""
    if not (trainer.is_fsdp_enabled or trainer.is_deepspeed_enabled):
        return
    model = trainer.accelerator.unwrap_model(trainer.model)
    if isinstance(trainer.processing_class, ProcessorMixin) and model.config.vision_token_ids:
        model.backbone_view.blank_picture = blank_picture(trainer.processing_class)
    if is_zero3(trainer):
        if vars(trainer.args).get("ds3_gather_for_generation") is False:
            raise ValueError(
                "`ds3_gather_for_generation=False` gathers the layers for each token of a rollout, and the codes are "
                "chosen between them, where DeepSpeed does not see it. Leave it out, or keep the backbone whole (DDP, "
                "ZeRO-2)."
            )
        _keep_for_the_pass(model)


def blank_picture(processing_class: ProcessorMixin) -> BlankPicture:
    """A prompt of one black picture."""
    image = Image.new("RGB", (BLANK_SIZE, BLANK_SIZE))
    row = {"prompt": [{"role": "user", "content": "."}], "images": [image], "_row": 0}
    prompt = PromptEncoder(processing_class)(row)
    return BlankPicture(prompt.ids, prompt.fields, prompt.vision)


def _keep_for_the_pass(model: LatentActionModel) -> None:
    """
    Lets ZeRO-3 gather once a pass what objectives call as often as they have rows and positions: the head, the
    embedding, the norm and the components but for their layers. Processes would wait for each other otherwise.
    """
    import deepspeed

    stacks = [part.decoder_stack.decoder for part in (model.policy, model.inverse_dynamics) if part is not None]
    inside = {id(p) for stack in (model.get_decoder(), *stacks) for p in stack.parameters()}
    view = model.backbone_view
    modules = [getattr(model, name) for name in model.component_classes]
    shared = [p for module in modules if module is not None for p in module.parameters() if id(p) not in inside]
    for module in (view.final_norm, model.get_input_embeddings(), model.get_output_embeddings()):
        shared += [] if module is None else list(module.parameters())
    for parameter in {id(p): p for p in shared}.values():
        deepspeed.zero.register_external_parameter(model, parameter)
