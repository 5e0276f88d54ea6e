"""A Hub on loopback for the tests of this folder."""

import huggingface_hub
import pytest
from hub_server import OTHER_TOKEN, OWNER, TOKEN, HubServer
from huggingface_hub import constants


@pytest.fixture
def hub(monkeypatch, tmp_path):
    """A Hub of its own for each test, and the client set up as `HF_ENDPOINT` and `HF_HOME` do it before import."""
    with HubServer({TOKEN: OWNER, OTHER_TOKEN: "bob"}) as server:
        monkeypatch.setattr(constants, "ENDPOINT", server.url)
        monkeypatch.setattr(
            constants, "HUGGINGFACE_CO_URL_TEMPLATE", server.url + "/{repo_id}/resolve/{revision}/{filename}"
        )
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_TELEMETRY", True)
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
        monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "no-token"))
        monkeypatch.setattr(constants, "HF_STORED_TOKENS_PATH", str(tmp_path / "no-tokens"))
        monkeypatch.setattr("transformers.utils.hub._hf_api", None)
        monkeypatch.setattr(huggingface_hub.hf_api.api, "endpoint", server.url)
        for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN"):
            monkeypatch.delenv(name, raising=False)
        yield server
