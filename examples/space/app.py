"""A Space: the window on the codes of a latent action model, before and after RL."""

import os

from latent_trl import LatentActionModel
from latent_trl.commands.loading import load_processor
from latent_trl.studio.app import STYLE, build
from latent_trl.studio.explorer import Explorer

# Folders or repositories, the one to show first.
MODELS = os.environ.get(
    "LATENT_TRL_MODELS", "model_cards/pocket-vlm-latent-actions-grpo model_cards/pocket-vlm-latent-actions"
).split()


def explorer(name: str) -> Explorer:
    model = LatentActionModel.from_pretrained(name)
    return Explorer(model, load_processor(model))


app = build({name.rsplit("/", 1)[-1]: explorer(name) for name in MODELS})

if __name__ == "__main__":
    app.launch(css=STYLE)
