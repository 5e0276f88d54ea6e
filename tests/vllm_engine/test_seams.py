"""What the engine relies on in vLLM that is not documented; a change there is named here."""

import dataclasses
import inspect

from vllm.v1.outputs import LogprobsTensors, SamplerOutput
from vllm.v1.sample.metadata import SamplingMetadata
from vllm.v1.sample.sampler import Sampler
from vllm.v1.worker import gpu_model_runner

from latent_trl.vllm.plugin import register
from latent_trl.vllm.sampler import LatentActionSampler


def test_the_runner_makes_its_sampler_from_a_name_of_its_module():
    register()
    assert gpu_model_runner.Sampler is LatentActionSampler
    source = inspect.getsource(gpu_model_runner.GPUModelRunner)
    assert "self.sampler = Sampler(" in source
    assert (
        "self.sampler(\n                logits=logits,\n                sampling_metadata=sampling_metadata,\n"
        in source
    )


def test_what_a_sampler_is_given_and_gives():
    names = list(inspect.signature(Sampler.forward).parameters)
    assert names[:3] == ["self", "logits", "sampling_metadata"]
    fields = {field.name for field in dataclasses.fields(SamplingMetadata)}
    assert {"logitsprocs", "max_num_logprobs", "generators"} <= fields
    assert {field.name for field in dataclasses.fields(SamplerOutput)} >= {"sampled_token_ids", "logprobs_tensors"}
    assert LogprobsTensors._fields[:3] == ("logprob_token_ids", "logprobs", "selected_token_ranks")
    assert list(inspect.signature(Sampler.apply_logits_processors).parameters) == [
        "self",
        "logits",
        "sampling_metadata",
        "predict_bonus_token",
    ]


def test_processors_are_told_of_rows_before_the_forward():
    source = inspect.getsource(gpu_model_runner.GPUModelRunner._update_states)
    assert "self.input_batch.refresh_metadata()" in source
