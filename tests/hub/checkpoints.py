"""Checkpoints that the tests of this folder share: tiny backbones saved as a Hub repository holds them."""

from pathlib import Path

import torch
from hub_server import HubServer, Repository
from tiny_models import FAMILIES, latent_config, perturb

from latent_trl import LatentActionModel
from latent_trl.hub.facts import CodebookReport, Evaluation, TrainingReport, TrainingRun

BASE = "ada/tiny-base"
REPO = "ada/tiny-latent-actions"


def files_of(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def serve(hub: HubServer, repo_id: str, files: dict[str, bytes], private: bool = False) -> Repository:
    """Puts a repository on the Hub by the back door."""
    repository = hub.repositories[repo_id] = Repository(private)
    repository.commit("main", files, "by the back door")
    return repository


def report() -> TrainingReport:
    history = [{"step": step, "loss": 2.0 / step, "reward": 0.1 * step, "codebook/used": 9.0} for step in range(1, 6)]
    run = TrainingRun(
        "Latent-action PPO",
        ["policy", "value_head"],
        {"datasets": ["ada/questions"], "rows": 1200},
        {"learning_rate": 3e-4, "seed": 0},
        history,
        ["exact_match"],
    )
    choices = [[1, 2, 2, 3], [3, 3, 1]]
    tokens = [["a", "|", "`", "<b>"], ["[c]", "d", "e"]]
    codebook = CodebookReport.from_choices(choices, 16, tokens, ["a | ` <b>", "[c] d e"], "2 held-out answers")
    figure = Evaluation("ada/questions", "exact_match", 0.75, low=0.7, high=0.8, interval="95 % over 5 seeds")
    return TrainingReport([run], codebook, [figure])


def make_base(folder: Path, family: str = "llava"):
    """A tiny backbone and its processor in `folder`."""
    tiny = FAMILIES[family]()
    tiny.model.save_pretrained(folder)
    tiny.processor.save_pretrained(folder)
    return tiny


def make_model(backbone) -> LatentActionModel:
    torch.manual_seed(4)
    model = LatentActionModel.from_backbone(backbone, latent_config()).eval()
    perturb(model)
    return model
