"""What a weight looks like before and after, for the report: the spread of its values, and its outlier channels.

Costs a pass over the weight and its decoded values for the channels, and one over at most SAMPLE values for the spread. Experts are
summed up matrix by matrix: their values are counted in standard deviations of their own.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from jaxtyping import Float

from bitpress.calibration import Stats
from bitpress.evaluation.utilization import sampled, utilization
from bitpress.formats import CompressedWeight
from bitpress.report.document import Channels, Distribution, Utilization, WeightPicture
from bitpress.transforms.basis import into_basis

__all__ = ["MatrixPicture", "draw_weight", "look_at", "with_utilization"]

# The values of a matrix that are counted; rows are left out evenly to come down to so many.
SAMPLE = 2**18
BINS, REACH = 40, 4.0
# Channels that are named, and the parts that shares are counted in.
NAMED, PARTS = 5, 10_000
# Weights between these have squares, and sums of squares, in the range of float32.
SMALL, LARGE = 1e-15, 1e12


@dataclass(frozen=True)
class MatrixPicture:
    """Sums over one matrix: values in every bin, before and after, and the energies of its columns, its inputs and its error."""

    deviation: float
    largest: float
    outside: float
    original: Float[torch.Tensor, " bins"]
    compressed: Float[torch.Tensor, " bins"]
    weights: Float[torch.Tensor, " in"]
    inputs: Float[torch.Tensor, " in"] | None
    errors: Float[torch.Tensor, " in"]
    utilization: Utilization | None = None


def look_at(w: Float[torch.Tensor, "out in"], w_hat: Float[torch.Tensor, "out in"], stats: Stats | None) -> MatrixPicture:
    """Return the sums over a matrix and its decoded values; `stats` are those of its input."""
    size = float(w.abs().max())
    if size and not SMALL < size < LARGE:  # squares out of the range of float32
        scaled = look_at(w / size, w_hat / size, stats)
        return replace(scaled, deviation=scaled.deviation * size)
    rows = slice(None, None, max(1, -(-w.numel() // SAMPLE)))
    sample, decoded = w[rows].contiguous(), w_hat[rows].contiguous()
    deviation = float(sample.std(correction=0))
    unit = deviation or 1.0
    edge = REACH * unit
    inputs = _input_energies(stats)
    errors = (w - w_hat).square_().sum(0).double()
    original = torch.histc(sample, BINS, -edge, edge)
    return MatrixPicture(
        deviation=deviation,
        largest=float(sample.abs().max()) / unit,
        outside=1 - float(original.sum()) / sample.numel(),
        original=original / sample.numel(),
        compressed=torch.histc(decoded, BINS, -edge, edge) / decoded.numel(),
        weights=w.square().sum(0).double(),
        inputs=inputs,
        errors=errors if inputs is None else errors * inputs,
    )


def with_utilization(
    picture: MatrixPicture,
    w: Float[torch.Tensor, "out in"],
    weight: CompressedWeight,
    factor: Float[torch.Tensor, " in"] | None,
    stats: Stats | None,
) -> MatrixPicture:
    """Add how much of the space of codes is used, before and after: a weight's columns take `factor`, then the maps of `weight`; its input
    the inverse of both."""
    now = into_basis(w if factor is None else w * factor, (weight.input_map, weight.output_map))
    rows = _pair(w, now)
    if rows is None:
        return picture
    held_out = None if stats is None else stats.held_out
    inputs = None
    if held_out is not None:
        x = sampled(held_out.x).float()
        moved = x if factor is None else x / factor
        inputs = _pair(x, moved if weight.input_map is None else weight.input_map.apply(moved))
    return replace(picture, utilization=Utilization(weights=rows, inputs=inputs))


def _pair(before: torch.Tensor, after: torch.Tensor) -> list[float] | None:
    pair = [utilization(before), utilization(after)]
    return None if None in pair else [value for value in pair if value is not None]


def _all_utilized(found: Sequence[Utilization]) -> Utilization | None:
    """Return the means over all matrices of a parameter."""

    def means(pairs: Sequence[list[float]]) -> list[float]:
        return [_short(sum(values) / len(pairs)) for values in zip(*pairs, strict=True)]

    inputs = [one.inputs for one in found if one.inputs is not None]
    if not found:
        return None
    return Utilization(weights=means([one.weights for one in found]), inputs=means(inputs) if inputs else None)


def draw_weight(matrices: Sequence[MatrixPicture]) -> WeightPicture:
    """Put the sums over all matrices of a parameter together."""
    count = len(matrices)
    measured = [m for m in matrices if m.inputs is not None]  # experts that no token reached have none
    weights = torch.stack([m.weights for m in matrices]).sum(0)
    inputs = torch.stack([m.inputs for m in measured if m.inputs is not None]).sum(0) if measured else None
    errors = torch.stack([m.errors for m in measured or matrices]).sum(0)
    of_weights = _multiples(weights)
    of_inputs = None if inputs is None else _multiples(inputs)
    ranked = of_weights if of_inputs is None else of_inputs
    index = torch.argsort(ranked, descending=True, stable=True)[:NAMED]
    share = errors / errors.sum().clamp(min=torch.finfo(errors.dtype).tiny)
    return WeightPicture(
        distribution=Distribution(
            deviation=_short(sum(m.deviation for m in matrices) / count),
            reach=REACH,
            original=_parts([m.original for m in matrices]),
            compressed=_parts([m.compressed for m in matrices]),
            outside=_short(sum(m.outside for m in matrices) / count),
            largest=_short(max(m.largest for m in matrices)),
        ),
        channels=Channels(
            ranked_by="weights" if of_inputs is None else "inputs",
            of=len(ranked),
            index=index.tolist(),
            inputs=None if of_inputs is None else [_short(value) for value in of_inputs[index].tolist()],
            weights=[_short(value) for value in of_weights[index].tolist()],
            error=[_short(value) for value in share[index].tolist()],
        ),
        utilization=_all_utilized([m.utilization for m in matrices if m.utilization is not None]),
    )


def _input_energies(stats: Stats | None) -> Float[torch.Tensor, " in"] | None:
    """Return the mean square of every input channel, or the square of its mean magnitude where that is all that was measured."""
    if stats is None:
        return None
    found = stats.mean_abs.square() if stats.gram is None and stats.mean_abs is not None else None
    found = stats.gram.diagonal() if stats.gram is not None else found
    if found is None or not bool(torch.isfinite(found).all()):
        return None
    return found.clamp(min=0).double()


def _multiples(energies: Float[torch.Tensor, " in"]) -> Float[torch.Tensor, " in"]:
    """Return sizes of channels as multiples of the median channel's; of the mean's where more than half of all are zero."""
    sizes = energies.sqrt()
    middle = float(sizes.median()) or float(sizes.mean()) or 1.0
    return sizes / middle


def _parts(shares: Sequence[Float[torch.Tensor, " bins"]]) -> list[int]:
    return [round(PARTS * share) for share in torch.stack(tuple(shares)).mean(0).tolist()]


def _short(value: float) -> float:
    """Round to four digits, for a picture."""
    return float(f"{value:.4g}")
