"""Scale searches inside a block: plan a factor for each group of weights that share an input, fold it where the network allows.

If no producer can absorb the division, the factor stays with the weight and its inverse becomes the weight's input map, unless the search
leaves such inputs unscaled. Experts are not scaled: their inputs come through a router that must see the same values as before.
"""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float

from bitpress.calibration import Observed, Stats
from bitpress.checkpoints.parameter import WeightParameter
from bitpress.errors import NumericsError
from bitpress.formats import Format
from bitpress.models.skeleton import set_parameter_
from bitpress.models.streaming import StreamedModel
from bitpress.pipeline.planned_weight import PlannedWeight
from bitpress.transforms.equalize import row_sizes
from bitpress.transforms.folding import Fold, apply_fold_, find_folds
from bitpress.transforms.transform import ScaleSearch

__all__ = ["PROBE_LENGTH", "Rescaled", "check_kept", "rescale_block_"]

# Tokens on which folds are tried.
PROBE_LENGTH = 16


@dataclass
class Rescaled:
    """The scales of a block, by the weight's name.

    factors     the factors of its columns
    unfolded    the weights whose input has to be divided at run time
    stats       the statistics of its input after the division
    """

    factors: dict[str, Float[torch.Tensor, " in"]]
    unfolded: set[str]
    stats: dict[str, Stats]


def rescale_block_(
    model: StreamedModel,
    i: int,
    tensors: dict[str, torch.Tensor],
    planned: Sequence[PlannedWeight],
    observed: Mapping[str, tuple[WeightParameter, Observed]],
    groups: Sequence[Sequence[str]],
    stats: Mapping[str, Stats],
    searches: Sequence[ScaleSearch],
    hidden: torch.Tensor,
    unscaled: Collection[str] = (),
) -> Rescaled:
    """Search and fold the scales of one block; rewrite `tensors` and the loaded block to match. A group with an `unscaled` weight is left alone.

    Folding is done in float32 on the stored values; norms and biases are rounded once to the type in which they are stored, and the
    consumers are multiplied by the factor that results from this rounding.
    """
    result = Rescaled({}, set(), dict(stats))
    if not searches:
        return result
    # A recipe with transforms has no lossless formats: those weights must not change.
    formats = {p.parameter.stem: p.format for p in planned if not p.parameter.experts and isinstance(p.format, Format)}
    inputs = {p.parameter.stem: p.method.inputs.format for p in planned if p.method.inputs is not None}
    plain = [[n for n in group if not observed[n][0].experts] for group in groups]
    plain = [group for group in plain if any(n in formats for n in group) and not any(n in unscaled for n in group)]
    probe = hidden[:1, :PROBE_LENGTH]
    block = model.blocks[i]
    folds = find_folds(block, lambda: model.run_block(i, probe), [[observed[n][1] for n in group] for group in plain])
    stored = {name: value.dtype for name, value in tensors.items()}
    for name, value in tensors.items():
        set_parameter_(model.model, name, value.float() if value.is_floating_point() else value)
    for search in searches:
        for g, group in enumerate(plain):
            _rescale_group_(model, block, group, folds.get(g), observed, formats, inputs, search, stored, result)
    for name, value in tensors.items():
        if value.is_floating_point():
            live = model.model.get_parameter(name) if name in dict(model.model.named_parameters()) else value
            compressed = any(p.parameter.name == name for p in planned)
            tensors[name] = live.detach().clone() if compressed else live.detach().to(stored[name])
    model.fill_(tensors)
    return result


def check_kept(model: StreamedModel, kept: Mapping[str, torch.Tensor]) -> None:
    """Raise NumericsError unless the uncompressed tensors that will be stored equal those that the loaded block computes with."""
    live = dict(model.model.named_parameters()) | dict(model.model.named_buffers())
    for name, value in kept.items():
        if name in live and not torch.equal(live[name].data, value.to(live[name])):
            raise NumericsError(
                f"{name}: would be stored with other values than the model computes with; this is a bug in bitpress, please report it."
            )


def _rescale_group_(
    model: StreamedModel,
    block: torch.nn.Module,
    group: Sequence[str],
    fold: Fold | None,
    observed: Mapping[str, tuple[WeightParameter, Observed]],
    formats: Mapping[str, Format],
    inputs: Mapping[str, Format],
    search: ScaleSearch,
    stored: Mapping[str, torch.dtype],
    result: Rescaled,
) -> None:
    if fold is None and not search.run_time:
        return
    parameters = [observed[name][0] for name in group]
    live = [model.model.get_parameter(p.name).data for p in parameters]
    matrices = [p.matrices(w)[0] for p, w, name in zip(parameters, live, group, strict=True) if name in formats]
    seen = next(result.stats[name] for name in group if name in result.stats)
    fmt = next(formats[name] for name in group if name in formats)
    rounded = next((inputs[name] for name in group if name in inputs), None)
    made_by = (None, None) if fold is None else (fold.channel_of, row_sizes(block, fold))
    factor = search.plan(matrices, seen, fmt, made_by[0], rounded, made_by[1])
    if fold is not None:
        norm = min((dtype for dtype in stored.values() if dtype.is_floating_point), key=lambda d: d.itemsize)
        factor = apply_fold_(block, fold, fold.per_channel(factor), stored=norm)
    for parameter, w, name in zip(parameters, live, group, strict=True):
        if fold is None and name not in formats:
            continue  # an uncompressed weight reads the input without a map
        w.mul_(factor[:, None] if parameter.transposed else factor)
        result.stats[name] = result.stats[name].rescaled(1 / factor)
        result.factors[name] = result.factors.get(name, torch.ones_like(factor)) * factor
        if fold is None:
            result.unfolded.add(name)
