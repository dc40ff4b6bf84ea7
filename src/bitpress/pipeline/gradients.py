"""What the gradients of the loss say of the weights to compress, before any is: one pass forward and one or two back.

    sensitivity    [out, in]               mean over samples of the squared gradient by the weight, of the loss on the samples
    token weights  [samples, positions]    for every input: how much each token's outputs matter. The mean over outputs of the squared
                                           gradient of the loss, targets drawn from the model's own predictions, divided by its mean

Source   Kim et al. 2025, "GuidedQuant: Large Language Model Quantization via Exploiting End Loss Guidance": activation gradients, averaged
         into groups of outputs, weigh the tokens of the layer's objective (the authors' README). Tseng et al. 2025, "Model-Preserving
         Adaptive Rounding" (YAQA): the curvature of the divergence from the original is the Fisher information, which asks for drawn
         targets (from reviews of the paper).
Differs  drawn targets, where GuidedQuant has the loss on the text; one group: a token has one weight for each input, the mean over all
         outputs of all weights with that input, each scaled to a mean of 1. Weights that share an input still share its gram.

The whole model is held at once; of a sample only the states between blocks are kept, and each block runs again on the way back.
"""

from collections.abc import Callable, Collection, Sequence

import torch

from bitpress.calibration.output_gradients import OutputGradients
from bitpress.checkpoints.parameter import WeightParameter
from bitpress.errors import NumericsError
from bitpress.models.streaming import StreamedModel
from bitpress.models.task import Inputs
from bitpress.pipeline.calibration_stream import observe_weights, token_weights
from bitpress.progress import Progress

__all__ = ["measure_gradients"]

SEED = 0


def measure_gradients(
    model: StreamedModel,
    weights: Sequence[Sequence[WeightParameter]],
    inputs: Inputs,
    needs: Collection[str],
    check_stop: Callable[[], None],
    progress: Progress,
) -> dict[str, torch.Tensor]:
    """Return what the statistics among `needs` ask of the loss, float32.

    "sensitivity" is under the names of parameters, in their own shapes; for "loss_gram" token weights are under `token_weights(name)`.
    The model's outer parts must be loaded. Raises NumericsError when a gradient is not finite.
    """
    for i in range(len(model.blocks)):
        model.load_block_(i)
    felt = _Sensitivity(model, weights) if "sensitivity" in needs else None
    counted = _TokenWeights(model, weights) if "loss_gram" in needs else None
    progress.begin("gradients of the loss", len(inputs))
    for sample in inputs.split(1):
        check_stop()
        hidden = [model.embed(sample)]
        for i in range(len(model.blocks)):
            hidden.append(model.run_block(i, hidden[-1]))
        if felt is not None:
            felt.add(sample, hidden)
        if counted is not None:
            counted.add(sample, hidden)
        progress.advance("sample")
    for i in range(len(model.blocks)):
        model.drop_block_(i)
    found = ({} if felt is None else felt.mean(len(inputs))) | ({} if counted is None else counted.joined())
    for name, value in found.items():
        if not bool(torch.isfinite(value).all()):
            raise NumericsError(f"{name}: the gradient of the loss is not finite; use --set compute=fp32.")
    return found


class _Sensitivity:
    def __init__(self, model: StreamedModel, weights: Sequence[Sequence[WeightParameter]]) -> None:
        self.model = model
        self.names = [[p.name for p in block] for block in weights]
        self.total = {p.name: torch.zeros(p.parameter_shape) for block in weights for p in block}

    def add(self, sample: Inputs, hidden: Sequence[torch.Tensor]) -> None:
        gradient = self.model.loss_gradient(sample, hidden[-1], lambda outputs: self.model.task.loss(outputs, sample))
        for i in reversed(range(len(self.model.blocks))):
            gradient, found = self.model.block_gradients(i, hidden[i], gradient, self.names[i])
            for name, value in zip(self.names[i], found, strict=True):
                self.total[name] += value.float().square()

    def mean(self, samples: int) -> dict[str, torch.Tensor]:
        return {name: value / samples for name, value in self.total.items()}


class _TokenWeights:
    def __init__(self, model: StreamedModel, weights: Sequence[Sequence[WeightParameter]]) -> None:
        self.model = model
        self.observed = [[w for _, w in observe_weights(model, block).values()] for block in weights]
        self.samples: dict[str, list[torch.Tensor]] = {}
        self.leader_of: dict[str, str] = {}
        self.generator = torch.Generator().manual_seed(SEED)

    def add(self, sample: Inputs, hidden: Sequence[torch.Tensor]) -> None:
        task = self.model.task
        gradient = self.model.loss_gradient(sample, hidden[-1], lambda outputs: task.drawn_loss(outputs, self.generator))
        for i in reversed(range(len(self.model.blocks))):
            watched = OutputGradients(self.observed[i])
            with watched:
                gradient, _ = self.model.block_gradients(i, hidden[i], gradient, ())
            self.leader_of |= watched.leader_of
            for name, squared in watched.found.items():
                self.samples.setdefault(name, []).append(squared)

    def joined(self) -> dict[str, torch.Tensor]:
        """Return the weights of every input under each of its weights' names; those that not every sample gave alike are left out."""
        own = {name: torch.stack(parts) for name, parts in self.samples.items() if len({p.shape for p in parts}) == 1}
        scaled = {name: w / w.mean() for name, w in own.items() if float(w.mean()) > 0}
        shared: dict[str, list[torch.Tensor]] = {}
        for name, w in scaled.items():
            shared.setdefault(self.leader_of[name], []).append(w)
        means = {leader: torch.stack(parts).mean(0) for leader, parts in shared.items()}
        return {token_weights(name): means[self.leader_of[name]].clone() for name in scaled}
