"""Figure F3: hostile published directories made by hand, one a rule of a loader, through every entry point that opens a model.

Sizes and hashes in the manifest are made to match again after every change, so that the rule itself has to catch it; only the attacks
on integrity leave them as they were. Beside every hostile directory lies `outside`, a whole and valid copy of the model: whoever
follows a path out of the root finds there what it wants, and an audit hook sees the open.

What does not refuse, and why (`passes` in the tables, asserted too):

    inspect     reads the manifest and headers only: neither hashes again, nor builds the model, nor reads content
    open        `CompressedCheckpoint.open` and reading every weight: does not build the model, so that a model that lacks a whole
                parameter, or has one too many, is seen by whoever builds it
    onto        `quantize MODEL HOSTILE`, another recipe: a directory that opens is refused as "holds another model" (exit 2)
    no method   a configuration of version 1 that does not name bitpress: transformers then asks nobody and loads what it recognises
    tokenizer   what is wrong with a tokenizer or its template is refused by `run`, the only one that uses it here
"""

import json
import os
import shutil
import struct
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch

from bitpress.checkpoints.compressed import JOB_DIRECTORY, MANIFEST_NAME, CompressedCheckpoint, config_marks
from bitpress.checkpoints.durable import hash_file
from bitpress.checkpoints.safetensors_file import read_header, read_tensor, serialize
from bitpress.errors import BitpressError, CheckpointError
from bitpress.runtime import prompt

INDEX = "model.safetensors.index.json"
OUTER = "bitpress.safetensors"
SHARD = "bitpress-00001-of-00002.safetensors"
FIRST_SHARD = "model-00002-of-00003.safetensors"  # of version 1, which has an index
Q = "model.layers.0.self_attn.q_proj"
NORM = "model.layers.0.input_layernorm.weight"
HEAD, EMBEDDING = "lm_head.weight", "model.embed_tokens.weight"
BIG = 2**31


# ---------------------------------------------------------------------------------------------------------------- making one


class Hostile:
    """A directory under construction: the files of a valid model, to be changed one way."""

    def __init__(self, root: Path, outside: Path) -> None:
        self.root, self.outside = root, outside

    def json(self, name: str, change: Callable[[Any], Any]) -> None:
        """Change a JSON file in place; a list that `change` returns becomes its content."""
        value = json.loads((self.root / name).read_text())
        changed = change(value)
        (self.root / name).write_text(json.dumps(changed if isinstance(changed, list) else value))

    def replace(self, name: str, make: Callable[[bytes], bytes]) -> None:
        path = self.root / name
        path.write_bytes(make(path.read_bytes()))

    def tensors(self, change: Callable[[dict[str, torch.Tensor]], Any], shard: str = SHARD) -> None:
        """Change the tensors of a shard."""
        path = self.root / shard
        held = {name: read_tensor(path, entry) for name, entry in read_header(path)[0].items()}
        change(held)
        path.write_bytes(b"".join(bytes(part) for part in serialize(held, {"format": "pt"})))

    def header(self, change: Callable[[dict[str, Any], bytearray], Any], shard: str = SHARD) -> None:
        """Change the header of a shard and its data as they are."""
        raw = (self.root / shard).read_bytes()
        length = struct.unpack("<Q", raw[:8])[0]
        header, data = json.loads(raw[8 : 8 + length]), bytearray(raw[8 + length :])
        change(header, data)
        text = json.dumps(header).encode()
        (self.root / shard).write_bytes(struct.pack("<Q", len(text)) + text + data)

    def seal(self) -> None:
        """Make every size and hash of the manifest true again."""
        path = self.root / MANIFEST_NAME
        if path.is_symlink() or not path.is_file():
            return
        try:
            manifest = json.loads(path.read_text())
            files = manifest["files"].items()
        except (OSError, ValueError, TypeError, KeyError, AttributeError, RecursionError):
            return
        for name, record in files:
            target = self.root / name.replace("\0", "")
            if target.is_file() and isinstance(record, dict) and record.get("sha256") != "kept":
                record |= {"bytes": target.stat().st_size, "sha256": hash_file(target)}
        path.write_text(json.dumps(manifest))


Change = Callable[[Hostile], Any]


def manifest(change: Callable[[Any], Any]) -> Change:
    return lambda h: h.json(MANIFEST_NAME, change)


def config(**values: Any) -> Change:
    return lambda h: h.json("config.json", lambda c: c.update(values))


def spec(change: Callable[[Any], Any]) -> Change:
    """Change the specification of one weight."""
    return manifest(lambda m: change(m["weights"][f"{Q}.weight"]["spec"]))


def tensors(change: Callable[[dict[str, torch.Tensor]], Any]) -> Change:
    return lambda h: h.tensors(change)


def put(name: str, make: Callable[[torch.Tensor], torch.Tensor]) -> Change:
    """Replace one tensor of the shard."""
    return tensors(lambda t: t.update({name: make(t[name])}))


def header(change: Callable[[dict[str, Any], bytearray], Any]) -> Change:
    return lambda h: h.header(change)


def lists(name: str, content: bytes = b"{}") -> Change:
    """Let the manifest list one more file, which is there."""

    def change(h: Hostile) -> None:
        path = h.root / name.replace("\0", "")
        if not path.exists() and path.parent.exists():
            path.write_bytes(content)
        h.json(MANIFEST_NAME, lambda m: m["files"].update({name: {"bytes": 0, "sha256": "0" * 64}}))

    return change


def swap(name: str, make: Callable[[Path, Hostile], Any]) -> Change:
    """Take a file away and put something else in its place."""

    def change(h: Hostile) -> None:
        (h.root / name).unlink()
        make(h.root / name, h)

    return change


def text(name: str, make: Callable[[bytes], bytes]) -> Change:
    return lambda h: h.replace(name, make)


def weight_map(change: Callable[[dict[str, str]], Any]) -> Change:
    return lambda h: h.json(INDEX, lambda index: change(index["weight_map"]))


def to_shard(target: Callable[[Hostile], str]) -> Change:
    """Let the manifest name one shard by another path."""

    def change(h: Hostile) -> None:
        h.json(MANIFEST_NAME, lambda m: m["files"].update({target(h): m["files"].pop(SHARD)}))

    return change


