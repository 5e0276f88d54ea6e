"""Fetching a checkpoint, or what can be known of it without its weights."""

import shutil
import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from huggingface_hub import HfApi
from huggingface_hub.errors import NotASafetensorsRepoError, SafetensorsParsingError

from ..checkpoint.atomic_folder import atomic_folder
from ..checkpoint.download import fetch_snapshot, retried
from ..checkpoint.files import (
    CONFIG_FILE,
    MAX_JSON_BYTES,
    OWNED_NAMES,
    REPORT_FILE,
    CheckpointError,
    check_inside,
    check_token,
)
from ..checkpoint.plan_files import PLAN_CONFIG
from .facts import (
    COMPONENT_FOLDERS,
    ComponentFacts,
    Header,
    TrainingReport,
    component_facts,
    is_of_plans,
    part_file,
    part_files,
    read_record,
    recorded_plans,
)
from .push import check_publishable, is_owned, is_published

LOW_PERPLEXITY = 2.0


def _files_of(api: HfApi, repo_id: str, revision: str | None) -> tuple[str, list[str]]:
    """The commit of a revision, and the names of its files that belong to a checkpoint."""
    sha = retried(api.model_info, repo_id, revision=revision).sha
    entries = {e.path: e for e in api.list_repo_tree(repo_id, revision=sha, recursive=True)}
    names = [name for name in entries if is_published(name) and ".." not in Path(name).parts]
    large = [name for name in names if name.endswith(".json") and entries[name].size > MAX_JSON_BYTES]
    if large and any(name.split("/")[-1] != "tokenizer.json" for name in large):
        raise CheckpointError(f"{repo_id}: {large} are larger than {MAX_JSON_BYTES:,} bytes. Nothing was downloaded.")
    if not ({CONFIG_FILE, PLAN_CONFIG} & set(names) or part_files(names)):
        raise CheckpointError(
            f"{repo_id} at {sha} has neither {CONFIG_FILE} nor {PLAN_CONFIG} nor a component: not a checkpoint."
        )
    return sha, names


def pull_folder(
    repo_id: str,
    folder: str | Path,
    *,
    components: list[str] | None = None,
    revision: str | None = None,
    token: str | bool | None = None,
    cache_dir: str | Path | None = None,
) -> str:
    """
    Copies a checkpoint of the Hub into a folder, which is replaced in one step once all of it is there and sound.

    Args:
        repo_id (`str`): `"user/name"`.
        folder (`str` or `Path`): Where to; other files in it stay.
        components (`list[str]`, *optional*): Only these, each loadable alone. All by default.
        revision (`str`, *optional*), token (`str` or `bool`, *optional*), cache_dir (*optional*): As in
            `huggingface_hub`.

    Returns:
        The commit.
    """
    check_token(token)
    sha, names = _files_of(HfApi(library_name="latent-trl", token=token), repo_id, revision)
    if components is not None:
        unknown = [name for name in components if part_file(name) not in names]
        if unknown:
            raise ValueError(f"`components` {unknown} are not in {repo_id}.")
        names = [name for name in names if name.split("/")[0].removesuffix(".safetensors") in components]
    snapshot = fetch_snapshot(repo_id, revision=sha, token=token, cache_dir=cache_dir, allow_patterns=names)
    owned = {*OWNED_NAMES, *(path.name for path in Path(folder).glob("*") if is_owned(path.name))}
    with atomic_folder(Path(folder), owned) as staging:
        for name in names:
            check_inside(snapshot / name, snapshot)
            (staging / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(snapshot / name, staging / name)
        check_publishable(staging)
    return sha


@dataclass
class Inspection:
    """
    What a checkpoint is, without its weights.

    Args:
        source (`str`): Folder or Hub id; `commit` (`str`, *optional*) of the latter.
        record (`dict`): `latent_action_config.json` or `plan_config.json`; empty for bare components.
        parts (`dict`): [`ComponentFacts`] by folder.
        report (`TrainingReport`): Runs, usage of codes and evaluation.
        problems (`list[str]`): What does not fit together, or is known to be bad.
    """

    source: str
    record: dict[str, Any]
    parts: dict[str, ComponentFacts]
    report: TrainingReport
    commit: str | None = None
    problems: list[str] = field(default_factory=list)

    def __post_init__(self):
        self.problems += _problems(self.record, self.parts, self.report)

    @property
    def usage(self) -> dict[str, float]:
        """`used`, `perplexity` and number of `codes`, as counted, or as last logged; empty when neither is known."""
        if self.report.codebook is not None:
            codebook = self.report.codebook
            return {"used": codebook.used, "perplexity": codebook.perplexity, "codes": len(codebook.counts)}
        rows = [row for run in self.report.runs for row in run.history if _is_number(row.get("codebook/used"))]
        codes = self.record.get("num_codes", 0)
        perplexity = rows[-1].get("codebook/perplexity") if rows else None
        return {} if not rows or not _is_number(codes) else {
            "used": rows[-1]["codebook/used"],
            "perplexity": float(perplexity) if isinstance(perplexity, (int, float)) else float("nan"),
            "codes": codes,
        }  # fmt: skip


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float))


