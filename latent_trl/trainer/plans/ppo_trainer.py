"""PPO over plans: a value of the states where segments begin, in the place of a group."""

from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import nn

from ...checkpoint.files import read_tensors
from ...models.component import load_state
from ...plans.chooser import PlanChooser
from ...plans.model import PlanModel
from ...plans.segments import PlannedAnswer
from ..rollout.advantages import (
    clipped_value_errors,
    explained_variance,
    generalized_advantages,
    rewards_of_codes,
    whiten,
)
from .grpo_trainer import PlanGRPOTrainer
from .ppo_config import PlanPPOConfig
from .replay import padded_states

VALUE_FILE = "plan_value.safetensors"


class PlanPPOTrainer(PlanGRPOTrainer):
    r"""
    PPO over plans. The value \\(V(s_{t_j})\\), a network of the chooser's form, gives segments advantages by GAE, with
    a discount a segment; the reward is that of the last segment. A decision of a switch has the advantage of the
    segment that it ends or goes on with: the value is of where that starts, which the decision does not change. Else as
    [`PlanGRPOTrainer`].

    Args:
        model, reward_funcs, args, train_dataset, eval_dataset, processing_class, callbacks, space_args: As in
            [`~latent_trl.trainer.plans.rl_trainer.PlanRLTrainer`]; `args` is a `PlanPPOConfig`. The model gets a
            `value`, which checkpoints have, and models that are saved have not.
    """

    _tag_names = ["latent-trl", "plans", "ppo"]
    _name = "PPO over plans"
    config_class = PlanPPOConfig
    run_name = "plan-ppo"

    def __init__(self, model: PlanModel | str, *positional: Any, **named: Any):
        super().__init__(model, *positional, **named)
        config, chooser = self.model.plan_config, self.model.chooser
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(config.seed + 1)
            self.model.value = PlanChooser(chooser.last.in_features, 1, config.chooser_size).to(self.model.device)
        with torch.no_grad():
            self.model.value.output.weight.zero_()
            self.model.value.output.bias.zero_()

    def annotated(self, made: list[dict[str, Any]]) -> list[dict[str, Any]]:
        if not made:
            return []
        places = [self.replay.states_at(one["prompt"], one["said"]) for one in made]
        states, mask, _ = padded_states(places, self.args.device)
        values = self.model.value(states, mask)[:, 0].tolist()
        return [{**one, "value": value} for one, value in zip(made, values, strict=True)]

    def learn_from(self, answers: list[PlannedAnswer], rewards: torch.Tensor, made: list[dict[str, Any]]) -> None:
        args = self.args
        rollouts = [one["rollout"] for one in made]
        segments = [one["segment"] for one in made]
        shape = (len(answers), max(segments) + 1)
        values, mask = torch.zeros(shape), torch.zeros(shape)
        values[rollouts, segments] = torch.tensor([one["value"] for one in made])
        mask[rollouts, segments] = (~rewards.isnan()).float()[rollouts]
        each = rewards_of_codes(rewards.nan_to_num(nan=0.0), mask)
        advantages, returns = generalized_advantages(each, values, mask, args.gamma, args.gae_lambda)
        self.figures["ppo/explained_variance"].append(explained_variance(values, returns, mask).item())
        if args.whiten_advantages:
            advantages = whiten(advantages, mask)
        self.replay.clear_choices()
        for one in made:
            place = one["rollout"], one["segment"]
            if mask[place]:
                notes = {"log_prob": one["log_prob"], "weight": one["weight"], "advantage": advantages[place].item()}
                notes |= {"value": values[place].item(), "return": returns[place].item()}
                reward = rewards[one["rollout"]].item()
                self.replay.add(one["prompt"], one["plan"], reward, one["said"], one["owner"], **notes)
        known = advantages.masked_fill(~mask.bool(), torch.nan)
        self.keep_decisions(answers, made, [known[one["rollout"], one["segment"]].item() for one in made])

    def policy_loss(self, model: PlanModel, places: list[int]) -> torch.Tensor:
        args, device, own = self.args, self.args.device, self.replay.own(places)
        policy_loss = super().policy_loss(model, places)
        if not own:
            return policy_loss
        some = self.replay.choices(own, device)
        values = some.read(model.value(some.states, some.mask))[:, 0]
        old, returns, weights = (self.replay.noted(name, own).to(device) for name in ("value", "return", "weight"))
        errors, _ = clipped_value_errors(values, old, returns, args.value_clip_range)
        self.shares["ppo/value_loss"][self.state.global_step] = errors.detach().sum().item() / len(places)
        value_loss = (weights * errors).sum() / args.rollout_prompts * self.accelerator.num_processes
        return policy_loss + args.value_coef * value_loss

    @property
    def learned(self) -> list[nn.Module]:
        return [self.model.chooser, self.model.value]

    def save_run(self, folder: str | Path) -> None:
        super().save_run(folder)
        if self.args.should_save:
            tensors = {name: tensor.cpu().contiguous() for name, tensor in self.model.value.state_dict().items()}
            save_file(tensors, Path(folder) / VALUE_FILE)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        super()._load_from_checkpoint(resume_from_checkpoint, model)
        file = Path(resume_from_checkpoint) / VALUE_FILE
        load_state(self.model.value, read_tensors(file), str(file))
