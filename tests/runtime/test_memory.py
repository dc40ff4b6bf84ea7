"""One directory, any size: a model of stacks within a budget is the model of the first terms of each, and no byte beyond it is held."""

import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import bitpress
from bitpress.checkpoints.budget import parse_bytes, within
from bitpress.checkpoints.compressed import MANIFEST_NAME, CompressedCheckpoint
from bitpress.checkpoints.safetensors_file import TensorEntry, read_tensor
from bitpress.cli.app import main
from bitpress.errors import CheckpointError, MemoryLimitError, UsageError
from bitpress.formats import CompressedWeight
from bitpress.pipeline.quantize import Proof, plan_run, quantize_directory
from bitpress.recipes import build_method, make_recipe
from bitpress.runtime.hf.loading import load

TOKENS = torch.arange(6, 38).reshape(2, 16)
TERMS = 4


@pytest.fixture(scope="module", params=["llama", "gpt2"])
def stacked(
    request: pytest.FixtureRequest,
    tiny_model: Callable[..., Path],
    gptq_recipe: Callable[..., Any],
    tmp_path_factory: pytest.TempPathFactory,
) -> tuple[Path, Path]:
    source, out = tiny_model(request.param), tmp_path_factory.mktemp("memory") / request.param
    quantizer = {"name": "bitstack", "terms": TERMS, "rank": 2}
    recipe = gptq_recipe(weights="binary-tensor", quantizer=quantizer)
    quantize_directory(source, out, recipe, proof=Proof(tokens=0))
    return source, out


def terms(compressed: CompressedCheckpoint) -> dict[str, int]:
    return {name: len(record.spec["terms"]) for name, record in compressed.manifest.weights.items()}


def ends(compressed: CompressedCheckpoint) -> tuple[int, int]:
    """The least that can be loaded, and all."""
    every = sum(entry.nbytes for _, entry in compressed.tensors.values())
    behind = [name for name in compressed.tensors if any(f".term{k}." in name for k in range(1, TERMS))]
    return every - sum(compressed.tensors[name][1].nbytes for name in behind), every


@torch.no_grad()
def logits(model: Any) -> torch.Tensor:
    return model(input_ids=TOKENS, use_cache=False).logits


def held_bytes(model: torch.nn.Module) -> int:
    tensors = {t.data_ptr(): t for t in (*model.parameters(), *model.buffers())}
    return sum(t.numel() * t.element_size() for t in tensors.values())


