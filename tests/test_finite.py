"""Whether numbers are numbers, also where their sum is not."""

import pytest
import torch

from bitpress.finite import all_finite


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_one_value_that_is_no_number_is_found(dtype: torch.dtype) -> None:
    values = torch.randn(100, 70).to(dtype)
    assert all_finite(values)
    for wrong in ([torch.nan], [torch.inf], [-torch.inf], [torch.inf, -torch.inf]):
        spoilt = values.clone()
        spoilt.view(-1)[17 : 17 + len(wrong)] = torch.tensor(wrong, dtype=dtype)
        assert not all_finite(spoilt)
        assert not all_finite(spoilt.T)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_finite_values_whose_sum_is_not_are_finite(dtype: torch.dtype) -> None:
    assert all_finite(torch.full((1000,), torch.finfo(dtype).max, dtype=dtype))
    assert all_finite(torch.tensor([1.0, -1.0]).to(dtype) * torch.finfo(dtype).max)


def test_integers_and_nothing_are_finite() -> None:
    assert all_finite(torch.tensor([1, 2]))
    assert all_finite(torch.tensor([True]))
    assert all_finite(torch.empty(0))
