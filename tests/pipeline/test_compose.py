"""Parts of a recipe together: what each of them sees, what becomes of it, and the whole way with them on a tiny model."""

import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
import transformers
import yaml
from safetensors.torch import load_file, save_file

import bitpress
from bitpress.calibration import Stats
from bitpress.checkpoints.compressed import JOB_DIRECTORY, CompressedCheckpoint
from bitpress.cli.recipe_options import read_method
from bitpress.corrections.lqer import LQER
from bitpress.corrections.outliers import Outliers
from bitpress.corrections.svdquant import SVDQuant
from bitpress.errors import BitpressError, CalibrationError, FormatError, JobStopped, NumericsError, UsageError
from bitpress.formats import CompressedWeight, Format, Hadamard, LowRank, Packed, Permutation, Scale, Sparse, parse_format
from bitpress.formats.terms.sparse import sparse
from bitpress.pipeline import blocks as press
from bitpress.pipeline.compose import compress_matrix
from bitpress.pipeline.quantize import Proof, plan_run, quantize_directory
from bitpress.progress import Silent
from bitpress.quantizers.gptq import GPTQ
from bitpress.quantizers.quantizer import Outcome, Quantizer, output_error
from bitpress.quantizers.rtn import RTN
from bitpress.quantizers.table import QUANTIZERS
from bitpress.recipes import LayerMethod, Named, Recipe, build_method, dump_recipe, make_recipe
from bitpress.transforms.basis import Maps
from bitpress.transforms.table import SCALE_SEARCHES

OUT, IN = 24, 32
FMT = parse_format("int3-g16-zero")


def case(seed: int = 0) -> tuple[torch.Tensor, Stats]:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(200, IN, generator=generator) * torch.exp(torch.randn(IN, generator=generator))
    return torch.randn(OUT, IN, generator=generator), Stats(200, x.T @ x / 200, x.abs().mean(0))


def order(n: int, seed: int) -> Permutation:
    return Permutation(torch.randperm(n, generator=torch.Generator().manual_seed(seed)).to(torch.int32))


def turn(n: int, seed: int) -> Hadamard:
    return Hadamard.random(n, n, torch.Generator().manual_seed(seed))


@dataclass(frozen=True)
class Fixed:
    """A change of basis by given maps."""

    maps: Maps
    needs: ClassVar[frozenset[str]] = frozenset()
    summary: ClassVar[str] = ""
    paper: ClassVar[str] = ""

    def plan(self, w: torch.Tensor, stats: Any, fmt: Format) -> Maps:
        return self.maps


class Exact(Quantizer):
    """A quantizer that keeps every weight in fp16 and remembers what it was given; `own` are maps that it keeps itself."""

    needs: ClassVar[frozenset[str]] = frozenset()
    transforms: ClassVar[tuple[str, ...]] = ()
    summary: ClassVar[str] = ""
    paper: ClassVar[str] = ""
    bits: ClassVar[tuple[float, float]] = (16, 16)

    def __init__(self, own: Maps = (None, None)) -> None:
        self.own = own

    def quantize(self, w: torch.Tensor, stats: Stats | None, fmt: Format) -> Outcome:
        self.w, self.stats = w, stats
        inside = w
        if self.own[0] is not None:
            inside = self.own[0].dual().apply(inside)
        if self.own[1] is not None:
            inside = self.own[1].dual().apply_transposed(inside.T).T
        kept = sparse(inside, torch.ones_like(w, dtype=torch.bool))
        return Outcome(CompressedWeight((kept,), *self.own))


CHANGES: dict[str, list[Maps]] = {
    "none": [],
    "inputs turned": [(turn(IN, 0), None)],
    "outputs turned": [(None, turn(OUT, 1))],
    "both permuted": [(order(IN, 2), order(OUT, 3))],
    "both turned, then permuted": [(turn(IN, 4), turn(OUT, 5)), (order(IN, 6), order(OUT, 7))],
    "scaled, then turned": [(Scale(torch.linspace(0.5, 2, IN)), Scale(torch.linspace(2, 0.5, OUT))), (turn(IN, 8), None)],
}
OWN: dict[str, Maps] = {"no map": (None, None), "permuted": (order(IN, 9), None), "both": (turn(IN, 10), order(OUT, 11))}


