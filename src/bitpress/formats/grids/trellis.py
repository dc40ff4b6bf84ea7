"""Trellis-coded quantization: the codes of a column form one path, and a weight depends on the newest bits of that path.

Source   Tseng et al. 2024, "QTIP: Quantization with Trellises and Incoherence Processing": the bitshift trellis (a state is the
         newest bits of the stream, so that no states are stored and any weight can be decoded alone), a computed code in place of a
         table, and the search of the best path by the Viterbi algorithm; details as in the authors' public code
         (`lib/codebook/bitshift.py`).
Differs  the code: a product with an odd number modulo 2^16 spreads the states evenly over (-1, 1), and an odd polynomial in whole
         numbers bends them to a normal distribution; the public codes add up bytes of a random number. A path is a whole column of
         the weight instead of a tile of 16 x 16: rows do not feed errors to each other, so no feedback is lost, and a path that
         long loses little where it begins. A path begins in state 0; there is no tail-biting. 14 bits of state instead of 16. Half
         bits a weight, by codes that add one bit more at every second row.
Cost     encode: 2^state_bits operations a weight.   decode: about 15 operations on 16-bit numbers a weight.

    state[r] = (state[r - 1] << bits | code[r])  mod 2^state_bits,    state[-1] = 0
    t        = (state * multiplier mod 2^16) - 2^15,  its lowest bit set                      an odd number: t / 2^15 is in (-1, 1)
    value    = t * (c0 + c1 t^2 + c2 t^4 + c3 t^6 + c4 t^8)                                   c in 1 / 1024, products rounded to 2^-15
    level    = round(value / 32)  in -127 .. 127,      weight = level / 32 * scale

Worked example: the first states of tcq2, and the weights of the codes 3, 1, 0, 2 in one column at a scale of 1.

    >>> import torch
    >>> grid = trellis("tcq2")
    >>> [int(level * 32) for level in grid.levels(torch.device("cpu"))[:4]]
    [-87, 17, -6, -32]
    >>> (grid.decode(torch.tensor([[3, 1, 0, 2]], dtype=torch.uint8), {"scale": torch.ones(1, 1)}) * 32).int().tolist()
    [[-32, -12, -8, -46]]

The constants of every width are the best of a random search for the least squared error on normal weights; `scripts/fit_trellis.py` makes
such a search.
"""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache

import torch
from jaxtyping import Float
from jaxtyping import Integer as Int

from bitpress import native
from bitpress.errors import FormatError
from bitpress.formats.grids.grid import Params, StoredParam
from bitpress.formats.grids.levels import root_mean_square
from bitpress.formats.layouts.dense import code_dtype
from bitpress.formats.scale_store import Outer, ScaleStore

__all__ = ["STATE_BITS", "WIDTHS", "Constants", "Trellis", "trellis"]

STATE_BITS = 14


@dataclass(frozen=True)
class Constants:
    """The bits that rows add in turn, and the code: the spread of states and the polynomial in units of 1 / 1024.

    rms    the root mean square of the weights that the levels are made for
    """

    shifts: tuple[int, ...]
    multiplier: int
    polynomial: tuple[int, int, int, int, int]
    rms: float = 1.0


WIDTHS: dict[str, Constants] = {
    "tcq1": Constants((1,), 34243, (1750, -5944, 22516, -32388, 16545)),
    "tcq1.5": Constants((1, 2), 37613, (1459, -3656, 19268, -32284, 18057)),
    "tcq2": Constants((2,), 47143, (1549, -4328, 20308, -32138, 17408)),
    "tcq2.5": Constants((2, 3), 24653, (1439, -3365, 17930, -30297, 17225)),
    "tcq3": Constants((3,), 27417, (1438, -3539, 19010, -32095, 18154)),
    "tcq3.5": Constants((3, 4), 54073, (1434, -3524, 18995, -32574, 18651)),
    "tcq4": Constants((4,), 5103, (1409, -3475, 18902, -32403, 18503)),
    "tcq4.5": Constants((4, 5), 53133, (1337, -3660, 18859, -31672, 17844), rms=0.92),
    "tcq5": Constants((5,), 44427, (1299, -3858, 19572, -32631, 18229), rms=0.88),
}

