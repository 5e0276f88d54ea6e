"""Plans: K low-rank adapters of a frozen text model, of which each row of a batch carries one."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import nn

from ..checkpoint.files import CheckpointError, check_range, check_weights, read_json, read_weights
from ..checkpoint.lora import plain_lora_fields
from ..checkpoint.plan_files import ADAPTER_CONFIG, ADAPTER_WEIGHTS
from ..models.backbone import Backbone
from .targets import base_layer, features

if TYPE_CHECKING:
    from peft import LoraConfig

PREFIX = "base_model.model."
# Fields of the record that a plan has; dropout is of training, and the last follows from the layer.
PLAN_FIELDS = {"r", "lora_alpha", "lora_dropout", "fan_in_fan_out"}


class PlanAdapters(nn.Module):
    """
    K LoRAs [Hu et al., 2021](https://huggingface.co/papers/2106.09685) on the same linear maps: under plan k a map
    gives `W x + B_k A_k x`, at every position of the row. Rows of a batch carry different plans in one pass.

    Args:
        view (`Backbone`): The frozen backbone. Hooks on its linear maps do nothing outside [`~PlanAdapters.active`].
        targets (`list[str]`): Names of the linear maps.
        num_plans (`int`): K.
        rank (`int`): Rows of `A_k`.
        init_std (`float`): Standard deviation of `B_k` at the start; that of `A_k` is one over the root of its width.
        seed (`int`): Of the start.
    """

    def __init__(self, view: Backbone, targets: list[str], num_plans: int, rank: int, init_std: float, seed: int):
        super().__init__()
        self.targets = list(targets)
        self.num_plans = num_plans
        self.rank = rank
        modules = [view.model.get_submodule(name) for name in targets]
        self.fan_in_fan_out = any(type(base_layer(module)).__name__ == "Conv1D" for module in modules)
        self.sizes = [features(module) for module in modules]
        self.init_std = init_std
        self.lora_A, self.lora_B = nn.ParameterList(), nn.ParameterList()
        for down, up in self._drawn(num_plans, seed):
            self.lora_A.append(nn.Parameter(down.to(view.model.device)))
            self.lora_B.append(nn.Parameter(up.to(view.model.device)))
        self._plan_ids: torch.Tensor | None = None
        for number, module in enumerate(modules):
            module.register_forward_hook(self._hook(number))

    def _drawn(self, count: int, seed: int) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        generator = torch.Generator().manual_seed(seed)
        for inner, outer in self.sizes:
            down = torch.randn(count, self.rank, inner, generator=generator) * inner**-0.5
            yield down, torch.randn(count, outer, self.rank, generator=generator) * self.init_std

    def add(self, count: int, seed: int) -> None:
        """Adds plans as they are at the start. The others stay as they are."""
        for number, drawn in enumerate(self._drawn(count, seed)):
            for of_all, new in zip((self.lora_A, self.lora_B), drawn, strict=True):
                old = of_all[number]
                grown = torch.cat([old.detach(), new.to(old)])
                of_all[number] = nn.Parameter(grown, requires_grad=old.requires_grad)
        self.num_plans += count

    def _hook(self, number: int):
        def add(module: nn.Module, args: tuple, output: torch.Tensor) -> torch.Tensor:
            if self._plan_ids is None:
                return output
            states = args[0]
            if states.ndim != 3 or len(states) != len(self._plan_ids):
                raise ValueError(
                    f"{self.targets[number]} was given {tuple(states.shape)}, which is not one row for each of the "
                    f"{len(self._plan_ids)} plans of the batch. Leave it out of `target_modules`."
                )
            down, up = self.lora_A[number][self._plan_ids], self.lora_B[number][self._plan_ids]
            change = states.to(down.dtype) @ down.transpose(1, 2) @ up.transpose(1, 2)
            return output + change.to(output.dtype)

        return add

    @contextmanager
    def active(self, plan_ids: torch.Tensor) -> Iterator[None]:
        """Inside the block row i of every batch carries plan `plan_ids[i]`, `[N]`."""
        before, self._plan_ids = self._plan_ids, plan_ids.to(self.lora_A[0].device)
        try:
            yield
        finally:
            self._plan_ids = before

    def lora_config(self, base_model_name_or_path: str | None) -> "LoraConfig":
        """What PEFT's record of each plan says."""
        from peft import LoraConfig

        return LoraConfig(
            r=self.rank,
            lora_alpha=self.rank,
            target_modules=self.targets,
            fan_in_fan_out=self.fan_in_fan_out,
            base_model_name_or_path=base_model_name_or_path,
            task_type="CAUSAL_LM",
            inference_mode=True,
        )

    @property
    def tensors(self) -> dict[str, torch.Tensor]:
        """Of all plans `[K, ...]`, by their names in the file of one."""
        found: dict[str, torch.Tensor] = {}
        for name, down, up in zip(self.targets, self.lora_A, self.lora_B, strict=True):
            found[f"{PREFIX}{name}.lora_A.weight"] = down.detach()
            found[f"{PREFIX}{name}.lora_B.weight"] = up.detach()
        return found

    def save_plan(self, plan: int, folder: str | Path, base_model_name_or_path: str | None) -> None:
        """Writes one plan as PEFT's LoRA, to be loaded by `PeftModel.from_pretrained(backbone, folder)`."""
        write_plan(plan, folder, self.lora_config(base_model_name_or_path), self.tensors)

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Of a plan's tensors, by their names in its file."""
        return plan_shapes(self.targets, self.sizes, self.rank)

    @torch.no_grad()
    def load_plan(self, plan: int, tensors: dict[str, torch.Tensor]) -> None:
        """Copies what [`read_plan`] gives into plan number `plan`."""
        for name, down, up in zip(self.targets, self.lora_A, self.lora_B, strict=True):
            down[plan].copy_(tensors[f"{PREFIX}{name}.lora_A.weight"])
            up[plan].copy_(tensors[f"{PREFIX}{name}.lora_B.weight"])


def write_plan(plan: int, folder: str | Path, config: "LoraConfig", tensors: dict[str, torch.Tensor]) -> None:
    """
    Writes one plan as PEFT's LoRA.

    Args:
        plan (`int`): Its number.
        folder (`str` or `Path`): Is made where it is not there.
        config (`LoraConfig`): Its record.
        tensors (`dict[str, torch.Tensor]`): Of all plans, as [`~PlanAdapters.tensors`].
    """
    from safetensors.torch import save_file

    config.save_pretrained(str(folder))
    own = {name: of_all[plan].cpu().clone() for name, of_all in tensors.items()}
    save_file(own, Path(folder) / ADAPTER_WEIGHTS, metadata={"format": "pt"})


def plan_shapes(targets: list[str], sizes: list[tuple[int, int]], rank: int) -> dict[str, tuple[int, ...]]:
    """
    Shapes of the tensors of a plan, by their names in its file.

    Args:
        targets (`list[str]`), sizes (`list[tuple[int, int]]`): Names of linear maps, and their widths.
        rank (`int`): Rows of `A`.
    """
    found: dict[str, tuple[int, ...]] = {}
    for name, (inner, outer) in zip(targets, sizes, strict=True):
        found[f"{PREFIX}{name}.lora_A.weight"] = (rank, inner)
        found[f"{PREFIX}{name}.lora_B.weight"] = (outer, rank)
    return found


def read_plan(folder: Path, shapes: dict[str, tuple[int, ...]], rank: int) -> dict[str, torch.Tensor]:
    """
    What [`~PlanAdapters.save_plan`] wrote.

    Raises:
        CheckpointError: When it is no LoRA of these `shapes` and this rank and alone.
    """
    source = folder / ADAPTER_CONFIG
    record = read_json(source)
    taken = plain_lora_fields(record, source)
    if record.get("peft_type") != "LORA" or (taken.get("r"), taken.get("lora_alpha")) != (rank, rank):
        raise CheckpointError(
            f"{folder} is a {record.get('peft_type')!r:.50} of rank {taken.get('r')} and alpha "
            f"{taken.get('lora_alpha')}; it must be a 'LORA', and both must be {rank}."
        )
    # What would make something else of the same tensors.
    more = sorted(name for name in taken.keys() - PLAN_FIELDS if taken[name] not in (False, "none", {}, []))
    if more:
        raise CheckpointError(f"{source} has {more}, which plans do not have.")
    given = check_weights(folder / ADAPTER_WEIGHTS)
    for name, shape in shapes.items():
        if given.get(name) != shape:
            raise CheckpointError(
                f"{folder} has {given.get(name)} for {name}, which takes {shape}: it is of another backbone, or of "
                "other linear maps."
            )
    if given.keys() - shapes.keys():
        raise CheckpointError(f"{folder} has tensors of other linear maps: {sorted(given.keys() - shapes.keys())[:3]}.")
    tensors = read_weights(folder / ADAPTER_WEIGHTS)
    check_range(tensors, dict.fromkeys(tensors, torch.float32), folder / ADAPTER_WEIGHTS)
    return tensors