@pytest.mark.parametrize("own", OWN)
@pytest.mark.parametrize("changes", CHANGES)
def test_maps_undo_the_changes_of_basis(changes: str, own: str) -> None:
    w, stats = case()
    weight = compress_matrix(
        w, stats, LayerMethod(FMT, Named("quantizer", "", Exact(OWN[own])), changes=tuple([Fixed(m) for m in CHANGES[changes]]))
    ).weight
    # Weights of size up to about 4 in fp16 are off by 2^-10; a rotation of 32 adds up 32 such, at random.
    torch.testing.assert_close(weight.dequantize(), w, rtol=0, atol=32**0.5 * 2**-8)
    x = torch.randn(5, IN)
    y = x if weight.input_map is None else weight.input_map.apply(x)
    y = y @ weight.terms[0].dequantize().T
    y = y if weight.output_map is None else weight.output_map.apply(y)
    torch.testing.assert_close(y, x @ w.T, rtol=0, atol=0.2)


def test_the_quantizer_sees_the_basis_and_what_splits_have_left() -> None:
    w, stats = case(1)
    maps = (turn(IN, 0), turn(OUT, 1))
    exact, split = Exact(), SVDQuant(rank=3)
    weight = compress_matrix(
        w, stats, LayerMethod(FMT, Named("quantizer", "", exact), changes=tuple([Fixed(maps)]), corrections=tuple([split]))
    ).weight
    inputs, outputs = maps[0].apply(torch.eye(IN)).T, maps[1].apply(torch.eye(OUT)).T
    turned = outputs.T @ w @ inputs.T
    branch = weight.terms[1].dequantize()
    torch.testing.assert_close(branch, split.split(turned, None, FMT).dequantize(), rtol=0, atol=1e-2)
    torch.testing.assert_close(exact.w, turned - branch, rtol=0, atol=1e-5)
    assert exact.stats is not None
    torch.testing.assert_close(exact.stats.gram, inputs @ stats.need_gram("test") @ inputs.T, rtol=1e-4, atol=1e-4)
    assert [type(t) for t in weight.terms] == [Sparse, LowRank]


def test_splits_see_each_other_and_repairs_see_everything() -> None:
    w, stats = case(2)
    w[3, 5], w[7, 9] = 40.0, -30.0
    parts = [Outliers(share=2 / w.numel()), SVDQuant(rank=2), LQER(rank=4), LQER(rank=3)]
    weight = compress_matrix(w, stats, LayerMethod(FMT, Named("quantizer", "", RTN()), corrections=tuple(parts))).weight
    codes, kept, branch, first, second = weight.terms
    assert [type(t) for t in weight.terms] == [Packed, Sparse, LowRank, LowRank, LowRank]
    assert set(kept.dequantize().nonzero().flatten().tolist()) == {3, 5, 7, 9}
    rest = w - kept.dequantize()
    assert torch.equal(branch.dequantize(), SVDQuant(rank=2).split(rest, None, FMT).dequantize())
    assert torch.equal(codes.dequantize(), RTN().quantize(rest - branch.dequantize(), None, FMT).weight.dequantize())
    before = CompressedWeight((codes, kept, branch))
    assert torch.equal(first.dequantize(), LQER(rank=4).repair(w, before, stats).dequantize())
    assert torch.equal(
        second.dequantize(), LQER(rank=3).repair(w, CompressedWeight((*before.terms, first)), stats).dequantize()
    )
    errors = [output_error(w, CompressedWeight(weight.terms[:n]).dequantize(), stats) for n in (3, 4, 5)]
    assert errors == sorted(errors, reverse=True)


@pytest.mark.parametrize("quantizer", [RTN(), GPTQ(), GPTQ(groups="running"), Exact(OWN["both"])])
def test_a_repair_goes_between_the_quantizers_own_maps(quantizer: Any) -> None:
    w, stats = case(3)
    alone = compress_matrix(
        w, stats, LayerMethod(FMT, Named("quantizer", "", quantizer), changes=tuple([Fixed((turn(IN, 0), None))]))
    ).weight
    repaired = compress_matrix(
        w,
        stats,
        LayerMethod(
            FMT,
            Named("quantizer", "", quantizer),
            changes=tuple([Fixed((turn(IN, 0), None))]),
            corrections=tuple([LQER(rank=OUT, scale="rms")]),
        ),
    ).weight
    # A repair of full rank leaves what fp16 factors cannot hold: some 2^-10 of the error.
    assert (repaired.dequantize() - w).norm() <= 0.01 * (alone.dequantize() - w).norm() + 1e-3


