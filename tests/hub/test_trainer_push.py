"""`push_to_hub`, `hub_strategy` and cards of all four trainers, against the Hub on loopback."""

import inspect
import json
import logging
import re
from pathlib import Path

import pytest
import torch
from card_pattern import first_mismatch
from checkpoints import REPO
from datasets import Dataset
from hub_server import TOKEN, Fault
from huggingface_hub import ModelCard
from huggingface_hub.errors import HfHubHTTPError
from peft import LoraConfig, PeftModel
from transformers import Trainer

from latent_trl import (
    Codebook,
    LatentActionGRPOConfig,
    LatentActionGRPOTrainer,
    LatentActionModel,
    LatentActionPPOConfig,
    LatentActionPPOTrainer,
    LatentActionSFTConfig,
    LatentActionSFTTrainer,
    LatentActionSpaceConfig,
    LatentActionSpaceTrainer,
)
from latent_trl.hub.facts import CodebookReport, Evaluation, TrainingReport

COMMON = {
    "per_device_train_batch_size": 2,
    "logging_steps": 1,
    "report_to": "none",
    "disable_tqdm": True,
    "use_cpu": True,
    "bf16": False,
    "push_to_hub": True,
    "hub_model_id": REPO,
    "hub_token": TOKEN,
}
TALK = Dataset.from_list(
    [{"messages": [{"role": "user", "content": f"{i}?"}, {"role": "assistant", "content": f"{i}!"}]} for i in range(8)]
)
PROMPTS = Dataset.from_list([{"prompt": [{"role": "user", "content": f"{i}?"}]} for i in range(8)])


def length_reward(completions, **kwargs):
    return [float(len(completion[0]["content"])) for completion in completions]


def make_trainer(kind: str, make_latent, folder, **options):
    model, tiny = make_latent("llama")
    options = {"output_dir": str(folder / "out"), "save_strategy": "no", **COMMON, **options}
    shared = {"model": model, "processing_class": tiny.processor}
    if kind == "space":
        steps = {"inverse_dynamics_max_steps": 2, "policy_max_steps": 2, "stages": ["inverse_dynamics", "policy"]}
        return LatentActionSpaceTrainer(args=LatentActionSpaceConfig(**steps, **options), train_dataset=TALK, **shared)
    options = {"max_steps": 2, **options}
    model.config.stage = "policy"
    if kind == "sft":
        return LatentActionSFTTrainer(args=LatentActionSFTConfig(**options), train_dataset=TALK, **shared)
    options["max_completion_length"] = 4
    shared |= {"reward_funcs": length_reward, "train_dataset": PROMPTS}
    if kind == "ppo":
        return LatentActionPPOTrainer(args=LatentActionPPOConfig(**options), **shared)
    return LatentActionGRPOTrainer(args=LatentActionGRPOConfig(num_generations=2, **options), **shared)


def published(hub, revision="main") -> dict[str, bytes]:
    files = hub.files(REPO, revision)
    assert not any(TOKEN.encode() in content for content in files.values())
    return files


@pytest.mark.parametrize("kind", ["space", "sft", "grpo", "ppo"])
def test_a_run_is_pushed_with_its_card_and_loads_again(hub, make_latent, tmp_path, kind):
    trainer = make_trainer(kind, make_latent, tmp_path)
    trainer.train()
    trainer.push_to_hub(dataset_name="ada/talk", tags=["toy"], license="mit")
    files = published(hub)
    card = files["README.md"].decode()
    assert first_mismatch(card) is None
    data = ModelCard(card).data
    assert data.datasets == ["ada/talk"] and {"toy", "latent-actions"} <= set(data.tags) and data.license == "mit"
    assert trainer._name in card and "8 rows" in card and "training_curves.png" in files
    assert "`learning_rate`" in card and str(tmp_path) not in card
    assert not {name for name in files if name.endswith((".pt", ".bin", ".pth"))}
    (run,) = TrainingReport.from_dict(json.loads(files["training_report.json"])).runs
    assert any("loss" in row for row in run.history) and run.trained
    loaded = LatentActionModel.from_pretrained(REPO, backbone=make_latent("llama")[1].model)
    own = trainer.accelerator.unwrap_model(trainer.model)
    assert torch.equal(loaded.policy.head.weight.float(), own.policy.head.weight.float())
    assert loaded.config.stage == {"space": "policy", "sft": "sft"}.get(kind, "rl")
    assert loaded.config.data_description["rows"] == 8
    if kind in ("grpo", "ppo"):
        assert "the last" in card and "rollouts" in card and "length_reward" in card


