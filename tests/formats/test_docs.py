"""The documents of formats: their examples run, every name of the tables is in them, and their tables are today's."""

import doctest
import importlib
import pkgutil
import runpy
from pathlib import Path

import pytest

import bitpress.formats
from bitpress.formats import GRIDS, LAYOUTS, MAPS, SCALES, SHORT, TERMS

ROOT = Path(__file__).resolve().parents[2]
DOCUMENT = ROOT / "docs" / "formats.md"
MODULES = [module.name for module in pkgutil.walk_packages(bitpress.formats.__path__, "bitpress.formats.")]


def test_the_examples_of_the_document_hold() -> None:
    done = doctest.testfile(str(DOCUMENT), module_relative=False, encoding="utf-8")
    assert done.attempted > 20
    assert done.failed == 0


@pytest.mark.parametrize("name", MODULES)
def test_the_examples_of_a_module_hold(name: str) -> None:
    assert doctest.testmod(importlib.import_module(name)).failed == 0


def test_some_modules_have_examples() -> None:
    tried = {name: doctest.testmod(importlib.import_module(name)).attempted for name in MODULES}
    assert {name for name, count in tried.items() if count} >= {
        f"bitpress.formats.{m}" for m in ("layouts.dense", "layouts.table", "grids.minifloat")
    }


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_is_specified_in_at_most_25_lines(layout: str) -> None:
    text = DOCUMENT.read_text(encoding="utf-8")
    _, heading, rest = text.partition(f"\n### `{layout}`")
    assert heading, f"{layout} has no section in {DOCUMENT.name}"
    section = rest.split("\n## ")[0].split("\n### ")[0]
    assert len(section.strip().splitlines()) <= 25
    assert ">>>" in section, "a worked example"


@pytest.mark.parametrize("name", [*SCALES, *TERMS, *MAPS, *SHORT])
def test_every_name_is_in_the_document(name: str) -> None:
    assert f"`{name}`" in DOCUMENT.read_text(encoding="utf-8")


def test_the_tables_are_those_of_today() -> None:
    rewrite = runpy.run_path(str(ROOT / "scripts" / "list_formats.py"))["rewrite"]
    text = DOCUMENT.read_text(encoding="utf-8")
    assert rewrite(text) == text, "run make docs"
    rows = dict(GRIDS)
    try:
        del GRIDS["log3"]
        assert rewrite(text) != text, "a changed table is seen"
    finally:  # in its order, which a single row put back would lose
        GRIDS.clear()
        GRIDS.update(rows)
