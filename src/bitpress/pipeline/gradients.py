"""What the gradients of the loss say of the weights to compress, before any is: one pass forward and one or two back.

    sensitivity    [out, in]               mean over samples of the squared gradient by the weight, of the loss on the samples
    token weights  [samples, positions]    for every input: how much each token's outputs matter. The mean over outputs of the squared
                                           gradient of the loss, targets drawn from the model's own predictions, divided by its mean
    output_gram    [out, out]              mean over tokens of g g' |x|^2, divided by the mean of its diagonal: g the gradient of the same loss by
                                           a token's outputs, x its input
    curvature      a number a weight       trace of the Fisher information of a token: what noise of variance v in the weight adds to the
                                           KL divergence from the original is v / 2 times that, while v is small

Source   Kim et al. 2025, "GuidedQuant: Large Language Model Quantization via Exploiting End Loss Guidance": activation gradients, averaged
         into groups of outputs, weigh the tokens of the layer's objective (the authors' README). Tseng et al. 2025, "Model-Preserving
         Adaptive Rounding" (YAQA): the curvature of the divergence from the original is the Fisher information, which asks for drawn
         targets (from reviews of the paper).
         The token weights and the output_gram are the factors of the Fisher information of independent tokens, the mean of
         (x x') kron (g g'), each found with the identity in the other's place.
Differs  drawn targets, where GuidedQuant has the loss on the text; one group: a token has one weight for each input, the mean over all
         outputs of all weights with that input, each scaled to a mean of 1. Weights that share an input still share its gram.
         The trace is the squared norm of a sample's gradient on drawn targets, whose tokens are independent: nothing of the size of
         the weights is held beside the gradients of one block.

The whole model is held at once; of a sample only the states between blocks are kept, and each block runs again on the way back.
"""

import math
from collections.abc import Callable, Collection, Sequence
from typing import Protocol

import torch

from bitpress.calibration.output_gradients import OutputGradients
from bitpress.calibration.stats import mirrored, of_origin
from bitpress.checkpoints.parameter import WeightParameter
from bitpress.errors import NumericsError
from bitpress.models.streaming import StreamedModel
from bitpress.models.task import Inputs
from bitpress.pipeline.calibration_stream import observe_weights, output_gram_of, token_weights
from bitpress.progress import Progress

__all__ = ["gradient_bytes", "measure_curvature", "measure_gradients"]

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

    "sensitivity" is under the names of parameters, in their own shapes; for "loss_gram" token weights are under `token_weights(name)`;
    "output_gram" is under `output_gram_of(name)`, for weights of no expert. The model's outer parts must be loaded. Raises NumericsError when a gradient is not finite.
    """
    _load_(model)  # first: parts watch the parameters that are loaded
    felt = _Sensitivity(model, weights) if "sensitivity" in needs else None
    drawn = {"loss_gram", "output_gram"} & set(needs)
    counted = _ByOutputs(model, weights, grams="output_gram" in needs) if drawn else None
    _run(model, [part for part in (felt, counted) if part is not None], inputs, check_stop, progress)
    found = {} if felt is None else felt.mean(len(inputs))
    if counted is not None:
        found |= (counted.joined() if "loss_gram" in needs else {}) | counted.output_grams_()
    for name, value in found.items():
        if not bool(torch.isfinite(value).all()):
            raise NumericsError(f"{name}: the gradient of the loss is not finite; use --set compute=fp32.")
    return found


def measure_curvature(
    model: StreamedModel,
    weights: Sequence[Sequence[WeightParameter]],
    inputs: Inputs,
    check_stop: Callable[[], None],
    progress: Progress,
) -> dict[str, float]:
    """Return the trace of the Fisher information of every parameter, in nats a token. The model's outer parts must be loaded.

    Raises NumericsError when a gradient is not finite.
    """
    _load_(model)
    felt = _Curvature(model, weights)
    _run(model, [felt], inputs, check_stop, progress)
    for name, value in felt.total.items():
        if not math.isfinite(value):
            raise NumericsError(f"{name}: the gradient of the loss is not finite; use --set compute=fp32.")
    return {name: value / len(inputs) for name, value in felt.total.items()}


class _Part(Protocol):
    def add(self, sample: Inputs, hidden: Sequence[torch.Tensor]) -> None:
        """Run a sample back through the blocks, from the states before and behind each of them."""
        ...


def _load_(model: StreamedModel) -> None:
    for i in range(len(model.blocks)):
        model.load_block_(i)


def _run(
    model: StreamedModel, parts: Sequence[_Part], inputs: Inputs, check_stop: Callable[[], None], progress: Progress
) -> None:
    """Hand every sample's states between the blocks to the parts, and drop the blocks, which are all loaded."""
    progress.begin("gradients of the loss", len(inputs))
    for sample in inputs.split(1):
        check_stop()
        hidden = [model.embed(sample)]
        for i in range(len(model.blocks)):
            hidden.append(model.run_block(i, hidden[-1]))
        for part in parts:
            part.add(sample, hidden)
        progress.advance("sample")
    for i in range(len(model.blocks)):
        model.drop_block_(i)