def test_space_pushes_each_stage_when_it_is_done(hub, make_latent, tmp_path):
    make_trainer("space", make_latent, tmp_path).train()
    assert hub.repositories[REPO].messages == ["initial commit", "Model save", "Model save"]
    assert Codebook.from_pretrained(REPO).num_codes == 16


@pytest.mark.parametrize("strategy", ["end", "every_save", "checkpoint", "all_checkpoints"])
def test_hub_strategies(hub, make_latent, tmp_path, strategy):
    options = {"hub_strategy": strategy, "save_strategy": "steps", "save_steps": 1, "hub_always_push": True}
    trainer = make_trainer("grpo", make_latent, tmp_path, save_total_limit=1, **options)
    trainer.train()
    messages, files = hub.repositories[REPO].messages, published(hub)
    folders = {name.split("/")[0] for name in files if "/" in name}
    if strategy == "end":
        assert messages == ["initial commit"]
        return
    assert [m for m in messages if m.startswith("Training in progress, step") and "checkpoint" not in m] == [
        "Training in progress, step 1",
        "Training in progress, step 2",
    ]
    assert first_mismatch(files["README.md"].decode()) is None
    wanted = {
        "every_save": set(),
        "checkpoint": {"last-checkpoint"},
        "all_checkpoints": {"checkpoint-1", "checkpoint-2"},
    }
    assert {name for name in folders if "checkpoint" in name} == wanted[strategy]
    for name in wanted[strategy]:
        assert {f"{name}/optimizer.pt", f"{name}/trainer_state.json", f"{name}/policy/model.safetensors"} <= set(files)
        assert f"{name}/training_args.bin" not in files
    assert not list((tmp_path / "out").glob("_push-*"))


def test_a_push_that_fails_on_the_way_does_not_stop_training(hub, make_latent, tmp_path, caplog):
    hub.faults.append(Fault("POST .*/commit/", 403, times=100))
    trainer = make_trainer("sft", make_latent, tmp_path, save_strategy="steps", save_steps=1)
    logging.getLogger("transformers").propagate = True
    trainer.train()
    assert trainer.state.global_step == 2
    assert "A push during training failed" in caplog.text and TOKEN not in caplog.text
    with pytest.raises(HfHubHTTPError, match="403"):
        trainer.push_to_hub()


def test_the_record_of_a_second_run_follows_that_of_the_first(hub, make_latent, tmp_path):
    first = make_trainer("sft", make_latent, tmp_path, push_to_hub=False)
    first.train()
    first.save_model(str(tmp_path / "first"))
    model = LatentActionModel.from_pretrained(tmp_path / "first", backbone=make_latent("llama")[1].model)
    args = LatentActionGRPOConfig(
        output_dir=str(tmp_path / "second"), num_generations=2, max_steps=1, max_completion_length=4, **COMMON
    )
    second = LatentActionGRPOTrainer(
        model=model,
        reward_funcs=length_reward,
        args=args,
        train_dataset=PROMPTS,
        processing_class=first.processing_class,
    )
    second.train()
    figure = Evaluation("ada/questions", "exact_match", 0.5)
    counted = CodebookReport.from_choices([[1, 2]], 16, [["a", "b"]], ["ab"])
    second.push_to_hub(evaluation=[figure], codebook=counted)
    second.push_to_hub(evaluation=[figure], codebook=counted)
    report = TrainingReport.from_dict(json.loads(published(hub)["training_report.json"]))
    assert [run.method for run in report.runs] == ["Latent-action SFT", "Latent-action GRPO"]
    assert report.evaluation == [figure] and report.codebook == counted


