"""Corrected biases: after a block's weights are compressed, what their products miss on average is added to the biases of their layers."""

from collections.abc import Mapping, Sequence

import torch

from bitpress.corrections.bias import BiasCorrection
from bitpress.kernels.product import LayerProduct
from bitpress.models.streaming import StreamedModel
from bitpress.pipeline.planned_weight import PlannedWeight
from bitpress.pipeline.rounded_inputs import SeenChannels
from bitpress.pipeline.weights import CompressedBlock

__all__ = ["NO_BIAS", "correct_biases_"]

NO_BIAS = "has no bias, so the mean error of its output stays"


def correct_biases_(
    model: StreamedModel,
    correction: BiasCorrection,
    planned: Sequence[PlannedWeight],
    tensors: Mapping[str, torch.Tensor],
    made: CompressedBlock,
    seen: Mapping[str, SeenChannels],
) -> None:
    """Correct the biases of compressed layers, as they will be stored and in the model.

    `tensors` are the block's as its scales were folded, `seen` the inputs of its weights. A layer without a bias gets a note.
    """
    for p in planned:
        name, layer = p.parameter.name, made.parameters[p.parameter.name].layer
        bias = f"{name.removesuffix('weight')}bias"
        if p.parameter.experts or bias not in made.kept:
            made.put_(made.parameters[name].with_note(NO_BIAS))
        elif name in seen:
            x = seen[name].sample
            (w,) = p.parameter.matrices(tensors[name])
            scales = seen[name].online
            wanted = (x if scales is None else x / scales) @ w.float().T
            change = correction.change(wanted, LayerProduct(layer.to(x.device), keep=True)(x, None))
            made.kept[bias] = (made.kept[bias].float() + change).to(made.kept[bias].dtype)
            model.fill_({bias: made.kept[bias]})
