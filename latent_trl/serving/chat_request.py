"""The body of a chat completion request: what is taken, what is refused by name, and its pictures."""

import math
import re
from dataclasses import dataclass, replace
from difflib import get_close_matches
from typing import Annotated, Any, ClassVar, Literal

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    StrictBool,
    StrictInt,
    StrictStr,
    ValidationError,
    field_validator,
    model_validator,
)

from ..data.images import ImageError, load_image
from ..data.rows import short
from ..generation.action_law import ActionLaw
from .engine import CODES, PLANS, ActionKind, Engine, GenerationRequest, RequestError

# Whole numbers are taken too.
Number = Annotated[float, Field(strict=True)]
MAX_STOPS, MAX_STOP_LENGTH = 4, 1_000
# Lists, objects and what is in them: a small body may hold millions, and an error for each.
MAX_VALUES = 20_000
# Of what may stand for one, inside of texts too: so many are not looked through.
MAX_MARKS = 1_000_000
MARKS = (b",", b"[", b"{", b'"')
# A string of JSON, whole or without an end, so that a search never begins anew inside of one.
STRING = re.compile(rb'"[^"\\]*(?:\\.[^"\\]*)*(?:"|\\?\Z)', re.DOTALL)
# Far from what would leave the range of float32.
LARGEST_BIAS = 1e6
NO_TOKEN_CHOICE = (
    "is about the choice of tokens, which are the most likely ones given their {noun}s. `{field}` has `bias`, `banned` "
    "and `forced` for {noun}s"
)
# Fields of OpenAI's that cannot be had: the values that ask for nothing, and why any other is refused.
REFUSED: dict[str, tuple[tuple[Any, ...], str]] = {
    "frequency_penalty": ((0,), NO_TOKEN_CHOICE),
    "presence_penalty": ((0,), NO_TOKEN_CHOICE),
    "repetition_penalty": ((1,), NO_TOKEN_CHOICE),
    "logit_bias": (({},), NO_TOKEN_CHOICE),
    "logprobs": (
        (False,),
        "would be of tokens, which are not sampled. Those of the {noun}s are in each choice's `{field}.log_probs`",
    ),
    "top_logprobs": ((0,), "would be of tokens, which are not sampled"),
    "tools": (([],), "is not supported"),
    "tool_choice": (("none",), "is not supported"),
    "functions": (([],), "is not supported"),
    "function_call": (("none",), "is not supported"),
    "parallel_tool_calls": ((), "is not supported"),
    "response_format": (({"type": "text"},), "is not supported: the grammar would choose among tokens"),
    "modalities": ((["text"],), "is not supported"),
    "audio": ((), "is not supported"),
    "prediction": ((), "is not supported"),
    "reasoning_effort": ((), "is not supported"),
    "store": ((False,), "is not supported: nothing is stored"),
}
# What is often written in the place of a field.
MEANT = {
    "top_k": "{field}.top_k",
    "max_new_tokens": "max_completion_tokens",
    "max_completion_length": "max_completion_tokens",
    "action_temperature": "{field}.temperature",
    "action_top_k": "{field}.top_k",
    "action_top_p": "{field}.top_p",
    "action_bias": "{field}.bias",
    "forced_action_ids": "{field}.forced",
    "plan": "{field}.forced",
    "plan_ids": "{field}.forced",
    "latent_actions": "{field}",
    "plans": "{field}",
}


@dataclass(frozen=True)
class RequestLimits:
    """
    Args:
        max_body_bytes (`int`, defaults to 20 MiB): Of a request.
        max_characters (`int`, defaults to 500 000): Of the texts of a conversation.
        max_images (`int`, defaults to `8`): Pictures of a conversation.
        max_pixels (`int`, defaults to 25 million): Of one picture; larger ones are refused before they are decoded.
        max_waiting_pixels (`int`, defaults to 250 million): Of the pictures of all requests that are being answered or
            wait, 3 bytes each; a request that stands alone is answered in any case.
    """

    max_body_bytes: int = 20 * 2**20
    max_characters: int = 500_000
    max_images: int = 8
    max_pixels: int = 25_000_000
    max_waiting_pixels: int = 250_000_000


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", allow_inf_nan=False)

    @model_validator(mode="before")
    @classmethod
    def _without_nulls(cls, values: Any) -> Any:
        """A null says what a missing field says."""
        return {k: v for k, v in values.items() if v is not None} if isinstance(values, dict) else values