def test_no_file_of_a_run_holds_the_token(hub, make_latent, tmp_path, capfd):
    trainer = make_trainer("sft", make_latent, tmp_path, save_strategy="steps", save_steps=1)
    trainer.train()
    trainer.save_model()
    print(trainer.args, trainer.args.to_dict())
    for path in tmp_path.rglob("*"):
        assert not path.is_file() or TOKEN.encode() not in path.read_bytes(), path
    assert TOKEN not in "".join(capfd.readouterr())


@pytest.mark.parametrize("kind", ["space", "ppo"])
def test_the_format_page_names_every_file_of_a_run(make_latent, tmp_path, kind):
    page = (Path(__file__).parents[2] / "docs" / "checkpoint_format.md").read_text(encoding="utf-8")
    halves = {} if kind == "space" else {"steps_per_generation": 2}
    make_trainer(kind, make_latent, tmp_path, save_strategy="steps", save_steps=1, push_to_hub=False, **halves).train()
    files = {path.relative_to(tmp_path / "out") for path in tmp_path.rglob("*") if path.is_file()}
    # Parts of a run's files are numbered by step and by process, which the page calls N and R.
    names = {re.sub(r"_\d+\.", "_R.", re.sub(r"-\d+$", "-N", part)) for path in files for part in path.parts}
    assert {"checkpoint_files.json", "checkpoint-N"} <= names
    assert ("history.json" in names) == (kind == "space") and ("rollout_buffer_R.safetensors" in names) == (
        kind == "ppo"
    )
    assert [name for name in sorted(names) if name not in page] == []


def test_an_adapter_is_one_for_peft_alone(make_latent, tmp_path):
    model, tiny = make_latent("llama")
    model.add_adapter(LoraConfig(r=2, init_lora_weights=False))
    model.save_pretrained(tmp_path)
    with torch.no_grad():
        wanted = model.backbone(**tiny.text_inputs).logits
        loaded = PeftModel.from_pretrained(make_latent("llama")[1].model, tmp_path / "adapter")
        assert torch.equal(loaded(**tiny.text_inputs).logits, wanted)


def test_a_token_that_http_cannot_carry_is_refused_before_training(hub, make_latent, tmp_path):
    with pytest.raises(ValueError, match="`token` has characters") as error:
        make_trainer("sft", make_latent, tmp_path, hub_token=TOKEN + "\n")
    assert TOKEN not in str(error.value)


def test_the_methods_that_are_extended_are_those_of_transformers():
    """Upstream changed a method that `HubTrainingMixin` takes the place of: compare them, then mend this list."""
    expected = {
        "init_hf_repo": ["self", "token", "kwargs"],
        "_push_from_checkpoint": ["self", "checkpoint_folder"],
        "push_to_hub": ["self", "commit_message", "blocking", "token", "revision", "private", "kwargs"],
        "_finish_current_push": ["self"],
        "save_model": ["self", "output_dir", "_internal_call"],
    }
    for name, parameters in expected.items():
        found = list(inspect.signature(getattr(Trainer, name)).parameters)
        # transformers 5.20 has no `private`; what is given is passed on.
        if "private" not in found:
            parameters = [p for p in parameters if p != "private"]
        if name == "init_hf_repo":
            found = ["kwargs" if p == "private" else p for p in found]
            parameters = parameters[: len(found)]
        assert found == parameters, name
        own = list(inspect.signature(getattr(LatentActionSFTTrainer, name)).parameters)
        assert [p for p in own if p in parameters] == parameters, name
