"""The pocket VLM, its adapter merged: prompts with pictures and without, through the projector where there are none."""

import threading
from pathlib import Path

import numpy as np
import pytest
from datasets import Dataset
from exact import measured, register_classes, same_rows, start
from PIL import Image
from transformers import AutoProcessor

from latent_trl import LatentActionGRPOConfig, LatentActionGRPOTrainer, LatentActionModel

CARDS = Path(__file__).parents[2] / "model_cards"
END = 1

pytest.importorskip("torchvision", reason="vLLM reads pictures with torchvision")


@pytest.fixture(scope="module")
def chats():
    """Requests, every fourth without a picture, and what the processor makes of them."""
    processor = AutoProcessor.from_pretrained(CARDS / "pocket-vlm")
    random = np.random.default_rng(0)
    requests, inputs = [], []
    for i in range(16):
        image = Image.fromarray(random.integers(0, 255, (64, 64, 3), dtype=np.uint8)) if i % 4 else None
        content = [{"type": "image"}] * (image is not None) + [{"type": "text", "text": f"What is in picture {i}?"}]
        text = processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)
        requests.append({"prompt": text} | ({} if image is None else {"multi_modal_data": {"image": [image]}}))
        inputs.append(processor(text=[text], images=None if image is None else [image], return_tensors="pt"))
    return requests, inputs


def test_pictures_and_text_in_one_batch(chats, monkeypatch, tmp_path):
    monkeypatch.chdir(CARDS.parent)
    monkeypatch.setattr("latent_trl.vllm.folders.HF_HOME", tmp_path)
    requests, inputs = chats
    folder = "model_cards/pocket-vlm-latent-actions-grpo"
    model = LatentActionModel.from_pretrained(folder)
    pixels = [one.get("pixel_values") for one in inputs]
    # Prompts in parts: a picture may be in an earlier part than the text that has seen it.
    engine = start(folder, max_model_len=256, max_num_batched_tokens=32, max_num_seqs=32)
    try:
        settings = {"max_new_tokens": 24, "stop_token_ids": [END]}
        answers = engine.generate(requests, action_do_sample=False, **settings)
        drawn = engine.generate(requests, n=4, seed=1, action_sampling="arithmetic", **settings)
    finally:
        engine.close()
    assert [answer.prompt_ids for answer in answers] == [one["input_ids"][0].tolist() for one in inputs]
    found = measured(model, answers, pixel_values=pixels)
    assert found.log_prob < 1e-3 and found.token < 1e-3 and found.code < 1e-3, found
    assert same_rows(model, answers, ends=[END], pixel_values=pixels) >= 0.99
    found = measured(model, drawn, pixel_values=[value for value in pixels for _ in range(4)])
    assert found.log_prob < 1e-3 and found.token < 1e-3, found


def run(folder, **options) -> LatentActionGRPOTrainer:
    """GRPO on questions, one of them without a picture."""
    random = np.random.default_rng(1)
    rows = []
    for i in range(4):
        row: dict = {"prompt": [{"role": "user", "content": f"what color is shape {i}?"}], "images": []}
        if i:
            row["images"].append(Image.fromarray(random.integers(0, 255, (64, 64, 3), dtype=np.uint8)))
        rows.append(row)
    args = LatentActionGRPOConfig(
        str(folder / "run"),
        use_vllm=True,
        max_steps=2,
        per_device_train_batch_size=8,
        num_generations=2,
        max_completion_length=6,
        logging_steps=1,
        use_cpu=True,
        bf16=False,
        save_strategy="no",
        **options,
    )
    model = LatentActionModel.from_pretrained("model_cards/pocket-vlm-latent-actions")
    return LatentActionGRPOTrainer(
        model, lambda completions, **_: [float(len(str(c))) for c in completions], args, Dataset.from_list(rows[::-1])
    )


def differences(trainer: LatentActionGRPOTrainer) -> list[float]:
    return [log["sampling/log_prob_difference_max"] for log in trainer.state.log_history if "loss" in log]


def test_rollouts_of_questions_about_pictures(monkeypatch, tmp_path):
    """Prompts reach the engine as the trainer's own tokens, a picture as its placeholder."""
    monkeypatch.chdir(CARDS.parent)
    register_classes("LlavaForConditionalGeneration", "LlamaForCausalLM")
    trainer = run(tmp_path, vllm_max_model_length=128)
    try:
        trainer.train()
    finally:
        trainer.engine_source.engine.close()
    assert len(differences(trainer)) == 2 and max(differences(trainer)) < 1e-3


def test_pictures_reach_a_rollout_server(monkeypatch, tmp_path):
    """The same, over HTTP; the server's backbone has the checkpoint's adapter merged, and the trainer's has it on."""
    from latent_trl.models.policy import LatentActionPolicy
    from latent_trl.serving.rollout_engine import RolloutEngine
    from latent_trl.serving.server import make_rollout_server
    from latent_trl.vllm.identity import identity_of_checkpoint
    from latent_trl.vllm.wire import PolicyFile

    monkeypatch.chdir(CARDS.parent)
    monkeypatch.setattr("latent_trl.vllm.folders.HF_HOME", tmp_path)
    folder = "model_cards/pocket-vlm-latent-actions"
    engine = start(folder, max_model_len=128, max_num_seqs=32, kv_cache_memory_bytes=64 << 20)
    policy = PolicyFile.of(LatentActionPolicy.from_pretrained(folder, subfolder="policy"))
    ready, addresses = threading.Event(), []

    def note(url):
        addresses.append(url)
        ready.set()

    served = RolloutEngine(engine, policy.data)
    server = make_rollout_server(served, identity_of_checkpoint(folder), port=0, ready=note)
    thread = threading.Thread(target=server.run)
    thread.start()
    try:
        assert ready.wait(60)
        trainer = run(tmp_path, vllm_mode="server", vllm_server_base_url=addresses[0])
        trainer.train()
    finally:
        server.should_exit = True
        thread.join(60)
        engine.close()
    assert len(differences(trainer)) == 2 and max(differences(trainer)) < 1e-3
    assert served.version == trainer.engine_source.engine.version != policy.version
