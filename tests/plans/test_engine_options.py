"""Options of an engine for RL over plans, and what cannot be had is named before anything is decoded."""

import shutil

import pytest
from datasets import Dataset
from test_plan_policy import KINDS
from test_plan_trainers import QUIET, bandit_trainer, plan_model

from latent_trl import PlanBanditConfig, PlanConfig
from latent_trl.checkpoint.files import CheckpointError
from latent_trl.data.rows import RowError
from latent_trl.plans.engine import adapter_arguments
from latent_trl.plans.engine_decoder import check_decodable
from latent_trl.trainer.rollout import engine_source


@pytest.mark.parametrize(
    "options, message",
    [
        ({"vllm_mode": "server"}, "`vllm_mode` is about vLLM. Set `use_vllm=True`"),
        ({"vllm_server_hosts": ["a"]}, "`vllm_server_hosts` is about vLLM. Set `use_vllm=True`"),
        ({"use_vllm": True, "vllm_mode": "sever"}, "`vllm_mode` must be one of"),
        ({"use_vllm": True, "vllm_server_hosts": ["a"]}, "`vllm_server_hosts` is about servers"),
        ({"use_vllm": True, "vllm_mode": "server", "vllm_server_hosts": ["a:b"]}, "'a:b' is no address"),
        ({"use_vllm": True, "vllm_mode": "server", "vllm_server_timeout": 0}, "`vllm_server_timeout` must be positive"),
        (
            {"use_vllm": True, "vllm_mode": "server", "vllm_max_model_length": 512},
            "`vllm_max_model_length=512` is about an engine in the trainer's process",
        ),
        ({"vllm_max_model_length": 512}, "`vllm_max_model_length` is about vLLM. Set `use_vllm=True`"),
        ({"vllm_enable_sleep_mode": True}, "`vllm_enable_sleep_mode` is about vLLM"),
        ({"vllm_gpu_memory_utilization": 0.8}, "`vllm_gpu_memory_utilization` is about vLLM"),
        (
            {"use_vllm": True, "vllm_max_model_length": 32},
            "`vllm_max_model_length` is 32, and leaves no room for a prompt",
        ),
    ],
)
@pytest.mark.parametrize("kind", KINDS)
def test_options_that_cannot_be_had(kind, options, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        KINDS[kind][1](str(tmp_path), **QUIET, **options)


def test_without_vllm_it_is_said_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setattr(engine_source, "find_spec", lambda name: None)
    with pytest.raises(ImportError, match="`use_vllm=True` needs vLLM: `pip install vllm"):
        bandit_trainer(tmp_path, use_vllm=True)


def test_an_engine_is_named_in_the_saved_options(tmp_path):
    args = PlanBanditConfig(str(tmp_path), use_vllm=True, vllm_max_model_length=64, **QUIET)
    assert {"use_vllm": True, "vllm_max_model_length": 64}.items() <= args.to_dict().items()


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda model: setattr(model.plan_config, "has_adapter", True), "were learned beside a LoRA"),
        (lambda model: setattr(model.plan_config, "rank", 1024), "are of rank 1024, and an engine takes at most 512"),
        (lambda model: setattr(model.backbone, "is_quantized", True), "The backbone is quantised, and vLLM would load"),
    ],
)
def test_models_that_an_engine_would_not_answer_as(change, message):
    model = plan_model()
    change(model)
    with pytest.raises(ValueError, match=message):
        check_decodable(model)


@pytest.mark.parametrize("name", ["max_loras", "max_cpu_loras", "max_lora_rank"])
def test_slots_are_integers(name):
    with pytest.raises(ValueError, match=f"`{name}` must be an integer, got '32'"):
        adapter_arguments(PlanConfig(), 16, {name: "32"})


def test_folders_of_plans_that_the_record_does_not_know(tmp_path):
    model = plan_model()
    model.save_pretrained(tmp_path)
    shutil.copytree(tmp_path / "plan_01", tmp_path / "plan_04")
    with pytest.raises(CheckpointError, match=r"has 4 plans by its plan_config.json, and the folders \['plan_04'\]"):
        model.load_folder(tmp_path)


def test_a_prompt_without_tokens_is_named(tmp_path):
    rows = Dataset.from_list([{"prompt": "what"}, {"prompt": ""}])
    with pytest.raises(RowError, match="Row 1: its prompt has no tokens"):
        bandit_trainer(tmp_path, rows=rows).train()
