"""What a command tells an engine: each option once, and the law of codes that the model's own loop would have."""

from argparse import Namespace
from types import SimpleNamespace

import pytest
from test_grpo_rollouts import build
from transformers import GenerationConfig

from latent_trl.commands.engines import engine_options
from latent_trl.vllm.answers import EngineAnswers
from latent_trl.vllm.rows import EngineAnswer


def test_options_of_command_and_engine_are_joined():
    args = Namespace(engine_options='{"seed": 3}')
    assert engine_options(args, dtype="float32", max_model_len=None) == {"seed": 3, "dtype": "float32"}
    assert engine_options(Namespace(engine_options=None), dtype=None) == {}


def test_an_option_that_is_given_twice_is_named():
    with pytest.raises(ValueError, match="`dtype` is in `--engine-options`, and is an option of the command too"):
        engine_options(Namespace(engine_options='{"dtype": "float16"}'), dtype="float32")


@pytest.mark.parametrize("given", [{}, {"action_top_k": 2}])
def test_the_law_of_the_backbones_configuration_holds(tmp_path, given):
    trainer, asked = build(tmp_path), {}

    class Engine:
        config = trainer.model.config
        folders = SimpleNamespace(
            generation_config=lambda: GenerationConfig(action_temperature=0.5, action_top_k=7, eos_token_id=2)
        )

        def generate(self, prompts, **settings):
            asked.update(settings)
            return [EngineAnswer(prompt["prompt_token_ids"], [5, 2], [1, 0], [-0.1, -0.2], None) for prompt in prompts]

    answers = EngineAnswers(Engine(), trainer.encoder)
    answers([{"prompt": [{"role": "user", "content": "what color is it?"}]}], 4, **given)
    law = {name: asked[name] for name in ("action_do_sample", "action_temperature", "action_top_k", "action_top_p")}
    expected = {"action_do_sample": True, "action_temperature": 0.5, "action_top_k": 7, "action_top_p": 1.0}
    assert law == expected | given and "action_bias" not in asked
