"""What users of TRL bring: it works, or one sentence says what to use."""

import shutil

import pytest
import torch
import trl
from datasets import Dataset, DatasetDict
from peft import LoraConfig, get_peft_model
from rl_models import prompts
from tiny_models import latent, latent_config, llama, make_tokenizer
from transformers import TrainerCallback

from latent_trl import (
    LatentActionGRPOConfig,
    LatentActionGRPOTrainer,
    LatentActionModel,
    LatentActionPPOConfig,
    LatentActionPPOTrainer,
    LatentActionRLOOConfig,
    LatentActionRLOOTrainer,
    LatentActionSFTConfig,
    LatentActionSFTTrainer,
)
from latent_trl.commands.loading import load_rewards
from latent_trl.evaluation.perplexity import text_perplexity
from latent_trl.trainer.run.loading import load_processing_class
from latent_trl.trainer.run.manifest import newest_whole_checkpoint

TRAINERS = {
    "grpo": (LatentActionGRPOTrainer, LatentActionGRPOConfig),
    "rloo": (LatentActionRLOOTrainer, LatentActionRLOOConfig),
    "ppo": (LatentActionPPOTrainer, LatentActionPPOConfig),
}
ROWS = Dataset.from_list([{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}] * 8)


def letters(completions, **columns):
    return [float(len(set(completion))) for completion in completions]


def config(folder, kind="grpo", **options):
    shared = {"use_cpu": True, "bf16": False, "disable_tqdm": True, "max_steps": 1, "save_strategy": "no"}
    shared |= {"per_device_train_batch_size": 4, "num_generations": 4, "max_completion_length": 4}
    return TRAINERS[kind][1](str(folder), **{**shared, **options})


def build(folder, kind="grpo", family="llama", reward=letters, data=None, args=None, eval_dataset=None, **options):
    """By position, in TRL's order."""
    own = {name: options.pop(name) for name in ("callbacks", "peft_config", "anchor_dataset") if name in options}
    model, tiny = latent(family, latent_config(use_projector=False))
    args = args or config(folder, kind, **options)
    return TRAINERS[kind][0](model, reward, args, data or prompts(8), eval_dataset, tiny.processor, **own)


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """Folders of a plain model with its tokenizer, and of latent actions on it."""
    base, folder = tmp_path_factory.mktemp("base"), tmp_path_factory.mktemp("latent")
    llama().model.save_pretrained(base)
    make_tokenizer().save_pretrained(base)
    backbone = llama().model.from_pretrained(base)
    LatentActionModel.from_backbone(backbone, latent_config(use_projector=False)).save_pretrained(folder)
    return base, folder


# Loading


def test_a_model_by_name_is_loaded_as_the_arguments_say(saved, tmp_path):
    args = config(tmp_path, model_init_kwargs={"dtype": "bfloat16"})
    trainer = LatentActionGRPOTrainer(str(saved[1]), letters, args, prompts(8))
    assert trainer.model.backbone.dtype == torch.bfloat16
    tokenizer = trainer.processing_class
    assert (tokenizer.padding_side, tokenizer.truncation_side) == ("left", "left")
    args = config(tmp_path, model_init_kwargs={"quantization_config": 1})
    with pytest.raises(ValueError, match="`quantization_config` is given twice"):
        LatentActionGRPOTrainer(str(saved[1]), letters, args, prompts(8), quantization_config=2)


@pytest.mark.parametrize("options", [{"model_init_kwargs": {"dtype": "bfloat16"}}, {"quantization_config": object()}])
def test_options_of_loading_are_refused_for_a_loaded_model(options, tmp_path):
    model, tiny = latent("llama", latent_config(use_projector=False))
    args = config(tmp_path, **{k: v for k, v in options.items() if k == "model_init_kwargs"})
    given = {k: v for k, v in options.items() if k == "quantization_config"}
    with pytest.raises(ValueError, match=f"{next(iter(given), 'dtype')}.* are about loading"):
        LatentActionGRPOTrainer(model, letters, args, prompts(8), processing_class=tiny.processor, **given)


@pytest.mark.parametrize("trainer", [LatentActionGRPOTrainer, LatentActionPPOTrainer, LatentActionSFTTrainer])
def test_what_is_no_latent_action_model_leads_to_one(trainer, saved):
    for model, error in ((llama().model, TypeError), (str(saved[0]), ValueError)):
        with pytest.raises(error, match="(?s)LatentActionModel.from_backbone.*latent-trl learn"):
            trainer(model)
    adapted = get_peft_model(llama().model, LoraConfig(target_modules=["q_proj"]))
    with pytest.raises(TypeError, match="(?s)from_backbone.*latent-trl learn.*`peft_config`"):
        trainer(adapted)
    model, _ = latent("llama", latent_config(use_projector=False))
    with pytest.raises(TypeError, match="Pass the latent action model itself"):
        trainer(get_peft_model(model, LoraConfig(target_modules=["q_proj"])))


