"""Folders of plans on the Hub: pushed with a card by model, command and trainers, pulled and inspected."""

import json
import re

import pytest
import torch
from checkpoints import BASE, files_of, make_base, serve
from datasets import Dataset
from hub_server import TOKEN
from huggingface_hub import ModelCard
from peft import PeftModel
from tiny_models import llama, make_tokenizer
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText

from latent_trl import (
    CheckpointError,
    PlanBanditConfig,
    PlanBanditTrainer,
    PlanConfig,
    PlanModel,
    PlanSpaceConfig,
    PlanSpaceTrainer,
)
from latent_trl.commands.inspect import main as inspect_command
from latent_trl.commands.main import main as command_line
from latent_trl.hub.card import write_card
from latent_trl.hub.facts import PlansReport, TrainingReport, TrainingRun
from latent_trl.hub.pull import inspect, pull_folder
from latent_trl.hub.push import published_files

REPO = "ada/tiny-plans"
SAID = [["yes.", 40], ["a | ` <b>", 2]]


def report() -> TrainingReport:
    history = [{"step": step, "loss": 2.0 / step, "reward": 0.1 * step} for step in range(1, 6)]
    run = TrainingRun("Contextual bandit over plans", ["chooser"], {"rows": 12}, {"seed": 0}, history, ["exact_match"])
    plans = [{"plan": plan, "reward": 0.25, "chosen": 0.5, "answers": SAID} for plan in range(3)]
    return TrainingReport([run], plans=PlansReport("60 held-out prompts", plans))


def make_plans(backbone, chooser=True, **options) -> PlanModel:
    model = PlanModel(backbone, PlanConfig(num_plans=3, depth=1, rank=2, init_std=0.5, **options))
    model.chooser_is_trained = chooser
    model.training_report = report().to_dict()
    return model


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    folder = tmp_path_factory.mktemp("base")
    return folder, make_base(folder)


@pytest.fixture
def pushed(hub, base):
    serve(hub, BASE, files_of(base[0]))
    model = make_plans(AutoModelForImageTextToText.from_pretrained(BASE))
    model.push_to_hub(REPO, token=TOKEN, commit_message="Plans")
    return model


def tables_are_whole(card: str) -> bool:
    tables = re.findall(r"(?:^\|.*\|\n)+", card, flags=re.MULTILINE)
    return len(tables) > 2 and all(
        len({len(re.findall(r"(?<!\\)\|", row)) for row in table.strip().split("\n")}) == 1 for table in tables
    )


def test_plans_come_back_from_the_hub(hub, base, pushed, tmp_path):
    assert hub.repositories[REPO].messages == ["initial commit", "Plans"]
    loaded = PlanModel.from_pretrained(REPO)
    for name, tensor in pushed.state_dict().items():
        assert torch.equal(tensor, loaded.state_dict()[name]), name
    assert loaded.training_report == pushed.training_report
    assert torch.equal(loaded.generate(**base[1].inputs), pushed.generate(**base[1].inputs))
    sha = pull_folder(REPO, tmp_path / "pulled", token=TOKEN)
    assert sha == hub.repositories[REPO].refs["main"]
    plain = AutoModelForImageTextToText.from_pretrained(base[0])
    alone = PeftModel.from_pretrained(plain, str(tmp_path / "pulled" / "plan_01"))
    assert torch.equal(
        alone.base_model.model.get_submodule(pushed.plans.targets[0]).lora_A["default"].weight,
        pushed.plans.lora_A[0][1],
    )
    pull_folder(REPO, tmp_path / "one", components=["plan_02", "chooser"], token=TOKEN)
    assert sorted(path.name for path in (tmp_path / "one").iterdir()) == ["chooser.safetensors", "plan_02"]
    with pytest.raises(ValueError, match=r"`components` \['plan_07'\] are not in"):
        pull_folder(REPO, tmp_path / "two", components=["plan_07"], token=TOKEN)


def test_plans_that_are_no_longer_there_go(hub, base, pushed):
    fewer = PlanModel(base[1].model, PlanConfig(num_plans=2, depth=1))
    fewer.push_to_hub(REPO, token=TOKEN)
    folders = {name.split("/")[0] for name in hub.files(REPO) if "/" in name}
    assert folders == {"plan_00", "plan_01"} and "chooser.safetensors" not in hub.files(REPO)
    assert "training_report.json" not in hub.files(REPO)


