"""Patterns of a checkpoint: those that tools write match as Python has it, and none takes for ever."""

import re
import time

import pytest

from bitpress.errors import FormatError
from bitpress.exchange import name_patterns
from bitpress.exchange.name_patterns import NamePatterns

NAMES = ["lm_head", "model.layers.11.mlp.experts.3.gate_proj", "model.layers.0.self_attn.q_proj", "a" * 100]
WRITTEN = [
    r".*lm_head",
    r".*mlp.gate$",
    r"^model\.layers\.[0-9]+\.self_attn\.(q|k|v|o)_proj$",
    r"model\.layers\.(?:[0-9]|1[0-9])\..*",
    r".*\.(?P<kind>mlp|self_attn)\.[a-z_]+",
    r"(?!.*lm_head).*",
    r".*layers\.\d{1,2}\.(?:mlp\.)?experts\..*_proj",
    r"(ab)*[]a]+?[^]x]$",
]
HOSTILE = [
    r"(a+)+b",
    r"(a|aa)+b",
    r"(a*)*b",
    r"((a?){30}){30}b",
    r"a?" * 40 + "b",
    r".*.*.*.*.*.*.*.*b",
    r"(.*a){9}b",
    r"(?:a|a|a|a)(?:a|a|a|a)" * 10 + "b",
    r"(?<=a)b",
    r"(?i)a",
    r"(?>a+)b",
    r"a++b",
    r"[[a]",
    r"(",
    r"(" * 100 + ")" * 100 + "*" * 2,
    r"a" * 513,
]


@pytest.mark.parametrize("pattern", WRITTEN)
def test_patterns_that_tools_write_match_as_python_matches(pattern: str) -> None:
    patterns = NamePatterns(NAMES[:3])
    assert [patterns.matches(pattern, name) for name in NAMES] == [re.match(pattern, name) is not None for name in NAMES]


@pytest.mark.parametrize("pattern", HOSTILE)
def test_patterns_that_may_take_for_ever_are_refused_in_one_line(pattern: str) -> None:
    with pytest.raises(FormatError, match="pattern") as error:
        NamePatterns(NAMES).matches(pattern, NAMES[-1])
    assert "\n" not in str(error.value)


def test_many_slow_matches_end(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(name_patterns, "SECONDS", 0.05)
    patterns = NamePatterns(NAMES)
    assert not patterns.matches(".*a.*a.*b", NAMES[-1])
    time.sleep(0.06)
    with pytest.raises(FormatError, match=r"take more than 0\.05 seconds"):
        patterns.matches(".*a.*a.*b", NAMES[-1])
