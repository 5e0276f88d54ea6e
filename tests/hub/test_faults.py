"""A Hub that fails: errors that say what happened, retries where they help, and never a mixture or a token."""

import json
import logging
import time
import traceback

import pytest
import torch
from checkpoints import REPO, files_of, make_base, make_model
from hub_server import OTHER_TOKEN, TOKEN, Fault
from huggingface_hub import constants
from huggingface_hub.errors import EntryNotFoundError, HfHubHTTPError, RepositoryNotFoundError

from latent_trl import CheckpointError, Codebook, LatentActionModel
from latent_trl.hub.pull import inspect, pull_folder
from latent_trl.hub.push import push_folder


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("base")
    return make_model(make_base(folder).model)


@pytest.fixture
def pushed(hub, model):
    model.push_to_hub(REPO, token=TOKEN)
    hub.requests.clear()
    return model


def test_404_names_the_repository(hub):
    for look in (Codebook.from_pretrained, LatentActionModel.from_pretrained, inspect):
        with pytest.raises(RepositoryNotFoundError, match="nobody/nothing"):
            look("nobody/nothing", token=TOKEN)


def test_401_is_said(hub):
    with pytest.raises(HfHubHTTPError, match="401"):
        Codebook.from_pretrained("nobody/nothing", token="hf_wrong")


def test_429_waits_as_long_as_it_is_told(hub, pushed):
    hub.faults.append(Fault("GET .*codebook/model.safetensors", 429, {"Retry-After": "1"}))
    start = time.monotonic()
    assert torch.equal(Codebook.from_pretrained(REPO).weight, pushed.codebook.weight)
    assert time.monotonic() - start >= 1
    assert len(hub.lines("GET .*codebook/model.safetensors")) == 2


def test_500_then_success(hub, pushed):
    hub.faults.append(Fault("GET .*codebook/model.safetensors", 500))
    assert torch.equal(Codebook.from_pretrained(REPO).weight, pushed.codebook.weight)


def test_500_while_uploading(hub, model):
    hub.faults.append(Fault("PUT /lfs/", 500))
    model.push_to_hub(REPO, token=TOKEN)
    assert torch.equal(Codebook.from_pretrained(REPO).weight, model.codebook.weight)


def test_a_commit_that_fails_changes_nothing(hub, pushed):
    before, refs = dict(hub.files(REPO)), dict(hub.repositories[REPO].refs)
    hub.faults.append(Fault("POST .*/commit/", 500, times=20))
    changed = Codebook(16, 32)
    with pytest.raises(HfHubHTTPError, match="500"):
        changed.push_to_hub(REPO, token=TOKEN)
    assert hub.files(REPO) == before and hub.repositories[REPO].refs == refs


def test_a_connection_cut_in_mid_download_goes_on_where_it_was(hub, pushed, monkeypatch):
    monkeypatch.setattr(constants, "DOWNLOAD_CHUNK_SIZE", 1024)
    hub.faults.append(Fault("GET .*policy/model.safetensors", 0))
    loaded = LatentActionModel.from_pretrained(REPO, backbone=pushed.backbone)
    assert all(torch.equal(t, pushed.policy.state_dict()[k]) for k, t in loaded.policy.state_dict().items())
    ranges = [headers.get("range") for line, headers in hub.requests if "GET" in line and "policy/model" in line]
    assert len(ranges) == 2 and ranges[1].startswith("bytes=") and not ranges[1].startswith("bytes=0-")


def test_a_connection_that_keeps_breaking_leaves_the_folder_as_it_was(hub, pushed, tmp_path):
    pull_folder(REPO, tmp_path / "model", components=["codebook"])
    before = files_of(tmp_path / "model")
    with torch.no_grad():
        pushed.codebook.weight.add_(1.0)
    pushed.push_to_hub(REPO, token=TOKEN)
    hub.faults.append(Fault("(GET|HEAD) .*model.safetensors", 404, {"X-Error-Code": "EntryNotFound"}, times=1000))
    with pytest.raises(EntryNotFoundError):
        pull_folder(REPO, tmp_path / "model")
    assert files_of(tmp_path / "model") == before
    assert [path.name for path in tmp_path.iterdir() if path.name not in ("model", "cache")] == []


