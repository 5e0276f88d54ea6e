"""`latent-trl evaluate` on plans: the reward under the chosen plan, and the best over all of them."""

import argparse
from dataclasses import dataclass, field
from typing import Any

from .arguments import refuse_given
from .evaluate import interval, largest, swap_images

# What is of codes, of samples, or of the world model.
NOT_OF_PLANS = (
    *("judge", "generations", "generation_temperature", "generation_top_k", "samples", "embedder"),
    *("perplexity", "reference", "temperature", "seed"),
)


@dataclass
class MeasuredPlans:
    """
    Args:
        keys (`list[str]`): Of the rows; all lists below have an entry for each.
        figures (`dict`): Name to a number or an [`~latent_trl.evaluation.intervals.Interval`].
        answers (`list[str]`), swapped (`list[str]`): Under the plan of each; with another row's picture.
        plans (`list[int]`): The plan that was held.
        all_plans (`list[list[str]]`): What every plan answers.
    """

    keys: list[str]
    figures: dict[str, Any] = field(default_factory=dict)
    answers: list[str] = field(default_factory=list)
    plans: list[int] = field(default_factory=list)
    swapped: list[str] = field(default_factory=list)
    all_plans: list[list[str]] = field(default_factory=list)


class PlanMeasurement:
    """
    The measurements on plans.

    Args:
        model (`PlanModel`), processor: The model and its backbone's processor.
        rows (`OpenedRows`): The prompts.
        rewards (`list`): Reward functions.
        args (`argparse.Namespace`): Of the command.
        bars: Where progress is shown.
    """

    def __init__(self, model: Any, processor: Any, rows: Any, rewards: list[Any], args: argparse.Namespace, bars: Any):
        from ..data.prompts import PromptEncoder
        from ..evaluation.judge_protocol import sample_keys
        from ..generation.answers import end_tokens

        count = model.plan_config.num_plans
        if args.plan is not None and args.plan >= count:
            raise ValueError(f"Plans are 0 to {count - 1}, got {args.plan}.")
        if args.plan is None and not model.chooser_is_trained and not args.code_ceiling:
            raise ValueError(
                "No chooser has been trained: give `--plan N`, or `--code-ceiling` for what all plans say. `latent-trl "
                "bandit` and `latent-trl grpo` train one."
            )
        self.model, self.rows, self.args, self.bars = model.eval(), rows, args, bars
        self.encoder = PromptEncoder(processor)
        self.ends = end_tokens(model.backbone, self.encoder.encoder.tokenizer, {}) or []
        self.rewards = {reward.__name__: reward for reward in rewards}
        self.measured = MeasuredPlans(sample_keys(rows, args.key))
        self.figures = self.measured.figures

    def run(self) -> MeasuredPlans:
        """Everything that was asked for."""
        if self.args.plan is not None or self.model.chooser_is_trained:
            kept = self.held()
            if self.args.image_ablation:
                self.image_ablation(kept)
        if self.args.code_ceiling:
            self.ceiling()
        return self.measured

    def answers(self, name: str, rows: Any, plans: list[int] | None) -> tuple[list[int], list[str], list[list[int]]]:
        """
        Plans, texts and tokens of an answer to each row. By default those that are chosen, for each segment where plans
        are held for segments, of which the first is told; a plan of -1 is none.
        """
        size, held, ids = self.args.batch_size, [], []
        task = self.bars.add_task(name, total=len(rows), figures="")
        for start in range(0, len(rows), size):
            prompts = [self.encoder({"_row": i, **rows[i]}) for i in range(start, min(start + size, len(rows)))]
            if plans is None and self.model.plan_config.segment != "answer":
                choose, longest = self.model.best_plans, self.args.max_new_tokens
                spoken = self.model.speak(self.encoder, prompts, choose, longest, self.ends, size)
                held += [answer.plans[0] for answer in spoken]
                ids += [answer.token_ids for answer in spoken]
                self.bars.update(task, completed=len(ids))
                continue
            if plans is None:
                inputs = {n: value.to(self.model.device) for n, value in self.encoder.collate(prompts).items()}
                own = self.model.plan_logits(**inputs).argmax(dim=-1).tolist()
            else:
                own = plans[start : start + size]
            named = None if own[0] < 0 else own
            found = self.model.answers(self.encoder, prompts, named, self.args.max_new_tokens, self.ends, size)
            held += own
            ids += found.token_ids
            self.bars.update(task, completed=len(ids))
        tokenizer = self.encoder.encoder.tokenizer
        return held, [tokenizer.decode(one, skip_special_tokens=True).strip() for one in ids], ids

    def scores(self, rows: Any, texts: list[str], ids: list[list[int]]) -> dict[str, list[float]]:
        from ..evaluation.answers import score_answers

        return {name: score_answers(reward, rows, texts, ids) for name, reward in self.rewards.items()}

    def held(self) -> dict[str, list[float]]:
        """Answers under the chosen plans, or a named one: their rewards, which are returned, and the use of plans."""
        plans = None if self.args.plan is None else [self.args.plan] * len(self.rows)
        self.measured.plans, self.measured.answers, ids = self.answers("Answers under plans", self.rows, plans)
        kept = self.scores(self.rows, self.measured.answers, ids)
        for name, values in kept.items():
            self.figures[f"reward/{name}"] = interval(values)
            unscored = sum(value != value for value in values)
            if unscored:
                self.figures[f"reward/{name}, not scored"] = unscored
        self.figures["plans/used"] = len(set(self.measured.plans))
        self.figures["answers/empty"] = sum(not text for text in self.measured.answers)
        return kept

    def image_ablation(self, kept: dict[str, list[float]]) -> None:
        """Rewards with another row's picture, and what the own picture gains over it; a plan is chosen anew."""
        from ..evaluation.intervals import paired_bootstrap

        plans = None if self.args.plan is None else [self.args.plan] * len(self.rows)
        swapped = swap_images(self.rows)
        _, self.measured.swapped, ids = self.answers("Another picture", swapped, plans)
        for name, other in self.scores(self.rows, self.measured.swapped, ids).items():
            self.figures[f"reward/{name}, another picture"] = interval(other)
            both = [i for i, (a, b) in enumerate(zip(kept[name], other, strict=True)) if a == a and b == b]
            if both:
                gain = paired_bootstrap([kept[name][i] for i in both], [other[i] for i in both])
                self.figures[f"reward/{name}, gain by the picture"] = gain

    def ceiling(self) -> None:
        """The best reward of a prompt over all plans, beside a random plan, the best single one, and the backbone."""
        count = self.model.plan_config.num_plans
        every, texts, ids = [], [], []
        for plan in range(count):
            _, said, tokens = self.answers(f"Plan {plan + 1}/{count}", self.rows, [plan] * len(self.rows))
            texts.append(said)
            ids.append(tokens)
            every.append(self.scores(self.rows, said, tokens))
        self.measured.all_plans = [list(group) for group in zip(*texts, strict=True)]
        _, own, own_ids = self.answers("Backbone", self.rows, [-1] * len(self.rows))
        backbone = self.scores(self.rows, own, own_ids)
        for name in self.rewards:
            by_prompt = list(zip(*(scores[name] for scores in every), strict=True))
            self.figures[f"reward/{name}, best plan"] = interval([largest(list(group)) for group in by_prompt])
            means = [[v for v in group if v == v] for group in by_prompt]
            self.figures[f"reward/{name}, random plan"] = interval([sum(m) / len(m) for m in means if m])
            kept = [[value for value in scores[name] if value == value] for scores in every]
            best = max(range(count), key=lambda plan: sum(kept[plan]) / max(1, len(kept[plan])))
            self.figures[f"reward/{name}, plan {best} for all prompts"] = interval(kept[best])
            self.figures[f"reward/{name}, backbone"] = interval(backbone[name])
        self.figures["different answers of plans"] = interval([len(set(group)) for group in self.measured.all_plans])


def measure_plans(args: argparse.Namespace, rows: Any, rewards: list[Any]) -> MeasuredPlans:
    """All figures of plans that were asked for; options that are not of plans are refused."""
    from .loading import load_processor
    from .plan_loading import load_plans
    from .progress import progress_bars

    prog = "latent-trl evaluate"
    refuse_given(prog, args, NOT_OF_PLANS, f"is not for plans, which {args.model!r} holds: their answers are greedy.")
    if args.code_ceiling and args.code_ceiling > 1:
        raise ValueError("`--code-ceiling` takes no number of steps for plans: a plan is held for the whole answer.")
    model = load_plans(args.model, args.backbone, dtype=args.dtype)
    if args.image_ablation and args.plan is None and not model.chooser_is_trained:
        raise ValueError("`--image-ablation` needs a chooser, or `--plan N`.")
    with progress_bars() as bars:
        return PlanMeasurement(model, load_processor(model, args.backbone), rows, rewards, args, bars).run()
