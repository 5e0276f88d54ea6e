"""The scripts of MMRole and PCogAlignBench run from one end to the other on small folders, with a judge on loopback."""

import json
import runpy
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from rewards.judge_server import JudgeServer, Reply, right
from task_folders import mmrole_folder, pcogalign_folder

ROOT = Path(__file__).parents[2]
SCRIPTS = ROOT / "examples" / "scripts"
FOLDERS = {"mmrole": mmrole_folder, "pcogalign": pcogalign_folder}
ASPECTS = {"mmrole": 8, "pcogalign": 5}
FEWER = ["--limit=4", "--max_steps=1", "--per_device_train_batch_size=4", "--num_generations=2", "--generations=2"]
FEWER += ["--max_completion_length=6", "--bf16=false", "--use_cpu=true", "--disable_tqdm=true", "--dtype=float32"]
SFT = {"max_steps": 1, "per_device_train_batch_size": 4, "use_cpu": True, "save_strategy": "no", "disable_tqdm": True}


@pytest.fixture(scope="module")
def server():
    pytest.importorskip("openai")
    server = JudgeServer()
    yield server
    server.close()


def run(patch, script: str, words: list[str]) -> None:
    patch.setattr(sys, "argv", [script, *words])
    runpy.run_path(str(SCRIPTS / f"{script}.py"), run_name="__main__")


@pytest.fixture(scope="module", params=FOLDERS)
def task(request, server, checkpoint, tmp_path_factory):
    """The name of a task, and its output folder after all three stages with its own configuration file."""
    name, root = request.param, tmp_path_factory.mktemp(request.param)
    words = words_for(name, root, checkpoint, server)
    with pytest.MonkeyPatch.context() as patch:
        run(patch, name, words)
    return name, root / "out", words


def words_for(name: str, root: Path, checkpoint: str, server: JudgeServer) -> list[str]:
    data = FOLDERS[name](root / "data")
    judge = {"model": "a-judge", "base_url": server.url, "retry_delay": 0.01}
    words = ["--config", str(ROOT / "examples" / "configs" / f"{name}.yaml"), f"--dataset_name={data}", *FEWER]
    words += [f"--model_name_or_path={checkpoint}", f"--output_dir={root / 'out'}", "--processor_kwargs={}"]
    words += [f"--judge_kwargs={json.dumps(judge)}", f"--sft_kwargs={json.dumps(SFT)}"]
    if name == "mmrole":
        words += ["--eval_splits", "test", "ood"]
    else:
        words.append(f"--references={data / 'version_v4'}")
    return words


def test_every_stage_leaves_its_model(task):
    _, out, _ = task
    for stage in ("sft", "rl"):
        assert json.loads((out / stage / "latent_action_config.json").read_text())["stage"] == stage
        assert (out / stage / "adapter").is_dir()


def test_both_distributions_are_judged_with_the_references_perplexity(task):
    name, out, _ = task
    for split in ("test", "ood"):
        found = json.loads((out / "evaluation" / f"{split}.json").read_text())
        report, count = found["judged"]["report"], len(found["judged"]["keys"])
        assert count == {"mmrole": {"test": 2, "ood": 4}, "pcogalign": {"test": 4, "ood": 4}}[name][split]
        assert report["num_judged"] == 2 * count and report["num_unscored"] == 0
        assert len(report["aspects"]) == len(report["aspect_intervals"]) == ASPECTS[name]
        assert sorted(report["samples"]) == sorted(found["judged"]["keys"])
        assert [len(texts) for texts in found["judged"]["generations"]] == [count] * 2
    if name == "mmrole":
        lines = (out / "evaluation" / "report.md").read_text().splitlines()
        assert [line.split(" | ")[:2] for line in lines[2:]] == [["| test", "2"], ["| ood", "4"]]
    for split in ("test", "ood"):
        found = json.loads((out / "evaluation" / f"{split}.json").read_text())
        for of in ("reference_perplexity", "answer_perplexity"):
            assert 1 < found[of]["low"] <= found[of]["estimate"] <= found[of]["high"]