def unlist(name: str) -> Change:
    return manifest(lambda m: m["files"].pop(name))


def beside(name: str, content: str = "{}") -> Change:
    """Put a file there that the manifest does not list."""

    def change(h: Hostile) -> None:
        path = h.root / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(content.replace("OUTSIDE", str(h.outside)))

    return change


def all_of(*changes: Change) -> Change:
    return lambda h: [change(h) for change in changes]


def deep(levels: int) -> Any:
    value: Any = 0
    for _ in range(levels):
        value = [value]
    return value


def double_key(data: bytes) -> bytes:
    """Write the first key of an object twice, with an equal value: nothing else about it is wrong."""
    value = json.loads(data)
    key = next(iter(value))
    return b"{" + json.dumps(key).encode() + b": " + json.dumps(value[key]).encode() + b", " + data.strip()[1:]


def flip(name: str, at: float = 0.5) -> Change:
    """Change one bit of one byte."""

    def change(data: bytes) -> bytes:
        i = int(len(data) * at)
        return data[:i] + bytes([data[i] ^ 1]) + data[i + 1 :]

    return text(name, change)


def drop_parameter(h: Hostile) -> None:
    h.tensors(lambda t: [t.pop(name) for name in list(t) if name.startswith(f"{Q}.")])
    h.json(MANIFEST_NAME, lambda m: m["weights"].pop(f"{Q}.weight"))


def add_scale_map(bad: float) -> Change:
    """Put an output map of ones around a weight, one of them not finite."""

    def change(h: Hostile) -> None:
        scale = torch.ones(32)
        scale[7] = bad
        h.tensors(lambda t: t.update({f"{Q}.out.scale": scale}))
        h.json(MANIFEST_NAME, lambda m: m["weights"][f"{Q}.weight"]["spec"].update(output_map={"kind": "scale"}))

    return change


def maps_of_experts(h: Hostile) -> None:
    """Put the maps of two experts behind a weight that is no stack of experts."""
    h.tensors(lambda t: (t.pop(f"{Q}.in.order"), t.update({f"{Q}.out.scale": torch.ones(32)})))
    spec(lambda s: s.update(input_map=None, output_map={"kind": "parts", "parts": 2, "map": {"kind": "scale"}}))(h)


def untie(h: Hostile) -> None:
    """Let the configuration say that the head is a matrix of its own; the manifest says it is the embedding."""
    config(tie_word_embeddings=False)(h)


def store_tied(h: Hostile) -> None:
    h.tensors(lambda t: t.update({HEAD: t[EMBEDDING] * 2}), OUTER)
    h.json(MANIFEST_NAME, lambda m: m.update(aliases={}))


def claim_twice(h: Hostile) -> None:
    h.json(MANIFEST_NAME, lambda m: m["weights"].update({Q: m["weights"][f"{Q}.weight"]}))


def shrink_vocabulary(h: Hostile) -> None:
    """A smaller model whose parts all fit each other, but not the tokenizer beside it."""
    h.tensors(lambda t: t.update({EMBEDDING: t[EMBEDDING][:64].clone()}), OUTER)
    config(vocab_size=64)(h)


def template(source: str) -> Change:
    return text("chat_template.jinja", lambda data: source.encode())


def scaled(name: str, index: int, value: float) -> Change:
    def make(tensor: torch.Tensor) -> torch.Tensor:
        changed = tensor.clone()
        changed.view(-1)[index] = value
        return changed

    return put(name, make)


def of_32_bits(h: Hostile) -> None:
    """Store an order as files did before orders had 16 bits."""
    spec(lambda s: s["input_map"].pop("bits"))(h)
    put(f"{Q}.in.order", lambda t: t.to(torch.int32))(h)


def no_manifest(h: Hostile) -> None:
    (h.root / MANIFEST_NAME).unlink()
    (h.root / JOB_DIRECTORY).mkdir()
    (h.root / JOB_DIRECTORY / "job.json").write_text('{"recipe": {}}')


# ------------------------------------------------------------------------------------------------------------- the directories

ENTRIES = ("open", "load", "from_pretrained", "eval", "run", "inspect", "verify", "onto", "model")
ONTO = frozenset({"onto"})
FITS = frozenset({"open", "inspect", "onto"})  # seen by whoever builds the model
CONTENT = frozenset({"inspect", "onto"})  # seen by whoever reads the weights; `onto` answers with exit 2
HASHES = frozenset({"inspect"})
TOKENIZER = frozenset(ENTRIES) - {"run", "model"}


@dataclass(frozen=True)
class Attack:
    """`says` is part of the one line on standard error; `passes` are the entry points that do not refuse, by design."""

    change: Change
    says: str
    passes: frozenset[str] = frozenset()
    sealed: bool = True
    codes: dict[str, int] = field(default_factory=dict)  # entry -> exit code, where it is not 3
    theirs: bool = False  # transformers itself refuses, before it asks bitpress
    first: bool = False  # played on a directory of version 1


