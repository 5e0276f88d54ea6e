"""Configuration of a [`PlanModel`]: what its folder says of it."""

import json
from collections.abc import Callable
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from ..checkpoint.files import CheckpointError, read_json
from ..checkpoint.plan_files import PLAN_CONFIG
from ..models.checkpoint import package_versions

SCHEMA_VERSION = 1
# Of what sizes follow from: the least that makes sense, and far more than anybody has use for.
BOUNDS = {
    "num_plans": (2, 10_000),
    "rank": (1, 4096),
    "chooser_layers": (1, 10_000),
    "chooser_size": (4, 4096),
    "seed": (0, 2**63 - 1),
}
MAX_INT = 2**31 - 1
TEXTS = ("base_model_name_or_path", "base_model_revision", "backbone_fingerprint")
TOKEN_IDS = ("segment_end_token_ids", "vision_token_ids")


@dataclass
class PlanConfig:
    """
    Configuration of a [`PlanModel`].

    Args:
        num_plans (`int`, defaults to `16`): K, the size of the codebook of plans.
        depth (`int`, *optional*): Decoder layers that carry no plan. Half of them by default.
        rank (`int`, defaults to `4`): Of a plan's low-rank products.
        init_std (`float`, defaults to `0.2`): Standard deviation of the up-projections at the start. Plans must differ
            from the start; much more, and they no longer speak whole sentences.
        target_modules (`list[str]`, *optional*): Ends of names of the linear maps that plans change, as in PEFT. By
            default those that write to the residual stream.
        chooser_layers (`int`, defaults to `4`): Decoder layers whose prompt states the chooser reads, evenly spaced.
        chooser_size (`int`, defaults to `256`): Width of the chooser.
        chooser_reads_plans (`bool`, defaults to `False`): Whether the chooser also reads the state that each plan gives
            the last position, so that what is learned of one plan is known of the others. It takes one more token of
            the backbone a plan wherever a plan is chosen.
        segment (`str` or `int`, defaults to `"answer"`): How long a plan is held: for the whole `"answer"`, for a
            `"sentence"`, for so many tokens, or until a learned `"switch"` ends it. A long answer needs a plan a
            sentence.
        segment_end_token_ids (`list[int]`, *optional*): Tokens that end a sentence. Filled in by the trainers from the
            tokenizer.
        seed (`int`, defaults to `0`): Of the start of plans and chooser.
        base_model_name_or_path (`str`, *optional*), base_model_revision (`str`, *optional*): The backbone, and its
            commit on the Hub. Filled in by [`PlanModel`].
        backbone_fingerprint (`str`, *optional*): Of the backbone's tensors. Filled in by [`PlanModel`].
        vision_token_ids (`list[int]`, *optional*): Of the backbone's visual tokens; empty for a text model. Filled in
            by [`PlanModel`].
        has_adapter (`bool`, defaults to `False`): Whether the backbone carries a LoRA, which is saved in the folder
            `adapter`. Filled in by [`PlanModel`].
    """

    num_plans: int = 16
    depth: int | None = None
    rank: int = 4
    init_std: float = 0.2
    target_modules: list[str] | None = None
    chooser_layers: int = 4
    chooser_size: int = 256
    chooser_reads_plans: bool = False
    segment: str | int = "answer"
    segment_end_token_ids: list[int] | None = None
    seed: int = 0
    base_model_name_or_path: str | None = None
    base_model_revision: str | None = None
    backbone_fingerprint: str | None = None
    vision_token_ids: list[int] | None = None
    has_adapter: bool = False

    def __post_init__(self):
        for name, (least, most) in BOUNDS.items():
            value = getattr(self, name)
            if type(value) is not int or not least <= value <= most:
                raise ValueError(f"`{name}` must be an integer from {least} to {most}, got {value!r:.100}.")
        if self.depth is not None and (type(self.depth) is not int or not 0 <= self.depth <= MAX_INT):
            raise ValueError(f"`depth` must be a number of layers, or None; got {self.depth!r:.100}.")
        if self.segment not in ("answer", "sentence", "switch") and (
            type(self.segment) is not int or not 1 <= self.segment <= MAX_INT
        ):
            raise ValueError(
                "`segment` must be 'answer', 'sentence', 'switch' or a number of tokens of at least 1, got "
                f"{self.segment!r:.100}."
            )
        self.check_switch()
        is_number = type(self.init_std) in (int, float)
        if not (is_number and 0 < self.init_std <= MAX_INT):
            raise ValueError(
                f"`init_std` must be a number above 0, or all plans are the same; got {self.init_std!r:.100}."
            )
        for name in ("has_adapter", "chooser_reads_plans"):
            if type(getattr(self, name)) is not bool:
                raise ValueError(f"`{name}` must be True or False, got {getattr(self, name)!r:.100}.")
        for name in TEXTS:
            if not isinstance(getattr(self, name), str | None):
                raise ValueError(f"`{name}` must be a text or None, got {getattr(self, name)!r:.100}.")
        for name in TOKEN_IDS:
            if not _are(getattr(self, name), lambda i: type(i) is int and 0 <= i <= MAX_INT):
                raise ValueError(f"`{name}` must be a list of token ids or None, got {getattr(self, name)!r:.100}.")
        if not _are(self.target_modules, lambda end: isinstance(end, str)) or self.target_modules == []:
            raise ValueError(
                f"`target_modules` must be a list of ends of names, or None; got {self.target_modules!r:.100}."
            )

    def check_switch(self) -> None:
        """Raises `ValueError` for a switch that has no states below the plans to read."""
        if self.segment == "switch" and self.depth == 0:
            raise ValueError(
                "`segment='switch'` reads the states below the plans, and `depth` is 0: there are none. Take a `depth` "
                "of at least 1, or `segment='sentence'`."
            )

    def save(self, folder: str | Path) -> None:
        record = {"schema_version": SCHEMA_VERSION, **asdict(self), "package_versions": package_versions()}
        (Path(folder) / PLAN_CONFIG).write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")

    @classmethod
    def load(cls, folder: str | Path) -> "PlanConfig":
        """
        Raises:
            CheckpointError: When the folder has no such record, or one of a later version.
        """
        record = read_json(Path(folder) / PLAN_CONFIG)
        version = record.pop("schema_version", None)
        if type(version) is not int or version != SCHEMA_VERSION:
            raise CheckpointError(f"{folder} was not written as version {SCHEMA_VERSION} of the format of plans.")
        # For people and the card.
        record.pop("package_versions", None)
        unknown = record.keys() - {field.name for field in fields(cls)}
        if unknown:
            raise CheckpointError(f"{Path(folder) / PLAN_CONFIG} has unknown fields: {sorted(unknown)}.")
        try:
            return cls(**record)
        except (ValueError, TypeError) as error:
            raise CheckpointError(f"{Path(folder) / PLAN_CONFIG}: {error}") from error


def _are(values: Any, kind: Callable[[Any], bool]) -> bool:
    """Whether `values` is `None`, or a list of what `kind` says."""
    return values is None or (isinstance(values, list) and all(map(kind, values)))
