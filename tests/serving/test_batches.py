"""Requests share batches whatever their laws, and none is lost, mixed up, or answered for nobody."""

import asyncio
from collections import Counter, deque
from contextlib import aclosing, asynccontextmanager

import pytest
import torch
from conversations import picture

from latent_trl.data.prompts import EncodedPrompt
from latent_trl.generation.action_law import ActionLaw
from latent_trl.serving.batches import Job, next_batch
from latent_trl.serving.engine import EngineError, GenerationRequest, RequestError
from latent_trl.serving.transformers_engine import TransformersEngine

QUESTION = "what color is it?"
# A token that the model does not say.
NEVER = [1999]


def request(text=QUESTION, image=None, **options):
    shown = [] if image is None else [{"type": "image", "image": image}]
    content = [*shown, {"type": "text", "text": text}]
    options = {"max_tokens": 8, "do_sample": False, **options}
    return GenerationRequest([{"role": "user", "content": content}], **options)


def job(length, max_tokens=5, n=1, cancelled=False):
    made = Job(request(n=n), EncodedPrompt([0] * length, {}, {}, None), max_tokens, lambda piece: None)
    made.is_cancelled = cancelled
    return made


@asynccontextmanager
async def started(pocket, **options):
    engine = TransformersEngine(*pocket, **options)
    await engine.start()
    try:
        yield engine
    finally:
        await engine.close()


async def answered(engine, wanted):
    """Codes and texts of the request's answers."""
    found = [([], "") for _ in range(wanted.n)]
    async for piece in engine.generate(wanted):
        codes, text = found[piece.index]
        found[piece.index] = (codes + piece.action_ids, text + piece.text)
    return found


def counted(engine, sizes):
    """Notes the number of rows of each batch."""
    generate = engine.model.generate

    def noted(**options):
        sizes.append(len(options["input_ids"]) * options["num_return_sequences"])
        return generate(**options)

    return noted


def test_a_batch_is_of_the_oldest_that_go_together():
    a, b, c, d, e = job(5), job(5, n=2), job(5, cancelled=True), job(7), job(5, n=2)
    waiting = deque([a, b, c, d, e])
    assert next_batch(waiting, 32, None) == [a, d] and list(waiting) == [b, e]
    assert next_batch(waiting, 3, None) == [b] and list(waiting) == [e]
    assert next_batch(waiting, 1, None) == [e] and not waiting
    assert next_batch(waiting, 1, None) == []
    # 8 + 6 tokens would be needed for both, though each has room.
    long, short = job(8, max_tokens=2), job(3, max_tokens=6)
    assert next_batch(deque([long, short]), 32, 13) == [long]
    assert next_batch(deque([long, short]), 32, 14) == [long, short]
    many = deque(job(3) for _ in range(10))
    assert [len(next_batch(many, 4, None)) for _ in range(3)] == [4, 4, 2]


def test_requests_of_different_laws_are_answered_together_as_alone(pocket, monkeypatch):
    wanted = [
        request(),
        request(image=picture("blue")),
        request("is it a circle?", picture("green"), forced=[3, -1, 5]),
        request(do_sample=True, law=ActionLaw(1.5, 10, 0.9), seed=3),
        request(do_sample=True, law=ActionLaw(0.7), seed=3, image=picture()),
        request(bias={5: 40.0, 6: -torch.inf}),
        request("hello", max_tokens=2),
        request(stop=[" is"]),
        request(ignore_eos=True, max_tokens=30),
    ]

    async def both():
        async with started(pocket) as engine:
            alone = [await answered(engine, each) for each in wanted]
            sizes = []
            monkeypatch.setattr(engine.model, "generate", counted(engine, sizes))
            # The first batch is of one: the others come while it is answered.
            together = await asyncio.gather(*(answered(engine, each) for each in wanted * 2))
            return alone, together, sizes

    alone, together, sizes = asyncio.run(both())
    assert together == alone * 2
    assert sum(sizes) == 18 and len(sizes) < 9
    codes = [answer[0][0] for answer in alone]
    assert codes[2][0] == 3 and codes[2][2] == 5 and set(codes[5]) == {5} and len(codes[6]) == 2
    assert len({tuple(each) for each in codes}) >= 6 and len(codes[8]) == 30


def test_several_answers_share_the_encoding_of_their_prompt(pocket, monkeypatch):
    wanted = [request(n=3, do_sample=True, seed=seed, image=picture()) for seed in range(3)]

    async def both():
        async with started(pocket) as engine:
            alone = [await answered(engine, each) for each in wanted]
            sizes = []
            monkeypatch.setattr(engine.model, "generate", counted(engine, sizes))
            first = asyncio.ensure_future(answered(engine, request(max_tokens=200, ignore_eos=True)))
            await asyncio.sleep(0.02)
            together = await asyncio.gather(*(answered(engine, each) for each in wanted))
            await first
            return alone, together, sizes

    alone, together, sizes = asyncio.run(both())
    assert together == alone and Counter(sizes)[9] == 1
    assert len({tuple(codes) for answers in alone for codes, _ in answers}) > 3


