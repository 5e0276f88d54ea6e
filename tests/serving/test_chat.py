"""`latent-trl chat --url` speaks to a server as it does to a model."""

import io

import pytest
from conversations import picture
from loopback import CARDS
from rich.console import Console

from latent_trl.commands.chat import Chat, parse
from latent_trl.commands.main import main
from latent_trl.commands.remote import remote_answerer, whole_url
from latent_trl.commands.replies import load_answerer


def remote(url, *words):
    return remote_answerer(url, None, parse(["--url", url, "--max-new-tokens", "12", *words]))


def test_a_server_answers_as_the_model(url, tmp_path):
    picture("blue").save(tmp_path / "blue.png")
    words = [str(CARDS / "pocket-vlm-latent-actions-grpo"), "--backbone", str(CARDS / "pocket-vlm")]
    said = []
    for answerer in (
        load_answerer(parse([*words, "--greedy", "--max-new-tokens", "12"])),
        remote(url, "--greedy"),
    ):
        out = io.StringIO()
        chat = Chat(answerer, Console(file=out, width=100), "be brief")
        chat.colours = False
        chat.hear(f"/image {tmp_path / 'blue.png'}")
        chat.hear("what color is it?")
        first = chat.last
        chat.hear("/again 1 7")
        assert chat.last.action_ids[:2] == [first.action_ids[0], 7] != first.action_ids[:2]
        chat.hear("what shape is it?")
        chat.hear("/codes")
        said.append((out.getvalue(), chat.last.action_ids, pytest.approx(chat.last.log_prob, abs=1e-4)))
    assert said[0][:2] == said[1][:2] and said[0][2].expected == said[1][2]


def test_samples_differ_from_answer_to_answer_and_are_repeatable(url):
    drawn = []
    for _ in range(2):
        answerer = remote(url, "--temperature", "1.5", "--ban", "3,4", "--bias", "5=0.5")
        drawn.append([answerer([{"role": "user", "content": "hello"}], [])[0].action_ids for _ in range(4)])
    assert drawn[0] == drawn[1] and len(set(map(tuple, drawn[0]))) > 1
    assert not {3, 4} & {code for codes in drawn[0] for code in codes}


def test_what_the_server_refuses_is_said_and_the_conversation_goes_on(url):
    out = io.StringIO()
    chat = Chat(remote(url, "--greedy"), Console(file=out, width=300))
    chat.hear("why " * 600)
    assert "the longest context is of 512" in out.getvalue() and chat.messages == []
    chat.hear("what color is it?")
    assert chat.last.text


def test_scheme_and_path_may_be_left_out(url):
    short = url.removeprefix("http://").removesuffix("/v1")
    assert remote(short, "--greedy").num_codes == remote(url, "--greedy").num_codes
    for given in ("127.0.0.1:8000", "http://127.0.0.1:8000/", "http://127.0.0.1:8000/v1/"):
        assert whole_url(given) == "http://127.0.0.1:8000/v1"
    assert whole_url("https://models.example/latent/v1") == "https://models.example/latent/v1"


def test_wrong_words(url, capsys, monkeypatch):
    with pytest.raises(SystemExit):
        parse([])
    assert "give a model, or --url" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        parse(["--url", url, "--dtype", "bfloat16"])
    assert main(["chat", "another", "--url", url]) == 1
    assert "serves ['pocket'], and no latent actions under the name 'another'" in capsys.readouterr().err
    assert main(["chat", "--url", "http://127.0.0.1:9/v1"]) == 1
    assert "Connection error" in capsys.readouterr().err
