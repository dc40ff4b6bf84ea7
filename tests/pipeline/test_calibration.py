"""What a block is measured on: the compressed model's inputs or the original's, both, and the gradient of the loss."""

import zlib
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from walking import compress_blocks, make_compressor

from bitpress.calibration import Stats
from bitpress.checkpoints.compressed import JOB_DIRECTORY, MANIFEST_NAME
from bitpress.errors import CheckpointError, JobStopped, MemoryLimitError, UsageError
from bitpress.formats import CompressedWeight, Packed
from bitpress.models.walk import LoadedBlock, walk
from bitpress.pipeline import quantize
from bitpress.pipeline.blocks import BlockCompressor
from bitpress.pipeline.gradients import measure_gradients
from bitpress.pipeline.plan import check_room, make_plan
from bitpress.pipeline.quantize import Proof, plan_run, quantize_directory
from bitpress.progress import Silent
from bitpress.quantizers.quantizer import Outcome, Quantizer
from bitpress.quantizers.rtn import RTN
from bitpress.quantizers.table import QUANTIZERS
from bitpress.recipes import Method, Named, Recipe, build_method, make_recipe

TOKENS = torch.randint(0, 384, (4, 32), generator=torch.Generator().manual_seed(3))


class Noting(Quantizer):
    """Rounds to nearest and notes the statistics that it is given."""

    transforms = ()

    def __init__(self, needs: set[str]) -> None:
        self.needs = frozenset(needs)
        self.seen: list[Stats] = []

    def quantize(self, w: torch.Tensor, stats: Stats | None, fmt: Any) -> Outcome:
        assert stats is not None
        self.seen.append(stats)
        return RTN().quantize(w, None, fmt)


def noting_method(recipe: Recipe, noting: Noting) -> Method:
    """Build a recipe with this quantizer in place of its own."""
    method = build_method(recipe)
    return replace(method, parts=(*method.of_key("transforms"), Named("quantizer", "noting", noting)))


def press(model: Path, needs: set[str], **calibration: Any) -> list[Stats]:
    """Press a tiny model in two bits; give the statistics of its weights in order."""
    values = {"weights": "int2-g16-zero", "quantizer": "gptq", "compute": "fp32", "batch": 2, "calibration": calibration}
    recipe = make_recipe(values)
    _, streamed, _ = plan_run(model, build_method(recipe))
    streamed.load_outer_()
    noting = Noting(needs)
    compress_blocks(streamed, noting_method(recipe, noting), TOKENS)
    return noting.seen


def test_original_inputs_are_those_of_the_uncompressed_model(tiny_model: Callable[..., Path]) -> None:
    from transformers import AutoModelForCausalLM

    path = tiny_model("llama")
    seen = press(path, {"gram"}, inputs="original")
    model = AutoModelForCausalLM.from_pretrained(path)
    inputs: list[torch.Tensor] = []
    for layer in model.model.layers:
        layer.mlp.down_proj.register_forward_pre_hook(lambda _, args: inputs.append(args[0].flatten(0, 1)))
    with torch.no_grad():
        model(TOKENS)
    downs = [stats for stats in seen if stats.gram is not None and stats.gram.shape[0] == 64]
    assert len(downs) == len(inputs) == 2
    for stats, x in zip(downs, inputs, strict=True):
        torch.testing.assert_close(stats.gram, x.T @ x / len(x), rtol=1e-4, atol=1e-6)


def test_both_streams_give_the_cross_statistic(tiny_model: Callable[..., Path]) -> None:
    """gram + cross = E[x_original x'], which with both grams gives the mean squared distance of the two inputs."""
    path = tiny_model("llama")
    both = press(path, {"gram", "cross"})
    pressed, original = press(path, {"gram"}), press(path, {"gram"}, inputs="original")
    for two, one in zip(both, pressed, strict=True):
        assert torch.equal(two.need_gram("test"), one.need_gram("test"))
    per_block = len(both) // 2
    for stats in both[:per_block]:
        assert not stats.need("cross", "test").any(), "nothing was compressed before the first block"
    for stats, other in zip(both[per_block:], original[per_block:], strict=True):
        gram, cross = stats.need_gram("test"), stats.need("cross", "test")
        apart = other.need_gram("test").diagonal() - gram.diagonal() - 2 * cross.diagonal()
        assert cross.abs().max() > 0.01 * gram.abs().max()
        assert (apart >= -1e-4 * gram.diagonal().mean()).all(), "E[(x_original - x)^2] is not negative"


