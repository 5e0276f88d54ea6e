"""Pushed and pulled over HTTP: the same bits, the same codes, the same words."""

import json
import re
from pathlib import Path

import pytest
import torch
from checkpoints import BASE, REPO, files_of, make_base, make_model, report, serve
from hub_server import OTHER_TOKEN, OWNER, TOKEN
from huggingface_hub import HfApi
from huggingface_hub.errors import (
    HfHubHTTPError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from transformers import AutoModelForImageTextToText, PreTrainedConfig

from latent_trl import CheckpointError, Codebook, CrossModalProjector, LatentActionModel, LatentActionPolicy
from latent_trl.hub.pull import pull_folder
from latent_trl.hub.push import push_folder

OPTIONS = {"max_new_tokens": 8, "action_do_sample": False, "return_dict_in_generate": True}


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    folder = tmp_path_factory.mktemp("base")
    return folder, make_base(folder)


@pytest.fixture
def pushed(hub, base):
    """A model whose backbone came from the Hub, and which is there itself."""
    repository = serve(hub, BASE, files_of(base[0]))
    backbone = AutoModelForImageTextToText.from_pretrained(BASE)
    model = make_model(backbone)
    assert model.config.base_model_revision == repository.refs["main"]
    commit = model.push_to_hub(REPO, token=TOKEN, commit_message="Learn to speak")
    assert commit.oid == hub.repositories[REPO].refs["main"]
    return model


def test_round_trip_through_a_fresh_cache(hub, base, pushed, tmp_path):
    pushed.training_report = report().to_dict()
    pushed.push_to_hub(REPO, token=TOKEN)
    loaded = LatentActionModel.from_pretrained(REPO, cache_dir=tmp_path / "fresh")
    want, got = pushed.state_dict(), loaded.state_dict()
    assert want.keys() == got.keys()
    assert all(torch.equal(want[name], got[name]) and want[name].dtype == got[name].dtype for name in want)
    for inputs in (base[1].inputs, base[1].text_inputs):
        before, after = pushed.generate(**inputs, **OPTIONS), loaded.generate(**inputs, **OPTIONS)
        assert torch.equal(before.sequences, after.sequences)
        assert torch.equal(before.action_ids, after.action_ids)
        assert torch.equal(before.action_log_probs, after.action_log_probs)
    assert loaded.training_report == pushed.training_report


def test_the_named_base_model_is_loaded_as_asked_for(hub, base, pushed):
    loaded = LatentActionModel.from_pretrained(REPO, dtype=torch.bfloat16, device_map="cpu")
    assert loaded.backbone.dtype == torch.bfloat16 and loaded.device.type == "cpu"
    assert torch.equal(loaded.policy.head.weight, pushed.policy.head.weight)
    assert loaded.generate(**base[1].text_inputs, **OPTIONS).action_ids.shape[1] <= 8


def test_a_push_is_one_commit_of_the_checkpoint_format(hub, pushed):
    assert hub.repositories[REPO].messages == ["initial commit", "Learn to speak"]
    kinds = {name.rsplit(".", 1)[-1] for name in hub.files(REPO)}
    assert kinds == {"gitattributes", "json", "safetensors", "md"}
    assert "codebook/model.safetensors" in hub.files(REPO) and "README.md" in hub.files(REPO)


def test_what_is_cached_needs_no_hub(hub, pushed, tmp_path):
    LatentActionModel.from_pretrained(REPO)
    hub.requests.clear()
    LatentActionModel.from_pretrained(REPO, local_files_only=True)
    assert not hub.requests
    with pytest.raises(LocalEntryNotFoundError):
        LatentActionModel.from_pretrained(REPO, local_files_only=True, cache_dir=tmp_path / "empty")


def test_components_load_alone_and_fetch_nothing_else(hub, pushed, tmp_path):
    for name, kind in (("codebook", Codebook), ("projector", CrossModalProjector), ("policy", LatentActionPolicy)):
        hub.requests.clear()
        loaded = kind.from_pretrained(REPO, cache_dir=tmp_path / name)
        assert all(torch.equal(t, getattr(pushed, name).state_dict()[k]) for k, t in loaded.state_dict().items())
        assert all(f"/{name}/" in line for line in hub.lines("GET .*/resolve/"))


def test_a_repository_of_codebook_and_projectors(hub, base, pushed):
    pushed.push_to_hub("ada/codes", components=["codebook", "projector"], token=TOKEN)
    folders = {name.split("/")[0] for name in hub.files("ada/codes") if "/" in name}
    assert folders == {"codebook", "projector"}
    loaded = LatentActionModel.from_pretrained("ada/codes", backbone=base[1].model)
    assert loaded.policy is None and loaded.world_model is None and loaded.inverse_dynamics is None
    assert torch.equal(loaded.codebook.weight, pushed.codebook.weight)
    with pytest.raises(ValueError, match="no policy"):
        loaded.generate(**base[1].text_inputs)


def test_parts_that_are_no_longer_there_go_and_other_files_stay(hub, pushed):
    hub.repositories[REPO].commit("main", {**hub.files(REPO), "notes.txt": b"mine"}, "a note")
    pushed.push_to_hub(REPO, components=["codebook"], token=TOKEN)
    folders = {name.split("/")[0] for name in hub.files(REPO) if "/" in name}
    assert folders == {"codebook"} and hub.files(REPO)["notes.txt"] == b"mine"


def test_one_component_is_pushed_beside_the_others(hub, pushed):
    codebook = Codebook(16, 32)
    before = dict(hub.files(REPO))
    codebook.push_to_hub(REPO, token=TOKEN)
    changed = {name for name, content in hub.files(REPO).items() if before.get(name) != content}
    assert changed == {"codebook/model.safetensors"} and before.keys() == hub.files(REPO).keys()
    codebook.push_to_hub("ada/only-codes", token=TOKEN)
    assert torch.equal(Codebook.from_pretrained("ada/only-codes").weight, codebook.weight)
    with pytest.raises(CheckpointError, match="latent_action_config.json is missing"):
        LatentActionModel.from_pretrained("ada/only-codes")


def test_a_card_that_someone_wrote_stays(hub, pushed):
    mine = b"---\nlibrary_name: latent-trl\n---\n\n# Mine\n"
    hub.repositories[REPO].commit("main", {**hub.files(REPO), "README.md": mine}, "edit the card")
    pushed.push_to_hub(REPO, token=TOKEN)
    assert hub.files(REPO)["README.md"] == mine
    pushed.push_to_hub(REPO, token=TOKEN, license="apache-2.0")
    assert b"license: apache-2.0" in hub.files(REPO)["README.md"]


def test_revisions_branches_and_pull_requests(hub, base, pushed):
    first, unshifted = hub.repositories[REPO].refs["main"], pushed.codebook.weight.detach().clone()
    with torch.no_grad():
        pushed.codebook.weight.add_(1.0)
    pushed.push_to_hub(REPO, token=TOKEN, revision="shifted")
    pull_request = pushed.push_to_hub(REPO, token=TOKEN, create_pr=True)
    assert pull_request.pr_url.endswith("/discussions/1") and pull_request.pr_num == 1
    shifted = pushed.codebook.weight
    for revision in ("shifted", "refs/pr/1", hub.repositories[REPO].refs["shifted"]):
        assert torch.equal(Codebook.from_pretrained(REPO, revision=revision).weight, shifted)
    for revision in (None, "main", first):
        assert torch.equal(Codebook.from_pretrained(REPO, revision=revision).weight, unshifted)
    with pytest.raises(RevisionNotFoundError):
        Codebook.from_pretrained(REPO, revision="nowhere")


def test_private_repositories_open_to_the_right_token_alone(hub, base, pushed, monkeypatch):
    pushed.push_to_hub("ada/secret", private=True, token=TOKEN)
    assert hub.repositories["ada/secret"].private
    assert Codebook.from_pretrained("ada/secret", token=TOKEN, cache_dir=base[0] / "a").num_codes == 16
    for token in (None, False, OTHER_TOKEN, "hf_wrong"):
        with pytest.raises((RepositoryNotFoundError, HfHubHTTPError)):
            Codebook.from_pretrained("ada/secret", token=token, cache_dir=base[0] / "b")
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    assert Codebook.from_pretrained("ada/secret", cache_dir=base[0] / "c").num_codes == 16


def test_only_the_owner_pushes(hub, pushed):
    before = dict(hub.repositories[REPO].refs)
    for token in (OTHER_TOKEN, "hf_wrong", False):
        with pytest.raises(HfHubHTTPError):
            pushed.push_to_hub(REPO, token=token)
    assert hub.repositories[REPO].refs == before


def test_a_name_alone_belongs_to_the_tokens_user(hub, pushed):
    pushed.push_to_hub("short", token=TOKEN)
    assert f"{OWNER}/short" in hub.repositories


def test_pull_puts_real_files_in_place_in_one_step(hub, pushed, tmp_path):
    folder = tmp_path / "here"
    folder.mkdir()
    (folder / "notes.txt").write_text("mine")
    sha = pull_folder(REPO, folder)
    assert sha == hub.repositories[REPO].refs["main"]
    there = {k: v for k, v in hub.files(REPO).items() if k != ".gitattributes"}
    assert files_of(folder) == {**there, "notes.txt": b"mine"}
    assert not any(path.is_symlink() for path in folder.rglob("*"))
    push_folder(folder, "ada/again", token=TOKEN)
    assert {k: v for k, v in hub.files("ada/again").items() if k != ".gitattributes"} == there


def test_pull_of_some_components(hub, pushed, tmp_path):
    pull_folder(REPO, tmp_path / "some", components=["codebook", "policy"])
    assert sorted(path.name for path in (tmp_path / "some").iterdir()) == ["codebook", "policy"]
    assert LatentActionPolicy.from_pretrained(tmp_path / "some").num_codes == 16
    with pytest.raises(ValueError, match="value_head"):
        pull_folder(REPO, tmp_path / "none", components=["value_head"])
    assert not (tmp_path / "none").exists()


def test_the_list_of_a_pushed_repository(hub, pushed):
    files = HfApi().list_repo_files(REPO)
    assert {"latent_action_config.json", "policy/config.json", "policy/model.safetensors"} <= set(files)


def test_the_code_of_the_format_page_runs(hub, base, pushed, monkeypatch):
    page = (Path(__file__).parents[2] / "docs" / "checkpoint_format.md").read_text(encoding="utf-8")
    (code,) = re.findall(r"```python\n(.*?)```", page, flags=re.DOTALL)
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    names = {"model": pushed, "LatentActionModel": LatentActionModel, "Codebook": Codebook}
    exec(compile(code, "checkpoint_format.md", "exec"), names)
    assert set(hub.repositories) == {BASE, REPO, "ada/tiny-codes"}
    assert {"main", "trial"} <= set(hub.repositories[REPO].refs)


def test_the_format_page_names_every_field_of_the_record(pushed, tmp_path):
    page = (Path(__file__).parents[2] / "docs" / "checkpoint_format.md").read_text(encoding="utf-8")
    pushed.save_pretrained(tmp_path)
    record = json.loads((tmp_path / "latent_action_config.json").read_text())
    own = set(record) - set(PreTrainedConfig().to_dict())
    assert [name for name in sorted(own) if f"`{name}`" not in page] == []
    assert record["layer_shapes"]["codebook"] == {"weight": [16, 32]}
    assert record["code_width"] == record["hidden_size"] == 32
