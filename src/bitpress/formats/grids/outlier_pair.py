"""OliVe: an outlier takes the place of its neighbor. Two weights in a byte, both normal, or an outlier and a victim that becomes zero.

Source   Guo et al. 2023, "OliVe: Accelerating Large Language Models via Hardware-friendly Outlier-Victim Pair Quantization", and the
         authors' public code (ANT-Quantization, olive_quantization): the values and the 3-sigma rule.
Differs  the squared error of the pair decides which weight is the victim, and which of two outliers stays. The scale search covers
         scales that put the largest weight on a level, and some around the 3-sigma range, not 88 multiples of the latter. The nibbles
         are unsigned with 7 for zero, where the hardware has two's complement and 1000 for the victim.

    byte          first nibble | second nibble << 4
    normal        nibble - 7                                              -7 .. 7
    15            "the other one is an outlier, this one is its victim"
    outlier       r = nibble - 7 is not 0:  (2 + |r| % 2) << (|r| // 2 + 2), with the sign of r
                                                                          12, 16, 24, 32, 48, 64, 96 for |r| = 1 .. 7

The outlier is the paper's abfloat: sign, two bits of exponent, one of mantissa, biased to begin above the normal values. (15, 15),
(7, 15) and (15, 7) are invalid: 253 of the 256 bytes are codes.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache

import torch
from jaxtyping import Float
from jaxtyping import Integer as Int

from bitpress.errors import FormatError
from bitpress.formats.grids.grid import Params, StoredParam

__all__ = ["OutlierPair"]

VICTIM, ZERO, NORMAL = 15, 7, 7
OUTLIERS = tuple(float((2 + r % 2) << (r // 2 + 2)) for r in range(1, 8))
# Scales to try: those that bring the largest weight to these levels, and those that bring 7 to these multiples of the 3-sigma range.
# In blocks of 16 to 256 that are normal, t-distributed or have 0.3% outliers, their squared error is within 5% of that of 150 scales.
REACHES = (float(NORMAL), 7.5, 8.0, 9.5, *OUTLIERS)
SIGMA_RATIOS = (0.75, 0.85, 0.95, 1.1)
# Pairs at a time: some 50 MB of temporaries.
TOGETHER = 1 << 20


@dataclass(frozen=True)
class OutlierPair:
    name: str = "olive4"

    @property
    def code_bits(self) -> int:
        return 8

    @property
    def num_codes(self) -> int:
        return 253

    @property
    def span(self) -> int:
        return 2

    @property
    def usual_scale(self) -> str:
        return "fp16"

    @property
    def params(self) -> tuple[StoredParam, ...]:
        return (StoredParam("scale", "scale"),)

    def fit(self, blocks: Float[torch.Tensor, "blocks n"], importance: torch.Tensor | None = None) -> Params:
        """Choose the scale of the least squared error (weighted by `importance`) among 15; a block of zeros gets 0.

        The first one puts the largest weight at 7 and clips nothing.
        """
        top = blocks.abs().amax(-1, keepdim=True)
        # Divided by the largest weight, so that no square is out of the range of float32.
        relative = blocks / torch.where(top == 0, 1.0, top)
        best, best_error = torch.zeros_like(top), torch.full_like(top, torch.inf)
        mean = relative.abs().mean(-1, keepdim=True)
        for scale in self._scales_to_try(relative):
            # If the normal values end below the mean magnitude, most weights would be outliers: skip the scale.
            at = (NORMAL * scale >= 0.75 * mean)[:, 0].nonzero()[:, 0]
            some, tried = relative[at], {"scale": scale[at]}
            error = self.decode(self.encode(some, tried), tried).sub_(some).square_()
            total = (error if importance is None else error.mul_(importance[at])).sum(-1, keepdim=True)
            better = total < best_error[at]
            best[at] = torch.where(better, tried["scale"], best[at])
            best_error[at] = torch.where(better, total, best_error[at])
        return {"scale": best * top}

    def encode(self, values: Float[torch.Tensor, "... n"], params: Params) -> Int[torch.Tensor, "... codes"]:
        scale = params["scale"]
        pairs = (values / torch.where(scale == 0, 1.0, scale)).reshape(-1, 2)
        return torch.cat([_nearest(piece) for piece in pairs.split(TOGETHER)]).reshape(
            *values.shape[:-1], values.shape[-1] // 2
        )

    def decode(self, codes: Int[torch.Tensor, "... codes"], params: Params) -> Float[torch.Tensor, "... n"]:
        return _pairs(codes.device)[codes.int()].reshape(*codes.shape[:-1], codes.shape[-1] * 2) * params["scale"]

    def check(self, codes: Int[torch.Tensor, "..."]) -> None:
        """Raise FormatError for a byte with a victim but no outlier."""
        if bool(_pairs(codes.device)[codes.int()].isnan().any()):
            raise FormatError(f"{self.name}: a byte has a victim without its outlier; the file is damaged.")

    @staticmethod
    def _scales_to_try(relative: Float[torch.Tensor, "blocks n"]) -> Iterator[Float[torch.Tensor, "blocks 1"]]:
        one = relative.new_ones(len(relative), 1)
        for reach in REACHES:
            yield one / reach
        sigma = relative.std(-1, correction=0, keepdim=True)
        spread = relative.mean(-1, keepdim=True).abs() + 3 * sigma
        for ratio in SIGMA_RATIOS:
            yield spread * ratio / NORMAL


@cache
def _pairs(device: torch.device) -> Float[torch.Tensor, "256 2"]:
    """Return the two values of every byte, NaN for invalid bytes."""
    rows = []
    for code in range(256):
        first, second = code & 15, code >> 4
        if VICTIM not in (first, second):
            rows.append((float(first - ZERO), float(second - ZERO)))
        elif first == VICTIM:
            rows.append((0.0, _outlier(second)))
        else:
            rows.append((_outlier(first), 0.0))
    rows = [(torch.nan, torch.nan) if any(v != v for v in row) else row for row in rows]
    return torch.tensor(rows, device=device)


def _outlier(nibble: int) -> float:
    rank = nibble - ZERO
    if rank == 0 or nibble == VICTIM:
        return torch.nan
    return OUTLIERS[abs(rank) - 1] * (1 if rank > 0 else -1)


@cache
def _middles(device: torch.device) -> Float[torch.Tensor, " 6"]:
    levels = torch.tensor(OUTLIERS, device=device)
    return (levels[1:] + levels[:-1]) / 2


def _nearest(pairs: Float[torch.Tensor, "n 2"]) -> Int[torch.Tensor, " n"]:
    """Return the nearest of the three best: both normal, the first an outlier, the second an outlier."""
    normal = pairs.round().clamp_(-NORMAL, NORMAL)
    nibbles = (normal + ZERO).to(torch.uint8)
    codes = nibbles[:, 0] | nibbles[:, 1] << 4
    # Most pairs are below and need no more work: 7 is at least as near as 12, and a victim's error is never below a normal value's.
    far = (pairs.abs().amax(-1) > (NORMAL + OUTLIERS[0]) / 2).nonzero()[:, 0]
    pairs, code = pairs[far], codes[far]
    rank = torch.bucketize(pairs.abs(), _middles(pairs.device)) + 1
    outlier = torch.tensor((0.0, *OUTLIERS), device=pairs.device)[rank]
    signed = torch.where(pairs < 0, -rank, rank).add_(ZERO).to(torch.uint8)
    least = (pairs - normal[far]).square().sum(-1)
    # An outlier's own error plus its whole victim.
    error = (pairs.abs() - outlier).square() + pairs.square().flip(-1)
    for at, both in ((0, signed[:, 0] | VICTIM << 4), (1, signed[:, 1] << 4 | VICTIM)):
        better = error[:, at] < least
        code, least = torch.where(better, both, code), torch.where(better, error[:, at], least)
    codes[far] = code
    return codes
