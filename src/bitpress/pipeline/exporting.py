"""Models on their way in and out: any checkpoint opened as a directory of our own, and a model exported to what other runtimes load."""

import os
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch

from bitpress.checkpoints.compressed import CompressedCheckpoint, is_compressed
from bitpress.checkpoints.exports import note_export, noted_export, remove_exports
from bitpress.checkpoints.given import read_given
from bitpress.checkpoints.hub_names import hub_names
from bitpress.checkpoints.named import resolve_model
from bitpress.checkpoints.published import check_absent, published
from bitpress.checkpoints.source import quantization_of, read_config
from bitpress.errors import CheckpointError, DiskError, UsageError, unknown_name
from bitpress.exchange.fates import plan_fates
from bitpress.exchange.gguf import Gguf, GgufSource
from bitpress.exchange.runtimes import RUNTIMES
from bitpress.exchange.source import Fates, ForeignSource
from bitpress.exchange.table import EXPORTERS, find_ecosystem, open_source
from bitpress.models.linears import find_outer
from bitpress.models.skeleton import build_config, build_skeleton
from bitpress.pipeline.foreign_check import ForeignReading, read_by_others
from bitpress.pipeline.importing import decode_model, import_source
from bitpress.pipeline.read_back import read_back
from bitpress.progress import Progress, Silent

__all__ = ["Exported", "export_for", "export_model", "open_model", "open_to_quantize"]

# Ecosystems whose models are opened as they are.
_OWN = ("bitpress", "safetensors")


@dataclass(frozen=True)
class Exported:
    """What an export wrote.

    reading what a reader of another tool found
    added   the relative squared error that each weight gained, by the name of its parameter, for weights whose codes were not carried over
    """

    to: str
    out: Path
    nbytes: int
    fates: Fates
    added: dict[str, float]
    reading: ForeignReading

    def as_dict(self) -> dict[str, object]:
        kinds = [fate.how for fate in self.fates.values()]
        return {
            "to": self.to,
            "out": str(self.out),
            "bytes": self.nbytes,
            "weights": {kind: kinds.count(kind) for kind in dict.fromkeys(kinds)},
            "not_exact": {
                name: {"how": fate.how, "format": fate.format, "why": fate.why, "added_error": self.added.get(name)}
                for name, fate in self.fates.items()
                if fate.how != "exact"
            },
            "read_by_others": self.reading.as_dict(),
        }


def open_model(model: str | Path, progress: Progress | None = None) -> Path:
    """Return a directory that every loader opens: MODEL itself, or if another tool quantized it its codes in a directory of the cache.

    Raises CheckpointError, DiskError, MemoryLimitError.
    """
    progress = progress or Silent()
    if is_compressed(model):
        return Path(model)
    # A .gguf file is read with its codes; `resolve_model` decodes it, for quantizing again.
    path = Path(model) if Gguf.owns(Path(model)) else resolve_model(str(model), progress)
    owner = find_ecosystem(path)
    if owner is None and path.is_dir() and (method := _method_of(path)) is not None:
        raise CheckpointError(f"{model}: is quantized by {method!r}, which is not read; `bitpress targets` lists what is.")
    if owner is None or owner in _OWN:
        return path
    source = open_source(path)
    if isinstance(source, GgufSource) and source.tokenizer_problem:
        progress.note(source.tokenizer_problem)
    return import_source(cast(ForeignSource, source), owner, Path(model).name, progress)


def _method_of(path: Path) -> str | None:
    """Return the name of the tool that a configuration says quantized a model, if it is not bitpress."""
    settings = quantization_of(read_config(path))
    method = settings.get("quant_method", "an unknown tool") if isinstance(settings, dict) else None
    return None if method == "bitpress" else method


def open_to_quantize(model: str | Path, progress: Progress, *, requantize: bool = False) -> Path:
    """Return the directory of a model that can be quantized; one that is quantized already only with `requantize`, decoded.

    Named models are as bitpress ships them. Raises UsageError for a quantized one without `requantize`, CheckpointError, DiskError.
    """
    path = Path(model) if is_compressed(model) else resolve_model(str(model), progress)
    owner = find_ecosystem(path)
    if owner is None or owner == "safetensors":
        given = read_given(path)
        if given is not None and given.is_quantized and os.path.exists(model):
            _check_again(str(model), given.text, requantize, progress)
        return path
    if requantize and owner != "bitpress":
        path = import_source(cast(ForeignSource, open_source(path)), owner, Path(model).name, progress)
    if is_compressed(path) and CompressedCheckpoint.open(path, verify=False).rounds_inputs:
        raise CheckpointError(
            f"{model}: the inputs of its products are rounded, which decoded weights would not do; quantize the original model."
        )
    bits = f", {CompressedCheckpoint.open(path, verify=False).bits_per_weight:.2f} bits a weight" if is_compressed(path) else ""
    _check_again(str(model), f"{owner}{bits}", requantize, progress)
    return decode_model(path, Path(model).name, progress)