class _ImageURL(_Strict):
    url: StrictStr
    detail: Literal["auto"] = "auto"


class _TextPart(_Strict):
    type: Literal["text"]
    text: StrictStr


class _ImagePart(_Strict):
    type: Literal["image_url"]
    image_url: _ImageURL


class _Message(_Strict):
    role: Literal["system", "developer", "user", "assistant"]
    content: list[Annotated[_TextPart | _ImagePart, Field(discriminator="type")]]

    @model_validator(mode="before")
    @classmethod
    def _without_empty_lists(cls, values: Any) -> Any:
        """What a client adds to an answer that it sends back: `annotations: []` and the like say nothing."""
        return {k: v for k, v in values.items() if v != []} if isinstance(values, dict) else values

    @field_validator("content", mode="before")
    @classmethod
    def _one_text(cls, value: Any) -> Any:
        return [{"type": "text", "text": value}] if isinstance(value, str) else value


class _StreamOptions(_Strict):
    include_usage: StrictBool = False


class ActionsRequest(_Strict):
    """How codes or plans are chosen; see `docs/serving.md`."""

    temperature: Number | None = None
    top_k: StrictInt | None = None
    top_p: Number | None = None
    forced: list[StrictInt] = []
    banned: list[StrictInt] = []
    bias: dict[int, Number] = {}


class PlansRequest(ActionsRequest):
    """The same of plans."""

    @field_validator("forced", mode="before")
    @classmethod
    def _one_plan(cls, value: Any) -> Any:
        return [value] if isinstance(value, int) else value


class ChatRequest(_Strict):
    """The fields of OpenAI's chat completions that are taken."""

    kind: ClassVar[ActionKind]
    model: StrictStr
    messages: list[_Message] = Field(min_length=1)
    max_completion_tokens: StrictInt | None = Field(None, ge=1)
    max_tokens: StrictInt | None = Field(None, ge=1)
    n: StrictInt = Field(1, ge=1)
    stop: list[Annotated[StrictStr, Field(min_length=1, max_length=MAX_STOP_LENGTH)]] = Field([], max_length=MAX_STOPS)
    # Not OpenAI's but vLLM's, whose benchmark sends it.
    ignore_eos: StrictBool = False
    seed: StrictInt | None = Field(None, ge=-(2**63), lt=2**63)
    temperature: Number | None = None
    top_p: Number | None = None
    stream: StrictBool = False
    stream_options: _StreamOptions | None = None

    @property
    def actions(self) -> ActionsRequest:
        """What it says of its latent actions."""
        return getattr(self, self.kind.field)

    @model_validator(mode="before")
    @classmethod
    def _without_what_asks_for_nothing(cls, values: Any) -> Any:
        if not isinstance(values, dict):
            return values
        for name, (neutral, why) in REFUSED.items():
            if values.get(name) is not None and values[name] not in neutral:
                why = why.format(**vars(cls.kind))
                raise RequestError(f"`{name}` {why}. Leave it out.", name, code="unsupported_parameter")
        return {name: value for name, value in values.items() if name not in REFUSED}

    @field_validator("stop", mode="before")
    @classmethod
    def _one_stop(cls, value: Any) -> Any:
        return [value] if isinstance(value, str) else value


class CodesChatRequest(ChatRequest):
    """To a model of codes."""

    kind = CODES
    latent_actions: ActionsRequest = ActionsRequest()


