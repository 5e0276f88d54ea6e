"""RL over plans: a contextual bandit that learns from all rollouts which plan to hold for a prompt."""

from typing import Any

import torch

from ...plans.model import PlanModel
from ...plans.segments import PlannedAnswer
from .bandit_config import PlanBanditConfig
from .choosing import explored
from .processes import everywhere, shared
from .replay import padded_states
from .rl_trainer import PlanRLTrainer

# Of the posterior of the chooser's last layer, where plans are drawn from it.
PRIOR_PRECISION = 1.0


class PlanBanditTrainer(PlanRLTrainer):
    r"""
    Learns which plan to choose for a prompt, or for each segment of its answer.

    The chooser gives each plan a logit \\(s_k(x)\\) from the states of the prompt and of what has been said, and
    \\(\sigma(s_k(x))\\) is fitted by cross-entropy to the rewards of all rollouts so far: each segment's choice has the
    reward of its answer. The plans of a prompt's rollouts are drawn without replacement from
    \\(\mathrm{softmax}(s(x) / T)\\), those of later segments independently. Plans and backbone stay as they are.

    Args:
        model, reward_funcs, args, train_dataset, eval_dataset, processing_class, callbacks, space_args: As in
            [`~latent_trl.trainer.plans.rl_trainer.PlanRLTrainer`]; `args` is a `PlanBanditConfig`.

    Raises:
        ValueError: For data without prompts, or more rollouts a prompt than plans.
        RewardError: For a reward function that raises, or returns what is no number.
    """

    _tag_names = ["latent-trl", "plans", "bandit"]
    _name = "Contextual bandit over plans"
    config_class = PlanBanditConfig
    run_name = "plan-bandit"

    def __init__(self, *positional: Any, **named: Any):
        super().__init__(*positional, **named)
        plans = self.model.plan_config.num_plans
        if self.args.num_generations > plans:
            raise ValueError(f"`num_generations` is {self.args.num_generations}, and there are {plans} plans to try.")

    def first_plans(self, logits: torch.Tensor, numbers: list[int], batch: int) -> tuple[torch.Tensor, torch.Tensor]:
        args, generator = self.args, self.generator(batch, 0)
        if args.exploration == "thompson" and len(self.replay):
            roots = self._precision_roots()
            found = shared(len(numbers), lambda places: self._deviations([numbers[place] for place in places], roots))
            deviations = torch.stack(found)
            noise = torch.randn(logits.shape, generator=generator)
            plans = (logits + args.exploration_temperature * deviations * noise).topk(args.num_generations).indices
        else:
            plans = explored(logits, args.num_generations, args.exploration_temperature, generator)
        return plans, torch.ones(plans.shape)

    @torch.no_grad()
    def _precision_roots(self) -> torch.Tensor:
        """Roots `[K, size, size]` of the precisions of the last layer's weights, given all choices so far."""
        chooser, own = self.model.chooser, self.replay.own(list(range(len(self.replay))))
        count, size = self.model.plan_config.num_plans, chooser.output.in_features
        total = torch.zeros(count, size, size)
        for start in range(0, len(own), self.args.rollout_batch_size):
            some = self.replay.choices(own[start : start + self.args.rollout_batch_size], self.args.device)
            read = some.read(chooser.features(some.states, some.mask))
            chance = chooser.output(read).gather(1, some.plans[:, None])[:, 0].sigmoid()
            weighted = (read * (chance * (1 - chance))[:, None]).cpu()
            for plan in some.plans.unique().tolist():
                mine = (some.plans == plan).cpu()
                total[plan] += weighted[mine].T @ read.cpu()[mine]
        return torch.linalg.cholesky(PRIOR_PRECISION * torch.eye(size) + sum(everywhere(total)))

    @torch.no_grad()
    def _deviations(self, numbers: list[int], roots: torch.Tensor) -> list[torch.Tensor]:
        """Standard deviations `[K]` of the logits at the states of some prompts."""
        if not numbers:
            return []
        padded, mask = padded_states([self.replay.states[number] for number in numbers])
        asked = self.model.chooser.features(padded.to(self.args.device), mask.to(self.args.device)).cpu()
        return list(torch.linalg.solve_triangular(roots, asked.T, upper=False).norm(dim=1).T)

    def learn_from(self, answers: list[PlannedAnswer], rewards: torch.Tensor, made: list[dict[str, Any]]) -> None:
        for one in made:
            reward = rewards[one["rollout"]].item()
            if reward == reward:
                self.replay.add(one["prompt"], one["plan"], reward, one["said"], one["owner"])

    def update_loss(self, model: PlanModel, step: int) -> torch.Tensor:
        drawn = self.replay.drawn(self.args.replay_batch_size, self.generator(step, 1))
        own = self.replay.own(drawn)
        if not own:
            return self.no_loss()
        some = self.replay.choices(own, self.args.device)
        logits = some.read(model.chooser(some.states, some.mask)).gather(1, some.plans[:, None])[:, 0]
        targets = self.replay.targets()[own].to(logits.device)
        loss = torch.nn.functional.binary_cross_entropy_with_logits(logits, targets, reduction="sum")
        return loss * self.accelerator.num_processes / len(drawn)
