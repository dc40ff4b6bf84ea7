"""Models on their way out and in: what leaves is read back the same, computes the same, and nothing is lost or rounded in silence."""

import errno
import json
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import bitpress
from bitpress.checkpoints import safetensors_file
from bitpress.checkpoints.compressed import CompressedCheckpoint
from bitpress.checkpoints.exports import note_export
from bitpress.checkpoints.locks import lock_alone
from bitpress.checkpoints.safetensors_file import TensorEntry
from bitpress.errors import CheckpointError, DiskError, NumericsError, UsageError
from bitpress.exchange import export_directory, export_gguf
from bitpress.exchange.source import StoredLayer
from bitpress.exchange.table import EXPORTERS
from bitpress.formats import CompressedLayer
from bitpress.pipeline import exporting, foreign_check
from bitpress.pipeline.exporting import export_model, open_model, open_to_quantize
from bitpress.pipeline.foreign_check import MOST_DISTANCE, read_by_others
from bitpress.pipeline.quantize import Proof, quantize_directory
from bitpress.progress import Silent
from bitpress.recipes import make_recipe


@pytest.fixture(scope="module")
def pressed_norms(tiny_model: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model with tied embeddings in 8 bits, to leave for targets of every kind."""
    out = tmp_path_factory.mktemp("norms") / "given"
    recipe = make_recipe({"weights": "int4-g32", "quantizer": "rtn", "embeddings": "int8-row"})
    quantize_directory(tiny_model("llama", hidden_size=64, tie_word_embeddings=True), out, recipe, proof=Proof(tokens=0))
    return out


TOKENS = torch.arange(1, 25).reshape(2, 12)


def logits(directory: Path) -> torch.Tensor:
    with torch.no_grad():
        found: torch.Tensor = bitpress.load(directory, dtype="fp32")(TOKENS).logits
    return found


@pytest.fixture(scope="module")
def exported(pressed_original: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model in int4-g32-zero with permuted inputs, as GPTQ stores it."""
    out = tmp_path_factory.mktemp("exported") / "gptq"
    done = export_model(pressed_original, out, "gptq")
    assert {fate.how for fate in done.fates.values()} == {"exact"}
    return out


def test_an_exported_model_computes_the_same(exported: Path, pressed_original: Path) -> None:
    taken_over = open_model(exported)
    assert taken_over != exported
    assert open_model(exported) == taken_over, "it is taken over once"
    assert torch.equal(logits(exported), logits(pressed_original))


def test_codes_are_carried_over_and_back(exported: Path, pressed_original: Path, tmp_path: Path) -> None:
    again = tmp_path / "again"
    export_model(exported, again, "gptq")
    first, second = load_file(exported / "model.safetensors"), load_file(again / "model.safetensors")
    assert first.keys() == second.keys()
    assert all(torch.equal(value, second[name]) for name, value in first.items())
    config = json.loads((exported / "config.json").read_text())
    assert config["quantization_config"]["quant_method"] == "gptq"
    assert (exported / "tokenizer.json").read_bytes() == (pressed_original / "tokenizer.json").read_bytes()


def test_a_bias_of_zeros_that_the_architecture_lacks_is_dropped_and_another_is_refused(exported: Path, tmp_path: Path) -> None:
    """As old AutoGPTQ and AutoAWQ wrote them."""
    for value in (0.0, 0.5):
        out = tmp_path / f"bias-{value}"
        shutil.copytree(exported, out)
        held = load_file(out / "model.safetensors")
        layers = [name.removesuffix(".qweight") for name in held if name.endswith(".qweight")]
        held |= {f"{layer}.bias": torch.full((held[f"{layer}.qweight"].shape[1],), value).half() for layer in layers}
        save_file(held, out / "model.safetensors", {"format": "pt"})
        if value:
            with pytest.raises(CheckpointError, match=r"_proj\.bias: is a bias that is not zero, of a layer that has none"):
                open_model(out)
        else:
            assert torch.equal(logits(out), logits(exported))
            assert len(CompressedCheckpoint.open(open_model(out)).manifest.left_out) == len(layers)


def test_a_decoded_export_is_a_plain_model_within_half_a_step_of_bfloat16(pressed_original: Path, tmp_path: Path) -> None:
    out = tmp_path / "bf16"
    done = export_model(pressed_original, out, "bf16")
    assert max(done.added.values()) < 2**-16
    assert "quantization_config" not in json.loads((out / "config.json").read_text())
    checkpoint, held = CompressedCheckpoint.open(pressed_original), load_file(out / "model.safetensors")
    for name in checkpoint.manifest.weights:
        assert torch.equal(held[name], checkpoint.decode(name).to(torch.bfloat16))


def test_what_a_target_cannot_hold_is_rounded_only_if_asked(tiny_model: Callable[..., Path], tmp_path: Path) -> None:
    given = tmp_path / "nf4"
    recipe = make_recipe({"weights": "nf4-g32", "quantizer": "rtn"})
    quantize_directory(tiny_model("llama"), given, recipe, proof=Proof(tokens=0))
    with pytest.raises(
        UsageError, match=r"weights cannot be carried over to gptq.*nf4-g32 is not a format of GPTQ.*--requantize"
    ):
        export_model(given, tmp_path / "out", "gptq")
    assert not (tmp_path / "out").exists()
    done = export_model(given, tmp_path / "out", "gptq", requantize=True)
    assert {(fate.how, fate.format) for fate in done.fates.values()} == {("rounded", "int4-g32")}
    assert all(0 < error < 0.05 for error in done.added.values())


def test_another_reader_computes_the_same_or_the_export_is_refused(
    pressed_original: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    reading = export_model(pressed_original, tmp_path / "bf16", "bf16").reading
    assert reading is not None
    assert reading.reader is not None
    assert reading.reader.startswith("transformers")
    assert reading.kl_mean is not None
    assert 0 < reading.kl_mean < MOST_DISTANCE

    def open_other(out: Path) -> torch.nn.Module:
        model: torch.nn.Module = bitpress.load(pressed_original, dtype="fp32")
        for name, value in model.named_parameters():
            if name.endswith("down_proj.weight"):
                value.data.neg_()
        return model

    monkeypatch.setattr(foreign_check, "_open", open_other)
    with pytest.raises(NumericsError, match="computes something else of it"):
        export_model(pressed_original, tmp_path / "fp16", "fp16")


def test_what_nobody_here_reads_is_said(exported: Path, pressed_original: Path) -> None:
    reading = read_by_others(pressed_original, exported, "gptq", Silent())
    assert (reading.reader, reading.why) == (None, "the package gptqmodel is not installed (pip install gptqmodel)")
    assert read_by_others(pressed_original, exported, "tool of tomorrow", Silent()).reader is None


def test_a_table_in_few_bits_is_decoded_where_the_target_has_none(tiny_model: Callable[..., Path], tmp_path: Path) -> None:
    given = tmp_path / "given"
    recipe = make_recipe({"weights": "int4-g32", "quantizer": "rtn", "embeddings": "int8-row"})
    quantize_directory(tiny_model("llama"), given, recipe, proof=Proof(tokens=0))
    done = export_model(given, tmp_path / "out", "gptq")
    fates = {name: (fate.how, fate.why) for name, fate in done.fates.items() if fate.how != "exact"}
    assert fates == {"model.embed_tokens.weight": ("decoded", "its rows are looked up")}


def test_a_stopped_export_leaves_nothing(pressed_original: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from bitpress.exchange.gptq import Gptq

    def fail(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(Gptq, "configure", fail)
    with pytest.raises(KeyboardInterrupt):
        export_model(pressed_original, tmp_path / "out", "gptq")
    assert list(tmp_path.iterdir()) == []


def test_what_exists_is_not_replaced(pressed_original: Path, tmp_path: Path) -> None:
    (tmp_path / "out").write_text("mine")
    with pytest.raises(UsageError, match="exists already"):
        export_model(pressed_original, tmp_path / "out", "gptq")
    assert (tmp_path / "out").read_text() == "mine"


def test_an_unknown_target_and_a_model_that_is_not_compressed(tiny_model: Callable[..., Path], tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="Did you mean 'gptq'"):
        export_model(tiny_model("llama"), tmp_path / "out", "gtpq")
    with pytest.raises(UsageError, match="is not compressed"):
        export_model(tiny_model("llama"), tmp_path / "out", "gptq")


def test_a_quantized_model_is_quantized_again_only_if_asked(exported: Path, pressed_original: Path, tmp_path: Path) -> None:
    for model in (exported, pressed_original):
        with pytest.raises(UsageError, match=r"is quantized already \(.*--requantize"):
            open_to_quantize(model, Silent())
        source = open_to_quantize(model, Silent(), requantize=True)
        checkpoint, held = CompressedCheckpoint.open(pressed_original), load_file(source / "model.safetensors")
        for name in checkpoint.manifest.weights:
            assert torch.equal(held[name], checkpoint.decode(name)), "decoded in float32, not rounded once more"


def test_a_layer_without_one_of_its_tensors_is_refused(exported: Path, tmp_path: Path) -> None:
    damaged = tmp_path / "damaged"
    damaged.mkdir()
    for path in exported.iterdir():
        (damaged / path.name).write_bytes(path.read_bytes())
    tensors = load_file(damaged / "model.safetensors")
    del tensors[next(name for name in tensors if name.endswith(".scales"))]
    save_file(tensors, damaged / "model.safetensors")
    with pytest.raises(CheckpointError):
        open_model(damaged)


def test_an_export_that_reads_back_otherwise_is_not_there(
    pressed_original: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from bitpress.exchange.gptq import Gptq

    read = Gptq.read

    def read_other(stored: StoredLayer) -> CompressedLayer:
        return read(StoredLayer({**stored.tensors, "scales": -stored.tensors["scales"]}, stored.entry))

    monkeypatch.setattr(Gptq, "read", staticmethod(read_other))
    with pytest.raises(NumericsError, match="is another weight when it is read back"):
        export_model(pressed_original, tmp_path / "out", "gptq")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(("target", "says"), [("gptq", "No space left on device"), ("gguf", "the disk is full or failing")])
def test_a_full_disk_is_told_by_the_name_that_was_asked_for(
    target: str, says: str, pressed_norms: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """numpy, by which GGUF files are written, does not pass on what the system said."""
    import gguf

    def full(path: Path, chunks: Iterator[bytes]) -> None:
        error = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        raise DiskError(f"{path}: write failed; run the same command again: it resumes.") from error

    def short(*_: object) -> None:
        raise OSError("4096 requested and 0 written")

    monkeypatch.setattr(export_directory, "write_durably", full)
    monkeypatch.setattr(gguf.GGUFWriter, "write_tensor_data", short)
    out = tmp_path / f"out.{target}"
    with pytest.raises(DiskError) as caught:
        export_model(pressed_norms, out, target)
    assert str(caught.value).startswith(f"{out}: cannot be written: {says}; nothing of it is left.")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("target", ["gptq", "fp16", "gguf", "mlx"])
def test_an_export_that_cannot_fit_is_refused_before_any_work(
    target: str, pressed_norms: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is needed at least is not more than what is written."""
    out = tmp_path / "new" / f"out.{target}"
    monkeypatch.setattr(exporting.shutil, "disk_usage", lambda at: shutil._ntuple_diskusage(9, 9, 1))
    with pytest.raises(DiskError, match=r"at least [0-9,]+ bytes are needed and 1 are free; make room") as caught:
        export_model(pressed_norms, out, target)
    assert list(tmp_path.iterdir()) == []
    needed = int(str(caught.value).split("at least ")[1].split(" bytes")[0].replace(",", ""))
    monkeypatch.setattr(exporting.shutil, "disk_usage", lambda at: shutil._ntuple_diskusage(9, 9, needed))
    written = export_model(pressed_norms, out, target).nbytes
    side = sum(path.stat().st_size for path in out.iterdir() if path.suffix != ".safetensors") if out.is_dir() else 0
    assert 0.5 * written < needed + side <= written


@pytest.mark.parametrize("target", ["gptq", "bf16", "mlx", "gguf"])
def test_a_plain_tensor_that_reads_back_otherwise_is_caught(
    target: str, pressed_norms: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One number of one norm, by one step of bfloat16; nothing else is touched."""
    out = tmp_path / f"out.{target}"
    export_model(pressed_norms, out, target)
    shutil.rmtree(out) if out.is_dir() else out.unlink()
    read = safetensors_file.read_tensor

    def read_other(file: Path, entry: TensorEntry) -> torch.Tensor:
        value = read(file, entry)
        if entry.name.endswith("1.post_attention_layernorm.weight"):
            value[3] += 2**-7
        return value

    monkeypatch.setattr(export_directory, "read_tensor", read_other)
    monkeypatch.setattr(export_gguf, "read_tensor", read_other)
    with pytest.raises(
        NumericsError, match=r"layers\.1\.post_attention_layernorm\.weight is another tensor when it is read back"
    ):
        export_model(pressed_norms, out, target)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("change", ["decoded", "rounded", "missing", "more"])
def test_what_is_decoded_rounded_or_left_out_is_compared_too(
    change: str, pressed_norms: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The embeddings are decoded, and with --requantize the weights of blocks are rounded again."""
    made = export_directory._Made
    own = made.tensors

    def tensors(self: Any) -> Iterator[dict[str, torch.Tensor]]:
        for held in own(self):
            name = next(iter(held))
            if change == "decoded" and name == "model.embed_tokens.weight":
                held[name][5] = -held[name][5]
            elif change == "rounded" and name == "model.layers.0.mlp.up_proj.weight":
                name = "model.layers.0.mlp.up_proj.weight.absmax"
                held = {**held, name: held[name] * 1.01}
            elif change == "missing" and name == "model.norm.weight":
                continue
            elif change == "more" and name == "model.norm.weight":
                held = {**held, "lm_head.weight": torch.zeros(2, 2)}
            yield held

    monkeypatch.setattr(made, "tensors", tensors)
    said = {
        "decoded": "embed_tokens.weight is another tensor",
        "rounded": "up_proj.weight has another error",
        "missing": "norm.weight is missing",
        "more": "lm_head.weight is no parameter of the model",
    }
    with pytest.raises(NumericsError, match=f"{said[change]}.* do not use this export"):
        export_model(pressed_norms, tmp_path / "out", "bitsandbytes", requantize=True)
    assert list(tmp_path.iterdir()) == []


def test_an_older_export_goes_with_its_model(tiny_model: Callable[..., Path], tmp_path: Path) -> None:
    out, model = tmp_path / "out", tiny_model("llama")
    bits = []
    for weights in ("int4-g32", "int8-row"):
        done = bitpress.quantize(model, out, weights=weights, quantizer="rtn", runtime="vllm", force=True, proof_tokens=0)
        config = json.loads((Path(done["exported"]["out"]) / "config.json").read_text())["quantization_config"]
        bits.append(config["config_groups"]["group_0"]["weights"]["num_bits"])
    assert bits == [4, 8]
    bitpress.quantize(model, out, weights="int4-g32", quantizer="rtn", force=True, proof_tokens=0)
    assert not (out / "vllm").exists()


def test_values_beyond_half_precision_are_an_error(
    pressed_original: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoint = CompressedCheckpoint.open(pressed_original)
    monkeypatch.setattr(export_directory, "read_tensor", lambda file, entry: torch.full(entry.shape, 1e6))
    with pytest.raises(NumericsError, match=r"beyond the range of torch.float16"):
        EXPORTERS["fp16"].export(checkpoint, tmp_path, {}, {}, Silent())


def test_files_beside_the_weights_are_part_of_what_is_taken_over(exported: Path, tmp_path: Path) -> None:
    other = tmp_path / "other"
    shutil.copytree(exported, other)
    assert open_model(other) == open_model(exported)
    (other / "chat_template.jinja").write_text("{{ messages }}")
    (other / "origin.json").write_text("{}")
    taken = open_model(other)
    assert taken != open_model(exported)
    assert (taken / "chat_template.jinja").read_text() == "{{ messages }}"
    CompressedCheckpoint.open(taken)


def test_a_tool_that_is_not_read_is_named(tiny_model: Callable[..., Path], tmp_path: Path) -> None:
    other = tmp_path / "other"
    shutil.copytree(tiny_model("llama"), other)
    config = json.loads((other / "config.json").read_text()) | {"quantization_config": {"quant_method": "tomorrow"}}
    (other / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match="is quantized by 'tomorrow', which is not read"):
        open_model(other)


def test_what_others_put_beside_a_model_stays(tiny_model: Callable[..., Path], tmp_path: Path) -> None:
    out = tmp_path / "out"
    bitpress.quantize(tiny_model("llama"), out, weights="int4-g32", quantizer="rtn", proof_tokens=0)
    (out / "vllm").mkdir()
    (out / "vllm" / "mine").write_text("mine")
    with pytest.raises(UsageError, match="exists already"):
        bitpress.quantize(
            tiny_model("llama"), out, weights="int4-g32", quantizer="rtn", proof_tokens=0, runtime="vllm", force=True
        )
    bitpress.quantize(tiny_model("llama"), out, weights="int8-row", quantizer="rtn", proof_tokens=0, force=True)
    assert (out / "vllm" / "mine").read_text() == "mine"


def test_an_export_of_the_same_model_is_kept_while_it_is_whole(tiny_model: Callable[..., Path], tmp_path: Path) -> None:
    settings = {"weights": "int4-g32", "quantizer": "rtn", "proof_tokens": 0, "runtime": "vllm"}
    out = tmp_path / "out"
    first = bitpress.quantize(tiny_model("llama"), out, **settings)
    weights = next((out / "vllm").glob("*.safetensors"))
    written = weights.stat()
    moved = tmp_path / "moved"
    out.rename(moved)
    again = bitpress.quantize(tiny_model("llama"), moved, **settings)
    assert again["exported"] == {**first["exported"], "out": str(moved / "vllm")}
    assert (moved / "vllm" / weights.name).stat().st_ino == written.st_ino
    (moved / "vllm" / weights.name).write_bytes(b"")
    bitpress.quantize(tiny_model("llama"), moved, **settings)
    assert (moved / "vllm" / weights.name).stat().st_size == written.st_size


def test_what_a_killed_export_left_is_replaced(pressed_original: Path, tmp_path: Path) -> None:
    left, other = tmp_path / ".out.bitpress-left", tmp_path / ".out-mine"
    for path in (left, other):
        path.mkdir()
        (path / "part").write_text("part")
    busy = tmp_path / ".out.bitpress-busy"
    busy.mkdir()
    lock = os.open(busy, os.O_RDONLY)
    assert lock_alone(lock)
    try:
        export_model(pressed_original, tmp_path / "out", "gptq")
    finally:
        os.close(lock)
    assert {path.name for path in tmp_path.iterdir()} == {"out", busy.name, other.name}


def test_a_run_that_ends_between_an_export_and_its_note_exports_again(
    tiny_model: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"

    def note(directory: Path, name: str, told: object = None) -> None:
        if told is not None:
            raise KeyboardInterrupt
        note_export(directory, name)

    def run() -> None:
        bitpress.quantize(tiny_model("llama"), out, weights="int4-g32", quantizer="rtn", proof_tokens=0, runtime="vllm")

    with monkeypatch.context() as patch:
        patch.setattr(exporting, "note_export", note)
        with pytest.raises(KeyboardInterrupt):
            run()
    assert (out / "vllm").is_dir()
    run()