DIRECTORY = {
    "manifest: ..": Attack(lists("../outside/generation_config.json"), "not a plain file name"),
    "manifest: absolute path": Attack(lambda h: lists(str(h.outside / "generation_config.json"))(h), "not a plain file name"),
    "manifest: NUL": Attack(lists("a\0.json"), "not a plain file name"),
    "manifest: separator": Attack(all_of(beside("sub/a.json"), lists("sub/a.json")), "not a plain file name"),
    "manifest: backslash": Attack(lists("sub\\a.json"), "not a plain file name"),
    "manifest: hidden name": Attack(lists(".a.json"), "not a plain file name"),
    "manifest: control character": Attack(lists("a\n.json"), "not a plain file name"),
    "manifest: .py": Attack(lists("modeling.py", b"raise SystemExit"), "not a kind of file"),
    "manifest: .pkl": Attack(lists("model.pkl"), "not a kind of file"),
    "manifest: .bin": Attack(lists("pytorch_model.bin"), "not a kind of file"),
    "manifest: .pt": Attack(lists("model.pt"), "not a kind of file"),
    "manifest: a file that is not there": Attack(
        manifest(lambda m: m["files"].update({"a.json": {"bytes": 0, "sha256": "0" * 64}})), "cannot be opened"
    ),
    "link: shard out of the root": Attack(swap(SHARD, lambda path, h: path.symlink_to(h.outside / SHARD)), "is a link out of"),
    "link: shard out of the root, relative": Attack(
        swap(SHARD, lambda path, h: path.symlink_to(f"../outside/{SHARD}")), "is a link out of"
    ),
    "link: configuration out of the root": Attack(
        swap("generation_config.json", lambda path, h: path.symlink_to(h.outside / path.name)), "is a link out of"
    ),
    "link: manifest out of the root": Attack(
        swap(MANIFEST_NAME, lambda path, h: path.symlink_to(h.outside / path.name)), "is a link out of"
    ),
    "link: index out of the root": Attack(
        swap(INDEX, lambda path, h: path.symlink_to(h.outside / INDEX)), "is a link out of", first=True
    ),
    "link: to a directory": Attack(
        all_of(lambda h: (h.root / "sub.json").symlink_to(h.outside), lists("sub.json")), "not a regular file"
    ),
    "link: through a linked directory": Attack(
        all_of(lambda h: (h.root / "sub").symlink_to(h.outside), to_shard(lambda h: f"sub/{SHARD}")), "not a plain file name"
    ),
    "link: allowed name of a forbidden file": Attack(
        all_of(beside("code.py"), lambda h: (h.root / "code.json").symlink_to("code.py"), lists("code.json")),
        "not a kind of file",
    ),
    "link: to itself": Attack(swap(SHARD, lambda path, h: path.symlink_to(SHARD)), "cannot be opened"),
    "pipe: shard": Attack(swap(SHARD, lambda path, h: os.mkfifo(path)), "not a regular file"),
    "pipe: manifest": Attack(swap(MANIFEST_NAME, lambda path, h: os.mkfifo(path)), "not a regular file"),
    "pipe: index": Attack(swap(INDEX, lambda path, h: os.mkfifo(path)), "not a regular file", first=True),
    "pipe: tokenizer": Attack(swap("tokenizer.json", lambda path, h: os.mkfifo(path)), "not a regular file"),
    "pipe: configuration": Attack(swap("config.json", lambda path, h: os.mkfifo(path)), "not a regular file", theirs=True),
    "directory: in place of a shard": Attack(swap(SHARD, lambda path, h: path.mkdir()), "not a regular file"),
    "index: ..": Attack(
        weight_map(lambda w: w.update({t: f"../outside-first/{f}" for t, f in w.items()})), "not a plain file name", first=True
    ),
    "manifest: shard by ..": Attack(to_shard(lambda h: f"../outside/{SHARD}"), "not a plain file name"),
    "manifest: shard by its absolute path": Attack(to_shard(lambda h: str(h.outside / SHARD)), "not a plain file name"),
    "index: all in a valid directory outside": Attack(
        all_of(
            weight_map(lambda w: w.update({t: f"../outside-first/{f}" for t, f in w.items()})),
            lambda h: [(h.root / name).unlink() for name in (MANIFEST_NAME,)],
        ),
        "there is no bitpress.json",
        codes={"onto": 2},
        first=True,
    ),
    "index: other suffix": Attack(
        weight_map(lambda w: w.update({NORM: "model.bin"})), "not the name of a safetensors file", first=True
    ),
    "index: file that the manifest does not list": Attack(
        all_of(
            lambda h: shutil.copy(h.root / FIRST_SHARD, h.root / "other.safetensors"),
            weight_map(lambda w: w.update({t: "other.safetensors" for t, f in w.items() if f == FIRST_SHARD})),
        ),
        "the index and the headers of the weight files disagree",
        first=True,
    ),
    "stale: a single file beside the shards": Attack(
        lambda h: shutil.copy(h.root / OUTER, h.root / "model.safetensors"), "which the manifest does not list"
    ),
    "stale: a single file, listed": Attack(
        all_of(lambda h: shutil.copy(h.root / OUTER, h.root / "model.safetensors"), lists("model.safetensors")),
        "which other readers would take for the weights",
    ),
    "stale: an index": Attack(beside(INDEX, '{"weight_map": {}}'), "which the manifest does not list"),
    "stale: an index, listed": Attack(lists(INDEX), "which other readers would take for the weights"),
    "stale: the index that transformers is sent to": Attack(
        beside(config_marks()["transformers_weights"], '{"weight_map": {}}'), "which the manifest does not list"
    ),
    "stale: a shard of another name, listed": Attack(
        all_of(lambda h: (h.root / SHARD).rename(h.root / FIRST_SHARD), unlist(SHARD), lists(FIRST_SHARD)),
        "which other readers would take for the weights",
    ),
    "unlisted: adapter of another model": Attack(
        beside("adapter_config.json", '{"base_model_name_or_path": "OUTSIDE"}'), "which the manifest does not list"
    ),
    "unlisted: more chat templates": Attack(beside("additional_chat_templates/a.jinja"), "which the manifest does not list"),
    "manifest: chat templates behind a link": Attack(
        all_of(
            lambda h: (h.root / "additional_chat_templates").symlink_to(h.outside), lists("additional_chat_templates/a.jinja")
        ),
        "is not a folder",
    ),
    "manifest: a folder in the folder of chat templates": Attack(
        lists("additional_chat_templates/../a.jinja"), "not a plain file name"
    ),
    "manifest: code as a side file": Attack(all_of(beside("a.sh"), lists("a.sh")), "not a kind of file that is opened"),
    "unlisted: code for generation": Attack(
        beside("custom_generate/generate.py", "open('OUTSIDE/ran', 'w')"), "which the manifest does not list"
    ),
    "unlisted: added tokens": Attack(beside("added_tokens.json"), "which the manifest does not list"),
}

