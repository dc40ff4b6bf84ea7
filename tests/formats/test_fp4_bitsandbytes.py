"""The 4-bit float of bitsandbytes: its codes, from a file that it wrote."""

import json
from pathlib import Path

import torch

from bitpress.formats import Levels, find_row, parse_format

GOLDEN = json.loads((Path(__file__).parents[1] / "golden" / "fp4_bitsandbytes.json").read_text())


def golden_weight() -> torch.Tensor:
    i = torch.arange(256)
    return (((i * 2654435761) % 2**32).double() / 2**31 - 1).pow(3).float().reshape(4, 64)


def test_codes_and_scales_are_those_of_bitsandbytes() -> None:
    packed = torch.tensor(list(bytes.fromhex(GOLDEN["packed"])), dtype=torch.uint8)
    theirs = torch.stack([packed >> 4, packed & 15], dim=-1).reshape(4, 64)
    fmt = parse_format("fp4bnb-g64-fp32")
    w = golden_weight()
    params = fmt.fit(w)
    codes = fmt.encode(w, params)
    assert params["scale"].flatten().tolist() == [float.fromhex(x) for x in GOLDEN["absmax"]]
    # On a CPU bitsandbytes has the two codes of zero the other way round.
    zero = theirs.remainder(8) == 0
    assert torch.equal(codes.remainder(8) == 0, zero)
    assert torch.equal(codes[~zero], theirs[~zero])
    assert 0 < int(zero.sum()) < 64
    # Its decoding is one product, as here: exactly equal.
    assert fmt.decode(codes, params).flatten()[:16].tolist() == [float.fromhex(x) for x in GOLDEN["decoded"]]


def test_levels_are_the_constants_of_its_kernels() -> None:
    constants = [0.0, 5.208333333e-03, 0.66666667, 1.0, 0.33333333, 0.5, 0.16666667, 0.25]
    grid = find_row("fp4bnb").grid
    assert isinstance(grid, Levels)
    levels = torch.tensor(grid.levels)
    assert torch.equal(levels, torch.tensor(constants + [-c for c in constants]))


def test_a_code_changes_at_the_thresholds_of_its_kernels() -> None:
    thresholds = [0.00260417, 0.0859375, 0.20833333, 0.29166667, 0.4166667, 0.583333, 0.8333333]
    above = [1, 6, 7, 4, 5, 2, 3]
    grid = find_row("fp4bnb").grid
    for threshold, code, below in zip(thresholds, above, [0, *above[:-1]], strict=True):
        ends = torch.tensor([threshold - 1e-6, threshold + 1e-6])
        assert grid.encode(ends, {"scale": torch.ones(1)}).tolist() == [below, code]
        assert grid.encode(-ends, {"scale": torch.ones(1)}).tolist() == [below + 8, code + 8]
