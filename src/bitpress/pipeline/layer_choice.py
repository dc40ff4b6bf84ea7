"""What a layer takes of the settings that its recipe lists, once calibration has seen its input; the rules are those of `allocation.choices`.

A rule by range looks at the input before channel scales, since a setting may leave these out. A rule by output error compares formats behind
channel scales and changes of basis, with weight and input rounded:

    error = |Q_x(x) Q_w(w)' - x w'|^2 / |x w'|^2      x [tokens, in], a sample;  w [out, in]
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import torch
from jaxtyping import Float

from bitpress.allocation.choices import Choice
from bitpress.calibration import Stats
from bitpress.calibration.observers import KEPT_TOKENS, Seen, static_format
from bitpress.devices import CPU
from bitpress.errors import CalibrationError
from bitpress.formats import ActivationFormat, Format
from bitpress.pipeline.planned_weight import PlannedWeight
from bitpress.quantizers.rtn import RTN
from bitpress.recipes import Method, Named, Setting
from bitpress.recipes.inputs import InputMethod
from bitpress.transforms.basis import BasisChange, into_basis

__all__ = ["Settled", "settings_errors", "settle_layers"]

_ROUNDING = RTN(clip="mse")


@dataclass(frozen=True)
class Settled:
    """The weights of a stage with the settings that they have chosen.

    told      by the names of weights, what was measured and chosen, for the report
    unscaled  the names of weights whose inputs channel scales pass by
    """

    planned: tuple[PlannedWeight, ...]
    told: Mapping[str, str]
    unscaled: frozenset[str] = frozenset()


def settle_layers(
    method: Method,
    planned: Sequence[PlannedWeight],
    stats: Mapping[str, Stats],
    tensors: Mapping[str, torch.Tensor],
    measures: Literal["range", "output error"],
) -> Settled:
    """Choose for every weight that has settings left, if the method's rule measures this. Stacks of experts keep the recipe's own.

    `stats` and `tensors` are those of the weights as they are when this is called. Raises CalibrationError where no token reached a weight.
    """
    rule: Named[Choice] | None = next(iter(method.of("choice")), None)
    if rule is None or rule.part.measures != measures:
        return Settled(tuple(planned), {})
    made, told, unscaled = [], {}, set()
    for p in planned:
        name, settings = p.parameter.stem, p.method.settings
        if p.parameter.experts or not settings:
            made.append(replace(p, method=replace(p.method, settings=())))
            continue
        if name not in stats or not stats[name].tokens:
            raise CalibrationError(
                f"{name}: no calibration token reached this layer, so it cannot choose; override it or skip it."
            )
        if measures == "range":
            largest = stats[name].need("max_abs", name).max()
            measured, how = [float(largest)], f"{float(largest):.4g}"
        else:
            (w,) = p.parameter.matrices(tensors[p.parameter.name])
            measured = settings_errors(w.float(), stats[name], p, settings)
            how = f"{min(measured):.4g}, the least of {len(measured)}"
        chosen = settings[rule.part.choose(measured)]
        made.append(replace(p, method=p.method.under(chosen)))
        told[name] = f"{chosen.name} ({rule.name} {how})"
        if not chosen.said.scales:
            unscaled.add(name)
    return Settled(tuple(made), told, frozenset(unscaled))


def settings_errors(
    w: Float[torch.Tensor, "out in"], stats: Stats, planned: PlannedWeight, settings: Sequence[Setting]
) -> list[float]:
    """Return the relative squared error of a layer's output under every setting, in the order given."""
    first = planned.method.format
    assert isinstance(first, Format)
    w, stats = _in_basis(w, stats, planned.method.changes, first)
    x = stats.need("sample", planned.parameter.stem)
    wanted = x @ w.T
    energy = float(wanted.double().square().sum())
    weights: dict[Format, torch.Tensor] = {}
    inputs: dict[str, torch.Tensor] = {}
    errors = []
    for setting in settings:
        parts = planned.method.under(setting)
        fmt, own = parts.format, parts.inputs
        assert isinstance(fmt, Format)
        if fmt not in weights:
            weights[fmt] = _ROUNDING.quantize(w, None, fmt).weight.dequantize()
        key = "" if own is None else str(own.spec())
        if key not in inputs:
            inputs[key] = x if own is None else _rounded(x, own, w)
        lost = (inputs[key] @ weights[fmt].T - wanted).double()
        errors.append(float(lost.square().sum()) / energy if energy > 0 else 0.0)
    return errors


def _in_basis(
    w: torch.Tensor, stats: Stats, changes: Sequence[BasisChange], fmt: Format
) -> tuple[Float[torch.Tensor, "out in"], Stats]:
    """Return a weight and its statistics behind changes of basis."""
    for change in changes:
        maps = change.plan(w, stats, fmt)
        w, stats = into_basis(w, maps), stats.mapped(*maps)
    return w, stats


def _rounded(x: Float[torch.Tensor, "tokens in"], own: InputMethod, w: Float[torch.Tensor, "out in"]) -> torch.Tensor:
    """Return a sample of inputs as they will be rounded; stored parameters are chosen on the sample itself."""
    if own.observer is None:
        rest = ActivationFormat(own.format)
    else:
        seen = Seen(product=lambda u: u @ w.T.to(CPU))
        for part in x.split(KEPT_TOKENS):  # an observer keeps so many tokens of a batch
            seen.add(part)
        rest = static_format(own.format, own.observer.part.choose(seen, own.format)).to(x.device)
    return own.channels(rest, x.shape[1]).round(x)
