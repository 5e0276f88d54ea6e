"""
`latent-trl serve` under many clients at once, on loopback: pictures and text, answers whole and streamed, broken
requests, and clients that hang up.

    python benchmarks/serving.py --json serving.json        # 64 clients, 3 minutes
    python benchmarks/serving.py --engine vllm              # the same by an engine of vLLM
    python benchmarks/serving.py --seconds 10 --clients 8   # to see that it runs

Each answer is compared with the one that the model gives to the same request alone, in this process: text and codes.
Requests differ in forced codes, laws and seeds, so that an answer that reaches another client is seen. An engine of
vLLM has other random numbers, so that there every request is greedy. The clients' own work is done on the same
machine, and is in the figures. Latencies are those of answers that were awaited in full.
"""

import argparse
import asyncio
import base64
import contextlib
import io
import json
import os
import random
import re
import signal
import subprocess
import sys
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import torch
from measuring import facts, table, write
from openai import APIStatusError, AsyncOpenAI
from PIL import Image

from latent_trl.commands.loading import load_model, load_processor
from latent_trl.data.prompts import encode_prompts
from latent_trl.data.shapes import shape_questions
from latent_trl.generation.answers import end_tokens

MODEL = "model_cards/pocket-vlm-latent-actions-grpo"
TEXTS = ("hello, how are you?", "what is your name?", "tell me a story", "what color is it?", "is it a circle?")
MAX_TOKENS = 24


@dataclass
class Case:
    """A request, and what the model alone answers: texts and codes of its `n` answers."""

    body: dict[str, Any]
    texts: list[str] = field(default_factory=list)
    action_ids: list[list[int]] = field(default_factory=list)


@dataclass
class Load:
    """What clients saw."""

    answers: int = 0
    tokens: int = 0
    seconds: float = 0.0
    refused: Counter = field(default_factory=Counter)
    hung_up: int = 0
    wrong: list[str] = field(default_factory=list)
    latencies: list[float] = field(default_factory=list)
    first_tokens: list[float] = field(default_factory=list)
    memory: list[float] = field(default_factory=list)
    cpu: list[float] = field(default_factory=list)


def make_cases(model: Any, processor: Any, count: int, name: str, seed: int = 0, greedy: bool = False) -> list[Case]:
    """
    Conversations with and without pictures, each with a law, forced codes or a seed, and the model's own answers; with
    `greedy` none is sampled.
    """
    draw = random.Random(seed)
    questions = shape_questions("test")
    cases = []
    for place in range(count):
        row = questions[place % len(questions)]
        picture = place % 3 != 2
        text = row["prompt"][-1]["content"] if picture else draw.choice(TEXTS)
        actions: dict[str, Any] = {}
        if place % 2:
            actions["forced"] = [draw.choice([-1, draw.randrange(model.config.num_codes)]) for _ in range(3)]
        if place % 5 == 0:
            actions |= {"bias": {str(draw.randrange(model.config.num_codes)): 2.5}, "banned": [draw.randrange(128)]}
        body: dict[str, Any] = {"model": name, "max_completion_tokens": MAX_TOKENS, "temperature": 0, "n": 1}
        if place % 4 == 3 and not greedy:
            body |= {"temperature": draw.choice([0.8, 1.3]), "top_p": 0.95, "seed": place, "n": draw.choice([1, 2])}
        body |= {"messages": [{"role": "user", "content": text}], "latent_actions": actions}
        case = Case(body)
        image = row["images"][0] if picture else None
        if image is not None:
            part = {"type": "image_url", "image_url": {"url": data_url(image)}}
            body["messages"] = [{"role": "user", "content": [part, {"type": "text", "text": text}]}]
        answer_alone(model, processor, case, text, image)
        cases.append(case)
    return cases


def answer_alone(model: Any, processor: Any, case: Case, text: str, image: Image.Image | None) -> None:
    """What the model's own `generate` answers to the request, in a batch of its own."""
    body, actions = case.body, case.body["latent_actions"]
    row: dict[str, Any] = {"prompt": [{"role": "user", "content": text}], "images": [] if image is None else [image]}
    inputs = {k: v.to(model.device) for k, v in encode_prompts(processor, [row]).items()}
    bias = torch.zeros(model.config.num_codes)
    for code, value in actions.get("bias", {}).items():
        bias[int(code)] = value
    bias[actions.get("banned", [])] = -torch.inf
    sampled = body["temperature"] > 0
    forced = actions.get("forced")
    ends = end_tokens(model, processor.tokenizer, {})
    output = model.generate(
        **inputs,
        max_new_tokens=MAX_TOKENS,
        num_return_sequences=body["n"],
        action_do_sample=sampled,
        action_temperature=body["temperature"] or None,
        action_top_p=body.get("top_p"),
        action_generator=torch.Generator(model.device).manual_seed(body["seed"]) if sampled else None,
        action_bias=bias,
        forced_action_ids=None if forced is None else torch.tensor([forced] * body["n"]),
        eos_token_id=ends,
        return_dict_in_generate=True,
    )
    start = inputs["input_ids"].shape[1]
    for ids, codes in zip(output.sequences[:, start:].tolist(), output.action_ids.tolist(), strict=True):
        length = next((i + 1 for i, token in enumerate(ids) if token in ends), len(ids))
        case.texts.append(processor.tokenizer.decode(ids[:length], skip_special_tokens=True))
        case.action_ids.append(codes[:length])


