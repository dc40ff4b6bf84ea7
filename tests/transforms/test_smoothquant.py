"""SmoothQuant's factors by its formula."""

import pytest
import torch

from bitpress.calibration import Stats
from bitpress.errors import CalibrationError, UsageError
from bitpress.formats import parse_format
from bitpress.transforms.smoothquant import SmoothQuant

FORMAT = parse_format("int8-row")


@pytest.mark.parametrize("alpha", [0.3, 0.5, 1.0])
def test_factors_are_those_of_the_formula_up_to_one_for_all(alpha: float) -> None:
    generator = torch.Generator().manual_seed(0)
    weights = [torch.randn(rows, 8, generator=generator) for rows in (6, 10)]
    largest = torch.rand(8, generator=generator) * 30 + 0.1
    factor = SmoothQuant(alpha).plan(weights, Stats(5, max_abs=largest), FORMAT)
    columns = torch.cat(weights).abs().amax(0)
    expected = largest**alpha / columns ** (1 - alpha)
    torch.testing.assert_close(factor / factor[0], expected / expected[0])


def test_what_it_cannot_do() -> None:
    with pytest.raises(CalibrationError, match="max_abs is needed"):
        SmoothQuant().plan([torch.ones(2, 4)], Stats(5), FORMAT)
    with pytest.raises(UsageError, match=r"alpha=1\.5: it is between 0 and 1"):
        SmoothQuant(1.5)
