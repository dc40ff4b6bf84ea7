"""Task: what a family of models takes and gives. The pipeline takes any row of `models/tasks/table.py`.

A model's inputs are one tensor whose first axis counts samples: tokens [samples, length] of a causal language model, pixels
[samples, channels, height, width] of an image classifier. What is in them, the task alone knows. Between its blocks a model holds
hidden states [samples, positions, hidden].
"""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, ClassVar, Protocol

import torch
from jaxtyping import Float, Shaped

from bitpress.calibration import Samples

__all__ = ["Inputs", "Outputs", "Task"]

Inputs = Shaped[torch.Tensor, "_ ..."]
# A function from the inputs of some samples to what a model says of them.
Outputs = Callable[[torch.Tensor], torch.Tensor]


class Task(Protocol):
    """One family of models.

    title           what such a model is called, as in "bert is an encoder, not a causal language model"; `titles` what several are
    auto_class      the name of transformers' class that builds and opens such models
    reads_tokens    the inputs are tokens [samples, length] with a position for each, so that a state between blocks can hold the tokens
                    (`models/carried.py`) where a model's blocks are given more than hidden states
    looks_ahead     what is said of a position may depend on later ones
    generates       a model can continue its inputs, so that `bitpress run` can answer with it
    """

    title: ClassVar[str]
    titles: ClassVar[str]
    auto_class: ClassVar[str]
    reads_tokens: ClassVar[bool]
    looks_ahead: ClassVar[bool]
    generates: ClassVar[bool]

    def why_not(self, config: Any) -> str | None:
        """Return what a model is instead ("an encoder"), or None for a model of this task."""
        ...

    def trial(self, config: Any, samples: int, length: int) -> Inputs:
        """Return inputs without meaning that every model of the task accepts, to find out with how a model is built."""
        ...

    def vary(self, inputs: Inputs, config: Any) -> Inputs:
        """Return other inputs of the same shape."""
        ...

    def shorten(self, inputs: Inputs, length: int) -> Inputs:
        """Return at most the first `length` positions of every sample, where the task has such."""
        ...

    def positions(self, config: Any, length: int) -> int:
        """Return how many positions the hidden states of a sample of `length` have between blocks."""
        ...

    def cut(self, config: Any, count: int, length: int) -> tuple[int, int]:
        """Return how many samples of which length an evaluation on `count` units (tokens, images) draws."""
        ...

    def check_length(self, config: Any, length: int) -> None:
        """Raise CalibrationError for samples that are longer than the model takes."""
        ...

    def check_directory(self, path: Path) -> None:
        """Raise CheckpointError where a directory lacks what `draw` reads of it, such as a tokenizer."""
        ...

    def check_inputs(self, inputs: Inputs, config: Any, where: str) -> None:
        """Raise CheckpointError for inputs that the model does not take."""
        ...

    def draw(
        self,
        data: str,
        path: Path,
        config: Any,
        *,
        samples: int,
        length: int,
        seed: int,
        chat: bool = False,
        held_out: int = 0,
    ) -> Samples:
        """Read the data that a name stands for and draw samples for the model in `path`, and at most `held_out` further ones.

        The samples do not depend on `held_out`. Raises CalibrationError, CheckpointError.
        """
        ...

    def count(self, inputs: Inputs) -> Mapping[str, int]:
        """Return how much the inputs hold, by the unit's name: {"tokens": 4096}."""
        ...

    def forward(self, model: Any, inputs: Inputs) -> Float[torch.Tensor, "..."]:
        """Run a model of transformers and return what it says of the inputs, without a cache."""
        ...

    def fits(self, outputs: Float[torch.Tensor, "samples ..."], inputs: Inputs) -> bool:
        """Whether outputs have the shape that the task expects for the inputs."""
        ...

    def output_values(self, config: Any, length: int) -> int:
        """Return how many numbers a model says of one sample of `length`."""
        ...

    def loss(self, outputs: Float[torch.Tensor, "samples ..."], inputs: Inputs) -> Float[torch.Tensor, ""]:
        """Return the mean training loss, differentiable by the outputs."""
        ...

    def drawn_loss(self, outputs: Float[torch.Tensor, "samples ..."], generator: torch.Generator) -> Float[torch.Tensor, ""]:
        """Return the mean training loss, differentiable by the outputs, on targets drawn from what the outputs themselves predict."""
        ...

    def distance(
        self, original: Outputs, candidate: Outputs, inputs: Inputs, note: Callable[[int], None] = lambda done: None
    ) -> dict[str, Any]:
        """Measure how far a candidate is from the original; `note` hears how many samples are done.

        The figures hold `kl_mean`, the mean KL divergence of the outputs in nats, and `kl_ci95`, half its 95 % interval; further ones are
        the task's own. `kl_by_window`, the means of single samples, become means over kinds of text. Raises NumericsError when an output is not finite.
        """
        ...

    def score(self, outputs: Outputs, inputs: Inputs, note: Callable[[int], None] = lambda done: None) -> dict[str, Any]:
        """Measure one model on inputs by the task's own figure. Raises NumericsError when an output is not finite."""
        ...