def test_a_commit_is_refused_before_anything_is_sent(hub, model, tmp_path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(CheckpointError, match="nothing to publish"):
        push_folder(tmp_path / "empty", REPO, token=TOKEN)
    model.save_pretrained(tmp_path / "broken")
    weights = tmp_path / "broken" / "policy" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-8])
    with pytest.raises(CheckpointError, match="safetensors"):
        push_folder(tmp_path / "broken", REPO, token=TOKEN)
    assert not hub.requests


def test_a_file_that_holds_a_token_is_not_published(hub, model, tmp_path):
    model.save_pretrained(tmp_path / "model")
    config = tmp_path / "model" / "codebook" / "config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), "note": TOKEN}))
    with pytest.raises(CheckpointError, match="looks like a Hugging Face token") as error:
        push_folder(tmp_path / "model", REPO, token=TOKEN)
    assert TOKEN not in str(error.value) and not hub.requests


def test_a_link_is_not_published(hub, model, tmp_path):
    model.save_pretrained(tmp_path / "model")
    (tmp_path / "private.json").write_text("{}")
    (tmp_path / "model" / "tokenizer_config.json").symlink_to(tmp_path / "private.json")
    with pytest.raises(CheckpointError, match="is a link"):
        push_folder(tmp_path / "model", REPO, token=TOKEN)


def test_what_lies_beside_a_checkpoint_is_not_published(hub, model, tmp_path):
    model.save_pretrained(tmp_path / "model")
    for name in (
        "optimizer.pt",
        "training_args.bin",
        "training_args.json",
        ".env",
        "checkpoint-1/codebook/config.json",
    ):
        path = tmp_path / "model" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"private")
    push_folder(tmp_path / "model", REPO, token=TOKEN)
    assert b"private" not in hub.files(REPO).values()


@pytest.mark.parametrize("bad", [TOKEN + "\n", "hf_ü" + TOKEN, TOKEN + " x", "\r" + TOKEN], ids=range(4))
def test_a_token_that_http_cannot_carry_is_not_quoted(hub, model, bad):
    for call in (
        lambda: Codebook.from_pretrained(REPO, token=bad),
        lambda: LatentActionModel.from_pretrained(REPO, token=bad),
        lambda: inspect(REPO, token=bad),
        lambda: pull_folder(REPO, "nowhere", token=bad),
        lambda: model.push_to_hub(REPO, token=bad),
        lambda: model.codebook.push_to_hub(REPO, token=bad),
    ):
        with pytest.raises(ValueError, match="`token` has characters") as error:
            call()
        assert TOKEN not in "".join(traceback.format_exception(error.value))
    assert not hub.requests


def test_tokens_reach_no_error_log_file_or_output(hub, model, tmp_path, caplog, capfd, monkeypatch):
    caplog.set_level(logging.DEBUG)
    model.push_to_hub(REPO, token=TOKEN, private=True)
    model.codebook.push_to_hub(REPO, token=TOKEN, revision="other")
    pull_folder(REPO, tmp_path / "model", token=TOKEN)
    loaded = LatentActionModel.from_pretrained(REPO, backbone=model.backbone, token=TOKEN)
    loaded.save_pretrained(tmp_path / "saved")
    errors = []
    faults = [Fault("POST .*/commit/", status) for status in (400, 403, 500)] + [
        Fault("GET .*/api/models", 400, times=9)
    ]
    for fault in faults:
        hub.faults[:] = [fault]
        for call in (
            lambda: Codebook(16, 32).push_to_hub(REPO, token=TOKEN),
            lambda: Codebook.from_pretrained(REPO, token=TOKEN, cache_dir=tmp_path / "none", revision="nowhere"),
            lambda: Codebook.from_pretrained(REPO, token=OTHER_TOKEN, cache_dir=tmp_path / "none"),
        ):
            try:
                call()
            except Exception as error:
                errors.append("".join(traceback.format_exception(error)))
    hub.faults.clear()
    assert len(errors) >= 8
    written = b"".join(p.read_bytes() for p in tmp_path.rglob("*") if p.is_file())
    written += b"".join(content for sha in hub.repositories[REPO].commits.values() for content in sha.values())
    said = "".join(errors) + caplog.text + "".join(capfd.readouterr())
    for token in (TOKEN, OTHER_TOKEN):
        assert token not in said and token.encode() not in written
