"""The Python interface: the commands as functions."""

import functools
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, TypedDict

from bitpress.checkpoints.budget import parse_bytes
from bitpress.checkpoints.tokenizer import load_tokenizer
from bitpress.devices import computing_on
from bitpress.errors import UsageError
from bitpress.measure.evaluation import evaluate as _evaluate
from bitpress.measure.evaluation import evaluate_alone as _evaluate_alone
from bitpress.measure.multiple_choice import DOCUMENTS
from bitpress.measure.multiple_choice import evaluate_tasks as _evaluate_tasks
from bitpress.pipeline.exporting import export_for, export_model, open_model, open_to_quantize
from bitpress.pipeline.for_runtime import choose_for, fit_to
from bitpress.pipeline.learned_rotations import LearnedRotations
from bitpress.pipeline.learned_rotations import learn_rotations as _learn_rotations
from bitpress.pipeline.quantize import Proof, quantize_directory
from bitpress.progress import Progress
from bitpress.recipes import Recipe, choose_method
from bitpress.recipes.parts import make_part
from bitpress.runtime.native.options import EngineOptions
from bitpress.runtime.opening import load as _load
from bitpress.screen import watch
from bitpress.tuning.network_rotations import RotationTuning

_OF_ENGINE = ("activations", "cache", "head")

__all__ = ["evaluate", "evaluate_tasks", "export", "learn_rotations", "load", "load_tokenizer", "quantize"]


class _How(TypedDict):
    strict: bool
    force: bool
    proof: Proof


class _Parts(TypedDict):
    weights: str | None
    quantizer: str | Mapping[str, Any] | None
    inputs: str | Mapping[str, Any] | None
    tune: Sequence[str | Mapping[str, Any]]
    calibration: Mapping[str, Any]
    skip: Sequence[str]
    outer: Mapping[str, Any]


def quantize(
    model: str | Path,
    out: str | Path,
    *,
    recipe: Recipe | Mapping[str, Any] | str | Path | None = None,
    preset: str | None = None,
    scheme: str | None = None,
    bits: int | None = None,
    weights: str | None = None,
    quantizer: str | Mapping[str, Any] | None = None,
    tune: Sequence[str | Mapping[str, Any]] = (),
    inputs: str | Mapping[str, Any] | None = None,
    calibration: str | None = None,
    samples: int | None = None,
    length: int | None = None,
    seed: int | None = None,
    skip: Sequence[str] = (),
    embeddings: str | Mapping[str, Any] | None = None,
    head: str | Mapping[str, Any] | None = None,
    runtime: str | None = None,
    strict: bool = False,
    force: bool = False,
    requantize: bool = False,
    proof_tokens: int = 8192,
    proof_text: str = "builtin:heldout",
    max_kl: float | None = None,
    device: str | None = None,
    device_memory: int | str | None = None,
    progress: Progress | bool | None = None,
) -> dict[str, Any]:
    """Quantize a model into the directory `out` and return the report. The arguments are the options of `bitpress quantize`.

    model       a directory in the Hugging Face layout, a .gguf file, a named model (`bitpress models`) or a hub name
    recipe      a Recipe, its content as a mapping, or a YAML file; `weights` and `quantizer` replace the recipe's
    preset      instead of a recipe: fast, balanced or best, the recipe that measured best under that rule at `bits` 4, 3 or 2
    scheme      instead of both: weights and inputs of products together, such as w8a8 (`bitpress methods`)
    bits        alone: of the preset balanced; with a quantizer: of its number format, int4-g64-zero for 4
    tune        what is learned further of every block by gradients, in this order: names such as "signround", or {"name": ..., "steps": ...}
    inputs      how the inputs of products are rounded: a format, token by token, or what a recipe's key `inputs` says
    calibration builtin, a .txt or .jsonl file, or hf:NAME; `samples` windows of `length` tokens, drawn by `seed`
    skip        patterns of weights not to quantize, such as "*.down_proj"
    embeddings  format of the embedding table, or {"weights": format, "quantizer": name}; int8-row by default without a recipe; `head` likewise
    runtime     choose what this runtime can load, and export to it at the end, into `out`
    strict      a fallback is an error; `force` replaces bitpress's own in `out`; `requantize` takes models that are quantized already
    max_kl      publish nothing above this KL divergence, measured on `proof_tokens` of `proof_text`; 0 tokens leave the proof out
    device      auto, cpu, cuda or cuda:N, by default BITPRESS_DEVICE or auto; `device_memory` ("2GB") limits what is taken of a GPU
    progress    None: a bar if standard error is a terminal, else silence; True: a bar there, lines in a log; False: silence; or a Progress

    The same call resumes an interrupted run. Raises the errors of `bitpress.errors`.
    """
    said, named = {"embeddings": embeddings, "head": head}, not (recipe is None and preset is None and scheme is None)
    weights, bits, outer = choose_for(runtime, bits, weights, said, named=named)
    text = {"text": calibration, "samples": samples, "length": length, "seed": seed}
    parts = _Parts(weights=weights, quantizer=quantizer, inputs=inputs, tune=tune, calibration=text, skip=skip, outer=outer)
    made = choose_method(recipe, preset=preset, scheme=scheme, bits=bits, **parts)
    with _computing(device, device_memory) as place, watch(progress) as shown:
        source, out = open_to_quantize(model, shown, requantize=requantize), Path(out)
        how: _How = {"strict": strict, "force": force, "proof": Proof(tokens=proof_tokens, text=proof_text, max_kl=max_kl)}
        report = quantize_directory(source, out, fit_to(made, source, runtime), **how, device=place, progress=shown)
        return report if runtime is None else {**report, "exported": export_for(out, runtime, shown)}


