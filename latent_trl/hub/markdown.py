"""Markdown of model cards, in which nothing of a checkpoint is taken for markup."""

import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

HUB_ID = re.compile(r"[\w.-]{1,96}/[\w.-]{1,96}")


def hub_id(name: str | None) -> str | None:
    """`name` where it can be a Hub id, and is not a folder."""
    return name if name and HUB_ID.fullmatch(name) and not Path(name).is_dir() else None


class Markup(str):
    """Text that is Markdown already."""


def cell(value: Any) -> str:
    """A value for a Markdown table: one line, nothing that the page would take for markup."""
    if isinstance(value, Markup):
        return value
    text = f"{value:.4g}" if isinstance(value, float) else str(value)
    return re.sub(r"[\\`|\[]", r"\\\g<0>", one_line(text)[:160]).replace("<", "&lt;")


def one_line(text: Any) -> str:
    """A text in one line, without characters that no page shows."""
    return "".join(c if c.isprintable() else "?" for c in " ".join(str(text).split()))


def code_span(text: Any) -> str:
    """A short text between back-ticks."""
    return "`" + one_line(text)[:60].replace("`", "'").replace("|", "\\|") + "`"


def quoted(text: Any) -> str:
    """A text as Python and JSON write it: it cannot end the line, nor the block of code."""
    return json.dumps(one_line(text), ensure_ascii=False)


def table(header: list[str], rows: list[list[Any]]) -> str:
    """A table, its cells made by [`cell`]."""
    lines = ["| " + " | ".join(header) + " |", "|" + "---|" * len(header)]
    return "\n".join(lines + ["| " + " | ".join(map(cell, row)) + " |" for row in rows])


def base_model_link(record: dict[str, Any]) -> str:
    """The base model that a record names, and its commit."""
    name = record.get("base_model_name_or_path")
    if hub_id(name):
        sha = record.get("base_model_revision")
        return f"[{name}](https://huggingface.co/{name})" + (f" at commit {code_span(sha)}" if sha else "")
    return f"the local model {code_span(Path(name).name)}" if name else "a model that was made in memory"


@dataclass(frozen=True)
class SnippetNames:
    """
    Names that a card's example needs of a record.

    Args:
        base (`str`): The base model; of a folder of somebody's, its last part.
        is_local (`bool`): Whether the base model is on no Hub, and has to be given.
        backbone, processor (`str`): Classes of transformers that load them.
        question (`str`): To ask.
    """

    base: str
    is_local: bool
    backbone: str
    processor: str
    question: str

    @classmethod
    def of(cls, record: dict[str, Any]) -> "SnippetNames":
        """Those of the record of a checkpoint."""
        base = record.get("base_model_name_or_path") or "BASE_MODEL"
        base = Path(base).name if Path(base).is_absolute() else base
        local = not hub_id(record.get("base_model_name_or_path"))
        if record.get("vision_token_ids"):
            return cls(base, local, "AutoModelForImageTextToText", "AutoProcessor", "What do you see?")
        return cls(base, local, "AutoModelForCausalLM", "AutoTokenizer", "How was your day?")

    def beginning(self, name: str, repo: str, has_processor: bool, learned_on: str) -> list[str]:
        """
        Lines that load a model and its processor, and make inputs.

        Args:
            name (`str`): Of the model's class.
            repo (`str`), has_processor (`bool`): The checkpoint, and whether a processor is beside it.
            learned_on (`str`): What is said of a backbone that has to be given.
        """
        used = sorted([self.processor, *([self.backbone] if self.is_local else [])])
        given = ", backbone=backbone" if self.is_local else ""
        backbone = f"backbone = {self.backbone}.from_pretrained({quoted(self.base)})  # {learned_on}"
        return [
            f"from transformers import {', '.join(used)}",
            "",
            f"from latent_trl import {name}",
            "",
            *([backbone] if self.is_local else []),
            f"model = {name}.from_pretrained({quoted(repo)}{given})",
            f"processor = {self.processor}.from_pretrained({quoted(repo if has_processor else self.base)})",
            f'messages = [{{"role": "user", "content": "{self.question}"}}]',
            "inputs = processor.apply_chat_template(",
            '    messages, add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"',
            ")",
            "",
        ]
