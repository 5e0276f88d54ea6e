"""`latent-trl evaluate`: judge, perplexity, diversity, swapped pictures, and what is written to disk."""

import json
import math

import pytest
from datasets import Dataset, Image, List
from rewards.judge_server import JudgeServer, Reply, right

from latent_trl.commands.evaluate import LAWS, Measured, diversity, swap_images
from latent_trl.commands.main import main
from latent_trl.evaluation.json_files import write_json

QUESTIONS = "latent_trl.data.shapes:shape_questions"


def test_the_judge_grades_generations_by_aspect_and_perplexity_has_every_law(checkpoint, tmp_path, monkeypatch):
    pytest.importorskip("openai")
    server = JudgeServer()

    def every_third_fails(request, count):
        return Reply("no idea") if count > 1 and count % 3 == 0 else right(request, count)

    server.respond = every_third_fails
    monkeypatch.chdir(tmp_path)
    (tmp_path / "own_rows.py").write_text(
        "from latent_trl.data.shapes import shape_questions\n\n\ndef rows(split):\n"
        "    some = shape_questions(split).select(range(8))\n    return some.add_column('reference', some['answer'][:])"
        ".add_column('key', [f'q{i}' for i in range(8)])\n"
    )
    options = {"model": "a-judge", "base_url": server.url, "template": "pcogalign", "max_retries": 0, "concurrency": 1}
    words = [checkpoint, "own_rows:rows", "--max-new-tokens", "4", "--output", "out/figures.json"]
    words += ["--judge", json.dumps(options), "--generations", "2", "--perplexity", *LAWS]
    assert main(["evaluate", *words]) == 0
    server.close()
    found = json.loads((tmp_path / "out/figures.json").read_text())
    figures = found["figures"]
    assert found["keys"] == [f"q{i}" for i in range(8)] and [len(group) for group in found["generations"]] == [2] * 8
    ratio = figures["judge/ratio"]
    assert ratio["low"] <= ratio["estimate"] <= ratio["high"]
    assert 0 < figures["judge/not scored"] < 16
    aspects = [
        name for name in figures if name.startswith("judge/") and name not in ("judge/ratio", "judge/not scored")
    ]
    assert len(aspects) == 6 and figures["judge/mind_feelings_awareness"]["count"] == ratio["count"] <= 8
    for law in LAWS:
        assert figures[f"reference_perplexity/{law}"]["estimate"] > 1
    assert figures["answers/empty"] == sum(text == "" for text in found["answers"])
    assert figures["answers/perplexity"]["count"] == 8 - figures["answers/empty"]


def test_the_laws_are_those_of_the_library():
    from latent_trl.evaluation import perplexity

    assert LAWS == perplexity.LAWS


def test_diversity_is_averaged_over_prompts(monkeypatch):
    import torch

    from latent_trl.rewards import embedding

    directions = {"a b c d e": [1.0, 0.0], "f g h i j": [0.0, 1.0]}
    monkeypatch.setattr(
        embedding, "TextEmbedder", lambda name: lambda texts: torch.tensor([directions[text] for text in texts])
    )
    same, other = ["a b c d e"] * 2, ["a b c d e", "f g h i j"]
    figures = diversity([same, other, same, same], "an-encoder")
    estimates = {name: value.estimate for name, value in figures.items()}
    assert estimates["distinct_2"] == pytest.approx((3 * 0.5 + 1) / 4)
    assert estimates["self_bleu"] == pytest.approx(3 / 4)
    assert estimates["different answers a prompt"] == pytest.approx(5 / 4)
    assert estimates["semantic_diversity"] == pytest.approx(1 / (3 / 4))
    assert estimates["vendi_score"] == pytest.approx((3 * 1 + 2) / 4)
    assert figures["semantic_diversity"].low == pytest.approx(1.0) and figures["vendi_score"].count == 4


def test_a_picture_is_swapped_for_a_different_one():
    from PIL import Image as Picture

    pictures = [Picture.new("RGB", (4, 4), colour) for colour in ("red", "red", "blue", "green")]
    images = [[pictures[0]], [pictures[1]], [], [pictures[2]], [pictures[3]]]
    rows = Dataset.from_dict({"prompt": list("abcde"), "images": images}).cast_column("images", List(Image()))
    swapped = swap_images(rows)
    colours = [row["images"][0].getpixel((0, 0)) if row["images"] else None for row in swapped]
    assert colours == [(0, 0, 255), (0, 0, 255), None, (0, 128, 0), (255, 0, 0)]
    assert [row["prompt"] for row in swapped] == list("abcde")
    with pytest.raises(ValueError, match="all rows have the same"):
        swap_images(rows.select([0, 1]))
    with pytest.raises(ValueError, match="needs a data set with `images`"):
        swap_images(rows.select([2]))


def test_what_is_written_is_json_everywhere(tmp_path):
    measured = Measured(["a"], figures={"x": math.nan, "y": [math.inf, 1.5]})
    write_json(measured, tmp_path / "x.json")
    assert json.loads((tmp_path / "x.json").read_text(), parse_constant=pytest.fail)["figures"] == {
        "x": None,
        "y": [None, 1.5],
    }


@pytest.mark.parametrize(
    "words, said",
    [
        (["--embedder", "x"], "give --samples"),
        (["--perplexity", "greedy"], "invalid choice: 'greedy'"),
        (["--samples", "1"], "must be at least 2"),
    ],
)
def test_wrong_flags_are_named(words, said, capsys):
    with pytest.raises(SystemExit):
        main(["evaluate", "a-model", QUESTIONS, *words])
    assert said in capsys.readouterr().err


def test_references_are_looked_for_before_anything_is_answered(capsys):
    words = ["a-model", QUESTIONS, "--limit", "2", "--perplexity", "backbone", "--reference", "gold"]
    assert main(["evaluate", *words]) == 1
    assert "`--reference` must be one of ['prompt', 'images', " in capsys.readouterr().err
