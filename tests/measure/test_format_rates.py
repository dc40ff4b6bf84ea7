"""Formats measured on models: which weights are read, how many, and that they are the model's own."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from bitpress.checkpoints.safetensors_file import read_header, read_tensor, serialize
from bitpress.errors import CheckpointError, FormatError, NumericsError
from bitpress.formats import parse_format
from bitpress.measure import format_rates as rates
from bitpress.measure.format_rates import Matrix, list_matrices, measure_formats, sample
from bitpress.progress import Silent


class Notes(Silent):
    def __init__(self) -> None:
        self.notes: list[str] = []
        self.totals: list[int] = []
        self.done = 0

    def begin(self, what: str, total: int, done: int = 0) -> None:
        self.totals.append(total)

    def advance(self, unit: str, **figures: object) -> None:
        self.done += 1

    def note(self, text: str) -> None:
        self.notes.append(text)


@pytest.fixture
def small_draws(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rates, "DRAWN", (8, 64))


@pytest.fixture(scope="module")
def encoder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What a sentence encoder looks like: no causal language model, embeddings, matrices, vectors."""
    path = tmp_path_factory.mktemp("encoder")
    generator = torch.Generator().manual_seed(0)
    tensors = {
        "embeddings.word_embeddings.weight": torch.randn(100, 32, generator=generator),
        "encoder.layer.0.attention.self.query.weight": torch.randn(32, 32, generator=generator),
        "encoder.layer.0.attention.self.query.bias": torch.randn(32, generator=generator),
        "encoder.layer.0.output.dense.weight": torch.randn(32, 64, generator=generator),
        "embeddings.position_ids": torch.arange(8)[None],
    }
    (path / "model.safetensors").write_bytes(b"".join(bytes(part) for part in serialize(tensors)))
    (path / "config.json").write_text(json.dumps({"model_type": "clip_vision_model"}))
    return path


@pytest.mark.parametrize("architecture", ["llama", "gpt2", "mixtral", "phi3"])
def test_the_weights_are_those_of_the_checkpoint(architecture: str, tiny_model: Callable[..., Path], small_draws: None) -> None:
    path = tiny_model(architecture)
    found = {m.name: m for m in list_matrices(path, Silent())}
    stored = read_header(path / "model.safetensors")[0]
    for name, matrix in found.items():
        w = matrix.read()
        assert tuple(w.shape) == matrix.shape, name
        if f"{name}.weight" in stored:
            own = read_tensor(path / "model.safetensors", stored[f"{name}.weight"]).float()
            assert torch.equal(w, own.T if architecture == "gpt2" else own)
    kinds = {"llama": 7, "gpt2": 4, "mixtral": 4 + 2 * 4, "phi3": 4}
    assert len(found) == 2 * kinds[architecture]
    assert not any("embed" in name or "lm_head" in name for name in found)


def test_a_model_is_measured_and_progress_adds_up(tiny_model: Callable[..., Path], small_draws: None) -> None:
    path, notes = tiny_model("llama"), Notes()
    measured = measure_formats(path, ["int4-g32-zero", "nf4-row", "int4-g32-zero"], progress=notes)
    assert notes.done == sum(notes.totals) == 2 * 14 + 2 * 3, "14 matrices and 3 sources, a format given twice counts once"
    assert measured["weights"] == measured["weights_of_model"] == 2 * (4 * 32 * 32 + 3 * 32 * 64)
    fmt = parse_format("int4-g32-zero")
    lost = energy = 0.0
    for matrix in list_matrices(path, Silent()):
        w = matrix.read()
        params = fmt.fit(w)
        lost += float((fmt.decode(fmt.encode(w, params), params) - w).double().square().sum())
        energy += float(w.double().square().sum())
    rows = {(r["source"], r["format"], r["clip"]): r for r in measured["rows"]}
    assert rows["model", "int4-g32-zero", "minmax"]["error"] == pytest.approx(lost / energy, rel=1e-9)
    assert len(rows) == 4 * 2 * 2
    assert json.loads(json.dumps(measured, allow_nan=False)) == measured


