"""A network in another basis: tensors as a checkpoint stores them go in, those of the rotated network come out.

Everything is computed in float64 and rounded once, to the type in which the tensor is stored.
"""

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch

from bitpress.errors import NumericsError
from bitpress.models.residual import Norm, Residual, Turn
from bitpress.transforms.rotate import Rotate, Rotation

__all__ = ["RotatedNetwork"]

# Values that are in float64 at a time.
_TOGETHER = 1 << 22


@dataclass(frozen=True)
class RotatedNetwork:
    """What becomes of a network's tensors.

    rotate     what was asked for
    residual   the residual stream, where it is rotated
    heads      the axes of value heads that are rotated
    untied     parameters that were tied to another one and are no more, with that one
    """

    rotate: Rotate
    residual: Residual | None
    heads: tuple[Turn, ...]
    untied: Mapping[str, str] = field(default_factory=dict)

    def apply_(self, tensors: dict[str, torch.Tensor]) -> None:
        """Put the rotated network's tensors in place of the source's. Those given are all of a block, or all outside the blocks.

        Raises NumericsError for a norm that adds a bias where its gain is 0.
        """
        tensors |= {alias: tensors[original] for alias, original in self.untied.items() if original in tensors}
        norms = {} if self.residual is None else {k: norm for k, norm in self.residual.norms.items() if k in tensors}
        gains = {name: tensors[name].double() + norm.offset for name, norm in norms.items()}
        for name, value in list(tensors.items()):
            if turns := self._turns_of(name):
                tensors[name] = self._turned(value, turns, gains)
        for name, norm in norms.items():
            if norm.bias is not None:
                tensors[norm.bias] = self._bias(norm, gains[name], tensors[norm.bias])
            tensors[name] = torch.full_like(tensors[name], 1 - norm.offset)

    def check(self) -> None:
        """Raise FormatError for a width that has no such rotation."""
        for turn in (*self.heads, *(() if self.residual is None else self.residual.turns[:1])):
            self._rotation(turn)

    def _turns_of(self, name: str) -> list[Turn]:
        residual = () if self.residual is None else self.residual.turns
        return [turn for turn in (*residual, *self.heads) if turn.parameter == name]

    def _rotation(self, turn: Turn) -> Rotation:
        if turn.heads is not None:
            number = re.search(r"\.(\d+)\.", turn.parameter)
            return self.rotate.of_values(turn.heads.shape[1], None if number is None else int(number[1]))
        assert self.residual is not None
        return self.rotate.of_residual(self.residual.width, centred=self.residual.centred)

    def _turned(self, value: torch.Tensor, turns: Sequence[Turn], gains: Mapping[str, torch.Tensor]) -> torch.Tensor:
        """Return a tensor in the new basis of each of its axes that are turned."""
        rest = [axis for axis in range(value.ndim) if axis not in {turn.axis for turn in turns}]
        if len(rest) == value.ndim - 1 and rest:  # slice by slice along an axis that stays
            step = max(1, _TOGETHER // max(math.prod(value.shape) // value.shape[rest[0]], 1))
            parts = value.split(step, rest[0])
            return torch.cat([self._turn(part, turns, gains) for part in parts], rest[0])
        return self._turn(value, turns, gains)

    def _turn(self, value: torch.Tensor, turns: Sequence[Turn], gains: Mapping[str, torch.Tensor]) -> torch.Tensor:
        work = value.double()
        for turn in turns:
            last = work.movedim(turn.axis, -1)
            if turn.gain is not None:
                last = last * gains[turn.gain]
            rotation = self._rotation(turn)
            if turn.heads is None:
                last = rotation.apply(last.contiguous())
            else:
                last = last.clone()
                last[..., turn.heads] = rotation.apply(last[..., turn.heads])
            work = last.movedim(-1, turn.axis)
        return work.to(value.dtype).contiguous()

    def _bias(self, norm: Norm, gain: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
        """Return the bias of a norm whose gain has become 1."""
        assert self.residual is not None
        if bool(((gain == 0) & (bias != 0)).any()):
            raise NumericsError(
                f"{norm.weight}: is 0 for a channel to which {norm.bias} adds, so it cannot be folded into the next weights; "
                "leave rotate out, or use residual: false."
            )
        shift = bias.double() / torch.where(gain == 0, 1.0, gain)
        rotation = self.rotate.of_residual(self.residual.width, centred=self.residual.centred)
        return rotation.apply(shift).to(bias.dtype)
