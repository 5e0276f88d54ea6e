"""Thousands of cases of every test of this folder, none unexplained."""

import subprocess
import sys
from pathlib import Path

import pytest


@pytest.mark.slow
def test_thousands_of_cases():
    command = [sys.executable, "-m", "pytest", str(Path(__file__).parent), "-q", "-m", "not slow"]
    run = subprocess.run([*command, "--hypothesis-profile=thousands"], capture_output=True, text=True)
    print(run.stdout[-500:])
    assert run.returncode == 0, run.stdout[-5000:]
