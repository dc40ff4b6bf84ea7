"""Models that other tools quantized: each becomes a directory of our own in the cache, layer by layer with its codes.

From then on it is a model like any other that bitpress wrote: every loader, kernel and report takes it. Nothing is rounded again.
"""

import hashlib
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import torch

from bitpress.checkpoints.compressed import HEAD_NAME, OUTER_NAME, VERSION, CompressedCheckpoint, config_marks
from bitpress.checkpoints.durable import write_durably
from bitpress.checkpoints.given import ORIGIN, is_in_cache
from bitpress.checkpoints.hub_names import HubNames, hub_names
from bitpress.checkpoints.jsonfile import write_json_bytes
from bitpress.checkpoints.locks import hold
from bitpress.checkpoints.manifest import MANIFEST_NAME
from bitpress.checkpoints.named import is_made, make_once
from bitpress.checkpoints.names import NameMap, map_names
from bitpress.checkpoints.parameter import WeightParameter
from bitpress.checkpoints.records import FileRecord, Manifest, WeightRecord
from bitpress.checkpoints.safetensors_file import TensorEntry, serialize
from bitpress.checkpoints.source import encode_config
from bitpress.errors import CheckpointError, FormatError
from bitpress.exchange.bitpress_directory import BitpressDirectory
from bitpress.exchange.export_directory import write_directory
from bitpress.exchange.pieces import join_layers
from bitpress.exchange.source import Fate, ForeignSource
from bitpress.formats import CompressedLayer
from bitpress.models.linears import find_outer, list_weights
from bitpress.models.skeleton import build_config
from bitpress.models.streaming import StreamedModel
from bitpress.progress import Progress
from bitpress.settings import cache_directory

__all__ = ["decode_model", "import_source"]

# Raised when the same checkpoint would become another directory.
IMPORT = 2


def import_source(source: ForeignSource, kind: str, name: str, progress: Progress) -> Path:
    """Return the directory in the cache that holds a quantized checkpoint, making it first if needed.

    `kind` names its ecosystem, `name` is how a list of the cache shows it. Raises CheckpointError, DiskError.
    """
    side = {file: hashlib.sha256(content).hexdigest() for file, content in _side_files(source).items()}
    hashes = dict(sorted((dict(source.hashes()) | side).items()))
    digest = hashlib.sha256(write_json_bytes({"kind": kind, "files": hashes, "import": IMPORT})).hexdigest()
    path, origin = cache_directory() / "imported" / digest, {"import": IMPORT, "kind": kind, "sha256": digest}
    if is_made(path, origin) and hold(path):
        return path
    progress.note(f"{name}: {kind}, quantized already; taken over into the cache with its codes, once")
    made: Path = make_once(path, origin, lambda target: _write(source, kind, hashes, target, progress), name)
    assert is_in_cache(made)
    return made


def decode_model(directory: Path, name: str, progress: Progress) -> Path:
    """Return the directory in the cache that holds a compressed model with every weight decoded to float32, making it first if needed.

    Raises CheckpointError, also where the inputs of products are rounded, which decoded weights do not do; DiskError.
    """
    checkpoint = CompressedCheckpoint.open(directory)
    files = {file: record.sha256 for file, record in sorted(checkpoint.manifest.files.items())}
    digest = hashlib.sha256(write_json_bytes({"decoded": files, "import": IMPORT})).hexdigest()
    path, origin = cache_directory() / "imported" / digest, {"import": IMPORT, "kind": "decoded", "sha256": digest}
    if is_made(path, origin) and hold(path):
        return path

    def build(target: Path) -> None:
        fates = dict.fromkeys(checkpoint.manifest.weights, Fate("decoded"))
        write_directory(checkpoint, target, None, fates, {}, torch.float32, progress)

    return make_once(path, origin, build, name)