def test_what_does_not_go_together_is_said() -> None:
    w, stats = case(4)
    with pytest.raises(FormatError, match="keeps a map of its own"):
        compress_matrix(
            w, stats, LayerMethod(FMT, Named("quantizer", "", GPTQ(groups="running")), corrections=tuple([SVDQuant(rank=2)]))
        )
    sensitive = Exact()
    sensitive.needs = frozenset({"sensitivity"})  # type: ignore[misc]
    seen = replace(stats, sensitivity=torch.ones(OUT, IN))
    compress_matrix(w, seen, LayerMethod(FMT, Named("quantizer", "", sensitive)))
    with pytest.raises(CalibrationError, match="sensitivity is not known after a change of basis"):
        compress_matrix(
            w, seen, LayerMethod(FMT, Named("quantizer", "", sensitive), changes=tuple([Fixed((turn(IN, 0), None))]))
        )


# --------------------------------------------------------------------------------------------------------------------- recipes


def test_a_recipe_reads_back_with_every_setting() -> None:
    recipe = make_recipe({"transforms": ["smooth-plus", "hadamard"], "corrections": ["outliers", {"name": "lqer", "rank": 8}]})
    resolved = build_method(recipe).resolved()
    assert resolved["corrections"] == [
        {"name": "outliers", "share": 0.0045},
        {"name": "lqer", "rank": 8, "dtype": "fp16", "scale": "mean_abs"},
    ]
    assert build_method(make_recipe(yaml.safe_load(dump_recipe(recipe)))).resolved() == resolved
    assert build_method(recipe).needs == {"gram", "mean_abs"}
    assert build_method(make_recipe({"quantizer": "rtn", "corrections": ["lorc"]})).needs == frozenset()
    assert build_method(make_recipe({"quantizer": "rtn"})).resolved()["corrections"] == []
    by_text = make_recipe({}, ["corrections=[{name: lqer, rank: 8}]"])
    assert by_text.corrections == ({"name": "lqer", "rank": 8},)


REFUSED: dict[str, tuple[Mapping[str, Any], str]] = {
    "unknown correction": ({"corrections": ["lqerr"]}, "unknown correction 'lqerr'. Did you mean 'lqer'"),
    "unknown setting": ({"corrections": [{"name": "lqer", "ranks": 3}]}, "setting of correction 'lqer'"),
    "wrong type": ({"corrections": [{"name": "lqer", "rank": "many"}]}, "correction lqer: rank"),
    "impossible": ({"corrections": [{"name": "lorc", "rank": 0}]}, "rank=0"),
    "lossless": ({"weights": "dfloat11", "quantizer": "rtn", "corrections": ["lorc"]}, "dfloat11 keeps weights bit for bit"),
    "lossless by override": (
        {"overrides": [{"match": "*", "weights": "dfloat11"}], "transforms": ["hadamard"]},
        "hadamard would change them",
    ),
    "scales after the basis": ({"transforms": ["hadamard", "awq-scale"]}, "before any change of basis"),
}


@pytest.mark.parametrize("what", REFUSED)
def test_a_recipe_that_cannot_be_is_refused(what: str) -> None:
    values, said = REFUSED[what]
    with pytest.raises(UsageError) as caught:
        make_recipe(values)
    assert said in str(caught.value)
    assert "\n" not in str(caught.value)


@dataclass(frozen=True)
class Choosy(RTN):
    serves: ClassVar[tuple[str, ...]] = ("int4-*",)


def refused(tiny_model: Callable[..., Path], architecture: str, **values: Any) -> str:
    with pytest.raises(BitpressError) as caught:
        plan_run(tiny_model(architecture), build_method(make_recipe(values)))
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_the_plan_refuses_what_no_weight_could_have(tiny_model: Callable[..., Path], monkeypatch: pytest.MonkeyPatch) -> None:
    said = refused(tiny_model, "llama", weights="int4-g16", quantizer="rtn", corrections=[{"name": "svdquant", "rank": 33}])
    assert "svdquant: rank 33 is more than weights [32, 32] have" in said
    plan_run(tiny_model("mixtral"), build_method(make_recipe({"weights": "int4-g16", "quantizer": "gptq"})))
    monkeypatch.setitem(QUANTIZERS, "choosy", Choosy)
    said = refused(tiny_model, "llama", weights="nf4-g16", quantizer="choosy")
    assert "choosy serves int4-*, not nf4-g16" in said
    plan_run(tiny_model("llama"), build_method(make_recipe({"weights": "int4-g16", "quantizer": "choosy"})))


