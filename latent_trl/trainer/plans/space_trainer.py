"""Learning a codebook of plans from the backbone's own alternatives, without an encoder and without a reward."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from transformers import EarlyStoppingCallback, PreTrainedTokenizerBase, ProcessorMixin, TrainerCallback
from transformers.utils import logging

from ...data.prompts import EncodedPrompt
from ...data.reading import OpenedRows
from ...plans.assignment import assign
from ...plans.branching import Alternative, branch_answers
from ...plans.model import PlanModel
from ...plans.scoring import log_likelihoods
from ...rewards.calling import RewardCaller
from ..run.loading import own_config
from .plan_training import PlanTrainer, stored_rows
from .report import PlanReport, report_plans
from .space_config import PlanSpaceConfig

logger = logging.get_logger(__name__)

REPORT_TABLE = "plan_report.md"
# Of reward: a space whose ceiling is no higher above the best single answer is of no use.
LEAST_GAIN = 0.01


class PlanSpaceTrainer(PlanTrainer):
    r"""
    Learns plans from a frozen backbone's alternatives.

    Alternatives of each prompt are found once, by branching. In a step, the log-likelihoods \\([M, K]\\) of some
    answers to a prompt under all plans are balanced ([`~latent_trl.plans.assignment.sinkhorn`]), so that each plan has
    an even share of the answers; each plan then learns the answer that it was assigned by cross-entropy. No reward is
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
        self.caller = None if reward_funcs is None else RewardCaller(reward_funcs)
        self.is_fluent = is_fluent
        self.report: PlanReport | None = None
        self.alternatives: dict[int, list[Alternative]] = {}
        if args.eval_strategy != "no" and eval_dataset is None:
            raise ValueError(
                "`eval_dataset` must be given: learning stops when what plans say to held-out prompts no longer gets "
                "better. Or set `eval_strategy='no'`, to learn for `max_steps`."
            )
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
        self._held_out_alternatives: list[list[str]] | None = None

    def _branch(self, rows: Any) -> list[list[Alternative]]:
        """Alternatives of the backbone that ended by themselves."""
        args = self.args
        found = branch_answers(
            self.model.view,
            self.encoder,
            rows,
            max_new_tokens=args.max_completion_length,
            top_k=args.branch_top_k,
            min_prob=args.branch_min_prob,
            max_branches=args.max_branches,
            batch_size=args.scoring_batch_size // 4 or 1,
        )
        return [[one for one in answers if one.ended] for answers in found]

    def before_training(self) -> None:
        found = self._branch(OpenedRows(self.train_dataset, self.args.image_root))
        self.alternatives = dict(enumerate(found))
        kept = [i for i, answers in enumerate(found) if len(answers) > 1]
        check_alternatives(found, len(kept), self.model.plan_config.num_plans, self.args)
        self.rows_in_use = kept

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        prompts = [self.encoder(row) for row in inputs["rows"]]
        generator = torch.Generator().manual_seed(self.args.seed * 1_000_003 + self.state.global_step)
        answers = [self._some_answers(row["_index"], generator) for row in inputs["rows"]]
        scores = log_likelihoods(self.model, self.encoder, prompts, answers, self.args.scoring_batch_size)
        pairs, gains = [], []
        for prompt, own, of_prompt in zip(prompts, answers, scores, strict=True):
            chosen = assign(of_prompt, self.args.assignment_temperature)
            pairs += [(prompt, own[m], plan) for plan, m in enumerate(chosen.tolist())]
            gains.append((of_prompt.gather(0, chosen[None])[0] - of_prompt.mean(dim=1)[chosen]).mean())
        self.figures["assignment/gain"].append(torch.stack(gains).mean().item())
        self.figures["assignment/answers"].append(sum(map(len, answers)) / len(answers))
        batch = self._paired(pairs)
        log_probs = model(**batch)
        loss = -log_probs.sum() / batch["completion_mask"][:, 1:].sum()
        return (loss, None) if return_outputs else loss

    def _some_answers(self, index: int, generator: torch.Generator) -> list[list[int]]:
        every = self.alternatives[index]
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
        rows = stored_rows(self.eval_dataset if own else eval_dataset, "eval_dataset", self.args.image_root)
        if not own or self._held_out_alternatives is None:
            alternatives = [[one.text for one in answers] for answers in self._branch(rows)]
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
        if self.args.should_save:
            (Path(self.args.output_dir) / REPORT_TABLE).write_text(self.report.table(), encoding="utf-8")
        return self.finish_evaluation(self.report.metrics(), metric_key_prefix)

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


def check_alternatives(found: list[list[Alternative]], kept: int, num_plans: int, args: PlanSpaceConfig) -> None:
    """Raises `ValueError` for alternatives from which no plans could be learned, and warns of few."""
    cut = sum(not answers for answers in found)
    if cut > len(found) / 2:
        raise ValueError(
            f"{cut} of {len(found)} prompts have no answer of at most `max_completion_length="
            f"{args.max_completion_length}` tokens that is not empty. Raise it."
        )
    if not kept:
        raise ValueError(
            f"The backbone has one answer to each of the {len(found)} prompts: there are no alternatives to learn. "
            f"Lower `branch_min_prob` ({args.branch_min_prob}), or take other prompts."
        )
    distinct = {one.text for answers in found for one in answers}
    if len(distinct) < num_plans:
        raise ValueError(
            f"There are {num_plans} plans, and the alternatives to all prompts have {len(distinct)} different texts. "
            "Take fewer plans (`num_plans`), more prompts, or branch wider."
        )
    if kept < len(found) / 2:
        logger.warning(
            f"{len(found) - kept} of {len(found)} prompts have one answer or none, and are left out. Lower "
            f"`branch_min_prob` ({args.branch_min_prob}), or take other prompts."
        )
