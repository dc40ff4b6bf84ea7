"""Which runtime opens a model, and which options each of them refuses."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import bitpress
from bitpress import native
from bitpress.errors import CheckpointError, KernelUnavailable, UsageError
from bitpress.pipeline.quantize import Proof, quantize_directory
from bitpress.recipes import make_recipe
from bitpress.runtime.native.text import TextEngine
from bitpress.runtime.opening import OpenedModel
from bitpress.settings import usable_cores, usable_threads

needs_native = pytest.mark.skipif(not native.available(), reason="no C++ compiler was there when bitpress was installed")


@pytest.fixture(scope="module")
def gpt2(tiny_model: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("selection") / "gpt2"
    recipe = make_recipe({"weights": "int4-g16", "quantizer": {"name": "rtn"}})
    quantize_directory(tiny_model("gpt2"), out, recipe, proof=Proof(tokens=0))
    return out


@needs_native
def test_auto_is_native_where_that_knows_the_model(pressed_original: Path, gpt2: Path) -> None:
    assert isinstance(bitpress.load(pressed_original, runtime="auto"), TextEngine)
    model = bitpress.load(gpt2, runtime="auto")
    assert isinstance(model, torch.nn.Module)
    selection = OpenedModel(gpt2).select()
    assert selection.runtime == "transformers"
    assert selection.reason is not None
    assert "'gpt2' is not among" in selection.reason
    assert "llama" in selection.reason


def test_transformers_is_what_load_gives_unasked(pressed_original: Path) -> None:
    assert isinstance(bitpress.load(pressed_original), torch.nn.Module)


@needs_native
def test_options_reach_the_engine(pressed_original: Path) -> None:
    made = bitpress.load(
        pressed_original, runtime="native", activations="none", cache="int8", head="keep", context=50, threads=1
    )
    assert made.engine.context == 50
    assert {made.facts[key] for key in ("activations", "cache", "head", "threads")} == {"none", "int8", "float32", 1}


@needs_native
@pytest.mark.parametrize(("given", "threads"), [("3", 3), ("2,1", 2), ("0", None), ("many", None), ("", None)])
def test_the_engine_heeds_omp_num_threads(
    given: str, threads: int | None, pressed_original: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", given)
    assert usable_threads() == (threads or usable_cores())
    assert bitpress.load(pressed_original, runtime="native").facts["threads"] == (threads or usable_cores())
    assert bitpress.load(pressed_original, runtime="native", threads=1).facts["threads"] == 1


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"runtime": "transformers", "cache": "int8"}, "cache: only for the runtime native"),
        ({"threads": 1}, "threads: only for the runtime native"),
        ({"runtime": "native", "weights": "packed"}, "weights: only for the runtime transformers"),
        ({"runtime": "auto", "dtype": "fp32", "head": "keep"}, "Leave one out"),
        ({"runtime": "natve"}, "Did you mean 'native'"),
    ],
)
def test_an_option_of_the_other_runtime_is_refused(options: dict[str, Any], says: str, pressed_original: Path) -> None:
    with pytest.raises(UsageError, match=says):
        bitpress.load(pressed_original, **options)


@needs_native
def test_what_the_native_engine_does_not_know(gpt2: Path) -> None:
    with pytest.raises(KernelUnavailable, match="'gpt2' is not among"):
        bitpress.load(gpt2, runtime="native")
    with pytest.raises(
        UsageError, match=r"cache: only for the runtime native, which does not run this model: architecture 'gpt2'"
    ):
        bitpress.load(gpt2, runtime="auto", cache="int8")


@needs_native
def test_a_setting_that_the_engine_does_not_follow_is_named(tiny_model: Callable[..., Path], tmp_path: Path) -> None:
    recipe = make_recipe({"weights": "int4-g16", "quantizer": {"name": "rtn"}})
    quantize_directory(tiny_model("gemma3", final_logit_softcapping=5.0), tmp_path / "out", recipe, proof=Proof(tokens=0))
    selection = OpenedModel(tmp_path / "out").select()
    assert (selection.runtime, selection.reason) == ("transformers", "final_logit_softcapping is 5.0, which is not followed")
    with pytest.raises(KernelUnavailable, match=r"final_logit_softcapping is 5\.0"):
        bitpress.load(tmp_path / "out", runtime="native")


def test_without_the_library(pressed_original: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BITPRESS_NATIVE", "off")
    selection = OpenedModel(pressed_original).select()
    assert selection.runtime == "transformers"
    assert "BITPRESS_NATIVE=off" in selection.reason
    with pytest.raises(KernelUnavailable, match="BITPRESS_NATIVE=off"):
        bitpress.load(pressed_original, runtime="native")


@needs_native
def test_a_directory_must_fit_its_configuration(pressed_dir: Path) -> None:
    (pressed_dir / "bitpress.json").unlink()
    for runtime in ("auto", "native", "transformers"):
        with pytest.raises(CheckpointError, match="there is no"):
            bitpress.load(pressed_dir, runtime=runtime)
