"""Evaluation texts on their way through a model, block by block, and how far one model's end is from another's."""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from jaxtyping import Float

from bitpress.evaluation.distance import without_details
from bitpress.figures import written
from bitpress.measure.evaluation import BATCH
from bitpress.models.streaming import StreamedModel
from bitpress.models.task import Inputs
from bitpress.models.walk import LoadedBlock, Stream

__all__ = ["EvaluationText", "distances"]

States = Mapping[str, Float[torch.Tensor, "samples positions hidden"]]


class EvaluationText:
    """A stream for every text; a visitor that moves all of them past a block."""

    def __init__(self, model: StreamedModel, texts: Mapping[str, Inputs]) -> None:
        self.streams = {name: Stream(model, inputs.split(BATCH)) for name, inputs in texts.items()}

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
    texts: Mapping[str, Inputs],
    note: Callable[[str], None] = lambda unit: None,
) -> dict[str, dict[str, Any]]:
    """Measure the distance of a candidate on every text, from the states after both models' last blocks.

    Both heads are the loaded outer parts of the models given. Figures are as they
    are written (`bitpress.figures`). Raises NumericsError when an output or a figure is not a number.
    """
    found = {}
    for name, inputs in texts.items():

        def say(done: int, text: str = name) -> None:
            note(f"{text}, sample {done}")

        measured = original[0].task.distance(_scorer(*original, name), _scorer(*candidate, name), inputs, say)
        found[name] = written(without_details(measured), name)
    return found


def _scorer(model: StreamedModel, states: States, name: str) -> Callable[[torch.Tensor], torch.Tensor]:
    """Return the outputs of one sample after the other, on the model's device."""
    left = iter(states[name].split(1))
    return lambda inputs: model.outputs(inputs, next(left).to(model.device))
