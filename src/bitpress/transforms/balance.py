"""Balance: scale channels so that the weight's columns are as large as their inputs; before a rotation, which mixes the channels.

Source   The diagonal rescaling of Chee et al. 2023, "QuIP", as in the authors' public code (`method.py`); an option of QuIP#'s.
Differs  channels that were always 0 take the mean of the others; the floor is relative to the largest channel, not absolute.
Needs    gram [in, in] float32.     Cost  4 bytes and one multiplication a channel.
Update   d = (diag(gram) / diag(w' w))^(1/4),  T_in = 1 / d
Fails    CalibrationError without statistics.
"""

from dataclasses import dataclass
from typing import ClassVar

import torch
from jaxtyping import Float

from bitpress.errors import CalibrationError
from bitpress.formats import Format, Scale
from bitpress.transforms.basis import Maps
from bitpress.transforms.sites import Sites
from bitpress.transforms.transform import InputStats

__all__ = ["Balance", "balance", "need_gram"]

# Smaller channels than 1e-8 of the largest square are balanced as if they were that large.
SMALLEST = 1e-8


@dataclass(frozen=True)
class Balance:
    needs: ClassVar[frozenset[str]] = frozenset({"gram"})
    sites: ClassVar[Sites] = {"layer input": frozenset({"online"})}
    summary: ClassVar[str] = "diagonal balance of a weight's columns against their inputs; before a rotation"
    paper: ClassVar[str] = "P210"

    def plan(self, w: Float[torch.Tensor, "out in"], stats: InputStats | None, fmt: Format) -> Maps:
        return Scale(1 / balance(w, need_gram(stats, "balance"))), None


def balance(w: Float[torch.Tensor, "out in"], gram: Float[torch.Tensor, "in in"]) -> Float[torch.Tensor, " in"]:
    """Return the factors d of the weight's columns that make them as large as their inputs."""
    return (_relative(gram.diagonal()) / _relative(w.float().square().sum(0))).sqrt().sqrt()


def _relative(values: Float[torch.Tensor, " n"]) -> Float[torch.Tensor, " n"]:
    """Return values divided by the largest, from SMALLEST to 1; values of 0 take the mean of the others."""
    top = values.max()
    if not top > 0:
        return torch.ones_like(values)
    values = values / top
    dead = values <= 0
    return torch.where(dead, values[~dead].mean(), values).clamp(min=SMALLEST)


def need_gram(stats: InputStats | None, where: str) -> Float[torch.Tensor, "in in"]:
    """Return the gram. Raises CalibrationError if nothing was measured."""
    if stats is None or stats.gram is None or stats.tokens == 0:
        raise CalibrationError(f"{where}: no calibration statistics reached this weight; the balance needs the gram.")
    return stats.gram