def test_the_card_says_what_each_plan_says(hub, base, pushed):
    card = hub.files(REPO)["README.md"].decode()
    data = ModelCard(card).data
    assert (data.library_name, data.pipeline_tag, data.base_model) == ("latent-trl", "image-text-to-text", BASE)
    assert data.tags == ["latent-actions", "plans", "trl"]
    assert "**3 plans** for a vision-language model" in card and "rank 2 on the layers from 1 on" in card
    assert "| 1 | 0.25 | 50% | `yes.` × 40, `a \\| ' <b>` × 2 |" in card
    assert tables_are_whole(card) and not re.search(r"None|nan|\$|TODO", card)
    assert "reward from 0.100 to 0.500" in card


@pytest.mark.parametrize("chooser", [True, False])
def test_the_cards_code_runs(base, tmp_path, monkeypatch, capsys, chooser):
    tiny = llama()
    tiny.model.save_pretrained(tmp_path / "base")
    tokenizer = make_tokenizer()
    tokenizer.save_pretrained(tmp_path / "base")
    monkeypatch.chdir(tmp_path)
    make_plans(AutoModelForCausalLM.from_pretrained("base"), chooser).save_pretrained("plans")
    card = write_card("plans").read_text()
    assert ("There is no chooser here" in card) != chooser and "for a language model" in card
    (code,) = re.findall(r"```python\n(.*?)```", card, re.DOTALL)
    exec(compile(code, "card", "exec"), {})
    assert len(capsys.readouterr().out.splitlines()) >= 3


def test_a_card_of_nothing_known_is_whole(base, tmp_path):
    PlanModel(base[1].model, PlanConfig(num_plans=2)).save_pretrained(tmp_path)
    card = write_card(tmp_path).read_text()
    assert "What each plan says was not measured." in card and "No record of the training" in card
    assert not re.search(r"None|nan|\$|TODO", card)


@pytest.mark.parametrize(
    "segment, said",
    [
        ("answer", "the whole answer"),
        ("sentence", "a sentence"),
        ("switch", "a segment that a learned switch ends"),
        (12, "12 tokens"),
    ],
)
def test_it_is_said_for_what_a_plan_is_held(base, tmp_path, segment, said, capsys):
    make_plans(base[1].model, segment=segment).save_pretrained(tmp_path)
    assert f"latent actions that are held for {said}, each a LoRA" in write_card(tmp_path).read_text()
    assert inspect_command([str(tmp_path)]) == 0
    assert f"held for {said} " in " ".join(re.sub("[│┃]", " ", capsys.readouterr().out).split())