def test_cross_needs_the_compressed_stream() -> None:
    with pytest.raises(UsageError, match=r"calibration\.inputs must be pressed"):
        make_recipe({"quantizer": "gptaq", "calibration": {"inputs": "original"}})


def test_original_inputs_do_not_depend_on_the_method(tiny_model: Callable[..., Path]) -> None:
    coarse = press(tiny_model("opt"), {"gram"}, inputs="original")
    values = {"weights": "int8-g16", "quantizer": "gptq", "compute": "fp32", "batch": 2, "calibration": {"inputs": "original"}}
    recipe = make_recipe(values)
    _, streamed, _ = plan_run(tiny_model("opt"), build_method(recipe))
    streamed.load_outer_()
    fine = Noting({"gram"})
    compress_blocks(streamed, noting_method(recipe, fine), TOKENS)
    for a, b in zip(coarse, fine.seen, strict=True):
        assert torch.equal(a.need_gram("test"), b.need_gram("test"))


# -------------------------------------------------------------------------------------------------------------- sequential


def inputs_of(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """Run the calibration tokens; give what every linear of the blocks is fed."""
    seen: dict[str, torch.Tensor] = {}
    hooks = [
        module.register_forward_pre_hook(lambda _, args, name=name: seen.__setitem__(name, args[0].flatten(0, 1).double()))
        for name, module in model.model.layers.named_modules()
        if isinstance(module, torch.nn.Linear)
    ]
    with torch.no_grad():
        model(TOKENS)
    for hook in hooks:
        hook.remove()
    return seen


@pytest.mark.parametrize("sequential", [True, False])
def test_sequential_measures_what_the_finished_model_feeds_its_weights(
    tiny_model: Callable[..., Path], sequential: bool
) -> None:
    from transformers import AutoModelForCausalLM

    path = tiny_model("llama")
    values = {"weights": "int2-g16-zero", "quantizer": "gptq", "compute": "fp32", "batch": 2}
    recipe = make_recipe({**values, "calibration": {"sequential": sequential}})
    _, streamed, _ = plan_run(path, build_method(recipe))
    streamed.load_outer_()
    noting = Noting({"gram", "cross"})
    original, finished = (AutoModelForCausalLM.from_pretrained(path) for _ in range(2))
    names = []
    for block in compress_blocks(streamed, noting_method(recipe, noting), TOKENS):
        for name, made in block.parameters.items():
            finished.get_parameter(name).data.copy_(made.weight.dequantize())
            names.append(name.removeprefix("model.layers.").removesuffix(".weight"))
    before, after = inputs_of(original), inputs_of(finished)
    wrong = []
    for name, stats in zip(names, noting.seen, strict=True):
        x, true = after[name], before[name]
        gram, cross = x.T @ x / len(x), (true - x).T @ x / len(x)
        near = [
            torch.allclose(stats.need(kind, "test").double(), expected, rtol=1e-3, atol=1e-4 * float(gram.abs().max()))
            for kind, expected in (("gram", gram), ("cross", cross))
        ]
        wrong += [name] * (not all(near))
    if sequential:
        assert not wrong
    else:
        # The first weights of a block are fed the same either way.
        assert [n for n in wrong if not n.split(".")[-1].startswith(("q_", "k_", "v_"))] == wrong
        assert {n.split(".")[-1] for n in wrong} == {"o_proj", "gate_proj", "up_proj", "down_proj"}


@pytest.mark.parametrize(
    ("architecture", "stages"),
    [
        ("llama", [["q", "k", "v"], ["o"], ["gate", "up"], ["down"]]),
        ("gpt2", [["c_attn"], ["c"], ["c_fc"], ["c"]]),
        ("qwen3_moe", [["q", "k", "v"], ["o"], ["gate_up"], ["down"]]),
    ],
)
def test_sequential_takes_a_pass_for_every_input_and_experts_together(
    tiny_model: Callable[..., Path], architecture: str, stages: list[list[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    values = {"weights": "int4-g16", "quantizer": "gptq", "compute": "fp32", "batch": 2, "calibration": {"sequential": True}}
    recipe = make_recipe(values)
    _, streamed, _ = plan_run(tiny_model(architecture), build_method(recipe))
    streamed.load_outer_()
    compressor = make_compressor(streamed, build_method(recipe), TOKENS)
    made: list[list[list[str]]] = []
    inner = compressor.stream.stages

    def noted(i: int, planned: Any) -> Any:
        found = inner(i, planned)
        made.append([[p.parameter.stem.rpartition(".")[2].removesuffix("_proj") for p in stage] for stage in found])
        return found

    monkeypatch.setattr(compressor.stream, "stages", noted)
    walk(streamed, [compressor])
    assert made[0] == stages


def test_sequential_beside_what_needs_a_whole_block_is_refused() -> None:
    sequential = {"sequential": True}
    with pytest.raises(UsageError, match=r"awq-scale sees a block as a whole, so calibration\.sequential must be false"):
        make_recipe({"transforms": ["awq-scale"], "calibration": sequential})
    with pytest.raises(UsageError, match="attention_gram sees a block as a whole"):
        make_recipe({"quantizer": "rsq", "calibration": sequential})
    with pytest.raises(UsageError, match=r"calibration\.inputs must be pressed"):
        make_recipe({"calibration": {**sequential, "inputs": "original"}})


# ------------------------------------------------------------------------------------------------------------- sensitivity


@pytest.mark.parametrize("architecture", ["llama", "gpt2", "mixtral", "gemma3"])
def test_sensitivity_is_the_mean_squared_gradient(tiny_model: Callable[..., Path], architecture: str) -> None:
    from transformers import AutoModelForCausalLM

    path = tiny_model(architecture)
    plan, streamed, _ = plan_run(path, build_method(make_recipe({"weights": "int4-row", "compute": "fp32"})))
    streamed.load_outer_()
    ours = measure_gradients(streamed, plan.by_block(), TOKENS, {"sensitivity"}, lambda: None, Silent())
    model = AutoModelForCausalLM.from_pretrained(path, experts_implementation="eager").eval()
    wanted = {name: torch.zeros_like(p) for name, p in model.named_parameters()}
    for text in TOKENS.split(1):
        model.zero_grad()
        logits = model(text).logits[0]
        torch.nn.functional.cross_entropy(logits[:-1], text[0, 1:]).backward()
        for name, p in model.named_parameters():
            if p.grad is not None:
                wanted[name] += p.grad.square() / len(TOKENS)
    assert len(ours) == len(plan.weights)
    for name, value in ours.items():
        assert value.any()
        torch.testing.assert_close(value, wanted[name], rtol=1e-3, atol=1e-6 * float(value.max()))


@dataclass(frozen=True)
class Weighted(Quantizer):
    """Rounds to nearest; the scales are fitted with the sensitivity as weights."""

    needs: ClassVar[frozenset[str]] = frozenset({"gram", "sensitivity"})
    bits: ClassVar[tuple[float, float]] = (2, 8)
    transforms: ClassVar[tuple[str, ...]] = ()

    def quantize(self, w: torch.Tensor, stats: Stats | None, fmt: Any) -> Outcome:
        assert stats is not None
        params = fmt.fit(w, stats.need("sensitivity", "test"), (1.0, 0.9, 0.8, 0.7))
        return Outcome(CompressedWeight((Packed.pack(fmt, fmt.encode(w, params), params),)))


@pytest.fixture
def sensitive(monkeypatch: pytest.MonkeyPatch) -> None:
    """A row of the table of quantizers that needs the sensitivity."""
    monkeypatch.setitem(QUANTIZERS, "weighted", Weighted)


@pytest.mark.parametrize("quantizer", ["weighted", "gptaq", "boa", "rsq"])
def test_a_stopped_run_ends_in_the_same_bytes(
    tiny_model: Callable[..., Path],
    gptq_recipe: Callable[..., Any],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    sensitive: None,
    quantizer: str,
) -> None:
    model = tiny_model("llama", num_hidden_layers=3)
    recipe = gptq_recipe(quantizer=quantizer, weights="int3-g16-zero")
    quantize_directory(model, tmp_path / "whole", recipe, proof=Proof(tokens=0))
    real, left = BlockCompressor.visit_, [2]

    def stop(self: BlockCompressor, block: LoadedBlock) -> None:
        left[0] -= 1
        if left[0] < 0:
            raise JobStopped("stopped by a test")
        real(self, block)

    with monkeypatch.context() as patch:
        patch.setattr(BlockCompressor, "visit_", stop)
        with pytest.raises(JobStopped):
            quantize_directory(model, tmp_path / "stopped", recipe, proof=Proof(tokens=0))
        patch.setattr(quantize, "measure_gradients", None)  # what was measured is taken up, not measured again
        patch.setattr(BlockCompressor, "visit_", real)
        quantize_directory(model, tmp_path / "stopped", recipe, proof=Proof(tokens=0))
    for name in [MANIFEST_NAME, *(p.name for p in (tmp_path / "whole").glob("*.safetensors"))]:
        assert (tmp_path / "whole" / name).read_bytes() == (tmp_path / "stopped" / name).read_bytes(), name
    assert not (tmp_path / "stopped" / JOB_DIRECTORY).exists()


def test_a_changed_sensitivity_is_refused(
    tiny_model: Callable[..., Path],
    gptq_recipe: Callable[..., Any],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    sensitive: None,
) -> None:
    model, recipe, out = tiny_model("llama"), gptq_recipe(quantizer="weighted"), tmp_path / "out"

    def stop(self: BlockCompressor, block: LoadedBlock) -> None:
        raise JobStopped("stopped by a test")

    with monkeypatch.context() as patch:
        patch.setattr(BlockCompressor, "visit_", stop)
        with pytest.raises(JobStopped):
            quantize_directory(model, out, recipe, proof=Proof(tokens=0))
    kept = out / JOB_DIRECTORY / "kept" / "gradients.safetensors"
    data = bytearray(kept.read_bytes())
    data[-1] ^= 1
    kept.write_bytes(data)
    with pytest.raises(CheckpointError, match=r"gradients\.safetensors: is missing or damaged; start again with --force"):
        quantize_directory(model, out, recipe, proof=Proof(tokens=0))
    quantize_directory(model, out, recipe, proof=Proof(tokens=0), force=True)


def test_the_plan_counts_the_backward_pass(
    tiny_model: Callable[..., Path], gptq_recipe: Callable[..., Any], sensitive: None, tmp_path: Path
) -> None:
    plan, streamed, _ = plan_run(tiny_model("llama"), build_method(gptq_recipe(quantizer="weighted")))
    without = make_plan(streamed, build_method(gptq_recipe()), {})
    weights = sum(w.weights for w in plan.weights)
    assert plan.disk >= without.disk + 4 * weights
    with pytest.raises(MemoryLimitError, match="bytes of memory are needed"):
        check_room(replace(plan, peak_memory=2**60), tmp_path / "out")


def test_sensitivity_is_not_known_in_another_basis(sensitive: None) -> None:
    with pytest.raises(UsageError, match="another basis; leave out hadamard"):
        make_recipe({"quantizer": "weighted", "transforms": ["hadamard"]})


def test_a_journal_of_other_records_is_refused_before_any_block(
    tiny_model: Callable[..., Path], gptq_recipe: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, recipe, out = tiny_model("llama"), gptq_recipe(), tmp_path / "out"

    def stop(self: BlockCompressor, block: LoadedBlock) -> None:
        raise JobStopped("stopped by a test")

    monkeypatch.setattr(BlockCompressor, "visit_", stop)
    with pytest.raises(JobStopped):
        quantize_directory(model, out, recipe, proof=Proof(tokens=0))
    journal = out / JOB_DIRECTORY / "journal.jsonl"
    payload = journal.read_bytes().split(b" ", 1)[1].rstrip(b"\n").replace(b'"digests": {}', b'"digests": 3')
    journal.write_bytes(b"%08x " % zlib.crc32(payload) + payload + b"\n")
    with pytest.raises(
        CheckpointError, match=r"journal\.jsonl:1: does not describe compressed weights; start again with --force"
    ):
        quantize_directory(model, out, recipe, proof=Proof(tokens=0))
