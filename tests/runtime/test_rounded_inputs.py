"""Layers whose input has a format: stored in the manifest, computed as the reference says, refused where they would not be."""

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import nn
from transformers import AutoModelForCausalLM

import bitpress
from bitpress import native
from bitpress.checkpoints.compressed import MANIFEST_NAME, CompressedCheckpoint
from bitpress.checkpoints.durable import hash_file
from bitpress.checkpoints.parameter import WeightParameter
from bitpress.cli.reports import describe_directory, verify_directory
from bitpress.errors import CheckpointError, KernelUnavailable, UsageError
from bitpress.formats import ActivationFormat, CompressedLayer, Params, StoredParam, parse_format
from bitpress.formats.table import GRIDS, Row
from bitpress.kernels.native import Native
from bitpress.kernels.reference import Reference
from bitpress.runtime.hf.layers import PackedLinear, replace_
from bitpress.runtime.opening import OpenedModel

TOKENS = torch.arange(6, 38).reshape(2, 16)
DYNAMIC = {"format": "int8-row", "parameters": "dynamic"}
MADE_UP = {"format": "toy-row", "parameters": "dynamic"}
STATIC = {"format": "int8-tensor", "parameters": "static"}


@dataclass(frozen=True)
class Toy:
    """Steps of a third of the largest value, -1 to 1."""

    name: str = "toy"
    code_bits: int = 3
    span: int = 1
    num_codes: int = 7
    usual_scale: str = "fp32"
    params: tuple[StoredParam, ...] = (StoredParam("scale", "scale"),)

    def fit(self, blocks: torch.Tensor, importance: torch.Tensor | None = None) -> Params:
        return {"scale": blocks.abs().amax(-1, keepdim=True) / 3}

    def encode(self, values: torch.Tensor, params: Params) -> torch.Tensor:
        return ((values / params["scale"].clamp(min=1e-30)).round().clamp(-3, 3) + 3).to(torch.uint8)

    def decode(self, codes: torch.Tensor, params: Params) -> torch.Tensor:
        return (codes.float() - 3) * params["scale"]

    def check(self, codes: torch.Tensor) -> None:
        pass


def write_inputs(root: Path, spec: dict[str, str], only: str = "") -> list[str]:
    """Write the format of their input into the records of a published directory, and what it stores beside them."""
    path = root / MANIFEST_NAME
    manifest = json.loads(path.read_text())
    named = [name for name in manifest["weights"] if only in name]
    for name in named:
        manifest["weights"][name]["input"] = spec
    if spec["parameters"] == "static":
        file = root / "bitpress-inputs.safetensors"
        scale = torch.full((1, 1), 0.02, dtype=torch.float16)
        save_file({f"{name.removesuffix('.weight')}.input.scale": scale.clone() for name in named}, file)
        manifest["files"][file.name] = {"bytes": file.stat().st_size, "sha256": hash_file(file)}
    path.write_text(json.dumps(manifest))
    return named


@torch.no_grad()
def logits(model: Any) -> torch.Tensor:
    return model(input_ids=TOKENS, use_cache=False).logits


