"""Uploading a checkpoint: what is published of a folder, in one commit, with a card."""

import logging
import re
import tempfile
from pathlib import Path
from typing import Any

from huggingface_hub import CommitInfo, CommitOperationAdd, CommitOperationDelete, HfApi

from ..checkpoint.download import retried
from ..checkpoint.files import (
    CONFIG_FILE,
    OWNED_NAMES,
    REPORT_FILE,
    CheckpointError,
    check_token,
    read_config,
    read_json,
    tensor_metadata,
)
from ..checkpoint.plan_files import (
    ADAPTER_CONFIG,
    ADAPTER_WEIGHTS,
    CHOOSER_FILE,
    PLAN_CONFIG,
    PLAN_FOLDER,
)
from .card import CARD_FILE, PLOT_FILES, write_card
from .facts import TENSOR_FILES, component_facts, part_file, part_files, recorded_plans
from .secrets import check_no_secret

logger = logging.getLogger(__name__)

# A processor's files, so that a repository can be used without asking for the base model's.
PROCESSOR_FILES = re.compile(
    r"(tokenizer|tokenizer_config|special_tokens_map|added_tokens|vocab|processor_config|preprocessor_config|"
    r"video_preprocessor_config|generation_config)\.json|chat_template\.jinja|merges\.txt|"
    r"vocab\.txt|[\w.-]+\.model|additional_chat_templates/[\w.-]+\.jinja"
)
PART_FILES = re.compile(rf"({'|'.join(TENSOR_FILES)})/(config|adapter_config)\.json|{'|'.join(TENSOR_FILES.values())}")
PLAN_FILES = re.compile(rf"{PLAN_FOLDER.pattern}/({re.escape(ADAPTER_CONFIG)}|{re.escape(ADAPTER_WEIGHTS)})")
TOP_FILES = re.compile(
    "|".join(map(re.escape, (CONFIG_FILE, PLAN_CONFIG, CHOOSER_FILE, REPORT_FILE, CARD_FILE, *PLOT_FILES, "LICENSE")))
)


def is_published(name: str) -> bool:
    """Whether a file of this name, relative to the checkpoint, goes to the Hub and comes from it."""
    return any(pattern.fullmatch(name) for pattern in (TOP_FILES, PROCESSOR_FILES, PART_FILES, PLAN_FILES))


def is_owned(name: str) -> bool:
    """Whether a file or folder at the top of a checkpoint is one of its parts, which go with it."""
    return name in {*OWNED_NAMES, PLAN_CONFIG, CHOOSER_FILE} or PLAN_FOLDER.fullmatch(name) is not None


def published_files(folder: str | Path) -> dict[str, Path]:
    """
    The files of a folder that go to the Hub: the record, the report, the card and its plots, the parts' configurations
    and safetensors files, and a processor. Nothing else does: no optimizer state, pickle, log or checkpoint folder.

    Raises:
        CheckpointError: For a link or a pipe in the place of a file, a file that is not what its name says, or one that
            holds a token or a key.
    """
    folder = Path(folder)
    files = {}
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder).as_posix()
        if not is_published(name) or path.is_dir():
            continue
        if path.is_symlink():
            raise CheckpointError(f"{path} is a link. Put the file itself there: links are not published.")
        if name.endswith(".safetensors"):
            tensor_metadata(path)
        check_no_secret(path)
        files[name] = path
    return files


def check_publishable(folder: str | Path) -> None:
    """Raises [`CheckpointError`] unless `folder` is a checkpoint, or holds components, that can be loaded."""
    folder = Path(folder)
    if (folder / CONFIG_FILE).is_file():
        _, names = read_config(folder)
        absent = [name for name in names if not (folder / TENSOR_FILES[name]).is_file()]
        if absent:
            raise CheckpointError(f"{folder / CONFIG_FILE} names {absent}, which the folder does not hold.")
    elif (folder / PLAN_CONFIG).is_file():
        plans = recorded_plans(read_json(folder / PLAN_CONFIG))
        absent = [name for name in plans if not (folder / f"{part_file(name)}").is_file()]
        if absent:
            raise CheckpointError(f"{folder / PLAN_CONFIG} speaks of {absent}, which the folder does not hold.")
    elif not part_files(path.relative_to(folder).as_posix() for path in folder.glob("*/*")):
        raise CheckpointError(
            f"{folder} has neither {CONFIG_FILE} nor {PLAN_CONFIG} nor a folder of a component: nothing to publish."
        )
    for facts in component_facts(folder).values():
        if not facts.shapes:
            raise CheckpointError(f"{folder} has a part without tensors.")


