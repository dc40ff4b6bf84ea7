"""A stack of weights (the experts of one parameter) while it is learned: every weight of it by itself, the whole as the model holds it."""

from collections.abc import Callable, Mapping, Sequence

import torch
from jaxtyping import Float

from bitpress.formats import CompressedWeight
from bitpress.tuning.learned import Leaf, LearnedWeight, Value
from bitpress.tuning.tuner import Tuning, begin_weight

__all__ = ["LearnedStack", "begin_stack", "parts_of"]


class LearnedStack:
    """
    parts     the stack's weights in their order
    learned   those of them that are learned, by their numbers
    restore   turns rows stacked in float32 into the model's parameter
    """

    def __init__(
        self,
        parts: Sequence[CompressedWeight],
        learned: Mapping[int, LearnedWeight],
        restore: Callable[[torch.Tensor], torch.Tensor],
    ) -> None:
        self.parts, self.learned, self.restore = parts, dict(learned), restore
        self.others = {e: part.dequantize() for e, part in enumerate(parts) if e not in self.learned}

    def leaves(self) -> list[Leaf]:
        return [leaf for one in self.learned.values() for leaf in one.leaves()]

    def penalty(self, progress: float) -> torch.Tensor | None:
        """Return the mean of the experts' penalties, so that a stack weighs as much as one weight does."""
        found = [p for one in self.learned.values() if (p := one.penalty(progress)) is not None]
        return torch.stack(found).mean() if found else None

    def value(self, progress: float) -> torch.Tensor:
        return self._joined(lambda one: one.value(progress))

    def hard_value(self) -> torch.Tensor:
        return self._joined(lambda one: one.hard_value())

    def start_value(self) -> torch.Tensor:
        return self._joined(lambda one: one.start_value())

    def harden(self) -> CompressedWeight:
        learned = self.learned
        return CompressedWeight.stack_rows([learned[e].harden() if e in learned else part for e, part in enumerate(self.parts)])

    def _joined(self, read: Callable[[LearnedWeight], Value]) -> torch.Tensor:
        values = [read(self.learned[e]) if e in self.learned else self.others[e] for e in range(len(self.parts))]
        # The inputs of stacked experts are not rounded, so no expert is a layer.
        return self.restore(torch.cat([value for value in values if isinstance(value, torch.Tensor)]))


def parts_of(weight: CompressedWeight, count: int) -> list[CompressedWeight]:
    """Return the weights of a stack of `count`, sharing memory; a single one as it is."""
    if count == 1:
        return [weight]
    height = weight.shape[0] // count
    return [weight.row_slice(a, a + height) for a in range(0, weight.shape[0], height)]


def begin_stack(
    tuning: Tuning,
    weight: CompressedWeight,
    original: Float[torch.Tensor, "rows in"],
    count: int,
    restore: Callable[[torch.Tensor], torch.Tensor],
) -> LearnedStack | None:
    """Return a stack of `count` weights as it is learned, None where nothing of it is. Its codes are in a format that the tuning serves."""
    parts = parts_of(weight, count)
    begun = [begin_weight(tuning, part, own) for part, own in zip(parts, original.chunk(count), strict=True)]
    learned = {e: one for e, one in enumerate(begun) if one is not None}
    # Weights of a stack have maps of the same kinds: one without new maps cannot stand among others that have some.
    if not learned or (tuning.adds_maps and len(learned) < count):
        return None
    return LearnedStack(parts, learned, restore)