def test_the_processing_class_saved_beside_a_model_is_the_one_that_is_loaded(saved, tmp_path):
    assert load_processing_class(LatentActionModel.from_pretrained(saved[1])).chat_template.startswith("{% for")
    tokenizer = make_tokenizer()
    tokenizer.chat_template = "{{ 'mine: ' + messages[0]['content'] }}"
    model = LatentActionModel.from_pretrained(saved[1])
    trainer = LatentActionGRPOTrainer(model, letters, config(tmp_path), prompts(8), processing_class=tokenizer)
    trainer.save_model(str(tmp_path / "final"))
    loaded = load_processing_class(LatentActionModel.from_pretrained(tmp_path / "final"))
    assert loaded.apply_chat_template([{"role": "user", "content": "a"}], tokenize=False) == "mine: a"


def test_the_backbones_processing_class_is_that_of_its_pinned_revision(monkeypatch):
    from latent_trl.trainer.run import loading

    model, _ = latent("llama", latent_config(use_projector=False))
    model.config.base_model_name_or_path, model.config.base_model_revision = "someone/base", "abc"
    seen = {}
    monkeypatch.setattr(loading.AutoProcessor, "from_pretrained", lambda name, **options: seen.update(options, n=name))
    load_processing_class(model)
    assert seen["n"] == "someone/base" and seen["revision"] == "abc" and not seen["trust_remote_code"]
    assert seen["padding_side"] == seen["truncation_side"] == "left"


@pytest.mark.parametrize("tied", [False, True])
def test_resizing_the_embeddings_is_refused_and_changes_nothing(tied):
    model = LatentActionModel.from_backbone(llama(tie_word_embeddings=tied).model, latent_config(use_projector=False))
    size = model.backbone.config.vocab_size
    with pytest.raises(ValueError, match="Resize and save the backbone itself"):
        model.resize_token_embeddings(size + 8)
    assert len(model.get_input_embeddings().weight) == len(model.get_output_embeddings().weight) == size
    assert model.resize_token_embeddings() is model.resize_token_embeddings(size) is model.get_input_embeddings()


# Configurations


@pytest.mark.parametrize("kind", TRAINERS)
def test_another_trainers_configuration_is_refused(kind, tmp_path):
    shared = {"use_cpu": True, "bf16": False}
    others = [trl.GRPOConfig(str(tmp_path), **shared), LatentActionSFTConfig(str(tmp_path), **shared)]
    others += [config(tmp_path, other) for other in TRAINERS if other != kind]
    for args in others:
        with pytest.raises(
            TypeError, match=f"{type(args).__name__}, and this trainer takes a `{TRAINERS[kind][1].__name__}`"
        ):
            build(tmp_path, kind, args=args)


def test_an_own_subclass_of_the_configuration_is_taken(tmp_path):
    class Mine(LatentActionGRPOConfig):
        """Of a user."""

    build(tmp_path, args=Mine(str(tmp_path), use_cpu=True, bf16=False, max_completion_length=4))


@pytest.mark.parametrize(
    ("old", "now"),
    [("vf_coef", "value_coef"), ("num_ppo_epochs", "num_iterations"), ("cliprange", "epsilon"), ("lam", "gae_lambda")]
    + [("missing_eos_penalty", "overlong_buffer"), ("kl_coef", "beta"), ("response_length", "max_completion_length")],
)
def test_old_names_of_ppo_are_told_todays(old, now):
    with pytest.raises(TypeError, match=f"`{old}` is no field of `LatentActionPPOConfig`.*`{now}`"):
        LatentActionPPOConfig("folder", **{old: 1})


@pytest.mark.parametrize(
    ("kind", "options", "match"),
    [
        ("grpo", {"max_completion_length": None}, "`max_completion_length` must be a number"),
        ("grpo", {"min_p": 0.1}, "`min_p=0.1`"),
        ("grpo", {"neftune_noise_alpha": 5.0}, "`neftune_noise_alpha=5.0`"),
        ("ppo", {"scale_rewards": "group"}, "`whiten_advantages`"),
        ("ppo", {"use_bias_correction_kl": True}, "`kl_in='loss'`"),
        ("ppo", {"use_bias_correction_kl": False}, "`kl_in='loss'`"),
        ("ppo", {"use_bias_correction_kl": True, "kl_in": "loss", "beta": 0.0}, "`beta`"),
    ],
)
def test_settings_without_effect_are_refused(kind, options, match, tmp_path):
    with pytest.raises(ValueError, match=match):
        config(tmp_path, kind, **options)


