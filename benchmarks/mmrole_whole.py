"""
MMRole from end to end on its real text, in minutes on two cores: SFT, RL with a judge and with an embedding reward,
judged evaluation and report, by `examples/scripts/mmrole.py` on the pocket VLM.

    python benchmarks/mmrole_whole.py FOLDER --output outputs/mmrole-whole

FOLDER is laid out as `YanqiDai/MMRole_dataset` is; where it has no pictures, some are drawn in their names. The judge
is a rule behind a server on loopback, and the embedder a bag of words: what is shown is that the pieces hold together
on the real text, not how good the answers are.
"""

import argparse
import json
import re
import runpy
import sys
import threading
import time
import zlib
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import torch
from PIL import Image

from latent_trl.rewards.embedding import EmbeddingSimilarityReward

ROOT = Path(__file__).parents[1]
REPLIES = re.compile(r"<(first|second)_reply>\n(.*?)\n</\1_reply>", re.DOTALL)


class RuleJudge(BaseHTTPRequestHandler):
    """Scores a reply by its number of different words."""

    def log_message(self, *args):
        pass

    def do_POST(self):
        request = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        content = request["messages"][1]["content"]
        text = content if isinstance(content, str) else content[-1]["text"]
        aspects = re.findall(r"^- (\w+):", request["messages"][0]["content"], re.MULTILINE)
        scores = {
            which: dict.fromkeys(aspects, min(10, 1 + len(set(reply.split())) // 8))
            for which, reply in REPLIES.findall(text)
        }
        message = {"role": "assistant", "content": json.dumps(scores)}
        choice = {"index": 0, "message": message, "finish_reason": "stop"}
        body = json.dumps({"id": "1", "object": "chat.completion", "choices": [choice]}).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)


def bag_of_words(texts: list[str]) -> torch.Tensor:
    """Counts of words `[N, 256]`, by their hash."""
    counts = torch.zeros(len(texts), 256)
    for row, text in zip(counts, texts, strict=True):
        row[0] = 1e-3
        for word in re.findall(r"\w+", text.lower()):
            row[zlib.crc32(word.encode()) % 256] += 1
    return counts


similarity = EmbeddingSimilarityReward(bag_of_words)


def with_pictures(folder: Path, output: Path) -> Path:
    """The folder itself, or one beside the output that has drawn pictures in the names of those that are missing."""
    if (folder / "images").is_dir():
        return folder
    made = output / "data"
    made.mkdir(parents=True, exist_ok=True)
    for name in ("dialogues", "profiles"):
        if not (made / name).exists():
            (made / name).symlink_to((folder / name).resolve())
    for path in (folder / "dialogues").glob("**/*comment*/*.json"):
        draw(path, made)
    draw(folder / "dialogues" / "out-of-distribution" / "comment.json", made)
    return made


def draw(path: Path, made: Path) -> None:
    for dialogue in json.loads(path.read_text(encoding="utf-8")):
        image = made / "images" / dialogue["image"]
        if not image.exists():
            image.parent.mkdir(parents=True, exist_ok=True)
            colour = zlib.crc32(dialogue["image"].encode())
            Image.new("RGB", (64, 64), (colour & 255, colour >> 8 & 255, colour >> 16 & 255)).save(image)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="MMRole's dialogues and profiles")
    parser.add_argument("--output", type=Path, default=Path("outputs/mmrole-whole"), help="(%(default)s)")
    parser.add_argument("--limit", type=int, default=16, help="dialogues of each split (%(default)s)")
    parser.add_argument("--steps", type=int, default=2, help="updates of SFT and of each RL run (%(default)s)")
    args = parser.parse_args()
    server = ThreadingHTTPServer(("127.0.0.1", 0), RuleJudge)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    judge = {"model": "rule", "base_url": f"http://127.0.0.1:{server.server_address[1]}/v1"}
    sft = {"max_steps": args.steps, "per_device_train_batch_size": 4, "max_length": 4096, "use_cpu": True}
    sft |= {"save_strategy": "no", "disable_tqdm": True, "bf16": False}
    words = ["--config", str(ROOT / "examples" / "configs" / "mmrole.yaml"), "--profile=condensed"]
    words += [f"--dataset_name={with_pictures(args.folder, args.output)}", f"--limit={args.limit}"]
    words += ["--processor_kwargs={}", f"--judge_kwargs={json.dumps(judge)}", f"--sft_kwargs={json.dumps(sft)}"]
    words += [f"--max_steps={args.steps}", "--per_device_train_batch_size=8", "--num_generations=4", "--generations=1"]
    words += ["--max_completion_length=16", "--bf16=false", "--use_cpu=true", "--disable_tqdm=true", "--dtype=float32"]
    space = str(ROOT / "model_cards" / "pocket-vlm-latent-actions")
    runs = (
        ("judge", space, ["--stages", "sft", "rl", "evaluate"]),
        ("similarity", str(args.output / "judge" / "sft"), ["--stages", "rl", "evaluate"]),
    )
    for name, start, stages in runs:
        begun = time.perf_counter()
        reward = "judge" if name == "judge" else f"{Path(__file__).stem}:similarity"
        own = [f"--output_dir={args.output / name}", f"--model_name_or_path={start}", "--reward_funcs", reward]
        sys.argv = ["mmrole.py", *words, *own, *stages]
        runpy.run_path(str(ROOT / "examples" / "scripts" / "mmrole.py"), run_name="__main__")
        print(f"\nReward {name}: {', '.join(stages[1:])} in {time.perf_counter() - begun:.0f} s")
        print((args.output / name / "evaluation" / "report.md").read_text(encoding="utf-8"))


if __name__ == "__main__":
    main()
