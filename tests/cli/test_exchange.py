"""`export`, `convert`, `targets`, and `--for` of quantize and plan."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

Run = Callable[..., Any]
QUICK = ("--samples", "2", "--length", "32", "--proof-tokens", "0")


def test_a_recipe_for_a_runtime_ends_in_what_it_loads(bitpress: Run, tiny_model: Callable[..., Path], tmp_path: Path) -> None:
    out = tmp_path / "out"
    done = bitpress("quantize", tiny_model("llama"), out, "--for", "vllm", *QUICK, "--json")
    assert done.code == 0, done.err
    told = json.loads(done.out)
    assert told["exported"]["not_exact"] == {}
    assert told["exported"]["weights"]["exact"] > 0
    written = Path(told["exported"]["out"])
    config = json.loads((written / "config.json").read_text())["quantization_config"]
    assert config["quant_method"] == "compressed-tensors"
    assert {group["weights"]["num_bits"] for group in config["config_groups"].values()} == {4}
    inspected = json.loads(bitpress("inspect", written, "--json").out)
    assert set(inspected["formats"]) <= {"int4-g64", "int4-g32", "int4-row"}
    assert json.loads(bitpress("inspect", out, "--json").out)["formats"] == inspected["formats"]


def test_bits_that_a_runtime_does_not_have_and_formats_it_cannot_load(bitpress: Run, tiny_model: Callable[..., Path]) -> None:
    model = tiny_model("llama")
    done = bitpress("plan", model, "--for", "vllm", "--bits", "5")
    assert done.code == 2
    assert "vllm has no weights of 5 bits" in done.error
    done = bitpress("plan", model, "--for", "vllm", "--weights", "gauss4-row")
    assert done.code == 2
    assert "vllm cannot load model.layers.0.self_attn.q_proj: gauss4-row" in done.error
    done = bitpress("plan", model, "--for", "vlm")
    assert "Did you mean 'vllm'" in done.error


def test_a_plan_says_where_its_weights_could_go(bitpress: Run, tiny_model: Callable[..., Path]) -> None:
    told = json.loads(bitpress("plan", tiny_model("llama"), "--weights", "int4-g32", "--json").out)
    assert told["targets"]["gptq"] is None
    online = ("--set", "transforms=[{name: hadamard}]")
    told = json.loads(bitpress("plan", tiny_model("llama"), "--weights", "int4-g32", *online, "--json").out)
    assert "go through a map when the model runs (hadamard)" in told["targets"]["gptq"]


def test_a_plan_for_a_server_says_over_how_many_devices_it_can_be_divided(
    bitpress: Run, tiny_model: Callable[..., Path]
) -> None:
    plan = ("plan", tiny_model("llama"), "--for", "vllm", "--weights", "int4-g32")
    done = bitpress(*plan)
    assert "vllm runs it at these sizes of tensor parallelism: 1." in done.out
    assert "Not at 2: model.layers.0.self_attn.o_proj: 16 inputs a device, in groups of 32." in done.out
    told = json.loads(bitpress(*plan, "--json").out)["tensor_parallel"]
    assert [size for size, its in told.items() if its["refusal"] is None] == ["1"]
    assert json.loads(bitpress("plan", tiny_model("llama"), "--weights", "int4-g32", "--json").out)["tensor_parallel"] is None


def test_export_tells_what_is_not_code_for_code(bitpress: Run, pressed_original: Path, tmp_path: Path) -> None:
    done = bitpress("export", pressed_original, tmp_path / "out", "--to", "fp16")
    assert done.code == 0
    assert "Not code for code" in done.out
    assert "every weight is decoded" in done.out
    done = bitpress("convert", pressed_original, tmp_path / "gptq", "--to", "gptq")
    assert "Not code for code" not in done.out


def test_targets_lists_what_is_written_and_read(bitpress: Run) -> None:
    told = json.loads(bitpress("targets", "--json").out)
    assert {"gptq", "bf16"} <= told["written"].keys()
    assert {"gptq", "gguf", "bitpress"} <= told["read"].keys()
    assert "vllm" in told["runtimes"]
