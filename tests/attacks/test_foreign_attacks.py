"""Hostile models of other tools: one made by hand for each rule and every ecosystem, through the command line; then mutations of files.

Every row of `DIRECTORY_FORMATS` takes part by itself: a tiny model is exported to it. The layers that the tools themselves wrote
(`tests/golden/exchange`) are mutated, so that their own ways of storing are reached too.
"""

import json
import random
import shutil
import struct
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tests.attacks.test_safetensors_attacks import MUTATIONS

from bitpress.checkpoints.safetensors_file import read_header, serialize
from bitpress.errors import BitpressError
from bitpress.exchange.quantized_directory import QuantizedDirectory
from bitpress.exchange.table import DIRECTORY_FORMATS, READ_ALONE, open_source
from bitpress.pipeline.exporting import export_model
from bitpress.pipeline.quantize import Proof, quantize_directory
from bitpress.recipes import make_recipe

GOLDEN = Path(__file__).parents[1] / "golden" / "exchange"
WEIGHTS = "model.safetensors"
GGUF = "model.gguf"
Change = Callable[[Path], None]


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No model that an earlier version took over answers for this one."""
    monkeypatch.setenv("BITPRESS_CACHE", str(tmp_path / "cache"))


@pytest.fixture(scope="module")
def models(tiny_model: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a model of every ecosystem, a directory or, of GGUF, a file."""
    folder = tmp_path_factory.mktemp("foreign")
    given = tiny_model("llama", hidden_size=64, intermediate_size=128, num_hidden_layers=1)
    quantize_directory(
        given, folder / "pressed", make_recipe({"weights": "int4-g32", "quantizer": "rtn"}), proof=Proof(tokens=0)
    )
    for row in DIRECTORY_FORMATS:
        export_model(folder / "pressed", folder / row, row, requantize=True)
    export_model(folder / "pressed", folder / GGUF, "gguf", requantize=True)
    return folder


def inspect(path: Path, monkeypatch: pytest.MonkeyPatch) -> int:
    from bitpress.cli.app import main

    monkeypatch.setattr(sys, "argv", ["bitpress", "inspect", str(path)])
    try:
        main()
    except SystemExit as stop:
        return int(stop.code or 0)
    return 0


# ---------------------------------------------------------------------------------------------------------------- by hand


def settings(change: Callable[[dict[str, Any]], object]) -> Change:
    """Change what a configuration says of quantization."""

    def attack(path: Path) -> None:
        config = json.loads((path / "config.json").read_text())
        for key in ("quantization_config", "quantization"):
            if key in config:
                changed = change(config[key])
                config[key] = config[key] if changed is None or isinstance(changed, dict) else changed
        (path / "config.json").write_text(json.dumps(config))

    return attack


def config_text(change: Callable[[str], str]) -> Change:
    return lambda path: (path / "config.json").write_text(change((path / "config.json").read_text())) and None


def tensors(change: Callable[[dict[str, torch.Tensor], str, str], object]) -> Change:
    """Change tensors; a change is told those of codes and of scales of one layer, which are the largest and its smaller neighbour."""

    def attack(path: Path) -> None:
        held = load_file(path / WEIGHTS)
        found = next(
            iter(
                QuantizedDirectory.open(
                    path, next(f for f in DIRECTORY_FORMATS.values() if f.claims(_config(path)))
                ).layers.items()
            )
        )
        layer, parts = found
        codes = max(parts, key=lambda leaf: held[f"{layer}.{leaf}"].nbytes)
        scales = [leaf for leaf in parts if leaf != codes and held[f"{layer}.{leaf}"].is_floating_point()]
        change(held, f"{layer}.{codes}", f"{layer}.{scales[0]}")
        save_file(held, path / WEIGHTS, {"format": "pt"})

    return attack


def _config(path: Path) -> dict[str, Any]:
    config: dict[str, Any] = json.loads((path / "config.json").read_text())
    return config


