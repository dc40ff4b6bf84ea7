"""CompressedLayer: a compressed weight and how the input of its product is rounded. Manifests, kernels and runtimes take it.

    y = T_out (sum of terms) Q(T_in x)            Q is `input`, the identity where there is none

Its tensors are those of the weight and, under `input.`, the stored parameters of a static input: `term0.codes`, `in.scale`, `input.scale`.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from bitpress.errors import FormatError
from bitpress.formats.channels import ChannelFormat, InputFormat, build_input, expected_input
from bitpress.formats.format import Expected
from bitpress.formats.weight import CompressedWeight

__all__ = ["CompressedLayer"]

_PREFIX = "input."


@dataclass(frozen=True)
class CompressedLayer:
    weight: CompressedWeight
    input: InputFormat | None = None

    def __post_init__(self) -> None:
        if isinstance(self.input, ChannelFormat):
            self.input.fits(self.weight.shape[1])
        elif self.input is not None:
            self.input.format.block_grid((1, self.weight.shape[1]))  # raises FormatError where the block does not fit

    @property
    def shape(self) -> tuple[int, int]:
        return self.weight.shape

    @property
    def device(self) -> torch.device:
        return self.weight.device

    def to(self, device: torch.device) -> "CompressedLayer":
        """Return the layer on another device; itself where it is there."""
        return CompressedLayer(self.weight.to(device), self.input and self.input.to(device))

    def tensors(self) -> dict[str, torch.Tensor]:
        """Return all stored tensors by name."""
        stored = {} if self.input is None else {f"{_PREFIX}{name}": t for name, t in self.input.tensors.items()}
        return self.weight.tensors() | stored

    def input_spec(self) -> dict[str, str] | None:
        """Return the specification of the input as JSON, or None: with the weight's specification it defines the layer."""
        return None if self.input is None else self.input.spec()

    @staticmethod
    def expected(spec: Mapping[str, Any], input_spec: Mapping[str, Any] | None = None) -> Expected:
        """Return dtype and shape of every tensor that the specifications of a weight and of its input imply.

        Raises FormatError or UsageError for bad ones.
        """
        tensors = CompressedWeight.expected(spec)
        if input_spec is None:
            return tensors
        own = expected_input(input_spec, spec["shape"][1])
        return tensors | {f"{_PREFIX}{name}": entry for name, entry in own.items()}

    @classmethod
    def build(
        cls,
        spec: Mapping[str, Any],
        tensors: Mapping[str, torch.Tensor],
        input_spec: Mapping[str, Any] | None = None,
    ) -> "CompressedLayer":
        """Put a layer together and check it: the exact key set, dtypes, shapes, and content used as an address."""
        own = {name.removeprefix(_PREFIX): t for name, t in tensors.items() if name.startswith(_PREFIX)}
        weight = CompressedWeight.build(spec, {name: t for name, t in tensors.items() if not name.startswith(_PREFIX)})
        expected = {} if input_spec is None else expected_input(input_spec, weight.shape[1])
        got = {name: (t.dtype, tuple(t.shape)) for name, t in own.items()}
        if got != expected:
            raise FormatError(f"the input's tensors are {got} where {expected} are needed.")
        if input_spec is None:
            return cls(weight)
        made = build_input(input_spec, own)
        made.check()
        return cls(weight, made)
