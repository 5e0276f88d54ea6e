"""One rule for data: the same file for every command, pictures by path, faults named before a model is loaded."""

import json

import pytest
from PIL import Image

from latent_trl.commands import loading
from latent_trl.commands.main import main
from latent_trl.commands.rows import as_prompts, check_exists, check_reward_columns, load_rows
from latent_trl.data.reading import OpenedRows

FILE = "rows.jsonl"


def talk(question: str, answer: str) -> list[dict]:
    return [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]


@pytest.fixture
def here(tmp_path, monkeypatch):
    """A folder with pictures and a file whose rows every command takes."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "pictures").mkdir()
    for name in ("red", "blue"):
        Image.new("RGB", (64, 64), name).save(tmp_path / "pictures" / f"{name}.png")
    write(
        [{"messages": talk("what color is it?", n), "images": [f"{n}.png"], "answer": n} for n in ("red", "blue")] * 4
    )
    return tmp_path


def write(rows: list) -> None:
    with open(FILE, "w", encoding="utf-8") as file:
        file.writelines((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows)


def test_one_file_has_conversations_and_prompts(here):
    conversations, prompts = load_rows(FILE, purpose="conversations"), load_rows(FILE, purpose="prompts")
    assert conversations[0]["messages"] == talk("what color is it?", "red")
    assert prompts[0]["prompt"] == talk("what color is it?", "red")[:1]
    assert (prompts[1]["reference"], prompts[1]["answer"]) == ("blue", "blue")
    assert prompts[1]["images"] == conversations[1]["images"] == ["blue.png"]


def test_pictures_by_path_are_read_from_one_folder_only(here):
    rows = load_rows(FILE, purpose="prompts")
    assert OpenedRows(rows, "pictures")[1]["images"][0].getpixel((0, 0)) == (0, 0, 255)
    assert OpenedRows(rows, "pictures")["images"][0][0].getpixel((0, 0)) == (255, 0, 0)
    with pytest.raises(ValueError, match="no `image_root` says"):
        OpenedRows(rows)[0]


@pytest.mark.parametrize("column", [{"image": "red.png"}, {"images": "red.png"}, {"images": ["red.png"]}])
def test_a_prompt_that_is_text_becomes_a_message_beside_a_picture(here, column):
    write([{"prompt": "what?", "completion": "red", "answer": "red", **column}])
    for purpose in ("conversations", "prompts"):
        row = load_rows(FILE, purpose=purpose)[0]
        assert row["prompt"] == [{"role": "user", "content": "what?"}] and row["images"] == ["red.png"]
        assert "image" not in row
    write([{"prompt": "what?", "completion": "red"}])
    assert load_rows(FILE, purpose="prompts")[0]["prompt"] == "what?"


def test_a_picture_of_the_data_set_stays_a_picture(here):
    from datasets import Dataset

    picture = Image.new("RGB", (8, 8), "red")
    rows = Dataset.from_list([{"prompt": talk("what?", "red")[:1], "image": picture}])
    assert as_prompts(rows, "rows")[0]["images"][0].getpixel((0, 0)) == (255, 0, 0)


def test_the_packages_own_data_have_names():
    pytest.importorskip("easy_vqa")
    pytest.importorskip("chitchat_dataset")
    assert load_rows("shapes", limit=2, purpose="conversations").column_names == ["messages", "images"]
    train, test = (load_rows("shapes", split, limit=6, purpose="prompts") for split in ("train", "test"))
    assert {"prompt", "images", "answer"} <= set(train.column_names) and train[0] != test[0]
    assert load_rows("chitchat", limit=2, purpose="conversations").column_names == ["messages"]
    with pytest.raises(ValueError, match=r"must be one of \('base', 'rl', 'test'\), got 'dev'"):
        load_rows("shapes", "dev", purpose="prompts")


@pytest.mark.parametrize(
    "rows, purpose, said",
    [
        ([{"question": "a"}], "prompts", r"has the columns \['question'\]; it needs `prompt`, or `messages`"),
        ([{"question": "a"}], "conversations", r"has the columns \['question'\]; it needs `messages`, or `prompt`"),
        ([{"messages": talk("a", "b")[:1]}], "prompts", "end with the user's turn"),
        (['{"prompt": "a"}', '{"prompt": "b"'], "prompts", "line 2, is not JSON"),
        (["[1]"], "prompts", r"line 1, must hold an object with columns, got \[1\]"),
        ([], "prompts", "no rows"),
    ],
)
def test_rows_that_cannot_be_used_are_named(here, rows, purpose, said):
    write(rows)
    with pytest.raises(ValueError, match=said):
        load_rows(FILE, purpose=purpose)


def test_a_file_of_another_kind_and_no_rows_at_all(here):
    (here / "rows.txt").write_text("hello")
    with pytest.raises(ValueError, match="no data file that can be read. Works: .json, .jsonl"):
        load_rows("rows.txt")
    with pytest.raises(ValueError, match="`dataset_limit` must be at least 1, got 0"):
        load_rows(FILE, limit=0)


def test_a_reward_without_its_column_is_named(here):
    (reward,) = loading.load_rewards(["exact_match"])
    rows = load_rows(FILE, purpose="prompts")
    check_reward_columns([reward, "org/model"], rows, FILE)
    with pytest.raises(ValueError, match=r"'exact_match' reads the columns \['answer'\]; 'rows.jsonl' has"):
        check_reward_columns([reward], rows.remove_columns("answer"), FILE)


@pytest.fixture
def no_hub(monkeypatch):
    """The Hub must not be asked."""
    import huggingface_hub

    def asked(*args, **kwargs):
        raise AssertionError("the Hub was asked")

    for name in ("hf_hub_download", "snapshot_download"):
        monkeypatch.setattr(huggingface_hub, name, asked)
    monkeypatch.setattr("latent_trl.checkpoint.download.snapshot_download", asked)


@pytest.mark.parametrize(
    "words",
    [
        ["sft", "--model_name_or_path", "outputs/spcae", "--dataset_name", FILE],
        ["grpo", "--model_name_or_path", "./space", "--dataset_name", FILE, "--reward_funcs", "exact_match"],
        ["learn", "--model_name_or_path", "outputs/a/b", "--dataset_name", FILE],
        ["chat", "outputs/spcae"],
        ["generate", "outputs/spcae", "--prompt", "hi"],
        ["evaluate", "outputs/spcae", FILE],
        ["atlas", "outputs/spcae", FILE],
        ["inspect", "outputs/spcae"],
    ],
)
def test_a_folder_that_is_not_there_is_named_before_the_hub_is_asked(here, no_hub, words, capsys):
    (here / "outputs" / "space").mkdir(parents=True)
    words += ["--image_root", "pictures"] if words[0] in ("evaluate", "atlas") else []
    assert main(words) == 1
    said = capsys.readouterr().err
    assert "FileNotFoundError: There is no" in said and "the Hub" not in said.replace("asking the Hub", "")
    if "outputs/spcae" in words:
        assert "holds ['space']" in said


def test_a_name_that_may_be_of_the_hub_is_asked_for_with_a_word(here, capsys):
    check_exists("org/model", "model")
    assert "There is no folder 'org/model' here; asking the Hub." in capsys.readouterr().err


def test_what_is_no_latent_action_model_is_named(here, no_hub, checkpoint, capsys):
    backbone, runs = here / "backbone", here / "runs"
    for folder in (backbone, runs / "checkpoint-5", here / "empty"):
        folder.mkdir(parents=True)
    (backbone / "config.json").write_text("{}")
    (runs / "checkpoint-5" / "latent_action_config.json").write_text("{}")
    for folder, said in (
        ("backbone", "is a backbone without latent actions. `latent-trl learn` makes latent actions"),
        ("empty", "'empty' is no model"),
        ("runs", "holds the models ['checkpoint-5']: name one of them"),
    ):
        assert main(["chat", folder]) == 1
        assert said in capsys.readouterr().err


def test_a_checkpoint_whose_backbone_is_elsewhere_says_so(here, no_hub, capsys):
    folder = here / "model"
    folder.mkdir()
    (folder / "latent_action_config.json").write_text('{"base_model_name_or_path": "cards/some/backbone"}')
    assert main(["chat", "model"]) == 1
    said = capsys.readouterr().err
    assert "There is no backbone 'cards/some/backbone'" in said and "pass `--backbone`" in said


def test_evaluate_and_atlas_read_pictures_by_path(here, checkpoint):
    pytest.importorskip("jinja2")
    common = [checkpoint, FILE, "--image_root", "pictures", "--max_new_tokens", "3"]
    words = [*common, "--reward_funcs", "exact_match", "--image-ablation", "--output", "figures.json"]
    assert main(["evaluate", *words]) == 0
    assert json.loads((here / "figures.json").read_text())["figures"]["reward/exact_match"]["count"] == 8
    assert main(["atlas", *common, "--forced-prompts", "1", "--output", "atlas.html"]) == 0


STEP = ["--max_steps", "1", "--save_strategy", "no", "--use_cpu", "true", "--disable_tqdm", "true"]


def test_sft_reads_pictures_by_path(here, checkpoint):
    words = ["--model_name_or_path", checkpoint, "--dataset_name", FILE, "--image-root", "pictures", "--use_peft"]
    assert main(["sft", *words, *STEP, "--per_device_train_batch_size", "4", "--output_dir", "o"]) == 0


@pytest.mark.parametrize("algorithm", ["grpo", "rloo", "ppo"])
def test_rl_reads_pictures_by_path(here, checkpoint, algorithm):
    words = ["--model_name_or_path", checkpoint, "--dataset_name", FILE, "--image_root", "pictures"]
    words += ["--reward_funcs", "exact_match", "--num_generations", "2", "--max_completion_length", "3"]
    assert main([algorithm, *words, *STEP, "--per_device_train_batch_size", "4", "--output_dir", "o"]) == 0
