"""Spans of several blocks: what is learned together, what is planned for it, what is committed, and what is refused."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from bitpress.checkpoints.compressed import CompressedCheckpoint
from bitpress.errors import MemoryLimitError, UsageError
from bitpress.pipeline.quantize import Proof, plan_run, quantize_directory
from bitpress.pipeline.tuning import SpanTuner
from bitpress.recipes import build_method, make_method
from bitpress.tuning.modcap import ModCap
from bitpress.tuning.span import Window, cut_windows
from bitpress.tuning.table import TUNINGS

FEW = {"steps": 4, "batch": 2, "checks": 2}


def run(model: Path, out: Path, recipe: Any) -> dict[str, Any]:
    quantize_directory(model, out, recipe, proof=Proof(tokens=0))
    return dict(json.loads((out / "report.json").read_text()))


# By what they count beside codes: norms, factors of a low-rank term, diagonals, terms of a quantizer, experts, several blocks.
COUNTED: dict[str, tuple[str, dict[str, Any]]] = {
    "norms": ("llama", {"tuning": [{"name": "parameters", **FEW}]}),
    "factors": ("llama", {"corrections": [{"name": "loftq", "rank": 3}], "tuning": [{"name": "low-rank", **FEW}]}),
    "diagonals": (
        "gpt2",
        {"transforms": [{"name": "hadamard", "outputs": True}], "tuning": [{"name": "quip-sharp", **FEW}]},
    ),
    "terms of a quantizer": (
        "llama",
        {
            "weights": "e8p-row",
            "quantizer": {"name": "quip_sharp", "residual": "e8p"},
            "tuning": [{"name": "quip-sharp", "norms": 0, **FEW}],
        },
    ),
    "experts": ("mixtral", {"tuning": [{"name": "signround", **FEW}]}),
    "windows": ("llama", {"tuning": [{"name": "cbq", **FEW}]}),
    "a network": ("llama", {"tuning": [{"name": "e2e-qp", "norms": 1e-3, **FEW}]}),
}


@pytest.mark.parametrize("case", COUNTED)
def test_the_plan_counts_what_is_learned(
    case: str, tiny_model: Callable[..., Path], gptq_recipe: Callable[..., Any], tmp_path: Path
) -> None:
    """To the last parameter, and the result goes the whole way: it is written, verified and no worse than its start."""
    architecture, keys = COUNTED[case]
    layers = {} if case in ("windows", "a network") else {"n_layer": 1} if architecture == "gpt2" else {"num_hidden_layers": 1}
    model, recipe = tiny_model(architecture, **layers), gptq_recipe(**keys)
    learning = plan_run(model, build_method(recipe))[0].learning
    assert learning is not None
    rows = run(model, tmp_path / "out", recipe)["tuned"]
    assert learning.learned == (max(row["learned"] for row in rows),)
    assert all(row["after"] <= row["before"] for row in rows)
    CompressedCheckpoint.open(tmp_path / "out", verify=True)


def test_windows_overlap_and_end_with_the_model() -> None:
    windows = TUNINGS["block-ap"](span="windows", window=3, overlap=1, ahead=2)
    assert cut_windows(windows, 6, [1.0] * 6) == [Window(0, 3, 2, 2), Window(2, 3, 1, 2), Window(4, 2, 0, 2)]
    committed = [i for w in cut_windows(windows, 7, [1.0] * 7) for i in list(w.blocks)[: w.final]]
    assert committed == list(range(7))


def test_modcap_joins_blocks_that_differ_in_what_they_hold() -> None:
    """The largest steps first, in windows of three at most; where nothing differs every block is alone."""
    sizes = [10.0, 10.0, 40.0, 50.0, 52.0]
    assert ModCap(pairs=1).joined(sizes) == [range(1), range(1, 3), range(3, 4), range(4, 5)]
    assert ModCap(pairs=4).joined(sizes) == [range(1), range(1, 4), range(4, 5)]
    assert ModCap().joined([7.0] * 3) == [range(1), range(1, 2), range(2, 3)]


def test_a_window_starts_from_what_its_blocks_give_without_learning(
    tiny_model: Callable[..., Path], gptq_recipe: Callable[..., Any], tmp_path: Path
) -> None:
    """The loss that a window begins with is that of the output which a plain run has behind its last block."""
    model = tiny_model("llama", num_hidden_layers=3)
    wide = {"name": "signround", "span": "windows", "window": 2, "overlap": 1, **FEW}
    report = run(model, tmp_path / "out", gptq_recipe(tuning=[wide]))
    rows = report["tuned"]
    assert [row["name"] for row in rows] == ["model.layers.0-1", "model.layers.1-2"]
    # The first window has the whole original behind it; a plain run that learns norms alone in the second block begins with that output.
    plain = run(
        model,
        tmp_path / "plain",
        gptq_recipe(
            tuning=[
                {"name": "norm-tweaking", "loss": "mse", "steps": 1, "batch": 2, "checks": 1, "rate": 1e-12, "norms": 1e-12}
            ]
        ),
    )
    before = {row["name"]: row["before"] for row in plain["tuned"]}
    assert rows[0]["before"] == pytest.approx(before["model.layers.1"], rel=1e-5)


def test_a_window_behind_folded_factors_learns_what_its_weights_stand_for(
    tiny_model: Callable[..., Path], gptq_recipe: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    begun, tune = list[tuple[SpanTuner, dict[str, torch.Tensor]]](), SpanTuner.tune

    def heard(tuner: SpanTuner, *given: Any) -> Any:
        begun.append((tuner, dict(tuner.originals)))
        return tune(tuner, *given)

    monkeypatch.setattr(SpanTuner, "tune", heard)
    folding = {"name": "omniquant", "rate": 0.05, **FEW, "steps": 8}
    wide = {"name": "signround", "span": "windows", "window": 2, **FEW}
    report = run(tiny_model("llama"), tmp_path / "out", gptq_recipe(weights="int2-g32-zero", tuning=[folding, wide]))
    *alone, (window, wanted) = begun
    assert report["tuned"][0]["kept"]
    assert any(not torch.equal(alone[0][0].originals[name], w) for name, w in alone[0][1].items()), "factors were folded"
    for tuner, _ in alone:
        for name, w in tuner.originals.items():
            torch.testing.assert_close(wanted[name], w, rtol=1e-5, atol=1e-7)
        assert all(window.stats[name] is one for name, one in tuner.stats.items())
    assert all(0 < layer["error"] < 1 for layer in report["layers"])


def test_blocks_ahead_judge_and_stay(tiny_model: Callable[..., Path], gptq_recipe: Callable[..., Any], tmp_path: Path) -> None:
    """A block is learned by its own output and the next one's; only its own scales move, and the last block has nothing ahead."""
    recipe = gptq_recipe(weights="int2-g32-zero")
    tuning = {"name": "parameters", "span": "windows", "ahead": 1, "loss": "mae", "rate": 2e-2, "norms": 0, **FEW, "steps": 8}
    run(tiny_model("llama"), tmp_path / "plain", recipe)
    rows = run(tiny_model("llama"), tmp_path / "out", gptq_recipe(weights="int2-g32-zero", tuning=[tuning]))["tuned"]
    assert [row["name"] for row in rows] == ["model.layers.0", "model.layers.1"]
    assert rows[0]["kept"]
    before, after = (load_file(tmp_path / out / "bitpress-00001-of-00002.safetensors") for out in ("plain", "out"))
    moved = {name.rpartition(".")[2] for name in before if not torch.equal(before[name], after[name])}
    assert moved == {"scale"}


