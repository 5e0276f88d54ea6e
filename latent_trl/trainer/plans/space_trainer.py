"""Learning a codebook of plans from the backbone's own alternatives, without an encoder and without a reward."""

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import EarlyStoppingCallback, PreTrainedTokenizerBase, ProcessorMixin, TrainerCallback
from transformers.utils import logging

from ...data.prompts import EncodedPrompt
from ...data.reading import OpenedRows
from ...plans.assignment import assign
from ...plans.branching import Alternative, branch_answers
from ...plans.data_answers import data_answers
from ...plans.model import PlanModel
from ...plans.scoring import log_likelihoods
from ...rewards.calling import RewardCaller
from ..run.loading import own_config
from .ceiling import Judge
from .plan_training import PlanTrainer
from .processes import everywhere, process, shared, worked
from .report import report_plans
from .space_config import PlanSpaceConfig

logger = logging.get_logger(__name__)

REPORT_TABLE = "plan_report.md"
# Of reward: a space whose ceiling is no higher above the best single answer is of no use.
LEAST_GAIN = 0.01


@dataclass
class SegmentStart:
    """Where a segment starts: what has been `said` of an answer, and the alternatives there."""

    said: list[int]
    answers: list[Alternative]


class PlanSpaceTrainer(PlanTrainer):
    r"""
    Learns plans from a frozen backbone's alternatives.

    Alternatives of each prompt are found once, by branching, or are the answers of a data set. In a step, the
    log-likelihoods \\([M, K]\\) of some answers to a prompt under all plans are balanced
    ([`~latent_trl.plans.assignment.sinkhorn`]), so that each plan has an even share of the answers; each plan then
    learns the answer that it was assigned by cross-entropy. Prompts with one answer are pooled. No reward is
    read but by evaluations.

    Args:
        model (`PlanModel` or `str`): The model, a folder or a Hub id.
        args (`PlanSpaceConfig`, *optional*): Alternatives, assignment, rates.
        train_dataset (`Dataset`): With `prompt`, plain or conversational, and `images` where there are some.
        eval_dataset (`Dataset`, *optional*): Held-out prompts, and the columns that the rewards read.
        processing_class (`ProcessorMixin` or `PreTrainedTokenizerBase`, *optional*): The backbone's.
        reward_funcs (`Callable` or list, *optional*): For evaluations: the ceiling over plans is then measured.
        is_fluent (`Callable`, *optional*): Whether a text is a whole sentence, for evaluations.
        callbacks (`list[TrainerCallback]`, *optional*): As in `Trainer`.

    Raises:
        ValueError: For data without prompts, evaluations without held-out prompts, prompts to which the backbone has
            one answer only, or answers that are longer than `max_completion_length`.
    """

    _tag_names = ["latent-trl", "plans"]
    _name = "Learning of plans"

    def __init__(
        self,
        model: PlanModel | str,
        args: PlanSpaceConfig | None = None,
        train_dataset: Any = None,
        eval_dataset: Any = None,
        processing_class: ProcessorMixin | PreTrainedTokenizerBase | None = None,
        reward_funcs: Any = None,
        is_fluent: Callable[[str], bool] | None = None,
        callbacks: list[TrainerCallback] | None = None,
    ):
        args = own_config(args, PlanSpaceConfig, "plans")
        self.caller = None
        if reward_funcs is not None:
            self.caller = RewardCaller(reward_funcs, timeout=args.reward_timeout, timeout_name="reward_timeout")
        self.is_fluent = is_fluent
        self.starts: dict[int, list[SegmentStart]] = {}
        if args.eval_strategy != "no" and eval_dataset is None:
            raise ValueError(
                "`eval_dataset` must be given: learning stops when what plans say to held-out prompts no longer gets "
                "better. Or set `eval_strategy='no'`, to learn for `max_steps`."
            )
        for name, rows in (("train_dataset", train_dataset), ("eval_dataset", eval_dataset)):
            check_answers_column(rows, name, args.answers_column)
        if args.metric_for_best_model is None:
            args.metric_for_best_model = "ceiling" if self.caller else "coverage"
        if args.metric_for_best_model.removeprefix("eval_") == "ceiling" and self.caller is None:
            raise ValueError("`metric_for_best_model='ceiling'` needs `reward_funcs`. Without them take 'coverage'.")
        callbacks = list(callbacks or [])
        if args.early_stopping_patience is not None and args.eval_strategy != "no":
            callbacks.append(EarlyStoppingCallback(args.early_stopping_patience, args.early_stopping_threshold))
        super().__init__(model, args, train_dataset, eval_dataset, processing_class, callbacks, trained="plans")
        if args.answers_per_prompt > self.model.plan_config.num_plans:
            raise ValueError(
                f"`answers_per_prompt` is {args.answers_per_prompt}, and there are {self.model.plan_config.num_plans} "
                "plans to say them. Lower it, or take more plans."
            )
        plans = self.model.plan_config.num_plans
        if args.new_plans >= plans:
            raise ValueError(f"`new_plans` is {args.new_plans}, and there are {plans} plans. Call `add_plans` before.")
        self.first_learned = plans - args.new_plans if args.new_plans else 0
        if args.answers_column is not None and self.model.plan_config.segment != "answer":
            raise ValueError(
                f"`answers_column` is {args.answers_column!r}, whose answers are whole, and a plan is held for "
                f"`segment={self.model.plan_config.segment!r}`. Take `segment='answer'`."
            )
        self._held_out_alternatives: list[list[str]] | None = None

    def _branch(self, prompts: list[EncodedPrompt]) -> list[list[Alternative]]:
        """Alternatives that ended: of the backbone, and of the chosen plans where new ones are learned."""
        args, model = self.args, self.model
        found: list[list[Alternative]] = [[] for _ in prompts]
        contexts: list[Callable[[list[int]], AbstractContextManager] | None] = [None]
        if self.first_learned and model.chooser_is_trained:
            chosen = self._chosen_plans(prompts)
            contexts.append(lambda numbers: model.plans.active(chosen[numbers]))
        for under in contexts:
            alternatives = branch_answers(
                model.view,
                self.encoder,
                prompts,
                max_new_tokens=model.segment_length or args.max_completion_length,
                ends=[*self.ends, *model.segment_ends],
                top_k=args.branch_top_k,
                min_prob=args.branch_min_prob,
                max_branches=args.max_branches,
                batch_size=args.scoring_batch_size // 4 or 1,
                under=under,
                whole_at=model.segment_length,
                may_be_empty=model.plan_config.segment != "answer",
            )
            for own, more in zip(found, alternatives, strict=True):
                said = {one.text for one in own}
                own += [one for one in more if one.ended and one.text not in said]
        return found

    def _data_answers(self, rows: Any) -> list[list[Alternative]]:
        """The answers of a data set that are no longer than `max_completion_length`."""
        args = self.args
        found = data_answers(self.encoder, rows, args.answers_column, self.ends, args.max_completion_length)
        return [[one for one in answers if one.ended] for answers in found]

    def _chosen_plans(self, prompts: list[EncodedPrompt]) -> torch.Tensor:
        inputs = {name: value.to(self.model.device) for name, value in self.encoder.collate(prompts).items()}
        return self.model.plan_logits(**inputs)[:, : self.first_learned].argmax(dim=-1)

    def before_training(self) -> None:
        places = self.usable_places(self.train_dataset, "train_dataset")
        rows = OpenedRows(self.train_dataset, self.args.image_root).only(places)
        size = self.args.scoring_batch_size // 4 or 1
        if self.args.answers_column is not None:
            answers = self._data_answers(rows)
            self.starts = {i: [SegmentStart([], own)] if own else [] for i, own in zip(places, answers, strict=True)}
        if not self.starts:

            def found(numbers: range) -> list[list[SegmentStart]]:
                batches = [numbers[start : start + size] for start in range(0, len(numbers), size)]
                return [
                    starts for some in batches for starts in self._starts([self.encoder(rows[i]) for i in some], some)
                ]

            self.starts = dict(zip(places, shared(len(rows), found), strict=True))
        # Prompts with one answer are pooled where the answers are those of data.
        least = 2 if self.args.answers_column is None else 1
        kept = [i for i, starts in self.starts.items() if any(len(start.answers) >= least for start in starts)]
        if self.model.plan_config.segment != "answer" and all(len(own) < 2 for own in self.starts.values()):
            logger.warning(
                f"No answer goes on behind its first segment (`segment={self.model.plan_config.segment!r}`): plans are "
                "held for whole answers. Take shorter segments, or `segment='answer'`."
            )
        check_alternatives(list(self.starts.values()), len(kept), self.model.plan_config.num_plans, self.args)
        self.rows_in_use = kept

    def _starts(self, prompts: list[EncodedPrompt], numbers: range) -> list[list[SegmentStart]]:
        """
        Where segments of an answer to each prompt start: at the prompt, and behind alternatives that go on. What is
        drawn for a prompt depends on its number alone.
        """
        answers = self._branch(prompts)
        starts = [[SegmentStart([], own)] for own in answers]
        generators = [torch.Generator().manual_seed(self.args.seed * 1_000_003 + number) for number in numbers]
        levels = 1 if self.model.plan_config.segment == "answer" else self.args.segment_starts
        for _ in range(1, levels):
            places, said = [], []
            for place, own in enumerate(starts):
                going_on = [one.token_ids for one in own[-1].answers if one.token_ids[-1] not in self.ends]
                if going_on:
                    draw = int(torch.randint(len(going_on), (1,), generator=generators[place]))
                    beginning = [*own[-1].said, *going_on[draw]]
                    if len(beginning) < self.args.max_completion_length:
                        places.append(place)
                        said.append(beginning)
            if not places:
                break
            grown = [self.model.continued(prompts[place], own) for place, own in zip(places, said, strict=True)]
            for place, beginning, found in zip(places, said, self._branch(grown), strict=True):
                starts[place].append(SegmentStart(beginning, found))
        return [[start for start in own if start.answers] for own in starts]

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        # All processes make the draws of all rows, and score those of their own.
        numbers = everywhere([row["_index"] for row in inputs["rows"]])
        first = sum(map(len, numbers[: process()[0]]))
        own = range(first, first + len(inputs["rows"]))
        generator = torch.Generator().manual_seed(self.args.seed * 1_000_003 + self.state.global_step)
        said, answers = [], []
        for number in [one for of_process in numbers for one in of_process]:
            starts = self.starts[number]
            start = starts[int(torch.randint(len(starts), (1,), generator=generator))] if len(starts) > 1 else starts[0]
            said.append(start.said)
            answers.append(self._some_answers(start.answers, generator))
        prompts: list[EncodedPrompt] = []

        def scored() -> list[torch.Tensor]:
            for row, place in zip(inputs["rows"], own, strict=True):
                prompts.append(self.model.continued(self.encoder(row), said[place]))
            asked = [answers[place] for place in own]
            return log_likelihoods(self.model, self.encoder, prompts, asked, self.args.scoring_batch_size)

        scores = [one for of_process in worked(scored) for one in of_process]
        pairs, gains = [], []
        for row, answer, plan in assigned_pairs(scores, self.args.assignment_temperature):
            # Plans that are not learned have their share of the answers, so that new ones get what those do not say.
            if plan >= self.first_learned:
                pairs.append((row, answers[row][answer], plan))
            gains.append(scores[row][answer, plan] - scores[row][answer].mean())
        self.figures["assignment/gain"].append(torch.stack(gains).mean().item())
        self.figures["assignment/answers"].append(sum(map(len, answers)) / len(answers))
        mine = [(prompts[row - first], answer, plan) for row, answer, plan in pairs if row in own]
        if not mine:
            loss = model(objective=lambda _: self.no_loss())
        else:
            tokens = sum(len(answer) for _, answer, _ in pairs)
            loss = -model(**self._paired(mine)).sum() * self.accelerator.num_processes / tokens
        return (loss, None) if return_outputs else loss

    def _some_answers(self, every: list[Alternative], generator: torch.Generator) -> list[list[int]]:
        order = torch.randperm(len(every), generator=generator)[: self.args.answers_per_prompt].tolist()
        return [every[i].token_ids for i in order]

    def _paired(self, pairs: list[tuple[EncodedPrompt, list[int], int]]) -> dict[str, torch.Tensor]:
        """A batch of prompts and answers: prompts padded on the left, answers on the right."""
        inputs = self.encoder.collate([prompt for prompt, _, _ in pairs])
        longest = max(len(answer) for _, answer, _ in pairs)
        ids = torch.tensor([[*answer, *[0] * (longest - len(answer))] for _, answer, _ in pairs])
        mask = torch.tensor([[1] * len(answer) + [0] * (longest - len(answer)) for _, answer, _ in pairs])
        shape = inputs["input_ids"].shape
        for name, value in inputs.items():
            if value.shape == shape:
                later = {"input_ids": ids, "attention_mask": mask}.get(name, torch.zeros_like(ids))
                inputs[name] = torch.cat([value, later], dim=1)
        inputs["completion_mask"] = torch.cat([torch.zeros(shape, dtype=torch.long), mask], dim=1)
        inputs["plan_ids"] = torch.tensor([plan for _, _, plan in pairs])
        return {name: value.to(self.args.device) for name, value in inputs.items()}

    def evaluate(
        self, eval_dataset: Any = None, ignore_keys: list[str] | None = None, metric_key_prefix: str = "eval"
    ) -> dict[str, float]:
        """
        Lets every plan answer every held-out prompt. The report is kept as `report`, and its table written to
        `output_dir`.
        """
        own = eval_dataset is None
        rows = self.evaluated_rows(self.eval_dataset if own else eval_dataset)
        if not own or self._held_out_alternatives is None:
            alternatives = []
            if self.args.answers_column is not None:
                alternatives = [[one.text for one in answers] for answers in self._data_answers(rows)]
            else:
                size = self.args.scoring_batch_size

                def branched(places: range) -> list[list[str]]:
                    some = [self.encoder(rows[place]) for place in places]
                    batches = [self._branch(some[start : start + size]) for start in range(0, len(some), size)]
                    return [[one.text for one in answers] for batch in batches for answers in batch]

                alternatives = shared(len(rows), branched)
            if own:
                self._held_out_alternatives = alternatives
        else:
            alternatives = self._held_out_alternatives
        self.report = report_plans(
            self.model,
            self.encoder,
            rows,
            self.args.max_completion_length,
            self.ends,
            reward=self.caller,
            alternatives=alternatives,
            is_fluent=self.is_fluent,
            batch_size=self.args.scoring_batch_size,
        )
        figures = self.report.metrics()
        if self.caller is not None and self.model.plan_config.segment != "answer":
            longest, size = self.args.max_completion_length, self.args.scoring_batch_size
            judge = Judge(self.model, self.encoder, self.caller, longest, self.ends, size)
            figures["ceiling"] = judge.ceiling(rows, self.args.seed).best
        if self.args.should_save:
            (Path(self.args.output_dir) / REPORT_TABLE).write_text(self.report.table(), encoding="utf-8")
        return self.finish_evaluation(figures, metric_key_prefix)

    def after_training(self) -> None:
        if self.eval_dataset is None or self.args.eval_strategy == "no":
            return
        # The last step's evaluation is of these plans, unless better ones have been loaded.
        done = [
            row for row in self.state.log_history if row["step"] == self.state.global_step and "eval_distinct" in row
        ]
        figures = done[-1] if done and not self.args.load_best_model_at_end else self.evaluate()
        single = max(figures.get("eval_best_single_plan", 0.0), figures.get("eval_backbone", 0.0))
        if "eval_ceiling" in figures and figures["eval_ceiling"] < single + LEAST_GAIN:
            logger.warning(
                f"alarm: the ceiling over plans ({figures['eval_ceiling']:.3f}) is no better than the best single "
                f"answer ({single:.3f}), so choosing among them gains nothing. Branch wider (`branch_min_prob`, "
                "`max_branches`), take other prompts, or more plans."
            )


