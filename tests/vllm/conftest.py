"""Tests of the engine, skipped where vLLM is not installed."""

import gc
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


def pytest_collection_modifyitems(items):
    for item in items:
        if HERE in item.path.parents:
            item.add_marker(pytest.mark.vllm)


@pytest.fixture
def engine():
    """Makes engines, and takes their memory back."""
    from exact import register_classes

    from latent_trl.vllm.engine import LatentActionEngine

    made = []

    def make(model, **options):
        if isinstance(model, str):
            sizes = {}
        else:
            sizes = {"skip_tokenizer_init": True, "max_model_len": 128, "kv_cache_memory_bytes": 64 << 20}
        shared = {"dtype": "float32", "enforce_eager": True, "max_num_seqs": 64, **sizes}
        if not isinstance(model, str):
            register_classes(type(model.backbone).__name__, "LlamaForCausalLM")
        made.append(LatentActionEngine(model, **{**shared, **options}))
        return made[-1]

    yield make
    for one in made:
        one.close()
    made.clear()
    gc.collect()
