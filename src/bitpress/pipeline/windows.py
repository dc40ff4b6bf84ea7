"""Windows of tokens for a model: its own tokenizer over a named text."""

from pathlib import Path
from typing import Any

from bitpress.calibration.samples import Windows, read_texts, sample_windows
from bitpress.checkpoints.tokenizer import load_tokenizer

__all__ = ["load_windows"]


def load_windows(text: str, model: Path, *, samples: int, length: int, seed: int, chat: bool = False) -> Windows:
    """Read a text, tokenize it as the model does, and draw windows. Raises CalibrationError, CheckpointError."""
    tokenizer: Any = load_tokenizer(model)
    return sample_windows(read_texts(text), tokenizer, samples=samples, length=length, seed=seed, chat=chat)
