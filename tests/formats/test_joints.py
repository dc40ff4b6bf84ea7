"""The joints carry what is not built yet: a codebook term and a low-rank term between two Hadamard maps.

These toys live in the test alone. They show that a grid of span 4 with parameters of its own, a term of another kind and a map of
another kind fit the protocols without a special case anywhere: fitted, packed, multiplied and, for the grid, rounded by GPTQ.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch

from bitpress.calibration import Stats
from bitpress.formats import Block, CompressedLayer, CompressedWeight, Format, Grid, Packed, Params, StoredParam, Term
from bitpress.formats.maps.map import Map
from bitpress.kernels.reference import Reference
from bitpress.quantizers.gptq import GPTQ
from bitpress.quantizers.quantizer import output_error
from bitpress.quantizers.rtn import RTN


@dataclass(frozen=True)
class Codebook:
    """Four weights a code: the nearest of 256 fixed vectors times the block's scale."""

    name: str = "toy"
    code_bits: int = 8
    span: int = 4
    num_codes: int = 256
    usual_scale: str = "fp16"
    params: tuple[StoredParam, ...] = (StoredParam("scale", "scale"),)

    @property
    def book(self) -> torch.Tensor:
        return torch.randn(256, 4, generator=torch.Generator().manual_seed(0))

    def fit(self, blocks: torch.Tensor, importance: torch.Tensor | None = None) -> Params:
        return {"scale": blocks.square().mean(-1, keepdim=True).sqrt()}

    def encode(self, values: torch.Tensor, params: Params) -> torch.Tensor:
        scale = params["scale"]
        vectors = (values / torch.where(scale == 0, 1.0, scale)).reshape(*values.shape[:-1], -1, 4)
        return torch.cdist(vectors, self.book).argmin(-1).to(torch.uint8)

    def decode(self, codes: torch.Tensor, params: Params) -> torch.Tensor:
        return self.book[codes.long()].flatten(-2) * params["scale"]

    def check(self, codes: torch.Tensor) -> None:
        pass


@dataclass(frozen=True)
class LowRank:
    a: torch.Tensor
    b: torch.Tensor
    kind: ClassVar[str] = "low_rank"

    @property
    def shape(self) -> tuple[int, int]:
        return self.a.shape[0], self.b.shape[1]

    @property
    def tensors(self) -> Mapping[str, torch.Tensor]:
        return {"a": self.a, "b": self.b}

    def dequantize(self) -> torch.Tensor:
        return self.a.float() @ self.b.float()

    def spec(self) -> dict[str, Any]:
        return {"rank": self.a.shape[1]}

    def check(self) -> None:
        assert torch.isfinite(self.a).all()


@dataclass(frozen=True)
class Hadamard:
    size: int
    kind: ClassVar[str] = "hadamard"

    @property
    def matrix(self) -> torch.Tensor:
        h = torch.ones(1, 1)
        while h.shape[0] < self.size:
            h = torch.cat([torch.cat([h, h], 1), torch.cat([h, -h], 1)])
        return h / self.size**0.5

    def apply(self, x: torch.Tensor) -> torch.Tensor:
        return x @ self.matrix.T

    def apply_transposed(self, x: torch.Tensor) -> torch.Tensor:
        return x @ self.matrix

    def spec(self) -> dict[str, Any]:
        return {}

    def tensors(self) -> dict[str, torch.Tensor]:
        return {}

    def check(self) -> None:
        pass


def test_a_codebook_and_a_low_rank_term_between_two_hadamard_maps() -> None:
    generator = torch.Generator().manual_seed(1)
    w, x = torch.randn(32, 64, generator=generator), torch.randn(5, 64, generator=generator)
    left: Map = Hadamard(32)
    right: Map = Hadamard(64)
    # w = T_out' core T_in' since both maps are orthogonal, so core = T_out' w T_in' is what the terms stand for.
    core = right.apply(left.apply_transposed(w.T).T)
    fmt = Format(Codebook(), Block(1, 16))
    params = fmt.fit(core)
    packed = Packed.pack(fmt, fmt.encode(core, params), params)
    u, s, v = torch.linalg.svd(core - packed.dequantize())
    low_rank: Term = LowRank((u[:, :4] * s[:4]).half(), v[:4].half())
    whole = CompressedWeight((packed, low_rank), right, left)
    assert isinstance(fmt.grid, Grid)
    assert whole.nbytes == 32 * 16 + 32 * 4 * 2 + (32 * 4 + 4 * 64) * 2
    without = CompressedWeight((packed,), right, left)
    assert (whole.dequantize() - w).norm() < (without.dequantize() - w).norm()
    # y = T_out (sum of terms) T_in x, the product against the decoded matrix; 64 terms of rounding error.
    assert torch.allclose(Reference().matmul(x, CompressedLayer(whole)), x @ whole.dequantize().T, atol=1e-4)
    assert set(whole.tensors()) == {"term0.codes", "term0.scale", "term1.a", "term1.b"}


def test_error_feedback_runs_over_columns_of_a_vector_grid() -> None:
    generator = torch.Generator().manual_seed(2)
    w = torch.randn(48, 64, generator=generator)
    x = torch.randn(512, 64, generator=generator) @ torch.randn(64, 64, generator=generator)
    stats = Stats(512, gram=x.T @ x / 512)
    fmt = Format(Codebook(), Block(1, 16))
    errors = {
        name: output_error(w, method.quantize(w, stats, fmt).weight.dequantize(), stats)
        for name, method in {
            "rounded": RTN(),
            "static": GPTQ(clip="minmax"),
            "running": GPTQ(clip="minmax", order="natural", groups="running"),
        }.items()
    }
    assert errors["static"] < 0.7 * errors["rounded"]
    assert errors["running"] < 0.7 * errors["rounded"]
