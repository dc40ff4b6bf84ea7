"""docs/native.md: its examples run, and its lists of grids and model types are today's."""

import doctest
import re
from pathlib import Path

import pytest

from bitpress import native
from bitpress.formats import GRIDS
from bitpress.formats.listing import usual_format
from bitpress.kernels.native_layout import _has_layout
from bitpress.runtime.native.architectures import ARCHITECTURES

DOCUMENT = Path(__file__).resolve().parents[2] / "docs" / "native.md"
TEXT = DOCUMENT.read_text(encoding="utf-8")


@pytest.mark.skipif(not native.available(), reason="no C++ compiler was there when bitpress was installed")
def test_the_examples_hold(pressed_original: Path) -> None:
    done = doctest.testfile(str(DOCUMENT), module_relative=False, encoding="utf-8", globs={"DIR": pressed_original})
    assert done.attempted > 10
    assert done.failed == 0


def test_the_lists_of_grids_are_those_of_today() -> None:
    blocks = [block.split() for block in re.findall(r"(?:^    .*\n)+", TEXT, re.MULTILINE) if set(block.split()) <= set(GRIDS)]
    assert len(blocks) == 2
    for listed, laid_out in zip(blocks, (True, False), strict=True):
        expected = {name for name, row in GRIDS.items() if _has_layout(usual_format(row.grid, row.block)) == laid_out}
        assert set(listed) == expected, "docs/native.md lists other grids"
        assert len(listed) == len(expected)


def test_the_model_types_are_those_of_today() -> None:
    section = TEXT.split("## What runs")[1].split("\n\n")[1]
    assert re.findall(r"`(\w+)`", section.split("Everything else")[0])[1:] == list(ARCHITECTURES)
