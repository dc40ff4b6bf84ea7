"""The joints of the house: a made-up part of every kind is one class and one row of a table, and goes the whole way.

Here: grids, a quantizer and transforms. Each is quantized with, published, verified and loaded, decoded and packed, by nothing but its
name in a recipe. Other kinds have their made-up part beside their own tests: a format of inputs in tests/runtime/test_rounded_inputs.py,
an ecosystem in tests/exchange/test_exchange.py, an architecture of the native engine in tests/runtime/test_steps.py.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch

import bitpress
from bitpress.calibration.stats import Stats
from bitpress.checkpoints.compressed import CompressedCheckpoint
from bitpress.errors import FormatError
from bitpress.formats import (
    GRIDS,
    CompressedWeight,
    Format,
    Levels,
    Packed,
    Params,
    Permutation,
    Row,
    StoredParam,
    parse_format,
)
from bitpress.quantizers.quantizer import Outcome
from bitpress.quantizers.rtn import RTN
from bitpress.quantizers.table import QUANTIZERS
from bitpress.transforms.awq_scale import AWQScale
from bitpress.transforms.basis import Maps
from bitpress.transforms.sites import Sites
from bitpress.transforms.table import BASIS_CHANGES, SCALE_SEARCHES, TRANSFORMS

CUBES = (torch.arange(7.0) - 3) ** 3 / 27
LEVELS = (-1.0, -0.6, -0.3, -0.1, 0.0, 0.15, 0.4, 1.0)
NAME = "model.layers.1.mlp.down_proj"


@dataclass(frozen=True)
class Shrunk(RTN):
    """Rounds to nearest on a range that is a share of the weight's own: what is declared otherwise is as plain rounding declares it."""

    share: float = 0.5

    def quantize(self, w: torch.Tensor, stats: Stats | None, fmt: Format) -> Outcome:
        params = fmt.fit(w * self.share)
        return Outcome(CompressedWeight((Packed.pack(fmt, fmt.encode(w, params), params),)), figures={"share": self.share})


@dataclass(frozen=True)
class Octaves(AWQScale):
    """Scales channels by powers of two, in turn: a search without an aim, exact in every floating type."""

    step: float = 2.0

    def plan(self, weights: Sequence[torch.Tensor], stats: Any, fmt: Format, channel_of: Any = None, *_: Any) -> torch.Tensor:
        channels = torch.arange(weights[0].shape[1]) if channel_of is None else channel_of
        return self.step ** (channels % 3).float()


@dataclass(frozen=True)
class Cubic:
    """Signed cubes: seven levels, close together near zero."""

    name: str = "cubic3"
    code_bits: int = 3
    num_codes: int = 7
    span: int = 1
    usual_scale: str = "fp16"
    params: tuple[StoredParam, ...] = (StoredParam("scale", "scale"),)

    def fit(self, blocks: torch.Tensor, importance: torch.Tensor | None = None) -> Params:
        return {"scale": blocks.abs().amax(-1, keepdim=True)}

    def encode(self, values: torch.Tensor, params: Params) -> torch.Tensor:
        scale = params["scale"]
        scaled = values / torch.where(scale == 0, 1.0, scale)
        return (scaled[..., None] - CUBES).abs().argmin(-1).to(torch.uint8)

    def decode(self, codes: torch.Tensor, params: Params) -> torch.Tensor:
        return CUBES[codes.int()] * params["scale"]

    def check(self, codes: torch.Tensor) -> None:
        if bool((codes > 6).any()):
            raise FormatError("cubic3: codes are 0 to 6.")


@dataclass(frozen=True)
class Rolled:
    """Channels moved around a circle: a change of basis."""

    by: int = 1

    needs: ClassVar[frozenset[str]] = frozenset()
    sites: ClassVar[Sites] = {"layer input": frozenset({"online"})}
    summary: ClassVar[str] = "channels moved around a circle"
    paper: ClassVar[str] = "yardstick: made up"

    def plan(self, w: torch.Tensor, stats: Any, fmt: Format) -> Maps:
        return Permutation(torch.arange(w.shape[1], dtype=torch.int32).roll(self.by)), None


