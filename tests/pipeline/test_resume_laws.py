"""A run that stops at any named event of its journal goes on to the same bytes, with every part that keeps state between blocks.

Here the run is stopped by an error at the event, inside one process; tests/pipeline/test_kill.py kills whole processes, for one recipe.
"""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from journal_events import kind_of, one_of_each, watch

from bitpress.checkpoints.compressed import JOB_DIRECTORY, MANIFEST_NAME
from bitpress.pipeline.quantize import Proof, quantize_directory

# What goes from block to block, or is measured before the first, by the part that asks for it.
RECIPES: dict[str, dict[str, Any]] = {
    "hidden states": {},
    "both streams": {"quantizer": {"name": "gptaq"}},
    "both streams for a target": {"transforms": [{"name": "qep"}]},
    "sensitivities": {"quantizer": {"name": "squeezellm"}, "weights": "kmeans3-g32"},
    "curvature by inputs and outputs": {"quantizer": {"name": "yaqa"}, "calibration": {"gram": "loss"}},
    "passes inside a block": {"calibration": {"sequential": True}},
    "original inputs": {"calibration": {"inputs": "original"}},
    "roles of attention": {"quantizer": {"name": "boa"}},
    "factors of channels": {"transforms": [{"name": "awq-scale"}]},
    "a basis": {"transforms": [{"name": "hadamard"}]},
    "a budget of bits": {"budget": {"bits": 4.5, "among": ["int3-g32-zero", "int4-g32-zero", "int6-g32-zero"]}},
    "learned blocks": {"tuning": [{"name": "parameters", "steps": 3, "batch": 3}]},
    "learned layers and blocks": {
        "transforms": [{"name": "awq-scale"}],
        "tuning": [{"name": "signround", "span": "layer", "steps": 3}, {"name": "block-ap", "targets": "same", "steps": 3}],
    },
    "learned windows": {
        "tuning": [
            {"name": "signround", "steps": 2},
            {"name": "block-ap", "span": "windows", "window": 2, "overlap": 1, "targets": "same", "steps": 3},
        ],
    },
    "a learned network": {
        "tuning": [{"name": "parameters", "span": "network", "loss": "kl-top", "steps": 2, "batch": 2, "rate": 2e-2}],
    },
    "embeddings and a head": {"embeddings": {"weights": "int8-row"}, "head": {"weights": "int6-g16"}},
}
# Windows that overlap need a third block.
MODELS: dict[str, dict[str, Any]] = {"learned windows": {"num_hidden_layers": 3}}
EVENTS = ("kept", "objects", "activations", "journal torn", "journal", "staged", "outer", "manifest", "cleared")


class Stopped(BaseException):
    """Raised at an event: nothing of the pipeline catches it."""


def content(out: Path) -> dict[str, bytes]:
    manifest = json.loads((out / MANIFEST_NAME).read_text())
    files = {name: (out / name).read_bytes() for name in [*manifest["files"], MANIFEST_NAME]}
    errors = [row["held_out"] for row in json.loads((out / "report.json").read_text())["layers"]]
    return files | {"errors on held-out tokens": json.dumps(errors).encode()}


@pytest.fixture(scope="module")
def whole_runs() -> dict[str, tuple[dict[str, bytes], list[str]]]:
    """The files and the events of an uninterrupted run of every recipe, made at its first use."""
    return {}


def cases() -> list[Any]:
    """Every recipe with one event, every event with one recipe or two; the other pairs are for a release."""
    return [
        pytest.param(recipe, event, marks=() if i % len(EVENTS) == k else pytest.mark.release)
        for i, recipe in enumerate(RECIPES)
        for k, event in enumerate(EVENTS)
    ]


@pytest.mark.parametrize(("recipe", "event"), cases())
def test_a_stopped_run_ends_in_the_same_bytes(
    recipe: str,
    event: str,
    whole_runs: dict[str, tuple[dict[str, bytes], list[str]]],
    tiny_model: Callable[..., Path],
    gptq_recipe: Callable[..., Any],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def run(out: Path, reach: Callable[[str], None]) -> None:
        with monkeypatch.context() as patch:
            watch(reach, patch.setattr)
            quantize_directory(
                tiny_model("llama", **MODELS.get(recipe, {})), out, gptq_recipe(**RECIPES[recipe]), proof=Proof(tokens=0)
            )

    if recipe not in whole_runs:
        events: list[str] = []
        run(tmp_path / "whole", events.append)
        whole_runs[recipe] = content(tmp_path / "whole"), events
    expected, events = whole_runs[recipe]
    at = next((e for e in one_of_each(events) if kind_of(e) == event), None)
    if at is None:
        assert event == "kept", "only what is measured before the first block may not be there"
        at = "journal 1"

    def stop(reached: str) -> None:
        if reached == at:
            raise Stopped

    with pytest.raises(Stopped):
        run(tmp_path / "out", stop)
    again: list[str] = []
    run(tmp_path / "out", again.append)
    assert content(tmp_path / "out") == expected
    assert not (tmp_path / "out" / JOB_DIRECTORY).exists()
    assert at == "cleared" or len(again) <= len(events), "what was durable is not done again"