def test_commands_push_pull_and_inspect_plans(hub, base, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    make_plans(base[1].model).save_pretrained(tmp_path / "plans")
    assert command_line(["push", str(tmp_path / "plans"), REPO]) == 0
    assert command_line(["pull", REPO, str(tmp_path / "pulled")]) == 0
    mine, theirs = files_of(tmp_path / "plans"), files_of(tmp_path / "pulled")
    assert mine == {name: theirs[name] for name in mine}
    hub.requests.clear()
    capsys.readouterr()
    for source in (REPO, str(tmp_path / "plans")):
        assert inspect_command([source]) == 0
        said = " ".join(capsys.readouterr().out.split())
        for told in ("3 of rank 2, from layer 1 on", "plan_02", "chooser", "yes."):
            assert told in said, told
        assert inspect_command([source, "--json"]) == 0
        found = json.loads(capsys.readouterr().out)
        assert len(found["components"]) == 4 and found["plans"]["plans"][1]["chosen"] == 0.5
    weights = [headers for line, headers in hub.requests if line.endswith(".safetensors")]
    assert weights and all(headers["range"] == "bytes=0-100000" for headers in weights)


def test_inspect_names_plans_that_are_missing(base, tmp_path):
    make_plans(base[1].model).save_pretrained(tmp_path)
    (tmp_path / "plan_01" / "adapter_model.safetensors").unlink()
    (problem,) = inspect(tmp_path).problems
    assert problem == "plan_config.json speaks of 3 plans, and ['plan_01'] have no tensors"


@pytest.mark.parametrize("fault", ["missing", "token", "link", "count"])
def test_what_is_not_whole_or_secret_is_not_pushed(hub, base, tmp_path, fault, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    folder = tmp_path / "plans"
    make_plans(base[1].model).save_pretrained(folder)
    config = folder / "plan_02" / "adapter_config.json"
    if fault == "missing":
        (folder / "plan_02" / "adapter_model.safetensors").unlink()
    elif fault == "token":
        config.write_text(json.dumps({**json.loads(config.read_text()), "revision": "hf_" + "a" * 30 + "9"}))
    elif fault == "link":
        (tmp_path / "elsewhere.json").write_text("{}")
        config.unlink()
        config.symlink_to(tmp_path / "elsewhere.json")
    else:
        record = folder / "plan_config.json"
        record.write_text(json.dumps({**json.loads(record.read_text()), "num_plans": 10**12}))
    assert command_line(["push", str(folder), REPO]) == 1
    assert hub.repositories == {}


def test_nothing_but_the_format_is_published(base, tmp_path):
    make_plans(base[1].model).save_pretrained(tmp_path)
    for name in (
        "optimizer.pt",
        "training_args.json",
        "plan_00/other.bin",
        "plan_x/adapter_config.json",
        "replay.json",
    ):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("{}")
    assert {name.split("/")[-1] for name in published_files(tmp_path)} == {
        *("plan_config.json", "chooser.safetensors", "training_report.json"),
        *("adapter_config.json", "adapter_model.safetensors"),
    }


@pytest.mark.parametrize("plans", [[{"plan": "0"}], [{"plan": 0, "answers": [["a", "b"]]}], [3], {"plan": 0}])
def test_a_report_of_no_plans_is_refused(base, tmp_path, plans):
    make_plans(base[1].model).save_pretrained(tmp_path)
    (tmp_path / "training_report.json").write_text(json.dumps({"plans": {"over": "x", "plans": plans}}))
    with pytest.raises(CheckpointError, match="training report has a value that cannot be used"):
        inspect(tmp_path)


def backbone():
    tiny = llama(num_hidden_layers=2)
    tiny.model.generation_config.eos_token_id = list(range(2, 140))
    return tiny.model


@pytest.mark.parametrize("strategy", ["end", "checkpoint"])
@pytest.mark.parametrize("kind", ["space", "bandit"])
def test_a_trainer_pushes_plans_with_their_card(hub, tmp_path, kind, strategy):
    rows = Dataset.from_list([{"prompt": "what " * (1 + i % 3) + str(i)} for i in range(12)])
    options = {
        "output_dir": str(tmp_path / "out"),
        "push_to_hub": True,
        "hub_model_id": REPO,
        "hub_token": TOKEN,
        "hub_strategy": strategy,
        "hub_always_push": True,
        "save_strategy": "steps",
        "save_steps": 2,
        "max_steps": 2,
        "max_completion_length": 4,
        "logging_steps": 1,
        "disable_tqdm": True,
        "use_cpu": True,
    }

    def length(completions, **columns):
        return [float(len(text)) for text in completions]

    model = PlanModel(backbone(), PlanConfig(num_plans=4, depth=1, rank=2))
    if kind == "space":
        args = PlanSpaceConfig(branch_min_prob=0.005, answers_per_prompt=3, eval_steps=2, **options)
        trainer = PlanSpaceTrainer(model, args, rows, rows, make_tokenizer(), reward_funcs=length)
    else:
        args = PlanBanditConfig(num_iterations=1, rollout_prompts=4, **options)
        trainer = PlanBanditTrainer(model, length, args, rows, rows, make_tokenizer())
    trainer.train()
    trainer.push_to_hub(dataset_name="ada/prompts", license="mit")
    files = hub.files(REPO)
    assert not any(TOKEN.encode() in content for content in files.values())
    top = [name for name in files if not name.startswith("last-checkpoint/")]
    assert not [name for name in top if name.endswith((".bin", ".pt", ".pth"))]
    card = files["README.md"].decode()
    assert trainer._name in card and "12 rows" in card and "4 plans" in card and "In 12 held-out prompts" in card
    assert ModelCard(card).data.datasets == ["ada/prompts"] and str(tmp_path) not in card
    found = TrainingReport.from_dict(json.loads(files["training_report.json"]))
    (run,) = found.runs
    assert run.trained == [{"space": "plans", "bandit": "chooser"}[kind]] and any("loss" in row for row in run.history)
    assert {one.metric for one in found.evaluation} >= {"eval_ceiling"}
    shares = [one["chosen"] for one in found.plans.plans]
    assert shares == [None] * 4 if kind == "space" else sum(shares) == pytest.approx(1)
    assert any(name.startswith("last-checkpoint/") for name in files) == (strategy == "checkpoint")
    loaded = PlanModel.from_pretrained(REPO, backbone=backbone())
    assert torch.equal(loaded.plans.lora_A[0], trainer.model.plans.lora_A[0])
