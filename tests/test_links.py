"""The documents: every link leads to a file, every document is reached from the README, and the README stays one screen."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
DOCUMENTS = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]


def links(path: Path) -> list[Path]:
    """Every file of the repository that a document names: as a link, or as `docs/NAME.md`."""
    text = path.read_text(encoding="utf-8")
    relative = [target for target in re.findall(r"\]\(([^)#]+)", text) if "://" not in target]
    return [path.parent / target for target in relative] + [ROOT / name for name in re.findall(r"`(docs/[\w.-]+)`", text)]


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda p: p.name)
def test_every_link_leads_to_a_file(path: Path) -> None:
    missing = [str(target) for target in links(path) if not target.is_file()]
    assert not missing


def test_every_document_is_reached_from_the_readme() -> None:
    reached, pending = set(), [ROOT / "README.md"]
    while pending:
        path = pending.pop().resolve()
        if path not in reached:
            reached.add(path)
            pending += [target for target in links(path) if target.suffix == ".md"]
    assert {path.resolve() for path in DOCUMENTS} <= reached


def test_the_readme_is_short_and_shows_no_row_that_saw_its_own_text() -> None:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    assert len(text.splitlines()) <= 100
    assert "mixed bits" not in text