def _write(source: ForeignSource, kind: str, hashes: Mapping[str, str], target: Path, progress: Progress) -> None:
    model = StreamedModel(build_config(source.config), None, torch.float32, where=kind)
    entries = _entries_of(source, model)
    names = map_names(model.model, entries, lambda name: _plain(source, name), spare=lambda name: _is_zero_bias(source, name))
    weights, outer, hub = _known_weights(model), find_outer(model.model), hub_names(model.model)
    head = None if outer.head is None or outer.tied else outer.head.stem
    files: dict[str, FileRecord] = {}
    records: dict[str, WeightRecord] = {}
    shards: list[tuple[str, str | None, str]] = [("", f"{model.stack}.", OUTER_NAME)]
    count = len(model.blocks)
    shards += [(f"{model.block_name(i)}.", None, f"bitpress-{i + 1:05d}-of-{count:05d}.safetensors") for i in range(count)]
    progress.begin("taking over", len(shards))
    decoded: dict[str, str] = {}
    for prefix, exclude, file in shards:
        tensors = _stacks(source, hub, weights, records, decoded, prefix) if exclude is None else {}
        tensors |= _shard(source, names, weights, records, prefix, exclude)
        parts = {file: tensors}
        if exclude is not None:  # a head apart, as where bitpress compresses one
            of_head = {name for name in tensors if name.startswith(f"{head}.")} if f"{head}.weight" in records else set()
            parts = {file: {n: t for n, t in tensors.items() if n not in of_head}, HEAD_NAME: {n: tensors[n] for n in of_head}}
        for name, held in parts.items():
            if held or name == OUTER_NAME:
                num_bytes, sha256 = write_durably(target / name, serialize(held))
                files[name] = FileRecord(bytes=num_bytes, sha256=sha256)
        progress.advance(prefix.rstrip(".") or "outer")
    if decoded:
        name, why = next(iter(decoded.items()))
        progress.note(f"{len(decoded)} stacks of experts are decoded, the first is {name}: {why}")
    others = dict(_side_files(source))
    config = {key: value for key, value in source.config.items() if key not in ("auto_map", "transformers_weights")}
    others["config.json"] = encode_config({**config, **config_marks()})
    for file, content in others.items():
        (target / file).parent.mkdir(exist_ok=True)
        num_bytes, sha256 = write_durably(target / file, [content])
        files[file] = FileRecord(bytes=num_bytes, sha256=sha256)
    told = {"imported": kind, "files": dict(hashes)}
    manifest = Manifest(
        bitpress=VERSION,
        files=files,
        weights=records,
        aliases=dict(names.aliases),
        left_out=list(names.left_out),
        recipe={"imported": kind},
        job=told,
    )
    write_durably(target / MANIFEST_NAME, [write_json_bytes(manifest.model_dump(mode="json"))])


def _side_files(source: ForeignSource) -> dict[str, bytes]:
    """Return the files that go with a model, without one that has the name of the cache's own."""
    return {name: content for name, content in source.side_files().items() if name != ORIGIN}


def _entries_of(source: ForeignSource, model: StreamedModel) -> dict[str, TensorEntry]:
    """Return the entries of a source's parameters, in the shapes that the model holds them in."""
    from transformers.pytorch_utils import Conv1D

    turned = tuple(name for name, module in model.model.named_modules() if isinstance(module, Conv1D))
    entries = dict(source.parameters)
    for name, entry in entries.items():
        layer = name.removesuffix(".weight")
        if entry.start == entry.end and any(path == layer or path.endswith(f".{layer}") for path in turned):
            entries[name] = TensorEntry(name, entry.dtype, entry.shape[::-1], 0, 0)
    return entries


def _is_zero_bias(source: ForeignSource, name: str) -> bool:
    """Claim that a tensor is the bias of a compressed layer, all zeros: old AutoGPTQ and AutoAWQ gave one to layers that have none.

    Raises CheckpointError for one with other numbers, without which the layer would compute something else.
    """
    layer = name.removesuffix(".bias")
    weight = source.parameters.get(f"{layer}.weight")
    if layer == name or weight is None or weight.start != weight.end:
        return False
    if bool((_plain(source, name) != 0).any()):
        raise CheckpointError(f"{name}: is a bias that is not zero, of a layer that has none in this architecture.")
    return True