def data_url(image: Image.Image) -> str:
    file = io.BytesIO()
    image.save(file, "PNG")
    return f"data:image/png;base64,{base64.b64encode(file.getvalue()).decode()}"


def broken(body: dict[str, Any], draw: random.Random) -> tuple[int, bytes]:
    """A request that is wrong in one way, and the status that says so."""

    def with_url(url: str) -> dict[str, Any]:
        parts = [{"type": "image_url", "image_url": {"url": url}}]
        return {**body, "messages": [{"role": "user", "content": parts}]}

    truncated = data_url(Image.effect_noise((64, 64), 60))[:400]
    status, content = draw.choice(
        [
            (400, {**body, "frequency": 1}),
            (400, {**body, "logprobs": True}),
            (400, {**body, "latent_actions": {"forced": [10**6]}}),
            (400, {**body, "messages": []}),
            (400, {**body, "max_completion_tokens": 10**6}),
            (400, with_url("/etc/passwd")),
            (400, with_url("http://127.0.0.1:9/a.png")),
            (400, with_url(truncated)),
            (400, with_url("data:image/png;base64,????")),
            (404, {**body, "model": "another"}),
            (400, None),
        ]
    )
    return status, b'{"model": "' if content is None else json.dumps(content).encode()


class Clients:
    """
    Clients of a server.

    Args:
        url (`str`): Such as `http://127.0.0.1:8000/v1`.
        cases (`list[Case]`): What they ask.
        seed (`int`, defaults to `0`): Of what they do next.
        pid (`int`, *optional*): The server's process, whose memory is watched.
    """

    def __init__(self, url: str, cases: list[Case], seed: int = 0, pid: int | None = None):
        self.url, self.cases, self.draw, self.pid, self.load = url, cases, random.Random(seed), pid, Load()
        self.openai = AsyncOpenAI(base_url=url, api_key="none", max_retries=0, timeout=120)
        self.plain = httpx.AsyncClient(limits=httpx.Limits(max_connections=256), timeout=120)

    async def run(self, count: int, seconds: float) -> Load:
        start = time.perf_counter()
        watch = asyncio.ensure_future(self._watch())
        await asyncio.gather(*(self._client(start + seconds) for _ in range(count)))
        self.load.seconds = time.perf_counter() - start
        watch.cancel()
        await self.openai.close()
        await self.plain.aclose()
        return self.load

    async def _client(self, until: float) -> None:
        while time.perf_counter() < until:
            case, kind = self.draw.choice(self.cases), self.draw.random()
            try:
                if kind < 0.1:
                    await self._broken(case)
                elif kind < 0.2:
                    await self._hang_up(case)
                elif kind < 0.6:
                    await self._streamed(case)
                else:
                    await self._whole(case)
            except Exception as error:
                said = error.response.text if isinstance(error, APIStatusError) else str(error)
                self.load.wrong.append(f"{type(error).__name__}: {said[:200]}")

    async def _broken(self, case: Case) -> None:
        status, content = broken(case.body, self.draw)
        headers = {"content-type": "application/json"}
        reply = await self.plain.post(f"{self.url}/chat/completions", content=content, headers=headers)
        self.load.refused[reply.status_code] += 1
        if reply.status_code != status or not reply.json()["error"]["message"]:
            self.load.wrong.append(f"{content[:80]!r} got {reply.status_code}, not {status}: {reply.text[:200]}")

    async def _hang_up(self, case: Case) -> None:
        """Closes the connection after a while, before or amid the answer."""
        body = {**case.body, "stream": self.draw.random() < 0.5}
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(self.draw.uniform(0.001, 0.3)):
                async with self.plain.stream("POST", f"{self.url}/chat/completions", json=body) as reply:
                    async for _ in reply.aiter_bytes():
                        if self.draw.random() < 0.3:
                            break
        self.load.hung_up += 1

    async def _whole(self, case: Case) -> None:
        start = time.perf_counter()
        reply = await self.openai.chat.completions.create(**_as_arguments(case.body))
        self._ended(start)
        choices = sorted(reply.choices, key=lambda choice: choice.index)
        codes = [choice.latent_actions["ids"] for choice in choices]
        self._check(case, [choice.message.content for choice in choices], codes, reply.usage.completion_tokens)

    async def _streamed(self, case: Case) -> None:
        start, first, usage = time.perf_counter(), True, None
        texts, codes = ["" for _ in case.texts], [[] for _ in case.texts]
        options = {"stream": True, "stream_options": {"include_usage": True}}
        async for chunk in await self.openai.chat.completions.create(**_as_arguments(case.body), **options):
            if first:
                self.load.first_tokens.append(time.perf_counter() - start)
                first = False
            for choice in chunk.choices:
                texts[choice.index] += choice.delta.content
                codes[choice.index] += choice.latent_actions["ids"]
            usage = chunk.usage or usage
        self._ended(start)
        self._check(case, texts, codes, usage.completion_tokens)

    def _ended(self, start: float) -> None:
        self.load.latencies.append(time.perf_counter() - start)

    def _check(self, case: Case, texts: list[str], codes: list[list[int]], tokens: int) -> None:
        self.load.answers += 1
        self.load.tokens += tokens
        if texts != case.texts or codes != case.action_ids or tokens != sum(map(len, codes)):
            self.load.wrong.append(f"answered {texts} by {codes}, alone {case.texts} by {case.action_ids}")

    async def _watch(self) -> None:
        while self.pid is not None:
            status = Path(f"/proc/{self.pid}/status").read_text()
            self.load.memory.append(int(re.search(r"VmRSS:\s+(\d+)", status)[1]) / 1024)
            user, system = Path(f"/proc/{self.pid}/stat").read_text().rpartition(")")[2].split()[11:13]
            self.load.cpu.append((int(user) + int(system)) / os.sysconf("SC_CLK_TCK"))
            await asyncio.sleep(1)


