"""The rules by which a layer takes one of several settings: numbers in, the number of a setting out."""

import math

import pytest

from bitpress.allocation.choices import CHOICES, OutputErrorChoice, RangeChoice
from bitpress.errors import UsageError


def test_the_range_is_parted_by_edges() -> None:
    rule = RangeChoice((15.0, 150.0))
    assert [rule.choose([size]) for size in (0.0, 14.9, 15.0, 149.0, 150.0, 1e30)] == [0, 0, 1, 1, 2, 2]
    rule.check(3)
    with pytest.raises(UsageError, match="2 edges part 3 settings, and `among` lists 2"):
        rule.check(2)
    for edges in ((), (2.0, 1.0), (1.0, 1.0), (0.0, 1.0), (1.0, math.inf)):
        with pytest.raises(UsageError, match="magnitudes above 0 that rise"):
            RangeChoice(edges)


def test_the_least_error_wins_and_of_equals_the_first() -> None:
    rule = OutputErrorChoice()
    rule.check(1)
    assert [rule.choose(errors) for errors in ([3.0, 1.0, 2.0], [1.0, 1.0], [0.0])] == [1, 0, 0]


def test_every_rule_says_what_it_is() -> None:
    for rule in CHOICES.values():
        assert rule.summary
        assert rule.paper[0] == "P"
        assert rule.measures in ("range", "output error")
        assert rule.needs