# States whose costs the search in torch holds at a time, over all sequences.
SEARCHED_TOGETHER = 1 << 22
# As in native code: the costs of all states are brought back to a minimum of 0 after so many values.
REBASE = 64


@dataclass(frozen=True)
class Trellis:
    """A stream of codes down every column; see `grid.Streamed` for how its verbs are called."""

    name: str
    constants: Constants
    state_bits: int

    @property
    def code_bits(self) -> int:
        return sum(self.constants.shifts)

    @property
    def num_codes(self) -> int:
        return 1 << self.code_bits

    @property
    def span(self) -> int:
        return 1

    @property
    def rows_per_code(self) -> int:
        return len(self.constants.shifts)

    @property
    def usual_scale(self) -> str:
        return "fp16"

    @property
    def params(self) -> tuple[StoredParam, ...]:
        return (StoredParam("scale", "scale"),)

    def levels(self, device: torch.device) -> Float[torch.Tensor, " states"]:
        """Return the weight of every state at a scale of 1."""
        return _levels(self.constants, self.state_bits, device)

    def fit(self, blocks: Float[torch.Tensor, "blocks n"], importance: torch.Tensor | None = None) -> Params:
        """Scale every block to the root mean square of the levels (`importance` is ignored); a block of zeros gets 0."""
        return {"scale": root_mean_square(blocks) / self.constants.rms}

    def search(
        self,
        blocks: Float[torch.Tensor, "blocks n"],
        importance: torch.Tensor | None,
        shrink: Sequence[float],
        store: ScaleStore,
        outer: Outer,
    ) -> Params:
        """Return the scales of `fit` as stored: a path is searched for whole columns, so blocks cannot try scales one by one."""
        return {"scale": store.round(self.fit(blocks)["scale"], outer)}

    def encode(self, values: Float[torch.Tensor, "... out"], params: Params) -> Int[torch.Tensor, "... codes"]:
        """Return the codes of the best path; where scales differ, a squared error counts with the square of its scale."""
        scale = params["scale"].expand(values.shape).reshape(-1, values.shape[-1])
        columns = (values.reshape(scale.shape) / torch.where(scale == 0, 1.0, scale)).contiguous()
        relative = scale / scale.amax(-1, keepdim=True).clamp_min(torch.finfo(torch.float32).tiny)
        weights = None if bool((relative == 1).all()) else relative.square().contiguous()
        levels = self.levels(values.device)
        if values.device.type == "cpu" and native.available():
            shifts = torch.tensor(self.constants.shifts, dtype=torch.int32)
            added = native.encode_trellis(columns, weights, self.state_bits, shifts, levels)
        else:
            size = max(SEARCHED_TOGETHER >> self.state_bits, 1)
            pieces = zip(columns.split(size), (None,) * len(columns) if weights is None else weights.split(size), strict=False)
            added = torch.cat([best_path(c, w, self.state_bits, self.constants.shifts, levels) for c, w in pieces])
        return self._joined(added).reshape(*values.shape[:-1], -1)

    def decode(self, codes: Int[torch.Tensor, "... codes"], params: Params) -> Float[torch.Tensor, "... out"]:
        return self.levels(codes.device)[self._states(codes)] * params["scale"]

    def check(self, codes: Int[torch.Tensor, "..."]) -> None:
        """Accept every code: each path is one of weights."""

    def added(self, codes: Int[torch.Tensor, "... codes"]) -> Int[torch.Tensor, "... out"]:
        """Return the bits that each row adds to its path."""
        parts, left = [], self.code_bits
        for shift in self.constants.shifts:
            left -= shift
            parts.append((codes >> left & (1 << shift) - 1).to(torch.uint8))
        return torch.stack(parts, -1).flatten(-2)

    def _joined(self, added: Int[torch.Tensor, "sequences out"]) -> Int[torch.Tensor, "sequences codes"]:
        """Return codes from the bits that each row adds: those of an earlier row are the higher ones."""
        parts = added.to(code_dtype(self.code_bits)).view(len(added), -1, self.rows_per_code)
        joined = parts[..., 0].clone()
        for row, shift in list(enumerate(self.constants.shifts))[1:]:
            joined = joined << shift | parts[..., row]
        return joined

    def _states(self, codes: Int[torch.Tensor, "... codes"]) -> Int[torch.Tensor, "... out"]:
        added, shifts = self.added(codes).int(), self.constants.shifts
        # Bits that were added up to and with every row: an earlier row's bits are as far up as the bits added since.
        total = torch.tensor(list(itertools.accumulate(itertools.islice(itertools.cycle(shifts), added.shape[-1]))))
        total = total.to(codes.device)
        states = added.clone()
        for back in range(1, added.shape[-1]):
            distance = total[back:] - total[:-back]
            if int(distance.min()) >= self.state_bits:
                break
            states[..., back:] |= added[..., :-back] << distance.clamp(max=self.state_bits)
        return states & (1 << self.state_bits) - 1


