"""Values of 8 bits from a table are those that torch says."""

import pytest
import torch
from torch.testing import assert_close

from hyper_merge.checkpoints.io import dtypes
from hyper_merge.checkpoints.io.dtypes import EIGHT_BIT_FLOATS, widened

PATTERNS = torch.arange(256, dtype=torch.uint8)


@pytest.mark.parametrize("wide", [torch.float16, torch.float32, torch.float64])
@pytest.mark.parametrize("dtype", EIGHT_BIT_FLOATS)
def test_all_patterns_of_eight_bits_are_widened(dtype, wide):
    values = PATTERNS.view(dtype)
    assert_close(widened(values, wide), values.to(wide), rtol=0, atol=0, equal_nan=True)


def test_more_values_than_are_looked_up_at_once_are_widened(monkeypatch):
    monkeypatch.setattr(dtypes, "_AT_ONCE", 100)
    values = PATTERNS.view(torch.float8_e4m3fn).view(4, 64)
    assert_close(widened(values), values.float(), rtol=0, atol=0, equal_nan=True)


def test_what_lies_in_another_order_is_widened_too():
    values = PATTERNS.view(16, 16).view(torch.float8_e4m3fn)
    for part in (values.mT, values[:, 3:7], values[2], values[:0], values[0, 0]):
        found = widened(part)
        assert found.shape == part.shape
        assert_close(found, part.float(), rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_wider_types_are_converted(dtype):
    values = torch.tensor([0.1, -3.0], dtype=dtype)
    assert torch.equal(widened(values), values.float())
