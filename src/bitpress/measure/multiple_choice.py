"""Multiple-choice tasks on their way through a model, block by block, and how many answers are right at its end."""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from bitpress.calibration import begin_tokens
from bitpress.checkpoints.compressed import CompressedCheckpoint, is_compressed
from bitpress.checkpoints.tokenizer import load_tokenizer
from bitpress.devices import CPU
from bitpress.errors import UsageError
from bitpress.evaluation import Question, QuestionSet, lay_out, measure_accuracy, read_questions
from bitpress.figures import written
from bitpress.models.opening import open_streamed
from bitpress.models.streaming import StreamedModel
from bitpress.models.tasks.causal_lm import CausalLM, context_length
from bitpress.models.walk import LoadedBlock, Stream, walk
from bitpress.progress import Progress, Silent
from bitpress.recipes.method import compute_dtype

__all__ = ["DOCUMENTS", "Answers", "count_batches", "evaluate_tasks", "read_tasks", "tokenize_tasks"]

DOCUMENTS = 500


def read_tasks(
    names: Sequence[str], documents: int = DOCUMENTS, say: Callable[[str], None] = lambda line: None
) -> dict[str, list[Question]]:
    """Read the first questions of every task. Raises what `read_questions` raises, UsageError for a name given twice."""
    if len(set(names)) < len(names) or not names:
        raise UsageError(f"tasks {', '.join(names) or '(none)'}: name one or more, each once.")
    return {name: read_questions(name, documents, say) for name in names}


def tokenize_tasks(tasks: Mapping[str, Sequence[Question]], path: Path, model: StreamedModel) -> dict[str, QuestionSet]:
    """Lay tasks out for a model directory with its own tokenizer. Raises UsageError, CheckpointError."""
    task, config = model.task, model.model.config
    if not isinstance(task, CausalLM):
        raise UsageError(f"{path}: is {task.title}; multiple-choice tasks are for causal language models.")
    tokenizer: Any = load_tokenizer(path)
    first = tokenizer.eos_token_id if tokenizer.bos_token_id is None else tokenizer.bos_token_id
    limit = context_length(config)

    def encode(text: str) -> list[int]:
        return list(tokenizer(text, add_special_tokens=False, verbose=False).input_ids)

    made = {}
    for name, questions in tasks.items():
        try:
            made[name] = lay_out(questions, encode, begin=begin_tokens(tokenizer), first=first, limit=limit)
        except UsageError as error:
            raise UsageError(f"{name}: {error}") from error
        for batch in made[name].batches:
            task.check_inputs(torch.cat([batch.tokens.flatten(), batch.targets]), config, str(path))
    return made


class Answers:
    """A stream for the batches of every task; a visitor that moves all of them past a block."""

    def __init__(self, model: StreamedModel, tasks: Mapping[str, QuestionSet]) -> None:
        self.model, self.tasks = model, tasks
        self.streams = {name: Stream(model, [batch.tokens for batch in task.batches]) for name, task in tasks.items()}

    def start_(self) -> None:
        for stream in self.streams.values():
            stream.start_()

    def visit_(self, block: LoadedBlock) -> None:
        for stream in self.streams.values():
            stream.visit_(block)

    def accuracies(self, note: Callable[[str], None] = lambda unit: None) -> dict[str, dict[str, Any]]:
        """Return the figures of every task after the last block; the model's outer parts must be loaded. Raises NumericsError.

        They are as they are written (`bitpress.figures`): the standard error of a single question is None.
        """
        found = {}
        for name, task in self.tasks.items():

            def say(done: int, name: str = name) -> None:
                note(f"{name}, batch {done}")

            figures = measure_accuracy(self._scorer(name), task, say)
            found[name] = written(dataclasses.asdict(figures), name)
        return found

    def _scorer(self, name: str) -> Callable[[torch.Tensor, torch.Tensor], torch.Tensor]:
        """Return the logits of one batch after the other; what follows the last block sees every position alone."""
        left = iter(self.streams[name].states)

        def logits(tokens: torch.Tensor, at: torch.Tensor) -> torch.Tensor:
            hidden = next(left).flatten(0, 1)[at, None]
            return self.model.outputs(tokens.flatten()[at, None], hidden)[:, 0]

        return logits


def evaluate_tasks(
    directory: str | Path,
    tasks: Sequence[str],
    *,
    documents: int = DOCUMENTS,
    dtype: torch.dtype | None = None,
    checkpoint: CompressedCheckpoint | None = None,
    device: torch.device = CPU,
    progress: Progress | None = None,
) -> dict[str, dict[str, Any]]:
    """Measure the zero-shot accuracy of a compressed (or any other) model directory on tasks, by name or from files.

    Computes in bf16 where that is the faster one, as calibration does, unless `dtype` says otherwise.
    Gives acc, acc_stderr, acc_norm, acc_norm_stderr and documents for every task; see `bitpress.evaluation.multiple_choice` for what they
    are. Raises UsageError, CheckpointError, NumericsError.
    """
    progress, directory = progress or Silent(), Path(directory)
    questions = read_tasks(tasks, documents, progress.note)
    if checkpoint is None and is_compressed(directory):
        checkpoint = CompressedCheckpoint.open(directory)
    model = open_streamed(directory, dtype or compute_dtype("auto", device), checkpoint, device=device)
    answers = Answers(model, tokenize_tasks(questions, directory, model))
    progress.begin(f"reading {', '.join(tasks)}", len(model.blocks))
    model.load_outer_()
    answers.start_()
    walk(model, [answers], note=progress.advance)
    # A stage of its own: a batch takes another time than a block, and the end is foretold from the units that are done.
    progress.begin(f"answering {', '.join(tasks)}", count_batches(answers.tasks))
    return answers.accuracies(progress.advance)


def count_batches(tasks: Mapping[str, QuestionSet]) -> int:
    return sum(len(task.batches) for task in tasks.values())
