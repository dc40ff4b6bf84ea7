"""torchao: a whole model is taken over with its codes, and what a header does not say, or says of something else, is refused by name."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from bitpress.checkpoints.compressed import CompressedCheckpoint
from bitpress.errors import CheckpointError, FormatError
from bitpress.exchange.source import HEADERS
from bitpress.exchange.torchao import Torchao
from bitpress.pipeline.exporting import open_model

INTX: dict[str, Any] = {
    "_type": "IntxUnpackedToInt8Tensor",
    "_data": {
        "target_dtype": {"_type": "torch.dtype", "_data": "int4"},
        "block_size": [1, 32],
        "dtype": {"_type": "torch.dtype", "_data": "float32"},
        "activation_quantization": None,
    },
    "_tensor_data_names": ["qdata", "scale", "zero_point"],
}


def with_data(**changes: Any) -> dict[str, Any]:
    return {**INTX, "_data": {**INTX["_data"], **changes}}


def test_a_model_is_taken_over_code_for_code(tiny_model: Callable[..., Path], tmp_path: Path) -> None:
    given = tiny_model("llama")
    tensors, said = load_file(given / "model.safetensors"), {"format": "pt"}
    decoded: dict[str, torch.Tensor] = {}
    for name in [name for name in tensors if name.endswith("_proj.weight")]:
        blocks = tensors.pop(name).unflatten(1, (-1, 32))
        scale = blocks.abs().amax(-1) / 7
        qdata = (blocks / scale[..., None]).round().to(torch.int8)
        decoded[name] = (qdata * scale[..., None]).flatten(1)
        owner = name.removesuffix(".weight")
        zero = torch.zeros_like(scale, dtype=torch.int8)
        tensors |= {
            f"{owner}._weight_qdata": qdata.flatten(1),
            f"{owner}._weight_scale": scale,
            f"{owner}._weight_zero_point": zero,
        }
        said[name] = json.dumps(INTX)
    said |= {name: json.dumps({"_type": "Tensor"}) for name in tensors if name.endswith("norm.weight")}
    for path in given.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    save_file(tensors, tmp_path / "model.safetensors", said)
    config = json.loads((given / "config.json").read_text()) | {"quantization_config": {"quant_method": "torchao"}}
    (tmp_path / "config.json").write_text(json.dumps(config))
    taken = CompressedCheckpoint.open(open_model(tmp_path))
    assert taken.manifest.weights.keys() == decoded.keys()
    assert all(torch.equal(taken.decode(name), value) for name, value in decoded.items())
    held = {tuple(record.spec["shape"]): record.spec["terms"][0]["format"] for record in taken.manifest.weights.values()}
    assert held == {(32, 32): "int4-row-fp32", (64, 32): "int4-row-fp32", (32, 64): "int4-g32-fp32"}
    save_file(tensors, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(CheckpointError, match="header of the safetensors file does not say what its weight is"):
        open_model(tmp_path)


@pytest.mark.parametrize(
    ("told", "says"),
    [
        ({**INTX, "_type": "Int4TilePackedTo4dTensor"}, "'Int4TilePackedTo4dTensor'; IntxUnpackedToInt8Tensor"),
        ({**INTX, "_type": "Int4Tensor"}, "'Int4Tensor'"),
        (with_data(activation_quantization="int8_asym_per_token"), r"inputs are rounded .*\(activation_quantization\)"),
        ({**with_data(act_quant_kwargs={}), "_type": "Int8Tensor"}, r"inputs are rounded .*\(act_quant_kwargs\)"),
        (with_data(block_size=[]), r"block_size is \[\]"),
        (with_data(block_size=[1, 32, 1]), "block_size"),
        (with_data(block_size=[1, True]), "block_size"),
        (with_data(target_dtype={"_type": "torch.dtype", "_data": "uint4"}), "target_dtype"),
        (None, "does not say"),
        ("[" * 100_000, "no JSON"),
    ],
)
def test_what_is_not_read_is_refused_by_name(told: Any, says: str) -> None:
    text = told if isinstance(told, str) or told is None else json.dumps(told)
    with pytest.raises(FormatError, match=f"^a: .*{says}"):
        Torchao.entries({HEADERS: {} if text is None else {"a.weight": text}}, {"a": {}})


def test_a_directory_without_such_tensors_is_refused() -> None:
    with pytest.raises(FormatError, match="other ways to save a model are not read"):
        Torchao.entries({HEADERS: {}}, {})
