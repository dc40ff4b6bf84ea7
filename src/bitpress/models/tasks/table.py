"""The table of tasks; a model is of the first task that has no reason against it."""

from typing import Any

from bitpress.errors import CheckpointError
from bitpress.models.task import Task
from bitpress.models.tasks.causal_lm import CausalLM

__all__ = ["TASKS", "find_task"]

TASKS: dict[str, Task] = {"causal-lm": CausalLM()}


def find_task(config: Any, where: str) -> Task:
    """Return the task of a model by its configuration. If no task fits, the CheckpointError names the kind of the model."""
    reasons = []
    for task in TASKS.values():
        what = task.why_not(config)
        if what is None:
            return task
        reasons.append(f"{what}, not {task.title}")
    titles = " and ".join(task.titles for task in TASKS.values())
    raise CheckpointError(f"{where}: {config.model_type} is {'; '.join(reasons)}; bitpress quantizes {titles}.")
