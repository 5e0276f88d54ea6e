"""What travels between a trainer and its rollout servers: JSON of requests, and safetensors of policies and answers."""

import base64
import hashlib
import io
import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from PIL import Image
from safetensors.torch import load, save

from ..models.policy import LatentActionPolicy
from .names import policy_tensors, tensor_bytes
from .rows import EngineAnswer, EngineText

# Routes of a server.
DESCRIPTION, POLICY, GENERATE = "/description", "/policy", "/generate"
# Header of a policy's bytes: their version.
VERSION_HEADER = "latent-trl-policy"
# What an error of a server is called in `code`, where the client goes by it.
OTHER_POLICY, NOT_FINITE = "other_policy", "not_finite"


def version_of(data: bytes) -> str:
    """The version of a policy: the SHA-256 of its bytes, so that one version is one policy, whoever sent it."""
    return hashlib.sha256(data).hexdigest()


@dataclass
class PolicyFile:
    """
    A policy as it travels.

    Args:
        data (`bytes`): Its tensors as safetensors: what [`policy_tensors`] gives, or those of plans.
        version (`str`): Its [`version_of`].
        size (`int`): Bytes of the tensors.
    """

    data: bytes
    version: str
    size: int

    @classmethod
    def of(cls, policy: LatentActionPolicy, state_dict: dict[str, torch.Tensor] | None = None) -> "PolicyFile":
        """That of a policy; `state_dict` as in [`policy_tensors`]."""
        return cls.of_tensors(policy_tensors(policy, state_dict))

    @classmethod
    def of_tensors(cls, tensors: dict[str, torch.Tensor]) -> "PolicyFile":
        """That of these tensors, which lie on the CPU."""
        data = save(tensors)
        return cls(data, version_of(data), tensor_bytes(tensors))


def rollout_body(
    version: str,
    prompts: Sequence[Any],
    rows: Sequence[tuple[int, dict[str, Any]]],
    max_new_tokens: int,
    stop_token_ids: Sequence[int],
    output_support: bool,
) -> bytes:
    """
    The body of a request for rows.

    Args:
        version (`str`): Of the policy that is to answer.
        prompts (`Sequence`): Token ids, or vLLM's dictionaries of `prompt_token_ids` and `multi_modal_data`.
        rows (`Sequence[tuple[int, dict]]`): The place of a row's prompt, and the row's
            [`~latent_trl.vllm.rows.row_settings`], or those of [`~latent_trl.plans.lora_engine.LoraEngine`].
        max_new_tokens, stop_token_ids, output_support: As in [`LatentActionEngine.generate`].
    """
    body = {
        "policy": version,
        "prompts": [_prompt(prompt) for prompt in prompts],
        "rows": [{"prompt": place, "settings": settings} for place, settings in rows],
        "max_new_tokens": max_new_tokens,
        "stop_token_ids": list(stop_token_ids),
        "output_support": output_support,
    }
    return json.dumps(body).encode()


def _prompt(prompt: Any) -> dict[str, Any]:
    if not isinstance(prompt, dict):
        return {"token_ids": list(prompt), "images": []}
    images = prompt.get("multi_modal_data", {}).get("image", [])
    return {"token_ids": list(prompt["prompt_token_ids"]), "images": [_data_url(image) for image in images]}


def _data_url(image: Image.Image) -> str:
    file = io.BytesIO()
    # Without loss; the network is faster than a better compression.
    image.save(file, "PNG", compress_level=1)
    return "data:image/png;base64," + base64.b64encode(file.getvalue()).decode()


def packed(answers: Sequence[EngineText]) -> bytes:
    """Answers as safetensors: lengths, and the values of all rows one after another."""
    tensors = {
        "prompt_lengths": torch.tensor([len(answer.prompt_ids) for answer in answers]),
        "prompt_ids": torch.tensor([token for answer in answers for token in answer.prompt_ids], dtype=torch.int32),
        "lengths": torch.tensor([len(answer.token_ids) for answer in answers]),
        "token_ids": torch.tensor([token for answer in answers for token in answer.token_ids], dtype=torch.int32),
    }
    of_codes = [answer for answer in answers if isinstance(answer, EngineAnswer)]
    if of_codes:
        codes = [code for answer in of_codes for code in answer.action_ids]
        tensors["action_ids"] = torch.tensor(codes, dtype=torch.int32)
        values = [value for answer in of_codes for value in answer.log_probs]
        tensors["log_probs"] = torch.tensor(values, dtype=torch.float32)
    supports = [answer.support for answer in of_codes if answer.support is not None]
    if supports:
        tensors["support"] = torch.cat(supports)
    return save(tensors)


def unpacked_texts(data: bytes, rows: int) -> list[EngineText]:
    """Undoes [`packed`] of answers without codes; arguments and errors are those of [`unpacked`]."""
    given = _by_row(data, rows, ("token_ids",))
    both = zip(given["prompt_ids"], given["token_ids"], strict=True)
    return [EngineText(prompt.tolist(), own.tolist()) for prompt, own in both]


def unpacked(data: bytes, rows: int) -> list[EngineAnswer]:
    """
    Undoes [`packed`] of answers by codes.

    Args:
        data (`bytes`): Of a server.
        rows (`int`): How many answers there must be.

    Raises:
        ValueError: For bytes that are no answers to so many rows.
    """
    given = _by_row(data, rows, ("token_ids", "action_ids", "log_probs"))
    supports = given.get("support", [None] * rows)
    columns = (given[name] for name in ("prompt_ids", "token_ids", "action_ids", "log_probs"))
    return [
        EngineAnswer(prompt.tolist(), own.tolist(), chosen.tolist(), values.tolist(), support)
        for prompt, own, chosen, values, support in zip(*columns, supports, strict=True)
    ]


def _by_row(data: bytes, rows: int, names: Sequence[str]) -> dict[str, Sequence[torch.Tensor]]:
    """The prompts, and the tensors of these `names` and of `support` where there is one, in parts: one a row."""
    try:
        tensors = load(data)
        prompt_lengths, lengths = tensors["prompt_lengths"].tolist(), tensors["lengths"].tolist()
        if not len(lengths) == len(prompt_lengths) == rows:
            raise ValueError(f"{len(lengths)} answers for {rows} rows")
        there = [*names, *({"support"} & tensors.keys())]
        parts = {name: tensors[name].split(lengths) for name in there}
        return {"prompt_ids": tensors["prompt_ids"].split(prompt_lengths), **parts}
    except Exception as error:
        # safetensors and torch raise errors of their own for what they cannot read.
        raise ValueError(f"The answers cannot be read ({type(error).__name__}: {error}).") from error
