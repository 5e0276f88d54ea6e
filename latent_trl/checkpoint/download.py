"""Calls to the Hub that are made again when the Hub, and not the caller, is at fault."""

import logging
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

from huggingface_hub import constants, snapshot_download
from huggingface_hub.errors import HfHubHTTPError
from huggingface_hub.file_download import repo_folder_name

logger = logging.getLogger(__name__)
Result = TypeVar("Result")
WAITS = (1.0, 3.0)


def _is_server_fault(error: BaseException | None) -> bool:
    if isinstance(error, HfHubHTTPError) and error.response is not None:
        return error.response.status_code >= 500
    # What `snapshot_download` makes of a Hub that does not answer.
    return error is not None and _is_server_fault(error.__cause__)


def retried(call: Callable[..., Result], *args: Any, **kwargs: Any) -> Result:
    """
    `call(*args, **kwargs)`, made again after a 5xx answer, which `huggingface_hub` itself does for some calls only.
    For calls that may be made twice.
    """
    for wait in (*WAITS, None):
        try:
            return call(*args, **kwargs)
        except Exception as error:
            if wait is None or not _is_server_fault(error):
                raise
            logger.warning(f"The Hub failed ({type(error).__name__}); trying again in {wait:.0f} s.")
            time.sleep(wait)
    raise AssertionError("unreachable")


def fetch_snapshot(repo_id: str, **kwargs: Any) -> Path:
    """`snapshot_download`, made again after a 5xx answer."""
    return Path(retried(snapshot_download, repo_id, library_name="latent-trl", **kwargs))


def cached_commit(repo_id: str | None) -> str | None:
    """
    The commit that a repository was loaded at, which transformers does not keep: that of its only snapshot in the
    cache. `None` for a folder, and where several snapshots leave it open.
    """
    if not repo_id or Path(repo_id).is_dir():
        return None
    snapshots = Path(constants.HF_HUB_CACHE) / repo_folder_name(repo_id=repo_id, repo_type="model") / "snapshots"
    commits = [path.name for path in snapshots.glob("*") if (path / "config.json").exists()]
    if len(commits) > 1:
        logger.warning(
            f"{repo_id} is in the cache at {len(commits)} commits, so the one in use is not known. To have it in the "
            "checkpoint, set `LatentActionConfig(base_model_revision=...)`."
        )
    return commits[0] if len(commits) == 1 else None
