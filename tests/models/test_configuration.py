import json

import pytest
from tiny_models import latent, latent_config
from transformers import LlamaConfig

from latent_trl import LatentActionConfig


def test_defaults_are_the_papers():
    config = LatentActionConfig()
    assert (config.num_codes, config.gumbel_temperature) == (128, 2.0)
    assert config.inverse_dynamics_decoder["num_hidden_layers"] == 4
    assert config.policy_decoder["num_hidden_layers"] == 2
    assert config.get_text_config() is config


@pytest.mark.parametrize(
    "fields, error, match",
    [
        ({"num_codes": 1}, ValueError, "allow_single_code"),
        ({"num_codes": 0}, ValueError, "num_codes"),
        ({"num_codes": 0, "allow_single_code": True}, ValueError, "num_codes"),
        ({"num_codes": -4}, ValueError, "-4"),
        ({"num_codes": "128"}, TypeError, "num_codes"),
        ({"num_codes": 12.0}, TypeError, "12.0"),
        ({"num_codes": True}, TypeError, "True"),
        ({"read_out": "additive"}, ValueError, "'residual', 'subtract', 'last_block'"),
        ({"policy_init": "random"}, ValueError, "last_layers"),
        ({"stage": "done"}, ValueError, "stage"),
        ({"gumbel_temperature": 0.0}, ValueError, "gumbel_temperature"),
        ({"gumbel_temperature": -1.0}, ValueError, "-1.0"),
        ({"gumbel_temperature": float("nan")}, ValueError, "nan"),
        ({"codebook_std": -1.0}, ValueError, "codebook_std"),
        ({"world_model_intermediate_size": 0}, ValueError, "world_model_intermediate_size"),
        ({"policy_decoder": {"num_hidden_layers": 0}}, ValueError, "policy_decoder"),
        ({"inverse_dynamics_decoder": {"num_hidden_layers": -1}}, ValueError, "inverse_dynamics_decoder"),
        ({"policy_decoder": 4}, TypeError, "policy_decoder"),
        ({"vision_token_ids": "12"}, TypeError, "vision_token_ids"),
    ],
    ids=str,
)
def test_impossible_values_are_refused(fields, error, match):
    with pytest.raises(error, match=match):
        LatentActionConfig(**fields)


def test_one_code_is_a_control_that_must_be_asked_for():
    assert LatentActionConfig(num_codes=1, allow_single_code=True).num_codes == 1


def test_json_round_trip_keeps_everything(tmp_path):
    model, _ = latent("qwen2_5_vl", latent_config(read_out="subtract", stage="joint", codebook_std=0.5))
    model.config.save_pretrained(tmp_path)
    loaded = LatentActionConfig.from_pretrained(tmp_path)
    assert loaded.to_dict() == model.config.to_dict()
    assert type(loaded.text_config) is type(model.config.text_config)
    assert loaded.get_text_config() is loaded.text_config
    json.dumps(loaded.to_dict())


def test_a_text_configuration_may_be_a_dictionary():
    text = LlamaConfig(hidden_size=16, num_attention_heads=2)
    config = LatentActionConfig(text_config=text.to_dict())
    assert isinstance(config.text_config, LlamaConfig) and config.text_config.hidden_size == 16


def test_a_user_configuration_is_not_changed_by_a_backbone():
    config = latent_config()
    before = config.to_dict()
    model, _ = latent("llava", config)
    assert config.to_dict() == before
    assert model.config.text_config is not None and model.config.backbone_fingerprint


def test_decoder_overrides_of_unknown_fields_are_refused():
    with pytest.raises(ValueError, match="'num_layerz' is not a field of"):
        latent("llama", latent_config(policy_decoder={"num_layerz": 2}))


def test_stacks_know_no_tokens():
    model, _ = latent("llava")
    for component in (model.policy, model.inverse_dynamics):
        assert not [name for name, _ in component.named_parameters() if "embed_tokens" in name]


@pytest.mark.parametrize("family", ["llava", "qwen2_5_vl", "gemma3"])
def test_a_decoder_has_no_special_token_outside_its_vocabulary(family):
    """transformers warns of one each time that a model is made."""
    model, _ = latent(family)
    config = model.config.decoder_config(model.config.policy_decoder)
    tokens = {name: value for name, value in config.to_dict().items() if name.endswith("_token_id")}
    assert "pad_token_id" in tokens and not any(tokens.values())
