"""Windows of tokens for a model: its own tokenizer over a named text."""

from pathlib import Path
from typing import Any

from bitpress.calibration.samples import Windows, read_texts, sample_windows
from bitpress.checkpoints.tokenizer import load_tokenizer
from bitpress.errors import CalibrationError
from bitpress.models.skeleton import check_tokens
from bitpress.recipes import Calibration

__all__ = ["calibration_windows", "load_windows"]


def load_windows(text: str, model: Path, *, samples: int, length: int, seed: int, chat: bool = False) -> Windows:
    """Read a text, tokenize it as the model does, and draw windows. Raises CalibrationError, CheckpointError."""
    tokenizer: Any = load_tokenizer(model)
    return sample_windows(read_texts(text), tokenizer, samples=samples, length=length, seed=seed, chat=chat)


def calibration_windows(calibration: Calibration, model: Path, config: Any) -> Windows:
    """Draw the windows that a recipe calibrates on. Raises CalibrationError, CheckpointError."""
    c = calibration
    context = getattr(config.get_text_config(), "max_position_embeddings", None)
    if context is not None and c.length > context:
        raise CalibrationError(
            f"windows of {c.length} tokens are beyond the model's context of {context}; use --length {context}."
        )
    windows = load_windows(c.text, model, samples=c.samples, length=c.length, seed=c.seed, chat=c.chat)
    check_tokens(windows.tokens, config, str(model))
    return windows
