"""docs/native.md: its examples run, and its lists of grids and model types are those of the tables."""

import doctest
import re
import runpy
from pathlib import Path

import pytest

from bitpress import native
from bitpress.formats import GRIDS
from bitpress.runtime.native.architectures import ARCHITECTURES

ROOT = Path(__file__).resolve().parents[2]
DOCUMENT = ROOT / "docs" / "native.md"
TEXT = DOCUMENT.read_text(encoding="utf-8")


@pytest.mark.skipif(not native.available(), reason="no C++ compiler was there when bitpress was installed")
def test_the_examples_hold(pressed_original: Path) -> None:
    done = doctest.testfile(str(DOCUMENT), module_relative=False, encoding="utf-8", globs={"DIR": pressed_original})
    assert done.attempted > 10
    assert done.failed == 0


def test_the_lists_are_those_of_today(monkeypatch: pytest.MonkeyPatch) -> None:
    rewrite = runpy.run_path(str(ROOT / "scripts" / "list_native.py"))["rewrite"]
    assert rewrite(TEXT) == TEXT, "run make docs"
    # A row more instead of one less: put back, it would stand at the end of its table.
    for table, row in ((GRIDS, "int8"), (GRIDS, "olive4"), (ARCHITECTURES, "llama")):
        with monkeypatch.context() as changed:
            changed.setitem(table, f"another_{row}", table[row])
            assert rewrite(TEXT) != TEXT, "a changed table is seen"
    assert {*re.findall(r"[\w.]*\w", TEXT)} >= {*GRIDS, *ARCHITECTURES}
