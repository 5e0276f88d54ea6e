"""What a judge is asked, and the strict reading of what it answers."""

import json
import re
from dataclasses import dataclass
from pathlib import Path
from string import Template
from typing import Any

from .judge_delimiters import without_delimiters

TEMPLATE_FOLDER = Path(__file__).parent / "judge_templates"
# Where reasoning begins and ends, as models write it.
THINK = re.compile(r"[<◁[]\s*\|?\s*think(?:ing)?\b[^>▷\]]{0,20}[>▷\]]", re.IGNORECASE)
END_OF_THINKING = re.compile(r"[<◁[]\s*\|?\s*/\s*think(?:ing)?\s*\|?\s*[>▷\]]", re.IGNORECASE)
# Each costs a look at all that is before it.
MAX_WRONG = 1_000


class JudgeReplyError(ValueError):
    """
    A reply that cannot be read as scores.

    Args:
        reason (`str`): One word for the counters, such as `"unparsable"` or `"out_of_range"`.
        detail (`str`): What is wrong with the reply.
    """

    def __init__(self, reason: str, detail: str):
        super().__init__(f"{reason}: {detail}")
        self.reason = reason
        self.detail = detail


@dataclass(frozen=True)
class Judgement:
    """
    Scores of an answer and of its reference by one judge, each a mean over the two orders of presentation.

    Args:
        answer (`dict[str, float]`): Score of the answer on each aspect.
        reference (`dict[str, float]`): Score of the reference on each aspect.
        first_advantage (`float`): Mean score of whatever was shown first less that of what was shown second.
    """

    answer: dict[str, float]
    reference: dict[str, float]
    first_advantage: float = 0.0

    @property
    def ratio(self) -> float:
        """Sum of the answer's scores over the sum of the reference's: the reward."""
        return sum(self.answer.values()) / sum(self.reference.values())

    @property
    def aspect_ratios(self) -> dict[str, float]:
        """Score of the answer over score of the reference, aspect by aspect."""
        return {aspect: score / self.reference[aspect] for aspect, score in self.answer.items()}


