"""Tiny models that every folder of tests shares; each is built in memory, once a session."""

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import pytest
import torch
from hypothesis import settings

torch.set_num_threads(1)
# The same cases each time; `--hypothesis-profile=thousands` draws others.
settings.register_profile("repeatable", derandomize=True, deadline=None)
settings.load_profile("repeatable")


def pytest_collection_modifyitems(config, items):
    if "soak" not in config.getoption("-m"):
        for item in items:
            if item.get_closest_marker("soak"):
                item.add_marker(pytest.mark.skip(reason="half an hour: `pytest -m soak`"))


@pytest.fixture(scope="session")
def tiny_tokenizer():
    from tiny_models import make_tokenizer

    return make_tokenizer()


@pytest.fixture(scope="session")
def tiny_llava():
    """A tiny stock LLaVA with its processor, a batch of 0, 1 and 2 images, and a batch of text. Do not change it."""
    from tiny_models import llava

    return llava()


@pytest.fixture(scope="session")
def tiny_llama():
    """A tiny Llama with its tokenizer and a left-padded batch. Do not change it."""
    from tiny_models import llama

    return llama()


@pytest.fixture(scope="session")
def tiny_qwen2_5_vl():
    """A tiny Qwen2.5-VL with an image-only processor. Do not change it."""
    from tiny_models import qwen2_5_vl

    return qwen2_5_vl()


@pytest.fixture
def make_tiny():
    """`make_tiny(family, **text_config)`: a tiny model of its own, free to be changed. See `tiny_models.FAMILIES`."""
    from tiny_models import FAMILIES

    return lambda family, **options: FAMILIES[family](**options)


@pytest.fixture
def make_latent():
    """`make_latent(family, config)`: a latent action model on a tiny backbone of its own, and its example inputs."""
    from tiny_models import latent

    return latent