JSON = {
    "manifest: 17 MiB": Attack(text(MANIFEST_NAME, lambda b: b + b" " * (17 * 2**20)), "at most 16777216", sealed=False),
    "manifest: nested 40 deep": Attack(manifest(lambda m: m["job"].update(a=deep(40))), "nested deeper than 32"),
    "manifest: key twice": Attack(text(MANIFEST_NAME, double_key), "given twice", sealed=False),
    "manifest: NaN": Attack(manifest(lambda m: m["job"].update(a=float("nan"))), "NaN is not JSON"),
    "manifest: infinity by exponent": Attack(
        text(MANIFEST_NAME, lambda b: b.replace(b'"experts": 0', b'"experts": 1e999', 1)), "too large", sealed=False
    ),
    "manifest: integer of 30 digits": Attack(manifest(lambda m: m["job"].update(a=10**29)), "an integer has 30 digits"),
    "manifest: not UTF-8": Attack(text(MANIFEST_NAME, lambda b: b + b"\xff"), "not UTF-8", sealed=False),
    "manifest: a list": Attack(manifest(lambda m: [m]), "version None"),
    "manifest: empty": Attack(text(MANIFEST_NAME, lambda b: b""), "not JSON", sealed=False),
    "manifest: unknown key": Attack(manifest(lambda m: m.update(more=1)), "more: Extra inputs"),
    "manifest: unknown key of a file": Attack(
        manifest(lambda m: m["files"][SHARD].update(more=1)), f"files.{SHARD}.more: Extra inputs"
    ),
    "manifest: unknown key of a weight": Attack(
        manifest(lambda m: m["weights"][f"{Q}.weight"].update(more=1)), "more: Extra inputs"
    ),
    "manifest: unknown key of a specification": Attack(spec(lambda s: s.update(more=1)), "no more and no less"),
    "manifest: unknown key of a term": Attack(
        spec(lambda s: s["terms"][0].update(more=1)), "the name of its format and its parts"
    ),
    "manifest: unknown key of a map": Attack(spec(lambda s: s["input_map"].update(more=1)), "has no settings"),
    "manifest: missing key": Attack(manifest(lambda m: m.pop("aliases")), "aliases: Field required"),
    "manifest: version 3": Attack(manifest(lambda m: m.update(bitpress=3)), "version 3"),
    "manifest: version 1 of these names": Attack(
        manifest(lambda m: m.update(bitpress=1)), "does not list model.safetensors.index"
    ),
    "manifest: version 2 of the first names": Attack(
        manifest(lambda m: m.update(bitpress=2)), "does not list bitpress.safetensors", first=True
    ),
    "manifest: version '1'": Attack(manifest(lambda m: m.update(bitpress="1")), "version '1'"),
    "manifest: version true": Attack(manifest(lambda m: m.update(bitpress=True)), "version True"),
    "manifest: no version": Attack(manifest(lambda m: m.pop("bitpress")), "version None"),
    "manifest: size as text": Attack(
        manifest(lambda m: m["files"].update({SHARD: {"bytes": "1", "sha256": "kept"}})), "valid integer"
    ),
    "configuration: key twice": Attack(text("config.json", double_key), "given twice"),
    "configuration: nested 140 deep": Attack(config(a=deep(140)), "nested deeper than 128"),
    "configuration: NaN": Attack(config(initializer_range=float("nan")), "NaN is not JSON", theirs=True),
    "configuration: a list": Attack(lambda h: h.json("config.json", lambda c: [c]), "holds no model_type", theirs=True),
    "index: key twice": Attack(text(INDEX, double_key), "given twice", first=True),
    "index: unknown key": Attack(
        lambda h: h.json(INDEX, lambda i: i.update(more=1)), "weight_map and, at most, metadata", first=True
    ),
    "index: not JSON": Attack(text(INDEX, lambda b: b[:-20]), "is not JSON", first=True),
    "generation settings: not JSON": Attack(
        text("generation_config.json", lambda b: b[:-3]),
        "is not JSON",
        passes=frozenset(ENTRIES) - {"load", "run", "model"},
    ),
    "generation settings: a list": Attack(
        lambda h: h.json("generation_config.json", lambda g: [g]),
        "must be an object",
        passes=frozenset(ENTRIES) - {"load", "run", "model", "from_pretrained"},
        theirs=True,
    ),
}

HEADER = {
    "header: shard cut short": Attack(text(SHARD, lambda b: b[:-64]), "it is cut short or has a tail"),
    "header: trailing bytes": Attack(text(SHARD, lambda b: b + b"tail"), "it is cut short or has a tail"),
    "header: empty shard": Attack(text(SHARD, lambda b: b""), "smallest safetensors file"),
    "header: length beyond the file": Attack(text(SHARD, lambda b: struct.pack("<Q", 2**40) + b[8:]), "the header claims"),
    "header: length too short": Attack(
        text(SHARD, lambda b: struct.pack("<Q", struct.unpack("<Q", b[:8])[0] - 9) + b[8:]), "is not JSON"
    ),
    "header: gap": Attack(header(lambda h, d: _shift(h, d, 8)), "the regions leave a gap"),
    "header: overlap": Attack(header(lambda h, d: _shift(h, d, -8)), "the regions overlap"),
    "header: unknown key": Attack(header(lambda h, d: h[NORM].update(more=1)), "exactly dtype, shape and data_offsets"),
    "header: shape and offsets disagree": Attack(header(lambda h, d: h[NORM].update(shape=[31])), "needs 124"),
    "header: unknown dtype": Attack(header(lambda h, d: h[NORM].update(dtype="F31")), "is unknown"),
}


def _shift(head: dict[str, Any], data: bytearray, by: int) -> None:
    """Move every region but the first, and let the data be as long as the last one needs."""
    entries = sorted((e for n, e in head.items() if n != "__metadata__"), key=lambda e: e["data_offsets"])
    for entry in entries[1:]:
        entry["data_offsets"] = [offset + by for offset in entry["data_offsets"]]
    del data[:]
    data += bytes(entries[-1]["data_offsets"][1])


