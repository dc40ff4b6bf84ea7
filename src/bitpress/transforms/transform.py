"""ScaleSearch, the protocol of searches for channel factors: hyper-parameters in the constructor, weights that share an input in `plan`.

The factors multiply the weights' input columns and divide the input; `folding` decides where the division goes.
"""

from collections.abc import Sequence
from typing import ClassVar, Protocol

import torch
from jaxtyping import Float
from jaxtyping import Integer as Int

from bitpress.formats import Format
from bitpress.transforms.sites import Sites

__all__ = ["InputStats", "ScaleSearch"]


class InputStats(Protocol):
    """The statistics of one input that a search reads; `calibration.stats.Stats` is one."""

    @property
    def tokens(self) -> int: ...

    @property
    def gram(self) -> Float[torch.Tensor, "in in"] | None:
        """x.T @ x / tokens."""
        ...

    @property
    def mean_abs(self) -> Float[torch.Tensor, " in"] | None:
        """Mean of |x| over tokens."""
        ...

    @property
    def max_abs(self) -> Float[torch.Tensor, " in"] | None:
        """The largest |x| of all tokens."""
        ...

    @property
    def sample(self) -> Float[torch.Tensor, "sample in"] | None:
        """Inputs of some tokens, drawn from all."""
        ...


class ScaleSearch(Protocol):
    """One paper's way to choose the factors.

    needs      names of the statistics that `plan` reads
    sites      where the factors apply: at the input of layers, folded or online
    paper      row of the paper in the catalogue of methods
    run_time   if no earlier layer can absorb the inverse scale: apply it at run time (True) or leave the input unscaled (False)
    """

    needs: ClassVar[frozenset[str]]
    sites: ClassVar[Sites]
    summary: ClassVar[str]
    paper: ClassVar[str]

    @property
    def run_time(self) -> bool: ...

    def plan(
        self,
        weights: Sequence[Float[torch.Tensor, "_out in"]],
        stats: InputStats,
        fmt: Format,
        channel_of: Int[torch.Tensor, " in"] | None = None,
        inputs: Format | None = None,
        producer: Float[torch.Tensor, " in"] | None = None,
    ) -> Float[torch.Tensor, " in"]:
        """Choose the positive float32 factor of every input channel for all weights that share the input.

        `channel_of[i]` is the producer's channel that makes input channel i: inputs from one channel share one factor.
        None makes every input a channel of its own. `inputs` is the format to which the input will be rounded, None if it stays as it is.
        `producer` holds the largest magnitude of the matrix row that makes each input, None where no matrix does.
        Raises CalibrationError, FormatError, NumericsError.
        """
        ...