@dataclass(frozen=True)
class JudgeTemplate:
    """
    The aspects that a judge grades and the words in which it is asked, usually read from a JSON file.

    Args:
        name (`str`): Short name.
        aspects (`dict[str, str]`): Name and meaning of each aspect.
        system (`str`):
            System message: a [`string.Template`] with `$aspects`, `$keys`, `$low` and `$high`.
        user (`str`):
            User message, with `$conversation`, `$first` and `$second`.
        scale (`tuple[int, int]`, *optional*, defaults to `(1, 10)`): Lowest and highest score; the lowest is above 0.
        description (`str`, *optional*, defaults to `""`): What the template is for.
    """

    name: str
    aspects: dict[str, str]
    system: str
    user: str
    scale: tuple[int, int] = (1, 10)
    description: str = ""

    def __post_init__(self):
        object.__setattr__(self, "scale", tuple(self.scale))
        low, high = self.scale
        if not 0 < low < high:
            raise ValueError(
                f"`scale` must be (low, high) with 0 < low < high, as scores are divided; got {self.scale}."
            )
        if not self.aspects:
            raise ValueError(f"`aspects` of the judge template {self.name!r} is empty: name at least one.")

    @classmethod
    def load(cls, name_or_path: str | Path) -> "JudgeTemplate":
        """
        Reads a template.

        Args:
            name_or_path (`str` or `Path`): `"mmrole"`, `"pcogalign"`, or the path of a JSON file of the same layout.
        """
        path = Path(name_or_path)
        if not path.suffix:
            path = TEMPLATE_FOLDER / f"{name_or_path}.json"
        if not path.is_file():
            known = sorted(file.stem for file in TEMPLATE_FOLDER.glob("*.json"))
            raise ValueError(
                f"`template` must be one of {known} or the path of a JSON file; got {str(name_or_path)!r}."
            )
        return cls(**json.loads(path.read_text(encoding="utf-8")))

    def messages(self, conversation: str, first: str, second: str, image_urls: list[str]) -> list[dict[str, Any]]:
        """
        The request for one order of presentation.

        Args:
            conversation (`str`): Text of the prompt.
            first (`str`): Reply shown first.
            second (`str`): Reply shown second.
            image_urls (`list[str]`): Images of the prompt as data or web addresses; may be empty.

        Returns:
            `list[dict]`: Messages for a chat-completions endpoint. The images go before the text.
        """
        low, high = self.scale
        listed = "\n".join(f"- {aspect}: {meaning}" for aspect, meaning in self.aspects.items())
        keys = ", ".join(f'"{aspect}"' for aspect in self.aspects)
        system = Template(self.system).substitute(aspects=listed, keys=keys, low=low, high=high)
        user = Template(self.user).substitute(
            conversation=without_delimiters(conversation),
            first=without_delimiters(first),
            second=without_delimiters(second),
        )
        images = [{"type": "image_url", "image_url": {"url": url}} for url in image_urls]
        content = [*images, {"type": "text", "text": user}] if images else user
        return [{"role": "system", "content": system}, {"role": "user", "content": content}]

    @property
    def response_format(self) -> dict[str, Any]:
        """The JSON schema of a reply, as chat-completions endpoints take it."""
        low, high = self.scale
        score = {"type": "integer", "enum": list(range(low, high + 1))}
        scores = _strict_object({aspect: score for aspect in self.aspects})
        schema = _strict_object({"first": scores, "second": scores})
        return {"type": "json_schema", "json_schema": {"name": "scores", "strict": True, "schema": schema}}

    def parse(self, reply: str) -> tuple[dict[str, float], dict[str, float]]:
        """
        Reads the scores from a reply: one JSON object, alone, fenced, or in the midst of other words.

        Args:
            reply (`str`): Text of the judge.

        Returns:
            `tuple[dict[str, float], dict[str, float]]`: Scores of the first and of the second reply.

        Raises:
            `JudgeReplyError`: There is no such object or more than one, an aspect is missing, unknown or given
                twice, or a score is not a number on the scale. Nothing is ever repaired.
        """
        found = [value for value in _json_objects(reply) if "first" in value or "second" in value]
        if len(found) != 1:
            raise JudgeReplyError("unparsable", f"{len(found)} objects with scores in the reply, 1 expected")
        if set(found[0]) != {"first", "second"}:
            raise JudgeReplyError("wrong_keys", f"keys {sorted(found[0])}, expected ['first', 'second']")
        return self._scores(found[0]["first"]), self._scores(found[0]["second"])

    def _scores(self, scores: Any) -> dict[str, float]:
        if not isinstance(scores, dict) or set(scores) != set(self.aspects):
            got = sorted(scores) if isinstance(scores, dict) else type(scores).__name__
            raise JudgeReplyError("wrong_keys", f"aspects {got}, expected {sorted(self.aspects)}")
        low, high = self.scale
        for aspect, score in scores.items():
            if isinstance(score, bool) or not isinstance(score, (int, float)):
                raise JudgeReplyError("not_a_number", f"{aspect} is {score!r}")
            if not low <= score <= high:
                raise JudgeReplyError("out_of_range", f"{aspect} is {score}, the scale is {low} to {high}")
        return {aspect: float(scores[aspect]) for aspect in self.aspects}


def _strict_object(properties: dict[str, Any]) -> dict[str, Any]:
    return {
        "type": "object",
        "properties": properties,
        "required": list(properties),
        "additionalProperties": False,
    }


def _json_objects(reply: str) -> list[dict]:
    """All outermost JSON objects in a text, after the reasoning that some models put before their answer."""
    begins, ends = list(THINK.finditer(reply)), list(END_OF_THINKING.finditer(reply))
    begun = bool(begins) and not re.search(r"\w", reply[: begins[0].start()])
    if ends:
        before, text = reply[: ends[0].start()], reply[ends[0].end() :]
        nested = sum(begin.start() < ends[0].start() for begin in begins) > 1
        if len(ends) > 1 or nested or (not begun and _json_objects(before)):
            # Which of them ends the reasoning, and which is quoted, cannot be told.
            raise JudgeReplyError("unparsable", "it is not clear where the reasoning ends")
    else:
        text = "" if begun else reply
    decoder = json.JSONDecoder(object_pairs_hook=_unique_keys, parse_constant=_refuse_constant)
    objects, position, wrong = [], text.find("{"), 0
    while position >= 0:
        try:
            value, end = decoder.raw_decode(text, position)
        except JudgeReplyError:
            raise
        except RecursionError:
            raise JudgeReplyError("unparsable", "nested beyond reason") from None
        except ValueError:  # not JSON, or a number without end
            end, wrong = position + 1, wrong + 1
            if wrong > MAX_WRONG:
                raise JudgeReplyError("unparsable", f"more than {MAX_WRONG:,} braces that begin nothing") from None
        else:
            objects.append(value)
        position = text.find("{", end)
    return objects


def _unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    if len({key for key, _ in pairs}) != len(pairs):
        raise JudgeReplyError("wrong_keys", f"a key occurs twice in {[key for key, _ in pairs]}")
    return dict(pairs)


def _refuse_constant(name: str) -> None:
    raise JudgeReplyError("not_a_number", f"{name} is not a score")