def check_answers_column(dataset: Any, name: str, column: str | None) -> None:
    """Raises `ValueError` when answers are to come from data that have no such column."""
    if column is None or dataset is None or not len(dataset):
        return
    columns = getattr(dataset, "column_names", None) or list(dataset[0])
    if column not in columns:
        raise ValueError(f"`{name}` has the columns {sorted(columns)}, and `answers_column` is {column!r}.")


def assigned_pairs(scores: list[torch.Tensor], temperature: float) -> list[tuple[int, int, int]]:
    """
    Who learns what in a step, as numbers of a prompt, an answer to it and a plan.

    Answers of a prompt that has several are shared out among all plans. Prompts with one answer are pooled: each of
    these answers goes to one plan, and plans have even shares of them.

    Args:
        scores (`list[torch.Tensor]`): `[M, K]` of each prompt, log-likelihoods of its answers under plans.
        temperature (`float`): Of the assignment.
    """
    found = [
        (row, m, plan)
        for row, of_prompt in enumerate(scores)
        if len(of_prompt) > 1
        for plan, m in enumerate(assign(of_prompt, temperature).tolist())
    ]
    single = [row for row, of_prompt in enumerate(scores) if len(of_prompt) == 1]
    if single:
        pooled = assign(torch.cat([scores[row] for row in single]).T, temperature).tolist()
        found += [(row, 0, plan) for row, plan in zip(single, pooled, strict=True)]
    return found


