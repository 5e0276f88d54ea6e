"""Small exact models for the tests of RL: codes that are tokens, and rewards that are functions of codes."""

import pytest
import torch
import transformers
import trl
from datasets import Dataset
from packaging.version import Version
from tiny_models import VOCAB_SIZE, llama, make_tokenizer

from latent_trl import LatentActionConfig, LatentActionModel


def skip_without_token_scoring() -> None:
    """TRL 1.15 scores tokens with Triton kernels alone, which need a GPU; 1.16 can do without."""
    if Version(trl.__version__) < Version("1.16") and not torch.cuda.is_available():
        pytest.skip(f"TRL {trl.__version__} cannot score tokens without a GPU.")


def decode_as_tokens(model: LatentActionModel, tokens: list[int]) -> None:
    """Sets codebook and world model so that code k is read as `tokens[k]`, whatever the state."""
    rows = torch.nn.functional.normalize(model.backbone.get_output_embeddings().weight.detach()[tokens], dim=-1)
    size = model.config.text_config.hidden_size
    with torch.no_grad():
        model.codebook.weight.copy_(rows)
        first, last = model.world_model.blocks
        for layer in (first.gate, first.up):
            layer.weight.zero_()
            layer.weight[: len(tokens), size:] = 10 * rows
        first.down.weight.zero_()
        first.down.weight[:, : len(tokens)] = 100 * rows.T
        last.down.weight.zero_()


def token_twins(num_layers: int = 2, seed: int = 0):
    """
    A token model, and a latent action model that is the same policy: a vocabulary of V tokens, K = V codes, code k
    decodes to token k, and the policy's head is the backbone's `lm_head`. The backbone's states are the embeddings
    (its layer adds nothing, and the embeddings have unit root mean square), the policy's layers are the token model's.

    Returns:
        Token model, latent action model, tokenizer.
    """
    fields = {"rms_norm_eps": 1e-12, "num_hidden_layers": num_layers}
    twin = llama(**fields).model
    with torch.no_grad():
        embeddings = twin.model.embed_tokens.weight
        embeddings.div_(embeddings.pow(2).mean(dim=-1, keepdim=True).sqrt())
        head = twin.lm_head.weight
        head.copy_(2 * torch.nn.functional.normalize(head, dim=-1))
    backbone = llama(**{**fields, "num_hidden_layers": 1}).model
    with torch.no_grad():
        backbone.model.embed_tokens.weight.copy_(twin.model.embed_tokens.weight)
        backbone.lm_head.weight.copy_(twin.lm_head.weight)
        backbone.model.layers[0].self_attn.o_proj.weight.zero_()
        backbone.model.layers[0].mlp.down_proj.weight.zero_()
    config = LatentActionConfig(
        num_codes=VOCAB_SIZE,
        world_model_intermediate_size=VOCAB_SIZE,
        inverse_dynamics_decoder={"num_hidden_layers": 1},
        policy_decoder={"num_hidden_layers": num_layers},
    )
    model = LatentActionModel.from_backbone(backbone, config)
    stack = model.policy.decoder_stack.decoder
    stack.layers.load_state_dict(twin.model.layers.state_dict())
    stack.norm.load_state_dict(twin.model.norm.state_dict())
    with torch.no_grad():
        model.policy.head.weight.copy_(twin.lm_head.weight)
    decode_as_tokens(model, list(range(VOCAB_SIZE)))
    return twin, model, make_tokenizer()


def policy_of(twin: transformers.PreTrainedModel, model: LatentActionModel) -> dict[str, tuple]:
    """Pairs of tensors that are the same in both models: (token model's, latent policy's)."""
    own = dict(model.policy.decoder_stack.decoder.named_parameters())
    pairs = {
        name.removeprefix("model."): (parameter, own[name.removeprefix("model.")])
        for name, parameter in twin.named_parameters()
        if name.removeprefix("model.") in own
    }
    return {**pairs, "head": (twin.lm_head.weight, model.policy.head.weight)}


# A problem whose best policy is known: every code must be the one after the last, and the first must be FIRST.

NUM_CODES = 6
LETTERS = "abcdef"
FIRST = 3


def target_problem(seed: int = 0, **sizes):
    """
    A latent action model of 6 codes that are read as 6 letters, its tokenizer, and the letters' ids. Which code is
    right depends on the last token, so codes that are scored a place too early or late cannot be learned. `sizes` are
    fields of the backbone's configuration.
    """
    tokenizer = make_tokenizer()
    letters = [tokenizer.convert_tokens_to_ids(c) for c in LETTERS]
    backbone = llama(num_hidden_layers=1, **sizes).model
    torch.manual_seed(seed)
    config = LatentActionConfig(
        num_codes=NUM_CODES,
        world_model_intermediate_size=32,
        inverse_dynamics_decoder={"num_hidden_layers": 1},
        policy_decoder={"num_hidden_layers": 1},
    )
    model = LatentActionModel.from_backbone(backbone, config)
    decode_as_tokens(model, letters)
    return model, tokenizer, letters


def target_reward(letters: list[int]):
    """The share of codes that are right, at most 1; about 1/6 by chance."""

    def share_of_target(completion_ids, **columns):
        shares = []
        for ids in completion_ids:
            codes = [letters.index(token) for token in ids]
            wanted = [FIRST, *[(code + 1) % NUM_CODES for code in codes[:-1]]]
            shares.append(sum(a == b for a, b in zip(codes, wanted)) / len(codes))
        return shares

    return share_of_target


def prompts(count: int = 8) -> Dataset:
    """Prompts of different lengths."""
    return Dataset.from_list([{"prompt": "what " * (1 + i % 3) + str(i)} for i in range(count)])
