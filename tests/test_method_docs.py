"""The document of methods: its script writes every row of the tables into it, and only between its marks."""

import runpy
from pathlib import Path

import pytest
import yaml

from bitpress.calibration import STATISTICS
from bitpress.corrections.table import CORRECTIONS
from bitpress.quantizers.table import QUANTIZERS
from bitpress.recipes import NAMED_RECIPES, Calibration, Recipe, build_method, make_recipe
from bitpress.transforms.table import TRANSFORMS
from bitpress.tuning.table import TUNINGS

ROOT = Path(__file__).resolve().parents[1]
DOCUMENT = ROOT / "docs" / "methods.md"
RECIPES = ROOT / "docs" / "recipes.md"


def test_every_method_is_written_once_with_source_and_settings(monkeypatch: pytest.MonkeyPatch) -> None:
    script = runpy.run_path(str(ROOT / "scripts" / "list_methods.py"))
    rewrite = script["rewrite"]
    before = DOCUMENT.read_text(encoding="utf-8")
    text = rewrite(before)
    assert rewrite(text) == text
    for name in (*QUANTIZERS, *TRANSFORMS, *CORRECTIONS):
        assert text.count(f"\n| `{name}` |") == 1, name
        section = text.split(f"\n### `{name}`\n")[1].split("\n### ")[0]
        assert "*Source.* " in section, name
        assert "*Settings.* " in section, name
    for name, recipe in NAMED_RECIPES.items():
        assert text.count(f"\n| `{name}` |") == 1, name
        assert f"| {recipe.paper} |" in text
    for name in STATISTICS:
        assert f"\n| `{name}` | `[" in text
    assert "`damp=0.01`" in text.split("\n### `gptq`\n")[1].split("\n### ")[0]
    learned = rewrite((ROOT / "docs" / "tuning.md").read_text(encoding="utf-8"), "tuning.md")
    for name in TUNINGS:
        assert learned.count(f"\n| `{name}` |") == 1, name
        assert "*Source.* " in learned.split(f"\n### `{name}`\n")[1].split("\n### ")[0], name
    monkeypatch.setitem(QUANTIZERS, "another", QUANTIZERS["gptq"])
    assert "| `another` |" in rewrite(text)


def test_the_recipe_that_is_shown_is_the_default_one() -> None:
    shown = yaml.safe_load(RECIPES.read_text(encoding="utf-8").split("```yaml\n")[1].split("```")[0])
    assert set(shown) == set(Recipe.model_fields)
    assert set(shown["calibration"]) == set(Calibration.model_fields)
    assert build_method(make_recipe(shown)).resolved() == build_method(Recipe()).resolved()


def test_a_document_without_its_marks_is_refused() -> None:
    rewrite = runpy.run_path(str(ROOT / "scripts" / "list_methods.py"))["rewrite"]
    with pytest.raises(SystemExit, match="the section quantizers is not marked"):
        rewrite("# Methods\n")
