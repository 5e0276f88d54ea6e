"""Two trainer processes and two rollout servers, one killed and brought back. No vLLM is needed: a model's own passes
stand in its place."""

from importlib.util import find_spec

import pytest
import tiny_models
from served_launch import TESTS, ServerProcess, kill_and_bring_back, worst_difference

from latent_trl import LatentActionModel

pytestmark = [
    pytest.mark.distributed,
    pytest.mark.skipif(find_spec("uvicorn") is None or find_spec("starlette") is None, reason="needs a server"),
]


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """A saved model, whose backbone lies beside it."""
    folder = tmp_path_factory.mktemp("served")
    backbone = tiny_models.llama().model
    backbone.save_pretrained(folder / "backbone")
    tiny_models.make_tokenizer().save_pretrained(folder / "backbone")
    backbone = type(backbone).from_pretrained(folder / "backbone", dtype="float32")
    model = LatentActionModel.from_backbone(backbone, tiny_models.latent_config(use_projector=False))
    tiny_models.perturb(model)
    model.save_pretrained(folder / "model")
    return str(folder / "model")


@pytest.fixture
def servers(model):
    started = [ServerProcess([str(TESTS / "serving" / "stand_in_engine.py"), model]) for _ in range(2)]
    try:
        yield [server.wait() for server in started]
    finally:
        for server in started:
            server.kill()


def test_two_trainers_and_two_servers_of_which_one_is_killed(model, servers, tmp_path):
    runs = kill_and_bring_back(model, tmp_path, servers, 300)
    whole, killed = runs["whole"][0], runs["killed"][0]
    assert worst_difference(whole, killed) == 0
    for ranks in runs.values():
        assert worst_difference(*ranks) == 0
    assert whole["servers"] == [2.0] * 4
    assert killed["servers"][0] == killed["servers"][-1] == 2.0
    start = LatentActionModel.from_pretrained(model)
    moved = {name: p.detach() for name, p in start.named_parameters()}
    assert worst_difference({"weights": moved}, whole) > 1e-3