@pytest.mark.parametrize("spec", [DYNAMIC, MADE_UP, STATIC], ids=lambda s: s["format"])
def test_a_format_of_inputs_is_stored_loaded_computed_and_told(
    spec: dict[str, str], pressed_original: Path, pressed_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A number format that is made up here, and two of the table: no recipe makes them yet, so the manifest is written by hand.

    Files to touch for a new format of inputs: 2, the grid's own (`Toy`) and the table of grids (the line below). A grid of the table is
    one already, dynamic or static: 0 files.
    """
    monkeypatch.setitem(GRIDS, "toy", Row(Toy(), "made up"))
    named = write_inputs(pressed_dir, spec)

    layers = {name: CompressedCheckpoint.open(pressed_dir).read_layer(name) for name in named}
    assert all(layer.input is not None and layer.input.spec() == spec for layer in layers.values())
    assert verify_directory(pressed_dir)["weights"] == len(named)
    told = list(describe_directory(pressed_dir)["formats"])
    how = "simulated" if spec is MADE_UP else "integer products"
    assert told == [f"int4-g32-zero with input_map with inputs {spec['format']} {spec['parameters']} ({how})"]

    packed = bitpress.load(pressed_dir, weights="packed", dtype="fp32")
    assert sum(isinstance(m, PackedLinear) and isinstance(m.kernel(), Reference) for m in packed.modules()) == len(named)

    # The original's own modules on decoded weights, their inputs rounded before them. In float64 both round the same numbers.
    plain = bitpress.load(pressed_original, dtype="fp32").double()
    without = logits(plain)
    for name, layer in layers.items():

        def rounded(_: nn.Module, args: tuple[torch.Tensor], layer: CompressedLayer = layer) -> torch.Tensor:
            assert layer.input is not None
            assert layer.weight.input_map is not None
            order = layer.weight.input_map
            return order.apply_transposed(layer.input.round(order.apply(args[0])))

        plain.get_submodule(name.removesuffix(".weight")).register_forward_pre_hook(rounded)
    expected, got = logits(plain), logits(packed.double())
    top = float(expected.abs().max())
    assert float((got - expected).abs().max()) < 1e-9 * top
    assert float((without - expected).abs().max()) > 1e-3 * top


@pytest.mark.skipif(not native.available(), reason="no C++ compiler was there when bitpress was installed")
def test_the_engine_leaves_such_a_directory_to_transformers(pressed_dir: Path) -> None:
    assert OpenedModel(pressed_dir).select().runtime == "native"
    name = write_inputs(pressed_dir, {**DYNAMIC, "format": "e4m3-row"}, "1.mlp.down_proj")[0]
    choice = OpenedModel(pressed_dir).select()
    assert choice.runtime == "transformers"
    assert f"{name}: inputs in e4m3-row are no integers" in choice.reason
    with pytest.raises(KernelUnavailable, match=r"are no integers; use the runtime transformers"):
        bitpress.load(pressed_dir, runtime="native")


def test_decoded_weights_round_their_inputs_too(pressed_dir: Path) -> None:
    without = logits(bitpress.load(pressed_dir, dtype="fp32"))
    write_inputs(pressed_dir, {**DYNAMIC, "format": "int3-row"})
    packed = logits(bitpress.load(pressed_dir, weights="packed", dtype="fp32"))
    assert not torch.allclose(packed, without, atol=1e-2)
    models = [bitpress.load(pressed_dir, dtype="fp32"), AutoModelForCausalLM.from_pretrained(pressed_dir, dtype=torch.float32)]
    for model in models:
        assert torch.equal(logits(model), packed)
        with pytest.raises(UsageError, match="is not saved"):
            model.save_pretrained(pressed_dir / "saved")


@pytest.mark.parametrize(
    ("spec", "says"),
    [
        ({"format": "int8-row"}, "no more and no less"),
        ({"format": "int8-tensor", "parameters": "dynamic"}, "tokens would share"),
        ({"format": "int8-tensor", "parameters": "static"}, "input.scale' is missing"),
        ({"format": "int8-row", "parameters": 3}, "input.parameters"),
    ],
)
def test_a_manifest_that_is_wrong_about_inputs_is_refused(spec: dict[str, Any], says: str, pressed_dir: Path) -> None:
    path = pressed_dir / MANIFEST_NAME
    manifest = json.loads(path.read_text())
    next(iter(manifest["weights"].values()))["input"] = spec
    path.write_text(json.dumps(manifest))
    with pytest.raises(CheckpointError, match=says):
        CompressedCheckpoint.open(pressed_dir)


def test_directories_of_the_first_version_still_load(pressed_dir: Path, to_first_version: Callable[[Path], Path]) -> None:
    before = bitpress.load(pressed_dir)
    assert torch.equal(logits(bitpress.load(to_first_version(pressed_dir))), logits(before))


def test_a_module_that_computes_in_its_own_way_does_not_round() -> None:
    w, fmt = torch.randn(8, 16, generator=torch.Generator().manual_seed(0)), parse_format("int8-row")
    from bitpress.quantizers.rtn import RTN

    layer = CompressedLayer(RTN().quantize(w, None, fmt).weight, ActivationFormat(fmt))
    model = nn.ModuleDict({"table": nn.Embedding(8, 16)})
    with pytest.raises(CheckpointError, match=r"table\.weight: its input is rounded .* Embedding is no plain linear layer"):
        replace_(model, WeightParameter("table.weight", (8, 16)), layer, torch.float32, {})


@pytest.mark.skipif(not native.available(), reason="no C++ compiler was there when bitpress was installed")
def test_a_kernel_is_chosen_once(pressed_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[CompressedLayer] = []
    refuses = Native.refuses
    monkeypatch.setattr(Native, "refuses", staticmethod(lambda layer: asked.append(layer) or refuses(layer)))
    model = bitpress.load(pressed_dir, weights="packed")
    layers = [m for m in model.modules() if isinstance(m, PackedLinear)]
    assert len(asked) == len(layers)
    kernels = [m.kernel() for m in layers]
    for _ in range(2):
        logits(model)
    assert [m.kernel() for m in layers] == kernels
    assert len(asked) == len(layers)
    logits(model.to(torch.float32))  # moved: chosen anew, and once
    assert len(asked) == 2 * len(layers)
