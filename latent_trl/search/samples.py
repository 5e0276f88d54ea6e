"""The best of N samples."""

from collections.abc import Callable
from typing import Any

from transformers import PreTrainedTokenizerBase, ProcessorMixin

from ..models.latent_action_model import LatentActionModel
from .candidates import Candidate, Scorer, SearchResult, batches, check_budget, refuse
from .sources import AnswerSource, source_of


def best_of_n(
    model: LatentActionModel | AnswerSource,
    processing_class: ProcessorMixin | PreTrainedTokenizerBase,
    rows: Any,
    reward: Callable[..., Any],
    n: int = 8,
    max_new_tokens: int = 32,
    batch_size: int = 64,
    progress: Callable[[int], None] | None = None,
    **generate_kwargs: Any,
) -> list[SearchResult]:
    """
    Samples `n` answers to each prompt and scores them.

    Args:
        model (`LatentActionModel` or `AnswerSource`): In any mode; it answers in evaluation mode. Or an engine in its
            place, [`~latent_trl.vllm.answers.EngineAnswers`].
        processing_class (`ProcessorMixin` or `PreTrainedTokenizerBase`): The backbone's.
        rows (`Dataset` or list): With `prompt`, `images` and the columns that the reward reads.
        reward (`Callable` or `RewardCaller`): A reward function of TRL's signature, sync or async. It sees each text of
            a prompt once. A [`RewardCaller`] may have a time limit.
        n (`int`, defaults to `8`): Answers a prompt.
        max_new_tokens (`int`, defaults to `32`): Longest answer.
        batch_size (`int`, defaults to `64`): Answers decoded at once.
        progress (`Callable`, *optional*): Told the number of prompts that are done.
        generate_kwargs: Of [`LatentActionModel.generate`], such as `action_temperature` or `action_generator`.

    Returns:
        `list[SearchResult]`, one a prompt, each with `n` candidates.

    Raises:
        ValueError: For `n < 1`, arguments that would make all samples the same, or a reward that is no finite number.
    """
    check_budget(n, batch_size)
    refuse(generate_kwargs, "num_return_sequences", "forced_action_ids")
    if generate_kwargs.get("action_do_sample") is False:
        raise ValueError(
            "`action_do_sample=False` gives the same answer each time. Leave it out, or use `tree_search`."
        )
    scorer, results = Scorer(reward), []
    source = source_of(model, processing_class)
    for batch in batches(rows, max(1, batch_size // n)):
        found = source(batch, max_new_tokens, n, **{**generate_kwargs, "action_do_sample": True})
        candidates = [Candidate.of(answer) for answer in found]
        groups = [candidates[i : i + n] for i in range(0, len(candidates), n)]
        for row, group in zip(batch, groups, strict=True):
            scorer.add(row, group, {})
        scorer.score()
        results += [SearchResult(group) for group in groups]
        if progress is not None:
            progress(len(results))
    return results