def test_the_judge_saw_pictures_and_the_tasks_aspects(task, server):
    asked = server.requests[-1]["messages"]
    assert [part["type"] for part in asked[1]["content"]] == ["image_url", "text"]
    assert ("tone_consistency" in asked[0]["content"]) == (task[0] == "mmrole")


@pytest.mark.slow
def test_a_stage_can_run_alone(task, tmp_path, monkeypatch, capsys):
    name, out, words = task
    again = [*words, "--stages", "evaluate", f"--model_name_or_path={out / 'rl'}", f"--output_dir={tmp_path}"]
    run(monkeypatch, name, again)
    assert "ood: ratio" in capsys.readouterr().out
    for split in ("test", "ood"):
        first, second = (json.loads((o / "evaluation" / f"{split}.json").read_text()) for o in (out, tmp_path))
        assert first["judged"] == second["judged"]
    assert not (tmp_path / "sft").exists()
    with pytest.raises(ValueError, match="`stages` must be some of"):
        run(monkeypatch, name, [*words, "--stages", "learn"])


@pytest.mark.distributed
def test_two_processes_run_all_stages(server, checkpoint, tmp_path):
    """A stage begins when the files of the one before are whole, and one process evaluates."""
    config = ROOT / "examples" / "accelerate_configs" / "cpu" / "multi_gpu.yaml"
    launch = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", str(config)]
    words = [str(SCRIPTS / "mmrole.py"), *words_for("mmrole", tmp_path, checkpoint, server)]
    ended = subprocess.run([*launch, *words], capture_output=True, text=True, timeout=300)
    assert ended.returncode == 0, ended.stderr[-3000:]
    assert ended.stdout.count("ood: ratio") == 1
    assert json.loads((tmp_path / "out" / "evaluation" / "ood.json").read_text())["judged"]["report"]["num_judged"] == 8


def test_references_are_asked_for_with_the_picture_and_failures_are_left_out(server, tmp_path, monkeypatch, capsys):
    data = pcogalign_folder(tmp_path / "data", references=False)

    def reply(request, count):
        text = request["messages"][0]["content"][-1]["text"]
        return Reply(status=400) if "scene 3" in text else Reply(f"take {text.split('Guard ')[1].split()[0]}")

    server.forget()
    server.respond = reply
    words = ["--model", "m", "--base-url", server.url, "--output", str(tmp_path / "refs"), "--source", str(data)]
    words += ["--limit", "10", "--cache-dir", str(tmp_path / "cache"), "--max-retries", "0"]
    run(monkeypatch, "pcogalign_references", words)
    said = capsys.readouterr().out
    assert "LS1: 1 of 10 without an answer {'http_400': 1}" in said
    assert all(r["messages"][0]["content"][0]["type"] == "image_url" for r in server.requests)
    assert len(server.requests) == 20 and "response_format" not in server.requests[0]
    run(monkeypatch, "pcogalign_references", words)
    assert len(server.requests) == 22
    server.respond = right
    from latent_trl.data.pcogalign import pcogalign

    rows = pcogalign("test", data, tmp_path / "refs")
    assert len(rows) == 2
    for row in rows:
        assert row["reference"] == f"take {row['prompt'][0]['content'].split('Guard ')[1].split()[0]}"


@pytest.mark.parametrize("name", [*FOLDERS, "pcogalign_references"])
def test_a_script_is_short_and_says_how_it_is_launched(name):
    text = (SCRIPTS / f"{name}.py").read_text()
    assert len(text.splitlines()) <= 160
    assert f"examples/scripts/{name}.py" in text.split('"""')[1]
    if name in FOLDERS:
        assert f"accelerate launch examples/scripts/{name}.py --config examples/configs/{name}.yaml" in text
        config = yaml.safe_load((ROOT / "examples" / "configs" / f"{name}.yaml").read_text())
        assert config["beta"] == 0.01 and config["action_top_k"] == 32 and config["num_generations"] == 8
