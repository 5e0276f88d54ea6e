"""Chat prints tokens as they come, also in a real pseudo-terminal."""

import io
import re
import sys

import pytest
from rich.console import Console
from terminal import Terminal

ESCAPES = re.compile(rb"\x1b\[[0-9;?]*[a-zA-Z]")


def test_tokens_are_shown_before_the_answer_is_complete(checkpoint, picture):
    from latent_trl.commands.chat import Chat, parse
    from latent_trl.commands.replies import load_answerer
    from latent_trl.data.code_streamer import code_streamer
    from latent_trl.data.prompts import encode_prompts

    answerer = load_answerer(parse([checkpoint, "--max-new-tokens", "6", "--greedy"]))
    model, seen, steps = answerer.model, [], []

    def keep(module, args, output):
        # Codes that are taken, and not those that are read to find them.
        if args[0].ndim == 1:
            steps.append(args[0])

    hook = model.codebook.register_forward_hook(keep)
    replies = answerer(
        [{"role": "user", "content": "what?"}], [], on_token=lambda token, code: seen.append((token, code, len(steps)))
    )
    hook.remove()
    with code_streamer(model, answerer.tokenizer, lambda token, code: None) as streamer:
        out = model.generate(
            **encode_prompts(answerer.processor, [{"prompt": [{"role": "user", "content": "what?"}]}]),
            **{"max_new_tokens": 6, "action_do_sample": False, "return_dict_in_generate": True, "streamer": streamer},
        )
    assert streamer.codes == out.action_ids[0].tolist() == replies[0].action_ids
    assert [token for token, _, _ in seen] == replies[0].tokens
    assert [code for _, code, _ in seen] == replies[0].action_ids
    assert [count for _, _, count in seen] == list(range(1, len(seen) + 1)) and len(seen) > 1

    out = io.StringIO()
    chat = Chat(answerer, Console(file=out, width=100))
    chat.colours = False
    chat.hear("what?")
    assert out.getvalue().strip() == chat.last.text == replies[0].text
    assert len(model.codebook._forward_hooks) == 0


@pytest.mark.parametrize(("is_terminal", "shown"), [(True, "no.<|end|>"), (False, "no.")])
def test_a_pipe_has_no_token_that_only_carries_a_colour(is_terminal, shown):
    from latent_trl.commands.chat import Chat
    from latent_trl.commands.replies import Reply

    class Answerer:
        special_tokens = {"<|end|>"}

        def __call__(self, messages, images, forced, on_token):
            for code, token in enumerate(["no.", "<|end|>"]):
                on_token(token, code)
            return [Reply("no.", ["no.", "<|end|>"], [0, 1], 0.0)]

    out = io.StringIO()
    Chat(Answerer(), Console(file=out, force_terminal=is_terminal, color_system=None)).hear("is it red?")
    assert out.getvalue() == f"{shown}\n"


def test_an_answer_that_ends_within_a_character_is_shown_to_its_end(checkpoint):
    import torch

    from latent_trl.commands.chat import parse
    from latent_trl.commands.replies import load_answerer
    from latent_trl.data.code_streamer import code_streamer
    from latent_trl.data.pieces import text_pieces

    answerer = load_answerer(parse([checkpoint]))
    ids = answerer.tokenizer("a漢b漢", add_special_tokens=False).input_ids[:-1]
    seen = []

    def tell(token, code):
        seen.append((token, code))

    with code_streamer(answerer.model, answerer.tokenizer, tell) as streamer:
        streamer.put(torch.tensor([[1, 2]]))
        for code, token in enumerate(ids):
            answerer.model.codebook(torch.tensor([code]))
            streamer.put(torch.tensor([token]))
        assert "".join(token for token, _ in seen) == "a漢b"
        streamer.end()
    assert "".join(token for token, _ in seen) == "".join(text_pieces(answerer.tokenizer, ids)) != "a漢b"
    assert seen[-1][1] == len(ids) - 1


@pytest.mark.slow
@pytest.mark.skipif(sys.platform == "win32", reason="needs a pseudo-terminal")
def test_a_conversation_in_a_terminal(checkpoint, picture):
    terminal = Terminal(
        [
            sys.executable,
            "-m",
            "latent_trl",
            "chat",
            checkpoint,
            "--greedy",
            "--max-new-tokens",
            "4",
            "--image",
            picture,
        ]
    )
    terminal.until(rb"16 codes\. [^\n]*\n> ")
    terminal.type("what color is it?")
    answer = terminal.until(rb"\n> ")
    # Tokens on coloured backgrounds.
    assert re.search(rb"\x1b\[30;48;[25];", answer)
    terminal.type("/codes")
    table = ESCAPES.sub(b"", terminal.until(rb"\n> ")).decode()
    codes = [int(code) for code in re.findall(r"^\s*\d+\s+(\d+)\s+'", table, re.MULTILINE)]
    assert 0 < len(codes) <= 4
    other = (codes[0] + 1) % 16
    terminal.type(f"/again 0 {other}")
    terminal.until(rb"\n> ")
    terminal.type("/codes")
    table = ESCAPES.sub(b"", terminal.until(rb"\n> ")).decode()
    assert int(re.search(r"^\s*0\s+(\d+)\s+'", table, re.MULTILINE)[1]) == other
    terminal.type("/quit")
    assert terminal.process.wait(timeout=30) == 0