class _Sensitivity:
    def __init__(self, model: StreamedModel, weights: Sequence[Sequence[WeightParameter]]) -> None:
        self.model = model
        self.names = [[p.name for p in block] for block in weights]
        self.total = {p.name: torch.zeros(p.parameter_shape) for block in weights for p in block}

    def add(self, sample: Inputs, hidden: Sequence[torch.Tensor]) -> None:
        task = self.model.task
        gradient = self.model.loss_gradient(sample, hidden[-1], lambda outputs: task.loss(outputs, sample.to(outputs.device)))
        for i in reversed(range(len(self.model.blocks))):
            gradient, found = self.model.block_gradients(i, hidden[i], gradient, self.names[i])
            for name, value in zip(self.names[i], found, strict=True):
                self.total[name] += value.float().square().cpu()

    def mean(self, samples: int) -> dict[str, torch.Tensor]:
        return {name: value / samples for name, value in self.total.items()}


class _Curvature:
    def __init__(self, model: StreamedModel, weights: Sequence[Sequence[WeightParameter]]) -> None:
        self.model = model
        self.names = [[p.name for p in block] for block in weights]
        self.total = {p.name: 0.0 for block in weights for p in block}
        self.generator = torch.Generator().manual_seed(SEED)

    def add(self, sample: Inputs, hidden: Sequence[torch.Tensor]) -> None:
        drawn = 0

        def loss(outputs: torch.Tensor) -> torch.Tensor:
            nonlocal drawn
            drawn = math.prod(outputs.shape[:-1])
            return self.model.task.drawn_loss(outputs, self.generator)

        gradient = self.model.loss_gradient(sample, hidden[-1], loss)
        for i in reversed(range(len(self.model.blocks))):
            gradient, found = self.model.block_gradients(i, hidden[i], gradient, self.names[i])
            for name, value in zip(self.names[i], found, strict=True):
                # The mean over `drawn` independent targets has that fraction of the information of one.
                self.total[name] += drawn * float(value.float().square().sum())


def gradient_bytes(needs: Collection[str], weights: Sequence[WeightParameter]) -> int:
    """Estimate the bytes of what `measure_gradients` finds, as it is held in memory and stored for a resumed run; token weights take less."""
    values = sum(math.prod(p.parameter_shape) for p in weights) * len(of_origin(needs, "loss") - {"output_gram"})
    values += sum(p.shape[0] ** 2 for p in weights if not p.experts) if "output_gram" in needs else 0
    return 4 * values


class _ByOutputs:
    """The gradients by the outputs of every weight: token weights, and with `grams` the output_gram."""

    def __init__(self, model: StreamedModel, weights: Sequence[Sequence[WeightParameter]], *, grams: bool) -> None:
        self.model = model
        alone = [p for block in weights for p in block if grams and not p.experts]
        self.grams = {p.parts()[0]: torch.zeros(p.shape[0], p.shape[0], device=model.device) for p in alone}
        self.observed = [[w for _, w in observe_weights(model, block).values()] for block in weights]
        self.samples: dict[str, list[torch.Tensor]] = {}
        self.leader_of: dict[str, str] = {}
        self.generator = torch.Generator().manual_seed(SEED)

    def add(self, sample: Inputs, hidden: Sequence[torch.Tensor]) -> None:
        task = self.model.task
        gradient = self.model.loss_gradient(sample, hidden[-1], lambda outputs: task.drawn_loss(outputs, self.generator))
        for i in reversed(range(len(self.model.blocks))):
            watched = OutputGradients(self.observed[i], self.grams)
            with watched:
                gradient, _ = self.model.block_gradients(i, hidden[i], gradient, ())
            self.leader_of |= watched.leader_of
            for name, squared in watched.found.items():
                self.samples.setdefault(name, []).append(squared.cpu())

    def output_grams_(self) -> dict[str, torch.Tensor]:
        """Return the output_gram of every weight whose outputs the loss depends on; the sums are used up."""
        found = {}
        for name in list(self.grams):
            gram = mirrored(self.grams.pop(name)).cpu()
            mean = float(gram.diagonal().mean())
            if mean > 0:
                found[output_gram_of(name)] = gram.div_(mean)
        return found

    def joined(self) -> dict[str, torch.Tensor]:
        """Return the weights of every input under each of its weights' names; those that not every sample gave alike are left out."""
        own = {name: torch.stack(parts) for name, parts in self.samples.items() if len({p.shape for p in parts}) == 1}
        scaled = {name: w / w.mean() for name, w in own.items() if float(w.mean()) > 0}
        shared: dict[str, list[torch.Tensor]] = {}
        for name, w in scaled.items():
            shared.setdefault(self.leader_of[name], []).append(w)
        means = {leader: torch.stack(parts).mean(0) for leader, parts in shared.items()}
        return {token_weights(name): means[self.leader_of[name]].clone() for name in scaled}