# ----------------------------------------------------------------------------------------------------------------- the whole way

# Whose parts the others have too.
RELEASE = {"hadamard + gptq + lqer", "no calibration", "awq + spqr"}
RECIPES: dict[str, dict[str, Any]] = {
    "hadamard + gptq + lqer": {"transforms": ["hadamard"], "corrections": [{"name": "lqer", "rank": 4}]},
    "both sides + svdquant": {
        "transforms": [{"name": "hadamard", "outputs": True}],
        "corrections": [{"name": "svdquant", "rank": 4, "dtype": "int8-row"}],
    },
    "awq + spqr": {"transforms": ["awq-scale"], "quantizer": {"name": "spqr"}},
    "everything": {
        "transforms": ["smooth-plus", "hadamard"],
        "corrections": ["salient", {"name": "outliers", "share": 0.01}, {"name": "lqer", "rank": 2}],
    },
    "running groups + lqer": {
        "quantizer": {"name": "gptq", "groups": "running"},
        "corrections": [{"name": "lqer", "rank": 4}],
    },
    "another target, weight by weight": {"transforms": ["hadamard", "qep"], "calibration": {"sequential": True}},
    "no calibration": {
        "quantizer": {"name": "rtn"},
        "transforms": ["hadamard"],
        "corrections": [{"name": "lorc", "rank": 4}],
    },
}


@pytest.mark.parametrize("what", [pytest.param(what, marks=pytest.mark.release if what in RELEASE else ()) for what in RECIPES])
def test_the_whole_way(
    what: str, tiny_model: Callable[..., Path], gptq_recipe: Callable[..., Recipe], text_file: Path, tmp_path: Path
) -> None:
    """Quantize, which reloads and compares with what was computed; then the proof again, from the files alone."""
    model, recipe = tiny_model("llama"), gptq_recipe(**RECIPES[what])
    report = quantize_directory(model, tmp_path / "out", recipe, proof=Proof(tokens=64, length=32))
    figures = bitpress.evaluate(tmp_path / "out", model, tokens=64, length=32)
    assert figures["kl_mean"] == report["figures"]["kl_mean"]
    assert figures["perplexity"] == report["figures"]["perplexity"]
    tokens = torch.arange(5, 25)[None]
    with torch.no_grad():
        decoded = bitpress.load(tmp_path / "out")(tokens).logits
        packed = bitpress.load(tmp_path / "out", weights="packed")(tokens).logits
    # The same weights, multiplied in another order in float32.
    torch.testing.assert_close(packed, decoded, rtol=1e-3, atol=1e-3)
    parts = [*build_method(recipe).resolved()["transforms"], recipe.quantizer, *build_method(recipe).resolved()["corrections"]]
    assert f"with `{' + '.join(part['name'] for part in parts)}`." in (tmp_path / "out" / "README.md").read_text()
    rows = {row["name"]: row for row in report["layers"]}
    assert set(next(iter(rows.values()))) == {
        *("name", "shape", "format", "bytes", "bits_per_weight"),
        *(
            "error_rounded",
            "error",
            "measured_on",
            "tokens",
            "held_out",
            "inputs",
            "choice",
            "calibrated",
            "notes",
            "fallbacks",
            "seconds",
            "picture",
        ),
    }
    pressed = CompressedCheckpoint.open(tmp_path / "out")
    assert sum(row["bytes"] for row in rows.values()) == report["size"]["bytes_compressed_weights"] + _not_planned(pressed)
    assert sum(row["error"] for row in rows.values()) < sum(row["error_rounded"] for row in rows.values())


# Maps on both sides, of experts that saw no text too, and maps that the quantizer itself keeps.
EXPERTS: dict[str, dict[str, Any]] = {
    "balance + hadamard + ldlq": {
        "transforms": ["balance", {"name": "hadamard", "outputs": True}],
        "quantizer": {"name": "ldlq", "passes": 2},
    },
    "rsq, running groups": {"transforms": ["hadamard"], "quantizer": {"name": "rsq", "groups": "running"}},
    "ptq161": {"weights": "binary-row", "quantizer": "ptq161"},
}


