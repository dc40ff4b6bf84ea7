"""Answers of a streamed model are those of the whole model, one choice at a time."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from bitpress.errors import CheckpointError, UsageError
from bitpress.evaluation import read_questions, score_choices
from bitpress.measure.multiple_choice import Answers, evaluate_tasks, read_tasks, tokenize_tasks
from bitpress.models.opening import open_streamed
from bitpress.models.walk import walk
from bitpress.runtime.hf.loading import load

ROWS = [
    {"context": "The ship sailed to the ", "choices": ["island", "isle of nowhere at all", "sea"], "answer": 2},
    {"context": "Holmes", "choices": [" said", "ton said nothing", "!"], "answer": 0},
    {"context": "", "choices": ["I", "You will see"], "answer": 1},
    {"context": "word " * 120, "choices": ["word", "other words"], "answer": 0},
    {"context": "a\n", "choices": ["b", "c", "d", "e"], "answer": 3},
]
# Two orders of the same float32 sums: logits of magnitude 10 and sums of 20 of them.
CLOSE = 20 * 10 * 8 * torch.finfo(torch.float32).eps


@pytest.fixture
def task_file(tmp_path: Path) -> Path:
    path = tmp_path / "own.jsonl"
    path.write_text("\n".join(map(json.dumps, ROWS)))
    return path


@pytest.mark.parametrize("what", ["llama", "gpt2", "gemma3", "pressed"])
def test_scores_are_those_of_the_whole_model(
    what: str, tiny_model: Callable[..., Path], pressed_original: Path, task_file: Path
) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    path = pressed_original if what == "pressed" else tiny_model(what)
    model = open_streamed(path, torch.float32)
    answers = Answers(model, tokenize_tasks({"own": read_questions(str(task_file), 500)}, path, model))
    model.load_outer_()
    answers.start_()
    walk(model, [answers])
    found = score_choices(answers._scorer("own"), answers.tasks["own"])
    whole = load(path, dtype="fp32") if what == "pressed" else AutoModelForCausalLM.from_pretrained(path).eval()
    tokenizer = AutoTokenizer.from_pretrained(path)
    limit = whole.config.max_position_embeddings
    for row, scores in zip(ROWS, found, strict=True):
        for choice, score in zip(row["choices"], scores, strict=True):
            known = tokenizer(row["context"].rstrip(), add_special_tokens=False).input_ids
            tokens = tokenizer(row["context"] + choice, add_special_tokens=False).input_ids
            start = next(k for k in range(len(tokens)) if k == len(known) or known[k] != tokens[k])
            if start == 0:
                tokens, start = [tokenizer.bos_token_id, *tokens], 1
            cut = max(len(tokens) - 1 - limit, 0)
            tokens, start = tokens[cut:], start - cut
            with torch.no_grad():
                logs = torch.log_softmax(whole(torch.tensor([tokens[:-1]])).logits[0].double(), -1)
            expected = sum(float(logs[k - 1, tokens[k]]) for k in range(start, len(tokens)))
            assert score == pytest.approx(expected, abs=CLOSE), (row, choice)


def test_progress_comes_to_its_end(tiny_model: Callable[..., Path], task_file: Path) -> None:
    stages: list[Any] = []

    class Watch:
        def begin(self, what: str, total: int, done: int = 0) -> None:
            stages.extend([what, total])

        def advance(self, unit: str, **figures: Any) -> None:
            stages[-1] -= 1

        def note(self, text: str) -> None:
            stages.append(text)

    found = evaluate_tasks(tiny_model(), [str(task_file)], documents=4, progress=Watch())
    assert stages == [f"reading {task_file}", 0, f"answering {task_file}", 0]
    assert found[str(task_file)]["documents"] == 4


def test_one_question_has_no_standard_error(tiny_model: Callable[..., Path], task_file: Path) -> None:
    found = evaluate_tasks(tiny_model(), [str(task_file)], documents=1)
    assert found[str(task_file)]["acc_stderr"] is None


def test_what_cannot_be_asked_is_one_line(
    tiny_model: Callable[..., Path], task_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(UsageError, match="name one or more, each once"):
        read_tasks(["piqa", "piqa"])
    with pytest.raises(UsageError, match="name one or more, each once"):
        evaluate_tasks(tiny_model(), [])
    task_file.write_text(json.dumps({"context": "a", "choices": ["b", "word " * 300], "answer": 0}))
    with pytest.raises(UsageError, match=r"own.jsonl: question 1, choice .* too many for a model with a context of 256"):
        evaluate_tasks(tiny_model(), [str(task_file)])
    task_file.write_text(json.dumps({"context": "zebra", "choices": ["x", "y"], "answer": 0}))
    with pytest.raises(CheckpointError, match="they do not belong together"):
        evaluate_tasks(tiny_model("llama", vocab_size=64), [str(task_file)])
