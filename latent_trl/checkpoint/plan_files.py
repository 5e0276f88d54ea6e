"""The files of a folder of plans: their names, known without loading them."""

import re
from pathlib import Path

from .files import ADAPTER_FOLDER, PROCESSOR_PATTERNS, REPORT_FILE

PLAN_CONFIG = "plan_config.json"
CHOOSER_FILE = "chooser.safetensors"
ADAPTER_CONFIG = "adapter_config.json"
ADAPTER_WEIGHTS = "adapter_model.safetensors"
# A plan's folder.
PLAN_FOLDER = re.compile(r"plan_\d{2,4}")
# What is downloaded of a repository.
PLAN_PATTERNS = (
    *(PLAN_CONFIG, CHOOSER_FILE, REPORT_FILE, "README.md"),
    *(f"{folder}/{file}" for folder in ("plan_*", ADAPTER_FOLDER) for file in (ADAPTER_CONFIG, ADAPTER_WEIGHTS)),
    *PROCESSOR_PATTERNS,
)


def plan_folder(plan: int) -> str:
    """The name of a plan's folder, and of its adapter: `plan_00`, `plan_01`, ..."""
    return f"plan_{plan:02d}"


def plan_folders(folder: str | Path) -> list[str]:
    """The names of the plans' folders that there are."""
    return sorted(
        (path.name for path in Path(folder).iterdir() if PLAN_FOLDER.fullmatch(path.name) and path.is_dir()),
        key=lambda name: int(name.split("_")[1]),
    )
