"""The page about serving shows what works, and every option and status that it names is there."""

import re
from pathlib import Path

from conversations import picture

from latent_trl.commands.main import main

PAGE = (Path(__file__).parents[2] / "docs" / "serving.md").read_text(encoding="utf-8")
NAME, ADDRESS = "pocket-vlm-latent-actions-grpo", "http://127.0.0.1:8000/v1"


def test_the_code_of_the_page_runs(url, tmp_path, monkeypatch, capsys):
    picture("blue").save(tmp_path / "picture.png")
    monkeypatch.chdir(tmp_path)
    (code,) = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)
    assert code.count(NAME) == code.count(ADDRESS) == 1
    exec(compile(code.replace(NAME, "pocket").replace(ADDRESS, url), "serving.md", "exec"), {"__name__": "page"})
    text, ids = capsys.readouterr().out.strip().split("\n")
    assert text and re.fullmatch(r"\[\d+(, \d+)*\]", ids) and "5" not in ids.strip("[]").split(", ")


def test_the_page_names_options_and_fields_that_there_are(capsys):
    from latent_trl.serving.chat_request import REFUSED, ActionsRequest, CodesChatRequest

    try:
        main(["serve", "--help"])
    except SystemExit:
        pass
    shown = capsys.readouterr().out
    assert [option for option in re.findall(r"`(--[a-z-]+)", PAGE) if option not in shown] == []
    table = PAGE.split("## Requests")[1].split("\n\n")[1]
    rows = [line.split("|")[1] for line in table.splitlines()[2:]]
    names = {name.split(".")[0] for row in rows for name in re.findall(r"`([a-z_.]+)`", row)}
    assert names >= {"messages", "seed"} and {n for n in names if n} <= set(CodesChatRequest.model_fields)
    assert set(CodesChatRequest.model_fields) - names == {"model"}
    own = {name for row in rows for name in re.findall(r"`(?:latent_actions)?\.([a-z_]+)`", row)}
    assert own == set(ActionsRequest.model_fields)
    assert {"logit_bias", "presence_penalty", "frequency_penalty", "logprobs", "tools"} <= set(REFUSED)
