"""Reads TRL's rows: the text of a prompt or completion, plain or conversational, and the images that go with it."""

from typing import Any

IMAGE_COLUMNS = ("images", "image")


def content_text(content: Any) -> str:
    """Text of one message's content: a string, or content blocks of which the text blocks are joined by newlines."""
    if content is None:
        return ""
    if isinstance(content, str):
        return content
    return "\n".join(block["text"] for block in content if block.get("type") == "text")


def completion_text(completion: str | list[dict]) -> str:
    """
    Text of a completion as TRL hands it to a reward function.

    Args:
        completion (`str` or `list[dict]`):
            A plain completion, or the messages of a conversational one.

    Returns:
        `str`: The completion itself, or the contents of its assistant messages joined by newlines.
    """
    if isinstance(completion, str):
        return completion
    return "\n".join(content_text(message.get("content")) for message in completion if message["role"] == "assistant")


def prompt_text(prompt: str | list[dict]) -> str:
    """Text of a prompt: as it is when plain, else one `role: text` paragraph for each message (images left out)."""
    if isinstance(prompt, str):
        return prompt
    return "\n\n".join(f"{message['role']}: {content_text(message.get('content'))}" for message in prompt)


def as_completion(prompt: str | list[dict], text: str) -> str | list[dict]:
    """A completion of the prompt's kind, as TRL gives it to reward functions: a text, or an assistant's message."""
    return text if isinstance(prompt, str) else [{"role": "assistant", "content": text}]


def text_messages(messages: list[dict]) -> list[dict]:
    """The same messages with every content as one string, for models that read text only."""
    return [{"role": message["role"], "content": content_text(message.get("content"))} for message in messages]


def row_images(prompts: list, columns: dict[str, Any]) -> list[list]:
    """
    Images of every row, wherever the data set keeps them.

    Args:
        prompts (`list`):
            Prompts of the batch. Their image blocks are read only when there is no image column.
        columns (`dict[str, Any]`):
            Columns handed to the reward function. `images` (a list for each row) goes before `image` (one each).

    Returns:
        `list[list]`: For each row its images, in order; empty where it has none.
    """
    for name in IMAGE_COLUMNS:
        if name in columns:
            return [_as_list(cell) for cell in columns[name]]
    return [_prompt_images(prompt) for prompt in prompts]


def require_column(columns: dict[str, Any], name: str, argument: str, reward: str) -> list:
    """Returns a column of the batch, or says which argument named it and which columns there are."""
    if name not in columns:
        skipped = {"trainer_state", "log_extra", "log_metric", "completion_ids", "environments"}
        found = sorted(set(columns) - skipped)
        raise ValueError(
            f"{reward} reads the column {name!r} (`{argument}={name!r}`), which the data set does not have. "
            f"It has {found}: add the column, or set `{argument}` to one of them."
        )
    return columns[name]


def _as_list(cell: Any) -> list:
    if cell is None:
        return []
    return list(cell) if isinstance(cell, (list, tuple)) else [cell]


def _prompt_images(prompt: str | list[dict]) -> list:
    if isinstance(prompt, str):
        return []
    blocks = (block for m in prompt if isinstance(m["content"], list) for block in m["content"])
    found = []
    for block in blocks:
        if block["type"] in ("image", "image_url"):
            value = block.get("image", block.get("image_url", block.get("url")))
            found.append(value["url"] if isinstance(value, dict) and "url" in value else value)
    return [image for image in found if image is not None]