def test_an_encoder_is_read_matrix_by_matrix_and_says_so(encoder: Path, small_draws: None) -> None:
    notes = Notes()
    measured = measure_formats(encoder, ["int4-g32"], progress=notes)
    assert measured["weights"] == 32 * 32 + 32 * 64
    assert len(notes.notes) == 1
    assert "not walked block by block" in notes.notes[0]


def test_a_sample_takes_every_kind_from_layers_far_apart() -> None:
    shapes = {"q": (64, 64), "down": (64, 256)}
    found = [Matrix(f"layers.{i}.{kind}", shape, lambda: torch.zeros(0)) for i in range(40) for kind, shape in shapes.items()]
    assert sample(found, 10**9) == found
    chosen = sample(found, 64 * 320 * 5)
    assert sum(m.rows * m.shape[1] for m in chosen) <= 64 * 320 * 5
    assert all(m.rows == m.shape[0] for m in chosen), "whole matrices where they fit"
    for kind in shapes:
        layers = [int(m.name.split(".")[1]) for m in chosen if m.name.endswith(kind)]
        assert len(layers) >= 4
        assert min(layers) < 13
        assert max(layers) > 26
    tight = sample(found, 64 * 320 // 2)
    assert {m.kind for m in tight} == {"layers.*.q", "layers.*.down"}, "no kind is left out when whole ones do not fit"
    assert sum(m.rows * m.shape[1] for m in tight) <= 64 * 320 // 2


def test_only_the_rows_of_the_sample_are_measured(
    tiny_model: Callable[..., Path], small_draws: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(rates, "SAMPLED", 9000)
    path = tiny_model("llama")
    measured = measure_formats(path, ["int4-g32"])
    row = next(r for r in measured["rows"] if r["source"] == "model")
    assert row["weights"] == measured["weights"] <= 9000 < measured["weights_of_model"]
    assert measure_formats(path, ["int4-g32"], whole=True)["weights"] == measured["weights_of_model"]


def test_what_cannot_be_measured_is_said(
    tiny_model: Callable[..., Path], encoder: Path, tmp_path: Path, small_draws: None
) -> None:
    with pytest.raises(FormatError, match=r"int4-g48 fits no matrix of .*in_features=32"):
        measure_formats(encoder, ["int4-g48"])
    sick = tmp_path / "sick"
    sick.mkdir()
    (sick / "config.json").write_text((encoder / "config.json").read_text())
    tensors = {"a.weight": torch.tensor([[1.0, float("inf")]])}
    (sick / "model.safetensors").write_bytes(b"".join(bytes(part) for part in serialize(tensors)))
    with pytest.raises(NumericsError, match=r"tensor 'a.weight' holds a NaN or an infinity"):
        measure_formats(sick, ["int4-row"])
    tensors = {"a.bias": torch.ones(2)}
    (sick / "model.safetensors").write_bytes(b"".join(bytes(part) for part in serialize(tensors)))
    with pytest.raises(CheckpointError, match="holds no matrix"):
        measure_formats(sick, ["int4-row"])


def test_a_shape_that_some_matrices_have_is_kept_in_the_table(tiny_model: Callable[..., Path], small_draws: None) -> None:
    measured = measure_formats(tiny_model("llama"), ["int4-g64"])
    row = next(r for r in measured["rows"] if r["source"] == "model")
    assert (row["matrices"], row["skipped"]) == (2, 12), "only down_proj has 64 inputs"
    assert "in_features=32" in measured["refused"]["int4-g64"]


def test_usual_formats_are_compared_on_the_same_weights(
    tiny_model: Callable[..., Path], small_draws: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    usual = [parse_format(name) for name in ("int4-g64", "int3-g128", "mxfp4", "ternary-row", "pvq4k4-g4")]
    monkeypatch.setattr(rates, "usual_formats", lambda: usual)
    measured = measure_formats(tiny_model("llama"))
    assert {row["format"] for row in measured["rows"]} == {"int4-g32", "int3-g32", "mxfp4-g32-e8m0", "ternary-row", "pvq4k4-g4"}
    assert {row["skipped"] for row in measured["rows"]} == {0}
