"""A server on loopback, in a thread, with the trained pocket VLM behind it."""

from contextlib import contextmanager
from importlib.util import find_spec

import pytest
from loopback import CARDS, serving

if any(
    find_spec(name) is None for name in ("starlette", "uvicorn", "pydantic", "prometheus_client", "openai", "httpx")
):
    collect_ignore_glob = ["test_*.py"]


@pytest.fixture(scope="session")
def pocket():
    """The trained model and its processor. Do not change it."""
    from latent_trl.commands.loading import load_model, load_processor

    backbone = str(CARDS / "pocket-vlm")
    model = load_model(str(CARDS / "pocket-vlm-latent-actions-grpo"), backbone).to("cpu").eval()
    return model, load_processor(model, backbone)


@pytest.fixture
def serve(pocket):
    """`serve(change=..., **options)`: a context with a server's address; `change` is called with its engine."""
    from latent_trl.serving.transformers_engine import TransformersEngine

    @contextmanager
    def start(change=None, engine_options=None, **options):
        engine = TransformersEngine(*pocket, **(engine_options or {}))
        if change is not None:
            change(engine)
        with serving(engine, **options) as url:
            yield url

    return start


@pytest.fixture(scope="session")
def url(pocket):
    from latent_trl.serving.transformers_engine import TransformersEngine

    with serving(TransformersEngine(*pocket)) as address:
        yield address


@pytest.fixture(scope="session")
def client(url):
    from openai import OpenAI

    return OpenAI(base_url=url, api_key="none", max_retries=0, timeout=60)


@pytest.fixture
def alone(pocket):
    """`alone(text, picture, **generate)`: what the model's own `generate` answers to one message."""
    from latent_trl.data.prompts import encode_prompts
    from latent_trl.generation.answers import end_tokens, generated_answers

    model, processor = pocket

    def answer(text, picture=None, **options):
        row = {"prompt": [{"role": "user", "content": text}], "images": [] if picture is None else [picture]}
        inputs = encode_prompts(processor, [row])
        ends = end_tokens(model, processor.tokenizer, {})
        output = model.generate(**inputs, eos_token_id=ends, return_dict_in_generate=True, **options)
        return generated_answers(output, inputs["input_ids"].shape[1], processor.tokenizer, ends)

    return answer


@pytest.fixture(scope="module")
def rollout_model(tmp_path_factory):
    """The folder of a tiny model, whose rollouts are served."""
    from stand_in_engine import make_model

    folder = tmp_path_factory.mktemp("model")
    make_model().save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def three(rollout_model):
    from stand_in_engine import make_model, served

    with served(make_model, rollout_model, 3) as started:
        yield started


@pytest.fixture
def running(three):
    """Three rollout servers, all of them there."""
    for server in three:
        if server.server is None:
            server.start()
        server.engine.before_step = lambda: None
        server.engine.answered.clear()
    return three


@pytest.fixture
def no_waiting(monkeypatch):
    """Lost rollout servers are tried again at once."""
    monkeypatch.setattr("latent_trl.vllm.servers.RETRY_SECONDS", 0.05)


@pytest.fixture
def warnings(monkeypatch):
    """What is said of rollout servers."""
    found = []
    monkeypatch.setattr("latent_trl.vllm.servers.logger.warning", found.append)
    return found
