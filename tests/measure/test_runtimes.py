"""What is published opens as its user will open it, and is measured as the runtime gives it."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest
from safetensors.torch import load_file, save_file

import bitpress
from bitpress.checkpoints.compressed import MANIFEST_NAME, is_compressed
from bitpress.errors import CheckpointError, KernelUnavailable, NumericsError, UsageError
from bitpress.measure import runtimes as opened
from bitpress.measure.evaluation import RUNTIME_TOKENS
from bitpress.pipeline.quantize import Proof, quantize_directory
from bitpress.recipes import make_recipe
from bitpress.runtime.hf import layers as layers
from bitpress.runtime.native import assemble as assemble

RECIPE = {"weights": "int4-row", "quantizer": {"name": "rtn"}}


@pytest.fixture
def proof(text_file: Path) -> Proof:
    return Proof(tokens=128, length=32, text=str(text_file))


def test_the_report_has_the_distance_of_the_runtimes_defaults(
    tiny_model: Callable[..., Path], tmp_path: Path, text_file: Path, proof: Proof
) -> None:
    source, out = tiny_model("llama", dtype="bfloat16"), tmp_path / "out"
    figures = quantize_directory(source, out, make_recipe(RECIPE), proof=proof)["figures"]
    runtime = figures["runtime"]
    assert runtime["name"] == "native"
    assert runtime["settings"] == {k: bitpress.load(out, runtime="native").facts[k] for k in ("activations", "cache", "head")}
    assert runtime["tokens"] == figures["tokens"] <= RUNTIME_TOKENS
    assert runtime["perplexity_original"] == pytest.approx(figures["perplexity_original"])
    assert runtime["kl_mean"] != figures["kl_mean"]
    given = {"text": str(text_file), "tokens": 128, "length": 32}
    through = {name: bitpress.evaluate(out, source, runtime=name, **given) for name in ("native", "transformers", "auto")}
    assert through["native"]["kl_mean"] == through["auto"]["kl_mean"] == runtime["kl_mean"]
    assert through["transformers"]["runtime"] == {
        "name": "transformers",
        "settings": {"weights": "decoded", "dtype": "bfloat16"},
    }
    weights = bitpress.evaluate(out, source, **given)
    assert weights["kl_mean"] == figures["kl_mean"]
    assert "runtime" not in weights
    assert len({through["native"]["kl_mean"], through["transformers"]["kl_mean"], weights["kl_mean"]}) == 3
    # Without its own roundings, the engine gives the decoded weights' distance.
    exact = bitpress.evaluate(out, source, runtime="native", activations="none", head="keep", **given)
    assert exact["kl_mean"] == pytest.approx(weights["kl_mean"], abs=2e-5)
    card = (out / "README.md").read_text()
    assert f"KL divergence {runtime['kl_mean']:.4f}" in card


def test_a_runtime_is_measured_only_where_it_can_be(tiny_model: Callable[..., Path], tmp_path: Path, proof: Proof) -> None:
    source, out = tiny_model("gpt2"), tmp_path / "out"
    runtime = quantize_directory(source, out, make_recipe(RECIPE), proof=proof)["figures"]["runtime"]
    assert (runtime["name"], runtime["settings"]["dtype"]) == ("transformers", "float32")
    with pytest.raises(KernelUnavailable, match="does not run"):
        bitpress.evaluate(out, source, runtime="native")
    with pytest.raises(UsageError, match="only for the runtime native"):
        bitpress.evaluate(out, source, runtime="transformers", cache="int8")
    with pytest.raises(UsageError, match="name the runtime"):
        bitpress.evaluate(out, source, cache="int8")
    with pytest.raises(UsageError, match="did not write it"):
        bitpress.evaluate(source, source, runtime="auto")


def test_an_engine_without_room_is_not_opened_and_the_report_says_so(
    tiny_model: Callable[..., Path], tmp_path: Path, proof: Proof, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = make_recipe(RECIPE)
    monkeypatch.setattr(opened, "_sixteen_bits", lambda pressed: 2 * psutil.virtual_memory().total)
    report = quantize_directory(tiny_model("llama"), tmp_path / "out", recipe, proof=proof)
    assert "are free" in report["figures"]["runtime"]["unmeasured"]
    assert "not measured" in (tmp_path / "out" / "README.md").read_text()


def _refuse(*args: Any, **kwargs: Any) -> Any:
    raise CheckpointError("the loader does not take it.")


def _break(*args: Any, **kwargs: Any) -> Any:
    raise AttributeError("no shape")


FAULTS = {
    "loader": (opened, "open_skeleton", _refuse, "the loader does not take it"),
    "packed layers": (layers.PackedLinear, "forward", _break, "no shape"),
    "engine": (assemble, "assemble", _refuse, "the loader does not take it"),
    "engine's forward": (opened.Engine, "forward", _break, "no shape"),
}


@pytest.mark.parametrize(
    ("fault", "tokens"),
    [
        ("loader", 0),
        ("packed layers", 0),
        pytest.param("engine", 0, marks=pytest.mark.release),
        ("engine", 128),
        ("engine's forward", 128),
    ],
)
def test_what_a_loader_refuses_is_not_published(
    fault: str,
    tokens: int,
    tiny_model: Callable[..., Path],
    text_file: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    owner, name, broken, says = FAULTS[fault]
    source, out, recipe = tiny_model("llama"), tmp_path / "out", make_recipe(RECIPE)
    proof = Proof(tokens=tokens, length=32, text=str(text_file))
    with monkeypatch.context() as patch:
        patch.setattr(owner, name, broken)
        with pytest.raises(CheckpointError, match="nothing is published") as caught:
            quantize_directory(source, out, recipe, proof=proof)
    assert says in str(caught.value)
    assert "\n" not in str(caught.value)
    assert not is_compressed(out)
    assert not (out / MANIFEST_NAME).exists()
    quantize_directory(source, out, recipe, proof=proof)  # what was done is still there
    assert is_compressed(out)


def test_one_block_of_a_kind_is_tried_on_packed_layers(pressed_original: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from bitpress.checkpoints.compressed import CompressedCheckpoint

    pressed, read = CompressedCheckpoint.open(pressed_original), []
    real = CompressedCheckpoint.read_layer

    def count(self: CompressedCheckpoint, name: str) -> Any:
        read.append(name)
        return real(self, name)

    monkeypatch.setattr(CompressedCheckpoint, "read_layer", count)
    opened.check_loads(pressed)
    assert len(read) == len(pressed.manifest.weights) / 2
    assert {name.split(".")[2] for name in read} == {"0"}


@pytest.mark.parametrize("tokens", [0, 128])
def test_a_model_beyond_the_range_of_the_runtimes_cache_is_not_published(
    tokens: int, tiny_model: Callable[..., Path], tmp_path: Path, text_file: Path
) -> None:
    source, out = tmp_path / "source", tmp_path / "out"
    shutil.copytree(tiny_model("llama"), source)
    weights = load_file(source / "model.safetensors")
    for name, value in weights.items():  # the same function
        weights[name] = value * 1e6 if "v_proj" in name else value / 1e6 if "o_proj" in name else value
    save_file(weights, source / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(NumericsError, match=r"native engine \(.*cache fp16\): values beyond the range.*Nothing is published"):
        quantize_directory(source, out, make_recipe(RECIPE), proof=Proof(tokens=tokens, length=32, text=str(text_file)))
    assert not (out / MANIFEST_NAME).exists()


@pytest.mark.parametrize(("key", "value"), [("num_hidden_layers", 10**30), ("vocab_size", 10**12), ("hidden_size", 10**9)])
def test_sizes_that_no_tensor_bears_out_are_refused_at_once(
    key: str, value: int, tiny_model: Callable[..., Path], tmp_path: Path
) -> None:
    source = tmp_path / "source"
    shutil.copytree(tiny_model("llama"), source)
    config = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(json.dumps({**config, key: value}))
    with pytest.raises(CheckpointError, match=f"{key} is 1e.*but no tensor of the checkpoint is that large"):
        quantize_directory(source, tmp_path / "out", make_recipe(RECIPE), proof=Proof(tokens=0))


def test_without_an_original_there_is_no_distance_through_a_runtime(tiny_model: Callable[..., Path]) -> None:
    with pytest.raises(UsageError, match="runtime needs `against`"):
        bitpress.evaluate(tiny_model("llama"), runtime="native")
