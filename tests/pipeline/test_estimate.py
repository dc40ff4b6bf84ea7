"""The time that a plan foretells: known work comes out as what it is, and every method can be asked."""

import fnmatch
import json
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil
import pytest
import torch
from progress_record import Said
from typer.testing import CliRunner

from bitpress.cli.app import app
from bitpress.errors import BitpressError, MemoryLimitError, UsageError
from bitpress.formats import parse_format
from bitpress.pipeline.estimate import estimate_seconds
from bitpress.pipeline.host_memory import BASE_BYTES
from bitpress.pipeline.learning_plan import COPIES
from bitpress.pipeline.plan import Plan, check_memory, unmeant_bits
from bitpress.pipeline.quantize import Proof, plan_run, quantize_directory
from bitpress.quantizers.rtn import RTN
from bitpress.quantizers.table import QUANTIZERS
from bitpress.recipes import Recipe, build_method, make_recipe
from bitpress.tuning.table import TUNINGS

# Formats of groups that fit the tiny models, of which every quantizer serves some.
FORMATS = (
    "int4-g16-zero",
    "kmeans4-row",
    "gauss4-g16",
    "binary-g16",
    "dual2-g16",
    "trits2-g16",
    "ternary-g16",
    "mxfp4",
    "e8p-row",
)
FORMATS += ("pvq8k8-g16", "aq2x8x8-row", "int2-g16-zero", "binary-tensor", "kmeans4-tensor")


def estimate(model: Path, recipe: Recipe) -> float:
    planned, streamed, _ = plan_run(model, build_method(recipe))
    return estimate_seconds(streamed, build_method(recipe), planned.weights)


def natural(model: Path, quantizer: str) -> Recipe:
    """Return the first recipe with a format that the quantizer serves and is meant for."""
    served = QUANTIZERS[quantizer].serves
    for name in FORMATS:
        if not any(fnmatch.fnmatchcase(parse_format(name).name, pattern.lstrip("!")) for pattern in served):
            continue  # what a plan would say too, but later
        for transforms in ([], ["hadamard"]):
            try:
                recipe = make_recipe({"weights": name, "quantizer": quantizer, "transforms": transforms})
                planned, _, _ = plan_run(model, build_method(recipe))
            except BitpressError:
                continue
            if not unmeant_bits(planned):
                return recipe
    raise AssertionError(f"{quantizer} serves none of {FORMATS}")


@pytest.mark.parametrize("tuning", sorted(TUNINGS))
def test_every_way_to_learn_can_be_timed_and_has_its_memory(tuning: str, tiny_model: Callable[..., Path]) -> None:
    """More steps take more time, on a shared machine too; a batch's activations are beside what it always needs."""
    model = tiny_model("llama", num_hidden_layers=1)
    keys = {"weights": "int4-g16-zero", "quantizer": "rtn", "calibration": {"samples": 64, "length": 64}}

    def planned(**settings: Any) -> tuple[Plan, float]:
        recipe = make_recipe({**keys, "tuning": [{"name": tuning, **settings}]})
        return plan_run(model, build_method(recipe))[0], estimate(model, recipe)

    (few, short), (many, long) = planned(steps=500, batch=8), planned(steps=5000, batch=16)
    assert short < long < 36000
    assert few.learning is not None
    assert many.learning is not None
    assert few.learning.fixed == many.learning.fixed
    assert many.learning.peak - few.learning.peak == 8 * few.learning.window
    assert (few.learning.window > 0) == (TUNINGS[tuning]().span != "layer")  # a layer learns from statistics


def test_memory_and_time_of_learning_are_of_the_right_order(
    tiny_model: Callable[..., Path], gptq_recipe: Callable[..., Any], tmp_path: Path
) -> None:
    """Weights of a block by hand; the time of a run's own steps within a factor of ten, for what is measured is small and the machine shared."""
    model = tiny_model("llama", num_hidden_layers=1, hidden_size=64, intermediate_size=256)
    recipe = gptq_recipe(quantizer={"name": "rtn"}, weights="int4-row", tuning=[{"name": "block-ap", "steps": 30, "batch": 4}])
    planned, streamed, _ = plan_run(model, build_method(recipe))
    weights = 4 * 64 * 64 + 3 * 64 * 256
    rows = 4 * 64 + 2 * 256 + 64  # a scale each
    learning = planned.learning
    assert learning is not None
    assert learning.fixed - learning.others < 4 * (5 * (weights + rows) + COPIES * weights) < learning.fixed
    assert learning.window == 32 * ((4 * 128 + 3 * 320) * 8 + 6 * 4 * 64)
    plain = gptq_recipe(quantizer={"name": "rtn"}, weights="int4-row")
    method = build_method(recipe)
    foretold = estimate_seconds(streamed, method, planned.weights) - estimate(model, plain)
    report = quantize_directory(model, tmp_path / "out", recipe, proof=Proof(tokens=0))
    assert foretold / 10 < report["tuned"][0]["seconds"] < 30 * foretold


def test_more_parameters_than_text_is_said_with_the_numbers(
    tiny_model: Callable[..., Path], gptq_recipe: Callable[..., Any], tmp_path: Path
) -> None:
    model, said = tiny_model("llama"), Said()
    recipe = gptq_recipe(tuning=[{"name": "block-ap", "steps": 1}])
    with pytest.raises(
        UsageError, match=r"block-ap learns 10,\d+ parameters of a block, from 128 calibration tokens with 4,096 output values"
    ):
        quantize_directory(model, tmp_path / "out", recipe, strict=True)
    quantize_directory(model, tmp_path / "out", recipe, proof=Proof(tokens=0), progress=said)
    assert any("it can fit the text instead of the model" in line for line in said.lines)
    assert plan_run(model, build_method(gptq_recipe(tuning=[{"name": "norm-tweaking"}])))[0].learning.scarce == ()  # type: ignore[union-attr]


