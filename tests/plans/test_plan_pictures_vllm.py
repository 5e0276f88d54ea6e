"""Plans of the pocket VLM under vLLM: prompts with pictures, and segments behind them."""

import os
import shutil
import threading
from pathlib import Path

import pytest

pytestmark = pytest.mark.vllm
pytest.importorskip("vllm.lora", reason="vLLM is not installed")
os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", "nobind")
os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
import picture_imports  # noqa: E402, F401

pytest.importorskip("torchvision", reason="vLLM reads pictures with torchvision")

import torch  # noqa: E402
from exact import register_classes  # noqa: E402
from PIL import Image, ImageDraw  # noqa: E402
from safetensors.torch import load_file, save_file  # noqa: E402
from transformers import AutoModelForImageTextToText, AutoProcessor  # noqa: E402

from latent_trl import PlanConfig, PlanModel  # noqa: E402
from latent_trl.data.prompts import PromptEncoder  # noqa: E402
from latent_trl.plans.engine_decoder import PlanEngine  # noqa: E402
from latent_trl.plans.lora_engine import engine_of_model  # noqa: E402

POCKET = Path(__file__).parents[2] / "model_cards" / "pocket-vlm"


@pytest.fixture(scope="module")
def pocket(tmp_path_factory):
    """A model of plans, and an engine of it; vLLM 0.30 has other names for the tensors of the vision tower."""
    register_classes("LlavaForConditionalGeneration", "LlamaForCausalLM")
    folder = tmp_path_factory.mktemp("pocket") / "backbone"
    shutil.copytree(POCKET, folder)
    (weights,) = folder.glob("*.safetensors")
    tensors = load_file(weights)
    renamed = {name.replace("vision_tower.", "vision_tower.vision_model."): value for name, value in tensors.items()}
    save_file(renamed, weights, metadata={"format": "pt"})
    model = PlanModel(
        AutoModelForImageTextToText.from_pretrained(POCKET, dtype="float32"), PlanConfig(num_plans=4, init_std=0.5)
    )
    model.plan_config.base_model_name_or_path = str(folder)
    encoder = PromptEncoder(AutoProcessor.from_pretrained(POCKET, padding_side="left"))
    options = {"dtype": "float32", "max_model_len": 256, "kv_cache_memory_bytes": 64 << 20, "enforce_eager": True}
    engine = PlanEngine(model, encoder, engine_of_model(model, encoder, slots=4, **options))
    yield model, engine
    engine.close()


def rows():
    found = []
    for i, colour in enumerate(("red", "blue", "green", None)):
        row: dict = {"prompt": [{"role": "user", "content": f"what color is shape {i}?"}], "images": []}
        if colour:
            row["images"].append(Image.new("RGB", (64, 64), "white"))
            ImageDraw.Draw(row["images"][0]).ellipse((8, 8, 56, 56), fill=colour)
        found.append(row)
    return found


@pytest.mark.parametrize("segment", ["answer", 3])
def test_answers_about_pictures_are_those_of_the_model(pocket, segment, monkeypatch):
    model, engine = pocket
    monkeypatch.setattr(model.plan_config, "segment", segment)
    prompts = [prompt for prompt in map(engine.encoder, rows()) for _ in range(4)]
    plans = torch.randint(4, (len(prompts), 8), generator=torch.Generator().manual_seed(0))
    plans[:, 0] = torch.arange(4).repeat(4)

    def choose(places, answers, inputs):
        return torch.stack([plans[i, len(one.plans)] for i, one in zip(places, answers, strict=True)])

    own, found = (model.speak(engine.encoder, prompts, choose, 16, [1], engine=one) for one in (None, engine))
    assert own == found and len({tuple(one.token_ids) for one in own}) > 4


def test_pictures_reach_a_server(pocket, tmp_path):
    pytest.importorskip("uvicorn", reason="servers need it")
    from latent_trl.plans.plan_servers import PlanServers, identity_of_plans, policy_of_plans
    from latent_trl.serving.rollout_engine import RolloutEngine
    from latent_trl.serving.server import make_rollout_server

    model, engine = pocket
    model.save_pretrained(tmp_path)
    source, ready, urls = engine.source, threading.Event(), []
    identity = identity_of_plans(tmp_path) | {"slots": source.slots, "max_model_len": source.longest}

    def note(url):
        urls.append(url)
        ready.set()

    served = RolloutEngine(source, policy_of_plans(model.plans.tensors).data, source.slots)
    server = make_rollout_server(served, identity, port=0, ready=note)
    thread = threading.Thread(target=server.run)
    thread.start()
    assert ready.wait(60)
    try:
        over = PlanEngine(model, engine.encoder, PlanServers(model, urls, 60.0, None, 4))
        prompts = [prompt for prompt in map(engine.encoder, rows()) for _ in range(4)]
        plans = list(range(4)) * 4
        own, found = (model.answers(engine.encoder, prompts, plans, 12, [1], engine=one) for one in (None, over))
        assert own.token_ids == found.token_ids and len({tuple(ids) for ids in own.token_ids}) > 4
    finally:
        server.should_exit = True
        thread.join(60)
