"""Fit the computed codes of the trellises: for every width a multiplier and a polynomial, by squared error on normal weights.

    python scripts/fit_trellis.py             all widths, as lines of formats/grids/trellis.py
    python scripts/fit_trellis.py tcq2 tcq3   some of them

Many multipliers are tried with few states: paths are searched for normal numbers, and the polynomial is fitted to the numbers that each
state stands for, a few times in turn. The best multipliers are tried again with the states of the table, on other numbers. Also prints
the error of every width beside the least that any code of that rate can have, 2^(-2 bits).
"""

import sys
from dataclasses import replace
from statistics import NormalDist

import torch

from bitpress.formats.grids.trellis import STATE_BITS, WIDTHS, Constants, Trellis

FEW_STATES = 12
MULTIPLIERS = 50
FINALISTS = 6
ROUNDS = 4
# Numbers with which constants are fitted, and others on which they are judged; as long as the columns of a small model.
FITTED, JUDGED = (4, 2048), (12, 2048)
DEVICE = torch.device("cpu")


def normal(shape: tuple[int, int], seed: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def powers(t: torch.Tensor) -> torch.Tensor:
    return torch.stack([t ** (2 * i + 1) for i in range(5)], -1).double()


def solve(t: torch.Tensor, values: torch.Tensor) -> tuple[int, ...]:
    found = torch.linalg.lstsq(powers(t), values.double()[:, None]).solution[:, 0]
    return tuple((found * 1024).round().int().tolist())


def begin(rms: float) -> tuple[int, ...]:
    """Return the polynomial nearest to the quantiles of a normal distribution."""
    places = [(i + 0.5) / 4096 for i in range(4096)]
    quantiles = torch.tensor([NormalDist().inv_cdf(p) for p in places]) * 0.95 * rms
    return solve(torch.tensor(places) * 2 - 1, quantiles)


def in_range(constants: Constants, state_bits: int) -> bool:
    """Return whether every level is a byte, and every step of the polynomial a 16-bit number."""
    levels = Trellis("", constants, state_bits).levels(DEVICE)
    t = torch.linspace(0, 1, 4097)
    steps = [sum(c * t ** (2 * i) for i, c in enumerate(constants.polynomial[first:])) for first in range(5)]
    return float(levels.abs().max()) * 32 <= 127 and all(float(torch.as_tensor(s).abs().max()) < 1 << 15 for s in steps)


def judge(constants: Constants, state_bits: int, x: torch.Tensor) -> tuple[float, torch.Tensor]:
    """Return the mean squared error on normal numbers, and the place in (-1, 1) of the state of each."""
    grid = Trellis("", constants, state_bits)
    params = {"scale": torch.full((1, 1), 1 / constants.rms)}
    codes = grid.encode(x, params)
    states = grid._states(codes).long()
    t = ((states * constants.multiplier & 0xFFFF) - (1 << 15) | 1) / (1 << 15)
    return float((grid.decode(codes, params) - x).square().mean()), t


def fit(constants: Constants, state_bits: int, x: torch.Tensor) -> tuple[float, Constants]:
    """Fit the polynomial and search paths in turn; return the least error, infinite if the first polynomial is out of range."""
    best = (float("inf"), constants)
    for _ in range(ROUNDS):
        if not in_range(constants, state_bits):
            break
        error, t = judge(constants, state_bits, x)
        best = min(best, (error, constants), key=lambda found: found[0])
        a, b, c, d, e = solve(t.flatten(), x.flatten() * constants.rms)
        constants = replace(constants, polynomial=(a, b, c, d, e))
    return best


def fit_width(name: str) -> tuple[Constants, float]:
    """Return the best constants of a width and their error on the numbers that judge."""
    shifts, rms = WIDTHS[name].shifts, WIDTHS[name].rms
    generator = torch.Generator().manual_seed(11)
    multipliers = [int(torch.randint(1 << 15, (), generator=generator)) * 2 + 1 for _ in range(MULTIPLIERS)]
    a, b, c, d, e = begin(rms)
    x, unseen = normal(FITTED, 7), normal(JUDGED, 12)
    tried = [fit(Constants(shifts, m, (a, b, c, d, e), rms), FEW_STATES, x) for m in multipliers]
    tried.sort(key=lambda found: found[0])
    finalists = [fit(constants, STATE_BITS, x)[1] for error, constants in tried[:FINALISTS] if error < float("inf")]
    return min(((c, judge(c, STATE_BITS, unseen)[0]) for c in finalists), key=lambda found: found[1])


def main(names: list[str]) -> None:
    for name in names or list(WIDTHS):
        constants, error = fit_width(name)
        rms = "" if constants.rms == 1 else f", rms={constants.rms}"
        print(f'    "{name}": Constants({constants.shifts}, {constants.multiplier}, {constants.polynomial}{rms}),')
        print(f"        # squared error {error:.5f}, least possible {2 ** (-2 * float(name[3:])):.5f}", flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