@pytest.mark.parametrize("what", EXPERTS)
def test_experts_have_maps_too(
    what: str, tiny_model: Callable[..., Path], gptq_recipe: Callable[..., Recipe], tmp_path: Path
) -> None:
    model = tiny_model("mixtral", num_hidden_layers=1)
    recipe = gptq_recipe(**{"min_expert_tokens": 48, **EXPERTS[what]})
    report = quantize_directory(model, tmp_path / "out", recipe, proof=Proof(tokens=64, length=32))
    assert any("fewer than 48" in fallback["what"] for fallback in report["fallbacks"])
    compressed = CompressedCheckpoint.open(tmp_path / "out")
    name = next(name for name in compressed.manifest.weights if "experts" in name)
    record, weight = compressed.manifest.weights[name], compressed.read_weight(name)
    assert weight.parts == record.experts == 4
    single = [part.dequantize() for part in weight.apart()]
    assert all(part.parts == 1 and part.input_map is not None for part in weight.apart())
    assert torch.equal(torch.cat(single), weight.dequantize())
    rows = record.parameter(name).shape[0]
    assert torch.equal(weight.row_slice(rows, 3 * rows).dequantize(), torch.cat(single[1:3]))
    # Every map is that of its own expert: as it was before all were stacked.
    original = load_file(next(model.glob("*.safetensors")))
    named = "w2" if "down" in name else "w1"
    for expert, found in enumerate(single):
        wanted = original[f"model.layers.0.block_sparse_moe.experts.{expert}.{named}.weight"]
        found = found[: len(wanted)]
        assert (found - wanted).norm() < 0.8 * wanted.norm()


def _not_planned(pressed: CompressedCheckpoint) -> int:
    """Bytes of all maps, which the plan leaves out, and those by which a quantizer kept apart more or less than it aims at."""
    total = 0
    for name in pressed.manifest.weights:
        weight = pressed.read_weight(name)
        total += sum(t.numel() * t.element_size() for leaf, t in weight.tensors().items() if leaf.startswith(("in.", "out.")))
        if pressed.manifest.recipe["quantizer"]["name"] == "spqr":
            total += sum(t.numel() * t.element_size() for t in weight.terms[1].tensors.values())
            record = pressed.manifest.weights[name]
            rows, cols = record.parameter(name).shape
            experts = max(record.experts, 1)
            # SpQR counts on 1 % of the weights: a column of 16 bits and a value of 16 bits each, and 32 bits where each row begins.
            total -= 4 * (rows * experts + 1) + 4 * round(0.01 * rows * cols) * experts
    return total


@pytest.mark.parametrize(
    ("quantizer", "corrections"),
    [
        ({"name": "gptq"}, [{"name": "salient", "share": 0.01}, {"name": "lqer", "rank": 4}]),
        ({"name": "spqr", "groups": "static"}, [{"name": "lqer", "rank": 4}]),
    ],
)
def test_experts_have_terms_too_and_one_without_tokens_has_them_as_well(
    quantizer: dict[str, Any],
    corrections: list[dict[str, Any]],
    tiny_model: Callable[..., Path],
    gptq_recipe: Callable[..., Recipe],
    tmp_path: Path,
) -> None:
    recipe = gptq_recipe(quantizer=quantizer, corrections=corrections, min_expert_tokens=48)
    report = quantize_directory(tiny_model("mixtral"), tmp_path / "out", recipe, proof=Proof(tokens=0))
    experts = [row for row in report["layers"] if "experts" in row["name"]]
    scarce = [text for row in experts for text in row["fallbacks"]]
    assert 0 < len(scarce) < sum(len(row["tokens"]) for row in experts), "some of the experts saw enough, others did not"
    pressed = CompressedCheckpoint.open(tmp_path / "out")
    assert sum(row["bytes"] for row in report["layers"]) == report["size"]["bytes_compressed_weights"] + _not_planned(pressed)
    for name in pressed.manifest.weights:
        assert [t.kind for t in pressed.read_weight(name).terms] == ["packed", "sparse", "low_rank"]


