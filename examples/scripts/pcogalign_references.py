"""
Reference answers for PCogAlignBench, which is published without them: a strong vision-language model writes them.

    python examples/scripts/pcogalign_references.py --model Qwen/Qwen2.5-VL-72B-Instruct \
        --base-url http://localhost:8000/v1 --cache-dir outputs/references-cache --output outputs/pcogalign/references

The endpoint is any OpenAI-compatible one; the key is that of `OPENAI_API_KEY`. What was answered is kept in the cache
folder, so the command can be started again after a failure. Questions without an answer are left out, and counted.
"""

import argparse
import asyncio
import os
from pathlib import Path

from PIL import Image

from latent_trl.data.pcogalign import LOCATION_SETS, SOURCE, image_path, reference_request, unanswered, write_references
from latent_trl.rewards.images import image_url
from latent_trl.rewards.judge_cache import ReplyCache
from latent_trl.rewards.judge_client import JudgeCallError, JudgeClient

BATCH = 256


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="name of the model at the endpoint")
    parser.add_argument("--base-url", required=True, help="address of the endpoint")
    parser.add_argument("--output", required=True, help="folder to write to")
    parser.add_argument("--source", default=SOURCE, help="Hub id or folder (%(default)s)")
    parser.add_argument("--location-sets", nargs="+", default=list(LOCATION_SETS), choices=list(LOCATION_SETS))
    parser.add_argument("--cache-dir", help="where answers are kept")
    parser.add_argument("--limit", type=int, help="the first so many questions of each location set")
    parser.add_argument("--max-image-side", type=int, default=1024, help="in pixels (%(default)s)")
    parser.add_argument("--max-tokens", type=int, default=1024, help="of an answer (%(default)s)")
    parser.add_argument("--concurrency", type=int, default=16, help="requests at once (%(default)s)")
    parser.add_argument("--timeout", type=float, default=120.0, help="seconds for a request (%(default)s)")
    parser.add_argument("--max-retries", type=int, default=4, help="further attempts (%(default)s)")
    return parser.parse_args()


def conversation(folder: Path, instance: dict, where: str, args: argparse.Namespace) -> list[dict]:
    with Image.open(image_path(folder, instance, where)) as image:
        picture = {"type": "image_url", "image_url": {"url": image_url(image, args.max_image_side)}}
    request = {"type": "text", "text": reference_request(instance, where)}
    return [{"role": "user", "content": [picture, request]}]


async def answers(client: JudgeClient, conversations: list[list[dict]]) -> list[str | None]:
    async with client.session() as session:
        tasks = (session.ask(messages, {"type": "text"}, str.strip) for messages in conversations)
        found = await asyncio.gather(*tasks, return_exceptions=True)
    for error in found:
        if isinstance(error, BaseException) and not isinstance(error, JudgeCallError):
            raise error
    return [None if isinstance(answer, JudgeCallError) else answer for answer in found]


def main() -> None:
    args = parse()
    client = JudgeClient(
        model=args.model,
        base_url=args.base_url,
        api_key=os.environ.get("OPENAI_API_KEY") or "EMPTY",
        request={"temperature": 0.0, "max_tokens": args.max_tokens},
        concurrency=args.concurrency,
        timeout=args.timeout,
        max_retries=args.max_retries,
        retry_delay=1.0,
        max_retry_delay=60.0,
        cache=ReplyCache(args.cache_dir),
        structured=False,
    )
    for location_set in args.location_sets:
        folder, instances = unanswered(args.source, location_set)
        instances = instances[: args.limit]
        found: list[str | None] = []
        for start in range(0, len(instances), BATCH):  # so that few pictures are in memory
            batch = range(start, min(start + BATCH, len(instances)))
            conversations = [conversation(folder, instances[i], f"{location_set}: instance {i}", args) for i in batch]
            found += asyncio.run(answers(client, conversations))
        paths = write_references(args.output, location_set, instances, found)
        print(f"{location_set}: {found.count(None)} of {len(found)} without an answer {dict(client.stats.reasons)}")
        print("written:", *paths)


if __name__ == "__main__":
    main()