def test_budgets_from_the_least_to_all(stacked: tuple[Path, Path]) -> None:
    compressed = CompressedCheckpoint.open(stacked[1])
    least, every = ends(compressed)
    assert set(terms(within(compressed, least)).values()) == {1}
    assert (
        terms(within(compressed, every))
        == terms(within(compressed, 10 * every))
        == dict.fromkeys(compressed.manifest.weights, TERMS)
    )
    sizes = []
    before = terms(within(compressed, least))
    for budget in range(least, every + 1, (every - least) // 40):
        part = within(compressed, budget)
        assert part.nbytes <= budget
        assert all(count >= before[name] for name, count in terms(part).items()), "a larger budget only adds"
        sizes.append(part.nbytes)
        before = terms(part)
    assert len(set(sizes)) > 20, "steps are single terms"
    assert any(len(set(terms(within(compressed, b)).values())) > 1 for b in sizes), (
        "weights differ in what more bytes bring them"
    )


def test_logits_are_those_of_the_first_terms(stacked: tuple[Path, Path]) -> None:
    compressed = CompressedCheckpoint.open(stacked[1])
    least, every = ends(compressed)
    for budget in (least, (least + every) // 2, every):
        part = within(compressed, budget)
        model = bitpress.load(stacked[1], memory=budget)
        decoded = load(stacked[1], weights="decoded", dtype="fp32", memory=budget)
        expected = load(stacked[1], dtype="fp32")
        for name, count in terms(part).items():
            whole = compressed.read_weight(name)
            first = CompressedWeight(whole.terms[:count], whole.input_map, whole.output_map).dequantize()
            assert torch.equal(part.read_weight(name).dequantize(), first)
            expected.get_parameter(name).data = compressed.manifest.weights[name].parameter(name).restore(first)
        assert torch.equal(logits(decoded), logits(expected))
        # The same weights, multiplied in another order in float32.
        torch.testing.assert_close(logits(model), logits(expected), rtol=1e-3, atol=1e-3)


def test_no_more_is_held_than_the_budget(stacked: tuple[Path, Path]) -> None:
    compressed = CompressedCheckpoint.open(stacked[1])
    least, every = ends(compressed)
    rotations = held_bytes(bitpress.load(stacked[1], memory=every)) - every
    assert 0 <= rotations < 1024, "beside what is read a model holds only the frequencies of its positions"
    for budget in (least, least + (every - least) // 3, (least + every) // 2):
        assert held_bytes(bitpress.load(stacked[1], memory=budget)) <= budget + rotations


def test_no_byte_of_a_term_left_out_is_read(stacked: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    read: list[str] = []
    real = read_tensor

    def noted(path: Path, entry: TensorEntry, rows: slice | None = None) -> torch.Tensor:
        read.append(entry.name)
        return real(path, entry, rows)

    for name, module in list(sys.modules.items()):
        if name.startswith("bitpress.") and getattr(module, "read_tensor", None) is real:
            monkeypatch.setattr(module, "read_tensor", noted)
    bitpress.load(stacked[1], memory=ends(CompressedCheckpoint.open(stacked[1]))[0])
    assert any(".term0." in name for name in read)
    assert not [name for name in read if any(f".term{k}." in name for k in range(1, TERMS))]


def test_more_memory_is_nearer_to_the_original(stacked: tuple[Path, Path]) -> None:
    source, out = stacked
    least, every = ends(CompressedCheckpoint.open(out))
    fewer, more = (bitpress.evaluate(out, source, tokens=128, length=32, memory=budget) for budget in (least, every))
    assert fewer["kl_mean"] > more["kl_mean"]
    assert fewer["bits_per_weight"] < more["bits_per_weight"]
    assert (fewer["bytes"], more["bytes"]) == (least, every)


def test_what_cannot_be_is_said_in_one_line(stacked: tuple[Path, Path], pressed_original: Path) -> None:
    source, out = stacked
    least, every = ends(CompressedCheckpoint.open(out))
    with pytest.raises(
        MemoryLimitError,
        match=rf"{least - 1:,} bytes are too few; the model needs {least:,} at least, and {every:,} in full\.$",
    ):
        bitpress.load(out, memory=least - 1)
    with pytest.raises(UsageError, match="no weight can be loaded in part"):
        bitpress.load(pressed_original, memory="1GB")
    with pytest.raises(UsageError, match="bitpress did not write this model"):
        bitpress.evaluate(source, source, tokens=64, length=32, memory="1GB")
    with pytest.raises(UsageError, match="cache: only for the runtime native; memory: only for transformers"):
        bitpress.load(out, memory=every, cache="int8")
    for wrong in ("", "0", "-5", "60 XB", "1e9", "MB", "nan", 0, True, "1.5.2GB"):
        with pytest.raises(UsageError, match="memory="):
            parse_bytes(wrong)
    read = {"60MB": 60_000_000, "1.5 GB": 1_500_000_000, "64MiB": 64 * 2**20, "2k": 2000, "17": 17, 17: 17, "3 gib": 3 * 2**30}
    assert {text: parse_bytes(text) for text in read} == read


@pytest.mark.parametrize("errors", [[0.5], [0.5, 0.4, 0.3, "x"], [0.5, 0.4, 0.3, 1e999], {}])
def test_figures_of_other_terms_are_refused(errors: Any, stacked: tuple[Path, Path], tmp_path: Path) -> None:
    out = tmp_path / "out"
    shutil.copytree(stacked[1], out)
    manifest = json.loads((out / MANIFEST_NAME).read_text())
    next(iter(manifest["weights"].values()))["errors"] = errors
    (out / MANIFEST_NAME).write_text(json.dumps(manifest))
    with pytest.raises(CheckpointError, match=r"errors|must be finite"):
        bitpress.load(out, memory="1GB")


def test_the_plan_counts_every_term(stacked: tuple[Path, Path]) -> None:
    source, out = stacked
    compressed = CompressedCheckpoint.open(out)
    plan, _, _ = plan_run(source, build_method(make_recipe(compressed.manifest.recipe)))
    terms_alone = [n for names in compressed.stored.values() for n in names if ".term" in n]
    assert plan.compressed_bytes == sum(compressed.tensors[name][1].nbytes for name in terms_alone)


def test_other_manifests_say_nothing_of_terms(stacked: tuple[Path, Path], pressed_original: Path) -> None:
    manifest = json.loads((pressed_original / MANIFEST_NAME).read_text())
    assert {frozenset(record) for record in manifest["weights"].values()} == {frozenset({"spec", "transposed", "experts"})}
    for record in json.loads((stacked[1] / MANIFEST_NAME).read_text())["weights"].values():
        assert len(record["errors"]) == TERMS
        assert record["errors"] == sorted(record["errors"], reverse=True)
        assert 0 < record["errors"][-1] < record["errors"][0] < 1


def test_the_command_line_takes_a_size(
    stacked: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    source, out = stacked
    least, every = ends(CompressedCheckpoint.open(out))

    def say(*words: str) -> tuple[int, Any, str]:
        monkeypatch.setattr(sys, "argv", ["bitpress", *words])
        with pytest.raises(SystemExit) as stop:
            main()
        said = capsys.readouterr()
        return int(stop.value.code or 0), json.loads(said.out) if said.out else None, said.err

    budget = (least + every) // 2
    run = ("run", str(out), "--prompt", "to", "--raw", "--max-tokens", "3", "--json")
    code, answer, _ = say(*run, "--memory", str(budget))
    assert code == 0
    assert answer["weights"] == "packed"
    assert least < answer["weight_bytes"] <= budget + 1024
    code, figures, _ = say(
        "eval", str(out), "--against", str(source), "--tokens", "64", "--length", "32", "--memory", str(budget), "--json"
    )
    assert code == 0
    assert least < figures["bytes"] <= budget
    code, _, said = say(*run, "--memory", "1kB")
    assert code == 5
    assert "1,000 bytes are too few" in said
