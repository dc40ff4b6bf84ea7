"""Channel reassembly by its formulas: splitting is exact, merging takes the nearest pairs, the number of channels stays."""

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import bitpress
from bitpress import native
from bitpress.calibration import Stats
from bitpress.checkpoints.compressed import CompressedCheckpoint
from bitpress.errors import CalibrationError, FormatError, UsageError
from bitpress.formats import CompressedWeight, parse_format
from bitpress.formats.fake_quantize import fake_quantize
from bitpress.formats.maps.reassembly import Reassembly
from bitpress.kernels.native_layout import lay_out, reason_to_expand
from bitpress.quantizers.rtn import RTN
from bitpress.runtime.native.assemble import refuses_directory
from bitpress.transforms.reassemble import Reassemble, reassembled

IN, OUT = 32, 12
FMT = parse_format("int8-row")


def layer(seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Draw inputs with an outlier, in which two pairs of channels are nearly alike, and a weight."""
    generator = torch.Generator().manual_seed(seed)
    x, w = torch.randn(60, IN, generator=generator), torch.randn(OUT, IN, generator=generator)
    x[:, 5] *= 12
    x[:, 11], w[:, 23] = x[:, 8] + 0.01 * torch.randn(60, generator=generator), w[:, 20]
    return x, w


def distances(x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
    """Return the change of all outputs when an even and an odd channel are merged, pair by pair."""
    found = torch.empty(IN // 2, IN // 2)
    for a in range(IN // 2):
        for b in range(IN // 2):
            i, j = 2 * a, 2 * b + 1
            both = x[:, [i, j]] @ w[:, [i, j]].T
            found[a, b] = (both - torch.outer(x[:, [i, j]].mean(1), w[:, i] + w[:, j])).square().sum()
    return found


def test_outliers_are_split_and_the_nearest_pairs_make_room() -> None:
    x, w = layer()
    change = reassembled(x.abs().amax(0), distances(x, w), float(x.abs().max()) / 2.5)
    assert change is not None
    change.check()
    freed = change.freed.nonzero().flatten().tolist()
    assert freed == [8, 20]
    assert change.into[freed].tolist() == [11, 23]
    assert change.copied[freed].tolist() == [5, 5]
    u, columns = change.apply(x), change.dual().apply(w)
    torch.testing.assert_close(u[:, [5, 8, 20]], x[:, [5]].expand(-1, 3) / 3)
    torch.testing.assert_close(u[:, 11], (x[:, 8] + x[:, 11]) / 2)
    assert torch.equal(columns[:, [5, 8, 20]], w[:, [5]].expand(-1, 3))
    torch.testing.assert_close(columns[:, 23], 2 * w[:, 20])
    # One pair has nearly the same inputs, the other the same column: the product is nearly what it was.
    wanted = x @ w.T
    assert (u @ columns.T - wanted).norm() < 1e-3 * wanted.norm()


def test_the_plan_is_the_best_limit_and_no_worse_than_none() -> None:
    x, w = layer()
    stats = Stats(60, sample=x)
    (change, outer) = Reassemble(bits=3).plan(w, stats, FMT)
    assert outer is None
    assert isinstance(change, Reassembly)
    rounding, wanted = parse_format("int3-row-fp32"), x @ w.T

    def error(m: Reassembly | None) -> float:
        u, columns = (x, w) if m is None else (m.apply(x), m.dual().apply(w))
        return float((fake_quantize(u, rounding) @ columns.T - wanted).square().sum())

    limits = [float(x.abs().max()) * k / 100 for k in range(1, 101)]
    tried = [m for limit in limits if (m := reassembled(x.abs().amax(0), distances(x, w), limit)) and m.freed.sum() <= IN // 10]
    assert error(change) <= 1.05 * min(map(error, tried))
    assert error(change) < 0.5 * error(None)
    even = Stats(60, sample=x.sign())
    assert Reassemble().plan(w, even, FMT) == (None, None)


def test_bad_settings_and_maps_are_refused() -> None:
    with pytest.raises(CalibrationError, match="sample is needed"):
        Reassemble().plan(torch.ones(2, 4), None, FMT)
    for settings in ({"share": 0.6}, {"steps": 0}, {"bits": 1}):
        with pytest.raises(UsageError, match=next(iter(settings))):
            Reassemble(**settings)  # type: ignore[arg-type]
    places = torch.arange(4, dtype=torch.int32)

    def made(into: list[int], copied: list[int]) -> Reassembly:
        return Reassembly(torch.tensor(into, dtype=torch.int32), torch.tensor(copied, dtype=torch.int32))

    Reassembly(places, places).check()
    for change, says in (
        (made([4, 1, 2, 3], [0, 1, 2, 3]), "into names a channel"),
        (made([0, 1, 2, 3], [-1, 1, 2, 3]), "copied names a channel"),
        (made([1, 2, 2, 3], [3, 3, 2, 3]), "has been taken away"),
        (made([0, 1, 2, 3], [1, 1, 2, 3]), "position that is taken"),
        (made([1, 1, 2, 3], [1, 1, 2, 3]), "splits a channel that it averages"),
    ):
        with pytest.raises(FormatError, match=says):
            change.check()
    with pytest.raises(FormatError, match="no settings but sums"):
        Reassembly.expected({"mean": True}, 4)


@pytest.mark.skipif(not native.available(), reason="no C++ compiler was there when bitpress was installed")
def test_the_engine_holds_a_reassembled_weight_as_a_whole() -> None:
    x, w = layer()
    change, _ = Reassemble(bits=3).plan(w, Stats(60, sample=x), FMT)
    assert change is not None
    packed = RTN().quantize(change.dual().apply(w), None, FMT).weight
    weight = CompressedWeight(packed.terms, change)
    assert reason_to_expand(weight) == "reassembly"
    held = lay_out(weight)
    assert held.expanded == ["reassembly"]
    # Values are held in 16 bits with 11 digits.
    wanted = weight.dequantize()
    torch.testing.assert_close(torch.stack([held.row(i) for i in range(OUT)]), wanted, rtol=2**-10, atol=2**-20)


def test_a_reassembled_model_is_stored_and_computes_the_same_on_every_road(
    tiny_model: Callable[..., Path], tmp_path: Path
) -> None:
    keys = {
        "weights": "int8-row",
        "quantizer": "rtn",
        "inputs": "int4-row-fp32",
        "transforms": [{"name": "reassemble", "share": 0.2}],
    }
    recipe = {**keys, "calibration": {"samples": 2, "length": 32}}
    shutil.copytree(tiny_model("llama", num_hidden_layers=1), tmp_path / "source")
    tensors = load_file(tmp_path / "source" / "model.safetensors")
    tensors["model.layers.0.input_layernorm.weight"][5] *= 40
    save_file(tensors, tmp_path / "source" / "model.safetensors", metadata={"format": "pt"})
    bitpress.quantize(tmp_path / "source", tmp_path / "out", recipe=recipe, proof_tokens=64)
    checkpoint = CompressedCheckpoint.open(tmp_path / "out")
    layers = [checkpoint.read_layer(name) for name in checkpoint.manifest.weights]
    assert sum(isinstance(own.weight.input_map, Reassembly) for own in layers) >= 3
    assert "channels of inputs are averaged" in str(refuses_directory(checkpoint))
    tokens = torch.arange(6, 38).reshape(2, 16)
    decoded, packed = (bitpress.load(tmp_path / "out", weights=kind, dtype="fp32") for kind in ("decoded", "packed"))
    with torch.no_grad():
        assert torch.equal(*(m(input_ids=tokens, use_cache=False).logits for m in (decoded, packed)))
