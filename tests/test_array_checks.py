"""Annotations of arrays are checked while tests run (array_checks.py, installed by conftest.py)."""

import dataclasses

import pytest
import torch
from array_checks import check_arrays
from jaxtyping import Float, Int, TypeCheckError

from bitpress.formats import parse_format


def test_the_package_is_checked() -> None:
    fmt = parse_format("int4-g32")
    with pytest.raises(TypeCheckError, match="parameters"):
        fmt.fit(torch.zeros(4, 32, dtype=torch.int64))  # type: ignore[arg-type]
    fmt.fit(torch.zeros(4, 32))


def test_a_wrong_shape_is_seen_in_arguments_results_and_fields() -> None:
    @check_arrays
    def first(w: Float[torch.Tensor, "out in"], x: Float[torch.Tensor, "in"] | None, name: int) -> Int[torch.Tensor, " out"]:
        return torch.zeros(w.shape[0], dtype=torch.int64) if name == 0 else torch.zeros(5, dtype=torch.int64)

    @check_arrays
    @dataclasses.dataclass
    class Held:
        codes: Int[torch.Tensor, "out in"]
        name: int

    w = torch.zeros(2, 3)
    first(w, torch.zeros(3), 0)
    first(w, None, 0)
    Held(codes=torch.zeros(2, 3, dtype=torch.int64), name="names are left to mypy")  # type: ignore[arg-type]
    with pytest.raises(TypeCheckError, match="parameters"):
        first(w, torch.zeros(2), 0)
    with pytest.raises(TypeCheckError, match="return value"):
        first(w, None, 1)
    with pytest.raises(TypeCheckError):
        Held(codes=w, name=0)  # type: ignore[arg-type]


def test_a_function_without_arrays_is_left_alone() -> None:
    def plain(name: str) -> list[torch.Tensor]:
        return []

    assert check_arrays(plain) is plain
