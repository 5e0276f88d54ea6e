"""A repository that means harm: nothing in it is executed, nothing leaves its folder, each gets a clear error."""

import json
import pickle
import shutil
import struct

import pytest
from checkpoints import make_base, make_model, report, serve
from huggingface_hub.errors import HfHubHTTPError

from latent_trl import CheckpointError, LatentActionModel
from latent_trl.checkpoint import files
from latent_trl.commands.inspect import main as inspect_command
from latent_trl.hub.card import write_card
from latent_trl.hub.pull import inspect, pull_folder

EVIL = "mallory/gift"


class Bomb:
    """Unpickling it leaves a canary."""

    def __init__(self, canary):
        self.canary = str(canary)

    def __reduce__(self):
        return (open, (self.canary, "w"))


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return make_base(tmp_path_factory.mktemp("base")).model


@pytest.fixture
def good(base, tmp_path):
    """The files of a sound checkpoint."""
    folder = tmp_path / "sound"
    make_model(base).save_pretrained(folder)
    files = {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    shutil.rmtree(folder)
    return files


@pytest.fixture
def canary(tmp_path):
    return tmp_path / "canary"


def edited(content: bytes, **values) -> bytes:
    return json.dumps({**json.loads(content), **values}).encode()


def attempts(base, folder):
    return (
        lambda: LatentActionModel.from_pretrained(EVIL, backbone=base),
        lambda: pull_folder(EVIL, folder),
        lambda: inspect(EVIL),
    )


def test_a_pickle_in_place_of_safetensors(hub, base, good, tmp_path, canary):
    bomb = pickle.dumps(Bomb(canary))
    serve(hub, EVIL, {**good, "policy/model.safetensors": bomb})
    for attempt in attempts(base, tmp_path / "pulled"):
        with pytest.raises(CheckpointError, match="safetensors"):
            attempt()
    assert not canary.exists() and not (tmp_path / "pulled").exists()


def test_pickles_and_code_beside_the_checkpoint_are_not_even_fetched(hub, base, good, tmp_path, canary):
    bomb, code = pickle.dumps(Bomb(canary)), f"open({str(canary)!r}, 'w')".encode()
    extra = {
        "training_args.bin": bomb,
        "optimizer.pt": bomb,
        "adapter_model.bin": bomb,
        "policy/pytorch_model.bin": bomb,
    }
    extra |= {"modeling_evil.py": code, "setup.py": code, "policy/__init__.py": code, "conftest.py": code}
    config = edited(good["latent_action_config.json"], auto_map={"AutoModel": "modeling_evil.Evil"})
    policy = json.loads(good["policy/config.json"])
    policy["text_config"] |= {"auto_map": {"AutoModel": "modeling_evil.Evil"}, "_attn_implementation": "mallory/kernel"}
    files = {**good, **extra, "latent_action_config.json": config, "policy/config.json": json.dumps(policy).encode()}
    serve(hub, EVIL, files)
    loaded, pulled, _ = (attempt() for attempt in attempts(base, tmp_path / "pulled"))
    assert loaded.policy is not None and pulled
    assert not canary.exists()
    assert not [line for line in hub.lines("resolve") if line.endswith((".bin", ".pt", ".py"))]
    assert not hub.lines("mallory/kernel")
    assert not {path.suffix for path in (tmp_path / "pulled").rglob("*") if path.is_file()} - {".json", ".safetensors"}


def test_a_base_model_with_code_or_a_pickle_is_refused(hub, good, base, canary):
    """The checkpoint names its base model, so that one is no more to be trusted."""
    code = f"open({str(canary)!r}, 'w')".encode()
    config = {"model_type": "evil", "auto_map": {"AutoConfig": "configuration_evil.C", "AutoModelForCausalLM": "m.M"}}
    serve(
        hub, "mallory/base", {"config.json": json.dumps(config).encode(), "configuration_evil.py": code, "m.py": code}
    )
    named = edited(good["latent_action_config.json"], base_model_name_or_path="mallory/base")
    serve(hub, EVIL, {**good, "latent_action_config.json": named})
    with pytest.raises(ValueError, match="trust_remote_code|custom code"):
        LatentActionModel.from_pretrained(EVIL)
    pickled = {"config.json": base.config.to_json_string().encode(), "pytorch_model.bin": pickle.dumps(Bomb(canary))}
    serve(hub, "mallory/base", pickled)
    with pytest.raises(OSError):
        LatentActionModel.from_pretrained(EVIL)
    assert not canary.exists()


@pytest.mark.parametrize("name", ["../../canary.json", "codebook/../../../canary.safetensors", "/canary.json"])
def test_paths_that_climb_out(hub, base, good, tmp_path, name):
    cache = tmp_path / "cache"
    serve(hub, EVIL, {**good, name: b"{}"})
    for attempt in attempts(base, tmp_path / "deep" / "er" / "pulled"):
        try:
            attempt()
        except (CheckpointError, ValueError, OSError):
            pass
    inside = [path for path in tmp_path.rglob("*canary*")]
    assert not inside and cache.exists()


def test_component_names_that_climb_out(hub, base, good):
    for name in ("../outside", "/etc", "adapter", "latent_action_config.json", 3):
        config = edited(good["latent_action_config.json"], components=["codebook", name])
        serve(hub, EVIL, {**good, "latent_action_config.json": config})
        with pytest.raises(CheckpointError, match="components"):
            LatentActionModel.from_pretrained(EVIL, backbone=base)


def test_links_in_a_folder_are_not_followed_out(base, good, tmp_path):
    folder = tmp_path / "linked"
    for name, content in good.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)
    outside = tmp_path / "outside.safetensors"
    outside.write_bytes(good["codebook/model.safetensors"])
    (folder / "codebook" / "model.safetensors").unlink()
    (folder / "codebook" / "model.safetensors").symlink_to(outside)
    for attempt in (lambda: LatentActionModel.from_pretrained(folder, backbone=base), lambda: inspect(folder)):
        with pytest.raises(CheckpointError, match="is a link that leads outside"):
            attempt()


