"""The proof: what it must refuse to start with, and that the reload is really compared."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from bitpress.checkpoints.compressed import CompressedCheckpoint
from bitpress.errors import CalibrationError, NumericsError, UsageError
from bitpress.measure.evaluation import check_reloaded
from bitpress.pipeline.quantize import Proof, quantize_directory


def test_calibration_and_proof_never_share_a_text(
    tiny_model: Callable[..., Path], gptq_recipe: Callable[..., Any], text_file: Path, tmp_path: Path
) -> None:
    with pytest.raises(UsageError, match="is the calibration text"):
        quantize_directory(tiny_model(), tmp_path / "out", gptq_recipe(), proof=Proof(tokens=64, text=str(text_file)))
    assert not (tmp_path / "out").exists()


def test_a_proof_text_that_is_missing_is_known_before_any_work(
    tiny_model: Callable[..., Path], gptq_recipe: Callable[..., Any], tmp_path: Path
) -> None:
    with pytest.raises(CalibrationError, match=r"missing\.txt"):
        quantize_directory(tiny_model(), tmp_path / "out", gptq_recipe(), proof=Proof(tokens=64, text="missing.txt"))
    assert not (tmp_path / "out").exists()


def test_a_weight_that_decodes_otherwise_is_named(pressed_dir: Path) -> None:
    pressed = CompressedCheckpoint.open(pressed_dir)
    name = next(iter(pressed.manifest.weights))
    with pytest.raises(NumericsError, match=name.replace(".", r"\.")):
        check_reloaded(pressed, {name: "0" * 64})
