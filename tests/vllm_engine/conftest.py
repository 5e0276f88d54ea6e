"""Tests of `latent_trl.vllm`, skipped where vLLM is not installed. A folder called `vllm` would be imported for it."""

import os
from importlib.util import find_spec
from pathlib import Path

import pytest

HERE = Path(__file__).parent

# One process, which tests can look into; small caches; no thread is bound to a core.
os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", "nobind")
os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")

if find_spec("vllm") is None:
    collect_ignore_glob = ["*"]
else:
    import picture_imports  # noqa: F401


def pytest_collection_modifyitems(items):
    for item in items:
        if HERE in item.path.parents:
            item.add_marker(pytest.mark.vllm)


@pytest.fixture
def engine():
    """Starts engines for a test, and ends them."""
    from exact import start

    made = []

    def make(model, **options):
        made.append(start(model, **options))
        return made[-1]

    yield make
    for one in made:
        one.close()