def test_settings_that_ask_for_nothing_are_taken(tmp_path):
    assert config(tmp_path, min_p=0.0, top_k=0, temperature=1.0).min_p == 0.0
    assert config(tmp_path, "ppo", scale_rewards="none").use_bias_correction_kl is None


def test_the_corrected_divergence_of_ppo_has_an_effect(tmp_path):
    def weights(**options):
        torch.manual_seed(0)
        trainer = build(tmp_path, "ppo", kl_in="loss", beta=1.0, max_steps=2, learning_rate=1e-2, **options)
        trainer.train()
        return trainer.model.policy.head.weight.detach().clone()

    default = weights()
    assert torch.equal(default, weights(use_bias_correction_kl=True))
    assert not torch.equal(default, weights(use_bias_correction_kl=False))


@pytest.mark.parametrize(
    "callback", [trl.BEMACallback(), trl.SyncRefModelCallback(None, None)], ids=lambda c: type(c).__name__
)
def test_callbacks_of_a_second_model_are_refused(callback, tmp_path):
    with pytest.raises(ValueError, match=type(callback).__name__):
        build(tmp_path, callbacks=[callback])
    with pytest.raises(ValueError, match=type(callback).__name__):
        build(tmp_path).add_callback(callback)


# Runs


def test_a_second_train_trains_further(tmp_path):
    trainer = build(tmp_path, save_strategy="steps", save_steps=1, max_steps=2, learning_rate=1e-2)
    trainer.train()
    first = trainer.model.policy.head.weight.detach().clone()
    shutil.copytree(tmp_path / "checkpoint-2", tmp_path / "checkpoint-9")
    assert newest_whole_checkpoint(tmp_path).endswith("checkpoint-9")
    trainer.train()
    assert trainer.state.global_step == 2 and not torch.equal(trainer.model.policy.head.weight, first)
    # No run goes on from a checkpoint of the first.
    assert newest_whole_checkpoint(tmp_path).endswith("checkpoint-2")
    with pytest.raises(ValueError, match="holds checkpoints of an earlier run"):
        build(tmp_path, save_strategy="steps").train()


def test_a_card_can_be_made_before_the_model_is_saved(tmp_path):
    trainer = build(tmp_path)
    trainer.create_model_card(model_name="Mine")
    assert "# Mine" in (tmp_path / "README.md").read_text()


@pytest.mark.parametrize("kind", TRAINERS)
@pytest.mark.parametrize("sets", [dict, DatasetDict])
def test_each_evaluation_set_has_its_own_figures(kind, sets, tmp_path):
    options = {"per_device_eval_batch_size": 4, "eval_action_do_sample": False}
    trainer = build(tmp_path, kind, eval_dataset=sets(one=prompts(3), two=prompts(5)), log_completions=True, **options)
    trainer.evaluate()
    logged = [row for row in trainer.state.log_history if any(name.startswith("eval_") for name in row)]
    assert [{name.split("_")[1] for name in row if name.startswith("eval_")} for row in logged] == [{"one"}, {"two"}]
    assert all(f"eval_{name}_reward" in row for name, row in zip(("one", "two"), logged, strict=True))
    assert len(list((tmp_path / "completions").glob("*.html"))) == 2


@pytest.mark.parametrize("kind", ["grpo", "ppo", "sft"])
@pytest.mark.parametrize("wrong, said", [(lambda rows: [rows, rows], "as a dict"), (lambda rows: {1: rows}, "texts")])
def test_several_evaluation_sets_without_names(kind, wrong, said, tmp_path):
    with pytest.raises(TypeError, match=f"eval_dataset.*{said}"):
        if kind == "sft":
            model, tiny = latent("llama", latent_config(use_projector=False, stage="policy"))
            args = LatentActionSFTConfig(str(tmp_path), use_cpu=True, bf16=False)
            LatentActionSFTTrainer(model, args, ROWS, wrong(ROWS), tiny.processor)
        else:
            build(tmp_path, kind, eval_dataset=wrong(prompts(4)))