def test_what_fails_in_a_batch_fails_alone(pocket, monkeypatch):
    """The others of its batch are answered; those of a stream that has begun are told."""

    async def run(engine):
        generate = engine.model.generate

        def failing(**options):
            if (options["input_ids"] == marked).any():
                raise torch.cuda.OutOfMemoryError("not enough")
            return generate(**options)

        marked = engine.encoder.encoder.tokenizer(" circle").input_ids[-1]
        monkeypatch.setattr(engine.model, "generate", failing)
        wanted = [request(), request("is it a circle?"), request(), request("is it a circle?", stream=True), request()]
        return await asyncio.gather(*(answered(engine, each) for each in wanted), return_exceptions=True)

    async def all_of_it():
        async with started(pocket) as engine:
            return await run(engine)

    found = asyncio.run(all_of_it())
    assert found[0] == found[2] == found[4] and found[0][0][1]
    for error in (found[1], found[3]):
        assert isinstance(error, EngineError) and "OutOfMemoryError" in str(error)


def test_a_row_without_finite_probabilities_fails_and_the_others_go_on(pocket, monkeypatch):
    from latent_trl.generation.row_choices import RowChoices

    choose = RowChoices.choose

    def broken(self, logits, step, *says):
        logits = logits.clone()
        if len(logits) > 1 and step == 1:
            logits[-1] = torch.nan
        return choose(self, logits, step, *says)

    async def run():
        async with started(pocket) as engine:
            alone = await answered(engine, request())
            monkeypatch.setattr(RowChoices, "choose", broken)
            first = asyncio.ensure_future(answered(engine, request()))
            await asyncio.sleep(0.02)
            found = await asyncio.gather(*(answered(engine, request()) for _ in range(4)), return_exceptions=True)
            return alone, await first, found

    alone, first, found = asyncio.run(run())
    assert first == alone
    failed = [each for each in found if isinstance(each, EngineError)]
    assert len(failed) == 1 and "not finite" in str(failed[0])
    assert [each for each in found if each not in failed] == [alone] * 3


def test_nobody_waits_for_a_closed_answer(pocket):
    async def run():
        async with started(pocket) as engine:
            engine.ends = NEVER
            async with aclosing(engine.generate(request(max_tokens=400, stream=True))) as pieces:
                await anext(pieces)
                assert engine.load() == {"waiting": 0, "running": 1}
            waited = 0
            while engine.load()["running"]:
                await asyncio.sleep(0.01)
                waited += 1
            return waited, await answered(engine, request(max_tokens=2))

    waited, after = asyncio.run(run())
    assert waited < 100 and len(after[0][0]) == 2


def test_a_stopped_engine_fails_what_it_has_and_takes_no_more(pocket):
    async def run():
        engine = TransformersEngine(*pocket, max_batch_size=1)
        assert "not running" in engine.problem()
        await engine.start()
        assert engine.problem() is None
        engine.ends = NEVER
        waiting = [asyncio.ensure_future(answered(engine, request(max_tokens=300))) for _ in range(3)]
        while engine.load() != {"waiting": 2, "running": 1}:
            await asyncio.sleep(0.005)
        await engine.close()
        assert engine.problem()
        with pytest.raises((EngineError, RuntimeError)):
            await answered(engine, request())
        return await asyncio.gather(*waiting, return_exceptions=True)

    assert [str(error) for error in asyncio.run(run())] == ["The server is stopping."] * 3


@pytest.mark.parametrize(
    "wanted, said",
    [
        (request("why " * 600), "context is of 512"),
        (request(max_tokens=2000), "The longest answer has 1024 tokens here, not 2000."),
        (request(max_tokens=511), "answer may have 511"),
        (request("<image>"), "^`prompt`.*|.*visual token"),
    ],
)
def test_what_the_model_cannot_take_is_refused(pocket, wanted, said):
    async def run():
        async with started(pocket) as engine:
            await answered(engine, wanted)

    with pytest.raises(RequestError, match=said):
        asyncio.run(run())


def test_without_a_length_an_answer_may_take_all_positions(pocket):
    async def run():
        async with started(pocket) as engine:
            engine.ends = NEVER
            ((codes, _),) = await answered(engine, request(max_tokens=None))
            prompt = engine.encoder({"prompt": request().messages})
            return len(codes) + len(prompt.ids)

    assert asyncio.run(run()) == 512
