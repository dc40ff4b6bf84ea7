"""What a budget of bits may buy: the formats that every weight of a plan may have, until they are chosen."""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property

import torch
from jaxtyping import Float

from bitpress.allocation.linearity import check_budget, spend
from bitpress.formats import Format
from bitpress.pipeline.planned_weight import PlannedWeight
from bitpress.quantizers.rtn import RTN
from bitpress.recipes import LayerMethod, Named

__all__ = ["Offer", "trial_parts"]


def trial_parts(option: PlannedWeight) -> LayerMethod:
    """Return the parts by which the error of a format is measured: those of the recipe that need no statistics.

    Rounding with clipping by squared error stands for a quantizer that needs some.
    """
    parts = option.method
    quantizer = Named("quantizer", "rtn", RTN(clip="mse")) if parts.quantizer.part.needs else parts.quantizer
    return LayerMethod(parts.format, quantizer, tuple(change for change in parts.changes if not change.needs))


@dataclass(frozen=True)
class Offer:
    """A budget and what it may buy.

    bits      what is asked for, a weight, of all weights together
    options   for every weight of the plan, the weight in each format that it may have: a single one where an override says which
    """

    bits: float
    options: tuple[tuple[PlannedWeight, ...], ...]

    @property
    def free(self) -> list[tuple[PlannedWeight, ...]]:
        """Return the options of the weights that have several."""
        return [own for own in self.options if len(own) > 1]

    @cached_property
    def names(self) -> frozenset[str]:
        """The names of the weights that have several formats."""
        return frozenset(own[0].parameter.stem for own in self.free)

    @cached_property
    def sizes(self) -> list[list[int]]:
        return [[w.nbytes for w in own] for own in self.options]

    @cached_property
    def weights(self) -> list[int]:
        return [own[0].weights for own in self.options]

    @property
    def most_bits(self) -> float:
        """Bits a weight where every weight has its largest format."""
        return 8 * sum(map(max, self.sizes)) / sum(self.weights)

    @property
    def nbytes(self) -> int:
        """Bytes of all weights that the budget stands for, no more than those of the largest formats."""
        return int(min(self.bits, self.most_bits) * sum(self.weights) / 8)

    def check(self) -> None:
        """Raise UsageError for a budget that the smallest formats exceed."""
        check_budget(self.sizes, self.weights, self.bits)

    def excess(self) -> str | None:
        """Say that the budget is more than there is to buy, or return None."""
        if self.bits <= self.most_bits:
            return None
        return f"a budget of {self.bits:g} bits a weight is more than the largest formats take ({self.most_bits:.3f}); every weight may have its best."

    def choose(self, measured: Mapping[str, Float[torch.Tensor, " figures"]]) -> dict[str, Format]:
        """Return the format of every weight that has several, by its name.

        `measured` holds for each of them its factor and the relative squared errors of its options in their order.
        """
        factors, errors = [], []
        for own in self.options:
            figures = measured[own[0].parameter.stem].tolist() if len(own) > 1 else [0.0, 0.0]
            factors.append(figures[0])
            errors.append(figures[1:])
        taken = spend(factors, errors, self.sizes, self.weights, self.bits)
        formats = {own[at].parameter.stem: own[at].format for own, at in zip(self.options, taken, strict=True) if len(own) > 1}
        return {name: fmt for name, fmt in formats.items() if isinstance(fmt, Format)}

    def by_format(self) -> dict[str, tuple[int, float]]:
        """Return for every format the bytes, and the bits a weight, that all free weights would take in it."""
        sums: dict[str, int] = {}
        for own in self.free:
            for w in own:
                sums[w.format.name] = sums.get(w.format.name, 0) + w.nbytes
        weights = max(sum(own[0].weights for own in self.free), 1)
        return {name: (nbytes, 8 * nbytes / weights) for name, nbytes in sums.items()}

    def summary(self) -> dict[str, object]:
        """Return what is offered, as a plan holds it."""
        return {
            "bits": self.bits,
            "weights": len(self.free),
            "weights_fixed": len(self.options) - len(self.free),
            "options": [
                {"format": name, "bytes": nbytes, "bits_per_weight": bits} for name, (nbytes, bits) in self.by_format().items()
            ],
        }
