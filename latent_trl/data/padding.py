"""Rows of unlike length as one batch: tokens padded, visual inputs joined."""

import torch
from transformers import PreTrainedTokenizerBase


def padded(
    tokenizer: PreTrainedTokenizerBase, rows: list[tuple[list[int], dict[str, list[int]]]], left: bool
) -> dict[str, torch.Tensor]:
    """
    Tokens of rows and the fields of their tokens as `[B, L]`.

    Args:
        tokenizer (`PreTrainedTokenizerBase`): Says which token pads.
        rows (`list`): Ids and fields of each; a field that a row does not have is 0.
        left (`bool`): Whether to pad on the left.
    """
    pad = tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id
    if pad is None:
        raise ValueError("The tokenizer has neither a pad nor an EOS token. Set `tokenizer.pad_token`.")
    longest = max(len(ids) for ids, _ in rows)
    names = sorted({name for _, fields in rows for name in fields})
    batch = {name: torch.zeros(len(rows), longest, dtype=torch.long) for name in ("attention_mask", *names)}
    batch["input_ids"] = torch.full((len(rows), longest), pad)
    for i, (ids, fields) in enumerate(rows):
        place = slice(longest - len(ids), longest) if left else slice(0, len(ids))
        batch["input_ids"][i, place] = torch.tensor(ids, dtype=torch.long)
        batch["attention_mask"][i, place] = 1
        for name, values in fields.items():
            batch[name][i, place] = torch.tensor(values, dtype=torch.long)
    return batch


def joined_vision(rows: list[dict[str, torch.Tensor]]) -> dict[str, torch.Tensor] | None:
    """
    Visual inputs of several rows one after the other; `None` where their shapes differ, so that the processor would
    have padded them: then it has to make them together.
    """
    if not rows:
        return {}
    names = rows[0].keys()
    for row in rows:
        if row.keys() != names or not all(isinstance(v, torch.Tensor) and v.ndim for v in row.values()):
            return None
        if any(row[name].shape[1:] != rows[0][name].shape[1:] for name in names):
            return None
    return {name: torch.cat([row[name] for row in rows]) for name in names}
