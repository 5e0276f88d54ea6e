"""Saving and loading a latent action model: one folder, a subfolder for each component, safetensors only."""

import json
import os
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id
from safetensors.torch import save_file
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    PreTrainedConfig,
    PreTrainedModel,
)
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES as CAUSAL_MODELS
from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES as IMAGE_TEXT_MODELS

from ..checkpoint.atomic_folder import atomic_folder
from ..checkpoint.configuration import LatentActionConfig, check_counts
from ..checkpoint.files import (
    ADAPTER_FOLDER,
    CONFIG_FILE,
    OWNED_NAMES,
    PROCESSOR_RECORDS,
    REPORT_FILE,
    TUNED_FOLDER,
    WEIGHTS_NAME,
    CheckpointError,
    check_range,
    has_folder,
    read_config,
    read_json,
    read_weights,
    resolve_folder,
    tensor_metadata,
)
from ..hub.push import push_model
from .adapter import BackboneAdapter, check_adapter_config, load_adapter, plain_names, read_adapter, tensors_of
from .component import whole_tensors
from .whole_loading import loaded_whole


def package_versions() -> dict[str, str]:
    """Versions of the packages that a checkpoint depends on."""
    from importlib.metadata import version

    return {name: version(name) for name in ("torch", "transformers", "trl", "peft")}