ARITHMETIC = {
    **{
        f"specification: shape {shape!r}": Attack(
            spec(lambda s, shape=shape: s.update(shape=shape)), "is not two whole numbers"
        )
        for shape in ([0, 32], [32, 0], [-32, 32], [BIG, 32], [True, 32], [32.0, 32], ["32", 32], [32], [1, 32, 32], None)
    },
    "specification: more rows than are stored": Attack(spec(lambda s: s.update(shape=[64, 32])), "the specification needs"),
    "specification: 2**31 - 1 rows": Attack(spec(lambda s: s.update(shape=[BIG - 1, 32])), "the specification needs"),
    "specification: other bits": Attack(
        spec(lambda s: s["terms"][0].update(format="int3-g32-zero")), "the specification needs"
    ),
    "specification: other block": Attack(
        spec(lambda s: s["terms"][0].update(format="int4-g16-zero")), "the specification needs"
    ),
    "specification: block that does not divide": Attack(
        spec(lambda s: s["terms"][0].update(format="int4-g24-zero")), "is not a multiple of 24"
    ),
    "specification: unknown format": Attack(spec(lambda s: s["terms"][0].update(format="int9-g32")), "unknown number grid"),
    "specification: format with a separator": Attack(
        spec(lambda s: s["terms"][0].update(format="../int4-g32-zero")), "unknown number grid"
    ),
    "specification: block of 5000 digits": Attack(
        spec(lambda s: s["terms"][0].update(format=f"int4-g{'9' * 5000}")), "is no block"
    ),
    "specification: block in other digits": Attack(
        spec(lambda s: s["terms"][0].update(format="int4-g\N{ARABIC-INDIC DIGIT THREE}2-zero")), "is no block"
    ),
    "specification: no terms": Attack(spec(lambda s: s.update(terms=[])), "at least one term"),
    "specification: unknown term": Attack(spec(lambda s: s["terms"][0].update(kind="code")), "unknown term"),
    "specification: unknown map": Attack(spec(lambda s: s.update(output_map={"kind": "code"})), "unknown map"),
    "specification: chain in a chain": Attack(
        spec(lambda s: s.update(output_map={"kind": "chain", "maps": [{"kind": "chain", "maps": []}] * 2})), "another chain"
    ),
    "specification: chain of nine": Attack(
        spec(lambda s: s.update(output_map={"kind": "chain", "maps": [{"kind": "scale"}] * 9})), "2 to 8 maps"
    ),
    "specification: maps of 7 parts": Attack(
        spec(lambda s: s.update(output_map={"kind": "parts", "parts": 7, "map": {"kind": "scale"}})), "must divide the rows"
    ),
    "specification: maps of [2] parts": Attack(
        spec(lambda s: s.update(output_map={"kind": "parts", "parts": [2], "map": {"kind": "scale"}})), "must divide the rows"
    ),
    "specification: parts of parts": Attack(
        spec(lambda s: s.update(input_map=None, output_map={"kind": "parts", "parts": 2, "map": {"kind": "parts"}})),
        "unknown map",
    ),
    "weight: maps of experts without experts": Attack(maps_of_experts, "not those of 0 experts"),
    "weight: rows that experts do not divide": Attack(
        manifest(lambda m: m["weights"][f"{Q}.weight"].update(experts=5)), "do not divide among 5 experts"
    ),
    "weight: experts -1": Attack(manifest(lambda m: m["weights"][f"{Q}.weight"].update(experts=-1)), "greater than or equal"),
    "weight: experts true": Attack(manifest(lambda m: m["weights"][f"{Q}.weight"].update(experts=True)), "valid integer"),
    "weight: experts where there are none": Attack(
        manifest(lambda m: m["weights"][f"{Q}.weight"].update(experts=4)), "the configuration needs", passes=FITS
    ),
    "file: size -1": Attack(
        manifest(lambda m: m["files"].update({SHARD: {"bytes": -1, "sha256": "kept"}})), "greater than or equal"
    ),
    "configuration: ten million layers": Attack(config(num_hidden_layers=10**7), "num_hidden_layers is 10000000"),
    "configuration: 0 layers": Attack(config(num_hidden_layers=0), "num_hidden_layers is 0"),
    "configuration: a head of 2**31": Attack(config(head_dim=BIG), "head_dim is 2147483648"),
    "configuration: negative width": Attack(config(hidden_size=-32), "hidden_size is -32", theirs=True),
    "configuration: width of true": Attack(config(hidden_size=True), "hidden_size is True", theirs=True),
    "configuration: other vocabulary": Attack(config(vocab_size=385), "the configuration needs", passes=FITS),
    "configuration: other width inside": Attack(config(intermediate_size=96), "the configuration needs", passes=FITS),
    "configuration: one layer fewer": Attack(config(num_hidden_layers=1), "no use for", passes=FITS),
    "configuration: one layer more": Attack(config(num_hidden_layers=3), "lacks", passes=FITS),
}

