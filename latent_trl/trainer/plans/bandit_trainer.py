"""RL over plans: a contextual bandit that learns from all rollouts which plan to hold for a prompt."""

from dataclasses import replace
from typing import Any

import torch

from ...data.prompts import EncodedPrompt
from ...plans.model import PlanModel
from ...plans.segments import PlannedAnswer
from .bandit_config import PlanBanditConfig
from .choosing import RolloutChoices, perturbed
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

    With `share_rewards` all K plans answer each prompt of a batch. Answers cost no reward: the rollouts of a prompt are
    then of different answers, and the reward of one counts for every plan that gives it.

    Args:
        model, reward_funcs, args, train_dataset, eval_dataset, processing_class, callbacks, space_args: As in
            [`~latent_trl.trainer.plans.rl_trainer.PlanRLTrainer`]; `args` is a `PlanBanditConfig`.

    Raises:
        ValueError: For data without prompts, more rollouts a prompt than plans, a learned switch of segments, or
            `share_rewards` where plans are held for segments.
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
        segment = self.model.plan_config.segment
        if segment == "switch":
            raise ValueError(
                "`segment='switch'`: a bandit estimates what plans are worth, and not when to switch. Train with "
                "`PlanGRPOTrainer` or `PlanPPOTrainer` (`latent-trl grpo`, `rloo` or `ppo`), or hold a plan for a "
                "`'sentence'`."
            )
        if self.args.share_rewards and segment != "answer":
            raise ValueError(
                f"`share_rewards` needs plans that are held for the answer, and these have `segment={segment!r}`: what "
                "an answer is worth depends on its later plans too. Leave it out."
            )
        # With `share_rewards`, of the prompts of the last batch: the number of each plan's answer `[B, K]` among those
        # of its prompt, and the answers themselves, by the place of a prompt of this process.
        self._answer_numbers = torch.empty(0, plans, dtype=torch.long)
        self._under_every_plan: dict[int, list[PlannedAnswer]] = {}

    def before_choices(self, numbers: list[int], prompts: dict[int, EncodedPrompt]) -> None:
        if not self.args.share_rewards:
            return
        plans = self.model.plan_config.num_plans

        def told(places: range) -> list[torch.Tensor]:
            asked = [prompts[numbers[place]] for place in places for _ in range(plans)]
            said = self.spoken(asked, lambda rows, answers, inputs: torch.tensor(rows) % plans)
            self._under_every_plan = {place: said[i * plans : (i + 1) * plans] for i, place in enumerate(places)}
            return [answer_numbers(self._under_every_plan[place]) for place in places]

        self._answer_numbers = torch.stack(shared(len(numbers), told))
        self.figures["plans/answers"].append((self._answer_numbers.amax(dim=1) + 1).float().mean().item())

    def rollouts(self, prompts: list[EncodedPrompt], choices: RolloutChoices) -> list[PlannedAnswer]:
        if not self.args.share_rewards:
            return super().rollouts(prompts, choices)
        if not prompts:
            return []
        plans, found = choices(list(range(len(prompts))), [PlannedAnswer() for _ in prompts], {}), []
        for row, plan in enumerate(plans.tolist()):
            under = self._under_every_plan[(choices.first + row) // choices.size]
            # All of them were decoded, once, for the prompt's rollouts together.
            decoded = sum(one.decoded for one in under) if row % choices.size == 0 else 0
            found.append(replace(under[plan], decoded=decoded))
        return found

    def first_plans(self, logits: torch.Tensor, numbers: list[int], batch: int) -> tuple[torch.Tensor, torch.Tensor]:
        args, generator = self.args, self.generator(batch, 0)
        if args.exploration == "thompson" and len(self.replay):
            roots = self._precision_roots()
            found = shared(len(numbers), lambda places: self._deviations([numbers[place] for place in places], roots))
            deviations = torch.stack(found)
            noise = torch.randn(logits.shape, generator=generator)
            scores = logits + args.exploration_temperature * deviations * noise
        else:
            scores = perturbed(logits, args.exploration_temperature, generator)
        if args.share_rewards:
            scores = answers_first(scores, self._answer_numbers)
        plans = scores.topk(args.num_generations, dim=1).indices
        return plans, torch.ones(plans.shape)

    @torch.no_grad()
    def _precision_roots(self) -> torch.Tensor:
        """Roots `[K, size, size]` of the precisions of the last layer's weights, given all choices so far."""
        chooser, own = self.model.chooser, self.replay.own(list(range(len(self.replay))))
        count, size = self.model.plan_config.num_plans, chooser.features_size
        total = torch.zeros(count, size, size)
        for start in range(0, len(own), self.args.rollout_batch_size):
            some = self.replay.choices(own[start : start + self.args.rollout_batch_size], self.args.device)
            given = (some.states, some.mask, some.planned)
            chance = chooser(*given)[some.rows, some.plans].sigmoid()
            read = chooser.features(*given)[some.rows, some.plans]
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
        given = padded_states([self.replay.states_at(number) for number in numbers], self.args.device)
        asked = self.model.chooser.features(*given).cpu()
        return list(torch.linalg.solve_triangular(roots, asked.permute(1, 2, 0), upper=False).norm(dim=1).T)

    def learn_from(self, answers: list[PlannedAnswer], rewards: torch.Tensor, made: list[dict[str, Any]]) -> None:
        counted: set[tuple[int, int]] = set()
        for one in made:
            reward = rewards[one["rollout"]].item()
            if reward == reward:
                for plan in self._with_same_answer(one, counted):
                    self.replay.add(one["prompt"], plan, reward, one["said"], one["owner"])

    def _with_same_answer(self, choice: dict[str, Any], counted: set[tuple[int, int]]) -> list[int]:
        """Plans for which the reward of a choice counts; of the same answer of a prompt once, which `counted` knows."""
        if not self.args.share_rewards:
            return [choice["plan"]]
        place = choice["rollout"] // self.args.num_generations
        own = self._answer_numbers[place]
        answer = int(own[choice["plan"]])
        if (place, answer) in counted:
            return []
        counted.add((place, answer))
        return (own == answer).nonzero()[:, 0].tolist()

    def update_loss(self, model: PlanModel, step: int) -> torch.Tensor:
        drawn = self.replay.drawn(self.args.replay_batch_size, self.generator(step, 1))
        own = self.replay.own(drawn)
        if not own:
            return self.no_loss()
        some = self.replay.choices(own, self.args.device)
        logits = some.read(model.chooser(some.states, some.mask, some.planned)).gather(1, some.plans[:, None])[:, 0]
        targets = self.replay.targets()[own].to(logits.device)
        loss = torch.nn.functional.binary_cross_entropy_with_logits(logits, targets, reduction="sum")
        return loss * self.accelerator.num_processes / len(drawn)


def answer_numbers(answers: list[PlannedAnswer]) -> torch.Tensor:
    """The number `[K]` of each answer among the different ones, in the order in which they come."""
    numbers: dict[tuple[int, ...], int] = {}
    return torch.tensor([numbers.setdefault(tuple(answer.token_ids), len(numbers)) for answer in answers])


def answers_first(scores: torch.Tensor, numbers: torch.Tensor) -> torch.Tensor:
    """Scores `[B, K]` of plans by which the best plan of each different answer comes before all other plans."""
    best = torch.full_like(scores, -torch.inf).scatter_reduce(1, numbers, scores, "amax")
    return torch.where(scores == best.gather(1, numbers), scores - scores.min() + scores.max() + 1, scores)