def test_experts_have_no_other_target_and_it_is_said(
    tiny_model: Callable[..., Path], gptq_recipe: Callable[..., Recipe], tmp_path: Path
) -> None:
    recipe = gptq_recipe(transforms=["qep"], calibration={"sequential": True}, min_expert_tokens=1)
    report = quantize_directory(tiny_model("mixtral"), tmp_path / "out", recipe, proof=Proof(tokens=0))
    told = {row["name"]: row["fallbacks"] for row in report["layers"]}
    assert all(texts for name, texts in told.items() if "experts" in name)
    assert not any(texts for name, texts in told.items() if "experts" not in name)


class StopAfter(Silent):
    """Stops the run when a unit is done."""

    def __init__(self, unit: str) -> None:
        self.unit = unit

    def advance(self, unit: str, **figures: Any) -> None:
        if unit.endswith(self.unit):
            raise JobStopped("stopped by the test")


@pytest.mark.parametrize(
    "what",
    # All parts of the first are in `everything`.
    [pytest.param("hadamard + gptq + lqer", marks=pytest.mark.release), "everything", "another target, weight by weight"],
)
def test_a_run_that_was_stopped_ends_in_the_same_bytes(
    what: str, tiny_model: Callable[..., Path], gptq_recipe: Callable[..., Recipe], tmp_path: Path
) -> None:
    model, recipe = tiny_model("llama"), gptq_recipe(**RECIPES[what])
    quantize_directory(model, tmp_path / "whole", recipe, proof=Proof(tokens=0))
    with pytest.raises(JobStopped):
        quantize_directory(model, tmp_path / "parts", recipe, proof=Proof(tokens=0), progress=StopAfter("layers.0"))
    assert (tmp_path / "parts" / JOB_DIRECTORY).exists()
    quantize_directory(model, tmp_path / "parts", recipe, proof=Proof(tokens=0))
    names = [*CompressedCheckpoint.open(tmp_path / "whole").manifest.files, "bitpress.json"]
    for name in names:
        assert (tmp_path / "whole" / name).read_bytes() == (tmp_path / "parts" / name).read_bytes(), name


def test_hyphens_and_underscores_in_names_are_alike() -> None:
    recipe = make_recipe({"weights": "int4-g64", "quantizer": "bitnet-ptq", "transforms": ["awq_scale"]})
    assert recipe.quantizer["name"] == "bitnet_ptq"
    assert [name for name, _ in [(p.name, p.part) for p in build_method(recipe).of_key("transforms")]] == ["awq-scale"]
    assert make_recipe({}, ["quantizer=pb-llm"]).quantizer["name"] == "pb_llm"


def test_what_is_left_out_is_channel_scales_and_gptq() -> None:
    scales = [{"name": "awq-scale", "grid": 20, "run_time": False}]
    left_out = build_method(make_recipe({})).resolved()
    assert left_out["transforms"] == scales
    assert left_out["quantizer"]["name"] == "gptq"
    settings = build_method(make_recipe({}, ["quantizer.damp=0.5"])).resolved()
    assert settings["transforms"] == scales
    assert settings["quantizer"]["damp"] == 0.5
    assert build_method(make_recipe({"corrections": ["lqer"]})).resolved()["transforms"] == scales
    assert build_method(make_recipe({"quantizer": "gptq"})).resolved()["transforms"] == []
    assert build_method(make_recipe({"transforms": ["hadamard"]})).resolved()["quantizer"]["name"] == "gptq"
    assert [part["name"] for part in build_method(make_recipe({"transforms": ["hadamard"]})).resolved()["transforms"]] == [
        "hadamard"
    ]
    # Scales would change weights that are to stay, and they see a block as a whole.
    assert build_method(make_recipe({"weights": "dfloat11"})).resolved()["transforms"] == []
    assert (
        build_method(make_recipe({"overrides": [{"match": "*.v_proj", "weights": "dfloat11"}]})).resolved()["transforms"] == []
    )
    assert build_method(make_recipe({"calibration": {"sequential": True}})).resolved()["transforms"] == []


def test_default_scales_that_are_left_out_are_told(tiny_model: Callable[..., Path], tmp_path: Path) -> None:
    class Notes(Silent):
        def note(self, text: str) -> None:
            told.append(text)

    told: list[str] = []
    keys = {"weights": "int3-g16-zero", "calibration": {"samples": 4, "length": 32, "sequential": True}}
    for quantizer, expected in ((None, 1), ("gptq", 0)):
        told.clear()
        recipe = make_recipe({**keys, "quantizer": quantizer})
        out = tmp_path / str(quantizer)
        quantize_directory(tiny_model("llama"), out, recipe, proof=Proof(tokens=0), progress=Notes())
        assert sum("channel scales are left out" in text for text in told) == expected