KEYS = {
    "tensor missing": Attack(tensors(lambda t: t.pop(f"{Q}.term0.scale")), "is missing"),
    "tensor too many": Attack(tensors(lambda t: t.update({f"{Q}.term0.more": torch.ones(3)})), "no use for", passes=FITS),
    "tensor of a module that is not there": Attack(
        tensors(lambda t: t.update({"model.layers.7.weight": torch.ones(3)})), "no use for", passes=FITS
    ),
    "parameter missing": Attack(tensors(lambda t: t.pop(NORM)), "lacks", passes=FITS),
    "weight missing entirely": Attack(drop_parameter, "lacks", passes=FITS),
    "weight without a record": Attack(manifest(lambda m: m["weights"].pop(f"{Q}.weight")), "lacks", passes=FITS),
    "weight of another name": Attack(
        manifest(lambda m: m["weights"].update({"model.x.weight": m["weights"].pop(f"{Q}.weight")})), "is missing"
    ),
    "codes of another dtype": Attack(put(f"{Q}.term0.codes", lambda t: t.view(torch.int8)), "the specification needs"),
    "scale of another dtype": Attack(put(f"{Q}.term0.scale", lambda t: t.float()), "the specification needs"),
    "scale of another shape": Attack(put(f"{Q}.term0.scale", lambda t: t.reshape(-1)), "the specification needs"),
    "order of another dtype": Attack(put(f"{Q}.in.order", lambda t: t.float()), "the specification needs"),
    "parameter of another dtype": Attack(put(NORM, lambda t: t.to(torch.int32)), "the configuration needs", passes=FITS),
    "parameter of another shape": Attack(put(NORM, lambda t: t[:31].clone()), "the configuration needs", passes=FITS),
    "parameter transposed": Attack(
        manifest(lambda m: m["weights"]["model.layers.0.mlp.up_proj.weight"].update(transposed=True)),
        "the configuration needs",
        passes=FITS,
    ),
    "tensor claimed twice": Attack(claim_twice, "is claimed by"),
    "weight stored twice": Attack(
        tensors(lambda t: t.update({f"{Q}.weight": torch.zeros(32, 32)})), "both compressed and as it is"
    ),
    "tensor in two files": Attack(lambda h: h.tensors(lambda t: t.update({NORM: torch.ones(32)}), OUTER), "already"),
    "alias to nothing": Attack(manifest(lambda m: m["aliases"].update({HEAD: "model.nothing"})), "which is not stored"),
    "alias to itself": Attack(manifest(lambda m: m["aliases"].update({HEAD: HEAD})), "which is not stored"),
    "alias of what is stored": Attack(
        manifest(lambda m: m["aliases"].update({NORM: "model.norm.weight"})), "and stored as well"
    ),
    "alias that the configuration does not have": Attack(untie, "disagree whether", passes=FITS),
    "alias to another parameter": Attack(
        all_of(
            lambda h: h.tensors(lambda t: t.update({"model.other.weight": t[EMBEDDING]}), OUTER),
            manifest(lambda m: m["aliases"].update({HEAD: "model.other.weight"})),
        ),
        "no use for",
        passes=FITS,
    ),
    "alias left out, a copy stored": Attack(store_tied, "disagree whether", passes=FITS),
    "manifest lists no configuration": Attack(unlist("config.json"), "does not list config.json"),
    "manifest lists no index": Attack(unlist(INDEX), "does not list model.safetensors.index.json", first=True),
    "manifest lists no outer file": Attack(unlist(OUTER), "does not list bitpress.safetensors"),
    "manifest lists a shard too few": Attack(unlist(SHARD), "is missing"),
    "manifest lists a shard too few for its index": Attack(
        unlist(FIRST_SHARD), "the index and the headers of the weight files disagree", first=True
    ),
    "manifest lists no tokenizer": Attack(unlist("tokenizer.json"), "holds tokenizer.json, which the manifest does not list"),
    "manifest lists no template": Attack(unlist("chat_template.jinja"), "holds chat_template.jinja"),
    "no tokenizer": Attack(
        all_of(unlist("tokenizer.json"), lambda h: (h.root / "tokenizer.json").unlink()), "no tokenizer", passes=TOKENIZER
    ),
    "no manifest: a job's directory": Attack(no_manifest, "a job here is unfinished", codes={"onto": 2}),
    "no manifest": Attack(lambda h: (h.root / MANIFEST_NAME).unlink(), "bitpress did not publish it", codes={"onto": 2}),
}

CONTENTS = {
    "permutation: channel twice": Attack(scaled(f"{Q}.in.order", 0, 1), "exactly once", passes=CONTENT),
    "permutation: all zero": Attack(put(f"{Q}.in.order", torch.zeros_like), "exactly once", passes=CONTENT),
    "permutation: beyond the end": Attack(scaled(f"{Q}.in.order", 3, 32), "exactly once", passes=CONTENT),
    "permutation: 2**31 - 1": Attack(all_of(of_32_bits, scaled(f"{Q}.in.order", 3, BIG - 1)), "exactly once", passes=CONTENT),
    "permutation: negative": Attack(all_of(of_32_bits, scaled(f"{Q}.in.order", 3, -1)), "exactly once", passes=CONTENT),
    "permutation: of other bits than the file's": Attack(spec(lambda s: s["input_map"].pop("bits")), "the specification needs"),
    "scale: NaN": Attack(scaled(f"{Q}.term0.scale", 0, float("nan")), "NaN or an infinity", passes=CONTENT),
    "scale: infinite": Attack(scaled(f"{Q}.term0.scale", 31, float("inf")), "NaN or an infinity", passes=CONTENT),
    "scale map: NaN": Attack(add_scale_map(float("nan")), "NaN or an infinity", passes=CONTENT - {"inspect"}),
    "scale map: infinite": Attack(add_scale_map(float("-inf")), "NaN or an infinity", passes=CONTENT - {"inspect"}),
}

INTEGRITY = {
    **{f"byte: {name}": Attack(flip(name), "SHA-256", passes=HASHES, sealed=False) for name in (OUTER, SHARD)},
    "byte: generation_config.json": Attack(flip("generation_config.json"), "SHA-256", passes=HASHES, sealed=False),
    "byte: tokenizer.json": Attack(flip("tokenizer.json"), "SHA-256", passes=HASHES, sealed=False),
    "byte: tokenizer_config.json": Attack(flip("tokenizer_config.json"), "SHA-256", passes=HASHES, sealed=False),
    "byte: chat_template.jinja": Attack(flip("chat_template.jinja"), "SHA-256", passes=HASHES, sealed=False),
    "byte: config.json": Attack(
        text("config.json", lambda b: b.replace(b'"rms_norm_eps": 1e-06', b'"rms_norm_eps": 1e-05')),
        "SHA-256",
        passes=HASHES,
        sealed=False,
    ),
    "byte: header of a shard": Attack(
        text(SHARD, lambda b: b.replace(b"layers.0.self_attn.q_proj", b"layers.0.self_attn.p_proj")),
        "SHA-256",
        sealed=False,
    ),
    "byte: index": Attack(
        text(INDEX, lambda b: b.replace(b"layers.0.self_attn.q_proj", b"layers.0.self_attn.p_proj")),
        "SHA-256",
        sealed=False,
        first=True,
    ),
    "byte: hash in the manifest": Attack(
        manifest(lambda m: m["files"][SHARD].update(sha256="0" * 64)), "SHA-256", passes=HASHES, sealed=False
    ),
    "size: longer than the manifest says": Attack(text(SHARD, lambda b: b + b"\0"), "bytes where", sealed=False),
    "size: cut short": Attack(text(SHARD, lambda b: b[:-1]), "bytes where", sealed=False),
}

