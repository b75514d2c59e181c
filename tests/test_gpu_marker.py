"""GPUs are hidden from all tests but those that need one."""

import os

import pytest
import torch
from gpu_marker import asks_for_a_gpu


@pytest.mark.parametrize(
    ("marks", "asked"),
    [("gpu", True), ("gpu and not slow", True), ("slow or gpu", True),
     ("", False), ("not gpu", False), ("not slow and not long", False), ("slow and not gpu", False)],
)  # fmt: skip
def test_only_an_expression_that_wants_the_marker_asks_for_a_gpu(marks: str, asked: bool):
    assert asks_for_a_gpu(marks) is asked


def test_without_it_no_gpu_is_seen(request):
    if asks_for_a_gpu(request.config.option.markexpr):
        pytest.skip("this run asks for a GPU")
    assert os.environ["CUDA_VISIBLE_DEVICES"] == ""
    assert not torch.cuda.is_available()
