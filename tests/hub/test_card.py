"""Model cards: of one shape, filled with facts, read by the Hub's own parser, and with a snippet that runs."""

import builtins
import json
import os
import re

import pytest
import torch
from card_pattern import first_mismatch
from checkpoints import BASE, REPO, files_of, make_base, make_model, report, serve
from hub_server import TOKEN
from huggingface_hub import ModelCard
from transformers import AutoModelForImageTextToText
from transformers.utils import logging

from latent_trl import Codebook
from latent_trl.hub import plots
from latent_trl.hub.card import write_card
from latent_trl.hub.facts import MAX_HISTORY, CodebookReport, Evaluation, TrainingReport, TrainingRun, thinned


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    folder = tmp_path_factory.mktemp("base")
    return folder, make_base(folder)


@pytest.fixture
def saved(base, tmp_path):
    model = make_model(base[1].model)
    model.config.base_model_name_or_path, model.config.base_model_revision = "ada/tiny-base", "abc123"
    model.config.stage = "rl"
    model.training_report = report().to_dict()
    model.save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def check(card: str) -> str:
    assert first_mismatch(card) is None
    for placeholder in ("More Information Needed", "TODO", "None", "nan", "$", "{{"):
        assert placeholder not in card, placeholder
    return card


def test_a_full_card(saved):
    card = check(write_card(saved, REPO, license="mit", tags="toy", language="en").read_text())
    data = ModelCard(card).data
    assert (data.library_name, data.pipeline_tag, data.base_model) == ("latent-trl", "image-text-to-text", BASE)
    assert data.license == "mit" and data.datasets == ["ada/questions"] and data.language == "en"
    assert data.tags == ["latent-actions", "reinforcement-learning", "trl", "toy"]
    (result,) = data.eval_results
    assert (result.dataset_name, result.metric_type, result.metric_value) == ("ada/questions", "exact_match", 0.75)
    assert "at commit `abc123`" in card and "**3 of 16 codes** in use" in card and "13 dead codes" in card
    assert "loss from 2.000 to 0.400 and reward from 0.100 to 0.500" in card
    assert "0.7 to 0.8" in card and "95 % over 5 seeds" in card and "`learning_rate`" in card
    assert "| 3 | 3 |" in card and "`'c]'`" not in card and "a \\| \\` &lt;b>" in card
    for name in re.findall(r"\]\((\w+\.png)\)", card):
        assert (saved / name).read_bytes().startswith(b"\x89PNG")
    assert len(re.findall(r"\.png\)", card)) == 2


def test_tables_keep_their_columns(saved):
    card = write_card(saved, REPO).read_text()
    for table in re.findall(r"(?:^\|.*\|\n)+", card, flags=re.MULTILINE):
        widths = {len(re.findall(r"(?<!\\)\|", row)) for row in table.strip().split("\n")}
        assert len(widths) == 1, table


@pytest.mark.parametrize("family", ["llama", "llava"])
def test_a_card_of_what_is_known_of_nothing_is_whole(make_latent, tmp_path, family):
    model, _ = make_latent(family)
    model.save_pretrained(tmp_path)
    card = check(write_card(tmp_path).read_text())
    assert "was made in memory" in card and "No record of the training" in card
    assert ModelCard(card).data.pipeline_tag == ("text-generation" if family == "llama" else "image-text-to-text")
    assert not list(tmp_path.glob("*.png"))


def test_cards_of_parts(make_latent, tmp_path):
    model, _ = make_latent("llava")
    model.save_pretrained(tmp_path / "codes", components=["codebook", "projector"])
    assert "There is no policy here" in check(write_card(tmp_path / "codes").read_text())
    Codebook(8, 4).save_pretrained(tmp_path / "bare" / "codebook")
    assert "to be loaded one by one: `codebook`" in check(write_card(tmp_path / "bare").read_text())


def test_a_local_base_model_is_not_called_a_hub_id_nor_its_path_told(base, tmp_path):
    model = make_model(base[1].model)
    model.config.base_model_name_or_path = str(base[0])
    model.save_pretrained(tmp_path)
    card = check(write_card(tmp_path).read_text())
    assert ModelCard(card).data.base_model is None
    assert str(base[0]) not in card and base[0].name in card


def test_a_local_base_model_has_its_origin_and_its_source(base, tmp_path):
    model = make_model(base[1].model)
    model.config.base_model_name_or_path = "tiny-q4"
    model.save_pretrained(tmp_path)
    card = check(write_card(tmp_path, base_model=BASE, base_model_source="`make tiny-q4` makes it.").read_text())
    assert ModelCard(card).data.base_model == BASE and "The base model: `make tiny-q4` makes it.\n" in card
    assert "Learned on the local model `tiny-q4`" in card and 'from_pretrained("tiny-q4")' in card