def test_memory_that_is_too_small_names_the_batch_that_fits(
    tiny_model: Callable[..., Path], gptq_recipe: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = gptq_recipe(tuning=[{"name": "block-ap", "batch": 4}])
    planned = plan_run(tiny_model("llama"), build_method(recipe))[0]
    learning = planned.learning
    assert learning is not None
    tight = replace(planned, learning=replace(learning, others=0), peak_memory=learning.peak)
    free = learning.fixed + 3 * learning.window - BASE_BYTES
    monkeypatch.setattr(psutil, "virtual_memory", lambda: SimpleNamespace(available=free))
    with pytest.raises(MemoryLimitError, match=r"step: 3 fit, in place of 4"):
        check_memory(tight)
    monkeypatch.setattr(psutil, "virtual_memory", lambda: SimpleNamespace(available=free - 3 * learning.window))
    with pytest.raises(MemoryLimitError, match="fewer or shorter samples"):
        check_memory(tight)


@pytest.mark.parametrize("quantizer", sorted(QUANTIZERS))
def test_every_quantizer_can_be_timed(quantizer: str, tiny_model: Callable[..., Path]) -> None:
    model = tiny_model("llama", num_hidden_layers=1)
    assert 0 < estimate(model, natural(model, quantizer)) < 3600


@pytest.mark.parametrize(
    "changes",
    [
        {"transforms": ["awq-scale"], "quantizer": "awq"},
        {"transforms": ["hadamard", "qep"], "quantizer": "ldlq", "calibration": {"sequential": True}},
        {"quantizer": "gptq", "corrections": [{"name": "lqer", "rank": 2}]},
        {"weights": "dfloat11", "quantizer": "rtn"},
        # They fit the weights and not half of one.
        {"quantizer": "gptq", "corrections": [{"name": "lqer", "rank": 24}], "skip": ["*", "!*.q_proj"]},
        {"weights": "int4-32x16", "quantizer": "rtn", "skip": ["*", "!*.q_proj"]},
    ],
)
def test_recipes_of_several_parts_can_be_timed(changes: dict[str, Any], tiny_model: Callable[..., Path]) -> None:
    recipe = make_recipe({"weights": "int4-g16-zero", **changes})
    assert 0 < estimate(tiny_model("llama", dtype="bfloat16"), recipe) < 3600


@pytest.mark.parametrize("architecture", ["llama", "mixtral"])
def test_work_of_known_length_is_foretold(
    architecture: str, tiny_model: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A method that takes 4 ms of the processor a weight and 0.2 ms a row, on every weight; what waits for others does not count."""
    plain = RTN.quantize

    def slow(self: RTN, w: torch.Tensor, *rest: Any) -> Any:
        end = time.thread_time() + 0.004 + 0.0002 * w.shape[0]
        while time.thread_time() < end:
            pass
        time.sleep(0.001 * w.shape[0])  # what a loaded machine does
        return plain(self, w, *rest)

    recipe = make_recipe({"weights": "int4-g16", "quantizer": {"name": "rtn", "clip": "mse"}})
    model = tiny_model(architecture)
    before = estimate(model, recipe)
    monkeypatch.setattr(RTN, "quantize", slow)
    planned, streamed, _ = plan_run(model, build_method(recipe))
    # Each weight is rounded twice: as the recipe says, and plainly to compare with.
    wanted = sum(2 * (0.004 + 0.0002 * w.parameter.shape[0]) * max(w.parameter.experts, 1) for w in planned.weights)
    found = estimate_seconds(streamed, build_method(recipe), planned.weights) - before
    assert 0.7 * wanted < found < 1.7 * wanted


def test_more_text_takes_longer(tiny_model: Callable[..., Path]) -> None:
    def seconds(samples: int) -> float:
        return estimate(
            tiny_model(), make_recipe({"weights": "int4-g16", "quantizer": "gptq", "calibration": {"samples": samples}})
        )

    assert seconds(100_000) > 100 * seconds(100)


def test_a_wide_input_is_sampled_with_fewer_columns(tiny_model: Callable[..., Path], monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[tuple[int, ...]] = []
    plain = RTN.quantize

    def note(self: RTN, w: torch.Tensor, *rest: Any) -> Any:
        seen.append(tuple(w.shape))
        return plain(self, w, *rest)

    monkeypatch.setattr(RTN, "quantize", note)
    model = tiny_model("llama", intermediate_size=4096 + 1024)
    estimate(model, make_recipe({"weights": "int4-g16", "quantizer": "rtn"}))
    assert max(cols for _, cols in seen) == 2048
    seen.clear()
    # Groups of 1280 columns divide 5120, but no sample: the whole width is taken.
    estimate(
        model,
        make_recipe(
            {"weights": "int4-g32", "quantizer": "rtn", "overrides": [{"match": "*.down_proj", "weights": "int4-g1280"}]}
        ),
    )
    assert max(cols for _, cols in seen) == 5120


def test_the_command_says_it(tiny_model: Callable[..., Path]) -> None:
    words = ["plan", str(tiny_model()), "--weights", "int4-g16", "--quantizer", "rtn", "--json"]
    told = json.loads(CliRunner().invoke(app, words).stdout)
    assert told["seconds_estimate"] > 0
    shown = CliRunner().invoke(app, words[:-1]).stdout
    assert "time, estimated" in shown
    assert parse_format("int4-g16").name in shown