class PlansChatRequest(ChatRequest):
    """To a model of plans."""

    kind = PLANS
    plans: PlansRequest = PlansRequest()


def parse_request(body: bytes, kind: ActionKind = CODES) -> ChatRequest:
    """
    The request in a body, to a model of this kind.

    Raises:
        RequestError: With the field, what it holds and what works.
    """
    if _holds_too_much(body):
        raise RequestError(f"The body holds more than {MAX_VALUES:,} values.", status=413)
    form: type[ChatRequest] = PlansChatRequest if kind == PLANS else CodesChatRequest
    try:
        request = form.model_validate_json(body)
    except ValidationError as error:
        raise _refusal(error, form) from error
    if request.max_tokens is not None and request.max_completion_tokens not in (None, request.max_tokens):
        raise RequestError("`max_tokens` and `max_completion_tokens` differ. Give the latter.", "max_tokens")
    if request.stream_options is not None and not request.stream:
        raise RequestError("`stream_options` needs `stream: true`.", "stream_options")
    return request


def _holds_too_much(body: bytes) -> bool:
    marks = sum(map(body.count, MARKS))
    if not MAX_VALUES < marks <= MAX_MARKS:
        return marks > MAX_MARKS
    bare = STRING.sub(b"", body)
    # How deep one may stand in another is the parser's affair, and commas part the values.
    return bare.count(b",") > MAX_VALUES or sum(map(bare.count, MARKS)) > 5 * MAX_VALUES


def _refusal(error: ValidationError, form: type[ChatRequest]) -> RequestError:
    """The first thing that is wrong, with the field's name as it is written."""
    found = error.errors(include_url=False)
    first = next((each for each in found if each["type"] == "extra_forbidden"), found[0])
    if isinstance(raised := first.get("ctx", {}).get("error"), RequestError):
        return raised
    loc = first["loc"]
    # What pydantic adds of its own: the kind of a part, after its number, and the mark of a key.
    place = [str(p) for i, p in enumerate(loc) if p != "[key]" and loc[max(i - 2, 0)] != "content"]
    name = ".".join(place)
    if first["type"] == "json_invalid":
        return RequestError(f"The body is no JSON: {first['msg']}.")
    if first["type"] == "extra_forbidden":
        known = [*form.model_fields] if len(place) == 1 else [*ActionsRequest.model_fields]
        meant = MEANT.get(place[-1], "").format(**vars(form.kind))
        near = meant or next(iter(get_close_matches(place[-1], known, n=1)), None)
        hint = f" Did you mean `{near}`?" if near else ""
        return RequestError(f"There is no field `{name}` here.{hint}", name, code="unknown_parameter")
    what = short(first["input"]) if first["type"] != "missing" else "nothing"
    return RequestError(f"`{name}`: {first['msg']}; got {what}." if name else f"{first['msg']}.", name or None)


def generation_request(request: ChatRequest, engine: Engine, limits: RequestLimits) -> GenerationRequest:
    """
    What an engine is asked for. Pictures are decoded here: it takes a while.

    Raises:
        RequestError: For codes, laws, pictures and texts that cannot be taken.
    """
    if request.n > engine.max_batch_size:
        raise RequestError(f"`n` is at most {engine.max_batch_size} here, got {request.n}.", "n")
    do_sample, law = _law(request, engine)
    return GenerationRequest(
        messages=_messages(request.messages, limits),
        max_tokens=request.max_completion_tokens or request.max_tokens,
        n=request.n,
        stop=request.stop,
        ignore_eos=request.ignore_eos,
        seed=request.seed,
        do_sample=do_sample,
        law=law,
        forced=_chosen(request.actions.forced, "forced", engine, least=-1),
        bias=_bias(request.actions, engine),
        stream=request.stream,
    )


