"""Scale searches inside a block: plan a factor for each group of weights that share an input, fold it where the network allows."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch

from bitpress.calibration import Stats
from bitpress.pipeline.plan import PlannedWeight
from bitpress.pipeline.streaming import StreamedModel
from bitpress.transforms.transform import ScaleSearch

__all__ = ["Rescaled", "rescale_block_"]


@dataclass
class Rescaled:
    """What was rewritten in a block.

    factors     weight name -> factor on its input columns
    unfolded    those of them whose inverse has to be applied to the input at run time
    tensors     parameters that took a factor in (norms, biases, producers' rows), as they are to be stored
    """

    factors: dict[str, torch.Tensor] = field(default_factory=dict)
    unfolded: dict[str, torch.Tensor] = field(default_factory=dict)
    tensors: dict[str, torch.Tensor] = field(default_factory=dict)


def rescale_block_(
    model: StreamedModel,
    i: int,
    tensors: Mapping[str, torch.Tensor],
    planned: Sequence[PlannedWeight],
    stats: Mapping[str, Stats],
    transforms: Sequence[tuple[str, ScaleSearch]],
    hidden: torch.Tensor | None,
) -> Rescaled:
    """Search and fold the scales of one block."""
    return Rescaled()
