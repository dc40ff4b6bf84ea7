"""Budgets of the house (scripts/check_budgets.py): they hold, and what exceeds one is seen."""

import functools
import importlib.util
import json
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

SCRIPT = Path(__file__).resolve().parents[1] / "scripts" / "check_budgets.py"


@pytest.fixture(scope="module")
def check() -> ModuleType:
    spec = importlib.util.spec_from_file_location("check_budgets", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    for name in ("measure", "long_files", "long_functions"):  # all read the whole tree, which no test changes
        setattr(module, name, functools.cache(getattr(module, name)))
    return module


@pytest.fixture(scope="module")
def budgets(check: ModuleType) -> Any:
    return json.loads(check.BUDGETS.read_text())


def test_the_budgets_hold_and_none_is_larger_than_it_needs_to_be(check: ModuleType, budgets: Any) -> None:
    assert check.complaints(budgets) == []


@pytest.mark.parametrize("step", [1, pytest.param(-1, marks=pytest.mark.release)])
def test_a_number_above_or_below_its_budget_is_seen(
    step: int, check: ModuleType, budgets: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = check.measure()
    moved = {kind: {name: count + step for name, count in counts.items()} for kind, counts in found.items()}
    monkeypatch.setattr(check, "measure", lambda: moved)
    lines = check.complaints(budgets)
    assert len(lines) == sum(map(len, found.values()))
    assert all(("are allowed" if step > 0 else "--lower") in line for line in lines)
    # A budget is lowered by the command, never raised.
    assert check.lower(budgets) == (budgets if step > 0 else {**budgets, **moved})


def test_long_files_and_functions_need_a_reason_for_as_long_as_they_are_long(
    check: ModuleType, budgets: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(check, "long_files", lambda: {"src/a.py": 401})
    monkeypatch.setattr(check, "long_functions", lambda: {"src/a.py:f": 61})
    bare = {**budgets, "files": {}, "functions": {}}
    assert [line.split(":")[0] for line in check.complaints(bare)] == ["src/a.py", "src/a.py"]
    excused = {**budgets, "files": {"src/a.py": "a table"}, "functions": {"src/a.py:f": "", "src/b.py:g": "gone"}}
    assert [line.split(": ")[1] for line in check.complaints(excused)] == [
        "is no longer too long; run scripts/check_budgets.py --lower.",
        "an exception needs its reason in scripts/budgets.json.",
    ]
    assert check.lower(excused)["functions"] == {"src/a.py:f": ""}


def test_functions_of_both_languages_are_measured(check: ModuleType) -> None:
    native = """#if defined(A) {
namespace n {
struct S { int f() const { return '}'; } };
// {
template <int N> static void g(int a,
                               int b) {
    if (a) {
        auto h = [&](int c) { return "{"; };
    }
}
}
"""
    assert list(check.native_functions(native)) == [("f", 1), ("g", 6)]
    assert list(check.python_functions("def f(\n    a):\n    def g():\n        pass\n")) == [("f", 4), ("g", 2)]


def test_phrases_are_found_across_line_breaks_and_in_comments(check: ModuleType) -> None:
    text = '''"""Read it. What the file holds and nobody reads
    is kept."""
    # nothing of
    # what it lists, that
    # which was pressed: a name in a way that is none
    '''
    found = {name for name, count in check.count_phrases(text).items() if count == 1}
    assert found == {
        *("subject clause with What", "nothing of what", "that which", "press as a verb"),
        *("made/given/told in a way", "... is none"),
    }
    assert check.count_openings('"""Give it."""\ndef f():\n    """Gives it."""\ndef g():\n    """Given that, return."""') == {
        "a docstring begins with Give": 2,
        "a docstring begins with Tell": 0,
    }
    assert check.count_untyped("a: dict[str, Any]\nb: list[dict[str, Any]]\nc: dict[str, int]", "dict[str, Any]") == 2
