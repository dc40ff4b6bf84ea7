"""Rebuild src/bitpress/formats/grids/gaussian_grids.json: levels and points with the least mean squared error for a normal distribution.

Levels, 2 to 8 bits: Newton's method on the exact condition that every level is the mean of what is nearest to it, which has one
solution (Max 1960). Points of the plane, 4, 6 and 8 bits: Lloyd's iteration over a fine lattice weighted by the density, from many
beginnings, the best ones then carried on over a finer lattice. Points of four dimensions, 8 bits: Lloyd's iteration over Sobol points,
fresh ones in every round. Nothing is random but the seeded beginnings. Prints the mean squared error a weight. Takes some minutes on
one core.
"""

import json
import math
from pathlib import Path
from statistics import NormalDist

import numpy as np
import torch

from bitpress.formats.grids.nearest import nearest

TARGET = Path(__file__).parents[1] / "src/bitpress/formats/grids/gaussian_grids.json"
REACH = 6.0  # beyond it lie 4e-9 of the plane's points, on either axis
BEGINNINGS = 24
CARRIED_ON = 3
SPACES = ((8, 4),)
SPACE_BEGINNINGS = 6


def density(x: np.ndarray) -> np.ndarray:
    return np.exp(-(x**2) / 2) / math.sqrt(2 * math.pi)


def tail(x: np.ndarray) -> np.ndarray:
    """The probability of more than x, precise far out."""
    return np.array([math.erfc(value / math.sqrt(2)) / 2 for value in x])


def upper_levels(bits: int) -> np.ndarray:
    """Return the positive half of the 2^bits levels, rising."""
    half = 1 << (bits - 1)
    # The density of the best levels goes with the cube root of that of the numbers: a normal distribution of variance 3.
    wide = NormalDist(sigma=math.sqrt(3))
    levels = np.array([wide.inv_cdf(0.5 + (i + 0.5) / (2 * half)) for i in range(half)])
    # Newton's step, held back toward Lloyd's (levels become means) as long as the levels are far from where they belong.
    miss, mass, slope = _condition(levels)
    held = 1.0
    for _ in range(1000):
        step = np.linalg.solve(slope + held * np.diag(mass), miss)
        moved = levels - step
        if moved[0] > 0 and (np.diff(moved) > 0).all():
            there = _condition(moved)
            if (there[0] ** 2 / there[1]).sum() < (miss**2 / mass).sum():
                levels, held = moved, held / 4
                miss, mass, slope = there
                continue
        held *= 3
        if np.abs(step).max() < 1e-12:
            return levels
    raise RuntimeError(f"the levels of {bits} bits did not converge")


