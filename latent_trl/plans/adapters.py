"""Plans: K low-rank adapters of a frozen text model, of which each row of a batch carries one."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import nn

from ..checkpoint.files import CheckpointError, read_json, read_weights
from ..checkpoint.plan_files import ADAPTER_CONFIG, ADAPTER_WEIGHTS
from ..models.backbone import Backbone
from .targets import base_layer, features

PREFIX = "base_model.model."


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

    def save_plan(self, plan: int, folder: str | Path, base_model_name_or_path: str | None) -> None:
        """Writes one plan as PEFT's LoRA, to be loaded by `PeftModel.from_pretrained(backbone, folder)`."""
        from peft import LoraConfig
        from safetensors.torch import save_file

        config = LoraConfig(
            r=self.rank,
            lora_alpha=self.rank,
            target_modules=self.targets,
            fan_in_fan_out=self.fan_in_fan_out,
            base_model_name_or_path=base_model_name_or_path,
            task_type="CAUSAL_LM",
            inference_mode=True,
        )
        config.save_pretrained(str(folder))
        tensors = {}
        for name, down, up in zip(self.targets, self.lora_A, self.lora_B, strict=True):
            tensors[f"{PREFIX}{name}.lora_A.weight"] = down[plan].detach().cpu().clone()
            tensors[f"{PREFIX}{name}.lora_B.weight"] = up[plan].detach().cpu().clone()
        save_file(tensors, Path(folder) / ADAPTER_WEIGHTS, metadata={"format": "pt"})

    def read_plan(self, plan: int, folder: str | Path) -> list[tuple[nn.Parameter, torch.Tensor]]:
        """
        What [`~PlanAdapters.save_plan`] wrote, beside the parameters that it is of: `[K, ...]` and `[...]`.

        Raises:
            CheckpointError: When it is no LoRA of these linear maps and this rank.
        """
        folder = Path(folder)
        record, tensors = read_json(folder / ADAPTER_CONFIG), read_weights(folder / ADAPTER_WEIGHTS)
        if (record.get("r"), record.get("lora_alpha")) != (self.rank, self.rank):
            raise CheckpointError(
                f"{folder} has rank {record.get('r')} and alpha {record.get('lora_alpha')}; both must be {self.rank}."
            )
        found = []
        for name, down, up in zip(self.targets, self.lora_A, self.lora_B, strict=True):
            for letter, own in (("A", down), ("B", up)):
                tensor = tensors.pop(f"{PREFIX}{name}.lora_{letter}.weight", None)
                if tensor is None or tensor.shape != own[plan].shape:
                    shape = None if tensor is None else tuple(tensor.shape)
                    raise CheckpointError(
                        f"{folder} has {shape} for {letter} of {name}, which takes {tuple(own[plan].shape)}: it is of "
                        "another backbone, or of other linear maps."
                    )
                found.append((own, tensor))
        if tensors:
            raise CheckpointError(f"{folder} has tensors of other linear maps: {sorted(tensors)[:3]}.")
        return found
