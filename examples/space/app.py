"""A Space: the window on the codes of a latent action model, before and after RL."""

import os

from latent_trl import LatentActionModel
from latent_trl.commands.loading import load_processor, load_rewards
from latent_trl.commands.rows import load_rows
from latent_trl.data.reading import OpenedRows
from latent_trl.studio.app import STYLE, build
from latent_trl.studio.explorer import Explorer

# Folders or repositories, the one to show first.
MODELS = os.environ.get(
    "LATENT_TRL_MODELS", "model_cards/pocket-vlm-latent-actions-grpo model_cards/pocket-vlm-latent-actions"
).split()


def explorer(name: str) -> Explorer:
    model = LatentActionModel.from_pretrained(name)
    return Explorer(model, load_processor(model))


def read(file: str) -> OpenedRows:
    return OpenedRows(load_rows(file, purpose="prompts"), name="file")


app = build(
    {name.rsplit("/", 1)[-1]: explorer(name) for name in MODELS},
    rewards={"exact_match": load_rewards("exact_match")[0]},
    read=read,
)

if __name__ == "__main__":
    app.launch(css=STYLE)
