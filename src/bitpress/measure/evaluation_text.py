"""Held-out texts on their way through a model, block by block, and how far one model's end is from another's."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import torch
from jaxtyping import Float
from jaxtyping import Integer as Int

from bitpress.evaluation import measure_distance
from bitpress.figures import written
from bitpress.measure.evaluation import BATCH
from bitpress.models.streaming import StreamedModel

__all__ = ["EvaluationText", "distances"]

States = Mapping[str, Float[torch.Tensor, "windows length hidden"]]


class EvaluationText:
    """The hidden states of every text; `step_` moves them past a block that is loaded."""

    def __init__(self, model: StreamedModel, windows: Mapping[str, Int[torch.Tensor, "windows length"]]) -> None:
        self.model, self.windows = model, windows
        self.states: dict[str, torch.Tensor] = {}

    def start_(self) -> None:
        self.states = {
            name: torch.cat([self.model.embed(batch) for batch in windows.split(BATCH)])
            for name, windows in self.windows.items()
        }

    def step_(self, i: int) -> None:
        for states in self.states.values():
            for batch in states.split(BATCH):  # views: each is overwritten by what the block makes of it
                batch.copy_(self.model.run_block(i, batch))


def distances(
    original: tuple[StreamedModel, States],
    candidate: tuple[StreamedModel, States],
    windows: Mapping[str, Int[torch.Tensor, "windows length"]],
    note: Callable[[str], None] = lambda unit: None,
) -> dict[str, dict[str, Any]]:
    """Measure the distance of a candidate on every text, from the states after both models' last blocks.

    Both heads are the loaded outer parts of the models given. Figures are as they
    are written (`bitpress.figures`). Raises NumericsError when a logit or a figure is not a number.
    """
    found = {}
    for name, tokens in windows.items():

        def say(done: int, text: str = name) -> None:
            note(f"{text}, window {done}")

        measured = measure_distance(_scorer(*original, name), _scorer(*candidate, name), tokens, say)
        found[name] = written(dataclasses.asdict(measured), name)
    return found


def _scorer(model: StreamedModel, states: States, name: str) -> Callable[[torch.Tensor], torch.Tensor]:
    """Give the logits of one window after the other."""
    left = iter(states[name].split(1))
    return lambda tokens: model.logits(tokens, next(left))