@pytest.fixture
def travel(tiny_model: Callable[..., Path], text_file: Path, tmp_path: Path) -> Callable[..., torch.Tensor]:
    """Quantize, publish, verify and load by a recipe; what comes back is one weight of the loaded model, and both loads agree."""

    def go(**recipe: Any) -> torch.Tensor:
        out = tmp_path / "out"
        calibration = {"text": str(text_file), "samples": 4, "length": 32}
        report = bitpress.quantize(tiny_model("llama"), out, recipe={"calibration": calibration, **recipe}, proof_tokens=0)
        assert report is not None
        assert CompressedCheckpoint.open(out, verify=True).read_weight(f"{NAME}.weight").shape == (32, 64)
        tokens = torch.arange(5, 25)[None]
        with torch.no_grad():
            decoded, packed = bitpress.load(out), bitpress.load(out, weights="packed")
            # The same weights, multiplied in another order in float32.
            torch.testing.assert_close(packed(tokens).logits, decoded(tokens).logits, rtol=1e-4, atol=1e-4)
        weight: torch.Tensor = decoded.get_submodule(NAME).weight.detach()
        return weight

    return go


def original(tiny_model: Callable[..., Path]) -> torch.Tensor:
    import transformers

    weight: torch.Tensor = (
        transformers.AutoModelForCausalLM.from_pretrained(tiny_model("llama")).get_submodule(NAME).weight.detach()
    )
    return weight


def test_a_grid_is_a_row(
    travel: Callable[..., torch.Tensor], tiny_model: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(GRIDS, "toy3", Row(Levels("toy3", LEVELS), "made up"))
    weight = travel(weights="toy3-g16", quantizer="rtn")
    blocks = original(tiny_model).reshape(-1, 16)
    # A scale in fp16 times the nearest of the levels, each within one rounding of the product in float32.
    scale = blocks.abs().amax(1, keepdim=True).half().float()
    levels = scale[:, :, None] * torch.tensor(LEVELS)
    nearest = levels.expand(*blocks.shape, -1).gather(2, (levels - blocks[..., None]).abs().argmin(2, keepdim=True))
    torch.testing.assert_close(weight.reshape(-1, 16), nearest[..., 0], rtol=2.0**-23, atol=0)


def test_a_grid_is_a_class_and_a_row(
    travel: Callable[..., torch.Tensor], tiny_model: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(GRIDS, "cubic3", Row(Cubic(), "made up"))
    weight = travel(weights="cubic3-g16", quantizer="rtn")
    blocks = original(tiny_model).reshape(-1, 16)
    scale = blocks.abs().amax(1, keepdim=True).half().float()
    levels = (scale[:, :, None] * CUBES).expand(*blocks.shape, -1)
    nearest = levels.gather(2, (levels - blocks[..., None]).abs().argmin(2, keepdim=True))[..., 0]
    # Within one rounding of the product in float32.
    torch.testing.assert_close(weight.reshape(-1, 16), nearest, rtol=2.0**-23, atol=0)


def test_a_change_of_basis_is_a_class_and_a_row(
    travel: Callable[..., torch.Tensor], tiny_model: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(BASIS_CHANGES, "rolled", Rolled)  # one line of the file: TRANSFORMS is made of this table
    monkeypatch.setitem(TRANSFORMS, "rolled", Rolled)
    weight = travel(weights="int4-g16", quantizer="rtn", transforms=[{"name": "rolled", "by": 5}])
    # A permutation moves whole channels: the groups of 16 are other ones, and nothing else changes.
    w, fmt = original(tiny_model), parse_format("int4-g16")
    expected = RTN().quantize(w.roll(5, 1), None, fmt).weight.dequantize().roll(-5, 1)
    assert torch.equal(weight, expected)
    assert not torch.equal(weight, RTN().quantize(w, None, fmt).weight.dequantize())


def test_a_quantizer_is_a_class_and_a_row(
    travel: Callable[..., torch.Tensor], tiny_model: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(QUANTIZERS, "shrunk", Shrunk)
    weight = travel(weights="int4-g16", quantizer={"name": "shrunk", "share": 0.25})
    w, fmt = original(tiny_model), parse_format("int4-g16")
    expected = Shrunk(share=0.25).quantize(w, None, fmt).weight.dequantize()
    assert torch.equal(weight, expected)
    assert not torch.equal(weight, RTN().quantize(w, None, fmt).weight.dequantize())


def test_a_transform_is_a_class_and_a_row(
    travel: Callable[..., torch.Tensor], tiny_model: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(SCALE_SEARCHES, "octaves", Octaves)  # one line of the file: TRANSFORMS is made of this table
    monkeypatch.setitem(TRANSFORMS, "octaves", Octaves)
    weight = travel(weights="int4-g16", quantizer="rtn", transforms=[{"name": "octaves", "step": 4.0}])
    factors = 4.0 ** (torch.arange(64) % 3)
    scaled = RTN().quantize(original(tiny_model) * factors, None, parse_format("int4-g16")).weight.dequantize()
    # down_proj's inputs are made by up_proj, which takes the division: the weight stays multiplied.
    assert torch.equal(weight, scaled)