def test_json_that_is_huge_deep_or_not_json(hub, base, good, tmp_path, monkeypatch):
    monkeypatch.setattr(files, "MAX_JSON_BYTES", 100_000)
    monkeypatch.setattr("latent_trl.hub.pull.MAX_JSON_BYTES", 100_000)
    huge = edited(good["latent_action_config.json"], note="x" * 200_000)
    for bad, said in (
        (huge, "larger than|no JSON of a checkpoint is that large"),
        (b"[" * 90_000, "is not JSON"),
        (b"\xff\xfe", "is not JSON"),
        (b"[1]", "must hold a JSON object"),
        (b"", "is not JSON"),
    ):
        serve(hub, EVIL, {**good, "latent_action_config.json": bad})
        for attempt in attempts(base, tmp_path / "pulled"):
            with pytest.raises(CheckpointError, match=said):
                attempt()
    assert not (tmp_path / "pulled").exists()


def test_headers_that_lie_about_sizes(hub, base, good, tmp_path):
    header = json.dumps({"weight": {"dtype": "F32", "shape": [1 << 40, 1 << 20], "data_offsets": [0, 4]}}).encode()
    for lie in (struct.pack("<Q", 1 << 62) + b"{}", struct.pack("<Q", len(header)) + header + b"0000", b"short"):
        serve(hub, EVIL, {**good, "codebook/model.safetensors": lie})
        for attempt in attempts(base, tmp_path / "pulled")[:2]:
            with pytest.raises(CheckpointError, match="safetensors"):
                attempt()
        try:
            assert inspect(EVIL).problems
        except (CheckpointError, HfHubHTTPError):
            pass


def test_sizes_in_the_configuration_take_no_memory(hub, base, good):
    config = edited(good["codebook/config.json"], num_codes=1 << 40, hidden_size=1 << 20)
    serve(hub, EVIL, {**good, "codebook/config.json": config})
    with pytest.raises(CheckpointError):
        LatentActionModel.from_pretrained(EVIL, backbone=base)


def test_a_repository_that_is_none(hub, base, tmp_path):
    serve(hub, EVIL, {"README.md": b"# Trust me", "weights.json": b"{}"})
    with pytest.raises(CheckpointError, match="latent_action_config.json is missing"):
        LatentActionModel.from_pretrained(EVIL, backbone=base)
    for attempt in attempts(base, tmp_path / "pulled")[1:]:
        with pytest.raises(CheckpointError, match="not a checkpoint"):
            attempt()


def test_a_report_cannot_write_to_the_terminal_or_the_page(good, tmp_path, capsys):
    folder = tmp_path / "model"
    for name, content in good.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)
    told = report()
    told.evaluation[0].dataset = "[red]x[/red]\x1b[2J\x1b]0;owned\x07"
    told.runs[0].method = "<script>alert(1)</script>\n\n# Trust me"
    told.codebook.codes[0]["tokens"] = [["`|<img src=x>", 1]]
    told.codebook.codes[0]["examples"] = ["<script>alert(2)</script> | [x](javascript:1)"]
    told.write(folder)
    inspect_command([str(folder)])
    out = capsys.readouterr().out
    assert "\x1b]0;" not in out and "\x1b[2J" not in out and "\x07" not in out and "[red]" in out
    card = write_card(folder).read_text()
    assert "<script>" not in card and "\n# Trust me" not in card and "[x](javascript" not in card.replace("\\[", "")
