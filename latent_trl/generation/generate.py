"""`generate` over codes: the backbone's own `generate`, with what is settled before it and put in order after it."""

from contextlib import ExitStack
from functools import partial
from typing import Any

import torch
from transformers import (
    Cache,
    DynamicCache,
    GenerationConfig,
    LogitsProcessorList,
    PreTrainedModel,
    StaticCache,
    StoppingCriteriaList,
)
from transformers.integrations import is_deepspeed_zero3_enabled, is_fsdp_managed_module

from .action_law import ActionLaw
from .cache_name import CACHE_NAME, rename_cache
from .choice import ActionChoice
from .cuda_graphs import LEAST_TOKENS, obstacle, static_cache
from .ended_rows import EndedRows
from .exclusive import exclusive
from .forbidden_tokens import end_token_ids, forbidden_tokens
from .output import LatentActionGenerateOutput
from .rollout_hook import POLICY_LAYERS, RolloutHook
from .row_choices import RowChoices
from .settings import settled_choice, settled_config, without_own_defaults
from .shared_prefill import SharedPrefill

REFUSED_INPUTS = ("inputs_embeds", "custom_generate", "assistant_model", "negative_prompt_ids")


class LatentActionGenerationMixin:
    """`generate` of [`LatentActionModel`]."""

    @torch.no_grad()
    def generate(
        self,
        inputs: torch.Tensor | None = None,
        generation_config: GenerationConfig | None = None,
        logits_processor: LogitsProcessorList | None = None,
        action_do_sample: bool | None = None,
        action_temperature: float | None = None,
        action_top_k: int | None = None,
        action_top_p: float | None = None,
        action_sampling: str | None = None,
        action_bias: torch.Tensor | None = None,
        forced_action_ids: torch.Tensor | None = None,
        action_generator: torch.Generator | None = None,
        action_choice: RowChoices | None = None,
        output_context_states: bool = False,
        output_cache: bool = True,
        cuda_graphs: bool | None = None,
        **kwargs,
    ) -> torch.Tensor | LatentActionGenerateOutput:
        """
        Generates text by choosing codes; each token is the most likely one given its code.

        Takes what transformers' `generate` takes (batches padded on the left, images, lengths, stopping criteria,
        streamers, logits processors on the token choice, caches). Vision placeholders are never generated. With
        `num_return_sequences` a prompt is encoded once, where the cache is a dynamic or a static one. Rows whose text
        has ended leave the batch, where the cache is of these kinds, not passed in and not to be returned.

        What is passed, as arguments or in a `generation_config`, counts or is refused by name. Of the model's own
        `generation_config`, the backbone's, what would change the most likely token (`repetition_penalty`,
        `bad_words_ids`, ...) or is about another way to decode is left out with a warning: learning and RL do not know
        it either.

        Calls of several threads for one backbone wait for each other. What `generate` calls, such as a streamer, cannot
        call the model.

        Args:
            action_do_sample (`bool`, *optional*): Sample the codes, or take the most likely token at each step: that of
                the codes which are the most likely together, whatever the temperature, top-k and top-p. Codes are read
                by the vocabulary head, from the most likely on, until it is certain. Tokens that settings forbid do not
                count; what a `logits_processor` of your own or longer `bad_words_ids` forbid is found too late, and the
                code says what it says next.
            action_temperature (`float`, *optional*), action_top_k (`int`, *optional*), action_top_p (`float`,
            *optional*): The law that codes are sampled from. What is not given here is read from `generation_config`,
            then from the model's; else codes are sampled at temperature 1 from all.
            action_sampling (`str`, *optional*): Of the samples of one prompt: `"independent"` of each other, or
                `"arithmetic"`, drawn together so that they differ more, where each alone has the same law.
            action_bias (`torch.Tensor`, *optional*): `[K]`, added to the policy's logits; `-inf` bans a code.
            forced_action_ids (`torch.Tensor`, *optional*): `[B, n]` codes of the first n steps; -1 leaves a step free.
            action_generator (`torch.Generator`, *optional*): Source of the sampling; the global one by default.
            action_choice (`RowChoices`, *optional*): In the place of all of these, where rows differ in them.
            output_context_states (`bool`, defaults to `False`): Also return states and positions.
            output_cache (`bool`, defaults to `True`): Also return the cache, where `return_dict_in_generate=True`. It
                holds all rows, so all are computed until the last text has ended: without it mixed lengths take less.
            cuda_graphs (`bool`, *optional*): Record a step of text model and policy as CUDA graphs, and replay them for
                the rest of the text, with a static cache: the same law, several times as fast where the host's launches
                are the limit. By default wherever it can be done and the text may have at least 16 tokens.

        Returns:
            `[B, P+C]` ids, or a [`LatentActionGenerateOutput`] with `return_dict_in_generate=True`.

        Raises:
            FloatingPointError: When the policy's probabilities are not finite.
            ValueError: For what cannot give back one code per token, and with `cuda_graphs=True` where they cannot be
                had.
        """
        self.require("policy", "codebook", "world_model")
        input_ids = kwargs.pop("input_ids", None) if inputs is None else inputs
        if input_ids is None:
            raise ValueError("`input_ids` must be given: latent actions continue a prompt.")
        config, inputs, copies = self._settle(generation_config, kwargs)
        given = {
            "action_do_sample": action_do_sample,
            "action_temperature": action_temperature,
            "action_top_k": action_top_k,
            "action_top_p": action_top_p,
            "action_sampling": action_sampling,
        }
        settings = settled_choice(config, given)
        return_dict, config.return_dict_in_generate = bool(config.return_dict_in_generate), True
        if inputs.get("attention_mask") is None:
            inputs["attention_mask"] = _prompt_mask(input_ids, config)
        _check_prompt(input_ids, inputs["attention_mask"])
        _check_positions(_length(config, input_ids.shape[1]), self.backbone_view.max_positions)
        forced = self._checked_forced(forced_action_ids, len(input_ids) * copies)
        choice = self._given_choice(action_choice, copies, [*given.values(), action_bias, forced, action_generator])
        choice = choice or ActionChoice(
            law=ActionLaw(*(settings[f"action_{name}"] for name in ("temperature", "top_k", "top_p"))),
            do_sample=settings["action_do_sample"],
            bias=self._checked_bias(action_bias),
            generator=action_generator,
            copies=copies,
            arithmetic=settings["action_sampling"] == "arithmetic",
        )
        _check_past(inputs.get(CACHE_NAME), output_context_states or copies > 1)
        graphed = self._settle_cuda_graphs(cuda_graphs, config, inputs, input_ids.shape[1])
        options = {"keep_states": output_context_states, "graphed": graphed, "logits_processor": logits_processor}
        options["keep_cache"] = (return_dict and output_cache) or inputs.get(CACHE_NAME) is not None
        with exclusive(self.backbone):
            result = self._roll_out(input_ids, inputs, config, choice, forced, **options)
        return result if return_dict else result.sequences

    def _roll_out(
        self,
        input_ids: torch.Tensor,
        inputs: dict[str, Any],
        config: GenerationConfig,
        choice: ActionChoice | RowChoices,
        forced: torch.Tensor | None,
        keep_states: bool,
        graphed: bool,
        keep_cache: bool,
        **options,
    ) -> LatentActionGenerateOutput:
        """The backbone's own `generate` with the hooks that choose codes, and what they recorded."""
        shared = SharedPrefill(len(input_ids), choice.copies, self._fresh_cache(config, inputs))
        if shared.once and inputs.get("position_ids") is None:
            inputs["position_ids"] = self.backbone_view.positions(input_ids, **inputs)
        inputs, input_ids = shared.tiled_inputs(inputs, input_ids.shape), shared.tiled(input_ids)
        choice.forced = shared.in_tiles(forced)
        # transformers puts padding behind a text that has ended only where there is a token for its end.
        leave = not keep_cache and not graphed and config.eos_token_id is not None
        criteria = StoppingCriteriaList(inputs.get("stopping_criteria") or [])
        ended = EndedRows(len(input_ids), _names_by_row(inputs), end_token_ids(config), criteria)
        hook = RolloutHook(
            self,
            choice,
            inputs["attention_mask"],
            self.has_image(input_ids),
            keep_states=keep_states,
            shared=shared,
            ended=ended,
            forbidden=partial(forbidden_tokens, config, input_ids.shape[1]),
            synced=_is_synced(inputs.get("synced_gpus"), self.backbone),
            cuda_graphs=graphed,
        )
        with ExitStack() as hooks:
            hooks.enter_context(without_own_defaults(self.backbone))
            hooks.enter_context(shared.attached(self.backbone_view.base))
            hooks.enter_context(hook.attached(self.backbone_view.decoder))
            if leave:
                hooks.enter_context(ended.attached(self.backbone))
                inputs["stopping_criteria"] = StoppingCriteriaList([ended])
            output = self.backbone.generate(input_ids, generation_config=config, **options, **inputs)
        result = LatentActionGenerateOutput(
            sequences=output.sequences,
            **hook.result(output.sequences, input_ids.shape[1]),
            scores=output.scores,
            logits=output.logits,
            cache=output.get(CACHE_NAME) if keep_cache else None,
        )
        shared.restore_order(result)
        return result

    def _given_choice(self, choice: RowChoices | None, copies: int, others: list[Any]) -> RowChoices | None:
        if choice is not None:
            if any(other is not None for other in others):
                raise ValueError("`action_choice` says how codes are chosen, so no other `action_...` can be given.")
            choice.copies = copies
        return choice

    def _settle(
        self, generation_config: GenerationConfig | None, kwargs: dict[str, Any]
    ) -> tuple[GenerationConfig, dict[str, Any], int]:
        """The generation config in force, the model's inputs, and the number of samples a prompt."""
        for name in REFUSED_INPUTS:
            if kwargs.get(name) is not None:
                raise ValueError(f"`{name}` cannot be combined with latent actions. Pass `input_ids` alone.")
        config, inputs, copies = settled_config(generation_config, self.generation_config, rename_cache(kwargs))
        config.suppress_tokens = sorted({*(config.suppress_tokens or []), *self.config.vision_token_ids}) or None
        return config, inputs, copies

    def _settle_cuda_graphs(
        self, wanted: bool | None, config: GenerationConfig, inputs: dict[str, Any], prompt_length: int
    ) -> bool:
        """Whether steps are replayed; `config` and `inputs` are set up for it."""
        if config.compile_config is None:
            # What transformers compiles by itself would have the recording of codes in it.
            config.disable_compile = True
        wanted = getattr(config, "cuda_graphs", None) if wanted is None else wanted
        if wanted is False:
            return False
        trouble = obstacle(
            self.backbone,
            [self.backbone_view.text_config, self.policy.decoder_stack.decoder.config],
            inputs.get(CACHE_NAME),
            config.cache_implementation,
            config.use_cache is not False,
        )
        if wanted and trouble:
            raise ValueError(f"`cuda_graphs=True` cannot be had: {trouble}. Leave it out, or pass `False`.")
        if trouble:
            return False
        length = _length(config, prompt_length)
        if not wanted and length - prompt_length < LEAST_TOKENS:
            return False
        config.cache_implementation, config.disable_compile = None, True
        inputs[CACHE_NAME] = static_cache(self.backbone_view.text_config, length)
        return True

    def _fresh_cache(self, config: GenerationConfig, inputs: dict[str, Any]) -> Cache | None:
        """The empty cache that is given, or one as transformers will make it, where it is dynamic or static."""
        cache = inputs.get(CACHE_NAME)
        if config.use_cache is False or (cache is not None and cache.get_seq_length() > 0):
            return None
        if cache is not None:
            return cache
        if config.cache_implementation == "static":
            return StaticCache(config=self.backbone_view.text_config, max_cache_len=1)
        if config.cache_implementation not in (None, "dynamic"):
            return None
        return DynamicCache(config=self.backbone_view.text_config)

    def _checked_forced(self, forced: torch.Tensor | None, rows: int) -> torch.Tensor | None:
        if forced is None:
            return None
        if forced.ndim != 2 or forced.shape[0] != rows:
            raise ValueError(f"`forced_action_ids` must be [{rows}, n], got {tuple(forced.shape)}.")
        if forced.is_floating_point() or forced.dtype == torch.bool:
            raise ValueError(f"`forced_action_ids` must be integers, got {forced.dtype}.")
        if forced.numel() and (forced.max() >= self.config.num_codes or forced.min() < -1):
            raise ValueError(
                f"`forced_action_ids` must be in -1 ... {self.config.num_codes - 1}, got {int(forced.min())} ... "
                f"{int(forced.max())}."
            )
        return forced.to(self.backbone.device, torch.long)

    def _checked_bias(self, bias: torch.Tensor | None) -> torch.Tensor | None:
        if bias is None:
            return None
        if tuple(bias.shape) != (self.config.num_codes,):
            raise ValueError(f"`action_bias` must be [{self.config.num_codes}], got {tuple(bias.shape)}.")
        if torch.isneginf(bias).all() or torch.isnan(bias).any() or torch.isposinf(bias).any():
            raise ValueError("`action_bias` must leave at least one code, and be finite or -inf.")
        return bias.to(self.backbone.device)


