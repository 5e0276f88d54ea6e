"""`evaluate` and `generate` with `--engine vllm`: the answers that there are without it."""

import json

import pytest
import tiny_models
from exact import SIZES, register_classes

from latent_trl import LatentActionModel
from latent_trl.commands.main import main

PROMPTS = ["what color is it?", "how many are there?", "yes or no?", "a red square and a blue circle"]


def letters(completions, **_):
    return [float(sum(len(turn["content"]) for turn in answer)) for answer in completions]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tiny")
    backbone = tiny_models.causal("Llama", **tiny_models.text_fields(**SIZES)).model
    backbone.save_pretrained(folder / "backbone")
    tiny_models.make_tokenizer().save_pretrained(folder / "backbone")
    backbone = type(backbone).from_pretrained(folder / "backbone", dtype="float32")
    model = LatentActionModel.from_backbone(backbone, tiny_models.latent_config())
    tiny_models.perturb(model, std=0.3)
    model.config.stage = "policy"
    model.save_pretrained(folder / "model")
    rows = [{"prompt": [{"role": "user", "content": text}], "reference": "red"} for text in PROMPTS]
    (folder / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return folder


@pytest.fixture(scope="module")
def shared(folder):
    from latent_trl.vllm.engine import LatentActionEngine

    register_classes("LlamaForCausalLM")
    made = LatentActionEngine(str(folder / "model"), max_model_len=128, kv_cache_memory_bytes=64 << 20)
    yield made
    made.close()


@pytest.fixture
def engines(monkeypatch, shared):
    """What engines are started with; the module's one answers for all of them."""
    started = []

    def make(model, **options):
        started.append((model, options))
        return shared

    monkeypatch.setattr("latent_trl.vllm.engine.LatentActionEngine", make)
    return started


def evaluated(folder, *words):
    model, rows, output = (str(folder / name) for name in ("model", "rows.jsonl", "found.json"))
    options = ["--split", "train", "--reward-funcs", f"{__name__}:letters", "--max-new-tokens", "12"]
    assert main(["evaluate", model, rows, *options, "--code-ceiling", "2", "--output", output, *words]) == 0
    return json.loads((folder / "found.json").read_text())


def test_evaluate_finds_the_same(folder, engines):
    own = evaluated(folder, "--perplexity", "most_likely")
    assert not engines
    found = evaluated(folder, "--perplexity", "most_likely", "--engine", "vllm", "--engine-options", '{"seed": 1}')
    ((_, options),) = engines
    assert options == {"max_num_seqs": 64, "seed": 1}
    for name in ("answers", "action_ids", "figures"):
        assert found[name] == own[name]


def test_evaluate_samples_by_the_same_law(folder, engines):
    words = ("--samples", "16", "--temperature", "0.7")
    own, found = evaluated(folder, *words), evaluated(folder, *words, "--engine", "vllm")
    assert len(found["samples"]) == len(PROMPTS) and {len(group) for group in found["samples"]} == {16}
    name = "reward/letters, mean of samples"
    (a, b) = (one["figures"][name] for one in (own, found))
    assert max(a["low"], b["low"]) < min(a["high"], b["high"])
    again = evaluated(folder, *words, "--engine", "vllm")
    assert again["samples"] == found["samples"]


def said(capsys, folder, *words):
    assert main(["generate", str(folder / "model"), "--prompt", PROMPTS[0], "--max-new-tokens", "12", *words]) == 0
    return [json.loads(line) for line in capsys.readouterr().out.splitlines() if line.startswith("{")]


def test_generate_answers_the_same(folder, engines, capsys):
    words = ("--greedy", "--json", "--force", "3,-1,2", "--ban", "0,1", "--bias", "5=1.5", "-n", "2")
    own, found = said(capsys, folder, *words), said(capsys, folder, *words, "--engine", "vllm")
    assert len(engines) == 1 and [one["tokens"] for one in own] == [one["tokens"] for one in found]
    assert [one["action_ids"] for one in own] == [one["action_ids"] for one in found]
    assert [one["log_prob"] for one in found] == pytest.approx([one["log_prob"] for one in own], abs=1e-3)


def test_generate_searches_the_best_of_some(folder, engines, capsys):
    words = ("--best-of", "8", "--reward-funcs", f"{__name__}:letters", "--json", "--engine", "vllm")
    (best,) = said(capsys, folder, *words)
    assert best["reward"] == len(best["text"]) and len(engines) == 1


@pytest.mark.parametrize(
    "words, named",
    [
        (("--engine-options", "{}"), "--engine vllm"),
        (("--engine", "vllm", "--backbone", "other"), "--backbone"),
        (("--engine", "vllm", "--engine-options", '{"tensor_parallel_size": 2}'), "tensor_parallel_size"),
    ],
)
def test_what_does_not_go_together_is_refused(folder, capsys, words, named):
    assert main(["generate", str(folder / "model"), "--prompt", "hi", *words]) == 1
    assert named in capsys.readouterr().err


def test_a_tree_needs_the_model_itself(folder, capsys):
    words = ["--tree", "4", "--reward-funcs", "length", "--engine", "vllm"]
    with pytest.raises(SystemExit):
        main(["generate", str(folder / "model"), "--prompt", "hi", *words])
    assert "--tree reads the states" in capsys.readouterr().err
