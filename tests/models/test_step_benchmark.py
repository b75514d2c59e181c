"""The benchmark of a training step runs both sides and counts what it says."""

import json
import sys

import pytest
import torch

from benchmarks import model_step, rivals
from benchmarks.arithmetic import CORRECTED, operations
from benchmarks.table import Row, present


@pytest.mark.parametrize("side", model_step.SIDES)
def test_both_sides_are_measured(side: str):
    found = model_step.measure(side, 64, "cpu", repeats=1, optimizer=side == "default")
    assert found["seconds"] > 0
    assert found["peak"] > 0.1


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU here")
def test_a_missing_gpu_is_reported_at_once(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["model_step", "--quick", "--device", "cuda"])
    with pytest.raises(SystemExit):
        model_step.main()
    assert "--device cuda: torch sees no GPU here" in capsys.readouterr().err


def test_operations_are_those_of_the_matrix_products():
    small, large = model_step.flops(1024), model_step.flops(4096)
    # Attention is quadratic in tiles, all else linear.
    assert 4 < large / small < 16
    with torch.device("meta"):
        parameters = sum(p.numel() for p in model_step.build("default").parameters() if p.dim() == 2)
    assert small > 6 * parameters * 1024 / 16


def test_a_depthwise_convolution_counts_what_its_definition_multiplies():
    convolution = torch.nn.Conv2d(16, 16, 7, padding=3, groups=16, bias=False, device="meta")
    values = torch.empty(1, 16, 10, 10, device="meta", requires_grad=True)
    assert operations(lambda: convolution(values).sum().backward()) == 3 * 2 * 16 * 49 * 100


def test_attention_counts_two_products_forward_and_four_backward():
    shape = (1, 4, 100, 8)
    once = 2 * 4 * 100 * 100 * 8
    backward = CORRECTED[torch.ops.aten._scaled_dot_product_flash_attention_backward]
    assert backward(shape, shape, shape, shape, None, out_shape=None) == 4 * once


def test_rows_are_shown_and_saved_with_ratios_above_one_where_ours_is_better(tmp_path, capsys):
    rows = [Row("one", 1.0, 4.0, "s", "lower"), Row("two", 3.0, None, "GB"), Row("three", 5.0, 4.0, "bags/s")]
    present("Title", rows, tmp_path / "rows.json")
    shown = capsys.readouterr().out
    assert "Title" in shown
    assert "1.25" in shown
    assert json.loads((tmp_path / "rows.json").read_text()) == [
        {"case": "one", "ours": 1.0, "theirs": 4.0, "ratio": 4.0, "unit": "s"},
        {"case": "two", "ours": 3.0, "theirs": None, "ratio": None, "unit": "GB"},
        {"case": "three", "ours": 5.0, "theirs": 4.0, "ratio": 1.25, "unit": "bags/s"},
    ]


@pytest.mark.parametrize("name", ["crossfusion", "patchgcn"])
def test_a_rival_is_measured_on_a_square_of_tissue(name: str):
    found = rivals.measure(name, 64, repeats=1)
    assert found["seconds"] > 0
    assert found["peak"] > 0.1
    assert (found["graph"] > 0) == (name == "patchgcn")