CONFIGURATION = {
    "auto_map": Attack(config(auto_map={"AutoModelForCausalLM": "modeling.Model"}), "names code of its own", theirs=True),
    "unknown model_type": Attack(
        config(model_type="lama"),
        "unknown model_type",
        passes=FITS,
        codes={entry: 2 for entry in ("load", "eval", "run", "verify")},  # transformers may be too old: not the file's fault
        theirs=True,
    ),
    "model_type that is no language model": Attack(config(model_type="clip"), "", passes=FITS, theirs=True),
    "no model_type": Attack(lambda h: h.json("config.json", lambda c: c.pop("model_type")), "no model_type", theirs=True),
    "another method": Attack(
        config(quantization_config={"quant_method": "gptq", "bits": 4}), "bitpress did not write it", theirs=True
    ),
    "no method": Attack(
        lambda h: h.json("config.json", lambda c: c.pop("quantization_config")),
        "bitpress did not write it",
        theirs=True,  # without that key transformers does not ask bitpress, and finds no weights
    ),
    "no method, first names": Attack(
        lambda h: h.json("config.json", lambda c: c.pop("quantization_config")),
        "bitpress did not write it",
        passes=frozenset({"from_pretrained"}),  # these it finds, and loads what it recognises
        first=True,
    ),
    "another version": Attack(
        config(quantization_config={"quant_method": "bitpress", "version": 1}), "bitpress did not write it"
    ),
    "unknown key of the method": Attack(
        config(quantization_config={"quant_method": "bitpress", "version": 2, "more": 1}), "bitpress did not write it"
    ),
    "other weights for transformers": Attack(
        all_of(
            lambda h: shutil.copy(h.root / OUTER, h.root / "other.safetensors"),
            config(transformers_weights="other.safetensors"),
        ),
        "names weight files of its own",
    ),
    "weights for transformers, first names": Attack(
        config(transformers_weights=FIRST_SHARD), "names weight files of its own", first=True
    ),
    "heads that do not divide": Attack(config(num_attention_heads=0), "config.json", passes=FITS, theirs=True),
    "width as text": Attack(config(intermediate_size="64"), "config.json", passes=FITS, theirs=True),
}

TOKENIZERS = {
    "tokenizer: auto_map": Attack(
        lambda h: h.json("tokenizer_config.json", lambda c: c.update(auto_map={"AutoTokenizer": ["code.T", None]})),
        "comes as code",
        passes=TOKENIZER,
    ),
    "tokenizer: not JSON": Attack(text("tokenizer.json", lambda b: b[:-30]), "cannot be loaded", passes=TOKENIZER),
    "tokenizer: of a larger vocabulary": Attack(shrink_vocabulary, "they do not belong together", passes=TOKENIZER - {"eval"}),
    "template: reaches for the interpreter": Attack(
        template("{{ ''.__class__.__mro__[1].__subclasses__() }}"), "the chat template failed", passes=TOKENIZER
    ),
    "template: opens a file": Attack(
        template("{{ cycler.__init__.__globals__.os.popen('id').read() }}"), "the chat template failed", passes=TOKENIZER
    ),
    "template: changes its input": Attack(template("{{ messages.append(1) }}"), "the chat template failed", passes=TOKENIZER),
    "template: long loop": Attack(
        template("{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}"),
        "seconds",
        passes=TOKENIZER,
    ),
    "template: large range": Attack(template("{% for a in range(10**9) %}{% endfor %}"), "Range too big", passes=TOKENIZER),
    "template: much memory": Attack(template("{{ 'a' * 10**11 }}"), "too much memory", passes=TOKENIZER),
    "template: much memory, later": Attack(
        template("{{ (messages[0]['content'] * 10**11) | length }}"), "too much memory", passes=TOKENIZER
    ),
    "template: long text": Attack(
        template("{% for a in range(90000) %}{{ 'aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa' }}{% endfor %}"),
        "characters",
        passes=TOKENIZER,
    ),
    "template: endless recursion": Attack(
        template("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}"), "the chat template failed", passes=TOKENIZER
    ),
    "template: no text": Attack(template("{# nothing #}"), "no tokens", passes=TOKENIZER, codes={"run": 2}),
    "template: syntax": Attack(template("{% if %}"), "the chat template failed", passes=TOKENIZER),
}

TABLES = (DIRECTORY, JSON, HEADER, ARITHMETIC, KEYS, CONTENTS, INTEGRITY, CONFIGURATION, TOKENIZERS)
ATTACKS = {name: attack for table in TABLES for name, attack in table.items()}
assert len(ATTACKS) == sum(map(len, TABLES)), "two attacks of one name"
_done: dict[str, set[str]] = {}


# ------------------------------------------------------------------------------------------------------------- the entry points


class Watch:
    """Paths that Python opens while it watches (an audit hook can never be removed, so there is one)."""

    def __init__(self) -> None:
        self.opened: list[str] | None = None
        sys.addaudithook(self._note)

    def _note(self, event: str, args: tuple[Any, ...]) -> None:
        if self.opened is not None and event == "open" and isinstance(args[0], (str, bytes, os.PathLike)):
            self.opened.append(os.fsdecode(args[0]))


@pytest.fixture(scope="module")
def watch() -> Watch:
    return Watch()


@dataclass
class Stage:
    """What one attack is played on."""

    root: Path
    original: Path
    scratch: Path


def command_line(stage: Stage, entry: str) -> list[str]:
    root, text_file = str(stage.root), str(stage.scratch / "text.txt")
    return {
        "eval": ["eval", root, "--against", str(stage.original), "--text", text_file, "--tokens", "32", "--length", "32"],
        "run": ["run", root, "--prompt", "x", "--max-tokens", "1"],
        "inspect": ["inspect", root],
        "verify": ["verify", root],
        "onto": ["quantize", str(stage.original), root, "--weights", "int8-row", "--quantizer", "rtn", "--proof-tokens", "0"],
        "model": ["quantize", root, str(stage.scratch / "out"), "--weights", "int8-row", "--quantizer", "rtn"],
    }[entry]


def through_python(stage: Stage, entry: str) -> Exception | None:
    """Open it, and give what was raised."""
    import transformers

    import bitpress

    try:
        if entry == "open":
            pressed = CompressedCheckpoint.open(stage.root)
            for name in pressed.manifest.weights:
                pressed.read_weight(name)
        elif entry == "load":
            bitpress.load(stage.root)
        else:
            transformers.AutoModelForCausalLM.from_pretrained(stage.root)
    except Exception as error:  # noqa: BLE001 (which class it is, is what the test asks)
        return error
    return None


def through_command(stage: Stage, entry: str, monkeypatch: pytest.MonkeyPatch) -> int:
    from bitpress.cli.app import main

    monkeypatch.setattr(sys, "argv", ["bitpress", *command_line(stage, entry)])
    try:
        main()
    except SystemExit as stop:
        return int(stop.code or 0)
    return 0