def push_folder(
    folder: str | Path,
    repo_id: str,
    *,
    private: bool | None = None,
    revision: str | None = None,
    create_pr: bool = False,
    commit_message: str | None = None,
    commit_description: str | None = None,
    token: str | bool | None = None,
    keep_card: bool = False,
    whole: bool = True,
    run_as_future: bool = False,
) -> CommitInfo:
    """
    Uploads a checkpoint folder in one commit: all of it is there afterwards, or nothing has changed.

    Args:
        folder (`str` or `Path`): As `save_pretrained` leaves it; [`published_files`] says what is taken.
        repo_id (`str`): `"user/name"`, or `"name"` for the token's user. Made if it does not exist.
        private (`bool`, *optional*): For a new repository.
        revision (`str`, *optional*): Branch; made from `main` if it does not exist.
        create_pr (`bool`, defaults to `False`): Open a pull request in place of a commit.
        commit_message (`str`, *optional*), commit_description (`str`, *optional*): Of the commit.
        token (`str` or `bool`, *optional*): With write permission. The saved one by default.
        keep_card (`bool`, defaults to `False`): Leave the repository's card, if it has one, as it is.
        whole (`bool`, defaults to `True`): Delete parts that the repository has and the folder has not.
        run_as_future (`bool`, defaults to `False`): Return a future; the upload goes on in the background.
    """
    check_token(token)
    check_publishable(folder)
    files = published_files(folder)
    api = HfApi(library_name="latent-trl", token=token)
    repo_id = retried(api.create_repo, repo_id, private=private, exist_ok=True).repo_id
    if revision is not None and not create_pr and not revision.startswith("refs/pr/"):
        retried(api.create_branch, repo_id, branch=revision, exist_ok=True)
    there = set(api.list_repo_files(repo_id, revision=revision))
    if keep_card and CARD_FILE in there:
        files = {name: path for name, path in files.items() if name not in (CARD_FILE, *PLOT_FILES)}
    operations: list[Any] = [CommitOperationAdd(name, str(path)) for name, path in files.items()]
    parts = {name.split("/")[0] for name in files if "/" in name}
    for name in sorted(there - set(files)):
        if is_owned(name.split("/")[0]) and (whole or name.split("/")[0] in parts):
            operations.append(CommitOperationDelete(name, is_folder=False))
    return api.create_commit(
        repo_id,
        operations,
        commit_message=commit_message or "Upload latent actions",
        commit_description=commit_description,
        revision=revision,
        create_pr=create_pr,
        run_as_future=run_as_future,
    )


def push_model(
    model,
    repo_id: str,
    *,
    components: list[str] | None = None,
    title: str | None = None,
    license: str | None = None,
    tags: list[str] | str | None = None,
    **kwargs: Any,
) -> CommitInfo:
    """
    Saves a [`LatentActionModel`] or a [`PlanModel`] into a temporary folder with a card and uploads it. A card that the
    repository has already stays, unless `title`, `license` or `tags` are given.

    Args:
        model (`LatentActionModel` or `PlanModel`): The model.
        repo_id (`str`): `"user/name"`.
        components (`list[str]`, *optional*): Names of the components of a `LatentActionModel` to upload. All that are
            there by default.
        title, license, tags: Of the card, as in [`write_card`].
        kwargs: As in [`push_folder`].
    """
    check_token(kwargs.get("token"))
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder, **({} if components is None else {"components": components}))
        write_card(folder, repo_id=repo_id, title=title, license=license, tags=tags)
        keep = title is None and license is None and not tags
        return push_folder(folder, repo_id, **{"keep_card": keep, **kwargs})


def push_component(component, repo_id: str, **kwargs: Any) -> CommitInfo:
    """Uploads one component into its own folder of a repository; the rest stays. `kwargs` as in [`push_folder`]."""
    check_token(kwargs.get("token"))
    with tempfile.TemporaryDirectory() as folder:
        component.save_pretrained(Path(folder) / component.folder_name)
        write_card(folder, repo_id=repo_id)
        message = f"Upload {type(component).__name__}"
        return push_folder(folder, repo_id, **{"keep_card": True, "whole": False, "commit_message": message, **kwargs})
