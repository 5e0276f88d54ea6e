"""RL over plans: a contextual bandit that learns from all rollouts which plan to hold for a prompt."""

from typing import Any

import torch

from ...plans.model import PlanModel
from ...plans.segments import PlannedAnswer
from .bandit_config import PlanBanditConfig
from .replay import padded_states
from .rl_trainer import PlanRLTrainer, explored

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
        ValueError: For data without prompts, more rollouts a prompt than plans, or a run of several processes.
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
            deviations = self._deviations([self.replay.states[number] for number in numbers])
            noise = torch.randn(logits.shape, generator=generator)
            plans = (logits + args.exploration_temperature * deviations * noise).topk(args.num_generations).indices
        else:
            plans = explored(logits, args.num_generations, args.exploration_temperature, generator)
        return plans, torch.ones(plans.shape)

    @torch.no_grad()
    def _deviations(self, states: list[torch.Tensor]) -> torch.Tensor:
        """Standard deviations `[B, K]` of the logits at some states, given all choices so far."""
        chooser, plans = self.model.chooser, torch.tensor(self.replay.plans)
        features, curvatures = [], []
        size = self.args.rollout_batch_size
        for start in range(0, len(self.replay), size):
            places = list(range(start, min(start + size, len(self.replay))))
            some = self.replay.choices(places).to(self.args.device)
            read = some.read(chooser.features(some.states, some.mask))
            chance = chooser.output(read).gather(1, some.plans[:, None])[:, 0].sigmoid().cpu()
            features.append(read.cpu())
            curvatures.append(chance * (1 - chance))
        known, curvature = torch.cat(features), torch.cat(curvatures)
        padded, mask = padded_states(states)
        asked = chooser.features(padded.to(self.args.device), mask.to(self.args.device)).cpu()
        found = []
        for plan in range(self.model.plan_config.num_plans):
            own = known[plans == plan]
            precision = PRIOR_PRECISION * torch.eye(known.shape[1]) + (own * curvature[plans == plan, None]).T @ own
            root = torch.linalg.cholesky(precision)
            found.append(torch.linalg.solve_triangular(root, asked.T, upper=False).norm(dim=0))
        return torch.stack(found, dim=1)

    def learn_from(self, answers: list[PlannedAnswer], rewards: torch.Tensor, made: list[dict[str, Any]]) -> None:
        for one in made:
            reward = rewards[one["rollout"]].item()
            if reward == reward:
                self.replay.add(one["prompt"], one["plan"], reward, one["said"])

    def update_loss(self, model: PlanModel, step: int) -> torch.Tensor:
        some = self.replay.batch(self.args.replay_batch_size, self.generator(step, 1)).to(self.args.device)
        logits = some.read(model.chooser(some.states, some.mask)).gather(1, some.plans[:, None])[:, 0]
        targets = self.replay.targets()[some.places].to(logits.device)
        return torch.nn.functional.binary_cross_entropy_with_logits(logits, targets)
