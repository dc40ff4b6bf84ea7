"""A quantizer at bits it is not meant for: said before any work, refused with strict."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from bitpress.errors import UsageError
from bitpress.pipeline.plan import unmeant_bits
from bitpress.pipeline.quantize import Proof, plan_run, quantize_directory
from bitpress.progress import Silent
from bitpress.recipes import make_recipe
from bitpress.recipes.choice import choose_method


@pytest.mark.parametrize(
    ("said", "warned"),
    [
        ({"scheme": "w8a8"}, False),
        ({"scheme": "w8a8", "quantizer": "gptq"}, True),
        ({"scheme": "w8a8", "sets": ["quantizer.name=gptq"]}, True),
        ({"scheme": "w8a8", "sets": ["quantizer.damp=0.1"]}, False),
        ({"weights": "int8-row"}, False),
        ({"recipe": {"weights": "int8-row", "quantizer": "gptq"}}, True),
        ({"recipe": "moqe", "weights": "int2-row"}, False),
        ({"recipe": "moqe", "weights": "int2-row", "quantizer": "rtn"}, True),
        ({"preset": "balanced", "bits": 4, "sets": ["weights=int8-g32"]}, False),
        ({"bits": 8, "quantizer": "gptq"}, True),
    ],
)
def test_a_quantizer_that_bitpress_chose_is_not_called_unmeant(
    said: dict[str, Any], warned: bool, tiny_model: Callable[..., Path]
) -> None:
    model = tiny_model("mixtral" if said.get("recipe") == "moqe" else "llama", num_hidden_layers=1)
    plan, _, _ = plan_run(model, choose_method(**said))
    assert bool(unmeant_bits(plan)) is warned


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
