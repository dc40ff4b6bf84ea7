"""Sections of a document that a script writes: the lines between two marks."""

from collections.abc import Iterable, Mapping

__all__ = ["rewrite_sections"]


def rewrite_sections(document: str, text: str, sections: Mapping[str, Iterable[str]]) -> str:
    """Return a document's text with new lines in the named sections. Raises SystemExit for a section without marks."""
    for name, lines in sections.items():
        begin, end = f"<!-- {name}: written by make docs -->", f"<!-- end of {name} -->"
        before, found, rest = text.partition(begin)
        _, closed, after = rest.partition(end)
        if not (found and closed):
            raise SystemExit(f"{document}: the section {name} is not marked by {begin} and {end}.")
        text = before + "\n".join([begin, *lines, end]) + after
    return text
