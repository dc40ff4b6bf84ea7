"""The noise of the arithmetic: the original as it computes here against itself in float32."""

import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

from bitpress.measure.evaluation_text import EvaluationText, States, distances
from bitpress.models.opening import open_original
from bitpress.models.streaming import StreamedModel
from bitpress.models.task import Inputs
from bitpress.models.walk import walk

__all__ = ["FLOOR_WINDOWS", "measure_noise"]

# Samples of every text that it is measured on.
FLOOR_WINDOWS = 8


def measure_noise(
    path: Path,
    model: StreamedModel,
    texts: Mapping[str, Inputs],
    states: States,
    note: Callable[[str], None] = lambda unit: None,
) -> dict[str, Any]:
    """Return the row of kind "floor": distances on the first samples of every text, from the states after `model`'s last block.

    `note` hears of every block and sample. Raises what opening a model and measuring a distance raise.
    """
    some = {name: inputs[:FLOOR_WINDOWS] for name, inputs in texts.items()}
    exact, _ = open_original(path, torch.float32, device=model.device)
    exact.load_outer_()
    heldout = EvaluationText(exact, some)
    heldout.start_()
    walk(exact, [heldout], note=note)
    seen = {name: value[:FLOOR_WINDOWS] for name, value in states.items()}
    figures = distances((exact, heldout.states), (model, seen), some, note)
    kl = math.fsum(f["kl_mean"] for f in figures.values()) / len(figures)
    return {"kind": "floor", "texts": figures, "tokens": sum(w.numel() for w in some.values()), "kl_mean": kl}
