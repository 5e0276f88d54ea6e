import pytest
import torch
from torch import nn

from latent_trl import LanguageWorldModel


def silu(x):
    return x * torch.sigmoid(x)


def plain_block(block, merged, codes):
    joined = torch.cat([merged, codes], -1)
    return (silu(joined @ block.gate.weight.T) * (joined @ block.up.weight.T)) @ block.down.weight.T


@pytest.fixture
def norm():
    norm = nn.LayerNorm(6)
    nn.init.normal_(norm.weight)
    return norm


@pytest.mark.parametrize("read_out", ["residual", "subtract", "last_block"])
def test_read_outs_by_plain_formulas(read_out, norm):
    torch.manual_seed(0)
    world_model = LanguageWorldModel(6, 10, read_out)
    for parameter in world_model.parameters():
        nn.init.normal_(parameter, std=0.4)
    states, codes = torch.randn(2, 3, 6), torch.randn(2, 3, 6)
    first = states + plain_block(world_model.blocks[0], states, codes)
    step = plain_block(world_model.blocks[1], first, codes)
    want = {
        "residual": first + step,
        "subtract": norm(first + step) - states,
        "last_block": norm(step),
    }[read_out]
    torch.testing.assert_close(world_model(states, codes, norm), want)


@pytest.mark.parametrize("read_out", ["residual", "subtract", "last_block"])
def test_all_codes_at_once_are_one_after_the_other(read_out, norm):
    torch.manual_seed(0)
    world_model = LanguageWorldModel(6, 10, read_out)
    for parameter in world_model.parameters():
        nn.init.normal_(parameter, std=0.4)
    states, codes = torch.randn(5, 6), torch.randn(4, 6)
    together = world_model(states[:, None], codes, norm)
    for k, code in enumerate(codes):
        torch.testing.assert_close(together[:, k], world_model(states, code.expand(5, 6), norm))


def test_an_untrained_residual_read_out_is_the_state():
    states = torch.randn(2, 3, 6)
    world_model = LanguageWorldModel(6, 10)
    assert torch.equal(world_model(states, torch.randn(2, 3, 6)), states)
    world_model(states, torch.randn(2, 3, 6)).sum().backward()
    assert all(block.down.weight.grad.abs().sum() > 0 for block in world_model.blocks)


def test_subtracting_does_not_train_the_state(norm):
    world_model = LanguageWorldModel(6, 10, "subtract")
    for parameter in world_model.parameters():
        nn.init.zeros_(parameter)
    states = torch.randn(2, 6, requires_grad=True)
    world_model(states, torch.zeros(2, 6), norm).sum().backward()
    through_norm = torch.autograd.grad(norm(states).sum(), states)[0]
    torch.testing.assert_close(states.grad, through_norm)


@pytest.mark.parametrize("read_out", ["subtract", "last_block"])
def test_read_outs_that_need_the_norm_say_so(read_out):
    with pytest.raises(ValueError, match="norm"):
        LanguageWorldModel(6, 10, read_out)(torch.randn(1, 6), torch.randn(1, 6))


def test_unknown_read_outs_are_refused():
    with pytest.raises(ValueError, match="read_out.*'sideways'"):
        LanguageWorldModel(6, 10, "sideways")


def test_no_biases():
    assert not any("bias" in name for name, _ in LanguageWorldModel(6, 10).named_parameters())
