"""A frozen backbone with a codebook of plans and the chooser among them."""

from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from torch import nn
from transformers import PreTrainedModel

from ..checkpoint.download import cached_commit
from ..data.prompts import EncodedPrompt, PromptEncoder
from ..generation.exclusive import exclusive
from ..models.backbone import Backbone
from .adapters import PlanAdapters
from .base_adapter import BaseAdapter
from .checkpoint import PlanCheckpointMixin
from .chooser import PlanChooser, chosen_layers
from .configuration import PlanConfig
from .engine import check_no_switch
from .prompt_cache import GreedyAnswers, PromptCache, decode_greedily, next_logits
from .reading import read_prompts
from .segments import PlannedAnswer, Switch, continued, continued_inputs, given_plans, speak
from .shared_layers import record_lower
from .targets import plan_targets

# Decodes segments: prompts, what was said behind them, plans, the longest segment, its ends, and its length.
SegmentEngine = Callable[..., GreedyAnswers]


class PlanModel(PlanCheckpointMixin, nn.Module):
    """
    A frozen causal or image-text-to-text model, K plans, and the chooser among them. A plan is held for a whole answer,
    or for a segment of it, and is active at every position of the row, the prompt's included, as an adapter of PEFT or
    of an engine with multi-LoRA is. A segment is a request of its own: the prompt and what has been said are read anew
    under its plan. Below `depth` the states do not depend on it.

    Args:
        backbone (`PreTrainedModel` or `PeftModel`): It is frozen, and stays in evaluation mode. A `PeftModel` is a
            backbone with a LoRA, beside which plans are learned; it is saved with them.
        config (`PlanConfig`, *optional*): K, depth, rank. It is copied.

    Raises:
        ValueError: For a `depth` that leaves no layer, `target_modules` that name none, or a backbone that carries
            another adapter than one LoRA of a `PeftModel`.

    Example:

    ```python
    model = PlanModel(backbone, PlanConfig(num_plans=16))
    ids = model.generate(**inputs, plan_ids=3, max_new_tokens=12)
    ```
    """

    def __init__(self, backbone: PreTrainedModel | PeftModel, config: PlanConfig | None = None):
        super().__init__()
        config = replace(config or PlanConfig())
        self.base_adapter = BaseAdapter.of(backbone)
        backbone = backbone if self.base_adapter is None else self.base_adapter.backbone
        self.backbone = backbone.requires_grad_(False).eval()
        self.view = Backbone(backbone)
        if config.depth is None:
            config.depth = self.view.text_config.num_hidden_layers // 2
        config.check_switch()
        self.depth = config.depth
        targets = plan_targets(self.view, self.depth, config.target_modules)
        config.base_model_name_or_path = backbone.config._name_or_path or config.base_model_name_or_path
        config.base_model_revision = config.base_model_revision or cached_commit(config.base_model_name_or_path)
        # A quantised backbone has no fingerprint of its own.
        config.backbone_fingerprint = self.view.fingerprint() or config.backbone_fingerprint
        config.vision_token_ids = self.view.vision_token_ids
        config.has_adapter = self.base_adapter is not None
        self.plan_config = config
        self.plans = PlanAdapters(self.view, targets, config.num_plans, config.rank, config.init_std, config.seed)
        self.chooser_layers = chosen_layers(self.view, config.chooser_layers)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(config.seed)
            self.chooser = PlanChooser.of(self.view, config).to(backbone.device)
        self.chooser_is_trained = False
        # What is known of the runs that trained it: `latent_trl.hub.facts.TrainingReport` as plain data.
        self.training_report: dict[str, Any] = {}
        # Where a processing class was saved beside the plans.
        self.processor_folder: Path | None = None

    @property
    def device(self) -> torch.device:
        return self.backbone.device

    def add_plans(self, count: int) -> None:
        """
        Adds plans as they are before learning, and places for them in the chooser. The plans that there are, and what
        the chooser says of them, stay as they are. Learn them with `PlanSpaceConfig(new_plans=count)`.

        Args:
            count (`int`): How many.
        """
        if count < 1:
            raise ValueError(f"`count` must be at least 1, got {count}.")
        self.plans.add(count, self.plan_config.seed + self.plan_config.num_plans)
        self.chooser.add(count)
        self.plan_config.num_plans += count

    def train(self, mode: bool = True) -> "PlanModel":
        # The backbone is always evaluating. Trainer calls this before each update, and a backbone has many modules.
        self.training = mode
        for child in self.children():
            if child is not self.backbone:
                child.train(mode)
        return self

    def forward(self, objective: Callable[..., Any] | None = None, **inputs: Any) -> Any:
        """
        [`~PlanModel.log_probs`] of inputs.

        Args:
            objective (`Callable`, *optional*): A loss `objective(model)` to compute instead, inside the forward so that
                DDP sees it.
            inputs: Of [`~PlanModel.log_probs`].
        """
        return self.log_probs(**inputs) if objective is None else objective(self)

    def log_probs(
        self,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor,
        completion_mask: torch.Tensor,
        plan_ids: torch.Tensor,
        **inputs: Any,
    ) -> torch.Tensor:
        """
        Log-probabilities of completions under plans, with a gradient to the plans.

        Args:
            input_ids (`torch.Tensor`), attention_mask (`torch.Tensor`), completion_mask (`torch.Tensor`): `[N, L]`.
            plan_ids (`torch.Tensor`): `[N]`.
            inputs: Further inputs of the backbone, such as `pixel_values`.

        Returns:
            `[N, L-1]` in float32: entry i is that of token i+1, and 0 outside the completion.
        """
        with self.plans.active(plan_ids):
            states = self.view.encode(input_ids, attention_mask, completion_mask, **inputs).states
        mask = completion_mask[:, 1:].bool()
        log_probs = next_logits(self.view, states[:, :-1][mask][None])[0].log_softmax(dim=-1)
        taken = log_probs.gather(-1, input_ids[:, 1:][mask][:, None])[:, 0]
        return torch.zeros(mask.shape, device=taken.device).masked_scatter(mask, taken)

    @torch.no_grad()
    def answers(
        self,
        encoder: PromptEncoder,
        prompts: list[EncodedPrompt],
        plan_ids: list[int] | None,
        max_new_tokens: int,
        ends: list[int],
        batch_size: int = 256,
        engine: SegmentEngine | None = None,
    ) -> GreedyAnswers:
        """
        The greedy answer to each prompt under its plan.

        Args:
            encoder (`PromptEncoder`): Makes batches of prompts.
            prompts (`list[EncodedPrompt]`): B of them.
            plan_ids (`list[int]`, *optional*): One a prompt; `None` for the backbone's own answers.
            max_new_tokens (`int`): Longest answer.
            ends (`list[int]`): Tokens that end an answer.
            batch_size (`int`, defaults to `256`): Answers decoded at once.
            engine (`Callable`, *optional*): What decodes them in the place of this model, as
                [`~latent_trl.plans.engine_decoder.PlanEngine`].
        """
        if engine is not None:
            return engine(prompts, [[]] * len(prompts), plan_ids, max_new_tokens, ends)
        whole = GreedyAnswers([], [], [])
        for start in range(0, len(prompts), batch_size):
            places = slice(start, start + batch_size)
            inputs = {name: value.to(self.device) for name, value in encoder.collate(prompts[places]).items()}
            own = None if plan_ids is None else torch.tensor(plan_ids[places])
            part = self._decode(inputs, own, max_new_tokens, ends)
            whole.token_ids += part.token_ids
            whole.ended += part.ended
        return whole

    def _decode(
        self,
        inputs: dict[str, Any],
        plan_ids: torch.Tensor | None,
        max_new_tokens: int,
        ends: list[int],
        stop: Callable[[list[int], list[list[int]], torch.Tensor], list[bool]] | None = None,
        **options: Any,
    ) -> GreedyAnswers:
        with nullcontext() if plan_ids is None else self.plans.active(plan_ids):
            cache = PromptCache.encode(self.view, inputs)
            if stop is None:
                return decode_greedily(cache, max_new_tokens, ends, **options)
            with record_lower(self.view, self.depth) as lower:
                options["stop"] = lambda rows, said: stop(rows, said, lower.states[rows, -1])
                return decode_greedily(cache, max_new_tokens, ends, **options)

    @property
    def segment_ends(self) -> list[int]:
        """
        Tokens that end a segment and not the answer; where there is a switch, they do as long as it is not trained.

        Raises:
            ValueError: Where segments are of sentences, and no trainer has filled them in.
        """
        config = self.plan_config
        if config.segment not in ("sentence", "switch"):
            return []
        if config.segment_end_token_ids is None:
            raise ValueError(
                f"`segment_end_token_ids` of the PlanConfig must be given for `segment={config.segment!r}`: "
                "`sentence_ends(tokenizer)` of `latent_trl.plans.segments`."
            )
        return list(config.segment_end_token_ids)

    @property
    def has_switch(self) -> bool:
        """Whether a learned switch ends segments."""
        return self.chooser.switch is not None

    def behind_sentence(self, said: list[list[int]]) -> torch.Tensor:
        """Whether the last token of each of N texts ends a sentence, `[N]`, on the CPU."""
        ends = set(self.segment_ends)
        return torch.tensor([own[-1] in ends for own in said])

    def likely_ends(
        self, rows: list[int], answers: list[PlannedAnswer], said: list[list[int]], states: torch.Tensor
    ) -> torch.Tensor:
        """Whether segments rather end than go on `[N]`, as [`~latent_trl.plans.segments.speak`] takes it."""
        return self.chooser.switch(states, self.behind_sentence(said).to(states.device)) > 0

    @property
    def segment_length(self) -> int | None:
        """Tokens of a segment, where it is held for a number of them."""
        return self.plan_config.segment if isinstance(self.plan_config.segment, int) else None

    def first_segment(self, token_ids: list[int]) -> list[int]:
        """The first segment of an answer."""
        ends = self.segment_ends
        stop = next((i + 1 for i, token in enumerate(token_ids) if token in ends), len(token_ids))
        return token_ids[: min(stop, self.segment_length or stop)]

    def continued(self, prompt: EncodedPrompt, said: list[int]) -> EncodedPrompt:
        """A prompt with the beginning of its answer behind it: where a segment starts."""
        return continued(self.view, prompt, said)

    def decode_segments(self, ends: list[int]) -> Callable[..., GreedyAnswers]:
        """What decodes one segment a row, as [`~latent_trl.plans.segments.speak`] takes it."""
        # Read where a switch decides too: it needs to know what ends a sentence.
        of_sentence, length = self.segment_ends, self.segment_length
        stops = ends if self.has_switch else [*ends, *of_sentence]
        return lambda inputs, plans, left, first, **options: self._decode(
            inputs, plans, left, stops, steps=length, check_positions=first, **options
        )

    @torch.no_grad()
    def speak(
        self,
        encoder: PromptEncoder,
        prompts: list[EncodedPrompt],
        choose: Callable[[list[int], list[PlannedAnswer], dict[str, Any]], torch.Tensor],
        max_new_tokens: int,
        ends: list[int],
        batch_size: int = 256,
        engine: SegmentEngine | None = None,
        tell: Callable[[int, int], bool] | None = None,
        switch: Switch | None = None,
    ) -> list[PlannedAnswer]:
        """
        Greedy answers, for each segment of which a plan is chosen. What answers to the same [`EncodedPrompt`] say alike
        is decoded once.

        Args:
            encoder (`PromptEncoder`), prompts (`list[EncodedPrompt]`), max_new_tokens (`int`), ends (`list[int]`),
            batch_size (`int`), engine (`Callable`, *optional*): As in [`~PlanModel.answers`].
            choose (`Callable`): Plans `[N]` of the segments that begin, given the numbers of their prompts, their
                answers so far and the backbone's inputs, in which what was said stands behind the prompt.
            tell (`Callable`, *optional*): Told the number of a prompt and a token of its answer as they come; returns
                whether the answer ends with it. Not with an engine.
            switch (`Callable`, *optional*): Ends segments, as [`~latent_trl.plans.segments.speak`] takes it; by default
                [`~PlanModel.likely_ends`], where there is a learned switch. Not with an engine.

        Raises:
            ValueError: For an engine where there is a learned switch.
        """
        if self.has_switch:
            if engine is not None:
                check_no_switch(self.plan_config)
            switch = switch or self.likely_ends
        found: list[PlannedAnswer] = []
        for start in range(0, len(prompts), batch_size):
            some = prompts[start : start + batch_size]
            asked: list[Any] = [[], []]

            def begin(rows: list[int], said: list[list[int]], some=some, asked=asked) -> dict[str, Any]:
                asked[:] = [some[row] for row in rows], said
                grown = [self.continued(some[row], own) for row, own in zip(rows, said, strict=True)]
                return {name: value.to(self.device) for name, value in encoder.collate(grown).items()}

            def chosen(rows: list[int], answers: list[PlannedAnswer], inputs: dict[str, Any], start=start):
                return choose([start + row for row in rows], answers, inputs)

            found += speak(
                len(some),
                begin,
                chosen,
                self.decode_segments(ends) if engine is None else self._decode_by(engine, asked, ends),
                max_new_tokens,
                ends,
                prompt_of=[id(prompt) for prompt in some],
                tell=None if tell is None else _counted_from(start, tell),
                switch=None if switch is None else _numbered_from(start, switch),
            )
        return found

    def _decode_by(self, engine: SegmentEngine, asked: list[Any], ends: list[int]) -> Callable[..., GreedyAnswers]:
        """The same by an engine; `asked` holds the prompts that a batch begins with, and what has been said."""
        stops, length = [*ends, *self.segment_ends], self.segment_length
        return lambda inputs, plans, left, first: engine(*asked, plans.tolist(), left, stops, length)

    @torch.no_grad()
    def plan_logits(self, **inputs: Any) -> torch.Tensor:
        """What the chooser gives `[B, K]` for prompts, given as in [`~PlanModel.generate`]."""
        states, planned = read_prompts(self, inputs)
        return self.chooser(states, inputs["attention_mask"], planned)

    def best_plans(self, places: list[int], answers: list[PlannedAnswer], inputs: dict[str, Any]) -> torch.Tensor:
        """The plans `[N]` that the chooser finds the best where segments begin, as [`~PlanModel.speak`] takes it."""
        return self.plan_logits(**inputs).argmax(dim=-1)

    @torch.no_grad()
    def generate(
        self,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        plan_ids: torch.Tensor | list[int] | int | None = None,
        max_new_tokens: int = 32,
        eos_token_id: int | list[int] | None = None,
        **inputs: Any,
    ) -> torch.Tensor:
        """
        Greedy answers under plans.

        Args:
            input_ids (`torch.Tensor`), attention_mask (`torch.Tensor`, *optional*): `[B, P]`, padded on the left.
            plan_ids (`torch.Tensor`, `list` or `int`, *optional*): A plan for all rows, one a row `[B]`, or one for
                each segment of each row `[B, S]`, the last of them for all later segments. By default a segment has
                the one that the chooser finds the best where it starts.
            max_new_tokens (`int`, defaults to `32`): Longest answer.
            eos_token_id (`int` or `list[int]`, *optional*): What ends an answer; the backbone's by default.
            inputs: Further inputs of the backbone, such as `pixel_values`.

        Returns:
            `[B, P+C]` ids; answers that end sooner are filled up with the backbone's padding.

        Raises:
            ValueError: For plans that there are not, or none where no chooser has been trained; for prompts that are
                padded on the right; for more tokens than the backbone has positions for.
        """
        attention_mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask
        if not attention_mask[:, -1].all():
            raise ValueError("`attention_mask` has padding at the end of a prompt; pad on the left.")
        inputs = {"input_ids": input_ids, "attention_mask": attention_mask, **inputs}
        own = self.backbone.generation_config.eos_token_id if eos_token_id is None else eos_token_id
        ends = [] if own is None else [own] if isinstance(own, int) else list(own)
        if plan_ids is None and not self.chooser_is_trained:
            raise ValueError(
                "`plan_ids` must be given: no chooser has been trained. `PlanBanditTrainer` and `PlanGRPOTrainer` do."
            )
        choose = self.best_plans if plan_ids is None else given_plans(plan_ids, len(input_ids), self.plan_config)

        def begin(rows: list[int], said: list[list[int]]) -> dict[str, Any]:
            return continued_inputs(self.view, inputs, said)

        with exclusive(self.backbone):
            decode = self.decode_segments(ends)
            # Rows stay together, since their pictures do.
            switch = self.likely_ends if self.has_switch else None
            spoken = speak(len(input_ids), begin, choose, decode, max_new_tokens, ends, all_rows=True, switch=switch)
        answers = [answer.token_ids for answer in spoken]
        pad = self.backbone.generation_config.pad_token_id
        pad = (ends or [0])[0] if pad is None else pad
        longest = max(map(len, answers))
        filled = [[*answer, *[pad] * (longest - len(answer))] for answer in answers]
        return torch.cat([input_ids, torch.tensor(filled, device=input_ids.device)], dim=1)


def _counted_from(start: int, tell: Callable[[int, int], bool]) -> Callable[[int, int], bool]:
    return lambda row, token: tell(start + row, token)


def _numbered_from(start: int, switch: Switch) -> Switch:
    return lambda rows, *given: switch([start + row for row in rows], *given)
