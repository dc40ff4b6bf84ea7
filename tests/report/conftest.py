"""Published directories whose reports the tests of this folder read, and must not change."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from bitpress.pipeline.quantize import Proof, quantize_directory
from bitpress.recipes import make_recipe


@pytest.fixture(scope="session")
def published(
    tiny_model: Callable[..., Path], text_file: Path, tmp_path_factory: pytest.TempPathFactory
) -> Callable[[str], Path]:
    """Quantize a tiny model of an architecture (once), with a short proof on several kinds of text."""
    folder = tmp_path_factory.mktemp("published")
    calibration = {"text": str(text_file), "samples": 4, "length": 32}
    made: dict[str, Path] = {}

    def make(architecture: str) -> Path:
        if architecture not in made:
            recipe = make_recipe({"weights": "int3-g16", "quantizer": {"name": "gptq"}, "calibration": calibration, "batch": 2})
            made[architecture] = folder / architecture
            given = Proof(tokens=512, length=64)
            quantize_directory(tiny_model(architecture, dtype="bfloat16"), made[architecture], recipe, proof=given)
        return made[architecture]

    return make


@pytest.fixture
def report_json(published: Callable[[str], Path]) -> Callable[[str], Any]:
    """Return a fresh copy of the data of a report."""
    return lambda architecture: json.loads((published(architecture) / "report.json").read_text(encoding="utf-8"))
