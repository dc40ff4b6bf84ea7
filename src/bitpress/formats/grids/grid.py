"""The meaning of a code: the protocol of all grids.

A grid knows nothing of matrices, files or models. It sees weights as `[..., n]` and its parameters as tensors that broadcast
against `[..., n // span]` codes (one of shape `s` as `[..., 1, *s]`, one of the whole weight as `s`), so the same three verbs serve a
whole matrix cut into blocks, one column of a matrix in the middle of an error-feedback loop, and a vector codebook that turns `span`
weights into one code.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, Protocol, runtime_checkable

import torch
from jaxtyping import Float
from jaxtyping import Integer as Int

from bitpress.formats.scale_store import Outer, ScaleStore
from bitpress.native import LevelTable

__all__ = ["EvenlySpaced", "Grid", "OwnSearch", "Params", "SharedParams", "StoredParam", "Streamed", "Tabled"]

Params = Mapping[str, torch.Tensor]


@dataclass(frozen=True)
class StoredParam:
    """How one parameter of a grid is stored in a file.

    kind    "scale": a float, stored by the format's scale store; "value": a float16 (levels, codewords), or a float32 where `bits` is 32;
            "code": an unsigned integer of `bits` bits, packed like the codes.
    scope   "block": one for every block; "tensor": one for the whole weight (a codebook).
    shape   of one parameter: () for a number, (16,) for sixteen levels. Codes are single numbers.
    """

    name: str
    kind: Literal["scale", "value", "code"]
    bits: int = 0
    scope: Literal["block", "tensor"] = "block"
    shape: tuple[int, ...] = ()

    @property
    def value_type(self) -> torch.dtype:
        """The type of a "value"."""
        return torch.float32 if self.bits == 32 else torch.float16

    @property
    def value_name(self) -> str:
        """The type of a "value" as names of formats say it."""
        return "fp32" if self.bits == 32 else "fp16"


@runtime_checkable
class Grid(Protocol):
    @property
    def name(self) -> str:
        """The first part of a format's name, `int4`."""
        ...

    @property
    def code_bits(self) -> int:
        """Bits of one stored code; a weight costs `code_bits / span` before the parameters."""
        ...

    @property
    def num_codes(self) -> int:
        """The number of valid codes: at most 2^code_bits."""
        ...

    @property
    def span(self) -> int:
        """Weights per code."""
        ...

    @property
    def usual_scale(self) -> str:
        """The scale store of a format that names none; "" if every name must say it."""
        ...

    @property
    def params(self) -> tuple[StoredParam, ...]:
        """The parameters stored with the codes, in the order of the file."""
        ...

    def fit(self, blocks: Float[torch.Tensor, "blocks n"], importance: torch.Tensor | None = None) -> Params:
        """Choose parameters, each `[blocks, 1, *shape]` (or `shape`, for the whole weight), so that no weight is clipped."""
        ...

    def encode(self, values: Float[torch.Tensor, "... n"], params: Params) -> Int[torch.Tensor, "... codes"]:
        """Return the nearest code of every `span` weights, uint8 up to 8 bits and int32 beyond."""
        ...

    def decode(self, codes: Int[torch.Tensor, "... codes"], params: Params) -> Float[torch.Tensor, "... n"]:
        """Return the weights of codes, in float32."""
        ...

    def check(self, codes: Int[torch.Tensor, "..."]) -> None:
        """Raise FormatError for an invalid code. Called only if `num_codes` is less than 2^code_bits."""
        ...


@runtime_checkable
class SharedParams(Protocol):
    """A grid with parameters of the whole weight (a codebook): it can fit the others if those are known."""

    def fit_blocks(
        self, blocks: Float[torch.Tensor, "blocks n"], whole: Params, importance: torch.Tensor | None = None
    ) -> Params:
        """Choose the parameters of every block."""
        ...


@runtime_checkable
class OwnSearch(Protocol):
    """A grid with its own clipping search: faster than `Format`'s, with the same result."""

    def search(
        self,
        blocks: Float[torch.Tensor, "blocks n"],
        importance: Float[torch.Tensor, "blocks n"] | None,
        shrink: Sequence[float],
        store: ScaleStore,
        outer: Outer,
    ) -> Params | None:
        """Choose parameters as `Format.fit` does. `store` rounds the scales; `outer` holds its shared values for every block.

        Return None if the grid does not support the request, or a scale is out of range.
        """
        ...


@runtime_checkable
class Streamed(Protocol):
    """A grid of span 1 whose codes form a stream down every column: a weight depends on the codes above it (a trellis).

    Its `encode` and `decode` take whole columns, `[columns, out]`, and parameters that broadcast against them. A stream runs from the first
    row to the last, so such a weight cannot be cut between rows.
    """

    @property
    def rows_per_code(self) -> int:
        """Weights of a column for each code; the codes of a weight are `[out / rows_per_code, in]`."""
        ...


@runtime_checkable
class EvenlySpaced(Protocol):
    """A grid of span 1 whose levels are `(code - zero) * scale`, codes 0 to `top`; native loops implement its rounding.

    A code is `round(value / scale) + zero`, halves to even, clamped; a scale of 0 divides as 1.
    """

    @property
    def top(self) -> int: ...

    def zero_of(self, params: Params) -> torch.Tensor | float:
        """Return the zero point in code units."""
        ...


@runtime_checkable
class Tabled(Protocol):
    """A grid of span 1 whose levels are a table times the scale; native loops implement its rounding."""

    @property
    def table(self) -> LevelTable | None:
        """Return the table, or None if it is too long for native loops."""
        ...