def _is_synced(asked: bool | None, backbone: PreTrainedModel) -> bool:
    """Whether processes generate in step: transformers decides so where it is not asked."""
    if asked is not None or not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return bool(asked)
    shared = is_deepspeed_zero3_enabled() or is_fsdp_managed_module(backbone)
    return shared and torch.distributed.get_world_size() > 1


def _length(config: GenerationConfig, prompt_length: int) -> int:
    """The most tokens that prompt and completion can have; 20 of the latter are transformers' own default."""
    length = prompt_length + config.max_new_tokens if config.max_new_tokens else config.max_length
    return length or prompt_length + 20


def _check_positions(length: int, limit: int | None) -> None:
    # The last token is never read.
    if limit is not None and length - 1 > limit:
        raise ValueError(
            f"Prompt and completion may have {length} tokens, and the backbone has positions for {limit}. Shorten the "
            "prompt, or lower `max_new_tokens`."
        )


def _names_by_row(inputs: dict[str, Any]) -> set[str]:
    """Inputs of the backbone that have a row for each text, in each call."""
    shape = inputs["attention_mask"].shape
    return {"input_ids", "position_ids"} | {
        name
        for name, value in inputs.items()
        if isinstance(value, torch.Tensor) and value.ndim in (2, 4) and value.shape[:2] == shape
    }


