"""Evaluation texts on their way through a model, block by block, and how far one model's end is from another's."""

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
from bitpress.models.walk import LoadedBlock, Stream

__all__ = ["EvaluationText", "distances"]

States = Mapping[str, Float[torch.Tensor, "windows length hidden"]]


class EvaluationText:
    """A stream for every text; a visitor that moves all of them past a block."""

    def __init__(self, model: StreamedModel, windows: Mapping[str, Int[torch.Tensor, "windows length"]]) -> None:
        self.streams = {name: Stream(model, tokens.split(BATCH)) for name, tokens in windows.items()}

    def start_(self) -> None:
        for stream in self.streams.values():
            stream.start_()

    def visit_(self, block: LoadedBlock) -> None:
        for stream in self.streams.values():
            stream.visit_(block)

    @property
    def states(self) -> dict[str, torch.Tensor]:
        """Return the hidden states of every text."""
        return {name: torch.cat(stream.states) for name, stream in self.streams.items()}


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
    """Return the logits of one window after the other."""
    left = iter(states[name].split(1))
    return lambda tokens: model.logits(tokens, next(left))
