"""The engine of vLLM behind the server, with plans as its adapters."""

import math
from collections.abc import AsyncGenerator, Callable
from contextlib import aclosing
from dataclasses import dataclass, replace
from typing import Any

import torch
from vllm import SamplingParams
from vllm.sampling_params import RequestOutputKind

from ..checkpoint.files import PROCESSOR_RECORDS, resolve_folder
from ..checkpoint.plan_files import CHOOSER_FILE, PLAN_PATTERNS
from ..data.prompts import EncodedPrompt
from ..plans.configuration import PlanConfig
from ..plans.engine import check_no_switch, engine_arguments, plan_requests
from ..plans.lora_engine import never_tokens
from ..plans.model import PlanModel
from ..vllm.folders import dtype_of, load_generation_config, load_processor
from ..vllm.prompts import request_of
from .batched_engine import action_choice
from .batches import GrowingAnswer
from .engine import PLANS, EngineError, GenerationRequest, Piece
from .plan_engine import DEFAULT_LAW, about_plans, check_plans, held
from .vllm_engine import VLLMServing


@dataclass
class _Asked:
    """A prompt, and the chooser's logits `[1, K]` where its first segment starts."""

    prompt: EncodedPrompt
    logits: torch.Tensor


class VLLMPlanEngine(VLLMServing):
    """
    Answers with vLLM's own multi-LoRA: a segment is a request that names its plan. The chooser, where one has been
    trained, reads the states of a second copy of the backbone in this process.

    Args:
        model (`str`): Folder or Hub id of plans.
        max_batch_size, max_completion_length, options: As in [`~latent_trl.serving.vllm_engine.VLLMEngine`].

    Raises:
        ValueError: For plans that the engine cannot have, or options that leave it no room for them.
    """

    kind, default_law = PLANS, DEFAULT_LAW

    def __init__(self, model: str, max_batch_size: int = 32, max_completion_length: int = 1024, **options: Any):
        arguments = engine_arguments(model, **options)
        folder = resolve_folder(model, patterns=PLAN_PATTERNS)
        self.config = PlanConfig.load(folder)
        check_no_switch(self.config)
        self.chooser = None
        if (folder / CHOOSER_FILE).is_file():
            dtype = {"dtype": options["dtype"]} if "dtype" in options else {}
            device = "cuda" if torch.cuda.is_available() else "cpu"
            self.chooser = PlanModel.from_pretrained(folder, **dtype).to(device).eval()
        backbone, revision = arguments["model"], arguments.get("revision")
        arguments.setdefault("dtype", dtype_of(backbone, revision))
        own = any((folder / name).is_file() for name in PROCESSOR_RECORDS)
        processor = load_processor(folder) if own else load_processor(backbone, revision)
        config = load_generation_config(backbone, revision)
        self.adapters = plan_requests(model)
        super().__init__(processor, config, self.config.num_plans, arguments, max_batch_size, max_completion_length)

    def about(self) -> dict[str, Any]:
        return about_plans(self.config, self.chooser is not None, self.special_tokens)

    def _check(self, request: GenerationRequest) -> None:
        check_plans(request, self.config, self.chooser is not None)

    def _encode(self, row: dict[str, Any]) -> _Asked:
        prompt = self.encoder(row)
        return _Asked(prompt, self._logits(prompt, []))

    def _length(self, prompt: _Asked) -> int:
        return len(prompt.prompt.ids)

    def _logits(self, prompt: EncodedPrompt, said: list[int]) -> torch.Tensor:
        if self.chooser is None:
            return torch.zeros(1, self.num_actions)
        inputs = self.encoder.collate([self.chooser.continued(prompt, said)])
        inputs = {name: value.to(self.chooser.device) for name, value in inputs.items()}
        return self.chooser.plan_logits(**inputs).float().cpu()

    async def _answer(
        self,
        prompt: _Asked,
        request: GenerationRequest,
        length: int,
        seed: int | None,
        index: int,
        tell: Callable[[Piece | Exception], None],
    ) -> None:
        asked = replace(request, forced=held(request.forced, length))
        choice = action_choice(asked, self.num_actions, 1, "cpu", seed)
        ends = [] if request.ignore_eos else self.ends
        piece = Piece(index, prompt_tokens=len(prompt.prompt.ids))
        answer = GrowingAnswer(self.tokenizer, ends, length, request.stop, piece)
        said: list[int] = []
        segments, has_ended = 0, False
        while not has_ended:
            logits = await self._in_thread(self._logits, prompt.prompt, said) if said else prompt.logits
            plans, log_probs, _ = choice.choose(logits, segments)
            plan = int(plans)
            if self.chooser is not None and not math.isfinite(float(log_probs)):
                raise EngineError("No plan could be drawn: the chooser's probabilities are not finite.")
            answer.choose(plan, float(log_probs) if self.chooser is not None else 0.0)
            segment = self._segment(prompt.prompt, list(said), plan, request, length - len(said), ends)
            async with aclosing(segment) as parts:
                async for tokens in parts:
                    for token in tokens:
                        said.append(token)
                        answer.add(token)
                        has_ended = answer.piece.finish_reason is not None
                        if has_ended:
                            break
                    if request.stream or has_ended:
                        tell(answer.taken())
                    if has_ended:
                        break
            segments += 1

    async def _segment(
        self, prompt: EncodedPrompt, said: list[int], plan: int, request: GenerationRequest, left: int, ends: list[int]
    ) -> AsyncGenerator[list[int], None]:
        """The tokens of a segment as they come."""
        config = self.config
        stops = (config.segment_end_token_ids or []) if config.segment == "sentence" else []
        params = SamplingParams(
            temperature=0,
            max_tokens=min(left, config.segment) if isinstance(config.segment, int) else left,
            stop_token_ids=[*ends, *stops],
            ignore_eos=True,
            detokenize=False,
            logit_bias=never_tokens(config, self.llm.model_config),
            # Stop texts are looked for as tokens come.
            output_kind=RequestOutputKind.DELTA if request.stream or request.stop else RequestOutputKind.FINAL_ONLY,
        )
        asked = request_of(self.encoder, prompt, said)
        outputs = self.llm.generate(asked, params, self._number(), lora_request=self.adapters[plan])
        async with aclosing(outputs):
            async for output in outputs:
                yield list(output.outputs[0].token_ids)
