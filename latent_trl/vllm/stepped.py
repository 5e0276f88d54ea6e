"""What the engines over codes and over plans have in common: requests that are taken one by one, and ended."""

from collections.abc import Sequence
from typing import Any

from vllm import LLM, SamplingParams
from vllm.exceptions import VLLMClientError
from vllm.sampling_params import RequestOutputKind


class SteppedEngine:
    """An engine whose requests are taken beside those that run. Subclasses have `llm`."""

    llm: LLM

    def take_request(self, name: str, prompt: Any, params: SamplingParams, **options: Any) -> None:
        """
        Takes a request whose answer comes when it is whole.

        Args:
            name (`str`): Of the request, which no other has.
            prompt (`Any`): As vLLM takes it.
            params (`SamplingParams`): Of the answer.
            options: Further arguments of `LLMEngine.add_request`, such as `lora_request`.

        Raises:
            ValueError: For a request that cannot be had.
        """
        params.output_kind = RequestOutputKind.FINAL_ONLY
        try:
            self.llm.llm_engine.add_request(name, prompt, params, **options)
        except VLLMClientError as error:
            raise ValueError(str(error)) from error

    def abort(self, names: Sequence[str]) -> None:
        """Ends requests, which have no answer then."""
        self.llm.llm_engine.abort_request(list(names))
