"""RL over plans by policy gradient, with the advantages of a group."""

from pathlib import Path
from typing import Any

import torch

from ...data.prompts import EncodedPrompt
from ...plans.model import PlanModel
from ...plans.segments import PlannedAnswer
from ..rollout.advantages import GROUP_ADVANTAGES
from .choosing import RolloutChoices, perturbed
from .grpo_config import PlanGRPOConfig
from .rl_trainer import PlanRLTrainer
from .switching import RolloutSwitch, SwitchDecisions, switch_laws

# Of logarithms of ratios: beyond, a float32 would overflow long before clipping.
LARGEST_LOG_RATIO = 20.0


class PlanGRPOTrainer(PlanRLTrainer):
    r"""
    GRPO over plans, with RLOO and REINFORCE++ by `advantage_estimator`.

    The chooser's logits over `exploration_temperature` are those of a policy, and an answer with segments \\(j\\) has
    \\(\log \pi(\tau) = \sum_j \log \pi(a_j \mid s_{t_j})\\), where \\(s_{t_j}\\) are the states of the prompt and of
    what was said before the segment. The loss of a rollout is PPO's clipped one, summed over its segments:

    \\[ -\sum_j \min\big(r_j A,\ \mathrm{clip}(r_j, 1 - \epsilon, 1 + \epsilon_{high}) A\big) \\]

    and the mean over rollouts is taken, or the weighted sum over a prompt's where they are drawn without replacement.

    Where a learned switch ends segments (`segment="switch"`), each of its decisions is one more, drawn from the law of
    [`~latent_trl.plans.switch.PlanSwitch`]: \\(\sum_t \log \pi(g_t \mid h_t)\\) is added to \\(\log \pi(\tau)\\),
    and the sum above runs over decisions too, with the advantage of the segment that is ended or gone on with.

    Args:
        model, reward_funcs, args, train_dataset, eval_dataset, processing_class, callbacks, space_args: As in
            [`~latent_trl.trainer.plans.rl_trainer.PlanRLTrainer`]; `args` is a `PlanGRPOConfig`.

    Raises:
        ValueError: For data without prompts, or as many different plans a prompt as there are.
        RewardError: For a reward function that raises, or returns what is no number.
    """

    _tag_names = ["latent-trl", "plans", "grpo"]
    _name = "GRPO over plans"
    config_class = PlanGRPOConfig
    run_name = "plan-grpo"

    def __init__(self, *positional: Any, **named: Any):
        super().__init__(*positional, **named)
        plans = self.model.plan_config.num_plans
        if self.args.exploration == "without_replacement" and self.args.num_generations >= plans:
            raise ValueError(
                f"`num_generations` is {self.args.num_generations}, and must be below the {plans} plans that are drawn "
                "from without replacement."
            )
        # Of the last batch of rollouts, where there is a switch.
        self.rollout_switch: RolloutSwitch | None = None
        self.decisions: SwitchDecisions | None = None

    def first_plans(self, logits: torch.Tensor, numbers: list[int], batch: int) -> tuple[torch.Tensor, torch.Tensor]:
        args, generator = self.args, self.generator(batch, 0)
        if args.exploration == "without_replacement":
            return drawn_with_weights(logits, args.num_generations, args.exploration_temperature, generator)
        law = (logits / args.exploration_temperature).softmax(dim=1)
        plans = torch.multinomial(law, args.num_generations, replacement=True, generator=generator)
        return plans, torch.full(plans.shape, 1 / args.num_generations)

    def rollouts(self, prompts: list[EncodedPrompt], choices: RolloutChoices) -> list[PlannedAnswer]:
        if self.model.has_switch:
            self.rollout_switch = RolloutSwitch(self, choices)
        return self.spoken(prompts, choices, self.rollout_switch)

    def learn_from(self, answers: list[PlannedAnswer], rewards: torch.Tensor, made: list[dict[str, Any]]) -> None:
        advantages, of_decisions = self.advantages(rewards, made)
        self.replay.clear_choices()
        for one, advantage in zip(made, advantages, strict=True):
            if advantage == advantage:
                notes = {"log_prob": one["log_prob"], "advantage": advantage, "weight": one["weight"]}
                reward = rewards[one["rollout"]].item()
                self.replay.add(one["prompt"], one["plan"], reward, one["said"], one["owner"], **notes)
        self.keep_decisions(answers, made, of_decisions)

    def keep_decisions(self, answers: list[PlannedAnswer], made: list[dict[str, Any]], advantages: list[float]) -> None:
        """Keeps the switch's decisions, of which those in the segments of the choices `made` have these advantages."""
        if self.rollout_switch is None:
            return
        known = {
            (one["rollout"], one["segment"]): advantage
            for one, advantage in zip(made, advantages, strict=True)
            if advantage == advantage
        }
        weights = {one["rollout"]: one["weight"] for one in made}
        # Behind the last token of an answer there is none.
        total = sum(len(answers[rollout].token_ids) - 1 for rollout, segment in known if segment == 0)
        self.decisions = self.rollout_switch.decisions(known, weights, total)
        ended = sum(len(answer.plans) - 1 for answer in answers)
        self.figures["switch/rate"].append(ended / max(1, sum(len(answer.token_ids) - 1 for answer in answers)))

    def advantages(self, rewards: torch.Tensor, made: list[dict[str, Any]]) -> tuple[list[float], list[float]]:
        """
        Of every choice, and of a switch's decisions in its segment, in the order of `made`; NaN where the rollout could
        not be scored.
        """
        args = self.args
        if args.exploration == "without_replacement":
            first = torch.tensor([one["log_prob"] for one in made if one["segment"] == 0])
            weights = torch.tensor([one["weight"] for one in made if one["segment"] == 0])
            at_first, later = advantages_without_replacement(rewards, first.exp(), weights, args.num_generations)
            of_choices = [(later if one["segment"] else at_first)[one["rollout"]].item() for one in made]
            return of_choices, [later[one["rollout"]].item() for one in made]
        of_rollout = GROUP_ADVANTAGES[args.advantage_estimator](rewards, args.num_generations, args.scale_rewards)
        found = [of_rollout[one["rollout"]].item() for one in made]
        return found, found

    def update_loss(self, model: PlanModel, step: int) -> torch.Tensor:
        return self.policy_loss(model, list(range(len(self.replay))))

    def policy_loss(self, model: PlanModel, places: list[int]) -> torch.Tensor:
        """The loss over the choices of these numbers: the share of it that this process has the states for."""
        args, device, count, places = self.args, self.args.device, len(places), self.replay.own(places)
        if not places:
            return self.no_loss()
        some = self.replay.choices(places, device)
        logits = some.read(model.chooser(some.states, some.mask, some.planned)) / args.exploration_temperature
        laws = logits.log_softmax(dim=1)
        log_probs = laws.gather(1, some.plans[:, None])[:, 0]
        old, advantages, weights = (
            self.replay.noted(name, places).to(device) for name in ("log_prob", "advantage", "weight")
        )
        gains, clipped = self._clipped_gains(log_probs, old, advantages)
        # `torch.special.entr` has no gradient where a probability is 0 in float32.
        entropies = -(laws.exp() * laws).sum(dim=1)
        step = self.state.global_step
        self.shares["entropy"][step] = entropies.sum().item() / count
        self.shares["clip_ratio"][step] = clipped / count
        total = (weights * (gains + args.entropy_coef * entropies)).sum()
        if self.decisions is not None:
            total = total + self._switch_gains(model, self.decisions.to(device))
        return -total / args.rollout_prompts * self.accelerator.num_processes

    def _switch_gains(self, model: PlanModel, decisions: SwitchDecisions) -> torch.Tensor:
        """The weighted sum of the clipped gains of a switch's decisions that this process has."""
        log_probs, entropies = switch_laws(model, decisions)
        gains, _ = self._clipped_gains(log_probs, decisions.log_probs, decisions.advantages)
        share = entropies.sum().item() / max(1, int(decisions.total))
        self.shares["switch/entropy"][self.state.global_step] = share
        return (decisions.weights * gains).sum()

    def _clipped_gains(
        self, log_probs: torch.Tensor, old: torch.Tensor, advantages: torch.Tensor
    ) -> tuple[torch.Tensor, int]:
        """PPO's clipped gains of choices, and how many of them clipping changed."""
        ratio = (log_probs - old).clamp(-LARGEST_LOG_RATIO, LARGEST_LOG_RATIO).exp()
        clipped = ratio.clamp(1 - self.args.epsilon, 1 + self.args.epsilon_high)
        gains = torch.minimum(ratio * advantages, clipped * advantages)
        return gains, int((clipped * advantages < ratio * advantages).sum())

    def save_run(self, folder: str | Path) -> None:
        super().save_run(folder)
        if self.decisions is not None:
            self.decisions.save(folder)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        super()._load_from_checkpoint(resume_from_checkpoint, model)
        if self.model.has_switch:
            self.decisions = SwitchDecisions.load(resume_from_checkpoint)