def test_steps_are_told_stage_by_stage(saved):
    rows = [{"stage": "inverse_dynamics", "step": 20}, {"stage": "policy", "step": 5}, {"stage": "policy", "step": 10}]
    TrainingReport([TrainingRun("Learning", ["policy"], {"rows": 8}, history=rows)]).write(saved)
    card = check(write_card(saved).read_text())
    assert "on 8 rows, 20 steps of inverse_dynamics, 10 steps of policy." in card


def test_without_matplotlib_a_line_says_so(saved, monkeypatch):
    write_card(saved)
    monkeypatch.setattr(plots, "find_spec", lambda name: None)
    card = check(write_card(saved).read_text())
    assert "matplotlib was not installed" in card and ".png" not in card and not list(saved.glob("*.png"))


def test_jinja2_is_not_needed(saved, monkeypatch):
    real = builtins.__import__

    def refuse(name, *args, **kwargs):
        if name.split(".")[0] == "jinja2":
            raise ImportError(name)
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", refuse)
    check(write_card(saved).read_text())


def test_the_snippet_of_a_pushed_card_runs(hub, base, tmp_path, capsys):
    serve(hub, BASE, files_of(base[0]))
    model = make_model(AutoModelForImageTextToText.from_pretrained(BASE))
    model.push_to_hub(REPO, token=TOKEN)
    (code,) = re.findall(r"```python\n(.*?)```", hub.files(REPO)["README.md"].decode(), flags=re.DOTALL)
    # The tiny tokenizer of the base stands on the left already; the snippet is run as it is.
    names: dict = {}
    logging.set_verbosity_error()
    exec(compile(code, "README.md", "exec"), names)
    assert names["steered"].action_ids[0, 0] == names["forced"][0, 0] != names["answer"].action_ids[0, 0]
    assert len(capsys.readouterr().out.splitlines()) >= names["codes"].numel()


def test_the_snippet_of_a_local_base_model_runs(base, make_latent, tmp_path, monkeypatch):
    model = make_model(AutoModelForImageTextToText.from_pretrained(base[0]))
    model.save_pretrained(tmp_path / "actions")
    card = write_card(tmp_path / "actions", repo_id="actions").read_text()
    (code,) = re.findall(r"```python\n(.*?)```", card, flags=re.DOTALL)
    os.symlink(base[0], tmp_path / base[0].name)
    monkeypatch.chdir(tmp_path)
    exec(compile(code, "README.md", "exec"), {})


def test_a_token_in_a_setting_does_not_reach_the_card(saved):
    told = TrainingReport([TrainingRun("PPO", ["policy"], {}, {"note": f"with {TOKEN}"}, [], [f"reward_{TOKEN}"])])
    told.write(saved)
    assert TOKEN not in write_card(saved, title=TOKEN).read_text()


def test_codebook_report():
    counted = CodebookReport.from_choices([[0, 1], [1, 1]], 4, [["a", "b"], ["b", "c"]], ["ab", "bc"])
    assert counted.counts == [1, 3, 0, 0] and counted.used == 2 and counted.dead == [2, 3]
    shares = torch.tensor([0.25, 0.75])
    assert counted.perplexity == pytest.approx(torch.special.entr(shares).sum().exp().item())
    assert counted.codes[0] == {"code": 1, "tokens": [["b", 2], ["c", 1]], "examples": ["ab", "bc"]}
    assert CodebookReport([0, 0]).perplexity == 0.0


def test_reports_survive_json_and_refuse_other_shapes(tmp_path):
    told = report()
    told.write(tmp_path)
    assert TrainingReport.read(tmp_path) == told
    for bad in (
        {"runs": [{"method": 3}]},
        {"runs": 5},
        {"runs": [{"method": "x", "history": "long"}]},
        {"codebook": {"counts": ["many"]}},
        {"codebook": {"counts": [-1]}},
        {"evaluation": [{"dataset": "x", "metric": "y", "value": "best"}]},
        {"evaluation": [{"dataset": "x", "metric": "y"}]},
        {"codebook": {"counts": [1], "surprise": 1}},
    ):
        (tmp_path / "training_report.json").write_text(json.dumps(bad))
        with pytest.raises(ValueError, match="cannot be used"):
            TrainingReport.read(tmp_path)


def test_figures_are_finite():
    with pytest.raises(ValueError, match="finite"):
        Evaluation("x", "accuracy", float("nan"))


def test_long_histories_are_thinned_to_both_ends():
    rows = thinned([{"step": i, "loss": float(i), "bad": float("nan"), "what": [1]} for i in range(5000)])
    assert len(rows) == MAX_HISTORY and rows[0] == {"step": 0, "loss": 0.0} and rows[-1]["step"] == 4999
