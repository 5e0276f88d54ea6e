"""Packaging of latent_trl: what it needs, and the ranges that were tested."""

from pathlib import Path

from setuptools import find_packages, setup

ROOT = Path(__file__).parent
VERSION = "0.1.0"

INSTALL_REQUIRES = [
    "torch>=2.6,<2.14",
    "transformers>=5.20,<5.24",
    "trl>=1.15,<1.17",
    "peft>=0.19,<0.22",
    "accelerate>=1.12,<1.16",
    "datasets>=4.4,<5.3",
    "huggingface_hub>=2.0,<2.5",
    "safetensors>=0.6,<0.9",
    "pillow>=11,<14",
    "filelock>=3.13",
    "numpy>=1.26",
    "rich>=13,<16",
    "tqdm>=4.66",
]

EXTRAS = {
    "quantization": ["bitsandbytes>=0.49,<0.51"],
    "judge": ["openai>=1.60"],
    "demo": [
        "easy-vqa==1.0",
        "chitchat-dataset==0.9.0",
        "matplotlib>=3.8",
        "jinja2>=3.1",
    ],
    "bench": ["evaluate>=0.4.5,<0.5", "matplotlib>=3.8", "scikit-learn>=1.4"],
}
EXTRAS["dev"] = [
    *EXTRAS["demo"],
    *EXTRAS["bench"],
    *EXTRAS["quantization"],
    *EXTRAS["judge"],
    "hypothesis>=6.100",
    "mypy>=1.15,<3",
    "pytest>=8,<10",
    "pytest-xdist>=3.6,<4",
    "ruff>=0.8",
    "tensorboard>=2.16",
]

setup(
    name="latent_trl",
    version=VERSION,
    description="Reinforcement learning of vision-language models over learned latent actions, in the TRL style.",
    long_description=(ROOT / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    python_requires=">=3.10",
    packages=find_packages(include=["latent_trl", "latent_trl.*"]),
    package_data={"latent_trl": ["py.typed", "**/*.j2", "**/*.json", "**/*.md"]},
    install_requires=INSTALL_REQUIRES,
    extras_require=EXTRAS,
    entry_points={"console_scripts": ["latent-trl=latent_trl.commands.main:main"]},
)
