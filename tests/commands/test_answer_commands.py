"""generate, chat, evaluate, atlas and env on the pocket VLM."""

import io
import json
import math
import re

import pytest

from latent_trl.commands.main import main

QUESTIONS = "latent_trl.data.shapes:shape_questions"


def test_generate_follows_forced_and_banned_codes(checkpoint, picture, capsys):
    words = [checkpoint, "--prompt", "what color is it?", "--image", picture, "-n", "3", "--max-new-tokens", "5"]
    assert main(["generate", *words, "--json", "--force", "3,-1,2", "--ban", "0,1"]) == 0
    replies = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert len(replies) == 3
    for reply in replies:
        assert reply["action_ids"][0] == 3 and not {0, 1} & set(reply["action_ids"])
        assert len(reply["tokens"]) == len(reply["action_ids"]) <= 5
    assert main(["generate", *words, "--greedy", "--plain"]) == 0
    first, *others = capsys.readouterr().out.splitlines()
    assert others == [first, first]


@pytest.mark.parametrize("search", ["--best-of", "--tree"])
def test_generate_searches_for_what_a_reward_likes(checkpoint, picture, search, capsys):
    words = [checkpoint, "--prompt", "what color is it?", "--image", picture, "--max-new-tokens", "5"]
    rewards = ["--reward-funcs", "length", "exact_match", "--reward-kwargs", '{"length": {"target": 2}}']
    assert main(["generate", *words, search, "4", *rewards, "--columns", '{"answer": "red"}', "--json"]) == 0
    (line,) = capsys.readouterr().out.splitlines()
    found = json.loads(line)
    assert math.isfinite(found["reward"]) and "".join(found["tokens"]).startswith(found["text"][:1])
    assert main(["generate", *words, search, "1", *rewards[:2], *rewards[3:]]) == 0
    assert "reward " in capsys.readouterr().out


@pytest.mark.parametrize(
    "words, said",
    [
        (["--best-of", "4"], "need --reward-funcs"),
        (["--reward-funcs", "length"], "need --reward-funcs, and the other way round"),
        (["--best-of", "4", "--tree", "4"], "not allowed with argument"),
        (["--tree", "4", "--reward-funcs", "length", "--force", "1"], "not for searches"),
    ],
)
def test_a_search_without_its_parts_is_wrong_usage(words, said, capsys):
    with pytest.raises(SystemExit) as stop:
        main(["generate", "model", "--prompt", "hi", *words])
    assert stop.value.code == 2 and said in capsys.readouterr().err


@pytest.mark.parametrize(
    "words, said",
    [
        (["--image", "none.png"], "There is no picture 'none.png'"),
        (["--ban", "99"], r"Codes are 0 to 15, got \[99\]"),
        (["--temperature", "0"], "`action_temperature` must be positive"),
    ],
)
def test_generate_says_what_is_wrong(checkpoint, words, said, capsys):
    assert main(["generate", checkpoint, "--prompt", "hi", *words]) == 1
    assert re.search(said, capsys.readouterr().err)


def test_chat_answers_again_from_a_step_with_another_code(checkpoint, picture):
    from rich.console import Console

    from latent_trl.commands.chat import Chat, parse
    from latent_trl.commands.replies import load_answerer

    out = io.StringIO()
    args = parse([checkpoint, "--max-new-tokens", "6", "--greedy"])
    chat = Chat(load_answerer(args), Console(file=out, width=100))
    assert chat.hear(f"/image {picture}") and chat.hear("what color is it?")
    first = chat.last.action_ids
    kept = min(2, len(first) - 1)
    code = (first[kept] + 1) % 16
    assert chat.hear(f"/again {kept} {code}")
    assert chat.last.action_ids[: kept + 1] == [*first[:kept], code]
    assert [m["role"] for m in chat.messages] == ["user", "assistant"] and len(chat.images) == 1
    assert chat.hear("/again") and chat.last.action_ids == first
    assert chat.hear("/codes") and f"{first[0]}" in out.getvalue()
    for line, said in (
        ("/foo", "no command /foo"),
        ("/again 99", "the answer has"),
        ("/again 0 16", "codes are 0 to 15"),
        ("/temperature 0", "must be positive"),
        ("/image none.png", "There is no picture"),
    ):
        assert chat.hear(line) and said in out.getvalue()
    assert chat.hear("/new") and chat.messages == [] and chat.images == []
    assert not chat.hear("/quit")


