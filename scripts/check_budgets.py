"""Hold the house to its budgets: lengths of files and functions, phrases that no stranger understands, records without types.

    python scripts/check_budgets.py            fail where a budget is exceeded, or is larger than what is there
    python scripts/check_budgets.py --lower    write what is there into budgets.json, where that is less

A number in budgets.json is what is left to mend. It goes down with every mended place and never up; at 0 the rule holds.
"""

import ast
import json
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
BUDGETS = Path(__file__).with_name("budgets.json")
LONGEST_FILE = 400
LONGEST_FUNCTION = 60

# Phrases over whole texts, docstrings and messages included, line breaks and comment marks read as blanks.
PHRASES = {
    "that which": r"\bthat which\b",
    "... is none": r"(?<!there )\b(?:is|are|be) none\b",
    "nothing of what": r"\bnothing of what\b",
    "of what others": r"\bof what others\b",
    "what is longer/shorter than": r"\bwhat is (?:longer|shorter|larger|smaller|more|less) than\b",
    "made/given/told in a way": r"\b(?:in (?:a|no) way that|in no way)\b",
    "loses its begin": r"\bits begin\b",
    "what beside": r"\bwhat beside\b",
    "subject clause with What": r"[.:] What(?:ever)? [^.?:]{3,60} (?:is|are|has|have|gets|loses|does)\b",
    # Not the value `pressed` of a recipe's inputs in a table of rows.
    "press as a verb": r"(?<!\| )\b(?:[Pp]ressed|[Pp]resses|[Pp]ressing|to press|[Pp]ress (?:a|the|it|them|every|one))\b",
}
# In docstrings alone.
OPENINGS = {"a docstring begins with Give": r"Gives?\b", "a docstring begins with Tell": r"Tells?\b"}
# Types that say nothing of what they hold: (where, the annotation).
UNTYPED = {
    "dict[str, Any] in pipeline": ("pipeline", "dict[str, Any]"),
    "Mapping[str, Any] in pipeline": ("pipeline", "Mapping[str, Any]"),
    "tables of type[Any]": ("", "type[Any]"),
}


def sources() -> list[Path]:
    """List the files whose length is held: the product, its scripts and its benchmarks; not their generated results."""
    kinds = ("src/**/*.py", "scripts/*.py", "benchmarks/*.py", "native/**/*.cpp", "native/**/*.h", "native/**/*.inc")
    return sorted(path for kind in kinds for path in ROOT.glob(kind))


def texts() -> list[Path]:
    """List the files that people read: the source with its docstrings and messages, and the documents."""
    return sorted([*ROOT.glob("src/**/*.py"), *ROOT.glob("docs/**/*.md"), ROOT / "README.md", ROOT / "CONTRIBUTING.md"])


def others() -> list[Path]:
    """List the files whose docstrings are held to OPENINGS alone: tests, scripts and benchmarks."""
    return sorted(path for kind in ("tests/**/*.py", "scripts/*.py", "benchmarks/*.py") for path in ROOT.glob(kind))


def long_files() -> dict[str, int]:
    """Return the number of lines of every file that is too long."""
    lengths = {str(path.relative_to(ROOT)): len(path.read_text().splitlines()) for path in sources()}
    return {name: lines for name, lines in lengths.items() if lines > LONGEST_FILE}


def statements(tree: ast.AST) -> Iterator[ast.AST]:
    """Yield what holds statements, and the statements themselves; their expressions, most of a tree, hold no definitions."""
    yield tree
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.stmt | ast.excepthandler | ast.match_case):
            yield from statements(node)


def functions(tree: ast.AST) -> Iterator[ast.FunctionDef | ast.AsyncFunctionDef]:
    return (node for node in statements(tree) if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef))


def python_functions(source: str) -> Iterator[tuple[str, int]]:
    """Yield the name and the number of lines of every function of a Python file."""
    for node in functions(ast.parse(source)):
        yield node.name, (node.end_lineno or node.lineno) - node.lineno + 1


def native_functions(source: str) -> Iterator[tuple[str, int]]:
    """Yield the name and the number of lines of every function of a C++ file: a block in braces behind `name(...)`."""
    source = re.sub(r"^#.*|//[^\n]*|\"(?:\\.|[^\"\n])*\"|'(?:\\.|[^'\n])+'", "", source, flags=re.MULTILINE)
    begun: list[tuple[str, int]] = []  # of every open brace, what stands before it, and its line
    before, line = "", 1
    for character in source:
        line += character == "\n"
        if character == "{":
            begun.append((before, line - before.lstrip().count("\n")))
        elif character == "}":
            head, first = begun.pop()
            name = re.match(r"[^=]*?\b(\w+)\s*\(", head)
            if name and name[1] not in ("if", "for", "while", "switch", "catch"):
                yield name[1], line - first + 1
        before = "" if character in "{};" else before + character


