"""A small GRPO run with rollouts from servers, for `accelerate launch`: `served_run.py MODEL OUTPUT URL...`."""

import sys
import time
from pathlib import Path

import torch

TESTS = Path(__file__).parents[1]
sys.path[:0] = [str(TESTS), str(TESTS / "trainer")]

from every_trainer import letters  # noqa: E402
from rl_models import prompts  # noqa: E402
from tiny_models import make_tokenizer  # noqa: E402

from latent_trl import LatentActionGRPOConfig, LatentActionGRPOTrainer, LatentActionModel  # noqa: E402

# Each rollout batch serves two steps: they are made before the steps 0, 2, 4 and 6.
STEPS = 8


def main(model: str, output: str, *urls: str) -> None:
    """Before a step the first process writes its number, and waits while there is a file `hold-STEP` in `output`."""
    torch.set_num_threads(1)
    folder = Path(output)
    args = LatentActionGRPOConfig(
        str(folder / "run"),
        use_cpu=True,
        bf16=False,
        use_vllm=True,
        vllm_mode="server",
        vllm_server_hosts=list(urls),
        vllm_server_timeout=240.0,
        per_device_train_batch_size=4,
        steps_per_generation=2,
        num_generations=4,
        max_completion_length=5,
        learning_rate=1e-3,
        max_steps=STEPS,
        logging_steps=1,
        save_strategy="no",
        disable_tqdm=True,
    )
    trainer = LatentActionGRPOTrainer(
        LatentActionModel.from_pretrained(model, dtype=torch.float32),
        letters,
        args,
        train_dataset=prompts(20),
        processing_class=make_tokenizer(),
    )
    step = trainer.training_step

    def watched(*arguments, **options):
        number = trainer.state.global_step
        if trainer.accelerator.is_main_process:
            (folder / f"step-{number}").touch()
            while (folder / f"hold-{number}").exists():
                time.sleep(0.05)
        return step(*arguments, **options)

    trainer.training_step = watched
    trainer.train()
    result = {"weights": {name: p.detach() for name, p in trainer.model.named_parameters()}}
    result["servers"] = [row["engine/sync_servers"] for row in trainer.state.log_history if "reward" in row]
    torch.save(result, folder / f"result_{trainer.accelerator.process_index}.pt")


if __name__ == "__main__":
    main(*sys.argv[1:])
