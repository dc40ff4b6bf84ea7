"""The Python interface: the commands as functions."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from bitpress.checkpoints.compressed import is_compressed
from bitpress.checkpoints.named import resolve_model
from bitpress.checkpoints.tokenizer import load_tokenizer
from bitpress.errors import UsageError
from bitpress.measure.evaluation import evaluate as _evaluate
from bitpress.measure.evaluation import evaluate_alone as _evaluate_alone
from bitpress.measure.multiple_choice import DOCUMENTS
from bitpress.measure.multiple_choice import evaluate_tasks as _evaluate_tasks
from bitpress.pipeline.quantize import Proof, quantize_directory
from bitpress.presets import preset_keys
from bitpress.progress import Progress
from bitpress.recipes import Recipe, load_recipe, make_recipe
from bitpress.runtime.native.options import EngineOptions
from bitpress.runtime.opening import load

_OF_ENGINE = ("activations", "cache", "head")

__all__ = ["evaluate", "evaluate_tasks", "load", "load_tokenizer", "quantize"]


def quantize(
    model: str | Path,
    out: str | Path,
    *,
    recipe: Recipe | Mapping[str, Any] | str | Path | None = None,
    preset: str | None = None,
    bits: int | None = None,
    weights: str | None = None,
    quantizer: str | Mapping[str, Any] | None = None,
    strict: bool = False,
    force: bool = False,
    proof_tokens: int = 8192,
    max_kl: float | None = None,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Quantize a model into the directory `out` and return the report.

    model       a directory in the Hugging Face layout, a .gguf file, a named model (`bitpress models`) or a hub name
    recipe      a Recipe, its content as a mapping, or a YAML file; `weights` and `quantizer` replace the recipe's
    preset      instead of a recipe: fast, balanced or best, the recipe that measured best under that rule at `bits` 4, 3 or 2
    bits        alone: of the preset balanced; with a quantizer: of its number format, int4-g64-zero for 4
    strict      a fallback is an error
    force       replace another model or unfinished job of bitpress in `out`

    The same call resumes an interrupted run. Raises the errors of `bitpress.errors`.
    """
    own = dict(recipe) if isinstance(recipe, Mapping) else None
    says = recipe is not None if own is None or preset is not None else "weights" in own
    given_quantizer = quantizer is not None or "quantizer" in (own or {})
    values = preset_keys(preset, bits, beside_recipe=says, weights=weights is not None, quantizer=given_quantizer)
    if isinstance(recipe, Recipe):
        values = recipe.model_dump()
    elif isinstance(recipe, (str, Path)):
        values = load_recipe(recipe).model_dump()
    else:
        values |= own or {}
    if weights is not None:
        values["weights"] = weights
    if quantizer is not None:
        values["quantizer"] = quantizer
    return quantize_directory(
        resolve_model(str(model)),
        Path(out),
        make_recipe(values),
        strict=strict,
        force=force,
        proof=Proof(tokens=proof_tokens, max_kl=max_kl),
        progress=progress,
    )


def evaluate(directory: str | Path, against: str | Path | None = None, **settings: Any) -> dict[str, Any]:
    """Measure a model directory against the original, or without `against` its perplexity alone.

    `bitpress.measure.evaluation.evaluate` and `evaluate_alone` list the settings and the figures. With `runtime="native"` or
    `"transformers"` the distance is that of the runtime's own logits, its roundings included; `activations`, `cache` and `head`
    are the native engine's, as in `load`.
    """
    given = Path(directory) if is_compressed(directory) else resolve_model(str(directory))
    if against is None:
        if through := [name for name in ("runtime", *_OF_ENGINE, "with_runtime") if name in settings]:
            raise UsageError(f"{through[0]} needs `against`, the original to measure the distance from.")
        return _evaluate_alone(given, **settings)
    engine = EngineOptions.of({name: settings.pop(name) for name in _OF_ENGINE if name in settings})
    return _evaluate(given, resolve_model(str(against)), engine=engine, **settings)


def evaluate_tasks(
    directory: str | Path, tasks: Sequence[str], *, documents: int = DOCUMENTS, progress: Progress | None = None
) -> dict[str, dict[str, Any]]:
    """Measure the zero-shot accuracy of a model directory on multiple-choice tasks.

    tasks       names (arc-easy, piqa, ...; docs/evaluation.md lists them) and paths of your own .jsonl files
    documents   how many questions of each task, from the first

    Returns acc, acc_stderr, acc_norm, acc_norm_stderr and documents by task. Raises the errors of `bitpress.errors`.
    """
    given = Path(directory) if is_compressed(directory) else resolve_model(str(directory))
    return _evaluate_tasks(given, tasks, documents=documents, progress=progress)
