"""How figures are written: infinite ones by name, what is no number never."""

import json
import math

import pytest

from bitpress.errors import NumericsError
from bitpress.figures import shown, written


def test_infinite_figures_are_written_by_name() -> None:
    figures = {
        "perplexity": math.inf,
        "kl_ci95": math.inf,
        "tasks": {"piqa": {"acc": 0.5, "acc_stderr": math.inf}},
        "rows": [1.0, -math.inf, "text", None, True, 3],
    }
    expected = {
        "perplexity": "inf",
        "kl_ci95": None,
        "tasks": {"piqa": {"acc": 0.5, "acc_stderr": None}},
        "rows": [1.0, "-inf", "text", None, True, 3],
    }
    assert written(figures, "test") == expected
    assert written(expected, "test") == expected, "what is written may be written again"
    json.dumps(written(figures, "test"), allow_nan=False)


@pytest.mark.parametrize("figures", [{"a": {"kl_ci95": math.nan}}, {"a": [{"kl_ci95": math.nan}]}, {"kl_ci95": math.nan}])
def test_what_is_no_number_is_refused_by_name(figures: object) -> None:
    with pytest.raises(NumericsError, match=r"^the proof: .*kl_ci95 is not a number"):
        written(figures, "the proof")


def test_figures_are_told_alike_before_and_after_writing() -> None:
    for value in (1.25, math.inf, -math.inf):
        assert shown(value, "{:.1f}") == shown(written(value, "test"), "{:.1f}")
    assert [shown(v, "{:.1f}") for v in (1.25, math.inf, "-inf", None)] == ["1.2", "inf", "-inf", "-"]
