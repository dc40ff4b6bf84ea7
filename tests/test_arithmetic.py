"""The type that is computed in follows the processor, where the recipe does not say it."""

import platform
from types import SimpleNamespace

import pytest
import torch

from bitpress.arithmetic import has_fast_bf16
from bitpress.calibration.stats import StatsCollector
from bitpress.recipes import Recipe, build_method


@pytest.mark.parametrize("machine", ["x86_64", "AMD64", "aarch64"])
@pytest.mark.parametrize("tiles", [True, False])
@pytest.mark.parametrize("products", [True, False])
def test_what_a_processor_is_asked(machine: str, tiles: bool, products: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(platform, "machine", lambda: machine)
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: tiles)
    monkeypatch.setattr(torch.ops, "mkldnn", SimpleNamespace(_is_mkldnn_bf16_supported=lambda: products))
    fast = products if machine == "aarch64" else tiles
    assert has_fast_bf16() == fast
    assert build_method(Recipe()).compute == (torch.bfloat16 if fast else torch.float32)
    assert build_method(Recipe()).resolved()["compute"] == ("bf16" if fast else "fp32")
    assert build_method(Recipe(compute="bf16")).compute == torch.bfloat16
    assert build_method(Recipe(compute="fp32")).compute == torch.float32


@pytest.mark.parametrize("tiles", [True, False])
def test_statistics_of_bf16_values_are_exact_either_way(tiles: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(platform, "machine", lambda: "x86_64")
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: tiles)
    before = torch.backends.mkldnn.matmul.fp32_precision  # type: ignore[attr-defined]
    x = torch.randn(200, 48, generator=torch.Generator().manual_seed(0)).bfloat16()
    collector = StatsCollector({"gram"}, 48)
    collector.add(x, "here")
    gram = collector.finish().gram
    assert gram is not None
    torch.testing.assert_close(gram, (x.double().T @ x.double() / 200).float(), rtol=1e-5, atol=1e-6)
    assert torch.backends.mkldnn.matmul.fp32_precision == before  # type: ignore[attr-defined]
