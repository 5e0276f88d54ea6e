"""`latent-trl push`, `inspect` and `pull`, as a user runs them: processes with `HF_ENDPOINT` in the environment."""

import json
import os
import subprocess
import sys

import pytest
import torch
from card_pattern import first_mismatch
from checkpoints import REPO, files_of, make_base, make_model, report
from hub_server import TOKEN

from latent_trl import Codebook
from latent_trl.commands.inspect import main as inspect_command
from latent_trl.commands.main import COMMANDS
from latent_trl.commands.main import main as command_line
from latent_trl.commands.pull import main as pull_command
from latent_trl.commands.push import main as push_command


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    folder = tmp_path_factory.mktemp("saved")
    model = make_model(make_base(folder / "base").model)
    model.config.base_model_name_or_path, model.config.base_model_revision = "ada/tiny-base", "abc123"
    model.training_report = report().to_dict()
    model.save_pretrained(folder / "model")
    return folder / "model"


def run(hub, home, *commands: list[str]) -> subprocess.CompletedProcess:
    """Commands in a fresh process, in which the client reads its endpoint, token and home from the environment."""
    hidden = ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE")
    environment = {k: v for k, v in os.environ.items() if k not in hidden}
    environment |= {"HF_ENDPOINT": hub.url, "HF_HOME": str(home), "HF_TOKEN": TOKEN, "HF_HUB_DISABLE_XET": "1"}
    environment |= {"HF_HUB_DISABLE_TELEMETRY": "1", "COLUMNS": "200"}
    code = "import sys; from latent_trl.commands.main import main; sys.exit(sum(map(main, {!r})))"
    command = [sys.executable, "-c", code.format(commands)]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)


def test_push_inspect_and_pull_in_a_process_of_their_own(hub, saved, tmp_path):
    done = run(
        hub,
        tmp_path / "home",
        ["push", str(saved), REPO, "--private"],
        ["inspect", REPO],
        ["pull", REPO, str(tmp_path / "pulled")],
    )
    assert done.returncode == 0, done.stderr
    sha = hub.repositories[REPO].refs["main"]
    assert done.stdout.startswith(f"{hub.url}/{REPO}/commit/{sha}\n") and hub.repositories[REPO].private
    assert first_mismatch(hub.files(REPO)["README.md"].decode()) is None
    for told in (
        "ada/tiny-base",
        "abc123",
        "16 of width 32",
        "world_model",
        "3 of 16 codes",
        "exact_match",
        "0.75",
        sha,
    ):
        assert told in done.stdout, told
    mine, theirs = files_of(saved), files_of(tmp_path / "pulled")
    assert mine == {name: theirs[name] for name in mine}
    assert TOKEN not in done.stdout + done.stderr
    assert not any(TOKEN.encode() in path.read_bytes() for path in tmp_path.rglob("*") if path.is_file())


def test_errors_are_one_block(hub, saved, monkeypatch, capsys):
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    push_command([str(saved), REPO, "--private"])
    for token, said in ((None, "RepositoryNotFoundError"), ("hf_wrong", "401")):
        monkeypatch.setenv("HF_TOKEN", token) if token else monkeypatch.delenv("HF_TOKEN")
        for words in (["inspect", REPO], ["pull", REPO, "nowhere"], ["push", str(saved), REPO]):
            capsys.readouterr()
            assert command_line(words) == 1
            error = capsys.readouterr().err
            assert ("401" if words[0] == "push" else said) in error and "Traceback" not in error and TOKEN not in error


def test_inspect_reads_no_weights(hub, saved, monkeypatch, capsys):
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    push_command([str(saved), REPO])
    hub.requests.clear()
    capsys.readouterr()

    def refuse(*args, **kwargs):
        raise AssertionError("weights were loaded")

    monkeypatch.setattr("safetensors.torch.load_file", refuse)
    monkeypatch.setattr("latent_trl.checkpoint.files.load_file", refuse)
    assert inspect_command([REPO, "--json"]) == 0
    remote = json.loads(capsys.readouterr().out)
    assert inspect_command([str(saved), "--json"]) == 0
    local = json.loads(capsys.readouterr().out)
    assert remote["components"] == local["components"] and remote["evaluation"] == local["evaluation"]
    assert remote["commit"] == hub.repositories[REPO].refs["main"]
    weights = [headers for line, headers in hub.requests if line.endswith(".safetensors")]
    assert len(weights) == 5 and all(headers["range"] == "bytes=0-100000" for headers in weights)


def test_inspect_names_what_does_not_fit(saved, make_latent, tmp_path, capsys):
    model, _ = make_latent("llama")
    model.training_report = {"codebook": {"counts": [100] + [0] * 15}}
    model.save_pretrained(tmp_path / "model")
    Codebook(8, 32).save_pretrained(tmp_path / "model" / "codebook")
    config = tmp_path / "model" / "latent_action_config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), "components": ["codebook", "value_head"]}))
    assert inspect_command([str(tmp_path / "model")]) == 1
    out = " ".join(capsys.readouterr().out.split())
    for told in ("collapsed", "value_head is named", "policy is not named", "has shape (8, 32)"):
        assert told in out, told


def test_inspect_of_bare_components(tmp_path, capsys):
    Codebook(8, 4).save_pretrained(tmp_path / "codes")
    assert inspect_command([str(tmp_path / "codes"), "--shapes"]) == 0
    assert "weight [8, 4]" in capsys.readouterr().out


def test_push_to_a_branch_and_a_pull_request(hub, saved, monkeypatch, capsys, tmp_path):
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    push_command([str(saved), REPO])
    push_command([str(saved), REPO, "--revision", "trial", "--message", "Try"])
    (saved / "README.md").unlink()
    push_command([str(saved), REPO, "--create-pr", "--license", "mit"])
    assert capsys.readouterr().out.strip().endswith("/discussions/1")
    assert b"license: mit" in hub.files(REPO, "refs/pr/1")["README.md"]
    monkeypatch.chdir(tmp_path)
    pull_command([REPO, "--revision", "refs/pr/1", "--components", "codebook"])
    folder = tmp_path / REPO.split("/")[1]
    assert torch.equal(Codebook.from_pretrained(folder).weight, Codebook.from_pretrained(saved).weight)


@pytest.mark.parametrize("command", ["push", "pull", "inspect"])
def test_help_is_instant(command):
    assert command in COMMANDS
    done = subprocess.run(
        [sys.executable, "-X", "importtime", "-m", "latent_trl", command, "--help"], capture_output=True
    )
    assert done.returncode == 0 and b"usage: latent-trl" in done.stdout
    assert b" torch\n" not in done.stderr and b" transformers\n" not in done.stderr