def test_evaluate_measures_reward_diversity_codes_and_pictures(checkpoint, tmp_path):
    words = [checkpoint, QUESTIONS, "--limit", "12", "--reward-funcs", "exact_match", "--max-new-tokens", "5"]
    path = tmp_path / "figures.json"
    assert main(["evaluate", *words, "--samples", "2", "--image-ablation", "--output", str(path)]) == 0
    found = json.loads(path.read_text())
    figures = found["figures"]
    reward = figures["reward/exact_match"]
    assert 0 <= reward["low"] <= reward["estimate"] <= reward["high"] <= 1 and reward["count"] == 12
    gain = figures["reward/exact_match, gain by the picture"]
    swapped = figures["reward/exact_match, another picture"]
    assert gain["estimate"] == pytest.approx(reward["estimate"] - swapped["estimate"])
    assert 1 <= figures["codebook/perplexity"] <= figures["codebook/used"] <= 16
    assert 1 <= figures["different answers a prompt"]["estimate"] <= 2
    assert len(found["answers"]) == len(found["action_ids"]) == len(found["swapped"]) == 12


def test_evaluate_asks_for_what_it_needs(checkpoint, capsys, tmp_path):
    with pytest.raises(SystemExit):
        main(["evaluate", checkpoint, QUESTIONS, "--image-ablation"])
    assert "give --reward-funcs" in capsys.readouterr().err
    (tmp_path / "rows.jsonl").write_text('{"question": "a"}\n')
    assert main(["evaluate", checkpoint, str(tmp_path / "rows.jsonl")]) == 1
    assert "it needs `prompt`, or `messages`" in capsys.readouterr().err


def test_atlas_is_one_page_that_needs_nothing_else(checkpoint, tmp_path):
    pytest.importorskip("jinja2")
    path = tmp_path / "atlas.html"
    words = [checkpoint, QUESTIONS, "--limit", "12", "--max-new-tokens", "4", "--forced-prompts", "2"]
    assert main(["atlas", *words, "--output", str(path)]) == 0
    page = path.read_text()
    assert not re.search(r'(src|href)="(?!data:|#)', page)
    assert page.count('class="forced"') == 2 and page.count("<svg") == 4
    shown = set(map(int, re.findall(r'id="code-(\d+)"', page)))
    assert shown and shown <= set(range(16))
    assert "NaN" not in page and "nan" not in re.findall(r'(?:x|y|cx|cy|r)="([^"]*)"', page)


def test_the_atlas_shows_words_as_words(tmp_path):
    pytest.importorskip("jinja2")
    from latent_trl.evaluation.atlas import Atlas, CodeEntry, Heat, write_atlas

    entry = CodeEntry(0, 1, [("<script>alert(1)</script>", 1)], [("a", "<b>", "c")])
    atlas = Atlas("<m>", "d", 1, 1, [entry], 1.0, 0.0, Heat(["0"], ["<i>"], [[1.0]]), Heat(["0"], ["0"], [[0.0]]), 1.0)
    page = write_atlas(atlas, tmp_path / "a.html").read_text()
    assert "<script>alert" not in page and "<m>" not in page and "<i>" not in page


def test_env_names_versions_and_rewards(capsys):
    assert main(["env"]) == 0
    said = capsys.readouterr().out
    for name in ("torch:", "transformers:", "trl:", "devices:", "exact_match"):
        assert name in said
