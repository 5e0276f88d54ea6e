"""The training commands train, save, and say what is wrong."""

import json
from pathlib import Path

import pytest

from latent_trl.commands import loading
from latent_trl.commands.main import main
from latent_trl.commands.rows import load_rows

POCKET = Path(__file__).parents[2] / "model_cards" / "pocket-vlm"
SHAPES = "latent_trl.data.shapes"
COMMON = ["--save_strategy", "no", "--use_cpu", "true", "--disable_tqdm", "true", "--dataset_limit", "24"]
DECODER = '{"num_hidden_layers": 1}'


def trained_components(folder) -> set[str]:
    return set(json.loads((Path(folder) / "latent_action_config.json").read_text())["components"])


def test_learn_starts_from_a_backbone(tmp_path):
    words = ["--model_name_or_path", str(POCKET), "--dataset_name", f"{SHAPES}:shape_pairs"]
    words += ["--dataset_train_split", "base", "--text_dataset_name", f"{SHAPES}:chitchat", "--num_codes", "8"]
    words += ["--policy_decoder", DECODER, "--inverse_dynamics_decoder", DECODER, "--output_dir", str(tmp_path / "o")]
    for stage in ("inverse_dynamics", "projector", "joint", "policy"):
        words += [f"--{stage}_max_steps", "1"]
    assert main(["learn", *words, *COMMON, "--per_device_train_batch_size", "4"]) == 0
    record = json.loads((tmp_path / "o" / "latent_action_config.json").read_text())
    assert record["stage"] == "policy" and record["num_codes"] == 8
    assert record["base_model_name_or_path"] == str(POCKET)


@pytest.mark.parametrize("algorithm", ["grpo", "ppo"])
def test_rl_runs_from_a_configuration_file(algorithm, checkpoint, tmp_path):
    path = tmp_path / "run.yaml"
    path.write_text(
        f"model_name_or_path: {checkpoint}\ndataset_name: {SHAPES}:shape_questions\ndataset_train_split: rl\n"
        f"reward_funcs: [exact_match, length]\nreward_kwargs: {{length: {{target: 5}}}}\n"
        "max_steps: 1\nper_device_train_batch_size: 8\nnum_generations: 4\nmax_completion_length: 4\n"
    )
    assert main([algorithm, "--config", str(path), "--output_dir", str(tmp_path / "o"), *COMMON]) == 0
    assert ("value_head" in trained_components(tmp_path / "o")) == (algorithm == "ppo")


def test_rl_holds_the_policy_on_an_anchor_data_set(checkpoint, tmp_path):
    words = ["grpo", "--model_name_or_path", checkpoint, "--dataset_name", f"{SHAPES}:shape_questions"]
    words += ["--dataset_train_split", "rl", "--reward_funcs", "exact_match", "--max_steps", "1"]
    words += ["--per_device_train_batch_size", "4", "--num_generations", "4", "--max_completion_length", "4"]
    words += ["--anchor_dataset_name", f"{SHAPES}:chitchat"]
    assert main([*words, *COMMON, "--anchor_coef", "0.1", "--output_dir", str(tmp_path / "o")]) == 0
    assert main([*words, *COMMON, "--output_dir", str(tmp_path / "other")]) == 1


def test_sft_saves_an_adapter(checkpoint, tmp_path):
    words = ["--model_name_or_path", checkpoint, "--dataset_name", f"{SHAPES}:shape_pairs", "--lora_r", "4"]
    words += ["--dataset_train_split", "base", "--use_peft", "--output_dir", str(tmp_path / "o"), "--max_steps", "1"]
    assert main(["sft", *words, *COMMON, "--per_device_train_batch_size", "4"]) == 0
    adapter = json.loads((tmp_path / "o" / "adapter" / "adapter_config.json").read_text())
    assert adapter["r"] == 4


