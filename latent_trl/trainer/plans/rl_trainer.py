"""What the trainers of RL over plans share: rollouts, rewards, choices that are kept, ceiling, growth, evaluation."""

import json
import math
from collections.abc import Callable
from itertools import groupby, islice
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils.data import DataLoader
from transformers import PreTrainedTokenizerBase, ProcessorMixin, TrainerCallback
from transformers.utils import logging

from ...checkpoint.files import read_json
from ...data.prompts import EncodedPrompt
from ...plans.chooser import PromptStates
from ...plans.configuration import PlanConfig
from ...plans.model import PlanModel
from ...plans.reading import read_prompts
from ...plans.segments import PlannedAnswer, Switch
from ...rewards.calling import RewardCaller
from ..rollout.engine_source import check_engine
from ..rollout.metrics import length_figures, reward_figures
from ..run.loading import own_config
from .ceiling import Ceiling, Judge
from .choosing import RolloutChoices
from .engine_source import EngineSource
from .growth import add_learned_plans, check_growth
from .plan_training import PlanTrainer, PromptRows
from .processes import shared
from .replay import Replay, padded_states
from .report import report_plans
from .rl_config import PlanRLConfig
from .space_config import PlanSpaceConfig

logger = logging.get_logger(__name__)

# Of reward: a chooser that is no further below the ceiling has nothing left to find.
NEAR_CEILING = 0.01
STATE_FILE = "plan_rl.json"

Choose = Callable[[list[int], list[PlannedAnswer], dict[str, Any]], torch.Tensor]


