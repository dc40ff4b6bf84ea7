"""A quantizer at bits it is not meant for: said before any work, refused with strict."""

from collections.abc import Callable
from pathlib import Path

import pytest

from bitpress.errors import UsageError
from bitpress.pipeline.quantize import Proof, quantize_directory
from bitpress.progress import Silent
from bitpress.recipes import make_recipe


class Notes(Silent):
    def __init__(self) -> None:
        self.texts: list[str] = []

    def note(self, text: str) -> None:
        self.texts.append(text)


@pytest.mark.parametrize(
    ("quantizer", "weights", "said"),
    [
        ("rtn", "int2-g16", "rtn is meant for codes of 4 to 8 bits a weight, and int2-g16 has 2"),
        ("db_llm", "dual2-g16", None),
        ("bitnet_ptq", "ternary-g16", None),
        ("hqq", "int8-g16", None),
        ("rtn", "int4-g16", None),
    ],
)
def test_bits_that_a_method_is_not_meant_for_are_named(
    quantizer: str, weights: str, said: str | None, tiny_model: Callable[..., Path], tmp_path: Path
) -> None:
    recipe, notes = make_recipe({"weights": weights, "quantizer": quantizer}), Notes()
    quantize_directory(tiny_model("llama"), tmp_path / "out", recipe, proof=Proof(tokens=0), progress=notes)
    assert [text for text in notes.texts if "meant" in text] == ([] if said is None else [f"{said}."])
    if said is not None:
        with pytest.raises(UsageError, match=said):
            quantize_directory(tiny_model("llama"), tmp_path / "strict", recipe, strict=True, proof=Proof(tokens=0))
        assert not (tmp_path / "strict").exists()
