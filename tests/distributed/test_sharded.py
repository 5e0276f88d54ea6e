"""A model that FSDP2 shards over two CPU processes: it is loaded, learns, generates, and is gathered whole."""

import sys
from pathlib import Path

import pytest
import torch
from accelerate import debug_launcher
from tiny_models import latent, latent_config

sys.path[:0] = [str(Path(__file__).parent.parent / "trainer")]

from learning_runs import text_rows  # noqa: E402

from latent_trl.data.collator import LatentActionDataCollator  # noqa: E402
from latent_trl.trainer.run.component_training import load_components  # noqa: E402
from latent_trl.trainer.space.objective import LatentActionSpaceObjective  # noqa: E402


def make():
    model, tiny = latent("llama", latent_config(use_projector=False))
    return model, LatentActionDataCollator(tiny.processor)(text_rows(2))


def sharded(folder: str) -> None:
    torch.set_num_threads(1)
    from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method

    model, batch = make()
    with torch.no_grad():
        for parameter in model.policy.parameters():
            parameter.add_(1.0)
    mesh = init_device_mesh("cpu", (2,))
    fully_shard(model.policy, mesh=mesh)
    fully_shard(model, mesh=mesh)
    load_components(model, folder)
    losses = {}
    for stage in ("inverse_dynamics", "policy"):
        loss = model(objective=LatentActionSpaceObjective(stage), batch=batch).loss
        loss.backward()
        losses[stage] = loss.item()
    register_fsdp_forward_method(model, "generate")
    ids = batch["input_ids"][:, :4]
    with torch.no_grad():
        out = model.generate(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=4,
            action_do_sample=False,
            return_dict_in_generate=True,
        )
    whole = get_model_state_dict(model, options=StateDictOptions(full_state_dict=True, cpu_offload=True))
    if torch.distributed.get_rank() == 0:
        torch.save({"losses": losses, "codes": out.action_ids, "weights": whole}, Path(folder) / "result.pt")


@pytest.mark.slow
@pytest.mark.distributed
def test_a_sharded_model_is_the_whole_one(tmp_path):
    model, batch = make()
    model.save_pretrained(tmp_path)
    debug_launcher(sharded, (str(tmp_path),), num_processes=2)
    result = torch.load(tmp_path / "result.pt", weights_only=True)
    own = model.state_dict()
    assert all(torch.allclose(tensor, own[name], atol=1e-6) for name, tensor in result["weights"].items())
    for stage, loss in result["losses"].items():
        assert model(objective=LatentActionSpaceObjective(stage), batch=batch).loss.item() == pytest.approx(
            loss, abs=1e-4
        )
    ids = batch["input_ids"][:, :4]
    options = {"max_new_tokens": 4, "action_do_sample": False, "return_dict_in_generate": True}
    out = model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), **options)
    assert torch.equal(out.action_ids, result["codes"])