class LatentActionCheckpointMixin:
    """`save_pretrained`, `from_pretrained` and `push_to_hub` of a latent action model (`docs/checkpoint_format.md`)."""

    # What PEFT put on the backbone; see `peft_backbone`.
    adapter: BackboneAdapter | None

    def save_pretrained(
        self,
        save_directory: str | Path,
        is_main_process: bool = True,
        components: list[str] | None = None,
        state_dict: dict[str, torch.Tensor] | None = None,
        **kwargs: Any,
    ) -> None:
        """
        Writes the components, and the parts of the backbone that were trained. The backbone itself is not copied.

        Args:
            save_directory (`str` or `Path`): Folder; what is in it is replaced in one step, other files stay.
            is_main_process (`bool`, defaults to `True`): Only this process writes.
            components (`list[str]`, *optional*): Names of the components to write. All that are there by default.
            state_dict (`dict`, *optional*): Whole tensors by the model's names, where the parameters are sharded.

        Raises:
            ValueError: When a tensor to be written is sharded, empty or not in `state_dict`. Nothing is written then.
        """
        if not is_main_process:
            return
        present = [name for name in self.component_classes if getattr(self, name) is not None]
        wanted = present if components is None else components
        unknown = [name for name in wanted if name not in present]
        if unknown:
            raise ValueError(f"`components` must be among {present}, got {unknown}.")
        shapes: dict[str, dict[str, list[int]]] = {}
        peft_backbone = self.peft_backbone
        backbone = tensors_of(self.backbone) if state_dict is None else _part(state_dict, "backbone.")
        tuned = self._tuned_tensors(backbone)
        with atomic_folder(Path(save_directory), OWNED_NAMES) as folder:
            for name in wanted:
                component = getattr(self, name)
                tensors = None if state_dict is None else _part(state_dict, f"{name}.")
                component.save_pretrained(folder / name, state_dict=tensors)
                written = tensor_metadata(folder / name / WEIGHTS_NAME)
                shapes[name] = {tensor: list(shape) for tensor, (_, shape) in written.items()}
            if tuned:
                (folder / TUNED_FOLDER).mkdir()
                save_file(tuned, folder / TUNED_FOLDER / WEIGHTS_NAME, metadata={"format": "pt"})
            if peft_backbone is not None:
                for adapter_config in peft_backbone.peft_config.values():
                    adapter_config.base_model_name_or_path = self.config.base_model_name_or_path
                peft_backbone.save_pretrained(folder / ADAPTER_FOLDER, state_dict=self._adapter_tensors(backbone))
                # PEFT's card is a template that names the backbone's folder on this machine; the model has its own.
                (folder / ADAPTER_FOLDER / "README.md").unlink(missing_ok=True)
            record = {
                **self.config.to_dict(),
                "components": wanted,
                "code_width": self.backbone_view.hidden_size,
                "hidden_size": self.backbone_view.hidden_size,
                "layer_shapes": shapes,
                "package_versions": package_versions(),
            }
            if self.training_report:
                report = json.dumps(self.training_report, indent=1) + "\n"
                (folder / REPORT_FILE).write_text(report, encoding="utf-8")
            (folder / CONFIG_FILE).write_text(json.dumps(record, indent=2, sort_keys=True) + "\n", encoding="utf-8")

    @classmethod
    def from_pretrained(
        cls,
        repo_or_folder: str | Path,
        backbone: PreTrainedModel | None = None,
        *,
        subfolder: str | None = None,
        revision: str | None = None,
        token: str | bool | None = None,
        cache_dir: str | Path | None = None,
        local_files_only: bool = False,
        is_trainable: bool = False,
        **backbone_kwargs: Any,
    ):
        """
        Loads a latent action model.

        Args:
            repo_or_folder (`str` or `Path`): Folder or Hub id.
            backbone (`PreTrainedModel`, *optional*): The backbone; by default the base model that the checkpoint names
                is loaded with `backbone_kwargs` (`dtype`, `quantization_config`, `device_map`, ...).
            subfolder, revision, token, cache_dir, local_files_only: As in `huggingface_hub`.
            is_trainable (`bool`, defaults to `False`): Whether an adapter is loaded for further training.

        Raises:
            CheckpointError: When a file is missing or damaged, or belongs to another backbone. Nothing is initialised
                at random, and a given backbone is left as it was.
        """
        folder = resolve_folder(repo_or_folder, subfolder, revision, token, cache_dir, local_files_only)
        config, names = read_config(folder)
        components = {name: cls.component_classes[name].from_pretrained(folder, subfolder=name) for name in names}
        report = read_json(folder / REPORT_FILE) if (folder / REPORT_FILE).is_file() else None
        tuned = folder / TUNED_FOLDER / WEIGHTS_NAME
        tuned_tensors = read_weights(tuned) if has_folder(folder, TUNED_FOLDER) and tuned.exists() else {}
        if backbone is None:
            if not config.base_model_name_or_path:
                raise CheckpointError(f"{folder} names no base model. Pass `backbone=`.")
            backbone = load_backbone(
                config.base_model_name_or_path,
                **{
                    "revision": config.base_model_revision,
                    "token": token,
                    "cache_dir": cache_dir,
                    "local_files_only": local_files_only,
                    **backbone_kwargs,
                },
            )
        elif backbone_kwargs:
            raise ValueError(f"`backbone` is given, so {sorted(backbone_kwargs)} have nothing to apply to.")
        _check_components(config, components)
        _check_backbone(config, backbone)
        adapter = read_adapter(folder / ADAPTER_FOLDER) if has_folder(folder, ADAPTER_FOLDER) else None
        own = dict(backbone.named_parameters(remove_duplicate=False))
        wrong = [name for name, t in tuned_tensors.items() if name not in own or own[name].shape != t.shape]
        if wrong:
            raise CheckpointError(f"{tuned}: tensors {wrong[:5]} are not the backbone's.")
        check_range(tuned_tensors, {name: own[name].dtype for name in tuned_tensors}, tuned)
        adapter = load_adapter(backbone, *adapter, is_trainable) if adapter is not None else None
        # The model freezes its backbone; an adapter that is loaded to be trained is not frozen with it.
        trainable = [p for p in backbone.parameters() if p.requires_grad and adapter is not None]
        model = cls(config, backbone, components)
        model.adapter = adapter
        for parameter in trainable:
            parameter.requires_grad_(True)
        for component in components.values():
            component.to(device=backbone.device)
        with torch.no_grad():
            for name, tensor in tuned_tensors.items():
                own[name].copy_(tensor)
        model.tuned_backbone_tensors = list(tuned_tensors)
        model.name_or_path = str(repo_or_folder)
        if any((folder / name).is_file() for name in PROCESSOR_RECORDS):
            model.processor_folder = folder
        if report is not None:
            model.training_report = report
        return model.eval()

    def push_to_hub(self, repo_id: str, *, components: list[str] | None = None, **kwargs: Any):
        """
        Uploads the components, and the parts of the backbone that were trained, in one commit.

        Args:
            repo_id (`str`): `"user/name"`.
            components (`list[str]`, *optional*): Names of the components to upload. All that are there by default.
            kwargs: `private`, `revision`, `create_pr`, `commit_message`, `token`, and `license`, `tags` and `title` of
                the card, as in [`~latent_trl.hub.push.push_model`].

        Returns:
            `huggingface_hub.CommitInfo`.
        """
        return push_model(self, repo_id, components=components, **kwargs)

    def add_adapter(self, peft_config) -> None:
        """
        Puts a PEFT adapter on the backbone's text model.

        Args:
            peft_config (`PeftConfig`): `target_modules` left out means every linear map of the text model.
        """
        if self.peft_backbone is not None:
            raise ValueError(
                "The backbone has an adapter already. Train that one (loaded with `is_trainable=True`), or merge it "
                "first: `model.peft_backbone.merge_and_unload()`."
            )
        check_adapter_config(peft_config)
        # Where PEFT is told of single parameters, it is not to adapt anything else.
        if peft_config.target_modules == "all-linear" or not (
            peft_config.target_modules or vars(peft_config).get("target_parameters")
        ):
            peft_config.target_modules = self.backbone_view.linear_names()
        self.adapter = BackboneAdapter(self.backbone, peft_config)

    @property
    def peft_backbone(self) -> Any:
        """The backbone as a `PeftModel`; `None` without an adapter, or when PEFT has merged it and taken it off."""
        if self.adapter is not None and not self.adapter.is_on(self.backbone):
            self.tuned_backbone_tensors = sorted({*self.tuned_backbone_tensors, *self.adapter.changed})
            self.adapter = None
        return None if self.adapter is None else self.adapter.peft_model

    def _adapter_tensors(self, backbone: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """PEFT's names, and the tensors of `backbone`, of what PEFT saves."""
        named = {id(tensor): name for name, tensor in tensors_of(self.backbone).items()}
        own = {name: named[id(tensor)] for name, tensor in tensors_of(self.peft_backbone).items()}
        adapter = [name for name, inner in own.items() if inner in self.adapter.trained]
        whole_tensors({name: backbone.get(own[name]) for name in adapter}, "the adapter")
        return {name: backbone[inner] for name, inner in own.items() if inner in backbone}

    def _tuned_tensors(self, backbone: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """
        The tensors of `tuned_backbone_tensors`, from `backbone`, the backbone's whole tensors by their names.

        Raises:
            ValueError: When tuned ones could not be put back into the base model.
        """
        own = tensors_of(self.backbone)
        names = {plain: name for name, plain in plain_names(self.backbone).items()}
        tensors = {plain: own[name] for plain, name in names.items()}
        tuned = set(self.tuned_backbone_tensors)
        if not all(tensors[name].is_floating_point() for name in tuned):
            raise ValueError(
                "The adapter was merged into a quantised backbone, whose tensors cannot be saved. Save the model with "
                "its adapter, load it on a backbone that is not quantised, and merge it there."
            )
        for name, twin in (getattr(self.backbone, "all_tied_weights_keys", None) or {}).items():
            if tuned & {name, twin} and tensors[name].data_ptr() != tensors[twin].data_ptr():
                raise ValueError(
                    f"The backbone's {name!r} and {twin!r} are one tensor in the base model, and two since the adapter "
                    "was merged, which a checkpoint cannot hold. Save the model before it is merged."
                )
        return whole_tensors({name: backbone.get(names[name]) for name in self.tuned_backbone_tensors}, "the backbone")


def _part(state_dict: dict[str, torch.Tensor], prefix: str) -> dict[str, torch.Tensor]:
    return {name.removeprefix(prefix): tensor for name, tensor in state_dict.items() if name.startswith(prefix)}


def load_backbone(name_or_path: str, **kwargs: Any) -> PreTrainedModel:
    """Loads an image-text-to-text or causal model, whichever its configuration is of."""
    # A checkpoint names its base model, so nothing of that model's repository may run unless the caller says so.
    kwargs = {"trust_remote_code": False, "use_safetensors": True, **kwargs}
    shared = ("revision", "token", "cache_dir", "local_files_only", "trust_remote_code")
    hub = {k: kwargs.get(k) for k in shared if kwargs.get(k) is not None}
    kwargs = {k: v for k, v in kwargs.items() if v is not None}
    if not os.path.isdir(name_or_path):
        try:
            validate_repo_id(name_or_path)
        except HFValidationError as error:
            raise CheckpointError(
                f"The base model {name_or_path!r:.300} is no folder, and no id of the Hub. Pass `backbone=`."
            ) from error
    _check_known(name_or_path, hub)
    config = AutoConfig.from_pretrained(name_or_path, **hub)
    is_vlm = type(config) in AutoModelForImageTextToText._model_mapping
    auto = AutoModelForImageTextToText if is_vlm else AutoModelForCausalLM
    with loaded_whole():
        return auto.from_pretrained(name_or_path, **kwargs)


def _check_known(name_or_path: str, hub: dict[str, Any]) -> None:
    """Says what can be done about a model that is none of transformers' own."""
    values, _ = PreTrainedConfig.get_config_dict(name_or_path, **hub)
    check_counts(values)
    kind = values.get("model_type")
    own_code = "auto_map" in values and hub.get("trust_remote_code")
    if kind is None or own_code or kind in {*CAUSAL_MODELS, *IMAGE_TEXT_MODELS}:
        return
    raise ValueError(
        f"{name_or_path!r} is a model of type {kind!r}, which is none of transformers' own causal or image-text-to-"
        "text models, and no code of a repository is run unless you say so. Load it yourself, and pass the model: "
        "`LatentActionModel.from_backbone(model)`, or `backbone=model` where a checkpoint is loaded; or pass "
        "`trust_remote_code=True`."
    )


def _check_backbone(config: LatentActionConfig, backbone: PreTrainedModel) -> None:
    from .backbone import Backbone

    view = Backbone(backbone)
    if view.hidden_size != config.text_config.hidden_size:
        raise CheckpointError(
            f"The checkpoint is for hidden size {config.text_config.hidden_size}, the backbone's is {view.hidden_size}."
        )
    if not view.fits((config.backbone_fingerprint, config.backbone_fingerprint_float16)):
        hint = ""
        if backbone.dtype in (torch.float16, torch.bfloat16):
            precision = str(backbone.dtype).removeprefix("torch.")
            hint = (
                f" Or they were rounded: it is in {precision}, and float16 and bfloat16 round a "
                "float32 model differently. Load it with `dtype=torch.float32`, and convert afterwards "
                "(`model.to(...)`)."
            )
        raise CheckpointError(
            f"The backbone's tensors are not those that the checkpoint was trained on "
            f"({config.base_model_name_or_path!r}, revision {config.base_model_revision!r}).{hint}"
        )


def _check_components(config: LatentActionConfig, components: dict[str, Any]) -> None:
    for name, component in components.items():
        for key in ("num_codes", "hidden_size"):
            want = config.num_codes if key == "num_codes" else config.text_config.hidden_size
            got = getattr(component, key, want)
            if got != want:
                raise CheckpointError(f"The {name} has {key}={got}, the checkpoint's configuration says {want}.")
    for name, key, want in (
        ("world_model", "read_out", config.read_out),
        ("world_model", "intermediate_size", config.world_model_intermediate_size),
        ("projector", "residual", config.projector_residual),
    ):
        got = getattr(components[name], key) if name in components else want
        if got != want:
            raise CheckpointError(f"The {name} has {key}={got!r}, the checkpoint's configuration says {want!r}.")
