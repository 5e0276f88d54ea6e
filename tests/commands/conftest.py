"""A latent action model on the pocket VLM, fresh but for noise, saved once."""

from pathlib import Path

import pytest

POCKET = Path(__file__).parents[2] / "model_cards" / "pocket-vlm"


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory):
    pytest.importorskip("easy_vqa")
    import torch
    from tiny_models import latent_config, perturb
    from transformers import AutoModelForImageTextToText

    from latent_trl import LatentActionModel

    torch.manual_seed(0)
    backbone = AutoModelForImageTextToText.from_pretrained(POCKET, dtype="float32")
    model = LatentActionModel.from_backbone(backbone, latent_config())
    perturb(model, std=0.05)
    model.config.stage = "policy"
    folder = tmp_path_factory.mktemp("checkpoint") / "model"
    model.save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="session")
def plans(tmp_path_factory):
    """Plans on the pocket VLM that no one has trained: a folder with a chooser, and one without."""
    pytest.importorskip("easy_vqa")
    from transformers import AutoModelForImageTextToText

    from latent_trl import PlanConfig, PlanModel

    backbone = AutoModelForImageTextToText.from_pretrained(POCKET, dtype="float32")
    model = PlanModel(backbone, PlanConfig(num_plans=3, init_std=0.5))
    folder = tmp_path_factory.mktemp("plans")
    model.save_pretrained(folder / "bare")
    model.chooser_is_trained = True
    model.save_pretrained(folder / "chooser")
    return folder


@pytest.fixture
def picture(tmp_path):
    from PIL import Image

    Image.new("RGB", (64, 64), (200, 30, 30)).save(tmp_path / "red.png")
    return str(tmp_path / "red.png")
