"""Tokenizers in Python, of transformers' slow kind: what is learned, drawn and shown is as with fast ones."""

import pytest
from datasets import Dataset
from tiny_models import latent, latent_config
from transformers import ByT5Tokenizer

from latent_trl import (
    LatentActionGRPOConfig,
    LatentActionGRPOTrainer,
    LatentActionSFTConfig,
    LatentActionSFTTrainer,
)
from latent_trl.data.collator import LatentActionDataCollator
from latent_trl.data.prompts import encode_prompts
from latent_trl.evaluation.answers import answer
from latent_trl.evaluation.atlas import make_atlas
from latent_trl.evaluation.perplexity import text_perplexity

TEMPLATE = (
    "{% for m in messages %}{{ m['role'] + ': ' + m['content'] }}{{ eos_token if m['role'] == 'assistant' else '\n' }}"
    "{% endfor %}{% if add_generation_prompt %}assistant: {% endif %}"
)
ROWS = [
    {
        "prompt": [{"role": "user", "content": f"hé {i} 漢"}],
        "completion": [{"role": "assistant", "content": "ja ü"}],
        "reference": "ja",
    }
    for i in range(8)
]
OPTIONS = {"use_cpu": True, "bf16": False, "max_steps": 2, "save_strategy": "no", "disable_tqdm": True}


@pytest.fixture
def tokenizer():
    made = ByT5Tokenizer(extra_ids=0, padding_side="left")
    made.chat_template = TEMPLATE
    assert not made.is_fast
    return made


def model():
    return latent("llama", latent_config(use_projector=False, stage="policy"), vocab_size=259)[0]


def test_the_tokens_are_those_of_the_text(tokenizer):
    for row in (ROWS[0], {"prompt": "hé", "completion": "ja ü"}):
        batch = LatentActionDataCollator(tokenizer)([row])
        ids = batch["input_ids"][0]
        assert tokenizer.decode(ids[batch["loss_mask"][0]]) == "ja ü</s>"
        prompt = encode_prompts(tokenizer, [row])["input_ids"][0]
        assert ids[: len(prompt)].tolist() == prompt.tolist()
    whole = "user: hé 0 漢\nassistant: ja ü".encode()
    assert LatentActionDataCollator(tokenizer)(ROWS[:1])["input_ids"][0].tolist() == [*(b + 3 for b in whole), 1]


def test_it_is_learned_from_and_answered_with(tokenizer, tmp_path):
    rows = Dataset.from_list(ROWS)
    args = LatentActionSFTConfig(str(tmp_path / "sft"), **OPTIONS)
    LatentActionSFTTrainer(model(), args, rows, processing_class=tokenizer).train()
    options = {"num_generations": 2, "per_device_train_batch_size": 4, "max_completion_length": 6}
    seen = []

    def reward(completions, completion_ids, **columns):
        seen.extend(zip([completion[0]["content"] for completion in completions], completion_ids))
        return [float(len(text)) for text, _ in seen[-len(completions) :]]

    own = model()
    args = LatentActionGRPOConfig(str(tmp_path / "grpo"), **options, **OPTIONS)
    LatentActionGRPOTrainer(own, reward, args, train_dataset=rows, processing_class=tokenizer).train()
    assert all(text == tokenizer.decode(ids, skip_special_tokens=True) for text, ids in seen) and len(seen) >= 8
    found = answer(own, tokenizer, rows, max_new_tokens=6)
    assert len(found.texts) == 8 and any(found.texts)
    assert text_perplexity(own, tokenizer, rows).tokens == [len("ja") + 1] * 8
    make_atlas(own, tokenizer, rows, max_new_tokens=4)
