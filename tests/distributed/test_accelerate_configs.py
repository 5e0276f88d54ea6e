"""The committed configurations: each of a GPU has a variant of the CPU, which the tests run, with the same settings."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from engines import CONFIG_OF, CONFIGS, DEEPSPEED, has_deepspeed

ROOT = Path(__file__).parents[2]
# What a variant of the CPU may have otherwise.
OWN = {"num_processes", "mixed_precision", "gpu_ids"}


def settings(path: Path) -> dict:
    return yaml.safe_load(path.read_text())


@pytest.mark.parametrize("name", sorted(path.name for path in CONFIGS.glob("*.yaml") if path.stem != "single_gpu"))
def test_the_variant_that_is_run_has_the_settings_of_the_other(name):
    gpu, cpu = settings(CONFIGS / name), settings(CONFIGS / "cpu" / name)
    assert {k: v for k, v in gpu.items() if k not in OWN} == {k: v for k, v in cpu.items() if k not in OWN}
    assert cpu["num_processes"] == 2 and cpu["mixed_precision"] == "no" and gpu["mixed_precision"] == "bf16"


def test_every_variant_is_of_an_engine_that_is_run():
    assert sorted(CONFIG_OF.values()) == sorted((CONFIGS / "cpu").glob("*.yaml"))


@pytest.mark.slow
@pytest.mark.distributed
@pytest.mark.parametrize("engine", CONFIG_OF)
def test_the_command_line_starts_itself_with_a_configuration(engine, tmp_path):
    """`latent-trl grpo --accelerate_config FILE`, as users start it, where processes let engines run on the CPU."""
    if engine in DEEPSPEED and not has_deepspeed():
        pytest.skip("DeepSpeed is not installed")
    from tiny_models import latent, latent_config

    model, tiny = latent("llama", latent_config(use_projector=False, stage="policy"))
    model.backbone.save_pretrained(tmp_path / "backbone")
    model.config.base_model_name_or_path = str(tmp_path / "backbone")
    model.save_pretrained(tmp_path / "model")
    tiny.processor.save_pretrained(tmp_path / "model")
    rows = [json.dumps({"prompt": f"what is {i}?"}) for i in range(8)]
    (tmp_path / "rows.jsonl").write_text("\n".join(rows))
    # Python reads it when a process starts.
    shadow = tmp_path / "shadow"
    shadow.mkdir()
    (shadow / "sitecustomize.py").write_text(
        f"import sys; sys.path[:0] = [{str(ROOT / 'tests')!r}, {str(Path(__file__).parent)!r}]\n"
        "import os\n"
        "if 'LOCAL_RANK' in os.environ:\n"
        "    from engines import let_engines_run_on_the_cpu; let_engines_run_on_the_cpu()\n"
    )
    options = {
        "save_steps": 2,
        "model_name_or_path": tmp_path / "model",
        "dataset_name": tmp_path / "rows.jsonl",
        "reward_funcs": "length",
        "reward_kwargs": json.dumps({"length": {"target": 4}}),
        "output_dir": tmp_path / "run",
        "max_steps": 2,
        "per_device_train_batch_size": 2,
        "num_generations": 2,
        "max_completion_length": 4,
        "use_cpu": "true",
        "bf16": "false",
        "report_to": "none",
        "accelerate_config": CONFIG_OF[engine],
        "main_process_port": "29511",
    }
    words = [str(word) for name, value in options.items() for word in (f"--{name}", value)]
    environment = {
        **os.environ,
        "ACCELERATE_USE_CPU": "true",
        "DS_ACCELERATOR": "cpu",
        "DS_BUILD_OPS": "0",
        "PYTHONPATH": os.pathsep.join([str(shadow), str(ROOT)]),
    }
    command = [sys.executable, "-m", "latent_trl", "grpo", *words]
    run = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=900)
    assert run.returncode == 0, run.stdout[-2000:] + run.stderr[-4000:]
    record = json.loads((tmp_path / "run" / "checkpoint-2" / "engine.json").read_text())
    names = {"ddp": "one process or DDP", "fsdp2": "FSDP2", "zero2": "DeepSpeed ZeRO-2", "zero3": "DeepSpeed ZeRO-3"}
    assert record == {"engine": names[engine], "processes": 2}