def cut(path: Path) -> None:
    raw = (path / WEIGHTS).read_bytes()
    (path / WEIGHTS).write_bytes(raw[: len(raw) // 2])


def link(path: Path) -> None:
    shutil.move(path / WEIGHTS, path.parent / "elsewhere.safetensors")
    (path / WEIGHTS).symlink_to(path.parent / "elsewhere.safetensors")


def pickle(path: Path) -> None:
    (path / WEIGHTS).rename(path / "qmodel.pt")


DIRECTORY: dict[str, Change] = {
    "settings: of another tool": settings(lambda s: s.update(quant_method="tool of tomorrow")),
    "settings: a number": settings(lambda s: 7),
    "configuration: nested": config_text(lambda text: '{"a": ' + "[" * 100_000 + "]" * 100_000 + ", " + text.lstrip()[1:]),
    "configuration: an absurd depth": config_text(lambda text: json.dumps({**json.loads(text), "num_hidden_layers": 10**9})),
    "weights: cut short": cut,
    "weights: a link out of the directory": link,
    "weights: a pickle": pickle,
    "weights: codes are missing": tensors(lambda t, codes, scales: t.pop(codes)),
    "weights: scales are missing": tensors(lambda t, codes, scales: t.pop(scales)),
    "weights: fewer codes": tensors(lambda t, codes, scales: t.update({codes: t[codes][:-1].contiguous()})),
    "weights: codes of another type": tensors(lambda t, codes, scales: t.update({codes: t[codes].to(torch.float16)})),
    "weights: scales of another shape": tensors(lambda t, codes, scales: t.update({scales: t[scales][None].contiguous()})),
    "weights: a scale is not a number": tensors(lambda t, codes, scales: t[scales].view(-1)[:1].fill_(float("nan"))),
    "weights: stored plainly too": tensors(
        lambda t, codes, scales: t.update({f"{codes.rpartition('.')[0]}.weight": torch.zeros(64, 64)})
    ),
}
# What is no attack where a tool stores layers so, and why: it is read.
READ = {("bitsandbytes", "weights: scales of another shape"): "its scales are one number after the other, in any shape"}


def check_refused(code: int, printed: str) -> None:
    lines = printed.splitlines()
    assert code == 3, printed
    assert "Traceback" not in printed
    assert [line for line in lines if line.startswith("error:")] == lines[-1:], printed


@pytest.mark.parametrize("name", DIRECTORY)
@pytest.mark.parametrize("row", DIRECTORY_FORMATS)
def test_a_hostile_directory_is_refused_in_one_line(
    row: str, name: str, models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / row
    shutil.copytree(models / row, path)
    DIRECTORY[name](path)
    code, printed = inspect(path, monkeypatch), capsys.readouterr().err
    if (row, name) in READ:
        assert code == 0, printed
    else:
        check_refused(code, printed)


def put(at: int, kind: str, value: int) -> Callable[[bytes], bytes]:
    return lambda raw: raw[:at] + struct.pack(kind, value) + raw[at + struct.calcsize(kind) :]


def of_tensor(name: bytes, at: int, kind: str, value: int) -> Callable[[bytes], bytes]:
    """Change what is said of a tensor behind its name: the number of its dimensions, its dimensions, type and offset."""
    return lambda raw: put(raw.index(name) + len(name) + at, kind, value)(raw)


DOWN = b"blk.0.ffn_down.weight"
FILE: dict[str, Callable[[bytes], bytes]] = {
    "no magic": lambda raw: b"GGML" + raw[4:],
    "a version of tomorrow": put(4, "<I", 99),
    "2**60 tensors": put(8, "<Q", 2**60),
    "2**60 values": put(16, "<Q", 2**60),
    "a key of 2**63 bytes": put(24, "<Q", 2**63),
    "a key twice": lambda raw: raw.replace(b"llama.rope.freq_base", b"llama.context_length", 1),
    "5 dimensions": of_tensor(DOWN, 0, "<I", 5),
    "a dimension of 0": of_tensor(DOWN, 4, "<Q", 0),
    "a dimension of 2**62": of_tensor(DOWN, 12, "<Q", 2**62),
    "a type of tomorrow": of_tensor(DOWN, 20, "<I", 200),
    "an offset behind the end": of_tensor(DOWN, 24, "<Q", 2**40),
    "an offset off the grid": of_tensor(DOWN, 24, "<Q", 1),
    "cut short": lambda raw: raw[: len(raw) - 100],
    "a name twice": lambda raw: raw.replace(b"blk.0.ffn_gate.weight", b"blk.0.ffn_down.weight", 1),
}


@pytest.mark.parametrize("name", FILE)
def test_a_hostile_gguf_file_is_refused_in_one_line(
    name: str, models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / GGUF
    good = (models / GGUF).read_bytes()
    path.write_bytes(FILE[name](good))
    assert path.read_bytes() != good
    check_refused(inspect(path, monkeypatch), capsys.readouterr().err)


@pytest.mark.parametrize("name", [*DIRECTORY_FORMATS, GGUF])
def test_what_the_attacks_change_is_accepted(
    name: str, models: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert inspect(models / name, monkeypatch) == 0, capsys.readouterr().err


# ---------------------------------------------------------------------------------------------------------------- mutations


def mutate_settings(rng: random.Random, value: Any) -> Any:
    """Return a JSON value with one part replaced."""
    if isinstance(value, dict) and value:
        key = rng.choice(sorted(value))
        return {**value, key: mutate_settings(rng, value[key])}
    if isinstance(value, list) and value:
        at = rng.randrange(len(value))
        return [*value[:at], mutate_settings(rng, value[at]), *value[at + 1 :]]
    return rng.choice([-1, 0, 1, 7, 1 << 40, 1.5, "other", "", "re:(a+)+b", [], {}, {"a": 1}, None, True, False])


def read_all(path: Path) -> None:
    source = open_source(path)
    for name in source.names:
        source.read(name)


def play(path: Path, file: Path, make: Callable[[random.Random], bytes], count: int) -> list[BitpressError]:
    """Read a model with mutations of one file, each in bounded time; return what was refused, by our own errors and in one line."""
    rng, good, refused = random.Random(26), file.read_bytes(), list[BitpressError]()
    for _ in range(count):
        file.write_bytes(make(rng))
        begin = time.process_time()
        try:
            read_all(path)
        except BitpressError as error:
            refused.append(error)
        assert time.process_time() - begin < 5
    file.write_bytes(good)
    assert {error.exit_code for error in refused} == {3}
    assert not [error for error in refused if "\n" in str(error)]
    return refused


def changed_bytes(rng: random.Random, good: bytes) -> bytes:
    data = bytearray(good)
    rng.choice(MUTATIONS)(rng, data)
    return bytes(data)


@pytest.mark.parametrize("seed", sorted(path.stem for path in GOLDEN.glob("*.safetensors")))
def test_mutations_of_layers_that_tools_wrote_are_refused_or_read(seed: str, tmp_path: Path) -> None:
    told = json.loads((GOLDEN / f"{seed}.json").read_text())
    told = {
        "model_type": "llama",
        **(told if told.keys() & {"quantization", "quantization_config"} else {"quantization_config": told}),
    }
    held = {name: t for name, t in load_file(GOLDEN / f"{seed}.safetensors").items() if not name.endswith(".decoded")}
    weights, config = (
        b"".join(bytes(part) for part in serialize(held, read_header(GOLDEN / f"{seed}.safetensors")[1])),
        json.dumps(told).encode(),
    )
    (tmp_path / WEIGHTS).write_bytes(weights)
    (tmp_path / "config.json").write_bytes(config)
    read_all(tmp_path)
    assert len(play(tmp_path, tmp_path / WEIGHTS, lambda rng: changed_bytes(rng, weights), 40)) > 10
    play(tmp_path, tmp_path / "config.json", lambda rng: json.dumps(mutate_settings(rng, told)).encode(), 40)


def test_mutations_of_a_gguf_file_are_refused_or_read(models: Path, tmp_path: Path) -> None:
    good = (models / GGUF).read_bytes()

    def change(rng: random.Random) -> bytes:
        data, head = bytearray(good), rng.randrange(good.index(DOWN) + 60)
        if rng.random() < 0.1:
            return good[: rng.randrange(len(good))]
        data[head : head + 8] = rng.choice([struct.pack("<Q", 2 ** rng.randrange(64)), rng.randbytes(8), b"\xff" * 8, bytes(8)])
        return bytes(data)

    (tmp_path / GGUF).write_bytes(good)
    read_all(tmp_path / GGUF)
    assert len(play(tmp_path / GGUF, tmp_path / GGUF, change, 80)) > 20


def test_every_ecosystem_has_a_seed() -> None:
    """Each row is attacked by hand; rows that are read alone have layers of the tool itself."""
    seeds = {path.stem for path in GOLDEN.glob("*.safetensors")}
    assert {row.replace("-", "_") for row in (*DIRECTORY_FORMATS, *READ_ALONE)} - {"gptq"} <= seeds
