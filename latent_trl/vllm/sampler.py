"""The sampler of vLLM's first model runner, which has no seam for one: codes are sampled, and tokens read from them."""

import torch
from vllm.v1.outputs import LogprobsTensors, SamplerOutput
from vllm.v1.sample.metadata import SamplingMetadata
from vllm.v1.sample.sampler import Sampler
from vllm.v1.worker import gpu_model_runner

from .requests import ActionRequests


class LatentActionSampler(Sampler):
    """
    Chooses codes by the requests' laws, and takes the most likely token of each. The log-probabilities that an answer
    carries, where they are asked for, are those of codes: their ids stand where a token's would.

    An engine without latent actions in the same process has no [`ActionRequests`], and samples as ever.
    """

    def forward(self, logits: torch.Tensor, sampling_metadata: SamplingMetadata, *args, **kwargs) -> SamplerOutput:
        processors = sampling_metadata.logitsprocs.argmax_invariant
        requests = next((p for p in processors if isinstance(p, ActionRequests)), None)
        if requests is None:
            return super().forward(logits, sampling_metadata, *args, **kwargs)
        action_ids, log_probs = requests.choose(logits)
        token_logits = requests.model.token_logits(action_ids)
        # Of what acts on tokens, requests may have the fewest that end a text.
        token_logits = self.apply_logits_processors(token_logits, sampling_metadata, False)
        logprobs, wanted = None, sampling_metadata.max_num_logprobs
        if wanted is not None:
            logprobs = chosen_and_best(log_probs, action_ids, min(wanted, log_probs.shape[-1]))
        tokens = token_logits.argmax(dim=-1, keepdim=True).to(torch.int32)
        return SamplerOutput(sampled_token_ids=tokens, logprobs_tensors=logprobs)


def chosen_and_best(log_probs: torch.Tensor, action_ids: torch.Tensor, count: int) -> LogprobsTensors:
    """The chosen code of each row, and then its `count` most likely ones. The base class's function compiles a kernel
    for the ranks, which takes half a minute on a CPU."""
    chosen = log_probs.gather(-1, action_ids[:, None])
    values, codes = log_probs.topk(count, dim=-1)
    ids = torch.cat([action_ids[:, None], codes], dim=1).to(torch.int32)
    ranks = (log_probs > chosen).sum(dim=-1) + 1
    return LogprobsTensors(ids, torch.cat([chosen, values], dim=1), ranks)


def rebind_sampler() -> None:
    """The runner makes its sampler from this name of its module."""
    gpu_model_runner.Sampler = LatentActionSampler
