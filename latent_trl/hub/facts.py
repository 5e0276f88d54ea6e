"""What is known of a checkpoint and of the runs that made it, as plain data: cards and `latent-trl inspect` read it."""

import json
import math
from collections import Counter
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, get_origin, get_type_hints

from ..checkpoint.files import (
    ADAPTER_FOLDER,
    CONFIG_FILE,
    CONFIG_NAME,
    REPORT_FILE,
    WEIGHTS_NAME,
    CheckpointError,
    has_folder,
    read_json,
    tensor_metadata,
)
from ..checkpoint.plan_files import (
    ADAPTER_CONFIG,
    ADAPTER_WEIGHTS,
    CHOOSER_FILE,
    PLAN_CONFIG,
    PLAN_FOLDER,
    plan_folder,
    plan_folders,
)

COMPONENT_FOLDERS = ("codebook", "projector", "policy", "world_model", "inverse_dynamics", "value_head")
TENSOR_FILES = {
    **{name: f"{name}/{WEIGHTS_NAME}" for name in COMPONENT_FOLDERS},
    ADAPTER_FOLDER: f"{ADAPTER_FOLDER}/{ADAPTER_WEIGHTS}",
    "backbone": f"backbone/{WEIGHTS_NAME}",
}
MAX_HISTORY = 400
MAX_PLANS = 10_000


def part_file(part: str) -> str | None:
    """The tensor file of a part of a checkpoint, by its name: a component, a plan or the chooser; `None` for others."""
    if PLAN_FOLDER.fullmatch(part):
        return f"{part}/{ADAPTER_WEIGHTS}"
    return CHOOSER_FILE if part == "chooser" else TENSOR_FILES.get(part)


def part_files(names: Iterable[str]) -> dict[str, str]:
    """Of the names of a checkpoint's files, those that hold tensors, by the part's name."""
    names = set(names)
    parts = [*TENSOR_FILES, "chooser", *sorted({name.split("/")[0] for name in names if "/" in name})]
    found = {part: part_file(part) for part in parts}
    return {part: file for part, file in found.items() if file in names}


@dataclass
class TrainingRun:
    """
    One run of a trainer.

    Args:
        method (`str`): Such as `"Latent-action PPO"`.
        trained (`list[str]`): What was trained.
        data (`dict`): `datasets` (names), `rows`, `text_rows`, `columns`; what is not known is left out.
        hyperparameters (`dict`): Settings that differ from the defaults, and the learning rate, batch and seed.
        history (`list[dict]`): Logged metrics, a row a logging step.
        reward_functions (`list[str]`): Their names, for RL.
    """

    method: str
    trained: list[str] = field(default_factory=list)
    data: dict[str, Any] = field(default_factory=dict)
    hyperparameters: dict[str, Any] = field(default_factory=dict)
    history: list[dict[str, Any]] = field(default_factory=list)
    reward_functions: list[str] = field(default_factory=list)

    def __post_init__(self):
        self.history = thinned(self.history)


@dataclass
class Evaluation:
    """
    One measured figure.

    Args:
        dataset (`str`): Name of the data set, a Hub id where it has one.
        metric (`str`): Such as `"exact_match"`.
        value (`float`): The figure.
        split (`str`, defaults to `"test"`): Of the data set.
        low (`float`, *optional*), high (`float`, *optional*): Bounds of the interval, and
        interval (`str`, *optional*): what it is, such as `"95 % over 5 seeds"`.
        note (`str`, *optional*): Such as the command that makes the figure.
    """

    dataset: str
    metric: str
    value: float
    split: str = "test"
    low: float | None = None
    high: float | None = None
    interval: str | None = None
    note: str | None = None

    def __post_init__(self):
        if isinstance(self.value, bool) or not isinstance(self.value, (int, float)) or not math.isfinite(self.value):
            raise ValueError(f"`value` of {self.metric!r} must be a finite number, got {self.value!r}.")