def test_a_file_without_a_quantizer_takes_one_of_the_command_line(tmp_path: Path) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text("weights: int3-g16-zero\n", encoding="utf-8")
    made = read_method(path, None, None, None, "rtn", None, None, None, None, None, None)
    assert made.recipe.quantizer_name == "rtn"
    assert made.resolved()["transforms"] == []


@pytest.mark.parametrize("run_time", [True, False])
def test_scales_that_nothing_takes_are_left_alone_on_demand(
    tiny_model: Callable[..., Path], tmp_path: Path, run_time: bool
) -> None:
    """In GPT-2 an activation lies before mlp.c_proj, so that its input's scales cannot be folded."""
    keys = {
        "weights": "int3-g16-zero",
        "transforms": [{"name": "awq-scale", "run_time": run_time}],
        "calibration": {"samples": 4, "length": 32},
    }
    quantize_directory(tiny_model("gpt2"), tmp_path / "out", make_recipe(keys), proof=Proof(tokens=0))
    pressed = CompressedCheckpoint.open(tmp_path / "out")
    mapped = [name for name in pressed.manifest.weights if pressed.read_weight(name).input_map is not None]
    assert bool(mapped) == run_time
    assert all(name.endswith("mlp.c_proj.weight") for name in mapped)


def by_turns() -> list[Any]:
    """Every architecture with one or more of the searches; with the others before a release."""
    architectures = ["llama", "gpt2", "gemma3", "phi3", "mixtral"]
    return [
        pytest.param(architecture, search, marks=() if i == k % len(architectures) else pytest.mark.release)
        for i, architecture in enumerate(architectures)
        for k, search in enumerate(SCALE_SEARCHES)
    ]


@pytest.mark.parametrize(("architecture", "search"), by_turns())
def test_what_takes_the_scales_is_published_with_them(
    tiny_model: Callable[..., Path], tmp_path: Path, architecture: str, search: str
) -> None:
    source = tmp_path / "uneven"
    shutil.copytree(tiny_model(architecture, dtype="bfloat16"), source)
    generator = torch.Generator().manual_seed(0)
    tensors = load_file(source / "model.safetensors")
    for name, value in tensors.items():
        if value.ndim == 1 and name.endswith("weight"):  # norms: so that channels are of different sizes
            value.mul_(torch.exp(torch.randn(value.shape, generator=generator)))
    save_file(tensors, source / "model.safetensors", metadata={"format": "pt"})
    keys = {"weights": "int8-row", "transforms": [search], "quantizer": "rtn", "compute": "fp32"}
    recipe = make_recipe({**keys, "calibration": {"samples": 4, "length": 32}})
    quantize_directory(source, tmp_path / "out", recipe, proof=Proof(tokens=0))
    before, after = load_file(source / "model.safetensors"), CompressedCheckpoint.open(tmp_path / "out")
    kept = {name: value for name, value in after.load("").items() if name in before}
    assert any(not torch.equal(value, before[name]) for name, value in kept.items()), "nothing took a scale"
    tokens = torch.randint(0, 64, (2, 32), generator=generator)
    original = transformers.AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32)
    with torch.no_grad():
        wanted, given = original(tokens).logits, bitpress.load(tmp_path / "out", dtype="fp32")(tokens).logits
    # Scales that are lost change every channel by its factor; 8 bits a row and norms in bf16 change the logits by about a hundredth.
    assert float((given - wanted).norm() / wanted.norm()) < 0.05


def test_a_norm_that_would_be_lost_is_an_error(
    tiny_model: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rescale = press.rescale_block_

    def forgetful(model: Any, i: int, tensors: dict[str, torch.Tensor], *rest: Any) -> Any:
        return rescale(model, i, dict(tensors), *rest)

    monkeypatch.setattr(press, "rescale_block_", forgetful)
    recipe = make_recipe({"weights": "int3-g16-zero", "calibration": {"samples": 4, "length": 32}})
    with pytest.raises(NumericsError, match="would be stored with other values than the model computes with"):
        quantize_directory(tiny_model("llama", dtype="bfloat16"), tmp_path / "out", recipe, proof=Proof(tokens=0))
