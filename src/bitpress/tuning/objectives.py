"""What a span is learned by: a block by its output on calibration text, a layer by the gram of its inputs."""

from collections.abc import Callable, Mapping

import torch
from jaxtyping import Float
from jaxtyping import Integer as Int

from bitpress.tuning.learned import Value
from bitpress.tuning.tuner import LossName, Objective

__all__ = ["LOSSES", "BlockObjective", "LayerObjective"]

Out = Float[torch.Tensor, "windows positions channels"]


def _mse(out: Out, target: Out) -> Float[torch.Tensor, ""]:
    return (out.float() - target.float()).square().mean()


def _mae(out: Out, target: Out) -> Float[torch.Tensor, ""]:
    """Return the mean absolute error, in units of the targets' mean square over their mean size: relative to the latter in the end."""
    target = target.float()
    size = target.abs().mean().clamp_min(torch.finfo(torch.float32).tiny)
    return (out.float() - target).abs().mean() * target.square().mean() / size


def _channels(out: Out, target: Out) -> Float[torch.Tensor, ""]:
    """Norm Tweaking's distance: of the mean and of the standard deviation of every channel over the tokens, here squared."""
    a, b = out.float().flatten(0, 1), target.float().flatten(0, 1)
    return (a.mean(0) - b.mean(0)).square().mean() + (_deviation(a) - _deviation(b)).square().mean()


def _deviation(x: Float[torch.Tensor, "tokens channels"]) -> Float[torch.Tensor, " channels"]:
    """Return the standard deviation of every channel; one that is always the same has a gradient of 0, not NaN."""
    return x.var(0).clamp_min(torch.finfo(torch.float32).tiny).sqrt()


def _cosine(out: Out, target: Out) -> Float[torch.Tensor, ""]:
    """PTQ1.61's and ABQ-LLM's loss: squared error - log(mean cosine between tokens' outputs), the logarithm in units of the targets' square."""
    cosine = torch.nn.functional.cosine_similarity(out.float(), target.float(), dim=-1).mean()
    return _mse(out, target) - target.float().square().mean() * cosine.abs().clamp_min(torch.finfo(torch.float32).tiny).log()


LOSSES: dict[LossName, Callable[[Out, Out], Float[torch.Tensor, ""]]] = {
    "mse": _mse,
    "mae": _mae,
    "channels": _channels,
    "cosine": _cosine,
}


class BlockObjective(Objective):
    """A block's output beside a target, relative to the mean square of the targets.

    run      runs the block on hidden states with some of its parameters replaced
    inputs   hidden states of all windows, `targets` those that are wanted behind the block; `counted` windows are learned from, and those
             after them are held out
    columns  how many of the states' first columns are values; further ones only number the tokens
    """

    def __init__(
        self,
        run: Callable[[torch.Tensor, Mapping[str, Value]], torch.Tensor],
        inputs: Out,
        targets: Out,
        counted: int,
        loss: LossName,
        *,
        batch: int,
        device: torch.device | None = None,
        columns: int | None = None,
    ) -> None:
        self.run, self.inputs, self.targets, self.windows = run, inputs, targets, counted
        self.distance, self.batch, self.device = LOSSES[loss], batch, device or inputs.device
        self.columns = slice(columns)
        energy = torch.stack([t[..., self.columns].float().square().mean() for t in targets[:counted].split(batch)]).mean()
        self.energy = max(float(energy), torch.finfo(torch.float32).tiny)

    def loss(self, values: Mapping[str, Value], rows: Int[torch.Tensor, " batch"]) -> Float[torch.Tensor, ""]:
        out = self.run(self.inputs[rows].to(self.device), values)
        return self.distance(out[..., self.columns], self.targets[rows].to(self.device)[..., self.columns]) / self.energy

    @torch.no_grad()
    def held_out(self, values: Mapping[str, Value]) -> float:
        total, windows = 0.0, len(self.inputs)
        for at in range(self.windows, windows, self.batch):
            rows = torch.arange(at, min(at + self.batch, windows))
            total += float(self.loss(values, rows)) * len(rows)
        return total / max(windows - self.windows, 1)


class LayerObjective(Objective):
    """A layer's output error by the gram of its inputs: the mean over all calibration tokens, in every step.

        sum((w - w_hat) gram (w - w_hat)') / sum(w gram w')

    `held_out` are tokens beside these; without any, the loss itself decides what is kept.
    """

    windows = 1

    def __init__(
        self, name: str, w: Float[torch.Tensor, "out in"], gram: Float[torch.Tensor, "in in"], held_out: torch.Tensor | None
    ) -> None:
        self.name, self.w, self.gram, self.tokens = name, w.float(), gram, held_out
        tiny = torch.finfo(torch.float32).tiny
        self.energy = ((self.w @ gram) * self.w).sum().clamp_min(tiny)
        self.energy_held_out = self.energy if held_out is None else (held_out.float() @ self.w.T).square().sum().clamp_min(tiny)

    def loss(self, values: Mapping[str, Value], rows: Int[torch.Tensor, " batch"]) -> Float[torch.Tensor, ""]:
        off = self._weight(values) - self.w
        return ((off @ self.gram) * off).sum() / self.energy

    @torch.no_grad()
    def held_out(self, values: Mapping[str, Value]) -> float:
        if self.tokens is None or not len(self.tokens):
            return float(self.loss(values, torch.zeros(1, dtype=torch.long)))
        return float((self.tokens.float() @ (self._weight(values) - self.w).T).square().sum() / self.energy_held_out)

    def _weight(self, values: Mapping[str, Value]) -> Float[torch.Tensor, "out in"]:
        value = values[self.name]
        assert isinstance(value, torch.Tensor)  # recipes that round inputs learn no layer alone
        return value