def _law(request: ChatRequest, engine: Engine) -> tuple[bool, ActionLaw]:
    """Whether codes or plans are sampled, and from which law."""
    own, kind, (do_sample, law) = request.actions, engine.kind, engine.default_law
    for name in ("temperature", "top_p"):
        outer, inner = getattr(request, name), getattr(own, name)
        if outer is not None and inner not in (None, outer):
            both = f"`{name}` and `{kind.field}.{name}` differ. Both are about {kind.noun}s: give one."
            raise RequestError(both, name)
    temperature = request.temperature if own.temperature is None else own.temperature
    top_p = request.top_p if own.top_p is None else own.top_p
    if temperature is not None:
        do_sample = temperature != 0
    given: dict[str, Any] = {"temperature": temperature or None, "top_k": own.top_k, "top_p": top_p}
    try:
        return do_sample, replace(law, **{name: value for name, value in given.items() if value is not None})
    except ValueError as error:
        name = next(name for name in given if f"`action_{name}`" in str(error))
        message = str(error).replace("`action_", "`").replace("pass `do_sample=False`", "pass 0")
        message = message.replace("code", kind.noun)
        raise RequestError(message, f"{kind.field}.{name}" if getattr(own, name) is not None else name) from error


def _chosen(ids: list[int], name: str, engine: Engine, least: int = 0) -> list[int]:
    kind, count = engine.kind, engine.num_actions
    wrong = [one for one in ids if not least <= one < count]
    if wrong:
        free = f", or -1 for a free {kind.step}" if least < 0 else ""
        place = f"{kind.field}.{name}"
        raise RequestError(f"`{place}`: {kind.noun}s are 0 to {count - 1}{free}, got {wrong[0]}.", place)
    return ids


def _bias(own: ActionsRequest, engine: Engine) -> dict[int, float]:
    kind, count = engine.kind, engine.num_actions
    bias: dict[int, float] = {one: float(own.bias[one]) for one in _chosen(list(own.bias), "bias", engine)}
    wrong = [one for one, value in bias.items() if abs(value) > LARGEST_BIAS]
    if wrong:
        raise RequestError(
            f"`{kind.field}.bias`: at most {LARGEST_BIAS:g} either way, got {bias[wrong[0]]:g} for the {kind.noun} "
            f"{wrong[0]}. `banned` leaves a {kind.noun} out.",
            f"{kind.field}.bias",
        )
    bias |= dict.fromkeys(_chosen(own.banned, "banned", engine), -math.inf)
    if len(set(own.banned)) == count:
        raise RequestError(f"`{kind.field}.banned` must leave at least one {kind.noun}.", f"{kind.field}.banned")
    return bias


def _messages(messages: list[_Message], limits: RequestLimits) -> list[dict[str, Any]]:
    parts = [part for message in messages for part in message.content]
    images = sum(isinstance(part, _ImagePart) for part in parts)
    if sum(len(part.text) for part in parts if isinstance(part, _TextPart)) > limits.max_characters:
        raise RequestError(f"The texts have more than {limits.max_characters} characters together.", "messages")
    if images > limits.max_images:
        raise RequestError(f"At most {limits.max_images} pictures can be sent, got {images}.", "messages")
    return [_message(message, i, limits) for i, message in enumerate(messages)]


def _message(message: _Message, number: int, limits: RequestLimits) -> dict[str, Any]:
    # OpenAI's newer name of the same role.
    role = "system" if message.role == "developer" else message.role
    content: list[dict[str, Any]] = []
    for place, part in enumerate(message.content):
        if isinstance(part, _TextPart):
            content.append({"type": "text", "text": part.text})
            continue
        where = f"messages.{number}.content.{place}.image_url"
        if not part.image_url.url.startswith("data:"):
            raise RequestError(
                f"`{where}` must be a data URL, `data:image/png;base64,...`: no path or address is opened.", where
            )
        try:
            picture = load_image(part.image_url.url, max_pixels=limits.max_pixels)
        except ImageError as error:
            raise RequestError(f"`{where}`: {error}", where) from error
        content.append({"type": "image", "image": picture})
    return {"role": role, "content": content}