def check_alternatives(found: list[list[SegmentStart]], kept: int, num_plans: int, args: PlanSpaceConfig) -> None:
    """Raises `ValueError` for alternatives from which no plans could be learned, and warns of few."""
    cut = sum(not starts for starts in found)
    if cut > len(found) / 2:
        # Answers of data are whole.
        remedy = "Raise it, or hold a plan for a part of an answer: `PlanConfig(segment='sentence')`."
        raise ValueError(
            f"{cut} of {len(found)} prompts have no answer of at most `max_completion_length="
            f"{args.max_completion_length}` tokens that is not empty. "
            f"{remedy if args.answers_column is None else 'Raise it.'}"
        )
    if not kept and args.answers_column is None:
        raise ValueError(
            f"The backbone has one answer to each of the {len(found)} prompts: there are no alternatives to learn. "
            f"Lower `branch_min_prob` ({args.branch_min_prob}), or take other prompts."
        )
    distinct = {one.text for starts in found for start in starts for one in start.answers}
    learned = args.new_plans or num_plans
    if len(distinct) < learned:
        raise ValueError(
            f"There are {learned} plans, and the alternatives to all prompts have {len(distinct)} different texts. "
            "Take fewer plans (`num_plans`), more prompts, or branch wider."
        )
    if kept < len(found) / 2:
        logger.warning(
            f"{len(found) - kept} of {len(found)} prompts have one answer or none, and are left out. Lower "
            f"`branch_min_prob` ({args.branch_min_prob}), or take other prompts."
        )