def trellis(name: str, state_bits: int = STATE_BITS) -> Trellis:
    """Return the grid of a width of the table; with other state bits it is called `tcq2s12`. Raises FormatError."""
    constants = WIDTHS[name]
    if not max(constants.shifts) + 3 <= state_bits <= 16:
        raise FormatError(f"{name}s{state_bits}: a trellis has {max(constants.shifts) + 3} to 16 bits of state.")
    return Trellis(name if state_bits == STATE_BITS else f"{name}s{state_bits}", constants, state_bits)


def best_path(
    values: Float[torch.Tensor, "sequences length"],
    weights: Float[torch.Tensor, "sequences length"] | None,
    state_bits: int,
    shifts: Sequence[int],
    levels: Float[torch.Tensor, " states"],
) -> Int[torch.Tensor, "sequences length"]:
    """Return the bits that every value adds to the path with the least weighted squared error: the law of the native search."""
    count, length = values.shape
    cost = torch.full((count, len(levels)), 1e30, device=values.device)
    cost[:, 0] = 0.0
    came: list[torch.Tensor] = []
    for i in range(length):
        shift = shifts[i % len(shifts)]
        # The states j << (state_bits - shift) | group lead to the states group << shift | code.
        least, j = cost.view(count, 1 << shift, -1).min(1)
        came.append(j.to(torch.uint8))
        error = (values[:, i, None] - levels).square_()
        if weights is not None:
            error.mul_(weights[:, i, None])
        cost = error.view(count, -1, 1 << shift).add_(least[..., None]).reshape(count, -1)
        if i % REBASE == REBASE - 1:
            cost -= cost.amin(1, keepdim=True)
    state = cost.argmin(1)
    added = torch.empty(values.shape, dtype=torch.uint8, device=values.device)
    for i in range(length - 1, -1, -1):
        shift = shifts[i % len(shifts)]
        added[:, i] = state & (1 << shift) - 1
        group = state >> shift
        state = group | came[i].gather(1, group[:, None])[:, 0].long() << state_bits - shift
    return added


@cache
def _levels(constants: Constants, state_bits: int, device: torch.device) -> Float[torch.Tensor, " states"]:
    spread = torch.arange(1 << state_bits) * constants.multiplier & 0xFFFF
    t = (spread - (1 << 15)) | 1
    square = _product(t, t)
    value = torch.full_like(t, constants.polynomial[-1])
    for coefficient in reversed(constants.polynomial[:-1]):
        value = _product(value, square) + coefficient
    return ((_product(value, t) + 16 >> 5).float() / 32).to(device)


def _product(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """Return a b / 2^15, rounded to the nearest whole number, halves up: what one instruction does with 16-bit numbers."""
    return a * b + (1 << 14) >> 15
