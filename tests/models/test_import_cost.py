"""`import latent_trl` costs what `import torch` costs, and brings no model code with it."""

import json
import subprocess
import sys

import pytest

PROBE = """
import json, sys, time
import torch
start = time.perf_counter()
import latent_trl
spent = time.perf_counter() - start
names = latent_trl.__all__
print(json.dumps({"seconds": spent, "modules": sorted(sys.modules), "names": names}))
"""


@pytest.fixture(scope="module")
def probe():
    return json.loads(subprocess.run([sys.executable, "-c", PROBE], check=True, capture_output=True).stdout)


def test_the_package_imports_in_no_time(probe):
    assert probe["seconds"] < 0.3


def test_the_package_brings_no_trainer_and_no_model(probe):
    heavy = [m for m in probe["modules"] if m == "trl" or m.startswith(("trl.", "transformers.models.", "peft"))]
    assert not heavy


def test_every_public_name_loads(probe):
    import latent_trl

    for name in probe["names"]:
        assert getattr(latent_trl, name).__name__ == name
    with pytest.raises(AttributeError, match="no attribute 'Codebok'"):
        latent_trl.Codebok  # noqa: B018
    assert set(probe["names"]) <= set(dir(latent_trl))