def test_a_reward_and_callbacks_may_generate(tmp_path):
    model, tiny = latent("llama", latent_config(use_projector=False))
    made = []

    def speaks(*args, **kwargs):
        made.append(model.generate(**tiny.text_inputs, max_new_tokens=3))

    def reward(completions, **columns):
        speaks()
        return letters(completions)

    moments = ("on_train_begin", "on_step_begin", "on_step_end", "on_log", "on_evaluate", "on_train_end")
    callback = type("Speaks", (TrainerCallback,), dict.fromkeys(moments, speaks))()
    args = config(tmp_path, max_steps=2, logging_steps=1, eval_strategy="steps", eval_steps=1)
    trainer = LatentActionGRPOTrainer(
        model, reward, args, prompts(8), prompts(4), processing_class=tiny.processor, callbacks=[callback]
    )
    trainer.train()
    assert len(made) >= 10


def test_columns_that_were_taken_from_a_reward_are_named(tmp_path):
    data = Dataset.from_list([{"prompt": str(i), "answer": str(i)} for i in range(8)])

    def named(completions, answer, **columns):
        return letters(completions)

    def looked_up(completions, **columns):
        return [float(len(answer)) for answer in columns["answer"]]

    for reward in (named, looked_up):
        build(tmp_path, reward=reward, data=data).train()
        with pytest.raises(ValueError, match=r"columns \['answer'\]: `remove_unused_columns=True`"):
            build(tmp_path, reward=reward, data=data, remove_unused_columns=True).train()
    build(tmp_path, data=data, remove_unused_columns=True).train()


def test_texts_beyond_the_backbones_positions_are_named_before_the_run(tmp_path):
    with pytest.raises(ValueError, match="`max_completion_length=300` leaves no room for a prompt"):
        build(tmp_path, family="gpt2", max_completion_length=300)
    long = Dataset.from_list([{"prompt": "x" * 200}] * 8)
    with pytest.raises(ValueError, match="Row 0.* 200 tokens, more than the limit of 156"):
        build(tmp_path, family="gpt2", max_completion_length=100, data=long).train()
    build(tmp_path, family="gpt2", max_completion_length=50, data=long).train()
    model, tiny = latent("gpt2", latent_config(use_projector=False))
    model.config.stage = "policy"
    rows = Dataset.from_list([{"prompt": "x" * 200, "completion": "y" * 100}] * 8)
    for length in (2048, None):
        args = LatentActionSFTConfig(str(tmp_path), use_cpu=True, bf16=False, max_steps=1, max_length=length)
        with pytest.raises(ValueError, match="Row 0.* tokens, and the backbone has positions for 256"):
            LatentActionSFTTrainer(model, args, rows, processing_class=tiny.processor).train()
        model.peft_backbone.unload()


def test_other_conversations_beyond_the_backbones_positions_are_named_too(tmp_path):
    model, tiny = latent("gpt2", latent_config(use_projector=False))
    rows = [{"prompt": "x" * 200, "completion": "y" * 100, "reference": "y" * 100}]
    with pytest.raises(ValueError, match="Row 0.* tokens, and the backbone has positions for 256"):
        text_perplexity(model, tiny.processor, rows)
    trainer = build(tmp_path, family="gpt2", anchor_coef=0.1, anchor_dataset=Dataset.from_list(rows * 8))
    with pytest.raises(ValueError, match="Row .* of `anchor_dataset`: .*, and the backbone has positions for 256"):
        trainer.train()


def test_trls_order_of_sft_is_told_that_there_is_no_collator(tmp_path):
    model, tiny = latent("llama", latent_config(use_projector=False))
    args = LatentActionSFTConfig(str(tmp_path), use_cpu=True, bf16=False)
    for third in (None, lambda rows: rows):
        with pytest.raises(ValueError, match="There is no `data_collator` before it"):
            LatentActionSFTTrainer(model, args, third, ROWS, processing_class=tiny.processor)


# The command line


def test_rewards_of_trl_are_known_by_name_and_by_dotted_path():
    made = load_rewards(
        ["think_format_reward", "trl.rewards.think_format_reward", "get_soft_overlong_punishment"],
        {"get_soft_overlong_punishment": {"max_completion_len": 4, "soft_punish_cache": 2}},
    )
    right = [[{"role": "assistant", "content": "<think>\na\n</think>\nb"}]]
    assert made[0](completions=right) == made[1](completions=right) == [1.0]
    assert made[2](completion_ids=[[1], [1, 2, 3], [1] * 9]) == [0.0, -0.5, -1]
    with pytest.raises(ValueError, match="max_completion_len"):
        load_rewards(["get_soft_overlong_punishment"])
    with pytest.raises(ValueError, match="think_format_reward"):
        load_rewards(["think_format"])
