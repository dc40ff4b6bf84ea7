"""Choices: which of several settings a layer takes, by what calibration measured of it. Numbers only; `pipeline.layer_choice` measures.

    range          the largest magnitude of the layer's input decides, by limits between the settings
    output-error   the setting under which the layer's output changes least

A setting is what a recipe lists under `choose.among`: formats of the weight and of its input, and whether channel scales reach the input.
"""

import math
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import ClassVar, Literal, Protocol

from bitpress.errors import UsageError

__all__ = ["CHOICES", "Choice", "OutputErrorChoice", "RangeChoice"]


class Choice(Protocol):
    """One way to choose.

    needs     names of the statistics that the measuring reads
    measures  "range": one number of the input as the layer has it before channel scales; "output error": a number for every setting, behind
              them
    """

    needs: ClassVar[frozenset[str]]
    summary: ClassVar[str]
    paper: ClassVar[str]
    measures: ClassVar[Literal["range", "output error"]]

    def check(self, settings: int) -> None:
        """Raise UsageError unless it can choose among so many settings."""
        ...

    def choose(self, measured: Sequence[float]) -> int:
        """Return the number of the setting, from 0."""
        ...


@dataclass(frozen=True)
class RangeChoice:
    """FPTQ's choice by layer: settings by the range of activations.

    Source   Li et al. 2023, "FPTQ: Fine-grained Post-Training Quantization for Large Language Models" (P275): its abstract and a summary
             (papers.lunadong.com/paper/14731): layers that are easy have static scales, hard ones are equalized or have scales for every token.
    Differs  its limits were not seen: 15 and 150 are this project's. The range is the largest magnitude on the calibration text, so weights
             that share an input take one setting.
    """

    edges: tuple[float, ...] = (15.0, 150.0)

    needs: ClassVar[frozenset[str]] = frozenset({"max_abs"})
    summary: ClassVar[str] = (
        "by the largest magnitude of the layer's input: the first setting below the first of `edges`, and so on"
    )
    paper: ClassVar[str] = "P275"
    measures: ClassVar[Literal["range", "output error"]] = "range"

    def __post_init__(self) -> None:
        rising = all(a < b for a, b in pairwise(self.edges))
        if not self.edges or not rising or not all(math.isfinite(edge) and edge > 0 for edge in self.edges):
            raise UsageError(f"edges={list(self.edges)}: they are magnitudes above 0 that rise, at least one.")

    def check(self, settings: int) -> None:
        if settings != len(self.edges) + 1:
            raise UsageError(f"{len(self.edges)} edges part {len(self.edges) + 1} settings, and `among` lists {settings}.")

    def choose(self, measured: Sequence[float]) -> int:
        return bisect_right(self.edges, measured[0])


@dataclass(frozen=True)
class OutputErrorChoice:
    """LLM-FP4's search of formats: the setting under which a layer's output changes least.

    Source   Liu et al. 2023, "LLM-FP4: 4-Bit Floating-Point Quantized Transformers" (P008): its abstract, and its public code
             (`quant_layers/fp_linear.py`, which searches clipping by the squared error of the layer's output, of weights and inputs in turn).
    Differs  every combination that is listed is tried, on a sample of inputs behind channel scales and changes of basis. Weights are rounded to
             nearest with clipping by squared error, whatever the recipe's quantizer; stored parameters of inputs are the observer's on the sample.
    """

    needs: ClassVar[frozenset[str]] = frozenset({"sample"})
    summary: ClassVar[str] = "by the squared error of the layer's output on a sample of its inputs, weight and input rounded"
    paper: ClassVar[str] = "P008"
    measures: ClassVar[Literal["range", "output error"]] = "output error"

    def check(self, settings: int) -> None:
        """Any number of settings will do."""

    def choose(self, measured: Sequence[float]) -> int:
        return min(range(len(measured)), key=lambda i: (measured[i], i))


CHOICES: dict[str, type[RangeChoice] | type[OutputErrorChoice]] = {"range": RangeChoice, "output-error": OutputErrorChoice}
