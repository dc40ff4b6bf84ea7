"""Annotations of arrays are checked while tests run (array_checks.py, installed by conftest.py)."""

import dataclasses

import pytest
import torch
from array_checks import EVERY, FIRST, check_arrays
from jaxtyping import Float, Int, TypeCheckError

from bitpress.formats import parse_format


def test_the_package_is_checked() -> None:
    fmt = parse_format("int4-g32")
    # Other tests of this process may have used up the first calls: one of the next is checked.
    with pytest.raises(TypeCheckError, match="parameters"):
        [fmt.fit(torch.zeros(4, 32, dtype=torch.int64)) for _ in range(EVERY)]  # type: ignore[arg-type]
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


@pytest.mark.parametrize("every", [1, 7])
def test_the_first_calls_and_every_so_many_are_checked(every: int) -> None:
    def same(w: Float[torch.Tensor, "out in"]) -> Float[torch.Tensor, "out in"]:
        return w

    checked, seen = check_arrays(same, every), []
    for call in range(1, FIRST + 30):
        try:
            checked(torch.zeros(2))
        except TypeCheckError:
            seen.append(call)
    assert seen == [call for call in range(1, FIRST + 30) if call <= FIRST or call % every == 0]


def test_a_variable_of_the_environment_asks_for_all_calls(monkeypatch: pytest.MonkeyPatch) -> None:
    def same(w: Float[torch.Tensor, "out in"]) -> Float[torch.Tensor, "out in"]:
        return w

    monkeypatch.setenv("BITPRESS_TESTS", "release")
    checked = check_arrays(same)
    for _ in range(FIRST + 2):
        with pytest.raises(TypeCheckError):
            checked(torch.zeros(2))