def learn_rotations(
    model: str | Path,
    file: str | Path,
    *,
    recipe: Recipe | Mapping[str, Any] | str | Path | None = None,
    scheme: str | None = None,
    weights: str | None = None,
    inputs: str | Mapping[str, Any] | None = None,
    calibration: str | None = None,
    samples: int | None = None,
    length: int | None = None,
    seed: int | None = None,
    skip: Sequence[str] = (),
    force: bool = False,
    device: str | None = None,
    device_memory: int | str | None = None,
    progress: Progress | bool | None = None,
    **tuning: Any,
) -> LearnedRotations:
    """Learn a rotation of the whole network under which rounding costs less, and write it to the safetensors file `file`, which the transform
    `rotate` reads (`kind: given`).

    tuning      steps (100), batch (1 window), rate (1.0 radians), loss ("kl-top" or "cross-entropy"), rounds ("all", "inputs" or "weights")
    force       replace `file`; the other arguments are as in `quantize`

    Raises the errors of `bitpress.errors`.
    """
    text = {"text": calibration, "samples": samples, "length": length, "seed": seed}
    parts = _Parts(weights=weights, quantizer=None, inputs=inputs, tune=(), calibration=text, skip=skip, outer={})
    method = choose_method(recipe, preset=None, scheme=scheme, bits=None, **parts)
    how = make_part("tuning", {"name": "rotations", **tuning}, {"rotations": RotationTuning})
    with _computing(device, device_memory) as place, watch(progress) as shown:
        source = open_to_quantize(model, shown)
        return _learn_rotations(source, Path(file), method.computed_on(place), how, force=force, device=place, progress=shown)


def evaluate(
    directory: str | Path,
    against: str | Path | None = None,
    *,
    device: str | None = None,
    device_memory: int | str | None = None,
    progress: Progress | bool | None = None,
    **settings: Any,
) -> dict[str, Any]:
    """Measure a model directory against the original, or without `against` its perplexity alone.

    `bitpress.measure.evaluation.evaluate` and `evaluate_alone` list the settings and the figures. With `runtime="native"` or
    `"transformers"` the distance is that of the runtime's own logits, its roundings included; `activations`, `cache` and `head`
    are the native engine's, as in `load`. `device`, `device_memory` and `progress` are as in `quantize`.
    """
    engine = EngineOptions.of({name: settings.pop(name) for name in _OF_ENGINE if name in settings})
    through = [name for name in ("runtime", "with_runtime") if name in settings] + list(engine.chosen())
    if against is None and through:
        raise UsageError(f"{through[0]} needs `against`, the original to measure the distance from.")
    with _computing(device, device_memory) as place, watch(progress) as shown:
        given = open_model(directory, shown)
        if against is None:
            return _evaluate_alone(given, device=place, progress=shown, **settings)
        return _evaluate(given, open_model(against, shown), engine=engine, device=place, progress=shown, **settings)


def evaluate_tasks(
    directory: str | Path,
    tasks: Sequence[str],
    *,
    documents: int = DOCUMENTS,
    device: str | None = None,
    device_memory: int | str | None = None,
    progress: Progress | bool | None = None,
) -> dict[str, dict[str, Any]]:
    """Measure the zero-shot accuracy of a model directory on multiple-choice tasks.

    tasks       names (arc-easy, piqa, ...; docs/evaluation.md lists them) and paths of your own .jsonl files
    documents   how many questions of each task, from the first
    device, device_memory, progress   as in `quantize`

    Returns acc, acc_stderr, acc_norm, acc_norm_stderr and documents by task. Raises the errors of `bitpress.errors`.
    """
    with _computing(device, device_memory) as place, watch(progress) as shown:
        return _evaluate_tasks(open_model(directory, shown), tasks, documents=documents, device=place, progress=shown)


def _computing(device: str | None, memory: int | str | None) -> AbstractContextManager[Any]:
    return computing_on(device, None if memory is None else parse_bytes(memory))


@functools.wraps(_load)
def load(directory: str | Path, **settings: Any) -> Any:
    return _load(open_model(directory), **settings)


def export(
    model: str | Path, out: str | Path, to: str, *, requantize: bool = False, progress: Progress | bool | None = None
) -> dict[str, object]:
    """Write a compressed model as a file or directory that other runtimes load, and read it back.

    model       a directory that bitpress wrote, or a model that another tool quantized
    out         what to write; it must not exist
    to          gptq, bf16, ...: `bitpress targets` lists them
    requantize  round weights again whose codes the target cannot hold; else they are an error
    progress    as in `quantize`

    Returns what was written: its bytes, how many weights kept their codes, and for each other one why, and the error that it gained.
    Raises the errors of `bitpress.errors`.
    """
    with watch(progress) as shown:
        return export_model(model, out, to, requantize=requantize, progress=shown).as_dict()