@dataclass
class CodebookReport:
    """
    How codes are used.

    Args:
        counts (`list[int]`): `[K]`, how often each code was chosen.
        over (`str`): What was counted, such as `"300 answers to held-out questions"`.
        codes (`list[dict]`): Of the most used codes: `code`, `tokens` (pairs of text and count) and `examples`.
    """

    counts: list[int]
    over: str = "answers"
    codes: list[dict[str, Any]] = field(default_factory=list)

    @classmethod
    def from_choices(
        cls,
        action_ids: list[list[int]],
        num_codes: int,
        tokens: list[list[str]] | None = None,
        texts: list[str] | None = None,
        over: str | None = None,
        most_used: int = 16,
        per_code: int = 5,
    ) -> "CodebookReport":
        """
        Counts codes in answers.

        Args:
            action_ids (`list[list[int]]`): The codes of each answer.
            num_codes (`int`): K.
            tokens (`list[list[str]]`, *optional*): The token that each code emitted.
            texts (`list[str]`, *optional*): The answers, for examples.
            over (`str`, *optional*): What the answers are. Defaults to their number.
            most_used (`int`, defaults to `16`), per_code (`int`, defaults to `5`): How much is kept.
        """
        counts: Counter[int] = Counter()
        emitted: dict[int, Counter[str]] = {code: Counter() for code in range(num_codes)}
        examples: dict[int, list[str]] = {code: [] for code in range(num_codes)}
        for row, codes in enumerate(action_ids):
            counts.update(codes)
            if tokens is not None:
                for code, token in zip(codes, tokens[row], strict=True):
                    emitted[code][token] += 1
            if texts is not None:
                for code in dict.fromkeys(codes):
                    if len(examples[code]) < 2 and texts[row] not in examples[code]:
                        examples[code].append(texts[row][:120])
        kept = [
            {
                "code": code,
                "tokens": [list(pair) for pair in emitted[code].most_common(per_code)],
                "examples": examples[code],
            }
            for code, _ in counts.most_common(most_used)
        ]
        return cls([counts[code] for code in range(num_codes)], over or f"{len(action_ids)} answers", kept)

    @property
    def used(self) -> int:
        return sum(count > 0 for count in self.counts)

    @property
    def dead(self) -> list[int]:
        """Codes that were never chosen."""
        return [code for code, count in enumerate(self.counts) if not count]

    @property
    def perplexity(self) -> float:
        """exp of the entropy of the usage: how many codes an even usage of this entropy would have."""
        total = sum(self.counts)
        shares = [count / total for count in self.counts if count]
        return math.exp(-sum(share * math.log(share) for share in shares)) if total else 0.0


@dataclass
class PlansReport:
    """
    What plans say.

    Args:
        over (`str`): What they answered, such as `"60 held-out prompts"`.
        plans (`list[dict]`): Of each: `plan`, its number; `reward`, the mean of its answers, and `chosen`, the share of
            prompts for which it is the choice, or `None`; `answers`, pairs of text and count, the most frequent first.
    """

    over: str
    plans: list[dict[str, Any]] = field(default_factory=list)


@dataclass
class TrainingReport:
    """`training_report.json`: the runs, the usage of codes and the figures that a checkpoint travels with."""

    runs: list[TrainingRun] = field(default_factory=list)
    codebook: CodebookReport | None = None
    evaluation: list[Evaluation] = field(default_factory=list)
    plans: PlansReport | None = None

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_dict(cls, record: dict[str, Any]) -> "TrainingReport":
        """Raises [`CheckpointError`] for another shape, or values of the wrong type."""
        try:
            codebook, plans = record.get("codebook"), record.get("plans")
            report = cls(
                runs=[_checked(TrainingRun, run) for run in record.get("runs", [])],
                codebook=None if codebook is None else _checked(CodebookReport, codebook),
                evaluation=[_checked(Evaluation, one) for one in record.get("evaluation", [])],
                plans=None if plans is None else _checked(PlansReport, plans),
            )
        except (TypeError, ValueError, AttributeError) as error:
            raise CheckpointError(f"The training report has a value that cannot be used: {error}.") from error
        if report.codebook and not all(type(count) is int and count >= 0 for count in report.codebook.counts):
            raise CheckpointError("The training report has a value that cannot be used: `counts` are not numbers.")
        if report.codebook and not all(
            _describes_code(one, len(report.codebook.counts)) for one in report.codebook.codes
        ):
            raise CheckpointError("The training report has a value that cannot be used: `codes` describe no codes.")
        if report.plans and not all(map(_describes_plan, report.plans.plans)):
            raise CheckpointError("The training report has a value that cannot be used: `plans` describe no plans.")
        return report

    @classmethod
    def read(cls, folder: str | Path) -> "TrainingReport":
        """The report of a folder; an empty one where there is none."""
        path = Path(folder) / REPORT_FILE
        return cls.from_dict(read_json(path)) if path.is_file() else cls()

    def write(self, folder: str | Path) -> Path:
        path = Path(folder) / REPORT_FILE
        path.write_text(json.dumps(self.to_dict(), indent=1) + "\n", encoding="utf-8")
        return path


