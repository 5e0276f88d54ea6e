"""`latent-trl env`: versions and devices, for bug reports."""

import argparse
import os
import platform
from importlib.metadata import PackageNotFoundError, version

from .arguments import CommandParser

PACKAGES = (
    "latent_trl",
    "torch",
    "transformers",
    "trl",
    "peft",
    "accelerate",
    "datasets",
    "huggingface_hub",
    "safetensors",
    "tokenizers",
    "numpy",
    "pillow",
    "bitsandbytes",
    "deepspeed",
    "openai",
    "matplotlib",
)
SETTINGS = ("HF_HUB_OFFLINE", "HF_ENDPOINT", "HF_HOME", "ACCELERATE_USE_CPU", "CUDA_VISIBLE_DEVICES", "OMP_NUM_THREADS")


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = CommandParser(prog="latent-trl env", description="Versions and devices, to copy into an issue.")
    return parser.parse_args(argv)


def package_version(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:
        return "not installed"


def devices() -> str:
    try:
        import torch
    except ImportError:
        return "torch is not installed"
    if not torch.cuda.is_available():
        return f"CPU, {os.cpu_count()} cores, {torch.get_num_threads()} threads of torch"
    names = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    return f"{', '.join(names)} (CUDA {torch.version.cuda})"


def main(argv: list[str] | None = None) -> int:
    parse(argv)
    from .loading import REWARDS, TRL_REWARD_MAKERS, TRL_REWARDS

    rows = {name: package_version(name) for name in PACKAGES}
    rows |= {"Python": platform.python_version(), "platform": platform.platform(), "devices": devices()}
    rows |= {name: os.environ[name] for name in SETTINGS if name in os.environ}
    rows["rewards by name"] = ", ".join(sorted([*REWARDS, *TRL_REWARDS, *TRL_REWARD_MAKERS]))
    width = max(map(len, rows))
    for name, value in rows.items():
        print(f"- {name + ':':<{width + 1}} {value}")
    return 0