def _known_weights(model: StreamedModel) -> dict[str, WeightParameter]:
    """Return all weights of a model that can be held compressed, by the names of their parameters."""
    found = [weight for i in range(len(model.blocks)) for weight in list_weights(model, i, ())[0]]
    outer = find_outer(model.model)
    found += [weight for weight in (outer.embeddings, outer.head) if weight is not None]
    return {weight.name: weight for weight in found}


def _stacks(
    source: ForeignSource,
    hub: HubNames,
    weights: Mapping[str, WeightParameter],
    records: dict[str, WeightRecord],
    decoded: dict[str, str],
    prefix: str,
) -> dict[str, torch.Tensor]:
    """Read the stacks of experts below a name whose layers are compressed, and add their records; say in `decoded` why others are not."""
    tensors: dict[str, torch.Tensor] = {}
    for name, weight in weights.items():
        pieces = hub.get(name, ())
        if not (name.startswith(prefix) and weight.experts and pieces) or any(p.name not in source.names for p in pieces):
            continue
        layers: list[CompressedLayer] = []
        for piece in pieces:
            value = source.read(piece.name)
            if not isinstance(value, CompressedLayer):
                break
            layers.append(value)
        if not layers:
            continue
        try:
            if len(layers) < len(pieces) or weight.transposed:
                raise FormatError("not all of its experts are compressed.")
            stored = BitpressDirectory.write(join_layers(layers, weight.experts))
        except FormatError as error:
            decoded[name] = str(error).removesuffix(".")
            continue
        tensors |= {f"{weight.stem}.{leaf}": tensor for leaf, tensor in stored.tensors.items()}
        records[name] = WeightRecord(spec=stored.entry["spec"], transposed=False, experts=weight.experts, flat=weight.flat)
    return tensors


def _shard(
    source: ForeignSource,
    names: NameMap,
    weights: Mapping[str, WeightParameter],
    records: dict[str, WeightRecord],
    prefix: str,
    exclude: str | None,
) -> dict[str, torch.Tensor]:
    """Read the parameters below a name; return their tensors as they are stored here, and add records of the compressed ones."""
    tensors: dict[str, torch.Tensor] = {}
    chosen = [n for n in names.plain if n.startswith(prefix) and not (exclude is not None and n.startswith(exclude))]
    for target in chosen:
        value = source.read(names.plain[target])
        weight = weights.get(target)
        if isinstance(value, torch.Tensor):
            tensors[target] = value
        elif weight is None or weight.experts:  # of a kind that is held plainly here; float32 holds every decoded value
            tensors[target] = _plain(source, names.plain[target])
        else:
            stored = BitpressDirectory.write(value)
            tensors |= {f"{weight.stem}.{leaf}": tensor for leaf, tensor in stored.tensors.items()}
            records[target] = WeightRecord(
                spec=stored.entry["spec"], transposed=weight.transposed, experts=0, input=stored.entry.get("input")
            )
    left = replace(names, conversions=tuple(c for c in names.conversions if c.first_target not in records))
    joined = left.load_conversions(lambda name: _plain(source, name), prefix, exclude)
    return tensors | joined


def _plain(source: ForeignSource, name: str) -> torch.Tensor:
    """Read a parameter with its values decoded."""
    value = source.read(name)
    if not isinstance(value, CompressedLayer):
        return value
    if value.input is not None:
        raise CheckpointError(
            f"{name}: the input of its product is rounded ({value.input.name}), which decoded weights do not do."
        )
    try:
        return value.weight.dequantize()
    except FormatError as error:
        raise CheckpointError(f"{name}: {error}") from error
