"""RL over plans by policy gradient, with the advantages of a group."""

from typing import Any

import torch

from ...plans.model import PlanModel
from ...plans.segments import PlannedAnswer
from ..rollout.advantages import GROUP_ADVANTAGES
from .choosing import perturbed
from .grpo_config import PlanGRPOConfig
from .rl_trainer import PlanRLTrainer

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

    def first_plans(self, logits: torch.Tensor, numbers: list[int], batch: int) -> tuple[torch.Tensor, torch.Tensor]:
        args, generator = self.args, self.generator(batch, 0)
        if args.exploration == "without_replacement":
            return drawn_with_weights(logits, args.num_generations, args.exploration_temperature, generator)
        law = (logits / args.exploration_temperature).softmax(dim=1)
        plans = torch.multinomial(law, args.num_generations, replacement=True, generator=generator)
        return plans, torch.full(plans.shape, 1 / args.num_generations)

    def learn_from(self, answers: list[PlannedAnswer], rewards: torch.Tensor, made: list[dict[str, Any]]) -> None:
        advantages = self.advantages(rewards, made)
        self.replay.clear_choices()
        for one, advantage in zip(made, advantages, strict=True):
            if advantage == advantage:
                notes = {"log_prob": one["log_prob"], "advantage": advantage, "weight": one["weight"]}
                reward = rewards[one["rollout"]].item()
                self.replay.add(one["prompt"], one["plan"], reward, one["said"], one["owner"], **notes)

    def advantages(self, rewards: torch.Tensor, made: list[dict[str, Any]]) -> list[float]:
        """Of every choice, in the order of `made`; NaN where the rollout could not be scored."""
        args = self.args
        if args.exploration == "without_replacement":
            first = torch.tensor([one["log_prob"] for one in made if one["segment"] == 0])
            weights = torch.tensor([one["weight"] for one in made if one["segment"] == 0])
            at_first, later = advantages_without_replacement(rewards, first.exp(), weights, args.num_generations)
            return [(later if one["segment"] else at_first)[one["rollout"]].item() for one in made]
        of_rollout = GROUP_ADVANTAGES[args.advantage_estimator](rewards, args.num_generations, args.scale_rewards)
        return [of_rollout[one["rollout"]].item() for one in made]

    def update_loss(self, model: PlanModel, step: int) -> torch.Tensor:
        return self.policy_loss(model, list(range(len(self.replay))))

    def policy_loss(self, model: PlanModel, places: list[int]) -> torch.Tensor:
        """The loss over the choices of these numbers: the share of it that this process has the states for."""
        args, device, count, places = self.args, self.args.device, len(places), self.replay.own(places)
        if not places:
            return self.no_loss()
        some = self.replay.choices(places, device)
        logits = some.read(model.chooser(some.states, some.mask)) / args.exploration_temperature
        laws = logits.log_softmax(dim=1)
        log_probs = laws.gather(1, some.plans[:, None])[:, 0]
        old, advantages, weights = (
            self.replay.noted(name, places).to(device) for name in ("log_prob", "advantage", "weight")
        )
        ratio = (log_probs - old).clamp(-LARGEST_LOG_RATIO, LARGEST_LOG_RATIO).exp()
        clipped = ratio.clamp(1 - args.epsilon, 1 + args.epsilon_high)
        gains = torch.minimum(ratio * advantages, clipped * advantages)
        entropies = torch.special.entr(laws.exp()).sum(dim=1)
        step = self.state.global_step
        self.shares["entropy"][step] = entropies.sum().item() / count
        self.shares["clip_ratio"][step] = (clipped * advantages < ratio * advantages).sum().item() / count
        loss = -(weights * (gains + args.entropy_coef * entropies)).sum() / args.rollout_prompts
        return loss * self.accelerator.num_processes


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
