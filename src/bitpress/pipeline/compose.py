"""One weight through all the parts of a recipe: changes of basis, splits, the quantizer, repairs.

    w' = T_out^-1 w T_in^-1              the recipe's changes of basis, one after the other
    a = w' + shifts                      its changes of target
    w_hat' = Q(a - splits) + splits + repairs
    w_hat = T_out w_hat' T_in            the maps stay beside the terms

Channel factors come before, by group of weights (`channel_scaling`). A quantizer may add maps of its own: repairs are then put between them.
"""

from collections.abc import Collection
from dataclasses import replace

import torch
from jaxtyping import Float

from bitpress import native
from bitpress.calibration import Stats
from bitpress.devices import CPU
from bitpress.errors import CalibrationError, FormatError
from bitpress.formats import CompressedWeight, Format, Term
from bitpress.formats.maps.map import moved
from bitpress.quantizers.quantizer import Outcome
from bitpress.recipes import LayerMethod
from bitpress.transforms.basis import Maps, into_basis, with_maps

__all__ = ["compress_matrix", "compress_placed", "needed_of"]


def compress_matrix(
    w: Float[torch.Tensor, "out in"],
    stats: Stats | None,
    method: LayerMethod,
) -> Outcome:
    """Compress a weight in a number format. Raises the errors of the parts.

    Also raises FormatError for a split beside a quantizer that keeps maps, and CalibrationError if the quantizer needs statistics that a
    change of basis has made unknown.
    """
    fmt, quantizer, corrections = method.format, method.quantizer.part, method.corrections
    assert isinstance(fmt, Format)
    around: list[Maps] = []
    measured = stats
    for change in method.changes:
        inputs, outputs = change.plan(w, stats, fmt)
        maps = (inputs and moved(inputs, w.device), outputs and moved(outputs, w.device))
        w, stats = _into(w, stats, maps)
        around.append(maps)
    lost = [n for n in sorted(quantizer.needs) if getattr(measured, n, None) is not None and getattr(stats, n) is None]
    if lost:
        raise CalibrationError(
            f"{lost[0]} is not known after a change of basis, and this quantizer needs it; use one or the other."
        )
    fallbacks: tuple[str, ...] = ()
    for target in method.targets:
        w, taken = target.aim(w, stats)
        fallbacks += taken
    terms: list[Term] = []
    rest = w
    for correction in corrections:
        term = correction.split(rest, stats, fmt)
        if term is not None:
            terms.append(term)
            rest = rest - term.dequantize().to(rest.device)
    outcome = quantizer.quantize(rest, stats, fmt)
    own = (outcome.weight.input_map, outcome.weight.output_map)
    if terms and own != (None, None):
        raise FormatError(
            "this quantizer keeps a map of its own around its codes (groups=running does), and what a correction has "
            "taken out before is not seen through it; use other settings or another quantizer."
        )
    inner = CompressedWeight((*outcome.weight.terms, *terms))
    w, stats = _into(w, stats, own)
    for correction in corrections:
        term = correction.repair(w, inner, stats)
        if term is not None:
            inner = CompressedWeight((*inner.terms, term))
    weight = with_maps(inner, own)
    for maps in reversed(around):
        weight = with_maps(weight, maps)
    return replace(outcome, weight=weight, fallbacks=(*fallbacks, *outcome.fallbacks))


def _into(w: torch.Tensor, stats: Stats | None, maps: Maps) -> tuple[torch.Tensor, Stats | None]:
    return into_basis(w, maps), None if stats is None else stats.mapped(*maps)


def compress_placed(w: Float[torch.Tensor, "out in"], stats: Stats | None, parts: LayerMethod) -> Outcome:
    """Compress a matrix on its device, or on the host where the quantizer's loops are native; the result is on the device."""
    if w.device == CPU or not (parts.quantizer.part.native_loops and native.available()):
        return compress_matrix(w, stats, parts)
    outcome = compress_matrix(w.to(CPU), None if stats is None else stats.to(CPU), parts)
    return replace(outcome, weight=outcome.weight.to(w.device))


def needed_of(stats: Stats | None, needs: Collection[str]) -> Stats | None:
    """Return the statistics that a recipe needs, without those that only serve to measure the error, with the gram that the recipe asks for."""
    if stats is None or not needs:
        return None
    return stats.by_loss() if "gram" in needs else replace(stats, gram=None)
