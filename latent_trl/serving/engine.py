"""What the server asks of an engine: answers to one conversation, piece by piece."""

from collections.abc import AsyncGenerator
from dataclasses import dataclass, field
from typing import Any, Protocol

from transformers import GenerationConfig

from ..generation.action_law import ActionLaw
from ..generation.settings import ACTION_DEFAULTS, settled_choice


@dataclass(frozen=True)
class ActionKind:
    """
    What requests and answers call a model's latent actions.

    Args:
        field (`str`): Of a request's body, and of each choice.
        noun (`str`): One of them.
        step (`str`): What it is chosen for.
    """

    field: str
    noun: str
    step: str


# One a token; and one for each segment of an answer.
CODES = ActionKind("latent_actions", "code", "step")
PLANS = ActionKind("plans", "plan", "segment")


class RequestError(ValueError):
    """
    A request that cannot be answered as it is.

    Args:
        message (`str`): What was found, and what works.
        param (`str`, *optional*): The field that is wrong.
        status (`int`, defaults to `400`): Of the HTTP response.
        code (`str`, *optional*): OpenAI's word for it, such as `"context_length_exceeded"`.
    """

    def __init__(self, message: str, param: str | None = None, status: int = 400, code: str | None = None):
        super().__init__(message)
        self.param, self.status, self.code = param, status, code


class EngineError(RuntimeError):
    """An answer that failed for what is not in the request."""


@dataclass
class GenerationRequest:
    """
    One conversation to answer.

    Args:
        messages (`list[dict]`): In TRL's conversational form; image parts hold RGB pictures.
        max_tokens (`int`, *optional*): Longest answer; by default what the engine allows.
        n (`int`, defaults to `1`): Answers.
        stop (`list[str]`): Texts before which an answer ends.
        ignore_eos (`bool`, defaults to `False`): Whether answers go on to `max_tokens`, whatever they say.
        seed (`int`, *optional*): Of the sampling.
        do_sample (`bool`, defaults to `True`): Sample codes or plans, or take the most likely.
        law (`ActionLaw`): The law that they are sampled from.
        forced (`list[int]`): Those of the first steps or segments; -1 leaves one free. The last one holds for all later
            segments.
        bias (`dict[int, float]`): Added to the logits of these codes or plans; `-inf` bans one.
        stream (`bool`, defaults to `False`): Whether pieces are wanted as they come.
    """

    messages: list[dict[str, Any]]
    max_tokens: int | None = None
    n: int = 1
    stop: list[str] = field(default_factory=list)
    ignore_eos: bool = False
    seed: int | None = None
    do_sample: bool = True
    law: ActionLaw = field(default_factory=ActionLaw)
    forced: list[int] = field(default_factory=list)
    bias: dict[int, float] = field(default_factory=dict)
    stream: bool = False


def default_law(config: GenerationConfig) -> tuple[bool, ActionLaw]:
    """Whether codes are sampled, and from which law, where a request is silent: what `generate` does by default."""
    own = settled_choice(config, dict.fromkeys(ACTION_DEFAULTS))
    return own["action_do_sample"], ActionLaw(own["action_temperature"], own["action_top_k"], own["action_top_p"])


def longest_answer(request: GenerationRequest, prompt_length: int, limit: int, max_model_len: int | None) -> int:
    """
    The longest answer to a request.

    Args:
        request (`GenerationRequest`): What is wanted.
        prompt_length (`int`): Tokens of its conversation.
        limit (`int`): The longest answer to any.
        max_model_len (`int`, *optional*): Most tokens of a conversation and its answer.

    Raises:
        RequestError: When it wants more than there may be.
    """
    wanted = request.max_tokens
    if wanted is not None and wanted > limit:
        raise RequestError(f"The longest answer has {limit} tokens here, not {wanted}.", "max_completion_tokens")
    if max_model_len is None:
        return wanted or limit
    room = max_model_len - prompt_length
    if room < (wanted or 1):
        raise RequestError(
            f"The conversation has {prompt_length} tokens, and the answer may have {wanted or 1}; the longest context "
            f"is of {max_model_len}. Shorten the conversation, or lower `max_completion_tokens`.",
            "messages",
            code="context_length_exceeded",
        )
    return wanted or min(limit, room)


@dataclass
class Piece:
    """
    What comes next in one of the answers.

    Args:
        index (`int`): Which of the n answers.
        text (`str`): Special tokens left out, and nothing of a stop text.
        action_ids (`list[int]`), log_probs (`list[float]`): Codes or plans, and their log-probabilities in nats under
            the law.
        starts (`list[int]`): How many tokens of the answer stand before each of them.
        tokens (`list[str]`): What each token adds to the text, special tokens included.
        finish_reason (`str`, *optional*): `"stop"` or `"length"` with the last piece of an answer.
        prompt_tokens (`int`): Of the conversation.
    """

    index: int
    text: str = ""
    action_ids: list[int] = field(default_factory=list)
    log_probs: list[float] = field(default_factory=list)
    starts: list[int] = field(default_factory=list)
    tokens: list[str] = field(default_factory=list)
    finish_reason: str | None = None
    prompt_tokens: int = 0


class Engine(Protocol):
    """
    Answers conversations. Its methods are called in the server's event loop.

    Args:
        kind (`ActionKind`): Of its latent actions.
        num_actions (`int`): K.
        special_tokens (`list[str]`): Tokens that are in no text.
        default_law (`tuple[bool, ActionLaw]`): Whether they are sampled, and from which law, by default.
        max_batch_size (`int`): Most answers to one conversation.
    """

    kind: ActionKind
    num_actions: int
    special_tokens: list[str]
    default_law: tuple[bool, ActionLaw]
    max_batch_size: int

    def generate(self, request: GenerationRequest) -> AsyncGenerator[Piece, None]:
        """
        Pieces of all answers, each answer's in order. To close the generator ends the work.

        Raises:
            RequestError: Before the first piece, for what this engine cannot do.
            EngineError: When an answer fails.
        """
        ...

    def about(self) -> dict[str, Any]:
        """What `/v1/models` says of the latent actions."""
        ...

    def problem(self) -> str | None:
        """What keeps the engine from answering anything, or `None`."""
        ...

    def load(self) -> dict[str, int]:
        """What is at work, such as `{"waiting": ..., "running": ...}`, for the metrics."""
        ...

    async def start(self) -> None:
        """Gets ready; called once, before the first request."""
        ...

    async def close(self) -> None:
        """Ends the work; what is unanswered fails."""
        ...
