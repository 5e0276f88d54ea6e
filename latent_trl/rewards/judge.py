"""A language model that sees the image and grades the answer against a reference."""

import asyncio
import logging
import os
from collections import Counter
from collections.abc import Callable
from copy import deepcopy
from pathlib import Path
from typing import Any

from PIL import Image

from .conversation import completion_text, prompt_text, require_column, row_images
from .event_loop import run_async
from .images import image_url, load_images
from .judge_cache import ReplyCache
from .judge_client import JudgeCallError, JudgeClient, JudgeSession, JudgeStats, import_openai
from .judge_template import Judgement, JudgeTemplate

logger = logging.getLogger(__name__)
CHECK_ATTEMPTS = 3


class JudgeUnavailableError(RuntimeError):
    """The judge answers nothing that can be used, so training on it would be training on nothing."""


class JudgeReward:
    r"""
    Reward from a judge behind an OpenAI-compatible chat-completions endpoint.

    Answer and reference are graded side by side on the aspects of a template, twice, with their order swapped, so that
    a liking for the first or the second place cancels out. With \\( s_a \\) the scores averaged over the two orders,

    $$ R = \frac{\sum_{a} s_a(\text{answer})}{\sum_{a} s_a(\text{reference})} $$

    A completion for which either call fails gets `None`, which TRL leaves out of the group's statistics. Nothing is
    filled in. Before the first batch the endpoint is tried with [`~JudgeReward.check`].

    Args:
        model (`str`):
            Name of the model at the endpoint.
        base_url (`str`, *optional*):
            Address of the endpoint, such as `"http://localhost:8000/v1"`. Defaults to the environment's
            `OPENAI_BASE_URL`, else OpenAI's own.
        api_key (`str`, *optional*):
            Key for it. Defaults to the environment's `OPENAI_API_KEY`, else `"EMPTY"`, which local servers accept.
        template (`str`, `Path` or `JudgeTemplate`, *optional*, defaults to `"mmrole"`):
            Aspects and wording: `"mmrole"`, `"pcogalign"`, or the path of a JSON file of the same layout.
        reference_column (`str`, *optional*, defaults to `"reference"`):
            Column with the reference answers, plain or conversational. Rows in which it is `None` get `None`.
        send_images (`bool`, *optional*, defaults to `True`):
            Whether the judge sees the row's images (`images` or `image` column, else the prompt's image blocks).
        max_image_side (`int`, *optional*, defaults to `1024`):
            Longest side of an image in pixels; larger ones are scaled down. `None` for no limit.
        image_root (`str` or `Path`, *optional*):
            The only folder that paths of images may lead to. Trainers hand over pictures, which need none.
        structured_output (`bool`, *optional*, defaults to `True`):
            Whether to ask for a JSON schema (`response_format`). Where the endpoint refuses it, it is asked without.
        temperature (`float`, *optional*, defaults to `0.0`):
            Sampling temperature of the judge. `None` leaves it out of the request.
        max_tokens (`int`, *optional*, defaults to `1024`):
            Limit on the reply. `None` leaves it out of the request.
        extra_body (`dict`, *optional*):
            Further fields of the request, for example `{"max_completion_tokens": 4096}`.
        concurrency (`int`, *optional*, defaults to `16`):
            Requests in flight at once, for each process.
        timeout (`float`, *optional*, defaults to `60.0`):
            Seconds for one attempt.
        max_retries (`int`, *optional*, defaults to `4`):
            Further attempts after a timeout, a lost connection, or status 408, 409, 425, 429 or 5xx.
        retry_delay (`float`, *optional*, defaults to `1.0`):
            Seconds before the first of them. Doubles with each; a `Retry-After` header goes before it.
        max_retry_delay (`float`, *optional*, defaults to `60.0`):
            Longest wait in seconds.
        cache_dir (`str` or `Path`, *optional*):
            Folder in which replies that could be read are kept, addressed by the content of the request.
        max_unscored_fraction (`float`, *optional*, defaults to `1.0`):
            Raise [`JudgeUnavailableError`] after a batch of which a larger share could not be scored. `1.0`: never.
        name (`str`, *optional*, defaults to `"judge"`):
            Name of the reward in the metrics.

    Example:

    ```python
    reward = JudgeReward("Qwen/Qwen2.5-VL-72B-Instruct", base_url="http://localhost:8000/v1", cache_dir="judge-cache")
    trainer = LatentActionGRPOTrainer(model=model, reward_funcs=reward, train_dataset=dataset)
    ```
    """

    def __init__(
        self,
        model: str,
        base_url: str | None = None,
        api_key: str | None = None,
        template: str | Path | JudgeTemplate = "mmrole",
        reference_column: str = "reference",
        send_images: bool = True,
        max_image_side: int | None = 1024,
        image_root: str | Path | None = None,
        structured_output: bool = True,
        temperature: float | None = 0.0,
        max_tokens: int | None = 1024,
        extra_body: dict[str, Any] | None = None,
        concurrency: int = 16,
        timeout: float = 60.0,
        max_retries: int = 4,
        retry_delay: float = 1.0,
        max_retry_delay: float = 60.0,
        cache_dir: str | Path | None = None,
        max_unscored_fraction: float = 1.0,
        name: str = "judge",
    ):
        import_openai()
        if not 0 <= max_unscored_fraction <= 1:
            raise ValueError(f"`max_unscored_fraction` must be between 0 and 1; got {max_unscored_fraction}.")
        self.__name__ = name
        self.template = template if isinstance(template, JudgeTemplate) else JudgeTemplate.load(template)
        self.reference_column = reference_column
        self.send_images = send_images
        self.max_image_side = max_image_side
        self.image_root = image_root
        self.max_unscored_fraction = max_unscored_fraction
        settings = {"temperature": temperature, "max_tokens": max_tokens, "extra_body": extra_body}
        self.client = JudgeClient(
            model=model,
            base_url=base_url or os.environ.get("OPENAI_BASE_URL") or "https://api.openai.com/v1",
            api_key=api_key or os.environ.get("OPENAI_API_KEY") or "EMPTY",
            request={key: value for key, value in settings.items() if value is not None},
            concurrency=concurrency,
            timeout=timeout,
            max_retries=max_retries,
            retry_delay=retry_delay,
            max_retry_delay=max_retry_delay,
            cache=ReplyCache(cache_dir),
            structured=structured_output,
        )
        self._checked = False

    def __repr__(self) -> str:
        return f"JudgeReward(model={self.client.model!r}, base_url={self.client.address!r}, name={self.__name__!r})"

    @property
    def stats(self) -> JudgeStats:
        """Counters of this process: calls, retries, cached, failed, tokens, samples, unscored, reasons."""
        return self.client.stats

    def check(self) -> None:
        """
        Tries the endpoint with one small comparison, and a small image if the judge is to see images.

        It runs by itself before the first batch; call it to fail earlier.

        Raises:
            [`JudgeUnavailableError`]: There is no answer, or none that can be read.
        """
        run_async(self.acheck())

    async def acheck(self) -> None:
        """The same as [`~JudgeReward.check`], as a coroutine."""
        square = [image_url(Image.new("RGB", (64, 64), "red"))] if self.send_images else []
        messages = self.template.messages(
            "user: What colour is a ripe tomato?", "It is red.", "A ripe tomato is red.", square
        )
        async with self.client.session() as session:
            for _ in range(CHECK_ATTEMPTS):
                session = JudgeSession(self.client, session.connection, session.openai)
                try:
                    await session.ask(messages, self.template.response_format, self.template.parse, cache=False)
                except JudgeCallError as error:
                    failure = error
                    if error.reason.startswith(("http_", "timeout", "connection")):
                        break
                else:
                    self._checked = True
                    return
        hint = " If the model takes no images, set `send_images=False`." if self.send_images else ""
        raise JudgeUnavailableError(
            f"The judge `model={self.client.model!r}` at `base_url={self.client.address!r}` gave no scores for a "
            f"trial request ({failure}). Start the endpoint or correct `base_url`, `model` or `api_key`.{hint}"
        )

    async def score(
        self, prompts: list, completions: list, references: list, images: list[list] | None = None
    ) -> list[Judgement | None]:
        """
        Grades answers against references, aspect by aspect.

        Args:
            prompts (`list`): Prompts, plain or conversational.
            completions (`list`): Answers, plain or conversational.
            references (`list`): Reference answers, likewise; `None` where a row has none.
            images (`list[list]`, *optional*): Images of each row. Defaults to those in the prompts.

        Returns:
            `list[Judgement | None]`: `None` for a row without a reference, and for one that could not be graded.
        """
        graded = await self._grade(prompts, completions, references, images or row_images(prompts, {}))
        return [None if isinstance(outcome, JudgeCallError) else outcome for outcome in graded]

    async def __call__(
        self,
        prompts: list,
        completions: list,
        log_extra: Callable | None = None,
        log_metric: Callable | None = None,
        **columns,
    ) -> list[float | None]:
        """
        The reward function: see [TRL's documentation](https://huggingface.co/docs/trl/grpo_trainer).

        Args:
            prompts (`list`): Prompts of the batch.
            completions (`list`): Completions of the batch.
            log_extra (`Callable`, *optional*): TRL's; gets one column with the reason of each failure.
            log_metric (`Callable`, *optional*): TRL's; gets counts of the batch.
            **columns: Further columns; `reference_column` must be among them.

        Returns:
            `list[float | None]`: Ratio of the scores, or `None` where the row could not be scored.
        """
        references = require_column(columns, self.reference_column, "reference_column", "JudgeReward")
        before = deepcopy(self.stats)
        outcomes = await self._grade(prompts, completions, references, row_images(prompts, columns))
        self._report(outcomes, before, log_extra, log_metric)
        return [outcome.ratio if isinstance(outcome, Judgement) else None for outcome in outcomes]

    async def _grade(
        self, prompts: list, completions: list, references: list, images: list[list]
    ) -> list[Judgement | JudgeCallError | None]:
        if not self._checked:
            await self.acheck()
        urls = self._image_urls(images)
        async with self.client.session() as session:
            return await asyncio.gather(
                *(
                    self._grade_row(session, prompt_text(prompt), completion_text(completion), reference, row)
                    for prompt, completion, reference, row in zip(prompts, completions, references, urls, strict=True)
                )
            )

    async def _grade_row(
        self, session: JudgeSession, conversation: str, answer: str, reference: Any, urls: list[str]
    ) -> Judgement | JudgeCallError | None:
        if reference is None:
            return None
        reference = completion_text(reference)
        template = self.template
        orders = [(answer, reference), (reference, answer)]
        requests = [template.messages(conversation, first, second, urls) for first, second in orders]
        replies = await asyncio.gather(
            *(session.ask(request, template.response_format, template.parse) for request in requests),
            return_exceptions=True,
        )
        self.stats.samples += 1
        for reply in replies:
            if isinstance(reply, JudgeCallError):
                self.stats.unscored += 1
                return reply
            if isinstance(reply, BaseException):
                raise reply
        (answer_first, reference_second), (reference_first, answer_second) = replies
        firsts, seconds = (answer_first, reference_first), (answer_second, reference_second)
        difference = sum(sum(scores.values()) for scores in firsts) - sum(sum(scores.values()) for scores in seconds)
        return Judgement(
            answer={aspect: (answer_first[aspect] + answer_second[aspect]) / 2 for aspect in template.aspects},
            reference={aspect: (reference_first[aspect] + reference_second[aspect]) / 2 for aspect in template.aspects},
            first_advantage=difference / (2 * len(template.aspects)),
        )

    def _image_urls(self, images: list[list]) -> list[list[str]]:
        if not self.send_images:
            return [[] for _ in images]
        pictures = load_images(images, self.image_root)
        encoded = {id(p): p for row in pictures for p in row}  # the completions of a group share their images
        urls = {key: image_url(picture, self.max_image_side) for key, picture in encoded.items()}
        return [[urls[id(picture)] for picture in row] for row in pictures]

    def _report(
        self, outcomes: list, before: JudgeStats, log_extra: Callable | None, log_metric: Callable | None
    ) -> None:
        """Logs the batch's failures and costs, and stops the run when too much of it could not be scored."""
        reasons = [outcome.reason if isinstance(outcome, JudgeCallError) else "" for outcome in outcomes]
        asked = sum(outcome is not None for outcome in outcomes)
        unscored = sum(reason != "" for reason in reasons)
        fraction = unscored / max(asked, 1)
        if unscored:
            logger.warning(
                "%s: %d of %d completions not scored: %s",
                self.__name__,
                unscored,
                asked,
                dict(Counter(filter(None, reasons))),
            )
        if log_extra is not None:
            log_extra(f"{self.__name__}_failure", reasons)
        if log_metric is not None:
            log_metric(f"{self.__name__}/unscored_fraction", fraction)
            for counter in ("calls", "retries", "cached", "failed", "prompt_tokens", "completion_tokens"):
                log_metric(f"{self.__name__}/{counter}", getattr(self.stats, counter) - getattr(before, counter))
            scored = [outcome.first_advantage for outcome in outcomes if isinstance(outcome, Judgement)]
            if scored:
                log_metric(f"{self.__name__}/first_advantage", sum(scored) / len(scored))
        if fraction > self.max_unscored_fraction:
            raise JudgeUnavailableError(
                f"{unscored} of {asked} completions of a batch could not be scored, more than "
                f"`max_unscored_fraction={self.max_unscored_fraction}`: {dict(Counter(filter(None, reasons)))}."
            )