def _problems(record: dict[str, Any], parts: dict[str, ComponentFacts], report: TrainingReport) -> list[str]:
    found = []
    absent = [plan for plan in recorded_plans(record) if plan not in parts] if is_of_plans(record) else []
    if absent:
        found.append(f"{PLAN_CONFIG} speaks of {record['num_plans']} plans, and {absent[:5]} have no tensors")
    names = record.get("components")
    names = [name for name in names if isinstance(name, str)] if isinstance(names, list) else []
    for name in names:
        if name not in parts:
            found.append(f"{name} is named in {CONFIG_FILE}, and has no tensors")
    for name in parts:
        if record and name in COMPONENT_FOLDERS and name not in names:
            found.append(f"{name} is not named in {CONFIG_FILE}, and will not be loaded")
    if record and "codebook" in parts:
        want = (record.get("num_codes"), record.get("hidden_size", record.get("code_width")))
        got = parts["codebook"].shapes.get("weight")
        if want[1] is not None and got != want:
            found.append(f"the codebook has shape {got}, {CONFIG_FILE} says {want}")
    if record and not record.get("backbone_fingerprint"):
        found.append("no fingerprint of the backbone: another one would go unnoticed")
    if report.codebook is not None and any(report.codebook.counts) and len(report.codebook.counts) > 1:
        if report.codebook.perplexity < LOW_PERPLEXITY:
            found.append(f"the codebook has collapsed: its usage has perplexity {report.codebook.perplexity:.2f}")
    return found


def inspect(
    repo_or_folder: str | Path, revision: str | None = None, token: str | bool | None = None
) -> Inspection:  # fmt: skip
    """
    Looks at a checkpoint: of tensors, only the headers are read, from the disk or over the net.

    Args:
        repo_or_folder (`str` or `Path`): A folder, or a Hub id.
        revision (`str`, *optional*), token (`str` or `bool`, *optional*): As in `huggingface_hub`.
    """
    folder = Path(repo_or_folder)
    if folder.is_dir():
        return Inspection(
            str(repo_or_folder), read_record(folder), component_facts(folder), TrainingReport.read(folder)
        )
    if folder.is_absolute() or str(repo_or_folder).startswith((".", "~")):
        raise CheckpointError(f"{str(repo_or_folder)!r} is not a folder.")
    check_token(token)
    repo_id, api = str(repo_or_folder), HfApi(library_name="latent-trl", token=token)
    sha, names = _files_of(api, repo_id, revision)
    headers: dict[str, Header] = {}
    for file in sorted(part_files(names).values()):
        try:
            metadata = retried(api.parse_safetensors_file_metadata, repo_id, file, revision=sha)
        except (SafetensorsParsingError, NotASafetensorsRepoError) as error:
            raise CheckpointError(f"{repo_id}: {file} is not a safetensors file ({error}).") from error
        headers[file] = {name: (one.dtype, tuple(one.shape)) for name, one in metadata.tensors.items()}
    small = [name for name in names if name.endswith("config.json") or name == REPORT_FILE]
    with tempfile.TemporaryDirectory() as temporary:
        snapshot = fetch_snapshot(repo_id, revision=sha, token=token, cache_dir=temporary, allow_patterns=small)
        parts = component_facts(snapshot, headers)
        return Inspection(repo_id, read_record(snapshot), parts, TrainingReport.read(snapshot), commit=sha)
