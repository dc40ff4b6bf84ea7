"""Samples for a model: drawn by its task, from the data that a recipe or an evaluation names."""

from pathlib import Path
from typing import Any

from bitpress.calibration import Samples
from bitpress.models.task import Task
from bitpress.recipes import Calibration

__all__ = ["draw_calibration", "draw_evaluation"]


def draw_calibration(calibration: Calibration, task: Task, model: Path, config: Any) -> Samples:
    """Draw the samples that a recipe calibrates on, and those that are held out. Raises CalibrationError, CheckpointError."""
    c = calibration
    task.check_length(config, c.length)
    drawn = {"samples": c.samples, "held_out": c.held_out, "length": c.length, "seed": c.seed}
    return task.draw(c.text, model, config, chat=c.chat, **drawn)


def draw_evaluation(
    data: str, task: Task, model: Path, config: Any, *, count: int, length: int, seed: int = 0
) -> tuple[Samples, int]:
    """Draw the samples that a model is measured on, `count` units of the task; return their length too.

    Raises CheckpointError, CalibrationError.
    """
    samples, length = task.cut(config, count, length)
    return task.draw(data, model, config, samples=samples, length=length, seed=seed), length