def test_distill_gives_a_plain_model_and_says_what_is_kept(checkpoint, tmp_path, capsys):
    words = ["distill", checkpoint, f"{SHAPES}:shape_questions", "--output", str(tmp_path / "o"), "--merge_adapter"]
    words += ["--dataset_train_split", "rl", "--max_steps", "1", "--per_device_train_batch_size", "4"]
    words += ["--max_completion_length", "4", "--reward_funcs", "exact_match"]
    assert main([*words, *COMMON]) == 0
    assert "What is kept" in capsys.readouterr().out
    kept = json.loads((tmp_path / "o" / "what_is_kept.json").read_text())
    assert list(kept) == ["latent policy", "plain model", "backbone before"]
    assert all(0 <= figures["reward/exact_match"] <= 1 for figures in kept.values())
    assert (tmp_path / "o" / "config.json").is_file() and (tmp_path / "o" / "chat_template.jinja").is_file()
    assert not (tmp_path / "o" / "latent_action_config.json").exists()


def test_distill_takes_model_and_data_without_options():
    from latent_trl.commands.distill import with_options

    named = ["--model_name_or_path", "a", "--dataset_name", "b"]
    assert with_options(["a", "b", "--output", "c"]) == [*named, "--output_dir", "c"]
    assert with_options(["a", "--dataset_name=b", "--output=c"]) == [*named[:2], "--dataset_name=b", "--output_dir=c"]
    assert with_options(["--config", "run.yaml"]) == ["--config", "run.yaml"]


def test_an_error_is_one_block_unless_debug(checkpoint, capsys):
    words = ["grpo", "--model_name_or_path", checkpoint, "--dataset_name", "none.json", "--reward_funcs", "exact_match"]
    assert main(words) == 1
    said = capsys.readouterr().err
    assert "latent-trl grpo: FileNotFoundError: There is no data file 'none.json'." in said
    assert "Traceback" not in said
    with pytest.raises(FileNotFoundError):
        main([*words, "--debug"])


def test_data_sets_of_every_kind_load(tmp_path):
    from datasets import Dataset, DatasetDict

    rows = Dataset.from_list([{"prompt": [{"role": "user", "content": str(n)}]} for n in range(3)])
    rows.to_json(tmp_path / "rows.jsonl")
    rows.save_to_disk(tmp_path / "one")
    DatasetDict(train=rows, test=rows.select([0])).save_to_disk(tmp_path / "both")
    (tmp_path / "files").mkdir()
    rows.to_parquet(tmp_path / "files" / "train.parquet")
    for name in ("rows.jsonl", "one", "both", "files"):
        assert len(load_rows(str(tmp_path / name))) == 3, name
    assert len(load_rows(str(tmp_path / "both"), "test")) == 1
    assert len(load_rows(str(tmp_path / "one"), limit=2)) == 2
    with pytest.raises(ValueError, match=r"has the splits \['test', 'train'\], not 'dev'"):
        load_rows(str(tmp_path / "both"), "dev")


def test_rewards_are_found_by_name_and_by_import(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "my_rewards.py").write_text("def short(completions, **kwargs):\n    return [0.0] * len(completions)\n")
    exact, short, length = loading.load_rewards(
        ["exact_match", "my_rewards:short", "length"], {"length": {"target": 3}}
    )
    assert exact.__name__ == "exact_match" and short(completions=["a"]) == [0.0] and length.target == 3
    assert loading.load_rewards(["org/reward-model"]) == ["org/reward-model"]
    for names, options, said in (
        (["nothing"], None, "No reward 'nothing': give `module:attribute`, or one of"),
        ([], None, "`reward_funcs` is empty"),
        (["length"], None, "'length' needs other options"),
        (["exact_match"], {"length": {}}, "which are not among"),
        (["my_rewards:long"], None, "has no 'long'; it has"),
        (["no_such_module:x"], None, "No module named 'no_such_module'"),
        (["my_rewards:short"], {"my_rewards:short": {"a": 1}}, "is not a class"),
    ):
        with pytest.raises(ValueError, match=said):
            loading.load_rewards(names, options)
