"""Depthwise convolutions by Triton agree with torch's, in Triton's interpreter, and are refused without a GPU."""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from cfusion.errors import ConfigError
from cfusion.models import depthwise as module
from cfusion.models.depthwise import choose_depthwise, depthwise

ROOT = Path(__file__).parents[2]


@pytest.mark.slow
def test_triton_gives_the_outputs_and_gradients_of_torch():
    """In a separate process: the interpreter must be asked for before anything imports Triton."""
    pytest.importorskip("triton", reason="triton is not installed")
    environment = {**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": f"{ROOT}:{os.environ.get('PYTHONPATH', '')}"}
    command = [sys.executable, str(ROOT / "tests" / "depthwise_by_triton.py")]
    ran = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert ran.returncode == 0, ran.stderr
    cases = json.loads(ran.stdout)
    assert len(cases) == 12
    for case, differences in cases.items():
        assert set(differences) - {"bias"} == {"output", "grid", "kernel"}
        tolerance = 1e-12 if "float64" in case else 1e-4
        assert max(differences.values()) < tolerance, case


def test_triton_is_refused_without_a_gpu_and_without_its_package(monkeypatch: pytest.MonkeyPatch):
    with pytest.raises(ConfigError, match=r"parallel\.depthwise=triton needs a GPU") as caught:
        choose_depthwise("triton", on_cpu=True)
    assert caught.value.remedy == "Set parallel.depthwise=torch."
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"the package triton is not installed"):
        choose_depthwise("triton", on_cpu=False)
    assert not module._by_triton


def test_a_cpu_uses_torch_even_if_triton_was_chosen(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(module, "_by_triton", True)
    assert depthwise(torch.ones(1, 3, 3, 2), torch.ones(2, 1, 3, 3), None)[0, 1, 1].tolist() == [9.0, 9.0]