def _prompt_mask(input_ids: torch.Tensor, config: GenerationConfig) -> torch.Tensor:
    """As transformers infers it: everything counts but padding, where padding can be told from the end of a text."""
    if config.pad_token_id is None or config.pad_token_id in end_token_ids(config):
        return torch.ones_like(input_ids)
    return (input_ids != config.pad_token_id).long()


def _check_prompt(input_ids: torch.Tensor, attention_mask: torch.Tensor) -> None:
    if attention_mask.shape != input_ids.shape:
        raise ValueError(
            f"`attention_mask` must be {tuple(input_ids.shape)} as `input_ids`, got {tuple(attention_mask.shape)}. To "
            "go on from a cache pass the whole text, not its new part."
        )
    if not attention_mask[:, -1].all():
        raise ValueError("`attention_mask` has padding at the end of a prompt; pad on the left.")


def _check_past(cache: Cache | None, needs_prompt: bool) -> None:
    if cache is None or cache.get_seq_length() == 0:
        return
    if POLICY_LAYERS not in vars(cache):
        raise ValueError(
            "`past_key_values` has no layers of the policy. Pass the cache that this model's `generate` "
            "returned, or leave it out."
        )
    if needs_prompt:
        raise ValueError(
            "`past_key_values` leaves out the states of what it holds, so neither context states nor several samples a "
            "prompt can be had with it. Leave it out."
        )