def _check_again(model: str, what: str, requantize: bool, progress: Progress) -> None:
    """Raise UsageError for a model that is quantized already, unless it may be quantized again; then say so."""
    if not requantize:
        raise UsageError(
            f"{model}: is quantized already ({what}), and quantizing it again adds a second error to the first; "
            "use the original model, or --requantize."
        )
    progress.note(f"{model}: is quantized already ({what}); it is quantized again, which adds a second error to the first")


def export_model(
    model: str | Path, out: str | Path, to: str, *, requantize: bool = False, progress: Progress | None = None
) -> Exported:
    """Write a compressed model, of any ecosystem, as what other runtimes load; read it back, and compare every parameter.

    to           a row of `bitpress.exchange.table.EXPORTERS`
    requantize   round weights again whose codes the target cannot hold; else they are an error

    Raises UsageError, CheckpointError, DiskError, NumericsError.
    """
    progress = progress or Silent()
    if "\0" in str(out):
        raise UsageError("the name of what is to be written holds a NUL character; choose another.")
    out = Path(os.path.abspath(out))
    if to not in EXPORTERS:
        raise unknown_name("target", to, EXPORTERS, command="bitpress targets")
    check_absent(out)
    directory = open_model(model, progress)
    if not is_compressed(directory):
        raise UsageError(f"{model}: is not compressed; `bitpress quantize {model} OUT` compresses it.")
    checkpoint = CompressedCheckpoint.open(directory)
    if checkpoint.operands:
        raise UsageError(
            f"{model}: the attention of {next(iter(checkpoint.operands))} rounds its operands, which no other tool's files say; "
            "quantize without queries, keys, values and probabilities."
        )
    exporter = EXPORTERS[to]
    network = build_skeleton(build_config(checkpoint.config), torch.float32)
    names = hub_names(network)
    fates = plan_fates(checkpoint, to, exporter, requantize, _tables(checkpoint, network), names)
    _check_room(checkpoint, fates, out)
    with published(out, file=exporter.is_file) as made:
        added = exporter.export(checkpoint, made, fates, names, progress)
        read_back(checkpoint, made, fates, added, names, progress)
        reading = read_by_others(directory, made, to, progress)
    return Exported(to, out, _size(out), fates, added, reading)


def _check_room(checkpoint: CompressedCheckpoint, fates: Fates, out: Path) -> None:
    """Raise DiskError where an export cannot fit: its plain tensors and decoded values in 16 bits, and nine tenths of the codes as they are here."""
    needed = sum(min(entry.nbytes, 2 * entry.numel) for entry in checkpoint.plain.values())
    for name, fate in fates.items():
        rows, columns = checkpoint.manifest.weights[name].spec["shape"]
        bits = {"exact": 0.9 * checkpoint.bits_of([name]), "decoded": 16.0, "rounded": 0.0}[fate.how]
        needed += int(rows * columns * bits / 8)
    at = next(place for place in out.parents if place.exists())
    free = shutil.disk_usage(at).free
    if free < needed:
        raise DiskError(f"{out}: at least {needed:,} bytes are needed and {free:,} are free; make room or choose another disk.")


def _tables(checkpoint: CompressedCheckpoint, network: Any) -> frozenset[str]:
    """Return the compressed matrices whose rows are looked up."""
    embeddings = find_outer(network).embeddings if checkpoint.outer else None
    return frozenset() if embeddings is None else frozenset({embeddings.name})


def export_for(directory: Path, runtime: str, progress: Progress) -> dict[str, object]:
    """Export a model for a runtime into its own directory, in the place of an older export; return what was written.

    An export of the same model that is there whole is kept. Raises UsageError, CheckpointError, DiskError, NumericsError.
    """
    found = RUNTIMES[runtime]
    out = Path(os.path.abspath(directory / found.name))
    if (told := noted_export(directory, found.name)) is not None:
        return {**told, "out": str(out)}
    remove_exports(directory, {found.name})
    check_absent(out)  # what is there now is not bitpress's
    note_export(directory, found.name)  # so that a run that is killed behind the last rename leaves nothing unknown
    done = export_model(directory, out, found.target, progress=progress).as_dict()
    note_export(directory, found.name, done)
    return done


def _size(out: Path) -> int:
    if out.is_file():
        return out.stat().st_size
    return sum(path.stat().st_size for path in out.rglob("*") if path.is_file())
