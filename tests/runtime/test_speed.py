"""What `bitpress bench` counts: weights, bytes and positions; how fast, is for the machine to say."""

from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from bitpress import native
from bitpress.checkpoints.compressed import CompressedCheckpoint
from bitpress.errors import UsageError
from bitpress.runtime.native import speed as speed
from bitpress.runtime.native.options import EngineOptions
from bitpress.runtime.opening import load_native

ONE = EngineOptions(threads=1)
pytestmark = pytest.mark.skipif(not native.available(), reason="no C++ compiler was there when bitpress was installed")


@pytest.fixture(autouse=True)
def _small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(speed, "READ_BYTES", 1 << 22)


def test_weights_are_those_of_the_blocks(pressed_original: Path) -> None:
    engine = load_native(pressed_original).engine
    shapes = [record.spec["shape"] for record in CompressedCheckpoint.open(pressed_original).manifest.weights.values()]
    assert speed.block_weights(engine.layout) == sum(rows * columns for rows, columns in shapes)


def test_positions_end_at_windows() -> None:
    layout = SimpleNamespace(window=(0, 0, 4, 16), layers=4)
    assert [speed.cache_positions(layout, length) for length in (1, 8, 100)] == [1, 7, (100 + 100 + 4 + 16) / 4]


def test_decode(pressed_original: Path) -> None:
    options = {"activations": "none", "cache": "int8", "head": "keep"}
    facts = speed.bench_decode(pressed_original, EngineOptions.of({"threads": 1, **options}), context=40, tokens=5, repeats=3)
    engine = load_native(pressed_original, EngineOptions.of(options)).engine
    assert facts["bytes_per_token"] == engine.facts["bytes_per_token"] + 42 * engine.facts["cache_bytes_per_position"]
    rates = facts["tokens_per_second"]
    assert 0 < rates["p10"] <= rates["median"] <= rates["p90"]
    assert facts["gigabytes_per_second"] == pytest.approx(facts["bytes_per_token"] * rates["median"] / 1e9)
    assert facts["share"] == pytest.approx(facts["gigabytes_per_second"] / facts["machine_gigabytes_per_second"])
    assert (facts["threads"], facts["activations"], facts["cache"], facts["head"]) == (1, "none", "int8", "float32")
    assert facts["peak_memory_bytes"] > facts["file_bytes"] > 0


def test_prefill(pressed_original: Path) -> None:
    facts = speed.bench_prefill(pressed_original, ONE, context=10, tokens=30, repeats=2)
    rate = facts["tokens_per_second"]["median"]
    assert facts["teraoperations_per_second"] == pytest.approx(2 * facts["weights_per_token"] * rate / 1e12)
    assert facts["share"] == pytest.approx(facts["teraoperations_per_second"] / facts["machine_teraoperations_per_second"])


def test_the_clock_sees_what_it_should(pressed_original: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every repeat of decode is as many single tokens behind the same text, and of prefill the whole prompt behind the context."""
    from bitpress.runtime.native.engine import Engine

    seen: list[tuple[int, int]] = []
    read = Engine.read

    def observed(self: Engine, tokens: np.ndarray, *, logits: bool) -> None:
        seen.append((self.length, len(tokens)))
        read(self, tokens, logits=logits)

    monkeypatch.setattr(Engine, "read", observed)
    monkeypatch.setattr(speed, "CHUNK", 16)
    speed.bench_prefill(pressed_original, ONE, context=10, tokens=30, repeats=2)
    assert seen == [(0, 10), *[(10, 16), (26, 14)] * 3]
    seen.clear()
    speed.bench_decode(pressed_original, ONE, context=20, tokens=4, repeats=2)
    assert seen == [(0, 16), (16, 4)], "what is before the clock; decoding itself finds the text in the cache"


def test_what_cannot_be_measured(pressed_original: Path) -> None:
    with pytest.raises(UsageError, match="the model's own is 256"):
        speed.bench_decode(pressed_original, context=250)
    with pytest.raises(UsageError, match="repeats=0"):
        speed.bench_decode(pressed_original, repeats=0)