def drawn_with_weights(
    logits: torch.Tensor, count: int, temperature: float, generator: torch.Generator
) -> tuple[torch.Tensor, torch.Tensor]:
    r"""
    Different plans, and the weight \\(p / q\\) of each, p its probability and q that of its perturbed logit to pass the
    greatest of those that were left out: the weighted sum of anything over the plans that were drawn has its mean over
    all of them as expectation ([Kool et al., 2019](https://huggingface.co/papers/1903.06059), section 4.2).

    Args:
        logits (`torch.Tensor`): `[B, K]`, K above `count`.
        count (`int`), temperature (`float`), generator (`torch.Generator`): Of the draws.

    Returns:
        Plans and weights `[B, count]`.
    """
    values, plans = perturbed(logits, temperature, generator).topk(count + 1, dim=1)
    log_probs = (logits / temperature).log_softmax(dim=1)
    # Perturbed logits are those of unnormalised laws: the threshold is moved as the logits are.
    threshold = values[:, -1:] - (logits / temperature).logsumexp(dim=1, keepdim=True)
    taken = log_probs.gather(1, plans[:, :count])
    passing = -torch.expm1(-(taken - threshold).exp())
    return plans[:, :count], taken.exp() / passing


def advantages_without_replacement(
    rewards: torch.Tensor, probs: torch.Tensor, weights: torch.Tensor, group_size: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """
    Advantages of rollouts whose first plans were drawn without replacement: the reward less the weighted sum of the
    group's, as leaves the gradient unbiased ([Kool et al., 2019](https://openreview.net/forum?id=r1lgTGL5DE)).

    Args:
        rewards (`torch.Tensor`), probs (`torch.Tensor`), weights (`torch.Tensor`): `[N]`, groups one after another.
        group_size (`int`): G.

    Returns:
        `[N]` for first segments, and `[N]` for later ones, whose baseline is of the others of the group.
    """
    groups, chance, weight = (x.view(-1, group_size) for x in (rewards, probs, weights))
    known = (groups * weight).nan_to_num(nan=0.0)
    total = known.sum(dim=1, keepdim=True)
    first = groups * (1 - chance + weight) - total
    return first.flatten(), (groups - (total - known)).flatten()
