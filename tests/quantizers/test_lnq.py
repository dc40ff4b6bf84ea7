"""LNQ: the levels are the least squares solution for their codes, and turns of codes and levels never end further away."""

import pytest
import torch

from bitpress.calibration import Stats
from bitpress.errors import FormatError, UsageError
from bitpress.formats import parse_format
from bitpress.quantizers.gptq import GPTQ
from bitpress.quantizers.lnq import LNQ, solve_levels
from bitpress.quantizers.quantizer import output_error


def case(seed: int = 0, out: int = 12, inner: int = 48) -> tuple[torch.Tensor, Stats]:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(300, inner, generator=generator) @ torch.randn(inner, inner, generator=generator)
    return torch.randn(out, inner, generator=generator), Stats(300, x.T @ x / 300)


@pytest.mark.parametrize("name", ["kmeans3-row", "kmeans2-g16", "kmeans2-4x24", "kmeans3-tensor"])
def test_levels_are_those_of_least_squares(name: str) -> None:
    w, stats = case()
    fmt, gram = parse_format(name), stats.need_gram("test")
    params = fmt.fit(w)
    codes = torch.randint(0, 1 << fmt.grid.code_bits, w.shape, generator=torch.Generator().manual_seed(1)).to(torch.uint8)
    moved, solved = solve_levels(w, codes, params, gram, fmt)
    rows, cols = fmt.block.resolve((12, 48))
    root = torch.linalg.cholesky(gram.double())
    for start in range(0, 12, rows):
        # One unknown for every level of every block; each row of the weight gives as many equations as there are inputs.
        level = torch.arange(48) // cols * fmt.grid.num_codes + codes[start : start + rows].long()
        indicators = torch.nn.functional.one_hot(level, 48 // cols * fmt.grid.num_codes).double()
        equations = (root.T @ indicators).flatten(0, 1)
        wanted = (w[start : start + rows].double() @ root).flatten()
        best = torch.linalg.lstsq(equations, wanted[:, None], driver="gelsd").solution[:, 0]
        got = fmt.decode(moved, solved)[start : start + rows].double()
        # Levels are stored in float16: 2^-11 of each.
        torch.testing.assert_close(got, best[level], rtol=2**-10, atol=1e-3)
    assert (solved["levels"].diff(dim=-1) >= 0).all()


@pytest.mark.parametrize("name", ["kmeans3-row", "kmeans2-g16", "kmeans2-4x24"])
def test_turns_end_nearer_than_error_feedback_and_than_fewer_turns(name: str) -> None:
    w, stats = case(1)
    fmt = parse_format(name)
    plain = output_error(w, GPTQ().quantize(w, stats, fmt).weight.dequantize(), stats)
    errors = [output_error(w, LNQ(rounds=n).quantize(w, stats, fmt).weight.dequantize(), stats) for n in (0, 1, 3)]
    assert plain > errors[0] > errors[1] >= errors[2]


def test_a_level_without_weights_stays() -> None:
    w, stats = case(2)
    fmt = parse_format("kmeans3-row")
    params = fmt.fit(w)
    codes = torch.full(w.shape, 3, dtype=torch.uint8)
    _, solved = solve_levels(w, codes, params, stats.need_gram("test"), fmt)
    old = params["levels"][:, 0, [0, 1, 2, 4, 5, 6, 7]]
    assert all(bool(torch.isin(row, new).all()) for row, new in zip(old, solved["levels"][:, 0], strict=True))


def test_what_is_wrong_is_said() -> None:
    w, stats = case()
    with pytest.raises(FormatError, match="serves"):
        LNQ().quantize(w, stats, parse_format("int3-g16"))
    for wrong in ({"rounds": -1}, {"sweeps": 0}, {"damp": 0.0}):
        with pytest.raises(UsageError):
            LNQ(**wrong)  # type: ignore[arg-type]
