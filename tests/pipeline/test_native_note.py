"""A run that computes without the native library although it was not switched off says so."""

from collections.abc import Callable
from pathlib import Path

import pytest

from bitpress import library
from bitpress.pipeline.quantize import Proof, quantize_directory
from bitpress.progress import Silent
from bitpress.recipes import make_recipe


class Heard(Silent):
    def __init__(self) -> None:
        self.notes: list[str] = []

    def note(self, text: str) -> None:
        self.notes.append(text)


@pytest.mark.parametrize(("switch", "said"), [("on", True), ("off", False)])
def test_a_missing_library_is_said(
    switch: str, said: bool, tiny_model: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("BITPRESS_NATIVE", switch)
    monkeypatch.setattr(library, "_find_library", lambda: None)
    progress = Heard()
    recipe = make_recipe({"weights": "int4-g16", "quantizer": "rtn"})
    report = quantize_directory(tiny_model("llama"), tmp_path / "out", recipe, proof=Proof(tokens=0), progress=progress)
    assert any("native library is not built" in text for text in progress.notes) == said
    assert report["run"]["native"] is None
