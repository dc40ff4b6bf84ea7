"""A nested model is loaded at a width by every road: the weights are those that narrowing gives, and they alone are in memory."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

import bitpress
from bitpress import native
from bitpress.checkpoints.compressed import CompressedCheckpoint
from bitpress.checkpoints.width import at_width
from bitpress.errors import UsageError
from bitpress.formats.nested import NESTED_WIDTHS, narrow
from bitpress.formats.terms.packed import Packed
from bitpress.pipeline.quantize import Proof, quantize_directory
from bitpress.recipes import make_recipe

needs_native = pytest.mark.skipif(not native.available(), reason="no C++ compiler was there when bitpress was installed")
TOKENS = torch.tensor([[3, 17, 42, 5, 99, 250, 7, 1]])


@pytest.fixture(scope="module")
def nested(tiny_model: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A tiny llama, and the same in 8 bits that hold 4 and 2; one weight in a format of its own."""
    source, out = tiny_model("llama"), tmp_path_factory.mktemp("nested") / "out"
    recipe = make_recipe(
        {
            "weights": "bipolar8-g16-nested",
            "quantizer": "rtn",
            "overrides": [{"match": "*.0.*down_proj*", "weights": "int8-g16"}],
        }
    )
    quantize_directory(source, out, recipe, proof=Proof(tokens=0))
    return source, out


def expected(out: Path, width: int) -> dict[str, torch.Tensor]:
    checkpoint = CompressedCheckpoint.open(out)
    weights = {}
    for name in checkpoint.manifest.weights:
        (term,) = checkpoint.read_weight(name).terms
        assert isinstance(term, Packed)
        is_nested = term.format.layout == "nested"
        weights[name] = (narrow(term, width) if is_nested and width < 8 else term).dequantize()
    return weights


@pytest.mark.parametrize("width", NESTED_WIDTHS)
def test_every_loader_takes_the_weights_of_a_width(nested: tuple[Path, Path], width: int) -> None:
    _, out = nested
    weights = expected(out, width)
    decoded = bitpress.load(out, width=width, dtype="fp32")
    assert all(torch.equal(decoded.state_dict()[name], w) for name, w in weights.items())
    with torch.no_grad():
        logits = decoded(TOKENS).logits[0]
        packed = bitpress.load(out, weights="packed", width=width, dtype="fp32")
        torch.testing.assert_close(packed(TOKENS).logits[0], logits, rtol=1e-3, atol=1e-3)
    if native.available():
        engine = bitpress.load(out, runtime="native", width=width, activations="none", head="keep").engine
        through = engine.forward(TOKENS[0].numpy(), logits="all")
        torch.testing.assert_close(through, logits, rtol=2e-3, atol=2e-3)
        assert width < engine.facts["bits_stored"] < width + 2


@needs_native
def test_cached_layouts_of_widths_are_apart(nested: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BITPRESS_LAYOUTS", str(tmp_path / "layouts"))
    made = [bitpress.load(nested[1], runtime="native", width=width, head="keep") for width in (None, 4)]
    again = [bitpress.load(nested[1], runtime="native", width=width, head="keep") for width in (None, 4)]
    assert len(list((tmp_path / "layouts").glob("*.layout"))) == 2
    bits = [text.engine.facts["bits_in_memory"] for text in (*made, *again)]
    assert bits[0] == bits[2] > bits[1] == bits[3]


def test_bytes_and_bits_are_those_that_are_read(nested: tuple[Path, Path]) -> None:
    source, out = nested
    whole = CompressedCheckpoint.open(out)
    figures = {w: bitpress.evaluate(out, source, tokens=64, length=32, width=w) for w in NESTED_WIDTHS}
    for width in (4, 2):
        part = at_width(whole, width)
        held = sum(part.read_weight(name).nbytes for name in part.manifest.weights)
        shapes = [record.spec["shape"] for record in part.manifest.weights.values()]
        assert figures[width]["bits_per_weight"] == pytest.approx(held * 8 / sum(rows * columns for rows, columns in shapes))
        left_out = sum(whole.read_weight(name).nbytes for name in whole.manifest.weights) - held
        assert figures[width]["bytes"] == sum(entry.nbytes for _, entry in whole.tensors.values()) - left_out
    assert figures[8]["kl_mean"] < figures[4]["kl_mean"] < figures[2]["kl_mean"]


def test_what_has_no_such_width_is_refused_in_one_line(nested: tuple[Path, Path], pressed_original: Path) -> None:
    source, out = nested
    for wrong in (3, 16, 0, True):
        with pytest.raises(UsageError, match="can be read at 8, 4 or 2 bits a weight"):
            bitpress.load(out, width=wrong)
    for runtime in ("native", "transformers"):
        with pytest.raises(UsageError, match="no weight is nested, so it has one width; leave out the width"):
            bitpress.load(pressed_original, runtime=runtime, width=4)  # type: ignore[arg-type]
    with pytest.raises(UsageError, match="did not write this model, so it cannot be loaded in part; leave out width"):
        bitpress.evaluate(source, tokens=64, length=32, width=4)
    with pytest.raises(UsageError, match="no weight can be loaded in part"):
        bitpress.evaluate(out, source, tokens=64, length=32, width=4, memory="1GB")