def check_refusal(stderr: str, says: str | None) -> None:
    lines = stderr.splitlines()
    errors = [line for line in lines if line.startswith("error:")]
    assert len(errors) == 1, stderr
    assert lines[-1] == errors[0], f"more than one line: {stderr}"
    assert "Traceback" not in stderr
    if says is not None:
        assert says in errors[0]


@pytest.fixture(scope="module")
def stage_files(
    pressed_original: Path,
    to_first_version: Callable[[Path], Path],
    text_file: Path,
    tmp_path_factory: pytest.TempPathFactory,
) -> Path:
    """The valid model and the text, once."""
    folder = tmp_path_factory.mktemp("hostile")
    shutil.copytree(pressed_original, folder / "outside")
    shutil.copytree(pressed_original, folder / "outside-first")
    to_first_version(folder / "outside-first")
    (folder / "text.txt").write_text(text_file.read_text()[:4000])
    return folder


def snapshot(folder: Path) -> dict[str, int]:
    return {str(p.relative_to(folder)): p.lstat().st_mtime_ns for p in sorted(folder.rglob("*"))}


@pytest.mark.parametrize("name", ATTACKS)
def test_a_hostile_directory_is_refused_everywhere(
    name: str,
    stage_files: Path,
    tiny_model: Callable[..., Path],
    watch: Watch,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    attack = ATTACKS[name]
    root, outside = stage_files / "hostile", stage_files / ("outside-first" if attack.first else "outside")
    shutil.rmtree(root, ignore_errors=True)
    shutil.copytree(outside, root)
    hostile = Hostile(root, outside)
    attack.change(hostile)
    if attack.sealed:
        hostile.seal()
    stage = Stage(root, tiny_model("llama", tie_word_embeddings=True), stage_files)
    before = snapshot(outside)
    monkeypatch.setattr(prompt, "TEMPLATE_SECONDS", 0.5)
    spoken = "run" if "verify" in attack.passes else "verify"
    refused: set[str] = set()
    for entry in ENTRIES:
        watch.opened = []
        if entry in ("open", "load", "from_pretrained"):
            error = through_python(stage, entry)
            opened, watch.opened = watch.opened, None
            if isinstance(error, BitpressError):
                assert error.exit_code == attack.codes.get(entry, 3), (entry, error)
            elif error is not None:
                assert entry == "from_pretrained", (entry, error)
                assert attack.theirs, (entry, error)
            is_refused = error is not None
        else:
            code = through_command(stage, entry, monkeypatch)
            opened, watch.opened = watch.opened, None
            printed = capsys.readouterr().err
            is_refused = code != 0
            if is_refused:
                # Of a directory whose headers are sound, no more is read: quantizing it again has to be asked for.
                unasked = entry == "model" and "is quantized already (bitpress" in printed
                expected = 2 if unasked or (entry == "onto" and entry in attack.passes) else attack.codes.get(entry, 3)
                assert code == expected, (entry, printed)
                check_refusal(printed, attack.says if entry == spoken else None)
        refused |= {entry} if is_refused else set()
        real = [os.path.realpath(path) for path in opened]
        assert not [path for path in real if Path(path).is_relative_to(outside)], f"{entry} read outside the root"
        assert not [path for path in opened if path.endswith((".py", ".pkl", ".pt", ".bin")) and path.startswith(str(root))]
    assert refused | (attack.passes - ONTO) == set(ENTRIES), f"not refused by {set(ENTRIES) - refused}"
    assert not refused & (attack.passes - ONTO), "the table says that these pass"
    assert snapshot(outside) == before
    assert not (stage_files / "out").exists()
    _done[name] = refused


@pytest.mark.parametrize("outside", ["outside", "outside-first"])
def test_the_directory_itself_is_accepted_everywhere(
    outside: str,
    stage_files: Path,
    tiny_model: Callable[..., Path],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """What the attacks change is valid before, also after its hashes have been made anew: no attack is refused by accident."""
    root = stage_files / f"valid-{outside}"
    shutil.copytree(stage_files / outside, root)
    Hostile(root, stage_files / outside).seal()
    stage = Stage(root, tiny_model("llama", tie_word_embeddings=True), stage_files)
    for entry in ("open", "load", "from_pretrained"):
        assert through_python(stage, entry) is None
    for entry in ("eval", "run", "inspect", "verify"):
        assert through_command(stage, entry, monkeypatch) == 0, capsys.readouterr().err
    assert through_command(stage, "onto", monkeypatch) == 2
    assert "holds another model" in capsys.readouterr().err
    assert through_command(stage, "model", monkeypatch) == 2
    assert "quantized already" in capsys.readouterr().err


def test_code_that_nobody_lists_is_never_run(stage_files: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Python files beside the model are ignored, and `verify=False` leaves every check but the hashes."""
    import bitpress

    root = stage_files / "coded"
    shutil.copytree(stage_files / "outside", root)
    for name in ("modeling.py", "configuration_llama.py", "tokenization.py"):
        (root / name).write_text(f"open({str(stage_files / 'ran')!r}, 'w')")
    assert bitpress.load(root, verify=False) is not None
    assert bitpress.load_tokenizer(root) is not None
    assert not (stage_files / "ran").exists()
    Hostile(root, root).json(MANIFEST_NAME, lambda m: m["weights"][f"{Q}.weight"]["spec"].update(shape=[0, 32]))
    with pytest.raises(CheckpointError, match="not two whole numbers"):
        bitpress.load(root, verify=False)


def test_every_attack_was_refused_as_often_as_the_table_says(capsys: pytest.CaptureFixture[str]) -> None:
    if set(_done) != set(ATTACKS):
        pytest.skip("only some of the attacks were run")
    refusals = sum(map(len, _done.values()))
    by_design = sum(len(attack.passes - ONTO) for attack in ATTACKS.values())
    assert refusals == len(ATTACKS) * len(ENTRIES) - by_design
    with capsys.disabled():
        print(
            f"\nF3: {len(_done)} hostile directories x {len(ENTRIES)} entry points: {refusals} refused, "
            f"{by_design} not concerned by design, 0 others, 0 reads outside the root"
        )
