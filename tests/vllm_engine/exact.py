"""Tiny models whose heads fit vLLM's kernels, and the measure of an engine's answers: the model's own passes."""

from dataclasses import dataclass

import tiny_models
import torch

from latent_trl import LatentActionConfig, LatentActionModel
from latent_trl.generation.action_law import ActionLaw

CODES = 16
LENGTH = 24
# vLLM's attention on a CPU has kernels for heads of 32 and more.
SIZES = {"hidden_size": 64, "num_attention_heads": 2, "num_key_value_heads": 1}
HEADS = {**SIZES, "head_dim": 32}
EXPERTS = {"num_experts_per_tok": 2, "moe_intermediate_size": 32}
GEMMA3 = {"query_pre_attn_scalar": 32, "sliding_window": 8, "tie_word_embeddings": True}
FAMILIES = {
    "llama": ("Llama", SIZES),
    "qwen2": ("Qwen2", SIZES),
    "qwen3": ("Qwen3", HEADS),
    "mistral": ("Mistral", {**SIZES, "sliding_window": 8}),
    "gemma": ("Gemma", {**HEADS, "tie_word_embeddings": True}),
    "gemma2": ("Gemma2", {**HEADS, **GEMMA3, "final_logit_softcapping": 30.0, "attn_logit_softcapping": 5.0}),
    "gemma3": ("Gemma3", {**HEADS, **GEMMA3}),
    "phi3": ("Phi3", SIZES),
    "gpt_neox": ("GPTNeoX", SIZES),
    "granite": ("Granite", {**SIZES, "logits_scaling": 3.0, "embedding_multiplier": 2.0, "residual_multiplier": 0.5}),
    "cohere": ("Cohere", {**SIZES, "logit_scale": 0.25, "tie_word_embeddings": True}),
    "phi": ("Phi", {**SIZES, "intermediate_size": 256, "num_key_value_heads": 2}),
    "opt": ("OPT", {**SIZES, "ffn_dim": 48, "word_embed_proj_dim": 64}),
    "stablelm": ("StableLm", SIZES),
    "mixtral": ("Mixtral", {**SIZES, "num_local_experts": 4, "num_experts_per_tok": 2}),
    "qwen3_moe": ("Qwen3Moe", {**HEADS, **EXPERTS, "num_experts": 4}),
}


def register_classes(*architectures: str) -> None:
    """vLLM looks at a class that it has not imported in a process of its own, which takes most of a start's time."""
    from vllm import ModelRegistry

    from latent_trl.vllm.plugin import PREFIX, register

    register()
    for architecture in architectures:
        for name in (architecture, PREFIX + architecture):
            ModelRegistry.register_model(name, ModelRegistry.models[name].load_model_cls())


def start(model: LatentActionModel | str, **options):
    """A small engine."""
    from latent_trl.vllm.engine import LatentActionEngine

    shared = {"dtype": "float32", "enforce_eager": True, "max_num_seqs": 64}
    if isinstance(model, str):
        register_classes("LlavaForConditionalGeneration", "LlamaForCausalLM")
    else:
        register_classes(type(model.backbone).__name__, "LlamaForCausalLM")
        shared |= {"max_model_len": 128, "kv_cache_memory_bytes": 64 << 20}
        if model.config.base_model_name_or_path is None:
            shared["skip_tokenizer_init"] = True
    return LatentActionEngine(model, **{**shared, **options})


def tiny(family: str, **config) -> LatentActionModel:
    """A random model of a family, whose codes say different tokens."""
    kind, fields = FAMILIES[family]
    if family == "gemma3":
        import transformers

        text = transformers.Gemma3TextConfig(**tiny_models.text_fields(**fields))
        backbone = tiny_models.build(transformers.Gemma3ForCausalLM, text)
    else:
        backbone = tiny_models.causal(kind, **tiny_models.text_fields(**fields)).model
    return with_codes(backbone, **config)


def with_codes(backbone, **config) -> LatentActionModel:
    torch.manual_seed(0)
    settings = {"num_codes": CODES, "policy_decoder": {"num_hidden_layers": 2}, **config}
    model = LatentActionModel.from_backbone(backbone, LatentActionConfig(**settings))
    with torch.no_grad():
        for parameter in (*model.policy.parameters(), *model.world_model.parameters()):
            if parameter.ndim > 1:
                parameter.normal_(std=1.5 * parameter.shape[-1] ** -0.5)
    return model.eval()