def long_functions() -> dict[str, int]:
    """Return the number of lines of every function that is too long, as `file:name`."""
    return {
        f"{path.relative_to(ROOT)}:{name}": lines
        for path in sources()
        for name, lines in (python_functions if path.suffix == ".py" else native_functions)(path.read_text())
        if lines > LONGEST_FUNCTION
    }


def count_phrases(text: str) -> dict[str, int]:
    """Count every phrase of PHRASES in a text."""
    text = re.sub(r"\s+(?:#+ )?", " ", text)
    return {name: len(re.findall(pattern, text)) for name, pattern in PHRASES.items()}


def count_openings(source: str) -> dict[str, int]:
    """Count the docstrings of a source file that begin with a verb of OPENINGS."""
    if not re.search(rf"[\"'](?:\\\\\n)?\s*(?:{'|'.join(OPENINGS.values())})", source):
        return dict.fromkeys(OPENINGS, 0)  # most files need not be parsed
    documented = ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef
    docstrings = [ast.get_docstring(node) or "" for node in statements(ast.parse(source)) if isinstance(node, documented)]
    return {name: sum(re.match(verb, text) is not None for text in docstrings) for name, verb in OPENINGS.items()}


def count_untyped(source: str, annotation: str) -> int:
    """Count the places of a source file where an annotation is exactly this one, or has it as a part."""
    if not re.search(r"\s*".join(map(re.escape, re.findall(r"\w+|[^\w\s]", annotation))), source):
        return 0  # most files need not be parsed
    nodes = (node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Subscript))
    return sum(ast.unparse(node) == annotation for node in nodes)


def measure() -> dict[str, dict[str, int]]:
    """Return what there is today of everything that has a budget."""
    words: dict[str, int] = dict.fromkeys([*PHRASES, *OPENINGS], 0)
    for path in texts():
        text = path.read_text()
        for name, count in (count_phrases(text) | (count_openings(text) if path.suffix == ".py" else {})).items():
            words[name] += count
    for path in others():
        for name, count in count_openings(path.read_text()).items():
            words[name] += count
    untyped = {
        name: sum(count_untyped(path.read_text(), annotation) for path in (ROOT / "src/bitpress" / room).rglob("*.py"))
        for name, (room, annotation) in UNTYPED.items()
    }
    return {"words": words, "untyped": untyped}


def complaints(budgets: dict[str, Any]) -> list[str]:
    """Compare what there is with the budgets; one line for each that differs."""
    lines = []
    for kind, longest, found in (
        ("files", LONGEST_FILE, long_files()),
        ("functions", LONGEST_FUNCTION, long_functions()),
    ):
        excused: dict[str, str] = budgets[kind]
        lines += [f"{n}: {count} lines, {longest} are allowed; cut it." for n, count in found.items() if n not in excused]
        lines += [f"{n}: is no longer too long; run scripts/check_budgets.py --lower." for n in excused if n not in found]
        lines += [f"{n}: an exception needs its reason in scripts/budgets.json." for n, reason in excused.items() if not reason]
    for kind, counts in measure().items():
        for name, count in counts.items():
            allowed = budgets[kind].get(name, 0)
            if count > allowed:
                lines.append(
                    f"{kind}: {name}: {count} places, {allowed} are allowed; put the new ones in plain words or types."
                )
            elif count < allowed:
                lines.append(f"{kind}: {name}: {count} places, fewer than {allowed}; run scripts/check_budgets.py --lower.")
    return lines


def lower(budgets: dict[str, Any]) -> dict[str, Any]:
    """Return the budgets without exceptions that nothing needs and with no number above what there is."""
    lowered: dict[str, Any] = {}
    for kind, found in (("files", long_files()), ("functions", long_functions())):
        lowered[kind] = {name: reason for name, reason in budgets[kind].items() if name in found}
    for kind, counts in measure().items():
        lowered[kind] = {name: min(count, budgets[kind].get(name, 0)) for name, count in counts.items()}
    return lowered


def main() -> int:
    budgets = json.loads(BUDGETS.read_text())
    if sys.argv[1:] == ["--lower"]:
        budgets = lower(budgets)
        BUDGETS.write_text(json.dumps(budgets, indent=2) + "\n")
    lines = complaints(budgets)
    print(*lines, sep="\n", end="\n" if lines else "")
    return 1 if lines else 0


if __name__ == "__main__":
    sys.exit(main())
