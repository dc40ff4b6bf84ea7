"""Channel disassembly: count a channel of outliers as several channels that share its size, each with its column of the weight.

Source   Liu et al. 2023, "QLLM: Accurate and Efficient Low-Bitwidth Quantization for Large Language Models" (P130), and its public code
         (`disassembly/cd_module.py`, `reassembly/cr_module.py`): numbers of sub-channels from a limit of size, the limit by the error of
         what follows.
Differs  the equal parts of a channel round alike, so they are stored as one with their number (`formats.channels`), and its column once; a
         product of integers adds them as many times. `steps` limits in equal ratios are tried, where the code takes 100 and more equal steps; the error is that of the
         weight's own output on a sample of tokens, where the code runs attention and activation behind it. The assembly of like channels,
         which keeps the number of columns and changes the function, is `reassemble`; the tuning of low-rank weights is left out. Here the
         product has up to `share` more columns.
Needs    sample [tokens, in] float32.      Cost  1 byte a channel, up to `share` more products.
Update   f = max(1, ceil(max |x| / limit)) by channel;  Q(x) becomes f Q(x / f);  limit = argmin |(f Q(x / f) - x) w'|^2
Fails    CalibrationError when no token reached the weight.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

import torch
from jaxtyping import Float, UInt8

from bitpress.errors import CalibrationError, UsageError
from bitpress.transforms.sites import Sites

__all__ = ["Disassemble", "limits_of"]

# A number of copies is stored in a byte.
MOST = 255


@dataclass(frozen=True)
class Disassemble:
    """`share` of the channels at most are added."""

    share: float = 0.1
    steps: int = 20

    needs: ClassVar[frozenset[str]] = frozenset({"sample"})
    sites: ClassVar[Sites] = {"layer input": frozenset({"online"})}
    summary: ClassVar[str] = "count channels of outliers as several smaller ones with the same column"
    paper: ClassVar[str] = "P130"

    def __post_init__(self) -> None:
        if not 0 < self.share <= 1:
            raise UsageError(f"share={self.share}: it is above 0 and at most 1.")
        if self.steps < 1:
            raise UsageError(f"steps={self.steps}: at least 1 limit must be tried.")

    def plan(
        self,
        sample: Float[torch.Tensor, "tokens in"] | None,
        w: Float[torch.Tensor, "out in"],
        round_: Callable[[Float[torch.Tensor, "tokens in"], UInt8[torch.Tensor, " in"]], Float[torch.Tensor, "tokens in"]],
    ) -> UInt8[torch.Tensor, " in"]:
        """Choose the number of copies of every channel.

        `sample` holds inputs as they are rounded, `round_` what the product sees of them for numbers of copies, `w` its other operand.
        """
        if sample is None or len(sample) == 0:
            raise CalibrationError("disassemble: no calibration statistics reached this weight; sample is needed.")
        sizes = sample.abs().amax(0)
        none = torch.ones(len(sizes), dtype=torch.uint8, device=sizes.device)
        most = int(self.share * len(sizes))

        def error_of(copies: torch.Tensor) -> float:
            return float(((round_(sample, copies) - sample) @ w.T).square().sum())

        best, least, tried = none, error_of(none), none
        for limit in limits_of(sizes, most, self.steps):
            copies = (sizes / limit).ceil().clamp(1, MOST).to(torch.uint8)
            if torch.equal(copies, tried):
                continue
            tried, error = copies, error_of(copies)
            if error < least:
                best, least = copies, error
        return best


def limits_of(sizes: Float[torch.Tensor, " in"], most: int, steps: int) -> list[float]:
    """Return limits from the largest channel down to the one at which `most` channels are added, or as many as may be."""
    largest = float(sizes.max())
    if not largest > 0:
        return []

    def added(limit: float) -> int:
        return int((sizes / limit).ceil().clamp(min=1).sum()) - len(sizes)

    low, high = 0.0, largest
    for _ in range(30):
        middle = (low + high) / 2
        low, high = (middle, high) if middle == 0 or added(middle) > most else (low, middle)
    return [largest * (high / largest) ** (i / steps) for i in range(1, steps + 1)]