def prompts(rows: int = 32, seed: int = 1) -> list[list[int]]:
    generator = torch.Generator().manual_seed(seed)
    first, vocabulary = len(tiny_models.SPECIAL), tiny_models.VOCAB_SIZE
    lengths = torch.randint(3, 40, (rows,), generator=generator).tolist()
    return [torch.randint(first, vocabulary, (length,), generator=generator).tolist() for length in lengths]


@dataclass
class Measured:
    """The largest differences from the model's own teacher-forced pass: of a code's log-probability, by how much a
    token is less likely under its code than the likeliest, in logits, and by how much a greedy code falls short: its
    token of the token of the largest probability over all codes, and it of the likeliest code that says the same."""

    log_prob: float
    token: float
    code: float
    outside: int


@torch.no_grad()
def measured(model: LatentActionModel, answers, law: ActionLaw | None = None, bias=None, **inputs) -> Measured:
    """Rescores answers of an engine, one row after another."""
    law = law or ActionLaw()
    worst, token, code, outside = 0.0, 0.0, 0.0, 0
    for i, answer in enumerate(answers):
        ids = torch.tensor([answer.prompt_ids + answer.token_ids])
        own = {name: value[i] for name, value in inputs.items() if value[i] is not None}
        states, positions = model.encode(ids[:, :-1], **own)
        logits = model.policy(states, position_ids=positions, keep_last=len(answer.token_ids))[0]
        actions = torch.tensor(answer.action_ids)
        if bias is not None:
            logits = logits + bias
        support = law.support(logits)
        log_probs = law.log_probs(logits, support)
        chosen = log_probs.gather(-1, actions[:, None])[:, 0]
        outside += int(chosen.isneginf().sum())
        inside = ~chosen.isneginf()
        worst = max(worst, (chosen - torch.tensor(answer.log_probs))[inside].abs().max().item())
        own_states = states[:, -len(answer.token_ids) :]
        code = max(code, _short_of_the_likeliest(model, own_states[0], log_probs.exp(), actions))
        said = model.read(own_states, actions[None])[0].float()
        if model.config.vision_token_ids:
            said[:, model.config.vision_token_ids] = -torch.inf
        tokens = torch.tensor(answer.token_ids)
        token = max(token, (said.max(dim=-1).values - said.gather(-1, tokens[:, None])[:, 0]).max().item())
    return Measured(worst, token, code, outside)


def _short_of_the_likeliest(model, states, probs, actions) -> float:
    """For states `[L, d]`, probabilities `[L, K]` of codes and those `[L]` that were taken."""
    worst = 0.0
    every = torch.arange(probs.shape[-1])
    for state, law, taken in zip(states, probs, actions.tolist(), strict=True):
        said = model.read(state.expand(1, len(every), -1), every[None])[0].float()
        if model.config.vision_token_ids:
            said[:, model.config.vision_token_ids] = -torch.inf
        tokens = said.argmax(dim=-1)
        masses = {token: law[tokens == token].sum().item() for token in set(tokens.tolist())}
        alike = law[tokens == tokens[taken]].max().item() - law[taken].item()
        worst = max(worst, max(masses.values()) - masses[tokens[taken].item()], alike)
    return worst


@torch.no_grad()
def same_rows(model: LatentActionModel, answers, ends=(tiny_models.EOS,), **inputs) -> float:
    """The share of answers, arg-max ones that `ends` end, whose tokens and codes are those of `generate`."""
    same = 0
    for i, answer in enumerate(answers):
        own = {name: value[i] for name, value in inputs.items() if value[i] is not None}
        out = model.generate(
            torch.tensor([answer.prompt_ids]),
            max_new_tokens=LENGTH,
            eos_token_id=list(ends),
            action_do_sample=False,
            return_dict_in_generate=True,
            **own,
        )
        tokens = out.sequences[0, len(answer.prompt_ids) :].tolist()
        same += tokens == answer.token_ids and out.action_ids[0].tolist() == answer.action_ids
    return same / len(answers)
