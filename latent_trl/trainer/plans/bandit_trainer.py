"""RL over plans: a contextual bandit that learns from all rollouts which plan to hold for a prompt."""

import math
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import DataLoader
from transformers import PreTrainedTokenizerBase, ProcessorMixin, TrainerCallback
from transformers.utils import logging

from ...data.prompts import EncodedPrompt
from ...plans.chooser import prompt_states
from ...plans.model import PlanModel
from ...rewards.calling import RewardCaller
from ..run.loading import own_config
from .bandit_config import PlanBanditConfig
from .plan_training import PlanTrainer, PromptRows
from .replay import Replay, padded_states
from .report import report_plans, summed_rewards

logger = logging.get_logger(__name__)

# Of reward: a bandit that is no further below the ceiling has nothing left to find.
NEAR_CEILING = 0.01


class PlanBanditTrainer(PlanTrainer):
    r"""
    Learns which plan to choose for a prompt.

    A plan is held for the whole answer, which is greedy under it: one decision, one reward. The chooser gives each plan
    a logit \\(s_k(x)\\) from the prompt's states, and \\(\sigma(s_k(x))\\) is fitted by cross-entropy to the rewards of
    all rollouts so far. The plans of a prompt's rollouts are drawn without replacement from
    \\(\mathrm{softmax}(s(x) / T)\\). Plans and backbone stay as they are.

    Args:
        model (`PlanModel` or `str`): The model, a folder or a Hub id; its plans have been learned.
        reward_funcs (`Callable` or list): As in TRL. Their sum is the reward.
        args (`PlanBanditConfig`, *optional*): Rollouts, exploration, rates.
        train_dataset (`Dataset`): With `prompt`, `images` where there are some, and the columns that the rewards read.
        eval_dataset (`Dataset`, *optional*): The same, held out.
        processing_class (`ProcessorMixin` or `PreTrainedTokenizerBase`, *optional*): The backbone's.
        callbacks (`list[TrainerCallback]`, *optional*): As in `Trainer`.

    Raises:
        ValueError: For data without prompts, more rollouts a prompt than plans, or a run of several processes.
        RewardError: For a reward function that raises, or returns what is no number.
    """

    _tag_names = ["latent-trl", "plans", "bandit"]
    _name = "Contextual bandit over plans"

    def __init__(
        self,
        model: PlanModel | str,
        reward_funcs: Any,
        args: PlanBanditConfig | None = None,
        train_dataset: Any = None,
        eval_dataset: Any = None,
        processing_class: ProcessorMixin | PreTrainedTokenizerBase | None = None,
        callbacks: list[TrainerCallback] | None = None,
    ):
        args = own_config(args, PlanBanditConfig, "plan-bandit")
        self.caller = RewardCaller(reward_funcs, timeout=args.reward_timeout, timeout_name="reward_timeout")
        self.reward_func_names = self.caller.names
        super().__init__(model, args, train_dataset, eval_dataset, processing_class, callbacks, trained="chooser")
        plans = self.model.plan_config.num_plans
        if args.num_generations > plans:
            raise ValueError(f"`num_generations` is {args.num_generations}, and there are {plans} plans to try.")
        self.replay = Replay()
        self.rows = PromptRows(train_dataset, args.image_root)
        self._ceiling: float | None = None

    def get_train_dataloader(self) -> DataLoader:
        # Prompts are drawn by the number of the step, so that a resumed run draws the same.
        steps = DataLoader(range(self.args.max_steps), batch_size=1, collate_fn=lambda steps: {"steps": steps})
        return self.accelerator.prepare(steps)

    def before_training(self) -> None:
        self.model.chooser_is_trained = True
        places = self.usable_places(self.train_dataset, "train_dataset")
        self.rows = PromptRows(self.train_dataset, self.args.image_root, places)

    def after_training(self) -> None:
        if self.eval_dataset is None:
            return
        figures = self.evaluate()
        if figures["eval_reward"] > figures.get("eval_ceiling", math.inf) - NEAR_CEILING:
            logger.warning(
                f"The reward ({figures['eval_reward']:.3f}) stands at the ceiling over plans "
                f"({figures['eval_ceiling']:.3f}): what no plan says cannot be found. Learn more plans, or branch "
                "wider."
            )

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        args, step = self.args, self.state.global_step
        if step % args.num_iterations == 0:
            self.roll_out(step // args.num_iterations)
        if not len(self.replay):
            raise ValueError(
                f"No reward function could score any of the first {args.rollout_prompts * args.num_generations} "
                "rollouts: all returned None."
            )
        batch = self.replay.batch(args.replay_batch_size, self._generator(step, 1))
        states, mask, plans, targets = (tensor.to(args.device) for tensor in batch)
        logits = model.chooser(states, mask).gather(1, plans[:, None])[:, 0]
        loss = torch.nn.functional.binary_cross_entropy_with_logits(logits, targets)
        return (loss, None) if return_outputs else loss

    def _generator(self, number: int, use: int) -> torch.Generator:
        return torch.Generator().manual_seed((self.args.seed * 2 + use) * 1_000_003 + number)

    def drawn(self, batch: int) -> list[int]:
        """Numbers of the prompts of a batch of rollouts: all prompts in random order, again and again."""
        size, rows, found = self.args.rollout_prompts, len(self.rows), []
        orders: dict[int, list[int]] = {}
        for place in range(batch * size, (batch + 1) * size):
            epoch, within = divmod(place, rows)
            if epoch not in orders:
                orders[epoch] = torch.randperm(rows, generator=self._generator(-1 - epoch, 0)).tolist()
            found.append(orders[epoch][within])
        return found

    @torch.no_grad()
    def roll_out(self, batch: int) -> None:
        """Tries plans for the prompts of a batch, and keeps their rewards."""
        args, numbers = self.args, self.drawn(batch)
        rows = [self.rows[number] for number in numbers]
        prompts = [self.encoder(row) for row in rows]
        self._read(numbers, prompts)
        logits = self._logits([self.replay.states[number] for number in numbers])
        plans = explored(logits, args.num_generations, args.exploration_temperature, self._generator(batch, 0))
        copies = [i for i in range(len(rows)) for _ in range(args.num_generations)]
        chosen = plans.flatten().tolist()
        rewards = self._rewards([rows[i] for i in copies], [prompts[i] for i in copies], chosen)
        for i, plan, reward in zip(copies, chosen, rewards.tolist(), strict=True):
            if not math.isnan(reward):
                self.replay.add(numbers[i], plan, reward)
        self.figures["reward"].append(rewards.nanmean().item())
        self.figures["reward_of_best"].append(rewards.view(plans.shape).nan_to_num(nan=-math.inf).amax(1).mean().item())
        used = torch.bincount(plans.flatten(), minlength=logits.shape[1]).float() / plans.numel()
        self.figures["plans/entropy"].append(-(used * used.clamp(min=1e-9).log()).sum().item())
        self.figures["rollouts"] = [float((batch + 1) * plans.numel())]

    def _read(self, numbers: list[int], prompts: list[EncodedPrompt]) -> None:
        """Keeps the states of prompts that have not been met, without padding, on the CPU."""
        new = {n: prompt for n, prompt in zip(numbers, prompts, strict=True) if n not in self.replay.states}
        size = self.args.rollout_batch_size
        for start in range(0, len(new), size):
            some = list(new.items())[start : start + size]
            for (number, _), states in zip(some, self._states([prompt for _, prompt in some]), strict=True):
                self.replay.states[number] = states

    def _states(self, prompts: list[EncodedPrompt]) -> list[torch.Tensor]:
        model = self.model
        inputs = {name: value.to(model.device) for name, value in self.encoder.collate(prompts).items()}
        states = prompt_states(model.view, model.chooser_layers, inputs).to(model.backbone.dtype).cpu()
        return [row[mask.bool()] for row, mask in zip(states, inputs["attention_mask"].cpu(), strict=True)]

    @torch.no_grad()
    def _logits(self, states: list[torch.Tensor]) -> torch.Tensor:
        padded, mask = padded_states(states)
        return self.model.chooser(padded.to(self.args.device), mask.to(self.args.device)).cpu()

    def _rewards(self, rows: list[dict[str, Any]], prompts: list[EncodedPrompt], plans: list[int]) -> torch.Tensor:
        args, tokenizer = self.args, self.encoder.encoder.tokenizer
        ids = self.model.answers(
            self.encoder, prompts, plans, args.max_completion_length, self.ends, args.rollout_batch_size
        ).token_ids
        texts = [tokenizer.decode(one, skip_special_tokens=True).strip() for one in ids]
        return summed_rewards(self.caller, rows, texts, ids, trainer_state=self.state)

    def evaluate(
        self, eval_dataset: Any = None, ignore_keys: list[str] | None = None, metric_key_prefix: str = "eval"
    ) -> dict[str, float]:
        """The mean reward of the greedy answers under the plans that the chooser finds the best."""
        own = eval_dataset is None
        rows = self.evaluated_rows(self.eval_dataset if own else eval_dataset)
        prompts = [self.encoder(row) for row in rows]
        size = self.args.rollout_batch_size
        states = [one for i in range(0, len(prompts), size) for one in self._states(prompts[i : i + size])]
        plans = self._logits(states).argmax(dim=1).tolist()
        if own:
            self.chosen_plans = plans
        figures = {"reward": self._rewards(rows, prompts, plans).nanmean().item(), "plans": float(len(set(plans)))}
        if self.args.measure_ceiling and own:
            if self._ceiling is None:
                self._ceiling = self._measured_ceiling(rows)
            figures["ceiling"] = self._ceiling
        return self.finish_evaluation(figures, metric_key_prefix)

    def _measured_ceiling(self, rows: list[dict[str, Any]]) -> float:
        args = self.args
        self.report = report_plans(
            self.model,
            self.encoder,
            rows,
            args.max_completion_length,
            self.ends,
            reward=self.caller,
            batch_size=args.rollout_batch_size,
        )
        return self.report.metrics()["ceiling"]

    def save_run(self, folder: str | Path) -> None:
        self.replay.save(folder)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        super()._load_from_checkpoint(resume_from_checkpoint, model)
        self.replay = Replay.load(resume_from_checkpoint)


def explored(logits: torch.Tensor, count: int, temperature: float, generator: torch.Generator) -> torch.Tensor:
    """
    Different plans `[B, count]`, drawn one after the other without replacement from the softmax of `logits` `[B, K]`
    over `temperature` (the Gumbel-top-k trick, [Kool et al., 2019](https://huggingface.co/papers/1903.06059)).
    """
    uniform = torch.rand(logits.shape, generator=generator).clamp(min=1e-20)
    return (logits / temperature - (-uniform.log()).log()).topk(count, dim=1).indices