def test_a_network_is_learned_by_what_it_says(
    tiny_model: Callable[..., Path], gptq_recipe: Callable[..., Any], tmp_path: Path
) -> None:
    """Codes stay, scales and norms move, and the blocks that moved have files of other names; embeddings and a head may be compressed."""
    model = tiny_model("llama")
    tuning = {"name": "quip-sharp", "span": "network", "loss": "kl-top", "rate": 5e-3, **FEW, "steps": 10}
    keys = {"weights": "int2-g32-zero", "embeddings": {"weights": "int8-row"}, "head": {"weights": "int6-g16"}}
    plain = run(model, tmp_path / "plain", gptq_recipe(**keys))
    learned = run(model, tmp_path / "learned", gptq_recipe(**keys, tuning=[tuning]))
    (row,) = learned["tuned"]
    assert row["kept"]
    assert row["name"] == "model.layers"
    assert "tuned" not in plain
    files = {path.name for path in (tmp_path / "learned").glob("*.safetensors")}
    assert {name for name in files if "learned" in name} == {f"bitpress-learned-0000{i}-of-00002.safetensors" for i in (1, 2)}
    assert not any(name.startswith("bitpress-0") for name in files)
    before = load_file(tmp_path / "plain" / "bitpress-00002-of-00002.safetensors")
    after = load_file(tmp_path / "learned" / "bitpress-learned-00002-of-00002.safetensors")
    assert before.keys() == after.keys()
    moved = {name.rpartition(".")[2] for name in before if not torch.equal(before[name], after[name])}
    assert moved == {"scale", "weight"}
    assert all("before quip-sharp learned the network" in layer["notes"][-1] for layer in learned["layers"][1:-1])


REFUSED: dict[str, tuple[Any, str]] = {
    "a window of nothing": ([{"name": "signround", "span": "windows"}], "window=2 or more"),
    "an overlap of all": ([{"name": "signround", "span": "windows", "window": 2, "overlap": 2}], "fewer of them overlap"),
    "a window of a block": ([{"name": "signround", "window": 2}], "settings of span=windows"),
    "a network by hidden states": ([{"name": "signround", "span": "network"}], "kl-top or cross-entropy"),
    "a block by logits": ([{"name": "signround", "loss": "kl-top"}], "does not measure span=block"),
    "a block after windows": (["cbq", "signround"], "put it first"),
    "windows that differ": (["cbq", {"name": "signround", "span": "windows", "window": 3}], "give both the same window"),
    "a modcap of layers": ([{"name": "modcap", "span": "block", "window": 1}], "modcap chooses its windows"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_makes_no_span_is_refused(case: str) -> None:
    tunings, why = REFUSED[case]
    with pytest.raises(UsageError, match=why):
        make_method({"weights": "int4-g64-zero", "quantizer": "gptq", "tuning": tunings})


def test_a_network_beyond_memory_is_refused_before_any_work(
    tiny_model: Callable[..., Path], gptq_recipe: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    from dataclasses import replace
    from types import SimpleNamespace

    import psutil

    from bitpress.pipeline.plan import BASE_BYTES, check_memory

    planned = plan_run(tiny_model("llama"), build_method(gptq_recipe(tuning=["e2e-qp"])))[0]
    learning = planned.learning
    assert learning is not None
    tight = replace(planned, learning=replace(learning, others=0), peak_memory=learning.peak)
    monkeypatch.setattr(psutil, "virtual_memory", lambda: SimpleNamespace(available=learning.fixed - BASE_BYTES - 1))
    with pytest.raises(MemoryLimitError, match=r"e2e-qp holds all blocks at once: [\d,]+ bytes"):
        check_memory(tight)
