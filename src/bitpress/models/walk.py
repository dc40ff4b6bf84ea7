"""The walk: the one loop over a model's blocks. A block is loaded, visitors look at it or change it, and its memory is given back.

    walk(model, [compressor, stream])        the stream runs through the blocks as the compressor left them

What a visitor needs from block to block it keeps itself: statistics, hidden states of texts (`Stream`), a journal.
"""

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from jaxtyping import Float

from bitpress.memory import release
from bitpress.models.streaming import StreamedModel
from bitpress.models.task import Inputs, Outputs

__all__ = ["LoadedBlock", "Stream", "Visitor", "walk"]


@dataclass(frozen=True)
class LoadedBlock:
    """A block whose parameters are in memory; `tensors` are they as stored, by name, on the model's device."""

    index: int
    name: str
    last: bool
    tensors: dict[str, torch.Tensor]


class Visitor(Protocol):
    """Something that looks at every block in turn, or changes it."""

    def visit_(self, block: LoadedBlock) -> None:
        """Do this visitor's work on a block that is loaded. Those after it see what it has changed."""
        ...


def walk(
    model: StreamedModel,
    visitors: Sequence[Visitor],
    *,
    first: int = 0,
    check_stop: Callable[[], None] = lambda: None,
    note: Callable[[str], None] = lambda name: None,
) -> None:
    """Load one block after the other from `first` on, hand each to the visitors in turn, and drop it; `note` hears its name then.

    The model's outer parts must be loaded where a visitor runs a block. Raises what the visitors raise; the block is dropped then too.
    """
    total = len(model.blocks)
    for i in range(first, total):
        check_stop()
        try:
            block = LoadedBlock(i, model.block_name(i), i == total - 1, model.load_block_(i))
            for visitor in visitors:
                visitor.visit_(block)
            del block
        finally:
            model.drop_block_(i)
        release()
        note(model.block_name(i))


class Stream:
    """The hidden states of batches of inputs, on the host; a visitor that moves them past every block. `seconds` is what running took."""

    def __init__(self, model: StreamedModel, batches: Sequence[Inputs]) -> None:
        self.model, self.batches = model, batches
        self.states: list[Float[torch.Tensor, "samples positions hidden"]] = []
        self.seconds = 0.0

    def start_(self) -> None:
        """Embed the inputs; the model's outer parts must be loaded."""
        started = time.perf_counter()
        self.states = [self.model.embed(batch) for batch in self.batches]
        self.seconds += time.perf_counter() - started

    def visit_(self, block: LoadedBlock) -> None:
        started = time.perf_counter()
        for k, state in enumerate(self.states):
            self.states[k] = self.model.run_block(block.index, state)
        self.seconds += time.perf_counter() - started

    def scorer(self) -> Outputs:
        """Return a function that gives the outputs of one sample after the other behind the last block, from the first one on.

        They are on the model's device.
        """
        left: Iterator[torch.Tensor] = (sample for state in self.states for sample in state.split(1))

        def outputs(inputs: torch.Tensor) -> torch.Tensor:
            started = time.perf_counter()
            found = self.model.outputs(inputs, next(left).to(self.model.device))
            self.seconds += time.perf_counter() - started
            return found

        return outputs
