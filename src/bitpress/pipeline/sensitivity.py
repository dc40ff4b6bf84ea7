"""Sensitivity: the mean over samples of the squared gradient of the loss, for every weight to compress, before any is.

The whole model is held at once; of a sample only the states between blocks are kept, and each block runs again on the way back.
"""

from collections.abc import Callable, Sequence

import torch

from bitpress.checkpoints.parameter import WeightParameter
from bitpress.errors import NumericsError
from bitpress.models.streaming import StreamedModel
from bitpress.models.task import Inputs
from bitpress.progress import Progress

__all__ = ["measure_sensitivity"]


def measure_sensitivity(
    model: StreamedModel,
    weights: Sequence[Sequence[WeightParameter]],
    inputs: Inputs,
    check_stop: Callable[[], None],
    progress: Progress,
) -> dict[str, torch.Tensor]:
    """Return the sensitivity of the parameters of every block by their names, in its own shape, float32.

    The model's outer parts must be loaded. Raises NumericsError when a gradient is not finite.
    """
    names = [[p.name for p in block] for block in weights]
    for i in range(len(model.blocks)):
        model.load_block_(i)
    total = {p.name: torch.zeros(p.parameter_shape) for block in weights for p in block}
    progress.begin("sensitivity", len(inputs))
    for sample in inputs.split(1):
        check_stop()
        hidden = [model.embed(sample)]
        for i in range(len(model.blocks)):
            hidden.append(model.run_block(i, hidden[-1]))
        gradient = model.loss_gradient(sample, hidden.pop())
        for i in reversed(range(len(model.blocks))):
            gradient, found = model.block_gradients(i, hidden.pop(), gradient, names[i])
            for name, value in zip(names[i], found, strict=True):
                total[name] += value.float().square()
        progress.advance("sample")
    for i in range(len(model.blocks)):
        model.drop_block_(i)
    for name, value in total.items():
        value /= len(inputs)
        if not bool(torch.isfinite(value).all()):
            raise NumericsError(f"{name}: the gradient of the loss is not finite; use --set compute=fp32.")
    return total