def _as_arguments(body: dict[str, Any]) -> dict[str, Any]:
    """The body as arguments of the `openai` client."""
    own = {key: value for key, value in body.items() if key != "latent_actions"}
    return {**own, "extra_body": {"latent_actions": body["latent_actions"]}}


@contextlib.contextmanager
def served(model: str, engine: str, log: Path):
    """`latent-trl serve` in a process of its own: its address and process id."""
    words = [sys.executable, "-m", "latent_trl", "serve", model, "--engine", engine, "--port", "0"]
    words += ["--served-model-name", "model"]
    with log.open("wb") as out:
        process = subprocess.Popen(words, stdout=out, stderr=subprocess.STDOUT)
    try:
        for _ in range(1200):
            found = re.search(r"http://\S+/v1", log.read_text())
            if found:
                break
            if process.poll() is not None:
                raise SystemExit(f"The server stopped: {log.read_text()[-2000:]}")
            time.sleep(0.1)
        yield found[0], process.pid
    finally:
        process.send_signal(signal.SIGINT)
        process.wait(30)


def main(argv: list[str] | None = None) -> dict[str, Any]:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--model", default=MODEL)
    parser.add_argument("--engine", choices=["transformers", "vllm"], default="transformers")
    parser.add_argument("--clients", type=int, default=64)
    parser.add_argument("--seconds", type=float, default=180)
    parser.add_argument("--cases", type=int, default=120, help="different requests")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args(argv)
    torch.set_num_threads(1)
    model = load_model(args.model).eval()
    cases = make_cases(model, load_processor(model), args.cases, "model", greedy=args.engine == "vllm")
    log = Path(os.environ.get("TMPDIR", "/tmp")) / f"latent-trl-serve-{os.getpid()}.log"
    with served(args.model, args.engine, log) as (url, pid):
        asyncio.run(Clients(url, cases, seed=1).run(args.clients, min(5, args.seconds)))
        load = asyncio.run(Clients(url, cases, pid=pid).run(args.clients, args.seconds))
    result = summary(load, args)
    for line in load.wrong[:10]:
        print(line)
    print(table(["figure", "value"], [[name, value] for name, value in result["figures"].items()]))
    if args.json:
        write(args.json, result)
    return result


def at_times(values: list[float]) -> list[tuple[int, list[float]]]:
    """The values around a quarter, half, three quarters and the end of the time."""
    around = max(1, len(values) // 10)
    ends = [(q, max(around, len(values) * q // 100)) for q in (25, 50, 75, 100)]
    return [(q, values[end - around : end]) for q, end in ends]


def summary(load: Load, args: argparse.Namespace) -> dict[str, Any]:
    latencies, first = np.array(load.latencies), np.array(load.first_tokens)
    figures = {
        "answers": load.answers,
        "answers that differ, or failed": len(load.wrong),
        "broken requests": sum(load.refused.values()),
        "clients that hung up": load.hung_up,
        "answers a second": load.answers / load.seconds,
        "tokens a second": load.tokens / load.seconds,
        "answers a CPU second of the server": load.answers / max(0.01, load.cpu[-1] - load.cpu[0]),
        **{f"latency, {q} % (s)": float(np.percentile(latencies, q)) for q in (50, 95, 99)},
        **{f"first token, {q} % (s)": float(np.percentile(first, q)) for q in (50, 95, 99)},
        **{f"memory, {q} % of the time (MiB)": float(np.mean(part)) for q, part in at_times(load.memory)},
        "memory, most (MiB)": max(load.memory),
    }
    return {"facts": facts(torch.device("cpu")), "clients": args.clients, "seconds": args.seconds, "figures": figures}


if __name__ == "__main__":
    main()