class PlanRLTrainer(PlanTrainer):
    """
    RL over plans. Plans and backbone stay as they are; the chooser learns which plan to hold, for the answer or for
    each of its segments. Subclasses say how plans are explored and what an update learns.

    Args:
        model (`PlanModel` or `str`): The model, a folder or a Hub id; its plans have been learned.
        reward_funcs (`Callable` or list): As in TRL. Their sum is the reward.
        args (`PlanRLConfig`, *optional*): Rollouts, exploration, rates.
        train_dataset (`Dataset`): With `prompt`, `images` where there are some, and the columns that the rewards read.
        eval_dataset (`Dataset`, *optional*): The same, held out.
        processing_class (`ProcessorMixin` or `PreTrainedTokenizerBase`, *optional*): The backbone's.
        callbacks (`list[TrainerCallback]`, *optional*): As in `Trainer`.
        space_args (`PlanSpaceConfig`, *optional*): How plans that `grow_plans` adds are learned.

    Raises:
        ValueError: For data without prompts, more different plans a prompt than there are, growth in a run of several
            processes, or an engine that shards the model.
        RewardError: For a reward function that raises, or returns what is no number.
    """

    config_class: type[PlanRLConfig] = PlanRLConfig
    run_name = "plan-rl"
    args: Any

    def __init__(
        self,
        model: PlanModel | str,
        reward_funcs: Any,
        args: PlanRLConfig | None = None,
        train_dataset: Any = None,
        eval_dataset: Any = None,
        processing_class: ProcessorMixin | PreTrainedTokenizerBase | None = None,
        callbacks: list[TrainerCallback] | None = None,
        space_args: PlanSpaceConfig | None = None,
    ):
        args = own_config(args, self.config_class, self.run_name)
        if args.use_vllm:
            check_engine(args, args.world_size)
        self.caller = RewardCaller(reward_funcs, timeout=args.reward_timeout, timeout_name="reward_timeout")
        self.reward_func_names = self.caller.names
        super().__init__(model, args, train_dataset, eval_dataset, processing_class, callbacks, trained="chooser")
        check_growth(args, self.model.plan_config.num_plans, space_args)
        self.space_args = space_args
        longest, size = args.max_completion_length, args.rollout_batch_size
        self.engine_source = EngineSource(self) if args.use_vllm else None
        self.judge = Judge(self.model, self.encoder, self.caller, longest, self.ends, size, self.engine_source)
        self.replay = Replay()
        self.rows = PromptRows(train_dataset, args.image_root)
        self.ceiling: Ceiling | None = None
        # Whether plans that were added have not raised the ceiling.
        self.growth_is_over = False
        self._ceiling_at_evaluation: tuple[int, float] | None = None

    def first_plans(self, logits: torch.Tensor, numbers: list[int], batch: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Plans `[B, G]` of the first segments of a batch of rollouts, and weights of the rollouts `[B, G]`."""
        raise NotImplementedError

    def learn_from(self, answers: list[PlannedAnswer], rewards: torch.Tensor, made: list[dict[str, Any]]) -> None:
        """
        Keeps the choices of a batch of rollouts, of all processes, in `replay`.

        Args:
            answers (`list[PlannedAnswer]`): N of them, a prompt's side by side.
            rewards (`torch.Tensor`): `[N]`, NaN where no function could score.
            made (`list[dict]`): Every choice, as [`~latent_trl.trainer.plans.choosing.RolloutChoices`] makes them.
        """
        raise NotImplementedError

    def update_loss(self, model: PlanModel, step: int) -> torch.Tensor:
        """
        The loss of one update over the choices whose states this process has, such that its mean over processes is that
        over all choices.
        """
        raise NotImplementedError

    def get_train_dataloader(self) -> DataLoader:
        # Prompts are drawn by the number of the step, so that a resumed run draws the same.
        numbers = range(self.args.max_steps * self.accelerator.num_processes)
        return self.accelerator.prepare(DataLoader(numbers, batch_size=1, collate_fn=lambda steps: {"steps": steps}))

    def before_training(self) -> None:
        self.model.chooser_is_trained = True
        places = self.usable_places(self.train_dataset, "train_dataset")
        self.rows = PromptRows(self.train_dataset, self.args.image_root, places)

    @property
    def learned(self) -> list[nn.Module]:
        """What of the model updates change."""
        return [self.model.chooser]

    def after_training(self) -> None:
        if self.eval_dataset is None:
            return
        figures = self.evaluate()
        if figures["eval_reward"] > figures.get("eval_ceiling", math.inf) - NEAR_CEILING:
            logger.warning(
                f"The reward ({figures['eval_reward']:.3f}) stands at the ceiling over plans "
                f"({figures['eval_ceiling']:.3f}): what no plan says cannot be found. Learn more plans (`grow_plans`), "
                "or branch wider."
            )

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        args, step = self.args, self.state.global_step
        if step % args.num_iterations == 0:
            self.watch_ceiling(step)
            self.roll_out(step // args.num_iterations)
        if not len(self.replay):
            raise ValueError(
                f"No reward function could score any of the {args.rollout_prompts * args.num_generations} rollouts: "
                "all returned None."
            )
        loss = model(objective=lambda own: self._full_precision_loss(own, step))
        return (loss, None) if return_outputs else loss

    def _full_precision_loss(self, model: PlanModel, step: int) -> torch.Tensor:
        # The chooser reads states in float32, whatever the backbone is run in.
        with torch.autocast(self.args.device.type, enabled=False):
            return self.update_loss(model, step)

    def generator(self, number: int, use: int) -> torch.Generator:
        """What is drawn for batch or step `number`, of several uses."""
        return torch.Generator().manual_seed((self.args.seed * 2 + use) * 1_000_003 + number)

    def drawn(self, batch: int) -> list[int]:
        """Numbers of the prompts of a batch of rollouts: all prompts in random order, again and again."""
        size, rows, found = self.args.rollout_prompts, len(self.rows), []
        orders: dict[int, list[int]] = {}
        for place in range(batch * size, (batch + 1) * size):
            epoch, within = divmod(place, rows)
            if epoch not in orders:
                orders[epoch] = torch.randperm(rows, generator=self.generator(-1 - epoch, 0)).tolist()
            found.append(orders[epoch][within])
        return found

    @torch.no_grad()
    def roll_out(self, batch: int) -> None:
        """Makes rollouts for the prompts of a batch, and keeps their choices. Processes share the prompts."""
        size, numbers = self.args.num_generations, self.drawn(batch)
        self.replay.start_batch()
        read: dict[int, tuple[dict[str, Any], EncodedPrompt]] = {}

        def asked(places: range) -> list[torch.Tensor]:
            for place in places:
                if numbers[place] not in read:
                    row = self.rows[numbers[place]]
                    read[numbers[place]] = (row, self.encoder(row))
            self.read({number: prompt for number, (_, prompt) in read.items()})
            return list(self.logits([self.replay.states_at(numbers[place]) for place in places]))

        logits = torch.stack(shared(len(numbers), asked))
        self.before_choices(numbers, {number: prompt for number, (_, prompt) in read.items()})
        plans, weights = self.first_plans(logits, numbers, batch)
        log_probs = (logits / self.args.exploration_temperature).log_softmax(dim=1).gather(1, plans)

        def answered(places: range) -> list[list[tuple[PlannedAnswer, float, list[dict[str, Any]]]]]:
            choices = RolloutChoices(self, batch, numbers, places, plans, log_probs, weights)
            own = [read[numbers[place]] for place in places for _ in range(size)]
            spoken = self.rollouts([prompt for _, prompt in own], choices)
            rewards = self.rewards_of([row for row, _ in own], spoken).tolist()
            made = self.annotated(choices.sorted())
            by_rollout = {number: list(some) for number, some in groupby(made, key=lambda one: one["rollout"])}
            each = zip(spoken, rewards, by_rollout.values(), strict=True)
            return [list(islice(each, size)) for _ in places]

        found = [one for group in shared(len(numbers), answered) for one in group]
        spoken, rewards = [answer for answer, _, _ in found], torch.tensor([reward for _, reward, _ in found])
        self.learn_from(spoken, rewards, [one for _, _, made in found for one in made])
        self._log_rollouts(spoken, rewards, batch)

    def before_choices(self, numbers: list[int], prompts: dict[int, EncodedPrompt]) -> None:
        """What is done before the plans of a batch are drawn, given its prompts' numbers and those of this process."""

    def rollouts(self, prompts: list[EncodedPrompt], choices: RolloutChoices) -> list[PlannedAnswer]:
        """Rollouts of this process, under the plans that are drawn."""
        return self.spoken(prompts, choices)

    def annotated(self, made: list[dict[str, Any]]) -> list[dict[str, Any]]:
        """Choices of this process, with what else `learn_from` needs of their states."""
        return made

    def _log_rollouts(self, spoken: list[PlannedAnswer], rewards: torch.Tensor, batch: int) -> None:
        size = self.args.num_generations
        lengths = torch.tensor([len(answer.token_ids) for answer in spoken])
        found = reward_figures(rewards[:, None], [], rewards, size)
        found |= length_figures(lengths, torch.tensor([answer.ended for answer in spoken]))
        for name, (value, _) in found.items():
            self.figures[name].append(value)
        best = rewards.view(-1, size).nan_to_num(nan=-math.inf).amax(dim=1)
        self.figures["reward_of_best"].append(best[best.isfinite()].mean().item())
        tried = torch.tensor([plan for answer in spoken for plan in answer.plans])
        used = torch.bincount(tried, minlength=self.model.plan_config.num_plans).float() / len(tried)
        self.figures["plans/entropy"].append(torch.special.entr(used).sum().item())
        self.figures["plans/segments"].append(len(tried) / len(spoken))
        self.figures["plans/segment_length"].append(lengths.sum().item() / len(tried))
        self.figures["plans/decoded"].append(sum(answer.decoded for answer in spoken) / len(tried))
        self.figures["rollouts"] = [float((batch + 1) * len(spoken))]

    def spoken(self, prompts: list[EncodedPrompt], choose: Choose, switch: Switch | None = None) -> list[PlannedAnswer]:
        """Greedy answers under the plans that `choose` gives; by default segments end where the model ends them."""
        return self.judge.spoken(prompts, choose, switch)

    def rewards_of(self, rows: list[dict[str, Any]], answers: list[PlannedAnswer]) -> torch.Tensor:
        """Rewards `[N]` of answers, NaN where no function could score."""
        return self.judge.rewards(rows, answers, trainer_state=self.state)

    def read(self, prompts: dict[int, EncodedPrompt]) -> None:
        """Keeps the states of prompts, by their numbers, that have not been met, without padding, on the CPU."""
        new = {number: prompt for number, prompt in prompts.items() if number not in self.replay.states}
        size = self.args.rollout_batch_size
        for start in range(0, len(new), size):
            some = list(new.items())[start : start + size]
            inputs = self.encoder.collate([prompt for _, prompt in some])
            for (number, _), found in zip(some, self.states_of(inputs), strict=True):
                self.replay.keep(number, found)

    def states_of(self, inputs: dict[str, Any]) -> list[PromptStates]:
        """What the chooser reads of each row, on the CPU."""
        model, dtype = self.model, self.model.backbone.dtype
        inputs = {name: value.to(model.device) for name, value in inputs.items()}
        states, planned = read_prompts(model, inputs)
        masks = inputs["attention_mask"].bool().cpu()
        own = [row[mask] for row, mask in zip(states.to(dtype).cpu(), masks, strict=True)]
        under = [None] * len(own) if planned is None else list(planned.to(dtype).cpu())
        return [PromptStates(*one) for one in zip(own, under, strict=True)]

    @torch.no_grad()
    def logits(self, states: list[PromptStates]) -> torch.Tensor:
        """Logits `[N, K]` of the chooser, on the CPU."""
        if not states:
            return torch.empty(0, self.model.plan_config.num_plans)
        return self.model.chooser(*padded_states(states, self.args.device)).cpu()

    def best_plans(self, places: list[int], answers: list[PlannedAnswer], inputs: dict[str, Any]) -> torch.Tensor:
        """The plans that the chooser finds the best where segments begin."""
        return self.logits(self.states_of(inputs)).argmax(dim=1)

    def watch_ceiling(self, step: int) -> None:
        """Logs what the best plan is worth beside the chosen ones, and adds plans where there is no difference."""
        args = self.args
        every = max(args.ceiling_steps // args.num_iterations, 1) * args.num_iterations
        if not args.ceiling_prompts or step % every:
            return
        rows = [self.rows[number] for number in self.ceiling_numbers()]
        if self.ceiling is None:
            self.ceiling = self.judge.ceiling(rows, args.seed)
        chosen = self._chosen_at(rows)
        plans = self.model.plan_config.num_plans
        if chosen > self.ceiling.best - NEAR_CEILING and not self.growth_is_over:
            if args.grow_plans and plans + args.grow_plans <= args.max_plans:
                before = self.ceiling
                add_learned_plans(self, args.grow_plans)
                self.ceiling = self.judge.ceiling(rows, args.seed, before)
                self.growth_is_over = self.ceiling.best < before.best + NEAR_CEILING
                logger.info(f"Ceiling {before.best:.3f} with {plans} plans, {self.ceiling.best:.3f} with more.")
        self.figures["ceiling"] = [self.ceiling.best]
        self.figures["ceiling/reward"] = [chosen]
        self.figures["plans/total"] = [float(self.model.plan_config.num_plans)]

    def ceiling_numbers(self) -> list[int]:
        """Numbers of the prompts on which the ceiling is measured."""
        return torch.randperm(len(self.rows), generator=self.generator(0, 1))[: self.args.ceiling_prompts].tolist()

    @torch.no_grad()
    def _chosen_at(self, rows: list[dict[str, Any]]) -> float:
        """The reward of the chosen plans on the prompts of the ceiling."""
        numbers, held = self.ceiling_numbers(), self.model.plan_config.segment == "answer"

        def chosen(places: range) -> list[float]:
            some = [rows[place] for place in places]
            prompts = [self.encoder(row) for row in some]
            if not held:
                return self.rewards_of(some, self.spoken(prompts, self.best_plans)).tolist()
            self.read(dict(zip([numbers[place] for place in places], prompts, strict=True)))
            return self.logits([self.replay.states_at(numbers[place]) for place in places]).argmax(dim=1).tolist()

        found = torch.tensor(shared(len(rows), chosen))
        return self.ceiling.of(found) if held else found.nanmean().item()

    @torch.no_grad()
    def evaluate(
        self, eval_dataset: Any = None, ignore_keys: list[str] | None = None, metric_key_prefix: str = "eval"
    ) -> dict[str, float]:
        """The mean reward of the greedy answers under the plans that the chooser finds the best."""
        own = eval_dataset is None
        rows = self.evaluated_rows(self.eval_dataset if own else eval_dataset)

        def answered(places: range) -> list[tuple[list[int], float]]:
            some = [rows[place] for place in places]
            spoken = self.spoken([self.encoder(row) for row in some], self.best_plans)
            rewards = self.rewards_of(some, spoken).tolist()
            return [(answer.plans, reward) for answer, reward in zip(spoken, rewards, strict=True)]

        found = shared(len(rows), answered)
        plans = {plan for chosen, _ in found for plan in chosen}
        figures = {"reward": torch.tensor([r for _, r in found]).nanmean().item(), "plans": float(len(plans))}
        if own:
            self.chosen_plans = [chosen[0] for chosen, _ in found]
        if self.args.measure_ceiling and own:
            count = self.model.plan_config.num_plans
            if self._ceiling_at_evaluation is None or self._ceiling_at_evaluation[0] != count:
                self._ceiling_at_evaluation = (count, self._measured_ceiling(rows))
            figures["ceiling"] = self._ceiling_at_evaluation[1]
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
            engine=self.engine_source,
        )
        if self.model.plan_config.segment == "answer":
            return self.report.metrics()["ceiling"]
        return self.judge.ceiling(rows, args.seed).best

    def save_run(self, folder: str | Path) -> None:
        self.replay.save(folder)
        if not self.args.should_save:
            return
        record = {
            "growth_is_over": self.growth_is_over,
            "ceiling": None if self.ceiling is None else self.ceiling.record(),
        }
        (Path(folder) / STATE_FILE).write_text(json.dumps(record) + "\n", encoding="utf-8")

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        grown = PlanConfig.load(resume_from_checkpoint).num_plans - self.model.plan_config.num_plans
        if grown > 0 and self.args.grow_plans:
            self.model.add_plans(grown)
        super()._load_from_checkpoint(resume_from_checkpoint, model)
        self.replay = Replay.load(resume_from_checkpoint)
        record = read_json(Path(resume_from_checkpoint) / STATE_FILE)
        self.growth_is_over = record["growth_is_over"]
        self.ceiling = None if record["ceiling"] is None else Ceiling.from_record(record["ceiling"])
