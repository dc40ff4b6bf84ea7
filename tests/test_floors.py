"""The house: a room imports only rooms on strictly lower floors, imports inside functions included."""

import ast
from collections.abc import Mapping, Set
from pathlib import Path

import pytest

SRC = Path(__file__).resolve().parents[1] / "src" / "bitpress"

# A floor is a list of rooms that do not know of each other.
HOUSE = (
    ("errors", "foreign", "arithmetic", "exhaustion", "finite", "limits", "memory", "settings", "version"),
    ("devices", "faults", "figures", "library", "packages", "progress", "stopping"),
    ("native", "presets", "allocation", "screen"),
    ("formats",),
    ("calibration", "transforms", "kernels", "checkpoints", "evaluation"),
    ("exchange",),
    ("models", "quantizers", "corrections", "report", "tuning"),
    ("recipes", "runtime"),
    ("measure",),
    ("pipeline",),
    ("comparison",),
    ("api",),
    ("cli",),
)
FLOORS = {room: number for number, rooms in enumerate(HOUSE, 1) for room in rooms} | {"__main__": len(HOUSE) + 1}
# The package's own __init__ hands out the interface lazily and registers the bridge; it stands above everything.
ROOF = len(HOUSE) + 1
HOMELESS = {"utils", "util", "helpers", "helper", "common", "misc", "base"}


def room_of(path: Path) -> str:
    relative = path.relative_to(SRC)
    return relative.parts[0].removesuffix(".py")


def floor_of(room: str) -> int:
    return ROOF if room == "__init__" else FLOORS[room]


def imports(tree: ast.AST) -> list[tuple[int, str]]:
    """Every room of bitpress that a file imports, with the line."""
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are absolute"
            names = (
                [f"{node.module}.{alias.name}" for alias in node.names] if node.module == "bitpress" else [node.module or ""]
            )
        else:
            continue
        found += [(node.lineno, name.split(".")[1]) for name in names if name.startswith("bitpress.")]
    return found


FILES = sorted(SRC.rglob("*.py"))


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(SRC)))
def test_a_file_imports_only_lower_floors(path: Path) -> None:
    room = room_of(path)
    for line, target in imports(ast.parse(path.read_text())):
        if target == room or target == "__version__":
            continue
        assert floor_of(target) < floor_of(room), f"{path.name}:{line}: {room} (floor {floor_of(room)}) imports {target}"


def modules(tree: ast.AST, names: Set[str]) -> set[str]:
    """Name every module of bitpress that a file imports, out of `names`."""
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            found |= {f"{node.module}.{alias.name}" for alias in node.names} | {node.module or ""}
    return found & names


def circles(graph: Mapping[str, Set[str]]) -> list[tuple[str, ...]]:
    """Return groups of modules that import each other, however far around."""

    def reached(start: str) -> set[str]:
        seen, open_ends = set(), [start]
        while open_ends:
            for name in graph[open_ends.pop()] - seen:
                seen.add(name)
                open_ends.append(name)
        return seen

    ahead = {name: reached(name) for name in graph}
    return sorted(
        {tuple(sorted(other for other in ahead[name] if name in ahead[other])) for name in graph if name in ahead[name]}
    )


def test_no_file_sits_in_a_circle() -> None:
    names = {
        ".".join(("bitpress", *path.relative_to(SRC).with_suffix("").parts)).removesuffix(".__init__"): path for path in FILES
    }
    rooms = {name for name, path in names.items() if path.name == "__init__.py"}
    # A room's own __init__ hands out what its files hold: a file names the files that it takes something from.
    graph = {
        name: modules(ast.parse(path.read_text()), names.keys()) - rooms for name, path in names.items() if name not in rooms
    }
    assert circles(graph) == []


def test_a_circle_would_be_seen() -> None:
    assert circles({"a": {"b"}, "b": {"c"}, "c": {"a"}, "d": {"a"}}) == [("a", "b", "c")]


def test_every_room_has_a_floor_and_no_file_is_homeless() -> None:
    for path in FILES:
        assert room_of(path) in {*FLOORS, "__init__"}, path
        assert not HOMELESS & {part.removesuffix(".py") for part in path.relative_to(SRC).parts}, path


def test_a_wrong_import_would_be_seen() -> None:
    tree = ast.parse("def f():\n    from bitpress.pipeline.journal import Job\n    import bitpress.cli.app\n")
    assert [room for _, room in imports(tree)] == ["pipeline", "cli"]


def test_no_star_imports_and_explicit_all() -> None:
    for path in FILES:
        tree = ast.parse(path.read_text())
        for node in ast.walk(tree):
            assert not (isinstance(node, ast.ImportFrom) and any(a.name == "*" for a in node.names)), path