def _condition(levels: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return level times mass less the integral of x, for every interval; its mass; and how the first moves with every level."""
    half = len(levels)
    edges = np.concatenate([[0.0], (levels[1:] + levels[:-1]) / 2, [math.inf]])
    at = np.where(np.isinf(edges), 0.0, density(edges))
    mass = -np.diff(tail(edges))
    # An edge moves by half of what either of its levels moves; the one at 0 stays.
    down = (levels - edges[:-1]) * at[:-1] / 2
    down[0] = 0.0
    up = (levels[:-1] - edges[1:-1]) * at[1:-1] / 2
    slope = np.diag(mass - down)
    slope[np.arange(half - 1), np.arange(half - 1)] += up
    slope[np.arange(half - 1), np.arange(1, half)] = up
    slope[np.arange(1, half), np.arange(half - 1)] = -down[1:]
    return levels * mass + np.diff(at), mass, slope


def levels_error(upper: np.ndarray) -> float:
    """Return the exact mean squared error: 1 less the mean square of the levels, as each is the mean of its interval."""
    edges = np.concatenate([[0.0], (upper[1:] + upper[:-1]) / 2, [math.inf]])
    return 1 - 2 * float((upper**2 * -np.diff(tail(edges))).sum())


class Plane:
    """A lattice of points with the weights of a normal distribution, shifted a little for every step.

    Over a lattice that stays where it is Lloyd's iteration stops as soon as no lattice point changes sides, half a percent early.
    """

    def __init__(self, step: float) -> None:
        axis = torch.arange(-REACH + step / 2, REACH, step, dtype=torch.float64)
        self.step, self.count = step, 0
        at = torch.cartesian_prod(axis, axis)
        self.at = at[at.square().sum(-1) < REACH**2]

    def means(self, points: torch.Tensor) -> tuple[torch.Tensor, float]:
        """Return the mean of what is nearest to every point, and the mean squared error a number before that."""
        self.count += 1
        # Multiples of two irrational numbers fill the square of all shifts evenly.
        shift = torch.tensor([self.count * math.sqrt(2) % 1, self.count * math.sqrt(3) % 1], dtype=torch.float64)
        at = self.at + (shift - 0.5) * self.step
        weight = torch.exp(at.square().sum(-1) / -2)
        weight /= weight.sum()
        code = nearest(at.float(), points.float())
        mass = torch.zeros(len(points), dtype=torch.float64).index_add_(0, code, weight)
        sums = torch.zeros_like(points).index_add_(0, code, at * weight[:, None])
        error = float(((at - points[code]).square().sum(-1) * weight).sum()) / 2
        return torch.where(mass[:, None] > 0, sums / mass[:, None].clamp(min=1e-300), points), error

    def settle(self, points: torch.Tensor, rounds: int) -> tuple[torch.Tensor, float]:
        """Go beyond each mean by half, then calm down over 32 rounds; give the error's mean over the last 16."""
        for _ in range(rounds):
            points = points + 1.5 * (self.means(points)[0] - points)
        errors = []
        for i in range(32):
            means, error = self.means(points)
            errors.append(error)
            points = points + (means - points) / (1 + i / 4)
        return points, sum(errors[16:]) / 16


def plane_points(bits: int) -> tuple[torch.Tensor, float]:
    """Return the best 2^bits points found, and their mean squared error a number."""
    count = 1 << bits
    coarse, fine = Plane(1 / 16), Plane(1 / 48)
    found = []
    for seed in range(BEGINNINGS):
        # The density of the best points goes with the square root of that of the numbers: variance 2. The first beginning is a
        # sunflower, the others are random.
        if seed == 0:
            rank = torch.arange(count, dtype=torch.float64)
            radius = (-4 * torch.log1p(-(rank + 0.5) / count)).sqrt()
            angle = rank * math.pi * (3 - math.sqrt(5))
            start = torch.stack([radius * angle.cos(), radius * angle.sin()], dim=-1)
        else:
            start = torch.from_numpy(np.random.default_rng(seed).normal(0, math.sqrt(2), (count, 2)))
        found.append(coarse.settle(start, 300))
    found.sort(key=lambda pair: pair[1])
    settled = [fine.settle(points, 200) for points, _ in found[:CARRIED_ON]]
    print(f"  {bits} bits: the beginnings {[f'{e:.6f}' for _, e in found]}, carried on {[f'{e:.7f}' for _, e in settled]}")
    points, error = min(settled, key=lambda pair: pair[1])
    order = sorted(range(count), key=lambda i: (round(float(points[i].norm()), 6), math.atan2(*points[i].tolist())))
    return points[order], error


class Space:
    """Points of a normal distribution of several dimensions, spread evenly: new ones every time."""

    def __init__(self, span: int) -> None:
        self.sobol = torch.quasirandom.SobolEngine(span, scramble=True, seed=0)

    def means(self, points: torch.Tensor, count: int) -> tuple[torch.Tensor, float]:
        """Return the mean of what is nearest to every point, and the mean squared error a number before that."""
        at = torch.special.ndtri(self.sobol.draw(count, dtype=torch.float64).clamp(1e-9, 1 - 1e-9))
        code = nearest(at.float(), points.float())
        mass = torch.bincount(code, minlength=len(points)).double()[:, None]
        sums = torch.zeros_like(points).index_add_(0, code, at)
        error = float((at - points[code]).square().mean())
        return torch.where(mass > 0, sums / mass.clamp(min=1), points), error


def space_points(bits: int, span: int) -> tuple[torch.Tensor, float]:
    """Return 2^bits points of `span` dimensions, and their mean squared error a number, on samples that did not move them."""
    space, found = Space(span), []
    for seed in range(SPACE_BEGINNINGS):
        # The density of the best points goes with that of the numbers to the power of span / (span + 2).
        start = np.random.default_rng(seed).normal(0, math.sqrt((span + 2) / span), (1 << bits, span))
        points = torch.from_numpy(start)
        for _ in range(200):
            points = points + 1.5 * (space.means(points, 1 << 15)[0] - points)
        for i in range(100):
            points = points + (space.means(points, 1 << 16)[0] - points) / (1 + i / 8)
        found.append((points, space.means(points, 1 << 20)[1]))
    print(f"  {bits} bits for {span}: the beginnings {[f'{e:.6f}' for _, e in found]}")
    points = min(found, key=lambda pair: pair[1])[0]
    for i in range(200):
        points = points + (space.means(points, 1 << 18)[0] - points) / (1 + i / 8)
    order = sorted(range(len(points)), key=lambda i: (round(float(points[i].norm()), 6), points[i].tolist()))
    return points[order], space.means(points, 1 << 22)[1]


def main() -> None:
    torch.set_num_threads(1)
    grids: dict[str, dict[str, list]] = {"levels": {}, "points": {}, "spaces": {}}
    for bits in range(2, 9):
        upper = upper_levels(bits)
        print(f"{bits} bits a weight, levels: mean squared error {levels_error(upper):.6g}")
        grids["levels"][str(bits)] = [float(f"{level:.9g}") for level in upper]
    for bits in (4, 6, 8):
        points, error = plane_points(bits)
        print(f"{bits / 2:g} bits a weight, points of the plane: mean squared error {error:.6g}")
        grids["points"][str(bits)] = [[float(f"{x:.7g}") for x in point] for point in points.tolist()]
    for bits, span in SPACES:
        points, error = space_points(bits, span)
        print(f"{bits / span:g} bits a weight, points of {span} dimensions: mean squared error {error:.6g}")
        grids["spaces"][f"{bits}x{span}"] = [[float(f"{x:.6g}") for x in point] for point in points.tolist()]
    lines = [
        f'  "{kind}": {{\n' + ",\n".join(f'    "{bits}": {json.dumps(grid)}' for bits, grid in table.items()) + "\n  }"
        for kind, table in grids.items()
    ]
    TARGET.write_text("{\n" + ",\n".join(lines) + "\n}\n", "utf-8")


if __name__ == "__main__":
    main()
