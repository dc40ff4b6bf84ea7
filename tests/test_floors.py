"""The house: a room imports only rooms on strictly lower floors, imports inside functions included."""

import ast
from pathlib import Path

import pytest

SRC = Path(__file__).resolve().parents[1] / "src" / "bitpress"

FLOORS = {
    "errors": 0,
    "foreign": 0,
    "faults": 0.3,  # needs errors
    "arithmetic": 0,
    "exhaustion": 0,
    "figures": 0.3,  # needs errors
    "finite": 0,
    "limits": 0,
    "settings": 0,
    "library": 0.3,  # needs errors and settings
    "packages": 0.3,
    "native": 0.5,  # its typed doors, which formats need
    "version": 0,
    "formats": 1,
    "calibration": 2,
    "transforms": 2,
    "kernels": 2,
    "checkpoints": 2,
    "evaluation": 2,
    "quantizers": 3,
    "corrections": 3,
    "runtime": 3,
    "parts": 3.5,  # those of a recipe
    "recipes": 4,
    "presets": 4,
    "pipeline": 5,
    "api": 6,
    "__main__": 7,
    "cli": 6,
}
# The package's own __init__ hands out the interface lazily and registers the bridge; it stands above everything.
ROOF = 7
HOMELESS = {"utils", "util", "helpers", "helper", "common", "misc", "base"}


def room_of(path: Path) -> str:
    relative = path.relative_to(SRC)
    return relative.parts[0].removesuffix(".py")


def floor_of(room: str) -> float:
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


def test_every_room_has_a_floor_and_no_file_is_homeless() -> None:
    for path in FILES:
        assert room_of(path) in {*FLOORS, "__init__"}, path
        assert not HOMELESS & {part.removesuffix(".py") for part in path.relative_to(SRC).parts}, path


def test_a_wrong_import_would_be_seen() -> None:
    tree = ast.parse("def f():\n    from bitpress.pipeline.job import Job\n    import bitpress.cli.app\n")
    assert [room for _, room in imports(tree)] == ["pipeline", "cli"]


def test_no_star_imports_and_explicit_all() -> None:
    for path in FILES:
        tree = ast.parse(path.read_text())
        for node in ast.walk(tree):
            assert not (isinstance(node, ast.ImportFrom) and any(a.name == "*" for a in node.names)), path