def _checked(kind: type, record: dict[str, Any]):
    """A data class from JSON, whose lists, dicts and texts are what they should be."""
    value = kind(**record)
    for name, hint in get_type_hints(kind).items():
        wanted = get_origin(hint) or hint
        if wanted in (list, dict, str) and not isinstance(getattr(value, name), wanted):
            raise TypeError(f"{name!r} must be a {wanted.__name__}, got {type(getattr(value, name)).__name__}")
    return value


def _describes_plan(one: Any) -> bool:
    """Whether an entry of `PlansReport.plans` is what the class says."""
    if not isinstance(one, dict) or type(one.get("plan")) is not int:
        return False
    numbers = [one.get("reward"), one.get("chosen")]
    return _are_counted(one.get("answers", [])) and all(n is None or isinstance(n, (int, float)) for n in numbers)


def _are_counted(pairs: Any) -> bool:
    return isinstance(pairs, list) and all(
        isinstance(pair, (list, tuple)) and len(pair) == 2 and type(pair[1]) is int for pair in pairs
    )


def _describes_code(one: Any, number: int) -> bool:
    """Whether an entry of `CodebookReport.codes` is what the class says."""
    if not isinstance(one, dict) or type(one.get("code")) is not int or not 0 <= one["code"] < number:
        return False
    return _are_counted(one.get("tokens", [])) and isinstance(one.get("examples", []), list)


def thinned(history: list[dict[str, Any]], limit: int = MAX_HISTORY) -> list[dict[str, Any]]:
    """At most `limit` rows, evenly spread and with the last, holding finite numbers and short texts alone."""
    if len(history) > limit:
        history = [history[round(i * (len(history) - 1) / (limit - 1))] for i in range(limit)]
    return [{name: value for name, value in row.items() if _plain(value)} for row in history]


def _plain(value: Any) -> bool:
    if isinstance(value, float):
        return math.isfinite(value)
    return isinstance(value, int) or (isinstance(value, str) and len(value) < 200)


@dataclass
class ComponentFacts:
    """Tensors of one component, from the header of its file, and the arguments that it was made with."""

    shapes: dict[str, tuple[int, ...]]
    dtypes: list[str]
    config: dict[str, Any]

    @property
    def parameters(self) -> int:
        return sum(math.prod(shape) for shape in self.shapes.values())


Header = dict[str, tuple[str, tuple[int, ...]]]


def component_facts(folder: str | Path, headers: dict[str, Header] | None = None) -> dict[str, ComponentFacts]:
    """
    The components of a checkpoint, without reading a weight. A component's own folder has one, under its own name.

    Args:
        folder (`str` or `Path`): The checkpoint.
        headers (`dict`, *optional*): Headers of tensor files that are elsewhere, by their names in the checkpoint.

    Raises:
        CheckpointError: When a file is damaged or is not what its name says.
    """
    folder = Path(folder)
    given = headers or {}
    here = [name for name in (*TENSOR_FILES, *(plan_folders(folder) if folder.is_dir() else ()))]
    names = {file for name in here if has_folder(folder, name) and (folder / (file := part_file(name) or "")).exists()}
    if (folder / CHOOSER_FILE).exists():
        names.add(CHOOSER_FILE)
    files = {name: folder / file for name, file in part_files(names | set(given)).items()}
    if not files and (folder / WEIGHTS_NAME).exists():
        kind = read_json(folder / CONFIG_NAME).get("component")
        files = {str(kind): folder / WEIGHTS_NAME}
    found = {}
    for name, path in files.items():
        file = path.relative_to(folder).as_posix()
        metadata = given[file] if file in given else tensor_metadata(path)
        config_file = path.with_name(ADAPTER_CONFIG if path.name == ADAPTER_WEIGHTS else CONFIG_NAME)
        found[name] = ComponentFacts(
            {tensor: shape for tensor, (_, shape) in metadata.items()},
            sorted({dtype for dtype, _ in metadata.values()}),
            read_json(config_file) if config_file.is_file() else {},
        )
    return found


def read_record(folder: str | Path) -> dict[str, Any]:
    """`latent_action_config.json` or `plan_config.json` as it is; empty where a folder holds bare components."""
    path = next((Path(folder) / name for name in (CONFIG_FILE, PLAN_CONFIG) if (Path(folder) / name).is_file()), None)
    return {} if path is None else read_json(path)


def is_of_plans(record: dict[str, Any]) -> bool:
    """Whether a record is that of a folder of plans."""
    return "num_plans" in record


def recorded_plans(record: dict[str, Any]) -> list[str]:
    """The folders of the plans of which a record speaks; at least one, or that of a damaged record."""
    count = record.get("num_plans")
    return [plan_folder(plan) for plan in range(min(count, MAX_PLANS) if type(count) is int and count > 0 else 1)]
